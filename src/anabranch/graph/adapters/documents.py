"""What belongs to the vectors of an index: for each an id that is text, and a content that JSON can hold."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.files import atomic_write_json, parse_json
from anabranch.graph.hnsw import HNSW
from anabranch.graph.names import fingerprint

INDEX, DOCUMENTS = "index.anb", "documents.json"
VERSION = 1


class Documents:
    """Contents by id, over an `HNSW` that holds their vectors. Not safe for threads: callers hold a lock.

    Args:
        options: of the index, but for its dimension, which the first vectors tell.
    """

    def __init__(self, **options: Any) -> None:
        self.index: HNSW | None = None
        self._options = options
        self._number: dict[str, int] = {}
        self._held: dict[int, tuple[str, Any]] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._held)

    def put(self, ids: list[str], vectors: Any, contents: list[Any]) -> None:
        """Bring contents in with their vectors, or put them in the place of those with their ids; of one id the last counts.

        Raises InputError as `HNSW.add`, and for contents that JSON cannot hold; then nothing changes.
        """
        if not ids:
            return
        for id, content in zip(ids, contents, strict=True):
            try:
                json.dumps(content)
            except (TypeError, ValueError) as error:
                raise InputError(f"the content of {id!r:.80} cannot be kept: {error}") from None
        last = {id: row for row, id in enumerate(ids)}
        rows = np.asarray(vectors, np.float32)
        if rows.ndim != 2 or len(rows) != len(ids):
            raise InputError(
                f"there are {len(ids):,} ids and vectors of the shape {list(rows.shape)}; give a row for each"
            )
        index = self.index if self.index is not None else HNSW(rows.shape[1], **self._options)
        numbers, following = {}, self._next
        for id in last:
            numbers[id] = self._number.get(id, following)
            following += numbers[id] == following
        index.add(rows[list(last.values())], list(numbers.values()), update=True)
        self.index, self._next = index, following
        self._number |= numbers
        self._held |= {numbers[id]: (id, contents[row]) for id, row in last.items()}

    def drop(self, ids: Iterable[str]) -> int:
        """Take contents out; those that are not there stay so. How many went."""
        numbers = [self._number.pop(id) for id in dict.fromkeys(ids) if id in self._number]
        if numbers and self.index is not None:
            self.index.remove(numbers)
        for number in numbers:
            del self._held[number]
        return len(numbers)

    def ids(self, is_wanted: Callable[[str, Any], bool] = lambda id, content: True) -> list[str]:
        """Ids of those that are wanted, in the order in which they came."""
        return [id for id, content in self._held.values() if is_wanted(id, content)]

    def content(self, id: str) -> Any:
        """Of an id. Raises KeyError if there is none."""
        return self._held[self._number[id]][1]

    def __contains__(self, id: str) -> bool:
        return id in self._number

    def vectors(self, ids: list[str]) -> np.ndarray:
        """Of ids that are there, float32 [N, D]."""
        assert self.index is not None
        return self.index.vectors([self._number[id] for id in ids])

    def search(self, vector: Any, k: int, only: list[str] | None = None) -> list[tuple[str, float]]:
        """Ids and distances of the k nearest, of those in ``only`` unless that is None. Raises InputError as `HNSW.search`."""
        if self.index is None or not k:
            return []
        filter = None if only is None else np.array([self._number[id] for id in only], np.int64)
        found, distances = self.index.search(np.asarray(vector, np.float32), k, max(64, 2 * k), filter)
        kept = found[0] >= 0
        pairs = zip(found[0][kept].tolist(), distances[0][kept].tolist(), strict=True)
        return [(self._held[number][0], distance) for number, distance in pairs]

    def save(self, folder: str | Path) -> None:
        """Write index and contents into a folder, each all or nothing. Raises DataError or CapacityError where that cannot be done."""
        folder = Path(folder)
        made = self.index
        if made is not None:
            made.save(folder / INDEX)
        rows = [[number, id, content] for number, (id, content) in self._held.items()]
        of = None if made is None else fingerprint(folder / INDEX)
        atomic_write_json(folder / DOCUMENTS, {"version": VERSION, "index": of, "next": self._next, "documents": rows})

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> Self:
        """Read what `save` wrote. Raises DataError for files that are missing, damaged, or do not belong together."""
        folder, made = Path(folder), cls(**options)
        place = folder / DOCUMENTS
        try:
            found = parse_json(place.read_bytes())
            version, of, following, rows = (found[name] for name in ("version", "index", "next", "documents"))
            held = {int(number): (str(id), content) for number, id, content in rows}
        except OSError as error:
            raise DataError(f"cannot read {place}: {(error.strerror or str(error)).lower()}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place} is damaged: it does not hold documents ({error})") from error
        if version != VERSION:
            raise DataError(f"{place} is version {version} of a file of documents; this release reads {VERSION}")
        if of is not None:
            if fingerprint(folder / INDEX) != of:
                raise DataError(f"{place} belongs to another index than {folder / INDEX}; save both again")
            made.index = HNSW.load(folder / INDEX)
            if set(made.index.ids.tolist()) != held.keys():
                raise DataError(f"{place} does not name the vectors of {folder / INDEX}; save both again")
        made._held, made._next = held, int(following)
        made._number = {id: number for number, (id, _) in held.items()}
        return made
