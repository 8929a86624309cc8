"""Codes: a walk measures a few bytes in place of each vector, and the best of what it finds are measured again by the vectors themselves.

    "pq"      product quantisation (`anabranch.graph.codes`): a byte for each of some parts, distances by look-up
    "int4"    half a byte for each number: c = round(x / s) with s = max |x| / 7 of that vector, beside them s and |s c|^2

Vectors stay as float32 rows beside the codes, and the graph is linked by them, so it is the graph of an index without codes. Mapped from a
file, rows stay on the disk, and a search reads those of the candidates that it measures again. What codes stand for is learned from a
sample of the vectors once there are enough (`FIRST`), again while they are far more than it was learned from, and where codes say little of
the vectors that there are by now (what they were learned from went); until then there are none, and distances are exact.
"""
# Shapes: N vectors, D dimension, M bytes of a code, C capacity, S slots or sample, Q queries

from typing import Any

import numpy as np

from anabranch.bounds import is_whole, shown
from anabranch.errors import DataError, InputError
from anabranch.graph.arguments import check_one_of
from anabranch.graph.codes import CENTRES, ProductCodes
from anabranch.graph.guarded import held
from anabranch.graph.hnsw import layout
from anabranch.graph.hnsw.arrays import aligned, grown
from anabranch.graph.hnsw.centres import are_many, better_centre, centres_of
from anabranch.graph.hnsw.encoding import padded, short_stride
from anabranch.graph.hnsw.groups import LEAST, groups_in, nearest, queries_for, rows_of
from anabranch.graph.hnsw.measuring import HEAD
from anabranch.graph.hnsw.raw import IP_I4, IP_PQ, L2_I4, L2_I4_GROUPS, L2_PQ
from anabranch.graph.hnsw.soundness import Wanted, check_groups, wanted_groups

QUANTIZATIONS = ("pq", "int4")

# Vectors that codes are first learned from, and how many times as many there must be to learn them anew.
FIRST, MORE = 1024, 8

# Learned from at most so many, which is enough (`codes.ENOUGH`).
SAMPLE = 1 << 15

# Codes are worn out where vectors use fewer than one in so many of the centres that they could.
WORN = 4

# So are they where more than one in so many vectors lies farther from its centre than any centre from the middle of all: what is so far off
# looks near, and fills a walk.
OUTSIDE = 16

# Vectors that are looked at for that.
LOOKED_AT = 1024

# Codes that were learned from fewer fit these, and have errors for others that say nothing.
ENOUGH = 1024

# An error of so many times what is usual is one of a vector unlike those that "pq" learned from.
LARGE = 2.0

# Numbers of a vector for each byte of "pq", unless another number of bytes is asked for.
SHARE = 4

# Bytes that are unpacked at once, to twice as many numbers.
NIBBLES = 32

# Groups of vectors have centres of their own where numbers of "int4" are so many times smaller then: of 4 bits, more than one.
WORTH = 3.0

# Bytes of tables that one thread works out at once: they should still be near when they are looked up.
TABLES = 1 << 18


class PQ:
    """Product quantisation of an index's vectors."""

    def __init__(self, dim: int, metric: str, num_parts: int) -> None:
        self.dim, self.metric, self.num_parts = dim, metric, num_parts
        self.stride = short_stride(num_parts)
        # Four are looked up at a time.
        self.width = -(-num_parts // 4) * 4
        self.kind = L2_PQ if metric == "l2" else IP_PQ
        self.has_aux = False
        self.codes: ProductCodes | None = None

    @property
    def query_bytes(self) -> int:
        """Of a query as kernels take it."""
        return 4 * CENTRES * self.width

    @property
    def is_trained(self) -> bool:
        """Whether it is known what codes stand for."""
        return self.codes is not None

    def trained(self, vector_SD: np.ndarray, seed: int, workers: int) -> "PQ":
        """Another one that has learned from vectors."""
        made = PQ(self.dim, self.metric, self.num_parts)
        made.codes = ProductCodes.train(vector_SD, self.num_parts, seed=seed, workers=workers)
        return made

    def is_worn(self, vector_SD: np.ndarray, *, strays: bool = False) -> bool:
        """Whether these vectors fall upon few of the centres of a part, although they differ there; or some lie far outside of all; with
        ``strays``, also whether one in `GAINING` has a far larger error than is usual among them."""
        assert self.codes is not None
        if not len(vector_SD):
            return False
        code_SM = self.codes.encode(vector_SD)
        off_SD = vector_SD.astype(np.float64) - self.codes.decode(code_SM)
        for part in range(self.num_parts):
            begin, end = part * self.dim // self.num_parts, (part + 1) * self.dim // self.num_parts
            used = len(np.unique(code_SM[:, part]))
            # As bytes: sorting rows of numbers is slow.
            part_S = np.ascontiguousarray(vector_SD[:, begin:end]).view(f"V{4 * (end - begin)}")
            if WORN * used < min(CENTRES, len(np.unique(part_S))):
                return True
            centre_WK = self.codes.centre_MWK[part, : end - begin].astype(np.float64)
            reach = ((centre_WK - centre_WK.mean(1, keepdims=True)) ** 2).sum(0).max()
            if OUTSIDE * int(((off_SD[:, begin:end] ** 2).sum(1) > reach).sum()) > len(vector_SD):
                return True
        if not strays:
            return False
        error_S = np.linalg.norm(off_SD, axis=1)
        return are_many(error_S > LARGE * np.median(error_S))

    def usual(self, vector_SD: np.ndarray, code_S: np.ndarray, aux_S2: np.ndarray) -> np.ndarray:
        """The error that is usual for vectors with these codes, [1]."""
        assert self.codes is not None
        return np.median(
            np.linalg.norm(vector_SD - self.codes.decode(code_S[:, : self.num_parts]), axis=1), keepdims=True
        )

    def far_of(self, vector_ND: np.ndarray, usual: np.ndarray) -> np.ndarray:
        """Which vectors have `LARGE` times the error that is `usual`: bool [N]."""
        return self.error_of(vector_ND) > LARGE * usual

    def error_of(self, vector_ND: np.ndarray) -> np.ndarray:
        """How far vectors lie from what their codes stand for, [N]."""
        assert self.codes is not None
        return np.linalg.norm(vector_ND - self.codes.decode(self.codes.encode(vector_ND)), axis=1)

    def encode(self, vector_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows, uint8 [N, STRIDE], and nothing beside them."""
        assert self.codes is not None
        return padded(self.codes.encode(vector_ND), self.stride), np.zeros((len(vector_ND), 2), np.float32)

    def encode_queries(self, vector_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tables to add up by code, as bytes, zeros beyond the parts."""
        assert self.codes is not None
        table_QMK = self.codes.tables(vector_QD, squared=self.metric == "l2")
        if self.width > self.num_parts:
            table_QMK = np.pad(table_QMK, ((0, 0), (0, self.width - self.num_parts), (0, 0)))
        return held(table_QMK.reshape(len(vector_QD), -1).view(np.uint8)), np.zeros((len(vector_QD), 2), np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """What was learned, by name."""
        assert self.codes is not None
        return {"code_centres": self.codes.centre_MWK}

    def wanted(self) -> Wanted:
        """Shapes of these."""
        return {"code_centres": ((self.num_parts, -(-self.dim // self.num_parts), CENTRES), np.float32)}

    def optional(self, arrays: dict[str, np.ndarray]) -> Wanted:
        """None of those that there may be."""
        return {}

    def take_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Know what was learned. Raises DataError for numbers that are none."""
        self.codes = ProductCodes(self.dim, np.array(arrays["code_centres"]))


class Int4:
    """Four bits for each number of an index's vectors; what is learned is a centre, or one for each group of vectors (`centres`).

    They are taken off for squared L2.
    """

    def __init__(self, dim: int, metric: str) -> None:
        self.dim, self.metric = dim, metric
        self.stride = max(NIBBLES, short_stride(-(-dim // 2)))
        self.width = self.stride
        self.has_aux = True
        self.centre_D: np.ndarray | None = None
        self.centre_GD: np.ndarray | None = None

    @property
    def kind(self) -> int:
        """Of distance (`layout`)."""
        if self.metric != "l2":
            return IP_I4
        return L2_I4 if self.centre_GD is None else L2_I4_GROUPS

    @property
    def query_bytes(self) -> int:
        """Of a query as kernels take it."""
        return 2 * self.stride if self.centre_GD is None else len(self.centre_GD) * (HEAD + 2 * self.stride)

    @property
    def is_trained(self) -> bool:
        """Whether it is known what codes stand for."""
        return self.centre_D is not None

    def trained(self, vector_SD: np.ndarray, seed: int, workers: int) -> "Int4":
        """Another one that has learned from vectors."""
        made = Int4(self.dim, self.metric)
        if self.metric != "l2":
            made.centre_D = np.zeros(self.dim, np.float32)
            return made
        centres = centres_of(vector_SD, WORTH)
        made.centre_D, made.centre_GD = (centres, None) if centres.ndim == 1 else (centres[0], centres[1:])
        return made

    def is_worn(self, vector_SD: np.ndarray, *, strays: bool = False) -> bool:
        """Whether these vectors, or one in `GAINING` that are a group, have gone so far from the centre that their codes say little."""
        assert self.centre_D is not None
        held = self.centre_D if self.centre_GD is None else np.concatenate([self.centre_D[None], self.centre_GD])
        return self.metric == "l2" and better_centre(held, vector_SD, WORTH) is not None

    def usual(self, vector_SD: np.ndarray, code_S: np.ndarray, aux_S2: np.ndarray) -> np.ndarray:
        """How large vectors beside whose codes this stands usually are, less their centre: [1], or of each group [G]."""
        size_S = 7 * aux_S2[:, 0]
        usual = np.median(size_S)
        if self.centre_GD is None:
            return np.array([usual])
        # Groups differ in width; what has too few rows says nothing of its own.
        of_S = groups_in(aux_S2)
        sizes = [size_S[of_S == group] for group in range(len(self.centre_GD))]
        return np.array([np.median(size) if len(size) >= LEAST else usual for size in sizes])

    def far_of(self, vector_ND: np.ndarray, usual: np.ndarray) -> np.ndarray:
        """Which vectors are `WORTH` times as large, less their centre, as is `usual`: bool [N]."""
        assert self.centre_D is not None
        if self.metric != "l2":
            return np.zeros(len(vector_ND), bool)
        if self.centre_GD is None:
            return np.abs(vector_ND - self.centre_D).max(1) > WORTH * usual
        group_N = nearest(vector_ND, self.centre_GD)
        return np.abs(vector_ND - self.centre_GD[group_N]).max(1) > WORTH * usual[group_N]

    def error_of(self, vector_ND: np.ndarray) -> np.ndarray:
        """How far vectors lie from what their codes stand for, [N]."""
        held = self.centre_D if self.centre_GD is None else self.centre_GD[nearest(vector_ND, self.centre_GD)]
        off_ND = vector_ND - held
        code_ND, aux = _rounded(off_ND, 7)
        return np.linalg.norm(off_ND - code_ND * aux[:, :1], axis=1)

    def encode(self, vector_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows, uint8 [N, STRIDE], and float32 [N, 2] of scale and squared norm."""
        if self.centre_GD is None:
            return self._coded(vector_ND - self.centre_D)
        return rows_of(vector_ND, self.centre_GD, self._coded)

    def _coded(self, vector_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        code_ND, aux = _rounded(vector_ND, 7)
        half = padded((code_ND + 8).astype(np.uint8), 2 * self.stride).reshape(len(code_ND), -1, 2, NIBBLES)
        return (half[:, :, 0] | half[:, :, 1] << 4).reshape(len(code_ND), self.stride), aux

    def encode_queries(self, vector_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Queries of a whole byte for each number, int8 as bytes, zeros beyond them, about each centre; and their aux."""
        if self.centre_GD is None:
            return self._coded_query(vector_QD - self.centre_D)
        return queries_for(vector_QD, self.centre_GD, self._coded_query), np.zeros((len(vector_QD), 2), np.float32)

    def _coded_query(self, vector_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        code_QD, aux = _rounded(vector_QD, 127)
        return padded(code_QD.astype(np.int8), 2 * self.stride).view(np.uint8), aux

    def arrays(self) -> dict[str, np.ndarray]:
        """What was learned, by name."""
        assert self.centre_D is not None
        grouped = {} if self.centre_GD is None else {"code_groups": self.centre_GD}
        return {"code_centre": self.centre_D, **grouped}

    def wanted(self) -> Wanted:
        """Shapes of these."""
        return {"code_centre": ((self.dim,), np.float32)}

    def optional(self, arrays: dict[str, np.ndarray]) -> Wanted:
        """Of those that there may be."""
        return wanted_groups(arrays, "code_groups", self.dim) if self.metric == "l2" else {}

    def take_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Know what was learned. Raises DataError for numbers that are none."""
        self.centre_D = np.array(arrays["code_centre"])
        if not np.isfinite(self.centre_D).all():
            raise DataError("the centre of codes is not finite")
        self.centre_GD = np.array(arrays["code_groups"]) if "code_groups" in arrays else None


def _rounded(vector_ND: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers as multiples -most ... most of a scale, and float32 [N, 2] of that and the squared norm of these (`queries.code_row`)."""
    aux = np.empty((len(vector_ND), 2), np.float32)
    aux[:, 0] = np.abs(vector_ND).max(1, initial=0.0) / most
    scale = np.where(aux[:, :1] > 0, aux[:, :1], 1)
    code_ND = np.clip(np.rint(vector_ND / scale), -most, most)
    aux[:, 1] = np.einsum("nd,nd->n", code_ND, code_ND, dtype=np.float64).astype(np.float32) * aux[:, 0] ** 2
    return code_ND, aux


class Coded:
    """The codes of an index's slots. Not safe for threads: `HNSW` holds the lock.

    Attributes:
        quantization: "pq" or "int4".
        trained_on: how many vectors there were when codes were learned; 0 before.
    """

    def __init__(self, quantization: str, dim: int, metric: str, code_bytes: int | None) -> None:
        self.quantization, self.code_bytes = quantization, code_bytes
        parts = max(1, dim // SHARE) if code_bytes is None else code_bytes
        self.coder: PQ | Int4 = PQ(dim, metric, parts) if quantization == "pq" else Int4(dim, metric)
        self.trained_on = 0
        self.rows, self.aux = self._room(0)

    def _room(self, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        aux = aligned((capacity if self.coder.has_aux else 0, 2), np.float32)
        return aligned((capacity, self.coder.stride), np.uint8), aux

    @property
    def is_trained(self) -> bool:
        """Whether there are codes."""
        return self.coder.is_trained

    @property
    def each(self) -> int:
        """Bytes of an element; 0 before there are codes."""
        return (self.coder.stride + 8 * self.coder.has_aux) if self.is_trained else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, with what they have room for."""
        learned = sum(array.nbytes for array in self.coder.arrays().values()) if self.is_trained else 0
        return self.rows.nbytes + self.aux.nbytes + learned

    def is_due(self, count: int) -> bool:
        """Whether codes should be learned now that there are so many vectors."""
        if not self.is_trained:
            return count >= FIRST
        return self.trained_on < SAMPLE and count >= MORE * self.trained_on

    def is_worn(self, vector_SD: np.ndarray, *, strays: bool = False) -> bool:
        """Whether codes that were learned say little of these vectors, or with ``strays`` of a group of them: to be learned anew."""
        return self.is_trained and self.coder.is_worn(vector_SD, strays=strays and self.trained_on >= ENOUGH)

    def usual(self, vector_SD: np.ndarray, slot_S: np.ndarray) -> np.ndarray | None:
        """What is usual for vectors of slots, by which others are told to be far; None where nothing says so."""
        if not len(slot_S) or self.trained_on < ENOUGH:
            return None
        return self.coder.usual(vector_SD, self.rows[slot_S], self.aux[slot_S] if self.coder.has_aux else self.aux)

    def far_of(self, vector_ND: np.ndarray, usual: np.ndarray) -> np.ndarray:
        """Which vectors lie far from what codes were learned from, bool [N], by what is `usual`."""
        return self.coder.far_of(vector_ND, usual)

    def error_of(self, vector_ND: np.ndarray) -> np.ndarray:
        """How far vectors lie from what their codes would stand for, [N]."""
        return self.coder.error_of(vector_ND)

    def square_of(self, vector_ND: np.ndarray) -> float:
        """The mean of squares of these."""
        return float(np.square(self.error_of(vector_ND), dtype=np.float64).mean())

    def learned(
        self, sample_SD: np.ndarray, rows: np.ndarray, count: int, capacity: int, seed: int, workers: int
    ) -> "Coded":
        """Codes of the first ``count`` rows (float32 [C, D]), learned from a sample; this one stays as it is."""
        made = object.__new__(Coded)
        made.quantization, made.code_bytes, made.trained_on = self.quantization, self.code_bytes, count
        made.coder = self.coder.trained(np.ascontiguousarray(sample_SD), seed, workers)
        made.rows, made.aux = made._room(capacity)
        for begin in range(0, count, SAMPLE):
            slot_S = np.arange(begin, min(begin + SAMPLE, count))
            made.put(slot_S, made.encode(rows[slot_S]))
        return made

    def encode(self, vector_SD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes of vectors, for `put`."""
        return self.coder.encode(vector_SD)

    def put(self, slot_S: np.ndarray, encoded: tuple[np.ndarray, np.ndarray]) -> None:
        """Replace codes."""
        self.rows[slot_S] = encoded[0]
        if self.coder.has_aux:
            self.aux[slot_S] = encoded[1]

    def larger(self, capacity: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Arrays with room for so many, of which the first are those there are."""
        if not self.is_trained:
            return self._room(0)
        return grown(self.rows, capacity, count), grown(self.aux, capacity if self.coder.has_aux else 0, count)

    def keep(self, slot_S: np.ndarray) -> None:
        """Drop all slots but these (rising), and number them anew."""
        for array in (self.rows, self.aux):
            if len(array):
                array[: len(slot_S)] = array[slot_S]

    def described(self, graph: np.ndarray, *, rerank: bool) -> np.ndarray:
        """The row that describes an index to kernels, so that they walk over codes."""
        row = graph.copy()
        row[layout.KIND], row[layout.WIDTH] = self.coder.kind, self.coder.width
        row[layout.ROWS], row[layout.STRIDE] = self.rows.ctypes.data, self.coder.stride
        row[layout.AUX] = self.aux.ctypes.data
        row[layout.FULL] = graph[layout.ROWS] if rerank else 0
        return row

    # On disk

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """What is saved, by name."""
        if not self.is_trained:
            return {}
        beside = {"code_aux": self.aux[:count]} if self.coder.has_aux else {}
        return {"codes": self.rows[:count], **beside, **self.coder.arrays()}

    def wanted(self, count: int) -> Wanted:
        """Shapes of these."""
        beside: Wanted = {"code_aux": ((count, 2), np.float32)} if self.coder.has_aux else {}
        return {"codes": ((count, self.coder.stride), np.uint8), **beside, **self.coder.wanted()}

    def optional(self, arrays: dict[str, np.ndarray]) -> Wanted:
        """Shapes of those that there may be beside."""
        return self.coder.optional(arrays)

    def take_arrays(self, arrays: dict[str, np.ndarray], source: str) -> None:
        """Hold what `arrays` gave. Raises DataError for numbers that are none."""
        try:
            self.coder.take_arrays(arrays)
        except DataError as error:
            raise DataError(f"{source} is damaged: {error}") from None
        if "code_groups" in arrays:
            check_groups(arrays["code_groups"], arrays["code_aux"], source)
        count = len(arrays["codes"])
        self.rows = grown(arrays["codes"], count, count)
        if self.coder.has_aux:
            self.aux = grown(arrays["code_aux"], count, count)


def check_quantization(quantization: Any, code_bytes: Any, *, dim: int, metric: str, dtype: str) -> None:
    """Raise InputError where an argument of `HNSW` has a value that it may not have."""
    if quantization is None:
        if code_bytes is not None:
            raise InputError(
                f"code_bytes is {shown(code_bytes)}, and there are no codes; it goes with quantization='pq'"
            )
        return
    check_one_of("quantization", quantization, QUANTIZATIONS, ", or None")
    if dtype != "f32":
        raise InputError(
            f"dtype is {dtype!r}; with quantization={quantization!r} codes are searched, and vectors kept beside them as 'f32'"
        )
    if code_bytes is not None and quantization != "pq":
        raise InputError(
            f"code_bytes is {shown(code_bytes)}; it is for quantization='pq', 'int4' has half a byte for each number"
        )
    if code_bytes is not None and not (is_whole(code_bytes) and 1 <= code_bytes <= dim):
        raise InputError(f"code_bytes is {shown(code_bytes)}; it must be an integer from 1 to the dimension, {dim}")
