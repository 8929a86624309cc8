"""The arrays of an index: how vectors are kept, how they grow, and the one file they are saved in.

Rows start at multiples of 64 bytes and are padded with zeros to whole lines. Links on level 0 are one int32 array with a row of 2M per
element, so that the lists the search walks through lie together, without vectors between them.

With the metric "hamming" rows are bits, 8 to 32 bytes where a vector is that short.

Precisions "f16" and "i8" search rows of a half or a quarter of the bytes (`encoding`). With ``rerank`` the float32 vectors are kept in an
array of their own, which a search touches only for the few nearest it found (mapped from a file, it may stay on disk); without it there are
only the short rows, and distances are theirs.
"""
# Shapes: N slots in use, C capacity, D dimension, M links of a new element

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import CapacityError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.guarded import CHECKED, held
from anabranch.graph.hnsw import layout
from anabranch.graph.hnsw.arrays import aligned, grown
from anabranch.graph.hnsw.coded import Coded
from anabranch.graph.hnsw.encoding import Encoded, Encoding, encoding_of
from anabranch.graph.hnsw.raw import kernel
from anabranch.graph.hnsw.soundness import (
    MAX_LEVEL,
    VACANT,
    Wanted,
    check_groups,
    check_links,
    check_shapes,
    vacant_in,
    wanted_groups,
)
from anabranch.graph.random import next_bits, stream, to_unit

KIND = "hnsw index"
VERSION = 2
# Those of 1 say nothing of what is watched, nor which places are vacant.
VERSIONS = (1, 2)
# Rows that are rounded anew at once.
PIECE = 1 << 13
METRICS = ("l2", "ip", "cosine", "hamming")


class Storage:
    """Arrays and the row that describes them to kernels (`layout`). Not safe for threads: `HNSW` holds the lock."""

    def __init__(
        self,
        dim: int,
        metric: str,
        M: int,
        ef_construction: int,
        dtype: str,
        rerank: bool,
        coded: Coded | None = None,
    ) -> None:
        self.encoding = encoding_of(dim, metric, dtype, rerank)
        # Of float32 rows, in whose place they are searched.
        self.coded = coded
        self.M, self.rerank = M, self.encoding.rerank
        self.stride, self.full_stride = self.encoding.stride, self.encoding.full_stride
        self.graph = np.zeros(layout.FIELDS, np.int64)
        self.graph[layout.STRIDE], self.graph[layout.WIDTH] = self.stride, self.encoding.width
        self.graph[layout.FULL_STRIDE], self.graph[layout.FULL_WIDTH] = self.full_stride, self.full_stride // 4
        self.graph[layout.CAP0], self.graph[layout.CAP], self.graph[layout.EF] = 2 * M, M, ef_construction
        self.graph[layout.DIM], self.graph[layout.COSINE] = dim, metric == "cosine"
        self.is_mapped = False
        self._marks: list[np.ndarray] = []
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        self.count = self.capacity = self.num_upper = 0
        self.encoding.take_centres(None)
        self.rows = aligned((0, self.stride), np.uint8)
        self.aux = aligned((0, 2), np.float32)
        self.full = aligned((0, self.full_stride // 4), np.float32)
        if self.coded is not None:
            self.coded.rows, self.coded.aux = self.coded.larger(0, 0)
        self.links = aligned((0, 2 * self.M), np.int32)
        self.upper = aligned((0, self.M), np.int32)
        self.first, self.level = aligned((0,), np.int32), aligned((0,), np.int32)
        self.label = aligned((0,), np.int64)
        self.deleted, self.suspect = aligned((0,), np.uint8), aligned((0,), np.uint8)
        self.blocks = blocks_of(self.suspect)
        self.graph[layout.ENTRY] = self.graph[layout.TOP] = -1
        self.graph[layout.NUM_DELETED] = 0
        self._set_vacant(np.empty(0, np.int64))
        self.is_mapped, self.is_watched = False, True
        self.describe()

    @property
    def version(self) -> int:
        """Rises whenever slots come, go, or have other ids."""
        return int(self.graph[layout.VERSION])

    @property
    def num_linked(self) -> int:
        """Elements in the graph."""
        return self.count - len(self.vacant_S)

    def _set_vacant(self, slot_S: np.ndarray) -> None:
        # Deleted, and in no list; rising.
        self.vacant_S = slot_S
        self.graph[layout.NUM_VACANT] = len(slot_S)

    def describe(self) -> None:
        """Bring addresses and counts up to date."""
        graph = self.graph
        graph[layout.VERSION] += 1
        graph[layout.KIND] = self.encoding.kind
        graph[layout.ROWS], graph[layout.AUX] = self.rows.ctypes.data, self.aux.ctypes.data
        graph[layout.FULL] = self.full.ctypes.data if self.rerank else 0
        graph[layout.LINKS], graph[layout.UPPER] = self.links.ctypes.data, self.upper.ctypes.data
        graph[layout.FIRST], graph[layout.LEVEL] = self.first.ctypes.data, self.level.ctypes.data
        graph[layout.DELETED], graph[layout.COUNT] = self.deleted.ctypes.data, self.count
        graph[layout.SUSPECT], graph[layout.BLOCKS] = self.suspect.ctypes.data, self.blocks.ctypes.data
        graph[layout.LABEL], graph[layout.CAPACITY] = self.label.ctypes.data, self.capacity
        centre_D = self.encoding.centre_D
        graph[layout.CENTRE] = 0 if centre_D is None else centre_D.ctypes.data

    def linked_by(self) -> np.ndarray:
        """The row that describes the index to kernels that link it: `graph` itself, or one of the float32 vectors where rows are of groups.

        What they write into such a one is for `take_entry`.
        """
        if self.encoding.centre_GD is None:
            return self.graph
        row = self.graph.copy()
        row[layout.KIND], row[layout.ROWS], row[layout.FULL] = layout.L2_F32, self.full.ctypes.data, 0
        row[layout.STRIDE], row[layout.WIDTH] = self.full_stride, self.full_stride // 4
        return row

    def take_entry(self, row: np.ndarray) -> None:
        """Begin walks where a row of `linked_by` says."""
        self.graph[layout.ENTRY], self.graph[layout.TOP] = row[layout.ENTRY], row[layout.TOP]

    # Vectors

    def encode(self, vector_ND: np.ndarray) -> Encoded:
        """See `Encoding.encode`."""
        return self.encoding.encode(vector_ND)

    def encode_queries(self, vector_QD: np.ndarray) -> Encoded:
        """See `Encoding.encode_queries`."""
        return self.encoding.encode_queries(vector_QD)

    def decode(self, slot_S: np.ndarray) -> np.ndarray:
        """Vectors, float32 [S, D], of the highest precision there is; uint8 [S, D / 8] of bits."""
        if self.rerank:
            return self.full[slot_S, : self.encoding.dim]
        return self.encoding.decode(self.rows[slot_S], self.aux[slot_S])

    def recoded(self, centres: np.ndarray) -> tuple[Encoding, np.ndarray, np.ndarray]:
        """An encoding with another centre (or others: `centres_of`), and rows and aux of all slots by it; nothing changes.

        They are made of the vectors where these are kept (``rerank``), else of what the rows that there are still say.

        Raises CapacityError where memory does not suffice.
        """
        made = self.encoding.with_centre(centres)
        try:
            rows, aux = (aligned(array.shape, array.dtype) for array in (self.rows, self.aux))
            for begin in range(0, self.count, PIECE):
                slot_S = np.arange(begin, min(begin + PIECE, self.count))
                rows[slot_S], aux[slot_S], _ = made.encode(self.decode(slot_S))
        except MemoryError as error:
            raise CapacityError(f"no memory to round {self.count:,} elements anew") from error
        return made, rows, aux

    def take_recoded(self, made: Encoding, rows: np.ndarray, aux: np.ndarray) -> None:
        """Hold what `recoded` gave."""
        self.encoding, self.rows, self.aux = made, rows, aux
        self.describe()

    def are_first(self, slot_B: np.ndarray) -> np.ndarray:
        """Which of some slots are the first of those that hold equal vectors, bool [B]; now and then not one that differs from all."""
        words_BW = self.rows[slot_B].view(np.uint64)
        if self.encoding.dtype == "i8":
            words_BW = np.append(words_BW, self.aux[slot_B].view(np.uint64), axis=1)
        # Odd numbers, so that no bit of a word is lost.
        by_W = np.random.default_rng(0).integers(0, 2**64, words_BW.shape[1], np.uint64) | np.uint64(1)
        is_first_B = np.zeros(len(slot_B), bool)
        is_first_B[np.unique((words_BW * by_W).sum(1), return_index=True)[1]] = True
        return is_first_B

    def _floats(self, rows: np.ndarray) -> np.ndarray:
        """Float32 rows without what they are padded with, [N, D]."""
        return rows.view(np.float32)[:, : self.encoding.dim]

    def learn_codes(self, sample_SD: np.ndarray, seed: int, workers: int) -> Coded:
        """Codes of all slots, learned from vectors; nothing changes. Raises CapacityError where memory does not suffice."""
        assert self.coded is not None
        try:
            return self.coded.learned(sample_SD, self._floats(self.rows), self.count, self.capacity, seed, workers)
        except MemoryError as error:
            raise CapacityError(f"no memory for codes of {self.count:,} elements") from error

    # Growing

    def append(self, vector_ND: np.ndarray, label_N: np.ndarray, level_N: np.ndarray) -> np.ndarray:
        """Take elements in, without links; their slots."""
        self.own()
        self.encoding.settle(vector_ND)
        self._reserve(self.count + len(vector_ND), self.num_upper + int(level_N.sum()))
        slot_N = self.write_behind(vector_ND, label_N, level_N)
        self.admit(level_N)
        self.describe()
        return slot_N

    def has_room(self, level_N: np.ndarray) -> bool:
        """Whether so many elements fit behind the last as things are, with nothing to be moved or worked out before."""
        is_settled = self.encoding.is_settled and not self.is_mapped
        room = len(self.upper) - self.num_upper
        return is_settled and self.count + len(level_N) <= self.capacity and int(level_N.sum()) <= room

    def reserve(self, number: int) -> None:
        """Make room behind the last for so many elements, on level 0 alone. Raises CapacityError where memory does not suffice."""
        self._reserve(self.count + number, self.num_upper)

    def write_behind(self, vector_ND: np.ndarray, label_N: np.ndarray, level_N: np.ndarray) -> np.ndarray:
        """Write elements behind the last, where there is room and nobody looks until `admit`; their slots."""
        begin, end = self.count, self.count + len(vector_ND)
        slot_N, above = np.arange(begin, end), int(level_N.sum())
        self.put(slot_N, vector_ND)
        self.label[begin:end], self.level[begin:end] = label_N, level_N
        self.deleted[begin:end] = self.suspect[begin:end] = 0
        self.links[begin:end] = -1
        self.first[begin:end] = self.num_upper + np.cumsum(level_N) - level_N
        self.upper[self.num_upper : self.num_upper + above] = -1
        return slot_N

    def admit(self, level_N: np.ndarray) -> None:
        """Count elements that `write_behind` wrote."""
        self.count += len(level_N)
        self.num_upper += int(level_N.sum())
        self.graph[layout.COUNT] = self.count
        self.graph[layout.VERSION] += 1

    def drop_last(self, number: int) -> None:
        """Forget the last so many elements, which nothing links to."""
        self.count -= number
        self.num_upper -= int(self.level[self.count : self.count + number].sum())
        self.describe()

    def put(self, slot_S: np.ndarray, vector_SD: np.ndarray) -> None:
        """Replace vectors."""
        self.put_encoded(slot_S, self.encode(vector_SD))

    def put_encoded(self, slot_S: np.ndarray, encoded: Encoded) -> None:
        """Replace vectors by what `encode` made of others."""
        rows, aux, full = encoded
        if self.coded is not None and self.coded.is_trained:
            try:
                codes = self.coded.encode(self._floats(rows))
            except MemoryError as error:
                raise CapacityError(f"no memory for codes of {len(rows):,} elements") from error
            self.coded.put(slot_S, codes)
        self.rows[slot_S], self.aux[slot_S] = rows, aux
        if self.rerank:
            self.full[slot_S] = full

    def own(self) -> None:
        """Copy mapped arrays into memory, so that they can be written."""
        if self.is_mapped:
            self._resize(self.count, self.num_upper)
            self.is_mapped = False
            self.describe()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, with what they have room for."""
        names = ("rows", "aux", "full", "links", "upper", "first", "level", "label", "deleted", "suspect", "blocks")
        return sum(getattr(self, name).nbytes for name in names) + (0 if self.coded is None else self.coded.nbytes)

    @property
    def mapped_bytes(self) -> int:
        """How many of them are on the disk until they are used."""
        names = ("rows", "aux", "full", "links", "upper") if self.is_mapped else ()
        return sum(getattr(self, name).nbytes for name in names if isinstance(getattr(self, name), np.memmap))

    def growth_bytes(self, more: int) -> int:
        """Bytes of the arrays that are made when so many elements come, 0 where they fit (levels above 0 are not counted)."""
        capacity, count = self.capacity, self.count + max(more - len(self.vacant_S), 0)
        return 0 if count <= capacity else max(count, capacity + capacity // 2) * self._each()

    def _each(self) -> int:
        """Bytes of an element without levels above 0."""
        codes = 0 if self.coded is None else self.coded.each
        return self.stride + 8 * self.M + 30 + self.rerank * self.full_stride + codes

    def _reserve(self, count: int, num_upper: int) -> None:
        if count >= 2**31 - 1:
            raise CapacityError(
                f"an index holds at most {2**31 - 2:,} elements and would have {count:,}; use ShardedHNSW"
            )
        capacity, room = self.capacity, len(self.upper)
        if count > capacity:
            capacity = max(count, capacity + capacity // 2)
        if num_upper > room:
            room = max(num_upper, room + room // 2)
        if capacity > self.capacity or room > len(self.upper):
            self._resize(capacity, room)

    def _resize(self, capacity: int, num_upper: int) -> None:
        names = ["rows", "aux", "links", "first", "level", "label", "deleted", "suspect"] + ["full"] * self.rerank
        names = names if capacity != self.capacity or self.is_mapped else []
        try:
            larger = {name: grown(getattr(self, name), capacity, self.count) for name in names}
            larger["upper"] = grown(self.upper, num_upper, self.num_upper)
            coded = None if self.coded is None or not names else self.coded.larger(capacity, self.count)
        except MemoryError as error:
            raise CapacityError(f"no memory for {capacity:,} elements of {self._each():,} bytes") from error
        # Not before all of them are there.
        for name, array in larger.items():
            setattr(self, name, array)
        if self.coded is not None and coded is not None:
            self.coded.rows, self.coded.aux = coded
        if "suspect" in larger:
            self.blocks = blocks_of(self.suspect, self.count)
        self.capacity = capacity
        self.describe()

    def shrink(self) -> None:
        """Give back what arrays have room for beyond what they hold. Where memory does not suffice for smaller ones, they stay."""
        if self.capacity == self.count and len(self.upper) == self.num_upper:
            return
        with suppress(CapacityError):
            self._resize(self.count, self.num_upper)

    # Slots that are not used any more

    def mark(self, slot_S: np.ndarray, *, deleted: bool) -> None:
        """Let slots be deleted, or not. They must have been the other thing."""
        self.deleted[slot_S] = deleted
        self.graph[layout.NUM_DELETED] += len(slot_S) if deleted else -len(slot_S)
        self.graph[layout.VERSION] += 1

    def vacate(self, slot_S: np.ndarray) -> None:
        """Note that deleted slots (rising) are in no list any more. Kernels see that from their level, which is ~level until `refill`."""
        self.label[slot_S] = -1
        self.level[slot_S] = ~self.level[slot_S]
        self._set_vacant(np.union1d(self.vacant_S, slot_S))
        self.graph[layout.VERSION] += 1

    def refill(self, count: int, vector_ND: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        """Take elements in at the first ``count`` slots that are vacant, on their levels, without links; the slots."""
        slot_S = self.vacant_S[:count]
        if not count:
            return slot_S
        self.own()
        # Before anything changes: there may be no memory for it.
        self.put_encoded(slot_S, self.encode(vector_ND))
        self._set_vacant(self.vacant_S[count:])
        self.label[slot_S], self.level[slot_S] = label_N, ~self.level[slot_S]
        self.mark(slot_S, deleted=False)
        return slot_S

    def lists_of(self, slot_S: np.ndarray) -> np.ndarray:
        """Rows of `upper` that belong to slots."""
        level_S = self.level[slot_S]
        within = np.arange(level_S.sum()) - np.repeat(np.cumsum(level_S) - level_S, level_S)
        return np.repeat(self.first[slot_S], level_S) + within

    def keep(self, slot_S: np.ndarray) -> None:
        """Drop all slots but these (rising), which nothing else may link to, and number them anew."""
        # The last stands for "no link".
        new_N = np.full(self.count + 1, -1, np.int32)
        new_N[slot_S] = np.arange(len(slot_S), dtype=np.int32)
        lists = self.lists_of(slot_S)
        self.links[: len(slot_S)] = new_N[self.links[slot_S]]
        self.upper[: len(lists)] = new_N[self.upper[lists]]
        for name in ("rows", "aux", "level", "label", "deleted", "suspect") + ("full",) * self.rerank:
            array = getattr(self, name)
            array[: len(slot_S)] = array[slot_S]
        if self.coded is not None:
            self.coded.keep(slot_S)
        level_S = self.level[: len(slot_S)]
        self.first[: len(slot_S)] = np.cumsum(level_S) - level_S
        self.graph[layout.ENTRY] = new_N[self.graph[layout.ENTRY]]
        self.count, self.num_upper = len(slot_S), len(lists)
        self.graph[layout.NUM_DELETED] = int(self.deleted[: self.count].sum())
        self._set_vacant(np.empty(0, np.int64))
        self.blocks = blocks_of(self.suspect, self.count)
        self.describe()

    # Marks of searches

    def take_marks(self) -> np.ndarray:
        """An array of marks, uint8 [C + 1], for one thread; give it back."""
        # No lock: two threads never pop one array, and another process that is forked here finds none held.
        while True:
            try:
                marks = self._marks.pop()
            except IndexError:
                break
            if len(marks) == self.capacity + 1:
                return marks
        return held(np.zeros(self.capacity + 1, np.uint8))

    def give_marks(self, marks: np.ndarray) -> None:
        """Let the next search use these marks."""
        self._marks.append(marks)

    # On disk

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved, by name."""
        count = self.count
        names = ("links", "first", "level", "label", "deleted", "suspect", "rows")
        found = {name: getattr(self, name)[:count] for name in names}
        if len(self.vacant_S):
            found["level"] = np.where(found["level"] < 0, ~found["level"], found["level"])
            found["deleted"] = np.array(found["deleted"])
            found["deleted"][self.vacant_S] = VACANT
        found["upper"] = self.upper[: self.num_upper]
        if self.encoding.dtype == "i8":
            found["aux"] = self.aux[:count]
        if self.rerank:
            found["full"] = self.full[:count]
        if self.encoding.centre_D is not None:
            found["centre"] = self.encoding.centre_D
        if self.encoding.centre_GD is not None:
            found["groups"] = self.encoding.centre_GD
        return found if self.coded is None else {**found, **self.coded.arrays(count)}

    def take_arrays(self, arrays: dict[str, np.ndarray], entry: int, top: int, *, mapped: bool, source: str) -> None:
        """Hold what `arrays` gave. Raises DataError naming ``source`` if they do not fit together."""
        self._check(arrays, entry, top, source)
        self.count = self.capacity = len(arrays["label"])
        self.num_upper = len(arrays["upper"])
        for name in ("links", "first", "level", "label", "deleted", "suspect", "rows", "upper", "aux", "full"):
            if name in arrays:
                # The small ones are read anyway; in the checked build a file has no guard behind each array.
                stays = mapped and not CHECKED and name in ("links", "rows", "upper", "aux", "full")
                setattr(
                    self, name, arrays[name] if stays else grown(arrays[name], len(arrays[name]), len(arrays[name]))
                )
        if "aux" not in arrays:
            self.aux = np.zeros((self.count, 2), np.float32)
        self._set_vacant(vacant_in(arrays, entry))
        self.level[self.vacant_S] = ~self.level[self.vacant_S]
        self.deleted[self.vacant_S] = 1
        if "suspect" not in arrays:
            self.suspect = aligned((self.count,), np.uint8)
            # Which they were is seen when it is needed.
            self.suspect[:], self.is_watched = 0, False
        self.blocks = blocks_of(self.suspect)
        centres = np.array(arrays["centre"]) if "centre" in arrays else None
        if centres is not None and "groups" in arrays:
            centres = np.concatenate([centres[None], arrays["groups"]])
        self.encoding.take_centres(centres)
        if self.coded is not None and "codes" in arrays:
            self.coded.take_arrays(arrays, source)
        self.graph[layout.ENTRY], self.graph[layout.TOP] = entry, top
        self.graph[layout.NUM_DELETED] = int(self.deleted.sum())
        self.is_mapped = mapped
        self.describe()

    def _check(self, arrays: dict[str, np.ndarray], entry: int, top: int, source: str) -> None:
        """Kernels follow links without looking, so whatever they follow is looked at here (not the vectors)."""
        count, num_upper = (np.atleast_1d(arrays.get(name, ())).shape[0] for name in ("label", "upper"))
        wanted: Wanted = {
            "links": ((count, 2 * self.M), np.int32),
            "upper": ((num_upper, self.M), np.int32),
            "first": ((count,), np.int32),
            "level": ((count,), np.int32),
            "label": ((count,), np.int64),
            "deleted": ((count,), np.uint8),
            "rows": ((count, self.stride), np.uint8),
        }
        if self.encoding.dtype == "i8":
            wanted["aux"] = ((count, 2), np.float32)
        if self.rerank:
            wanted["full"] = ((count, self.full_stride // 4), np.float32)
        if self.coded is not None and "codes" in arrays:
            wanted |= self.coded.wanted(count)
        optional: Wanted = {"centre": ((self.encoding.dim,), np.float32), "suspect": ((count,), np.uint8)}
        if self.encoding.worth is not None and "centre" in arrays:
            optional |= wanted_groups(arrays, "groups", self.encoding.dim)
        if self.coded is not None and "codes" in arrays:
            optional |= self.coded.optional(arrays)
        check_shapes(arrays, wanted, optional, source)
        if "groups" in arrays:
            check_groups(arrays["groups"], arrays["aux"], source)
        check_links(arrays, entry, top, source)


def blocks_of(suspect_C: np.ndarray, count: int | None = None) -> np.ndarray:
    """All marks that slots of each block have (`layout.BLOCKS`), of the first ``count``."""
    blocks = aligned(((len(suspect_C) >> layout.BLOCK) + 1,), np.uint8)
    blocks[:] = 0
    held_N = suspect_C[:count]
    if len(held_N):
        found = np.bitwise_or.reduceat(held_N, np.arange(0, len(held_N), 1 << layout.BLOCK))
        blocks[: len(found)] = found
    return blocks


@kernel
def draw_levels(seed, begin, count, M):
    """floor(-ln(U) / ln(M)), U uniform in (0, 1]: the levels of the elements inserted as number ``begin`` ... of all."""
    level_N = np.empty(count, np.int32)
    for number in range(count):
        _, bits = next_bits(stream(seed, begin + number))
        level_N[number] = min(int(-np.log(1.0 - to_unit(bits)) / np.log(M)), MAX_LEVEL)
    return level_N


def save(storage: Storage, path: str | Path, meta: dict[str, Any]) -> None:
    """Write an index, all or nothing."""
    entry, top = int(storage.graph[layout.ENTRY]), int(storage.graph[layout.TOP])
    write_arrays(path, KIND, storage.arrays(), {**meta, "entry": entry, "top": top}, VERSION)


def read(path: str | Path, *, mmap: bool, verify: bool | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and facts of a saved index; ``verify`` as in `read_arrays`.

    Raises DataError for a file that is missing, foreign, truncated or damaged.
    """
    found = read_arrays(path, KIND, versions=VERSIONS, mmap=mmap, verify=verify)
    return found.arrays, found.meta
