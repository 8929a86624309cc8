"""What estimators of this package have in common, in the form scikit-learn users know, and look-ups in embeddings."""

import inspect
from copy import deepcopy
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

from anabranch.bounds import is_whole, shown, whole
from anabranch.errors import ConfigError, InputError
from anabranch.graph.arguments import is_number, plain
from anabranch.graph.masks import unmasked

_ROWS = 1 << 14


class Estimator:
    """Base: constructors store what they are given under the same names; `get_params` reads it back, `set_params` changes it."""

    # Arguments that what was fitted is of: the same must count for all that is asked of it.
    _OF_FIT: ClassVar[tuple[str, ...]] = ()
    _at_fit: dict[str, Any] | None = None

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments. ``deep`` is there for scikit-learn."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> Self:
        """Change arguments. Raises ConfigError for an unknown one, and whatever the constructor does not accept."""
        known = self._names()
        for name in params:
            if name not in known:
                raise ConfigError(f"{type(self).__name__} has no parameter {name!r}; it has {', '.join(known)}")
        # What it has from a file of before stays as it is.
        checked = type(self)(**{**self._lawful(self.get_params()), **params})
        for name in params:
            setattr(self, name, getattr(checked, name))
        return self

    @classmethod
    def _lawful(cls, params: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a file of before as they may be today, where limits have become narrower since."""
        return params

    @classmethod
    def _of_file(cls, params: dict[str, Any]) -> Self:
        """What a file was made with, also where another fit with these arguments would be refused today."""
        lawful = cls._lawful(params)
        made = cls(**lawful)
        for name, value in params.items():
            if value is not lawful[name]:
                setattr(made, name, value)
        return made

    def _become(self, **fitted: Any) -> None:
        """Take what was fitted, or read, with the arguments that it has now: all at once, so that a fit that is refused or interrupted
        leaves what there was.

        Args:
            fitted: attributes by name.
        """
        # Copies: whoever gave a list may change what is in it.
        fitted["_at_fit"] = {name: deepcopy(getattr(self, name)) for name in self._OF_FIT}
        # What only a fit before has left goes with it.
        gone = vars(self).get("_taken", frozenset()) - fitted.keys()
        kept = {name: value for name, value in vars(self).items() if name not in gone}
        self.__dict__ = {**kept, **fitted, "_taken": frozenset(fitted)}

    def _check_as_fitted(self) -> None:
        """Raises InputError if an argument is not what it was when this was fitted: arrays of two kinds would meet, or of two meanings."""
        for name, then in (self._at_fit or {}).items():
            now = getattr(self, name)
            if not _is_equal(now, then):
                raise InputError(
                    f"{name} is {shown(now)}, and was {shown(then)} when this {type(self).__name__} was fitted; fit again, or set it back"
                )

    def _make_plain(self) -> None:
        """Let arguments that are numbers of numpy be those of Python: products of small ones would overflow."""
        for name, value in self.get_params().items():
            if isinstance(value, np.generic):
                setattr(self, name, plain(value))

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        return f"{type(self).__name__}({given})"


def _is_equal(one: Any, other: Any) -> bool:
    """Numbers, words, and sequences of them."""
    if isinstance(one, list | tuple | np.ndarray) and isinstance(other, list | tuple | np.ndarray):
        return np.array_equal(np.asarray(one), np.asarray(other))
    return (type(one) is type(other) and bool(one == other)) or (
        is_number(one) and is_number(other) and bool(one == other)
    )


def most_similar(
    embedding_ND: ArrayLike, node: Any, k: int = 10, *, names: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nodes whose vectors have the largest cosine with that of ``node``, itself left out: ids int64 and cosines float32.

    With ``names`` of the rows (`Graph.names`), ``node`` is a name, and names come back.

    Exact, in one pass over the vectors; for many look-ups put them into an `HNSW` of metric ``cosine``. Ties go to the lowest id. A zero
    vector is similar to nothing (cosine 0). Fewer than ``k`` others: all of them. Raises InputError for a node or k out of range,
    and for vectors that are not finite numbers.
    """
    given = unmasked(embedding_ND, "an embedding")
    try:
        vectors = np.asarray(given)
    except ValueError:
        raise InputError("an embedding is rows of one length, and these are of several") from None
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        raise InputError(
            f"an embedding is numbers of the shape [nodes, dim], this one is {vectors.dtype} {vectors.shape}"
        )
    if names is not None:
        given = unmasked(names, "names")
        try:
            named = np.asarray(given, object)
        except ValueError:
            raise InputError("names is a list of lists of several lengths; give one per vector") from None
        if named.shape != (len(vectors),):
            raise InputError(
                f"there are {len(vectors):,} vectors and names of the shape {named.shape}; give one per vector"
            )
        # One by one, and as numbers and texts of Python: an array compares with a list as with an array.
        called = _bare(node)
        found = [
            row for row, name in enumerate(map(_bare, named.tolist())) if type(name) is type(called) and name == called
        ]
        if not found:
            raise InputError(f"no vector is called {shown(node)}")
        ids, cosines = most_similar(vectors, int(found[0]), k)
        return named[ids], cosines
    if not is_whole(node) or not 0 <= node < len(vectors):
        raise InputError(f"node {shown(node)} is not one of the {len(vectors):,} nodes of the embedding")
    k = whole("k", k, 1)
    cosine_N = np.empty(len(vectors), np.float32)
    # Looked at below.
    with np.errstate(invalid="ignore", over="ignore"):
        own = vectors[node].astype(np.float64)
        own /= max(float(np.linalg.norm(own)), 1e-300)
        # 64-bit copies of some rows at a time.
        for start in range(0, len(vectors), _ROWS):
            rows = vectors[start : start + _ROWS].astype(np.float64)
            cosine_N[start : start + _ROWS] = rows @ own / np.maximum(np.linalg.norm(rows, axis=1), 1e-300)
    bad = np.flatnonzero(np.isnan(cosine_N))
    if bad.size:
        first = node if len(bad) == len(vectors) else int(bad[0])
        raise InputError(f"the vector of node {first} has values that are not finite")
    cosine_N[node] = -np.inf
    count = min(int(k), len(vectors) - 1)
    if not count:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    least = np.partition(cosine_N, len(vectors) - count)[len(vectors) - count]
    above, even = np.flatnonzero(cosine_N > least), np.flatnonzero(cosine_N == least)
    best = np.concatenate([above, even[: count - len(above)]])
    best = best[np.lexsort((best, -cosine_N[best]))]
    return best.astype(np.int64), cosine_N[best]


def _bare(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
