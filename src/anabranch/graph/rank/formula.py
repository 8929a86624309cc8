"""The two formulas of G-Rank, on numbers and on arrays alike; everything else only counts for them."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from anabranch.bounds import LARGEST_INT, is_whole, shown
from anabranch.errors import InputError
from anabranch.graph.arguments import is_number
from anabranch.graph.rank.defences import Defences


def saturated(count: Any, defences: Defences) -> Any:
    """What C clicks of one origin on one item for one term count: C, min(C, cap) or log(1 + C). A number or an array."""
    if isinstance(count, int):
        return (
            min(count, defences.click_cap) if defences.saturation == "cap" else _unbounded(count, defences, math.log1p)
        )
    return (
        np.minimum(count, defences.click_cap) if defences.saturation == "cap" else _unbounded(count, defences, np.log1p)
    )


def _unbounded(count: Any, defences: Defences, log1p: Any) -> Any:
    return log1p(count) if defences.saturation == "log" else count


def raw_similarity(common_terms: Any, common_clicks: Any, all_items: Any, min_common: int = 0) -> Any:
    """(kappa_t + kappa_m^2) / kappa_u, 0 where neither has clicked anything; before it is divided by the largest.

    Args:
        common_terms: kappa_t, terms that are among the most searched of both.
        common_clicks: kappa_m, (term, item) pairs that both clicked.
        all_items: kappa_u, items that either clicked.
        min_common: m; with fewer than m common clicks a peer counts kappa_m / m of it.

    Numbers or arrays of one shape.
    """
    value = (common_terms + common_clicks * common_clicks) / (all_items + (all_items == 0))
    return value * np.minimum(common_clicks, min_common) / min_common if min_common else value


def top_terms(count: Mapping[Any, int], number: int) -> set[Any]:
    """The most searched terms, by falling count, then by rising term."""
    return {term for term, _ in sorted(count.items(), key=lambda entry: (-entry[1], entry[0]))[:number]}


def top_terms_mask(count_NT: np.ndarray, number: int) -> np.ndarray:
    """As `top_terms`, a row each; bool ``[N, T]``. Terms stand in rising order."""
    num_terms = count_NT.shape[1]
    if number >= num_terms:
        return count_NT > 0
    if number == 0:
        return np.zeros(count_NT.shape, bool)
    key_NT = count_NT.astype(np.int64) * num_terms + np.arange(num_terms - 1, -1, -1)
    least_N1 = np.partition(key_NT, num_terms - number, axis=1)[:, [num_terms - number]]
    return (key_NT >= least_N1) & (count_NT > 0)


def check_parameters(F: float, explore: float, top_terms: int) -> None:
    """Raises InputError for an F below 0, an ``explore`` outside 0 to 1, a negative or fractional ``top_terms``."""
    if not (is_number(F) and 0 <= F <= sys.float_info.max):
        raise InputError(f"F is {shown(F)}; the isolation constant is a finite number of at least 0")
    if not (is_number(explore) and 0 <= explore <= 1):
        raise InputError(f"explore is {shown(explore)}; it is a probability, 0 to 1")
    if not is_whole(top_terms) or not 0 <= top_terms <= LARGEST_INT:
        raise InputError(f"top_terms is {shown(top_terms)}; it is a whole number of at least 0")
