"""`BFIndex`: the index of hnswlib that measures every distance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.header import described, whole
from anabranch.graph.hnsw.checks import too_long
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.hnsw.search import scan_many
from anabranch.graph.hnsw.storage import Storage
from anabranch.graph.hnswlib_compat.base import FULL, METRIC, Base, labels_of, last_of_each
from anabranch.graph.workers import Workers

KIND = "hnswlib_compat brute-force index"


class BFIndex(Base):
    """`hnswlib.BFIndex`: every distance. Any number of threads may ask beside one that changes something."""

    def __init__(self, space: str, dim: int) -> None:
        super().__init__(space, dim)
        self._storage: Storage | None = None
        self._max_elements = self._next = 0
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        # Of all of these: kernels read arrays that grow.
        self._lock = ReadWriteLock()

    def __repr__(self) -> str:
        return f"<hnswlib.BFIndex(space='{self._space}', dim={self._dim})>"

    def init_index(self, max_elements: int) -> None:
        """Begin an empty index."""
        with self._lock.write():
            if self._storage is not None:
                raise RuntimeError("The index is already initiated.")
            self._storage, self._max_elements = self._empty(), int(max_elements)

    def add_items(self, data: Any, ids: Any = None) -> None:
        """Insert vectors, or replace those whose label is there."""
        self._made()
        vector_ND = self._vectors(data)
        with self._lock.write():
            self._add(self._made(), vector_ND, ids)

    def _add(self, held: Storage, vector_ND: np.ndarray, ids: Any) -> None:
        rows = len(vector_ND)
        label_N = labels_of(ids, rows, self._next)
        chosen = last_of_each(label_N)
        vector_ND, label_N = vector_ND[chosen], label_N[chosen]
        is_known = np.array([label in self._slots for label in label_N.tolist()], bool)
        if len(self._slots) + int((~is_known).sum()) > self._max_elements:
            raise RuntimeError(FULL)
        num_new = int((~is_known).sum())
        num_free = min(len(self._free), num_new)
        # Before anything changes: there may be no memory for it.
        held.reserve(num_new - num_free)
        self._next += rows
        # The places of deleted ones.
        for row in np.flatnonzero(~is_known)[:num_free].tolist():
            self._slots[int(label_N[row])] = self._free.pop()
            is_known[row] = True
        slot_S = np.array([self._slots[label] for label in label_N[is_known].tolist()], np.int64)
        held.put(slot_S, vector_ND[is_known])
        held.label[slot_S] = label_N[is_known]
        new = ~is_known
        if new.any():
            slots = held.append(vector_ND[new], label_N[new], np.zeros(int(new.sum()), np.int32))
            self._slots.update(zip(label_N[new].tolist(), slots.tolist(), strict=True))

    def delete_vector(self, label: int) -> None:
        """Delete an element; nothing happens for an unknown label."""
        with self._lock.write():
            slot = self._slots.pop(int(label), None)
            if slot is not None:
                self._free.append(slot)

    def knn_query(
        self, data: Any, k: int = 1, num_threads: int = -1, filter: Callable[[int], bool] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels, uint64 [Q, k], and distances, float32 [Q, k], the nearest first."""
        self._made()
        query_QD = self._vectors(data)
        with self._lock.read():
            label_S = sorted(self._slots)
        # Whatever it does, also with this index.
        allowed_S = label_S if filter is None else [label for label in label_S if filter(label)]
        with self._lock.read():
            return self._query(self._made(), query_QD, k, allowed_S, num_threads)

    def _query(
        self, held: Storage, query_QD: np.ndarray, k: int, label_S: list[int], num_threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of elements with some labels, rising, that are still there."""
        slot_S = np.array([self._slots[label] for label in label_S if label in self._slots], np.int64)
        if k < 1 or (k > len(slot_S) and len(query_QD)):
            raise RuntimeError(f"k is {k}, and there are {len(slot_S)} elements to return")
        id_QK = np.full((len(query_QD), k), -1)
        distance_QK = np.full(id_QK.shape, np.inf, np.float32)
        queries, label_N = held.encode_queries(query_QD), held.label[: held.count]

        def scan(begin: int, end: int) -> None:
            counts = np.zeros(2, np.int64)
            scan_many(held.graph, label_N, slot_S, *queries, begin, end, id_QK, distance_QK, counts)

        with Workers(self._threads(num_threads, len(query_QD))) as workers:
            workers.run(scan, len(query_QD), 4)
        return id_QK.astype(np.uint64), distance_QK

    def get_max_elements(self) -> int:
        """How many elements fit."""
        return self._max_elements

    def get_current_count(self) -> int:
        """How many elements there are."""
        return len(self._slots)

    def save_index(self, path_to_index: str | Path) -> None:
        """Write the index into one file, all or nothing."""
        with self._lock.read():
            arrays, most = self._arrays(), self._max_elements
        write_arrays(path_to_index, KIND, arrays, {"max_elements": most})

    def _arrays(self) -> dict[str, np.ndarray]:
        """Copies of all vectors and their labels."""
        held = self._made()
        slot_S = np.array([self._slots[label] for label in sorted(self._slots)], np.int64)
        return {"vectors": held.decode(slot_S), "labels": held.label[slot_S]}

    def __getstate__(self) -> dict[str, Any]:
        with self._lock.read():
            arrays = None if self._storage is None else self._arrays()
            numbers = {"_max_elements": self._max_elements, "_next": self._next, "num_threads": self.num_threads}
            return {"space": self._space, "dim": self._dim, "arrays": arrays, "numbers": numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["space"], state["dim"])  # type: ignore[misc]
        if state["arrays"] is not None:
            self._take(state["arrays"]["vectors"], state["arrays"]["labels"])
        self.__dict__.update(state["numbers"])

    def load_index(self, path_to_index: str | Path, max_elements: int = 0) -> None:
        """Read what `save_index` wrote, in place of what there is; ``max_elements`` is not looked at, as there."""
        try:
            found = read_arrays(path_to_index, KIND)
            with described(path_to_index, "an index"):
                vectors, labels = found.arrays["vectors"], found.arrays["labels"]
                most = whole(found.meta["max_elements"], "max_elements")
                if vectors.dtype != np.float32 or labels.dtype.kind not in "iu" or labels.ndim != 1:
                    raise ValueError(f"vectors are {vectors.dtype}, labels {labels.dtype}")
                self._check(vectors, labels, most)
        except DataError as error:
            raise RuntimeError(f"Index seems to be corrupted or unsupported: {error}") from error
        if vectors.shape != (len(labels), self._dim):
            raise RuntimeError(
                f"{path_to_index} holds vectors of the shape {list(vectors.shape)}, not of {self._dim} numbers"
            )
        with self._lock.write():
            self._take(vectors, labels)
            self._max_elements, self._next = most, len(labels)

    def _check(self, vectors: np.ndarray, labels: np.ndarray, most: int) -> None:
        """Raise ValueError for what no `save_index` writes: labels that are none or stand there twice, more than fit, and no numbers."""
        if len(labels) > most:
            raise ValueError(f"there are {len(labels)} elements, and {most} fit")
        if labels.size and (labels.min() < 0 or labels.max() > np.iinfo(np.int64).max):
            raise ValueError(f"labels are 0 to {np.iinfo(np.int64).max}, and there is one that is not")
        if len(np.unique(labels)) < len(labels):
            raise ValueError("a label stands there twice")
        is_finite = bool(np.isfinite(vectors).all())
        if not is_finite or (self._space != "cosine" and vectors.ndim == 2 and too_long(vectors) is not None):
            raise ValueError("there is a vector that is not finite, or too long")

    def _take(self, vectors: np.ndarray, labels: np.ndarray) -> None:
        """Hold these in place of what there is."""
        held, labels = self._empty(), labels.astype(np.int64)
        slots = held.append(vectors, labels, np.zeros(len(labels), np.int32)) if len(labels) else np.empty(0, np.int64)
        self._storage, self._slots, self._free = held, dict(zip(labels.tolist(), slots.tolist(), strict=True)), []

    def _empty(self) -> Storage:
        return Storage(self._dim, METRIC[self._space], 2, 2, "f32", False)

    def _made(self) -> Storage:
        if self._storage is None:
            raise RuntimeError("The index is not initiated; call init_index or load_index")
        return self._storage
