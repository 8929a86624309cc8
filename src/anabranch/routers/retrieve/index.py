"""The seam of vector indexes: unit vectors in, the most similar ids out, never across namespaces.

An `Index` holds one `Shard` per namespace, so that what one tenant stored cannot be reached from another's search, and a search costs
what its own namespace holds. Shards of three kinds: `exact`, `clustered`, `hnsw`.
"""
# Shapes: N vectors, D dimensions, K results

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.embed.checked import scaled

# int64 ids [N] -> bool [N].
Allow = Callable[[np.ndarray], np.ndarray]


class Shard:
    """Interface: the vectors of one namespace. Ids and vectors come checked, vectors of length 1 (or 0)."""

    def add(self, id_N: np.ndarray, vector_ND: np.ndarray) -> None:
        """Put in; none of the ids is there."""
        raise NotImplementedError

    def remove(self, id_N: np.ndarray) -> None:
        """Take out; all of the ids are there."""
        raise NotImplementedError

    def compact(self) -> None:
        """Leave nothing in memory of what was taken out."""

    def search(self, query_D: np.ndarray, k: int, allow: Allow | None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and similarities of at most k, falling, ties by id."""
        raise NotImplementedError

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids and vectors."""
        raise NotImplementedError

    def vector(self, id: int) -> np.ndarray:
        """Of one that is there, float32 [D]."""
        raise NotImplementedError

    @property
    def size_bytes(self) -> int:
        """Memory of its arrays."""
        raise NotImplementedError

    def state(self) -> Arrays:
        """What `rows` does not tell."""
        return {}

    def load_state(self, id_N: np.ndarray, vector_ND: np.ndarray, arrays: Arrays) -> None:
        """Become what `rows` and `state` told of."""
        self.add(id_N, vector_ND)


class Index(Part, family="vector_index"):
    """Vectors by id and namespace. Any number of threads may use it; calls take turns.

    Args:
        config: of the kind.
        dim: D, fixed for good: vectors of another embedder need another index.
    """

    @configclass
    class Config(BaseConfig):
        """Nothing in common."""

    def __init__(self, config: Any, dim: int) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int | np.integer) or dim < 1:
            raise InputError(f"dim is {dim!r}; it must be a positive integer")
        self.config, self.dim = config, int(dim)
        self._shards: dict[str, Shard] = {}
        self._namespace: dict[int, str] = {}  # of each id
        self._sizes: dict[str, int] = {}
        self._next_id = 0
        self._lock = threading.RLock()

    def make_shard(self) -> Shard:
        """An empty shard of this kind."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._namespace)

    def __contains__(self, id: int) -> bool:
        return int(id) in self._namespace

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} vectors of {self.dim} in {len(self._shards):,} namespaces)"

    def namespace_of(self, id: int) -> str:
        """Where an id is. Raises InputError for an unknown one."""
        with self._lock:
            return self._place(int(id))

    def _place(self, id: int) -> str:
        if id not in self._namespace:
            raise InputError(f"no vector with id {id} in the index")
        return self._namespace[id]

    def _vector(self, id: int) -> np.ndarray:
        return self._shards[self._place(id)].vector(id)

    def vectors(self, ids: Iterable[int]) -> np.ndarray:
        """Unit vectors of these ids, float32 [N, D]. Raises InputError for an unknown one."""
        with self._lock:
            found = [self._vector(int(id)) for id in ids]
        return np.array(found, np.float32).reshape(len(found), self.dim)

    def sizes(self) -> dict[str, int]:
        """Vectors in each namespace."""
        with self._lock:
            return dict(self._sizes)

    @property
    def size_bytes(self) -> int:
        """Memory of all arrays."""
        with self._lock:
            return sum(shard.size_bytes for shard in self._shards.values())

    def add(self, vectors: Any, ids: Sequence[int] | np.ndarray | None = None, *, namespace: str = "") -> np.ndarray:
        """Insert vectors; they are scaled to length 1 (zeros stay zeros).

        Args:
            vectors: [N, D] numbers, or [D] for one.
            ids: [N] integers of at least 0, not in the index yet; None for those after the largest so far.
            namespace: where they can be found from.

        Returns: the ids, int64 [N].

        Raises InputError, and then adds none, for vectors of another dimension or with numbers that are not finite, or ids that do not fit.
        """
        vector_ND = unit_rows(vectors, self.dim, "vectors")
        with self._lock:
            id_N = self._new_ids(ids, len(vector_ND))
            if len(id_N):
                shard = self._shards.get(namespace) or self._shards.setdefault(namespace, self.make_shard())
                shard.add(id_N, vector_ND)
                self._namespace |= dict.fromkeys(id_N.tolist(), namespace)
                self._sizes[namespace] = self._sizes.get(namespace, 0) + len(id_N)
                self._next_id = max(self._next_id, int(id_N.max()) + 1)
            return id_N

    def _new_ids(self, ids: Any, count: int) -> np.ndarray:
        if ids is None:
            return np.arange(self._next_id, self._next_id + count)
        id_N = np.asarray(ids, np.int64).reshape(-1)
        if len(id_N) != count:
            raise InputError(f"{len(id_N)} ids for {count} vectors")
        if len(np.unique(id_N)) < count or (count and id_N.min() < 0):
            raise InputError("ids must differ and be at least 0")
        known = [id for id in id_N.tolist() if id in self._namespace]
        if known:
            raise InputError(f"id {known[0]} is in the index; remove it first")
        return id_N

    def remove(self, ids: Iterable[int]) -> int:
        """Take out those of the ids that are there; returns how many were."""
        with self._lock:
            by_namespace: dict[str, list[int]] = {}
            for id in dict.fromkeys(int(id) for id in ids):
                if id in self._namespace:
                    by_namespace.setdefault(self._namespace.pop(id), []).append(id)
            for namespace, gone in by_namespace.items():
                self._sizes[namespace] -= len(gone)
                if self._sizes[namespace]:
                    self._shards[namespace].remove(np.asarray(gone, np.int64))
                else:
                    del self._shards[namespace], self._sizes[namespace]
            return sum(map(len, by_namespace.values()))

    def compact(self) -> None:
        """Leave nothing in memory of what was removed. `exact` and `clustered` never do; `hnsw` else waits until a fifth is removed."""
        with self._lock:
            for shard in self._shards.values():
                shard.compact()

    def search(
        self, query: Any, k: int = 10, *, namespace: str | None = "", allow: Allow | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The most similar vectors.

        Args:
            query: [D] numbers.
            k: how many.
            namespace: where to look; None for everywhere.
            allow: takes int64 ids [N], says which may be found, bool [N].

        Returns: ids, int64 [K], and cosine similarities, float64 [K], falling, ties by id; fewer than k where there are fewer.

        Raises InputError for a query of another dimension or with numbers that are not finite, or k below 1.
        """
        query_D = unit_rows(query, self.dim, "query")[0]
        if k < 1:
            raise InputError(f"k is {k}; it must be at least 1")
        with self._lock:
            shards = self._shards.values() if namespace is None else [self._shards.get(namespace)]
            found = [shard.search(query_D, k, allow) for shard in shards if shard is not None]
        if not found:
            return np.zeros(0, np.int64), np.zeros(0)
        id_N, similarity_N = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.lexsort((id_N, -similarity_N))[:k]
        return id_N[order], similarity_N[order]

    def state(self) -> tuple[Arrays, Facts]:
        """All of it: arrays, and facts ready for JSON."""
        with self._lock:
            arrays: Arrays = {}
            for number, shard in enumerate(self._shards.values()):
                arrays[f"{number}.id_N"], arrays[f"{number}.vector_ND"] = shard.rows()
                arrays |= {f"{number}.{name}": value for name, value in shard.state().items()}
            return arrays, {"dim": self.dim, "namespaces": list(self._shards), "next_id": self._next_id}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Become what `state` told of. Raises InputError if that is of another dimension."""
        if facts["dim"] != self.dim:
            raise InputError(f"the stored vectors have {facts['dim']} dimensions, the index has {self.dim}; embed anew")
        with self._lock:
            self._shards, self._namespace, self._sizes = {}, {}, {}
            for number, namespace in enumerate(facts["namespaces"]):
                own = {name.partition(".")[2]: value for name, value in arrays.items() if name.startswith(f"{number}.")}
                id_N, vector_ND = own.pop("id_N"), own.pop("vector_ND")
                shard = self._shards[namespace] = self.make_shard()
                shard.load_state(id_N, vector_ND, own)
                self._namespace |= dict.fromkeys(id_N.tolist(), namespace)
                self._sizes[namespace] = len(id_N)
            self._next_id = int(facts["next_id"])


def unit_rows(vectors: Any, dim: int, name: str) -> np.ndarray:
    """float32 [N, D] of length 1 (zeros stay). Raises InputError for another shape or numbers that are not finite."""
    with np.errstate(over="ignore"):
        vector_ND = np.atleast_2d(np.asarray(vectors, np.float32))
    if vector_ND.ndim != 2 or (vector_ND.size and vector_ND.shape[1] != dim):
        raise InputError(f"{name} has shape {list(np.shape(vectors))}; the index holds vectors of {dim} numbers")
    if not np.isfinite(vector_ND).all():
        row = int(np.flatnonzero(~np.isfinite(vector_ND).all(1))[0])
        raise InputError(f"{name}[{row}] has numbers that are not finite")
    vector_ND = vector_ND.reshape(-1, dim)
    with np.errstate(over="ignore"):
        length_N1 = np.linalg.norm(vector_ND, axis=1, keepdims=True)
    is_odd_N = ~np.isfinite(length_N1[:, 0]) | ((length_N1[:, 0] == 0) & vector_ND.any(1))
    unit_ND = vector_ND / np.where(length_N1 > 0, length_N1, 1)
    # Of huge and tiny rows the squares are no floats.
    unit_ND[is_odd_N] = scaled(vector_ND[is_odd_N].astype(np.float64))
    return unit_ND
