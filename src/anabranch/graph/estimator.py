"""What estimators of this package have in common, in the form scikit-learn users know, and look-ups in embeddings."""

import inspect
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from anabranch.errors import ConfigError, InputError


class Estimator:
    """Base: constructors store what they are given under the same names; `get_params` reads it back, `set_params` changes it."""

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
        checked = type(self)(**{**self.get_params(), **params})
        for name in params:
            setattr(self, name, getattr(checked, name))
        return self

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        return f"{type(self).__name__}({given})"


def most_similar(embedding_ND: ArrayLike, node: int, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nodes whose vectors have the largest cosine with that of ``node``, itself left out: ids int64 and cosines float32.

    Exact, in one pass over the vectors; for many look-ups put them into an `HNSW` of metric ``cosine``. A zero vector is
    similar to nothing (cosine 0). Fewer than ``k`` others: all of them. Raises InputError for a node or k out of range.
    """
    vectors = np.asarray(embedding_ND, np.float32)
    if vectors.ndim != 2:
        raise InputError(f"an embedding has the shape [nodes, dim], this one {vectors.shape}")
    if not 0 <= node < len(vectors):
        raise InputError(f"node {node} is not one of the {len(vectors):,} nodes of the embedding")
    if k < 1:
        raise InputError(f"k is {k}; it must be at least 1")
    norm_N = np.linalg.norm(vectors, axis=1)
    cosine_N = vectors @ vectors[node] / np.maximum(norm_N * norm_N[node], np.float32(1e-30))
    cosine_N[node] = -np.inf
    count = min(k, len(vectors) - 1)
    best = np.argpartition(-cosine_N, max(count - 1, 0))[:count]
    best = best[np.lexsort((best, -cosine_N[best]))]
    return best.astype(np.int64), cosine_N[best].astype(np.float32)
