"""What callers pass: vectors, ids and filters as arrays that kernels can trust, or an error that names the row."""
# Shapes: N vectors, D dimension

import operator
import sys
import warnings
from typing import Any

import numpy as np

from anabranch.bounds import is_whole, shown
from anabranch.errors import CapacityError, InputError
from anabranch.graph.masks import unmasked
from anabranch.machine import room_bytes

# The longest vector there may be: distances are squares of differences in 32 bits, and sums of a few of them are taken.
MAX_LENGTH = 1e18
TOO_LONG = "squared distances would not be finite as 32-bit numbers; scale all vectors down"

# Below that, squares of differences vanish as 32-bit numbers, and all such vectors lie at distance 0 from each other.
MIN_LENGTH = 1e-18

# Where no vector is longer, 1 - inner product is rounded to less than some sixteen values, for its 1: distances do not tell them apart.
MIN_PRODUCT_LENGTH = 1e-3

# Numbers that 16 bits hold with their full precision, in absolute value.
HALF_LEAST, HALF_MOST = float(np.finfo(np.float16).smallest_normal), float(np.finfo(np.float16).max)

# Rows that are looked at together.
_LOOKED_AT = 1 << 14


def is_tensor(value: Any) -> bool:
    """Whether this is a torch tensor; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_array(value: Any, what: str) -> np.ndarray:
    """Numbers, from an array, a tensor on any device, or nested lists."""
    if is_tensor(value):
        value = value.detach()
        value = (value.float() if value.is_floating_point() else value).cpu().numpy()
    value = unmasked(value, what)
    try:
        found = np.asarray(value)
    except ValueError as error:
        raise InputError(f"{what} must be an array of numbers: {error}") from None
    if found.dtype.kind not in "fiub" and found.size:
        raise InputError(f"{what} must be numbers, not {found.dtype}")
    return found


def like(array: np.ndarray, value: Any) -> Any:
    """An array as the kind of ``value``: a tensor on its device, or the array."""
    return sys.modules["torch"].from_numpy(array).to(value.device) if is_tensor(value) else array


def as_vectors(value: Any, dim: int, metric: str, what: str) -> np.ndarray:
    """float32 [N, dim], C order; of length 1 for "cosine". One vector [dim] is one row. For "hamming" see `as_bits`.

    Raises InputError for a wrong dimension, for what is not finite as float32, for a vector longer than `MAX_LENGTH`, whose squared
    distances would not be, and for a zero vector with "cosine".
    """
    if metric == "hamming":
        return as_bits(value, dim, what)
    found = _as_rows(as_array(value, what), dim)
    if found.ndim != 2 or found.shape[1] != dim:
        raise InputError(f"{what} have the shape {list(found.shape)}; the index takes rows of {dim} numbers")
    if found.dtype == np.float32:
        vector_ND = np.ascontiguousarray(found)
    else:
        with np.errstate(over="ignore"):
            vector_ND = np.ascontiguousarray(found, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        square_N = np.einsum("nd,nd->n", vector_ND, vector_ND)
    # One pass says that all is well; what is not a number is not below anything.
    if not (square_N <= MAX_LENGTH**2).all():
        _check_rows(vector_ND, metric, what)
    return normalized(vector_ND, what) if metric == "cosine" else vector_ND


def _as_rows(found: np.ndarray, width: int) -> np.ndarray:
    """One row as an array of one, none as one of none."""
    if found.ndim == 1:
        return found[None] if found.size else found.reshape(0, width)
    return found


def as_bits(value: Any, dim: int, what: str) -> np.ndarray:
    """Packed bits, uint8 [N, dim / 8], C order: of bytes (what `numpy.packbits` gives, or whole numbers 0 to 255), or of bool [N, dim].

    Raises InputError for another dimension, and for what are no bytes, with the row.
    """
    found = as_array(value, what)
    width = dim if found.dtype == bool and found.size else dim // 8
    found = _as_rows(found, width)
    if found.ndim != 2 or found.shape[1] != width:
        raise InputError(
            f"{what} have the shape {list(found.shape)} of {found.dtype}; the index takes rows of {dim // 8} bytes, which are {dim} bits "
            f"(numpy.packbits), or of {dim} truth values"
        )
    if found.dtype == bool:
        return np.packbits(found, axis=1) if found.size else np.zeros((len(found), dim // 8), np.uint8)
    if found.dtype.kind not in "iu" and found.size:
        raise InputError(f"{what} are {found.dtype}; with the metric 'hamming' they are bytes (uint8) or truth values")
    if found.dtype != np.uint8:
        bad = np.flatnonzero(((found < 0) | (found > 255)).any(1))
        if bad.size:
            raise InputError(f"row {bad[0]} of {what} holds a number that is no byte; bytes are 0 to 255")
    return np.ascontiguousarray(found, np.uint8)


def _check_rows(vector_ND: np.ndarray, metric: str, what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(vector_ND).all(1))
    if bad.size:
        raise InputError(f"row {bad[0]} of {what} is not finite (as 32-bit numbers); leave such rows out")
    # Directions are compared with "cosine", so lengths are taken away first.
    if metric != "cosine" and (row := too_long(vector_ND)) is not None:
        raise InputError(f"row {row} of {what} is longer than {MAX_LENGTH:g}: {TOO_LONG}")


def too_long(vector_ND: np.ndarray) -> int | None:
    """The first row that is longer than `MAX_LENGTH`."""
    bad = np.flatnonzero(np.einsum("nd,nd->n", vector_ND, vector_ND, dtype=np.float64) > MAX_LENGTH**2)
    return int(bad[0]) if bad.size else None


def warn_of_short(vector_ND: np.ndarray, metric: str, what: str) -> None:
    """Tell of the first row that is not zero and shorter than `MIN_LENGTH`, where distances are squares of differences ("l2").

    It is no error: among longer vectors such a one is as good as zero, and found as that.
    """
    if metric != "l2":
        return
    square_N = np.einsum("nd,nd->n", vector_ND, vector_ND)
    short = np.flatnonzero(square_N < MIN_LENGTH**2)
    short = short[vector_ND[short].any(1)]
    if short.size:
        message = (
            f"row {short[0]} of {what} is shorter than {MIN_LENGTH:g}, and not zero: squared distances between such vectors are 0 as "
            "32-bit numbers, so that they are not told apart; scale all vectors up"
        )
        warnings.warn(message, stacklevel=3)


def warn_of_rounding(vector_ND: np.ndarray, metric: str, dtype: str, centre_D: np.ndarray | None, what: str) -> bool:
    """Tell of rows of which distances ("ip"), or short rows about a centre ("f16"), keep little. Ranks suffer, so it is no error.

    For "ip" where the longest is shorter than `MIN_PRODUCT_LENGTH`; for "f16" of the first that holds a number beyond `HALF_MOST`, and
    where all numbers are below `HALF_LEAST`. Vectors that are all zero are as good as any. Whether of 16 bits something was told.
    """
    if metric == "ip" and len(vector_ND):
        square_N = np.einsum("nd,nd->n", vector_ND, vector_ND, dtype=np.float64)
        row = int(square_N.argmax())
        if vector_ND.any() and square_N[row] < MIN_PRODUCT_LENGTH**2:
            message = (
                f"row {row} of {what} is shorter than {MIN_PRODUCT_LENGTH:g}, and the longest: 1 - inner product of such vectors is "
                "rounded to a few 32-bit numbers, so that they are hardly told apart; scale all vectors up"
            )
            warnings.warn(message, stacklevel=4)
    if dtype != "f16":
        return False
    largest = 0.0
    for first in range(0, len(vector_ND), _LOOKED_AT):
        part_PD = vector_ND[first : first + _LOOKED_AT]
        largest = max(largest, float(np.abs(part_PD).max(initial=0.0)))
        far_P = np.abs(part_PD if centre_D is None else part_PD - centre_D).max(1, initial=0.0)
        if (far_P > HALF_MOST).any():
            message = (
                f"row {first + int(np.argmax(far_P > HALF_MOST))} of {what} holds a number that lies {far_P.max():.3g} from the centre, "
                f"and 16 bits reach {HALF_MOST:g}: such numbers are cut off; scale all vectors down, or use dtype 'i8'"
            )
            warnings.warn(message, stacklevel=4)
            return True
    if 0 < largest < HALF_LEAST:
        message = (
            f"row 0 of {what} and all others hold numbers below {HALF_LEAST:.2g} alone, of which 16 bits keep little; scale all vectors "
            "up, or use dtype 'i8'"
        )
        warnings.warn(message, stacklevel=4)
        return True
    return False


def normalized(vector_ND: np.ndarray, what: str) -> np.ndarray:
    """Rows of length 1. Raises InputError for one of length 0."""
    largest = np.abs(vector_ND).max(1, initial=0.0, keepdims=True)
    zero = np.flatnonzero(largest == 0)
    if zero.size:
        raise InputError(f"row {zero[0]} of {what} is zero and has no direction, which the metric 'cosine' compares")
    # So that squares neither overflow nor vanish.
    scaled = vector_ND / largest
    return (scaled / np.sqrt(np.einsum("nd,nd->n", scaled, scaled, dtype=np.float64))[:, None]).astype(np.float32)


def as_ids(value: Any, count: int | None, what: str = "ids") -> np.ndarray:
    """int64 [count], not negative. Raises InputError, with the row, for others and for a wrong number of them."""
    found = as_array(value, what)
    if found.size and found.dtype.kind not in "iu":
        raise InputError(f"{what} must be integers, not {found.dtype}")
    found = np.atleast_1d(found)
    if found.ndim != 1 or (count is not None and len(found) != count):
        wanted = "one list" if count is None else f"one for each of the {count:,} vectors"
        raise InputError(f"{what} have the shape {list(found.shape)}; they must be {wanted}")
    limit = np.iinfo(np.int64).max
    bad = np.flatnonzero((found < 0) | (found > limit))
    if bad.size:
        raise InputError(f"{what}[{bad[0]}] is {found[bad[0]]}; ids are 0 to {limit} (-1 stands for no result)")
    return found.astype(np.int64, copy=False)


def as_one_id(value: Any) -> int | None:
    """An id; None for what is none, so that nothing is called so."""
    try:
        found = operator.index(value)
    except TypeError:
        return None
    return found if 0 <= found <= np.iinfo(np.int64).max else None


def as_distinct(id_N: np.ndarray, what: str = "ids") -> np.ndarray:
    """The same ids. Raises InputError, with the row, if one stands there twice."""
    order = np.argsort(id_N, kind="stable")
    twice = np.flatnonzero(id_N[order][1:] == id_N[order][:-1])
    if twice.size:
        row = int(order[twice + 1].min())
        raise InputError(f"{what}[{row}] is {id_N[row]}, which stands there before; give each id once")
    return id_N


def as_positive(value: Any, name: str, most: int | None = None) -> int:
    """An integer of at least 1, and at most ``most``. Raises InputError for others."""
    if not is_whole(value) or value < 1:
        raise InputError(f"{name} is {shown(value)}; it must be an integer of at least 1")
    if most is not None and value > most:
        raise InputError(f"{name} is {shown(value)}; it must be at most {most:,}")
    return int(value)


def as_filter_value(value: Any) -> np.ndarray:
    """A mask by id, bool [I], or a list of ids, integers [I]. Raises InputError for another type."""
    found = as_array(value, "filter")
    if found.ndim != 1:
        raise InputError(f"filter has the shape {list(found.shape)}; it must be a mask by id or a list of ids")
    if found.dtype != bool and found.size and found.dtype.kind not in "iu":
        raise InputError(f"filter is of {found.dtype}; it must be a mask by id (bool) or a list of ids (integers)")
    return found


def as_filter(value: Any, label_N: np.ndarray, is_live_N: np.ndarray, *, is_begun: bool = False) -> np.ndarray:
    """Which live slots a filter lets through, bool [N]: of a mask by id, or of a list of ids (those that are not there match nothing).

    A search that ``is_begun`` asked for none of the ids behind the end of its mask: they came later.

    Raises InputError for another type, and for a mask that ends before the largest id that is live.
    """
    found = as_filter_value(value)
    if found.dtype == bool:
        is_live_N = is_live_N & (label_N < len(found)) if is_begun else is_live_N
        largest = label_N.max(initial=-1, where=is_live_N)
        if len(found) <= largest:
            raise InputError(
                f"filter is a mask of {len(found):,} entries and the largest id is {largest}; give an entry per id"
            )
        return is_live_N & found[np.where(is_live_N, label_N, 0)] if largest >= 0 else is_live_N
    return is_live_N & np.isin(label_N, found.astype(np.int64, copy=False) if found.size else np.empty(0, np.int64))


# Below, what results take is not looked at: less than a search takes itself.
_FEW_BYTES = 64 << 20


def results(num_queries: int, k: int, beside: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Room for the ids, int64 [Q, K], of -1, and distances, float32 [Q, K], of infinity, that a search writes.

    Args:
        num_queries: Q.
        k: K.
        beside: bytes of what else is made on the way.

    Raises CapacityError where they do not fit into the memory there is: a system that promises more would end the process, or another,
    as they are written.
    """
    if (size := 12 * num_queries * k + beside) > _FEW_BYTES and size > room_bytes():
        raise CapacityError(f"no memory for k = {shown(k)} results of {num_queries:,} queries; ask for fewer")
    try:
        return np.full((num_queries, k), -1), np.full((num_queries, k), np.inf, np.float32)
    except (MemoryError, ValueError, OverflowError) as error:
        raise CapacityError(
            f"no memory for k = {shown(k)} results of {num_queries:,} queries; ask for fewer"
        ) from error
