"""The interface of hnswlib 0.8 on our index: ``import anabranch.graph.hnswlib_compat as hnswlib`` runs code written for it.

The same classes, methods, arguments, defaults, properties and errors (RuntimeError, or ValueError where theirs is one), so also what people
trip over: a fixed ``max_elements``, and an error where fewer than k results are found. New code has neither with `anabranch.graph.HNSW`.

What differs, on purpose:

- files and pickles are in our checked format; those of hnswlib are not read, nor does it read ours
- an error leaves the index as it was: hnswlib may have added the first part of the vectors
- a Python filter is called once per element and call, not once per visited element and query
- elements put into the places of deleted ones are inserted anew and all lists that pointed there are mended
- labels end at 2**63 - 1; vectors that are not finite are refused; a query of a wrong dimension is an error, not a read beyond its end
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from anabranch import machine
from anabranch.errors import DataError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.checks import MAX_LENGTH, TOO_LONG, too_long
from anabranch.graph.hnsw.lock import LOOK_S, Workers
from anabranch.graph.hnsw.search import scan_many
from anabranch.graph.hnsw.storage import Storage
from anabranch.graph.interrupts import Interrupts

__all__ = ["BFIndex", "Index"]

KIND = "hnswlib_compat index"
BRUTE_KIND = "hnswlib_compat brute-force index"
SPACES = ("l2", "ip", "cosine")

# Vectors are scaled here, as there: a zero vector stays one.
METRIC = {"l2": "l2", "ip": "ip", "cosine": "ip"}
TOO_FEW = "Cannot return the results in a contiguous 2D array. Probably ef or M is too small"
FULL = "The number of elements exceeds the specified limit"
DEFAULT_EF = 10


class _Base:
    """What both kinds of index share."""

    def __init__(self, space: str, dim: int) -> None:
        if space not in SPACES:
            raise RuntimeError("Space name must be one of l2, ip, or cosine.")
        self._space, self._dim = space, int(dim)
        self.num_threads = machine.usable_cores()

    @property
    def space(self) -> str:
        """ "l2", "ip" or "cosine"."""
        return self._space

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self._dim

    def set_num_threads(self, num_threads: int) -> None:
        """Threads of calls that are not told; 0 or less for all processors."""
        self.num_threads = int(num_threads)

    def _vectors(self, data: Any) -> np.ndarray:
        found = np.ascontiguousarray(data, np.float32)
        if found.ndim not in (1, 2):
            raise RuntimeError(
                f"Input vector data wrong shape. Number of dimensions {found.ndim}. Data must be a 1D or 2D array."
            )
        found = found[None] if found.ndim == 1 else found
        if found.shape[1] != self._dim:
            raise RuntimeError("Wrong dimensionality of the vectors")
        bad = np.flatnonzero(~np.isfinite(found).all(1))
        if bad.size:
            raise RuntimeError(f"row {bad[0]} of the vectors is not finite")
        if self._space != "cosine" and (row := too_long(found)) is not None:
            raise RuntimeError(f"row {row} of the vectors is longer than {MAX_LENGTH:g}: {TOO_LONG}")
        if self._space == "cosine":
            length = np.sqrt(np.einsum("nd,nd->n", found, found))[:, None]
            found = found * (np.float32(1) / (length + np.float32(1e-30)))
        return found

    def _threads(self, num_threads: int, rows: int) -> int:
        threads = num_threads if num_threads > 0 else self.num_threads
        threads = min(threads, machine.affinity()) if threads > 0 else machine.affinity()
        # Not worth it, as there.
        return 1 if rows <= 4 * threads else threads


def _labels(ids: Any, rows: int, first: int) -> np.ndarray:
    if ids is None:
        return np.arange(first, first + rows)
    found = np.asarray(ids)
    if not (found.shape == (rows,) or (found.ndim == 0 and rows == 1)):
        raise RuntimeError(f"The input label shape {found.ndim} does not match the input data vector shape {rows}")
    found = np.atleast_1d(found)
    if found.size and (found.dtype.kind not in "iuf" or found.min() < 0 or found.max() > np.iinfo(np.int64).max):
        raise RuntimeError(f"labels must be integers from 0 to {np.iinfo(np.int64).max}")
    return found.astype(np.int64)


def _last_of_each(label_N: np.ndarray) -> np.ndarray:
    """Rows that stay where a label stands there twice: its last, as if they came one by one. Rising."""
    _, from_end = np.unique(label_N[::-1], return_index=True)
    return np.sort(len(label_N) - 1 - from_end)


class Index(_Base):
    """`hnswlib.Index`."""

    def __init__(self, space: Any = None, dim: int | None = None, *, index: "Index | None" = None) -> None:
        source = space if isinstance(space, Index) else index
        if source is not None:
            self.__setstate__(source.__getstate__())
            return
        if space is None or dim is None:
            raise TypeError("Index() needs a space and a dim")
        super().__init__(space, dim)
        self._ef = DEFAULT_EF
        self._guard = threading.RLock()
        self._index: HNSW | None = None
        self._max_elements = self._next = self._M = self._ef_construction = 0
        self._allow_replace = False
        self._deleted: dict[int, int] = {}  # label -> slot

    def __repr__(self) -> str:
        return f"<hnswlib.Index(space='{self._space}', dim={self._dim})>"

    # Properties

    @property
    def ef(self) -> int:
        """How many a search holds."""
        return self._ef

    @ef.setter
    def ef(self, ef: int) -> None:
        self._ef = int(ef)

    @property
    def max_elements(self) -> int:
        """How many elements fit; 0 before `init_index`."""
        return self._max_elements

    @property
    def element_count(self) -> int:
        """How many elements there are, deleted ones included."""
        return 0 if self._index is None else self._index._storage.count

    @property
    def ef_construction(self) -> int:
        """Candidates of a new element; 0 before `init_index`."""
        return self._ef_construction

    @property
    def M(self) -> int:
        """Links of a new element; 0 before `init_index`."""
        return self._M

    def set_ef(self, ef: int) -> None:
        """Set `ef`."""
        self.ef = ef

    def get_max_elements(self) -> int:
        """`max_elements`."""
        return self.max_elements

    def get_current_count(self) -> int:
        """`element_count`."""
        return self.element_count

    # Making

    def init_index(
        self,
        max_elements: int,
        M: int = 16,
        ef_construction: int = 200,
        random_seed: int = 100,
        allow_replace_deleted: bool = False,
    ) -> None:
        """Begin an empty index."""
        if self._index is not None:
            raise RuntimeError("The index is already initiated.")
        self._index = HNSW(self._dim, METRIC[self._space], M, ef_construction, seed=random_seed, compact_at=None)
        self._max_elements, self._M, self._ef_construction = int(max_elements), int(M), self._index.ef_construction
        self._allow_replace, self._next = bool(allow_replace_deleted), 0

    def add_items(self, data: Any, ids: Any = None, num_threads: int = -1, replace_deleted: bool = False) -> None:
        """Insert vectors, or move those whose label is there; with ``replace_deleted`` in the places of deleted elements first.

        Several threads may call it; one works at a time, with ``num_threads``.
        """
        self._made()
        vector_ND = self._vectors(data)
        with self._alone():
            self._add(vector_ND, ids, num_threads, replace_deleted)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """What is noted of labels here and what the index holds change together: for one thread, and without an interrupt in between."""
        with Interrupts(passes=True) as interrupts:
            while not self._guard.acquire(timeout=LOOK_S):
                interrupts.tell()
            try:
                yield
            finally:
                self._guard.release()

    def _add(self, vector_ND: np.ndarray, ids: Any, num_threads: int, replace_deleted: bool) -> None:
        index, rows = self._made(), len(vector_ND)
        label_N = _labels(ids, rows, self._next)
        if replace_deleted and not self._allow_replace:
            raise RuntimeError("Replacement of deleted elements is disabled in constructor")
        chosen = _last_of_each(label_N)
        vector_ND, label_N = vector_ND[chosen], label_N[chosen]
        is_dead = np.array([label in self._deleted for label in label_N.tolist()], bool)
        if is_dead.any() and self._allow_replace and not replace_deleted:
            raise RuntimeError(
                "Can't use addPoint to update deleted elements if replacement of deleted elements is enabled."
            )
        is_known = index._slots.known(label_N)
        new = np.flatnonzero(~is_known & ~(is_dead & (not replace_deleted)))
        num_vacant = min(len(self._deleted), len(new)) if replace_deleted else 0
        if self.element_count + len(new) - num_vacant > self._max_elements:
            raise RuntimeError(FULL)
        # Also where an interrupt lets only some of them in.
        self._next += rows
        revived = label_N[is_dead].tolist() if not replace_deleted else []
        if revived:
            index.restore(revived)
            for label in revived:
                del self._deleted[label]
            is_known = index._slots.known(label_N)
        threads = self._threads(num_threads, rows)
        if is_known.any():
            index.update(label_N[is_known], vector_ND[is_known], num_threads=threads)
        if num_vacant:
            self._replace(vector_ND[new[:num_vacant]], label_N[new[:num_vacant]], threads)
        if len(new) > num_vacant:
            index.add(vector_ND[new[num_vacant:]], label_N[new[num_vacant:]], reuse=False, num_threads=threads)

    def _replace(self, vector_ND: np.ndarray, label_N: np.ndarray, threads: int) -> None:
        """Put new elements into the slots of deleted ones; those of their own label first."""
        index, held = self._made(), self._made()._storage
        own = [label for label in label_N.tolist() if label in self._deleted]
        others = sorted(self._deleted.keys() - set(own), key=self._deleted.__getitem__)
        free = {label: self._deleted.pop(label) for label in own}
        rest = iter([self._deleted.pop(label) for label in others[: len(label_N) - len(own)]])
        slot_N = np.array([free[label] if label in free else next(rest) for label in label_N.tolist()])
        with index._lock.write(alone=True), Workers(threads) as workers:
            held.own()
            held.label[slot_N] = label_N
            held.mark(slot_N, deleted=False)
            index._slots.forget()
            index._changes.move(slot_N, vector_ND, workers)
            index._changes.repair()

    # Asking

    def knn_query(
        self, data: Any, k: int = 1, num_threads: int = -1, filter: Callable[[int], bool] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels, uint64 [Q, k], and distances, float32 [Q, k], the nearest first."""
        index, query_QD = self._made(), self._vectors(data)
        if k < 1:
            raise RuntimeError(f"k is {k}; it must be at least 1")
        if k > self.element_count and len(query_QD):
            raise RuntimeError(TOO_FEW)
        allowed = None if filter is None else [label for label in index.ids.tolist() if filter(label)]
        ids, distances = index.search(
            query_QD, k, max(self._ef, 1), allowed, num_threads=self._threads(num_threads, len(query_QD))
        )
        if (ids < 0).any():
            raise RuntimeError(TOO_FEW)
        return ids.astype(np.uint64), distances

    def get_items(self, ids: Any = None, return_type: str = "numpy") -> Any:
        """Vectors by label, as an array or as lists; of length 1 in the space "cosine"."""
        if return_type not in ("numpy", "list"):
            raise ValueError('return_type should be "numpy" or "list"')
        if ids is not None and np.ndim(ids) == 0:
            raise ValueError("get_items accepts a list of indices and returns a list of vectors")
        label_N = np.empty(0, np.int64) if ids is None else _flat_labels(ids)
        index = self._made()
        if not index._slots.known(label_N).all():
            raise RuntimeError("Label not found")
        found = np.array(index.vectors(label_N)) if len(label_N) else np.empty(0, np.float32)
        return found if return_type == "numpy" else found.tolist()

    def get_ids_list(self) -> list[int]:
        """All labels, those of deleted elements included."""
        with self._alone():
            return [*self._made().ids.tolist(), *self._deleted]

    # Changing

    def mark_deleted(self, label: int) -> None:
        """Let searches pass over an element."""
        index, label = self._made(), int(label)
        with self._alone():
            if label in self._deleted:
                raise RuntimeError("The requested to delete element is already deleted")
            if label not in index:
                raise RuntimeError("Label not found")
            slot = int(index._slots.find(np.array([label]))[0])
            index.remove([label])
            self._deleted[label] = slot

    def unmark_deleted(self, label: int) -> None:
        """Undo `mark_deleted`."""
        index, label = self._made(), int(label)
        with self._alone():
            if label in index:
                raise RuntimeError("The requested to undelete element is not deleted")
            if label not in self._deleted:
                raise RuntimeError("Label not found")
            index.restore([label])
            del self._deleted[label]

    def resize_index(self, new_size: int) -> None:
        """Let ``new_size`` elements fit."""
        with self._alone():
            if new_size < self.element_count:
                raise RuntimeError("Cannot resize, max element is less than the current number of elements")
            self._made()
            self._max_elements = int(new_size)

    # On disk

    def index_file_size(self) -> int:
        """Bytes of the arrays that `save_index` writes."""
        return sum(array.nbytes for array in self._made()._storage.arrays().values())

    def save_index(self, path_to_index: str | Path) -> None:
        """Write the index into one file, all or nothing."""
        index = self._made()
        state = index.__getstate__()
        write_arrays(path_to_index, KIND, state["arrays"], {"hnsw": state["meta"], "max_elements": self._max_elements})

    def load_index(self, path_to_index: str | Path, max_elements: int = 0, allow_replace_deleted: bool = False) -> None:
        """Read what `save_index` wrote, in place of what there is. Distances are those of this index's space."""
        try:
            found = read_arrays(path_to_index, KIND)
            meta = found.meta["hnsw"]
            meta["options"]["metric"] = METRIC[self._space]
            if meta["options"]["dim"] != self._dim:
                raise RuntimeError(
                    f"{path_to_index} holds vectors of {meta['options']['dim']} numbers, not {self._dim}"
                )
            index = HNSW._made(found.arrays, meta, mapped=False, source=str(path_to_index), num_threads=None)
        except (DataError, KeyError) as error:
            raise RuntimeError(f"Index seems to be corrupted or unsupported: {error}") from error
        with self._alone():
            self._index, self._ef = index, DEFAULT_EF
            self._M, self._ef_construction = index.M, index.ef_construction
            self._next = self.element_count
            self._max_elements = max_elements if max_elements >= self.element_count > 0 else found.meta["max_elements"]
            self._allow_replace = bool(allow_replace_deleted)
            self._find_deleted()

    def __getstate__(self) -> dict[str, Any]:
        with self._alone():
            state = {name: value for name, value in self.__dict__.items() if name != "_guard"}
            state["_deleted"] = dict(self._deleted)
            state["_index"] = None if self._index is None else self._index.__getstate__()
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._guard, self._deleted = threading.RLock(), dict(state["_deleted"])
        held = state["_index"]
        # A pickle of an earlier release holds the index itself.
        held = held.__getstate__() if isinstance(held, HNSW) else held
        if held is not None:
            self._index = object.__new__(HNSW)
            self._index.__setstate__(held)

    def _made(self) -> HNSW:
        if self._index is None:
            raise RuntimeError("The index is not initiated; call init_index or load_index")
        return self._index

    def _find_deleted(self) -> None:
        held = self._made()._storage
        dead = np.flatnonzero(held.deleted[: held.count])
        self._deleted = dict(zip(held.label[dead].tolist(), dead.tolist(), strict=True))


def _flat_labels(ids: Any) -> np.ndarray:
    """As many labels as the first dimension is long, in C order, as there."""
    found = np.asarray(ids)
    return found.reshape(-1)[: found.shape[0]].astype(np.int64)


class BFIndex(_Base):
    """`hnswlib.BFIndex`: every distance."""

    def __init__(self, space: str, dim: int) -> None:
        super().__init__(space, dim)
        self._storage: Storage | None = None
        self._max_elements = self._next = 0
        self._slots: dict[int, int] = {}
        self._free: list[int] = []

    def __repr__(self) -> str:
        return f"<hnswlib.BFIndex(space='{self._space}', dim={self._dim})>"

    def init_index(self, max_elements: int) -> None:
        """Begin an empty index."""
        if self._storage is not None:
            raise RuntimeError("The index is already initiated.")
        self._storage, self._max_elements = self._empty(), int(max_elements)

    def add_items(self, data: Any, ids: Any = None) -> None:
        """Insert vectors, or replace those whose label is there."""
        held, vector_ND = self._made(), self._vectors(data)
        label_N = _labels(ids, len(vector_ND), self._next)
        self._next += len(label_N)
        chosen = _last_of_each(label_N)
        vector_ND, label_N = vector_ND[chosen], label_N[chosen]
        is_known = np.array([label in self._slots for label in label_N.tolist()], bool)
        if len(self._slots) + int((~is_known).sum()) > self._max_elements:
            self._next -= len(chosen)
            raise RuntimeError(FULL)
        num_free = min(len(self._free), int((~is_known).sum()))
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
        slot = self._slots.pop(int(label), None)
        if slot is not None:
            self._free.append(slot)

    def knn_query(
        self, data: Any, k: int = 1, num_threads: int = -1, filter: Callable[[int], bool] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels, uint64 [Q, k], and distances, float32 [Q, k], the nearest first."""
        held, query_QD = self._made(), self._vectors(data)
        slot_S = np.array(
            [self._slots[label] for label in sorted(self._slots) if filter is None or filter(label)], np.int64
        )
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
        held = self._made()
        slot_S = np.array([self._slots[label] for label in sorted(self._slots)], np.int64)
        arrays = {"vectors": held.decode(slot_S), "labels": held.label[slot_S]}
        write_arrays(path_to_index, BRUTE_KIND, arrays, {"max_elements": self._max_elements})

    def load_index(self, path_to_index: str | Path, max_elements: int = 0) -> None:
        """Read what `save_index` wrote, in place of what there is; ``max_elements`` is not looked at, as there."""
        try:
            found = read_arrays(path_to_index, BRUTE_KIND)
        except DataError as error:
            raise RuntimeError(f"Index seems to be corrupted or unsupported: {error}") from error
        vectors, labels = found.arrays["vectors"], found.arrays["labels"]
        if vectors.shape != (len(labels), self._dim):
            raise RuntimeError(
                f"{path_to_index} holds vectors of the shape {list(vectors.shape)}, not of {self._dim} numbers"
            )
        held = self._empty()
        slots = held.append(vectors, labels, np.zeros(len(labels), np.int32)) if len(labels) else np.empty(0, np.int64)
        self._storage, self._slots, self._free = held, dict(zip(labels.tolist(), slots.tolist(), strict=True)), []
        self._max_elements, self._next = int(found.meta["max_elements"]), len(labels)

    def _empty(self) -> Storage:
        return Storage(self._dim, METRIC[self._space], 2, 2, "f32", False)

    def _made(self) -> Storage:
        if self._storage is None:
            raise RuntimeError("The index is not initiated; call init_index or load_index")
        return self._storage
