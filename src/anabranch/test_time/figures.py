"""What all of it computes with: numbers that are checked, and logarithms of what stays unsolved, right where both are tiny."""

from typing import Any

import numpy as np

from anabranch.bounds import LARGEST_INT, shown
from anabranch.errors import InputError

# A probability below which nothing is told from 0: what was never seen to succeed is given this one.
LEAST = 1e-12

# Terms of the sum that are added one by one; Stirling's series is right to 1e-14 behind them.
_SHIFT = 32
_AT = np.arange(_SHIFT)


def numbers(name: str, value: Any) -> np.ndarray:
    """``value`` as float64. Raises InputError for what is no number."""
    try:
        found = np.asarray(value)
        is_number = found.dtype.kind in "biuf" or found.dtype == object
        array = found.astype(np.float64) if is_number else None
    except (TypeError, ValueError, OverflowError):
        array = None
    if array is None:
        raise InputError(f"{name} is {shown(value)}; it must be a number, or an array of numbers")
    return array


def refuse(name: str, array: np.ndarray, is_wrong: np.ndarray, what: str) -> None:
    """Raises InputError with the first value, and its place, that is wrong."""
    if not is_wrong.any():
        return
    place = tuple(int(at) for at in np.argwhere(is_wrong)[0])
    where = f"{name}[{', '.join(map(str, place))}]" if place else name
    raise InputError(f"{where} is {float(array[place]):g}; it must be {what}")


def share(name: str, value: Any) -> np.ndarray:
    """A probability above 0. Raises InputError."""
    array = numbers(name, value)
    refuse(name, array, ~((array > 0) & (array <= 1)), "above 0 and at most 1")
    return array


def positive(name: str, value: Any, most: float = np.inf) -> np.ndarray:
    """A number above 0, and not infinite. Raises InputError."""
    array = numbers(name, value)
    bound = "" if np.isinf(most) else f" and at most {most:g}"
    refuse(name, array, ~((array > 0) & (array <= most) & (array < np.inf)), f"a finite number above 0{bound}")
    return array


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def count(name: str, value: Any, least: int = 0) -> np.ndarray:
    """Whole numbers, as float64. Raises InputError."""
    array = numbers(name, value)
    is_wrong = ~((array >= least) & (array <= LARGEST_INT) & (array == np.floor(array)))
    refuse(name, array, is_wrong, f"a whole number from {least} to 2^53")
    return array


def given_back(result: np.ndarray) -> Any:
    """A number where numbers went in, an array where arrays did."""
    return float(result) if np.ndim(result) == 0 else result


def whole_back(result: np.ndarray) -> Any:
    """The same of whole numbers."""
    return int(result) if np.ndim(result) == 0 else result.astype(np.int64)


def log_unsolved(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """``ln (1 - p)^n``, also for p = 1, where it is 0 at n = 0 and minus infinity after that."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(n == 0, 0.0, n * np.log1p(-p))


def log_unsolved_mixed(a: np.ndarray, b: np.ndarray, n: np.ndarray) -> np.ndarray:
    """``ln B(a, b + n) / B(a, b)``, which is minus the sum of ``log1p(a / (b + i))`` for i < n.

    The first terms are added as they stand. The others are a second difference of ln Gamma, taken of Stirling's series term by
    term, so that nothing large cancels: subtracted, four values of ln Gamma near 1e10 would leave no digit.
    """
    if np.ndim(a) == np.ndim(b) == 0:
        # One curve, as a controller looks at it: the terms are the same for every n.
        sums = np.concatenate(([0.0], np.cumsum(np.log1p(a / (b + _AT)))))
        head = sums[np.minimum(n, _SHIFT).astype(np.intp)]
    else:
        a, b, n = np.broadcast_arrays(a, b, n)
        head = np.where(n[..., None] > _AT, np.log1p(a[..., None] / (b[..., None] + _AT)), 0.0).sum(-1)
    rest = n - _SHIFT
    if not (rest > 0).any():
        return -head
    return -(head + np.where(rest > 0, _second_difference(a, b + _SHIFT, np.maximum(rest, 0.0)), 0.0))


def _second_difference(a: np.ndarray, b: np.ndarray, n: np.ndarray) -> np.ndarray:
    """``ln Gamma(b + a + n) - ln Gamma(b + a) - ln Gamma(b + n) + ln Gamma(b)`` for b of at least 32."""
    # Of (x - 1/2) ln x, by differences of logarithms.
    product = (a / (b + a)) * (n / (b + n))
    main = (b - 0.5) * np.log1p(-product) + a * np.log1p(n / (b + a)) + n * np.log1p(a / (b + n))
    # Of 1 / (12 x) as one fraction, and of what is smaller as it stands.
    first = (n / (b + n)) * (a / (b + a)) * ((2 * b + a + n) / (b + a + n)) / b / 12

    def smaller(x: np.ndarray) -> np.ndarray:
        inverse = 1 / (x * x)
        return (-1 / 360 + (1 / 1260 - inverse / 1680) * inverse) * inverse / x

    return main + first + (smaller(b) - smaller(b + n) - smaller(b + a) + smaller(b + a + n))
