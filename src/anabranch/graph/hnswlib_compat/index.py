"""`Index`: the graph index of hnswlib."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.header import described, whole
from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.lock import LOOK_S
from anabranch.graph.hnsw.storage import VERSION, VERSIONS
from anabranch.graph.hnswlib_compat.base import FULL, METRIC, Base, flat_labels, labels_of, last_of_each
from anabranch.graph.interrupts import Interrupts
from anabranch.graph.workers import Workers

KIND = "hnswlib_compat index"
TOO_FEW = "Cannot return the results in a contiguous 2D array. Probably ef or M is too small"
DEFAULT_EF = 10


class Index(Base):
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
        label_N = labels_of(ids, rows, self._next)
        if replace_deleted and not self._allow_replace:
            raise RuntimeError("Replacement of deleted elements is disabled in constructor")
        chosen = last_of_each(label_N)
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
            index.update(label_N[is_known], vector_ND[is_known], workers=threads)
        if num_vacant:
            self._replace(vector_ND[new[:num_vacant]], label_N[new[:num_vacant]], threads)
        if len(new) > num_vacant:
            index.add(vector_ND[new[num_vacant:]], label_N[new[num_vacant:]], reuse=False, workers=threads)

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
            index._changes.next_id = max(index._changes.next_id, int(label_N.max()) + 1)
            index._slots.forget()
            index._changes.move(slot_N, vector_ND, workers)
            index._changes.repair(workers)

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
            query_QD, k, max(self._ef, 1), allowed, workers=self._threads(num_threads, len(query_QD))
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
        label_N = np.empty(0, np.int64) if ids is None else flat_labels(ids)
        index = self._made()
        if not index.contains(label_N).all():
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
        meta = {"hnsw": state["meta"], "max_elements": self._max_elements}
        write_arrays(path_to_index, KIND, state["arrays"], meta, VERSION)

    def load_index(self, path_to_index: str | Path, max_elements: int = 0, allow_replace_deleted: bool = False) -> None:
        """Read what `save_index` wrote, in place of what there is. Distances are those of this index's space."""
        try:
            found = read_arrays(path_to_index, KIND, versions=VERSIONS)
            with described(path_to_index, "an index"):
                meta, most = found.meta["hnsw"], whole(found.meta["max_elements"], "max_elements")
                meta["next_id"] = _next_id(meta, found.arrays)
                meta["options"]["metric"], dim = METRIC[self._space], whole(meta["options"]["dim"], "dim")
            if dim != self._dim:
                raise RuntimeError(f"{path_to_index} holds vectors of {dim} numbers, not {self._dim}")
            index = HNSW._made(found.arrays, meta, mapped=False, source=str(path_to_index), workers=None)
        except DataError as error:
            raise RuntimeError(f"Index seems to be corrupted or unsupported: {error}") from error
        with self._alone():
            self._index, self._ef = index, DEFAULT_EF
            self._M, self._ef_construction = index.M, index.ef_construction
            self._next = self.element_count
            self._max_elements = max_elements if max_elements >= self.element_count > 0 else most
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
            held["meta"]["next_id"] = _next_id(held["meta"], held["arrays"])
            self._index = object.__new__(HNSW)
            self._index.__setstate__(held)

    def _made(self) -> HNSW:
        if self._index is None:
            raise RuntimeError("The index is not initiated; call init_index or load_index")
        return self._index

    def _find_deleted(self) -> None:
        held = self._made()._storage
        # Vacant places hold no element any more: in a file that another class wrote.
        dead = np.setdiff1d(np.flatnonzero(held.deleted[: held.count]), held.vacant_S)
        self._deleted = dict(zip(held.label[dead].tolist(), dead.tolist(), strict=True))


def _next_id(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    """Of an index; of earlier releases one whose elements took the places of deleted ones says one that is too low."""
    noted = meta["next_id"]
    return max(noted, int(arrays["label"].max(initial=-1)) + 1) if isinstance(noted, int) else noted
