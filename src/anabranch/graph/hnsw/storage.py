"""The arrays of an index: how vectors are kept, how they grow, and the one file they are saved in.

Rows start at multiples of 64 bytes and are padded with zeros to whole lines. Links on level 0 are one int32 array with a row of 2M per
element, so that the lists the search walks through lie together, without vectors between them.

Precisions "f16" and "i8" search rows of a half or a quarter of the bytes. With ``rerank`` the float32 vectors are kept in an array of their
own, which a search touches only for the few nearest it found (mapped from a file, it may stay on disk); without it there are only the short
rows, and distances are theirs. For squared L2, short rows hold x minus the mean of the first vectors added: distances do not change by
that, and their precision goes where the data is.
"""
# Shapes: N slots in use, C capacity, D dimension, M links of a new element

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import CapacityError, DataError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.guarded import CHECKED, guarded, held
from anabranch.graph.hnsw import layout
from anabranch.graph.hnsw.raw import LINE, get_i32, kernel
from anabranch.graph.random import next_bits, stream, to_unit

KIND = "hnsw index"
VERSION = 1
METRICS = ("l2", "ip", "cosine")
PRECISIONS = ("f32", "f16", "i8")
ITEM = {"f32": 4, "f16": 2, "i8": 1}
MAX_LEVEL = 64

# Scale and norm of a query that has none; kernels only read it.
_ONE_ZERO = np.zeros((1, 2), np.float32)


class Storage:
    """Arrays and the row that describes them to kernels (`layout`). Not safe for threads: `HNSW` holds the lock."""

    def __init__(self, dim: int, metric: str, M: int, ef_construction: int, dtype: str, rerank: bool) -> None:
        self.dim, self.metric, self.M, self.dtype = dim, metric, M, dtype
        self.rerank = rerank and dtype != "f32"
        self.stride = _lines(dim * ITEM[dtype])
        self.full_stride = _lines(4 * dim)
        self.graph = np.zeros(layout.FIELDS, np.int64)
        self.graph[layout.KIND] = 2 * PRECISIONS.index(dtype) + (metric != "l2")
        self.graph[layout.STRIDE], self.graph[layout.WIDTH] = self.stride, self.stride // ITEM[dtype]
        self.graph[layout.FULL_STRIDE], self.graph[layout.FULL_WIDTH] = self.full_stride, self.full_stride // 4
        self.graph[layout.CAP0], self.graph[layout.CAP], self.graph[layout.EF] = 2 * M, M, ef_construction
        self.is_mapped = False
        # Rises whenever slots come, go, or have other ids.
        self.version = 0
        self._marks: list[np.ndarray] = []
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        self.count = self.capacity = self.num_upper = 0
        self.centre_D: np.ndarray | None = None
        self.rows = aligned((0, self.stride), np.uint8)
        self.aux = aligned((0, 2), np.float32)
        self.full = aligned((0, self.full_stride // 4), np.float32)
        self.links = aligned((0, 2 * self.M), np.int32)
        self.upper = aligned((0, self.M), np.int32)
        self.first, self.level = aligned((0,), np.int32), aligned((0,), np.int32)
        self.label, self.deleted = aligned((0,), np.int64), aligned((0,), np.uint8)
        self.graph[layout.ENTRY] = self.graph[layout.TOP] = -1
        self.graph[layout.NUM_DELETED] = 0
        # Deleted, and in no list; rising.
        self.vacant_S = np.empty(0, np.int64)
        self.is_mapped = False
        self.describe()

    def describe(self) -> None:
        """Bring addresses and counts up to date."""
        graph = self.graph
        self.version += 1
        graph[layout.ROWS], graph[layout.AUX] = self.rows.ctypes.data, self.aux.ctypes.data
        graph[layout.FULL] = self.full.ctypes.data if self.rerank else 0
        graph[layout.LINKS], graph[layout.UPPER] = self.links.ctypes.data, self.upper.ctypes.data
        graph[layout.FIRST], graph[layout.LEVEL] = self.first.ctypes.data, self.level.ctypes.data
        graph[layout.DELETED], graph[layout.COUNT] = self.deleted.ctypes.data, self.count

    # Vectors

    def encode(self, vector_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows as they are searched (uint8 [N, STRIDE]), their aux, and full rows (float32; empty where rows are final)."""
        full = _padded(vector_ND, self.full_stride // 4)
        if self.dtype == "f32":
            return full.view(np.uint8), np.zeros((len(full), 2), np.float32), full[:, :0]
        short_ND = self._centred(vector_ND)
        kept = full if self.rerank else full[:, :0]
        if self.dtype == "f16":
            with np.errstate(over="ignore"):
                half = short_ND.astype(np.float16)
            # Beyond its range: its ends.
            half = np.clip(half, np.finfo(np.float16).min, np.finfo(np.float16).max)
            return _padded(half, self.stride // 2).view(np.uint8), np.zeros((len(full), 2), np.float32), kept
        codes, aux = self._codes(short_ND)
        return _padded(codes, self.stride).view(np.uint8), aux, kept

    def encode_queries(self, vector_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries as kernels take them: as `encode`, but float32 for rows of float16, and full ones always."""
        full = _padded(vector_QD, self.full_stride // 4)
        aux = _ONE_ZERO if len(full) == 1 else np.zeros((len(full), 2), np.float32)
        if self.dtype == "f32":
            return full.view(np.uint8), aux, full
        if self.dtype == "f16":
            return _padded(self._centred(vector_QD), self.stride // 2).view(np.uint8), aux, full
        codes, aux = self._codes(self._centred(vector_QD))
        return _padded(codes, self.stride).view(np.uint8), aux, full

    def decode(self, slot_S: np.ndarray) -> np.ndarray:
        """Vectors, float32 [S, D], of the highest precision there is."""
        if self.rerank:
            return self.full[slot_S, : self.dim]
        rows = self.rows[slot_S]
        if self.dtype == "f32":
            return rows.view(np.float32)[:, : self.dim]
        if self.dtype == "f16":
            found = rows.view(np.float16)[:, : self.dim].astype(np.float32)
        else:
            found = rows.view(np.int8)[:, : self.dim] * self.aux[slot_S, :1]
        return found if self.centre_D is None else found + self.centre_D

    def _centred(self, vector_ND: np.ndarray) -> np.ndarray:
        return vector_ND if self.centre_D is None else vector_ND - self.centre_D

    def _codes(self, vector_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int8 codes, and float32 [N, 2] of scale and squared norm."""
        aux = np.empty((len(vector_ND), 2), np.float32)
        aux[:, 0] = np.abs(vector_ND).max(1, initial=0.0) / 127
        with np.errstate(over="ignore"):
            aux[:, 1] = np.einsum("nd,nd->n", vector_ND, vector_ND)
        scale = np.where(aux[:, :1] > 0, aux[:, :1], 1)
        return np.clip(np.rint(vector_ND / scale), -127, 127).astype(np.int8), aux

    # Growing

    def append(self, vector_ND: np.ndarray, label_N: np.ndarray, level_N: np.ndarray) -> np.ndarray:
        """Take elements in, without links; their slots."""
        self.own()
        if self.centre_D is None and self.metric == "l2" and self.dtype != "f32":
            self.centre_D = vector_ND.mean(0, dtype=np.float64).astype(np.float32)
        more, begin = len(vector_ND), self.count
        self._reserve(begin + more, self.num_upper + int(level_N.sum()))
        end = begin + more
        self.put(np.arange(begin, end), vector_ND)
        self.label[begin:end], self.level[begin:end], self.deleted[begin:end] = label_N, level_N, 0
        self.links[begin:end] = -1
        self.first[begin:end] = self.num_upper + np.cumsum(level_N) - level_N
        self.upper[self.num_upper : self.num_upper + int(level_N.sum())] = -1
        self.num_upper += int(level_N.sum())
        self.count = end
        self.describe()
        return np.arange(begin, end)

    def drop_last(self, number: int) -> None:
        """Forget the last so many elements, which nothing links to."""
        self.count -= number
        self.num_upper -= int(self.level[self.count : self.count + number].sum())
        self.describe()

    def put(self, slot_S: np.ndarray, vector_SD: np.ndarray) -> None:
        """Replace vectors."""
        self.put_encoded(slot_S, self.encode(vector_SD))

    def put_encoded(self, slot_S: np.ndarray, encoded: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Replace vectors by what `encode` made of others."""
        rows, aux, full = encoded
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
        names = ("rows", "aux", "full", "links", "upper", "first", "level", "label", "deleted")
        return sum(getattr(self, name).nbytes for name in names)

    def growth_bytes(self, more: int) -> int:
        """Bytes of the arrays that are made when so many elements come, 0 where they fit (levels above 0 are not counted)."""
        capacity, count = self.capacity, self.count + max(more - len(self.vacant_S), 0)
        return 0 if count <= capacity else max(count, capacity + capacity // 2) * self._each()

    def _each(self) -> int:
        """Bytes of an element without levels above 0."""
        return self.stride + 8 * self.M + 29 + self.rerank * self.full_stride

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
        names = ["rows", "aux", "links", "first", "level", "label", "deleted"] + ["full"] * self.rerank
        names = names if capacity != self.capacity or self.is_mapped else []
        try:
            grown = {name: _grown(getattr(self, name), capacity, self.count) for name in names}
            grown["upper"] = _grown(self.upper, num_upper, self.num_upper)
        except MemoryError as error:
            raise CapacityError(f"no memory for {capacity:,} elements of {self._each():,} bytes") from error
        # Not before all of them are there.
        for name, array in grown.items():
            setattr(self, name, array)
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
        self.version += 1

    def vacate(self, slot_S: np.ndarray) -> None:
        """Note that deleted slots (rising) are in no list any more. Kernels see that from their level, which is ~level until `refill`."""
        self.label[slot_S] = -1
        self.level[slot_S] = ~self.level[slot_S]
        self.vacant_S = np.union1d(self.vacant_S, slot_S)
        self.version += 1

    def refill(self, count: int, vector_ND: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        """Take elements in at the first ``count`` slots that are vacant, on their levels, without links; the slots."""
        slot_S = self.vacant_S[:count]
        if not count:
            return slot_S
        self.own()
        # Before anything changes: there may be no memory for it.
        self.put_encoded(slot_S, self.encode(vector_ND))
        self.vacant_S = self.vacant_S[count:]
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
        for name in ("rows", "aux", "level", "label", "deleted") + ("full",) * self.rerank:
            array = getattr(self, name)
            array[: len(slot_S)] = array[slot_S]
        level_S = self.level[: len(slot_S)]
        self.first[: len(slot_S)] = np.cumsum(level_S) - level_S
        self.graph[layout.ENTRY] = new_N[self.graph[layout.ENTRY]]
        self.count, self.num_upper = len(slot_S), len(lists)
        self.graph[layout.NUM_DELETED] = int(self.deleted[: self.count].sum())
        self.vacant_S = np.empty(0, np.int64)
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
        found = {name: getattr(self, name)[:count] for name in ("links", "first", "level", "label", "deleted", "rows")}
        if len(self.vacant_S):
            found["level"] = np.where(found["level"] < 0, ~found["level"], found["level"])
        found["upper"] = self.upper[: self.num_upper]
        if self.dtype == "i8":
            found["aux"] = self.aux[:count]
        if self.rerank:
            found["full"] = self.full[:count]
        if self.centre_D is not None:
            found["centre"] = self.centre_D
        return found

    def take_arrays(self, arrays: dict[str, np.ndarray], entry: int, top: int, *, mapped: bool, source: str) -> None:
        """Hold what `arrays` gave. Raises DataError naming ``source`` if they do not fit together."""
        self._check(arrays, entry, top, source)
        self.count = self.capacity = len(arrays["label"])
        self.num_upper = len(arrays["upper"])
        for name in ("links", "first", "level", "label", "deleted", "rows", "upper", "aux", "full"):
            if name in arrays:
                # The small ones are read anyway; in the checked build a file has no guard behind each array.
                stays = mapped and not CHECKED and name in ("links", "rows", "upper", "aux", "full")
                setattr(
                    self, name, arrays[name] if stays else _grown(arrays[name], len(arrays[name]), len(arrays[name]))
                )
        if "aux" not in arrays:
            self.aux = np.zeros((self.count, 2), np.float32)
        self.centre_D = arrays.get("centre")
        self.graph[layout.ENTRY], self.graph[layout.TOP] = entry, top
        self.graph[layout.NUM_DELETED] = int(self.deleted.sum())
        self.is_mapped = mapped
        self.describe()

    def _check(self, arrays: dict[str, np.ndarray], entry: int, top: int, source: str) -> None:
        """Kernels follow links without looking, so whatever they follow is looked at here (not the vectors)."""
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "links": ((2 * self.M,), np.int32),
            "first": ((), np.int32),
            "level": ((), np.int32),
            "label": ((), np.int64),
            "deleted": ((), np.uint8),
            "rows": ((self.stride,), np.uint8),
        }
        if self.dtype == "i8":
            shapes["aux"] = ((2,), np.float32)
        if self.rerank:
            shapes["full"] = ((self.full_stride // 4,), np.float32)
        if {*arrays} - {"centre"} != {*shapes, "upper"}:
            raise DataError(f"{source} is damaged: it holds the arrays {sorted(arrays)}")
        count, num_upper = len(arrays["label"]), len(arrays["upper"])
        wanted = {name: ((count, *shape), dtype) for name, (shape, dtype) in shapes.items()}
        wanted["upper"] = ((num_upper, self.M), np.int32)
        if "centre" in arrays:
            wanted["centre"] = ((self.dim,), np.float32)
        for name, (shape, dtype) in wanted.items():
            if arrays[name].shape != shape or arrays[name].dtype != dtype:
                found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
                raise DataError(f"{source} is damaged: {name!r} is {found}, not {np.dtype(dtype)} {list(shape)}")
        if not self._is_sound(arrays, entry, top):
            raise DataError(f"{source} is damaged: its links or levels do not fit together; build the index again")

    def _is_sound(self, arrays: dict[str, np.ndarray], entry: int, top: int) -> bool:
        count, num_upper = len(arrays["label"]), len(arrays["upper"])
        if not count:
            return entry == top == -1
        level, first = arrays["level"].astype(np.int64), arrays["first"].astype(np.int64)
        live = arrays["label"][arrays["deleted"] == 0]
        if not (0 <= entry < count and level.min() >= 0 and level[entry] == top == level.max() <= MAX_LEVEL):
            return False
        if first.min() < 0 or (first + level).max() > num_upper or len(np.unique(live)) != len(live):
            return False
        lists = [arrays["links"]]
        lists += [
            np.ascontiguousarray(arrays["upper"][first[level >= number] + number - 1]) for number in range(1, top + 1)
        ]
        level_N = np.array(arrays["level"])
        return all(
            links_are_sound(links.ctypes.data, *links.shape, level_N, number) for number, links in enumerate(lists)
        )


@kernel
def links_are_sound(links, num_rows, cap, level_N, level):
    """Whether every link is -1, with nothing behind it, or a slot that has the level; ``links`` is an address."""
    for row in range(num_rows):
        is_over = False
        for place in range(cap):
            slot = get_i32(links, row * cap + place)
            if slot < -1 or slot >= len(level_N) or (slot >= 0 and (is_over or level_N[slot] < level)):
                return False
            is_over = slot < 0
    return True


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


def read(path: str | Path, *, mmap: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and facts of a saved index. Raises DataError for a file that is missing, foreign, truncated or damaged."""
    found = read_arrays(path, KIND, versions=(VERSION,), mmap=mmap)
    return found.arrays, found.meta


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that starts at a multiple of 64 bytes; its content is undefined."""
    if CHECKED:
        return guarded(shape, dtype)
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + size].view(dtype).reshape(shape)


def _grown(array: np.ndarray, capacity: int, count: int) -> np.ndarray:
    grown = aligned((capacity, *array.shape[1:]), array.dtype)
    grown[:count] = array[:count]
    return grown


def _padded(array_ND: np.ndarray, width: int) -> np.ndarray:
    """Rows of ``width`` elements, C order, zeros behind the vector; the array itself where it is so."""
    if array_ND.shape[1] == width:
        return held(np.ascontiguousarray(array_ND))
    padded = np.zeros((len(array_ND), width), array_ND.dtype)
    padded[:, : array_ND.shape[1]] = array_ND
    return held(padded)


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE
