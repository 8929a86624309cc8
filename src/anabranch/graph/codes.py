"""Product quantisation: a vector as a few bytes, and distances to it by looking them up.

Jegou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search", IEEE TPAMI 2011. The numbers of a vector are cut into M parts;
each part is kept as the number, one byte, of the nearest of 256 centres that k-means found for it. A query is compared with a vector by
adding M numbers up, one from each row of a table that is worked out once per query (asymmetric distances, section III-A):

    |q - x|^2 ~ sum over parts p of |q_p - c_p[code_p]|^2            1 - <q, x> ~ 1 - sum over p of <q_p, c_p[code_p]>

Part p has the numbers from floor(p D / M) to floor((p + 1) D / M), so that M need not divide D.
"""
# Shapes: N vectors, D dimension, M parts, W numbers of the widest part, K = 256 centres, Q queries, S vectors to train on

from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.graph.products import ranges
from anabranch.graph.workers import Workers

CENTRES = 256

# Passes of k-means; more change little.
ROUNDS = 12

# So many vectors for each centre are enough to place it.
ENOUGH = 128

# Numba's types do not know of all of its options.
_jit: Any = nb.njit
_kernel = _jit(cache=True, nogil=True)
_helper = _jit(no_cpython_wrapper=True, no_cfunc_wrapper=True)


@dataclass(frozen=True)
class ProductCodes:
    """What bytes stand for. Made by `train`.

    Attributes:
        dim: D.
        centre_MWK: float32 [M, W, 256], the centres of each part, a column each; zeros beyond the numbers of a part.
    """

    dim: int
    centre_MWK: np.ndarray

    def __post_init__(self) -> None:
        centre, wanted = self.centre_MWK, None
        if centre.ndim == 3 and 1 <= len(centre) <= self.dim:
            wanted = (len(centre), -(-self.dim // len(centre)), CENTRES)
        if centre.shape != wanted or centre.dtype != np.float32:
            raise DataError(
                f"centres of codes are {centre.dtype} {list(centre.shape)}, which vectors of {self.dim} numbers do not have"
            )
        if not np.isfinite(centre).all():
            raise DataError("centres of codes are not finite")

    @property
    def num_parts(self) -> int:
        """M, the bytes of a vector."""
        return len(self.centre_MWK)

    @classmethod
    def train(cls, vector_SD: np.ndarray, num_parts: int, *, seed: int = 0, workers: int = 1) -> "ProductCodes":
        """Find centres by k-means, the same for any number of threads.

        Args:
            vector_SD: float32 [S, D], finite; a sample of what will be encoded. 32,768 (`ENOUGH` for each centre) are enough.
            num_parts: M, 1 to D.
            seed: of the vectors that k-means begins with.
            workers: parts that are worked on at once.

        Raises InputError for no vectors, or a number of parts that they do not have.
        """
        count, dim = vector_SD.shape
        if not count or not 1 <= num_parts <= dim:
            raise InputError(
                f"{num_parts} codes of {count:,} vectors of {dim} numbers; there must be vectors, and 1 to {dim} codes"
            )
        centre_MWK = np.zeros((num_parts, -(-dim // num_parts), CENTRES), np.float32)
        first_MK = _first_rows(count, num_parts, seed)

        def one(part: int) -> None:
            begin, end = part * dim // num_parts, (part + 1) * dim // num_parts
            part_SW = np.ascontiguousarray(vector_SD[:, begin:end])
            centre_MWK[part, : end - begin] = part_SW[first_MK[part]].T
            find_centres(part_SW, centre_MWK[part], ROUNDS)

        with Workers(workers) as pool:
            pool.each(one, [(part,) for part in range(num_parts)])
        return cls(dim, centre_MWK)

    def encode(self, vector_ND: np.ndarray, pool: Workers | None = None) -> np.ndarray:
        """Codes of vectors (float32 [N, D]), uint8 [N, M], by the threads of ``pool``."""
        vector_ND = np.require(vector_ND, np.float32, ["C", "W"])
        code_NM = np.empty((len(vector_ND), self.num_parts), np.uint8)
        tasks = [
            (vector_ND, self.centre_MWK, code_NM, *pair)
            for pair in ranges(len(vector_ND), 4 * pool.count if pool else 1)
        ]
        for task in tasks if pool is None else ():
            encode_rows(*task)
        if pool is not None:
            pool.each(encode_rows, tasks)
        return code_NM

    def decode(self, code_NM: np.ndarray) -> np.ndarray:
        """The vectors that codes stand for, float32 [N, D]."""
        found = np.empty((len(code_NM), self.dim), np.float32)
        for part, centre_WK in enumerate(self.centre_MWK):
            begin, end = part * self.dim // self.num_parts, (part + 1) * self.dim // self.num_parts
            found[:, begin:end] = centre_WK[: end - begin, code_NM[:, part]].T
        return found

    def tables(self, query_QD: np.ndarray, *, squared: bool) -> np.ndarray:
        """What to add up for the distance of each query to a vector: ``tables[q, arange(M), code].sum()``; float32 [Q, M, 256].

        ``squared``: for |q - x|^2; otherwise for 1 - <q, x>.
        """
        query_QD = np.require(query_QD, np.float32, ["C", "W"])
        table_QMK = np.empty((len(query_QD), self.num_parts, CENTRES), np.float32)
        for number in range(len(query_QD)):
            fill_table(query_QD[number], self.centre_MWK, squared, table_QMK[number])
        return table_QMK


def _first_rows(count: int, num_parts: int, seed: int) -> np.ndarray:
    """Rows that centres begin at, int64 [M, K]: distinct ones where there are enough."""
    draw = np.random.default_rng(seed)
    if count >= CENTRES:
        return np.stack([draw.choice(count, CENTRES, replace=False) for _ in range(num_parts)])
    return np.stack([np.resize(draw.permutation(count), CENTRES) for _ in range(num_parts)])


@_helper
def _nearest(vector_W, centre_WK, found_K):
    """The number of the nearest centre, and the square of the distance; ``found_K`` is room for all."""
    # All centres at once: this is what vector instructions can do.
    for centre in range(CENTRES):
        found_K[centre] = np.float32(0.0)
    for place in range(len(vector_W)):
        value = vector_W[place]
        for centre in range(CENTRES):
            apart = value - centre_WK[place, centre]
            found_K[centre] += apart * apart
    best = 0
    for centre in range(1, CENTRES):
        if found_K[centre] < found_K[best]:
            best = centre
    return best, found_K[best]


@_kernel
def find_centres(part_SW, centre_WK, rounds):
    """K-means from the centres that are there: each goes to the mean of what is nearest to it.

    One that is nearest to nothing goes to what lies farthest from its own centre.
    """
    count, width = part_SW.shape
    found_K, far_S = np.empty(CENTRES, np.float32), np.empty(count, np.float32)
    sum_KW, number_K = np.empty((CENTRES, width), np.float64), np.empty(CENTRES, np.int64)
    for _ in range(rounds):
        sum_KW[:] = 0.0
        number_K[:] = 0
        for row in range(count):
            best, far_S[row] = _nearest(part_SW[row], centre_WK, found_K)
            number_K[best] += 1
            for place in range(width):
                sum_KW[best, place] += part_SW[row, place]
        for centre in range(CENTRES):
            if number_K[centre] == 0:
                row = int(np.argmax(far_S))
                far_S[row] = np.float32(0.0)
                for place in range(width):
                    centre_WK[place, centre] = part_SW[row, place]
                continue
            for place in range(width):
                centre_WK[place, centre] = np.float32(sum_KW[centre, place] / number_K[centre])


@_kernel
def encode_rows(vector_ND, centre_MWK, code_NM, first, last):
    """Write codes of rows ``first`` ... ``last``."""
    parts, dim = len(centre_MWK), vector_ND.shape[1]
    found_K = np.empty(CENTRES, np.float32)
    for row in range(first, last):
        for part in range(parts):
            begin, end = part * dim // parts, (part + 1) * dim // parts
            code_NM[row, part] = _nearest(vector_ND[row, begin:end], centre_MWK[part], found_K)[0]


@_kernel
def fill_table(query_D, centre_MWK, squared, table_MK):
    """Write the table of a query, as `ProductCodes.tables`."""
    parts, dim = len(centre_MWK), len(query_D)
    for part in range(parts):
        begin, end = part * dim // parts, (part + 1) * dim // parts
        for centre in range(CENTRES):
            table_MK[part, centre] = np.float32(0.0) if squared or part > 0 else np.float32(1.0)
        for place in range(end - begin):
            value = query_D[begin + place]
            for centre in range(CENTRES):
                if squared:
                    apart = value - centre_MWK[part, place, centre]
                    table_MK[part, centre] += apart * apart
                else:
                    table_MK[part, centre] -= value * centre_MWK[part, place, centre]
