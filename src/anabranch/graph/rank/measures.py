"""How far one ranking is from another, and how good it is for whom."""
# Shapes: T terms, L places

import numpy as np
from numpy.typing import ArrayLike

from anabranch.errors import InputError
from anabranch.graph.masks import unmasked


def rank_distance(first: ArrayLike, second: ArrayLike) -> int:
    """The sum over items of |position in one - position in the other|. Raises InputError unless both rank the same items once each."""
    one, two = np.asarray(unmasked(first, "first")), np.asarray(unmasked(second, "second"))
    items, place = np.unique(one, return_inverse=True)
    other, other_place = np.unique(two, return_inverse=True)
    if one.ndim != 1 or len(items) != len(one) or len(other) != len(two) or not np.array_equal(items, other):
        raise InputError("both rankings must hold the same items, once each")
    position, other_position = np.empty(len(one), np.int64), np.empty(len(one), np.int64)
    position[place], other_position[other_place] = np.arange(len(one)), np.arange(len(one))
    return int(np.abs(position - other_position).sum())


def positions(score_TL: np.ndarray) -> np.ndarray:
    """Place of each item by falling score, then by rising place in the row (items stand in order of their ids); int64 ``[T, L]``."""
    order_TL = np.argsort(-score_TL, axis=1, kind="stable")
    place_TL = np.empty_like(order_TL)
    np.put_along_axis(place_TL, order_TL, np.arange(score_TL.shape[1])[None, :], axis=1)
    return place_TL


def ndcg(gain: ArrayLike, k: int) -> float:
    """Normalised discounted cumulative gain of a ranking at ``k``: gains in the order shown, all items included; 0 where none is gained."""
    values = np.asarray(unmasked(gain, "gain"), np.float64)
    discount = 1 / np.log2(np.arange(2, min(k, len(values)) + 2))
    ideal = float(np.sort(values)[::-1][: len(discount)] @ discount)
    return float(values[: len(discount)] @ discount) / ideal if ideal else 0.0
