"""What an `HNSW` is outside of this process: a checked file, or a pickle."""

from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.graph.header import described, whole
from anabranch.graph.hnsw import layout, storage
from anabranch.graph.hnsw.changing import MOST, Changes
from anabranch.graph.hnsw.checks import as_positive
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.hnsw.slots import Slots
from anabranch.graph.hnsw.storage import Storage
from anabranch.graph.workers import FORMER, asked_workers

# Arguments of an `HNSW`, and its attributes of these names, that a file or pickle has; those of codes where there are some.
_LINKS = ("heuristic", "extend_candidates", "keep_pruned", "flat")
OPTIONS = ("dim", "metric", "M", "ef_construction", "dtype", "seed", "rerank", *_LINKS, "compact_at")
OF_CODES = ("quantization", "code_bytes")


class Kept:
    """Base of `HNSW`, which makes all that is used here."""

    quantization: str | None
    workers: int | None
    _storage: Storage
    _lock: ReadWriteLock
    _linker: Linker
    _slots: Slots
    _changes: Changes

    def save(self, path: str | Path) -> None:
        """Write the index into one checked file (`anabranch.graph.array_file`), all or nothing: one state of it, with changes kept waiting.

        Searches go on meanwhile.
        """
        with self._lock.still():
            storage.save(self._storage, path, self._facts())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        mmap: bool = False,
        workers: int | None = None,
        verify: bool | None = None,
        **former: Any,
    ) -> Self:
        """Read what `save` wrote.

        Args:
            path: the file.
            mmap: leave vectors and links on disk until they are used; the first change copies them into memory. Links are checked all the
                same.
            verify: check the sums of all arrays, which reads all of them. Default: unless the file is mapped.
            workers: as for a new index, and so is ``former``.

        Raises:
            DataError: the file is missing, foreign, truncated or damaged.
        """
        workers = asked_workers(workers, former, "load")
        # Not told as a fault of the file.
        workers = None if workers is None else as_positive(workers, "workers")
        arrays, meta = storage.read(path, mmap=mmap, verify=verify)
        return cls._made(arrays, meta, mapped=mmap, source=str(path), workers=workers)

    def __getstate__(self) -> dict[str, Any]:
        return self._state(copy=True)

    def _state(self, *, copy: bool) -> dict[str, Any]:
        """What a pickle holds. Without ``copy`` arrays are the index's own: whoever writes them keeps changes out meanwhile."""
        with self._lock.still():
            held = self._storage.arrays()
            arrays = {name: np.array(array) for name, array in held.items()} if copy else held
            graph = self._storage.graph
            meta = {**self._facts(), "entry": int(graph[layout.ENTRY]), "top": int(graph[layout.TOP])}
            return {"arrays": arrays, "meta": meta, "workers": self.workers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # By its former name in what was pickled before.
        workers = state.get("workers", state.get(FORMER))
        made = type(self)._made(state["arrays"], state["meta"], mapped=False, source="the pickle", workers=workers)
        self.__dict__.update(made.__dict__)

    def _facts(self) -> dict[str, Any]:
        names = OPTIONS if self.quantization is None else (*OPTIONS, *OF_CODES)
        coded = self._storage.coded
        return {
            "options": {name: getattr(self, name) for name in names},
            **({} if coded is None else {"trained_on": coded.trained_on}),
            "drawn": self._changes.drawn,
            "next_id": self._changes.next_id,
            "changed": self._changes.changed,
            "copies": self._linker.num_copies,
            "new": self._linker.num_new,
            "cut": self._linker.is_cut,
            "watched": {**self._linker.watch.facts(), "suspect": self._linker.is_suspect},
        }

    @classmethod
    def _made(
        cls, arrays: dict[str, np.ndarray], meta: dict[str, Any], *, mapped: bool, source: str, workers: int | None
    ) -> Self:
        with described(source, "an index"):
            made = cls(**{**meta["options"], "workers": workers})
            drawn, next_id = whole(meta["drawn"], "drawn", most=MOST), whole(meta["next_id"], "next_id", most=2**63)
            entry, top = whole(meta["entry"], "entry", -1), whole(meta["top"], "top", -1)
            # Files of earlier releases do not say so.
            made._changes.changed = whole(meta.get("changed", 0), "changed", most=MOST)
            made._linker.num_copies = whole(meta.get("copies", 0), "copies", most=MOST)
            made._linker.num_new = whole(meta.get("new", 0), "new", most=MOST)
            made._linker.is_cut = meta.get("cut") is True
            if "watched" in meta:
                made._linker.watch.take_facts(meta["watched"])
                made._linker.is_suspect = meta["watched"].get("suspect") is True
            if made._storage.coded is not None:
                made._storage.coded.trained_on = whole(meta["trained_on"], "trained_on")
            if next_id <= (largest := int(arrays["label"].max(initial=-1))):
                raise ValueError(f"next_id is {next_id}, and there is an element {largest}")
        made._storage.take_arrays(arrays, entry, top, mapped=mapped, source=source)
        made._changes.drawn, made._changes.next_id, made._linker.linked = drawn, next_id, made._storage.num_linked
        made._changes.is_read()
        made._slots.forget()
        return made
