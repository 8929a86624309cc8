"""Vectors as rows that kernels measure, and back: float32, float16 or int8, padded with zeros to whole lines; or bits.

For squared L2, short rows hold x minus a centre of the vectors (`centres`): distances do not change by that, and their precision goes where
the data is. It is that of the first vectors added; whether another is better is looked at whenever one in 8 has come, moved or gone. Rows
of int8 with float32 vectors beside them have several centres where vectors are of groups far from each other (`groups`); the graph is
linked by the float32 vectors then.
"""
# Shapes: N vectors, D dimension, Q queries, G groups

from copy import copy

import numpy as np

from anabranch.graph.guarded import held
from anabranch.graph.hnsw.centres import centres_of
from anabranch.graph.hnsw.groups import groups_in, queries_for, rows_of
from anabranch.graph.hnsw.queries import code_rows
from anabranch.graph.hnsw.raw import HAMMING, L2_I8_GROUPS, LINE

PRECISIONS = ("f32", "f16", "i8")
# Of packed bits, with the metric "hamming".
BITS = "b1"
WORD = 8  # bytes
ITEM = {"f32": 4, "f16": 2, "i8": 1}

# Groups have centres of their own where numbers are so many times smaller then: half of their 8 bits say where a group is.
WORTH = 16.0

# Scale and norm of a query that has none; kernels only read it.
_ONE_ZERO = np.zeros((1, 2), np.float32)

Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]


class Encoding:
    """How an index keeps vectors.

    Attributes:
        stride: bytes of a row as it is searched, and how many numbers that is (``width``).
        full_stride: bytes of a float32 row that results are measured again by.
        rerank: whether these are kept beside.
        centre_D: what is taken off before rows are shortened, float32 [D]; None for nothing.
        centre_GD: what is, from rows of each group, float32 [G, D]; None where there are none, and that is ``centre_D`` of all rows.
    """

    def __init__(self, dim: int, metric: str, dtype: str, rerank: bool) -> None:
        self.dim, self.metric, self.dtype = dim, metric, dtype
        self.rerank = rerank and dtype != "f32"
        self.stride = lines(dim * ITEM[dtype])
        self.width = self.stride // ITEM[dtype]
        self.full_stride = lines(4 * dim)
        self.take_centres(None)

    @property
    def kind(self) -> int:
        """Of distance (`layout`)."""
        if self.centre_GD is not None:
            return L2_I8_GROUPS
        return 2 * PRECISIONS.index(self.dtype) + (self.metric != "l2")

    @property
    def is_settled(self) -> bool:
        """Whether `settle` has nothing to take."""
        return self.centre_D is not None or self.metric != "l2" or self.dtype == "f32"

    @property
    def worth(self) -> float | None:
        """How many times smaller numbers must be for groups to have centres of their own; None: they never have."""
        return WORTH if self.metric == "l2" and self.dtype == "i8" and self.rerank else None

    @property
    def centres(self) -> np.ndarray | None:
        """The centre, or centres, as `centres.centres_of` gives them."""
        if self.centre_D is None or self.centre_GD is None:
            return self.centre_D
        return np.concatenate([self.centre_D[None], self.centre_GD])

    def settle(self, vector_ND: np.ndarray) -> None:
        """Take the centre, or centres, of the first vectors."""
        if not self.is_settled:
            self.take_centres(centres_of(vector_ND, self.worth))

    def take_centres(self, centres: np.ndarray | None) -> None:
        """Take the centre, or centres, that `centres.centres_of` gives; None for none."""
        self.centre_D: np.ndarray | None = centres if centres is None or centres.ndim == 1 else centres[0].copy()
        self.centre_GD: np.ndarray | None = None if centres is None or centres.ndim == 1 else centres[1:].copy()

    def with_centre(self, centres: np.ndarray) -> "Encoding":
        """The same with another centre, or others."""
        made = copy(self)
        made.take_centres(centres)
        return made

    def error_of(self, vector_ND: np.ndarray) -> np.ndarray:
        """How far vectors lie from what rows of them say, float32 [N]."""
        rows, aux, _ = self.encode(vector_ND)
        off_ND = vector_ND - self.decode(rows, aux)
        return np.sqrt(np.einsum("nd,nd->n", off_ND, off_ND))

    def encode(self, vector_ND: np.ndarray) -> Encoded:
        """Rows as they are searched (uint8 [N, STRIDE]), their aux, and full rows (float32; empty where rows are final)."""
        full = padded(vector_ND, self.full_stride // 4)
        if self.dtype == "f32":
            return full.view(np.uint8), np.zeros((len(full), 2), np.float32), full[:, :0]
        kept = full if self.rerank else full[:, :0]
        if self.dtype == "f16":
            with np.errstate(over="ignore"):
                half = self._centred(vector_ND).astype(np.float16)
            # Beyond its range: its ends.
            half = np.clip(half, np.finfo(np.float16).min, np.finfo(np.float16).max)
            return padded(half, self.width).view(np.uint8), np.zeros((len(full), 2), np.float32), kept
        if self.centre_GD is not None:
            return *rows_of(vector_ND, self.centre_GD, self._coded), kept
        return *self._codes(vector_ND), kept

    def encode_queries(self, vector_QD: np.ndarray) -> Encoded:
        """Queries as kernels take them: as `encode`, but float32 for rows of float16, and full ones always."""
        full = padded(vector_QD, self.full_stride // 4)
        aux = _ONE_ZERO if len(full) == 1 else np.zeros((len(full), 2), np.float32)
        if self.dtype == "f32":
            return full.view(np.uint8), aux, full
        if self.dtype == "f16":
            return padded(self._centred(vector_QD), self.width).view(np.uint8), aux, full
        if self.centre_GD is not None:
            return queries_for(vector_QD, self.centre_GD, self._coded), aux, full
        return *self._codes(vector_QD), full

    def decode(self, rows: np.ndarray, aux: np.ndarray) -> np.ndarray:
        """Vectors of short or final rows, float32 [N, D]."""
        if self.dtype == "f32":
            return rows.view(np.float32)[:, : self.dim]
        if self.dtype == "f16":
            found = rows.view(np.float16)[:, : self.dim].astype(np.float32)
        else:
            found = rows.view(np.int8)[:, : self.dim] * aux[:, :1]
        if self.centre_GD is not None:
            return found + self.centre_GD[groups_in(aux)]
        return found if self.centre_D is None else found + self.centre_D

    def _centred(self, vector_ND: np.ndarray) -> np.ndarray:
        return vector_ND if self.centre_D is None else vector_ND - self.centre_D

    def _codes(self, vector_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int8 codes of vectors less the centre as rows (uint8 [N, STRIDE]), and float32 [N, 2] of scale and squared norm."""
        return self._coded(vector_ND, self.centre_D)

    def _coded(self, vector_ND: np.ndarray, centre_D: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The same less a centre, or of the vectors themselves."""
        count, vector_ND = len(vector_ND), held(np.ascontiguousarray(vector_ND, np.float32))
        rows, aux = held(np.zeros((count, self.stride), np.uint8)), np.empty((count, 2), np.float32)
        centre_D = None if centre_D is None else held(centre_D)
        code_rows(vector_ND.ctypes.data, 0 if centre_D is None else centre_D.ctypes.data, count, self.dim, rows, aux)
        return rows, aux


class BitEncoding(Encoding):
    """How an index keeps packed bits, uint8 [N, D / 8]: as they come, in words of 64; a row that fits into a line never lies in two."""

    def __init__(self, dim: int) -> None:
        self.dim, self.metric, self.dtype, self.rerank = dim, "hamming", BITS, False
        self.stride = short_stride(dim // 8)
        self.width = self.stride // WORD
        self.full_stride = 0
        self.take_centres(None)

    @property
    def kind(self) -> int:
        """Of distance (`layout`)."""
        return HAMMING

    def encode(self, vector_ND: np.ndarray) -> Encoded:
        """Rows, and nothing beside them."""
        count = len(vector_ND)
        return padded(vector_ND, self.stride), np.zeros((count, 2), np.float32), np.zeros((count, 0), np.float32)

    def encode_queries(self, vector_QD: np.ndarray) -> Encoded:
        """The same of queries; kernels take arrays of all kinds, and do not look at the others."""
        rows, aux, _ = self.encode(vector_QD)
        return rows, aux, np.zeros((len(rows), 1), np.float32)

    def decode(self, rows: np.ndarray, aux: np.ndarray) -> np.ndarray:
        """Packed bits, uint8 [N, D / 8]."""
        return rows[:, : self.dim // 8]


def encoding_of(dim: int, metric: str, dtype: str, rerank: bool) -> Encoding:
    """How an index of these options keeps vectors."""
    return BitEncoding(dim) if metric == "hamming" else Encoding(dim, metric, dtype, rerank)


def padded(array_ND: np.ndarray, width: int) -> np.ndarray:
    """Rows of ``width`` elements, C order, zeros behind the vector; the array itself where it is so."""
    if array_ND.shape[1] == width:
        return held(np.ascontiguousarray(array_ND))
    wide = np.zeros((len(array_ND), width), array_ND.dtype)
    wide[:, : array_ND.shape[1]] = array_ND
    return held(wide)


def lines(size: int) -> int:
    """Bytes of whole lines that so many fit in."""
    return -(-size // LINE) * LINE


def short_stride(size: int) -> int:
    """Bytes that so many take so that rows which are shorter than a line do not cross from one into the next."""
    return lines(size) if size > LINE // 2 else max(WORD, 1 << (size - 1).bit_length())
