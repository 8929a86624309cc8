"""What the arguments of FastRP may be."""

import math
from typing import Any

import numpy as np

from anabranch.bounds import LARGEST_FLOAT, MOST_SIZE, is_whole, shown
from anabranch.errors import InputError
from anabranch.graph.arguments import check_flag, check_one_of, is_number, plain

CHOICES = {
    "projection": ("sparse", "gaussian"),
    "matrix": ("transition", "adjacency", "symmetric"),
    "direction": ("out", "in", "both"),
    "dtype": ("float32", "float64"),
    "backend": ("numba", "scipy", "torch"),
    "engine": ("local", "spark"),
}


FLAGS = ("normalize", "standardize", "concatenate", "allow_negative", "keep_powers")


# Larger ones may be in files of before.
LIMITS = {
    **dict.fromkeys(("chunk", "threads", "workers", "partitions"), MOST_SIZE),
    **dict.fromkeys(("s", "beta", "weights", "self_weight"), LARGEST_FLOAT),
}


def num_parts(model: Any) -> int:
    """Vectors that a `FastRP` puts side by side."""
    return sum(map(bool, model.weights)) + bool(model.self_weight) if model.concatenate else 1


def check(model: Any) -> None:
    """Raise InputError for the first argument of a `FastRP` that has a value it may not have."""
    for name, allowed in CHOICES.items():
        check_one_of(name, getattr(model, name), allowed)
    if not isinstance(model.device, str):
        raise InputError(f"device is {shown(model.device)}; it must be the name of one, say 'cpu' or 'cuda'")
    for name in FLAGS:
        check_flag(name, getattr(model, name))
    for name in ("dim", "chunk", "threads", "workers", "partitions"):
        value = getattr(model, name)
        if value is None and name != "dim":
            continue
        if not is_whole(value) or not 1 <= int(value) <= MOST_SIZE:
            raise InputError(
                f"{name} is {shown(value)}; it must be a whole number, at least 1 and at most {MOST_SIZE:,}"
            )
    if not is_whole(model.seed):
        raise InputError(f"seed is {shown(model.seed)}; it must be a whole number")
    for name, low, high in (
        ("beta", -math.inf, math.inf),
        ("feature_ratio", 0, 1),
        ("self_weight", -math.inf, math.inf),
    ):
        value = getattr(model, name)
        if not (_is_finite(value) and low <= value <= high):
            limits = f"finite, and at most {LARGEST_FLOAT:g}" if math.isinf(low) else f"{low} to {high}"
            raise InputError(f"{name} is {shown(value)}; it must be a number, {limits}")
    if model.s is not None and not (_is_finite(model.s) and model.s >= 1):
        raise InputError(f"s is {shown(model.s)}; it must be a number, at least 1 (None: sqrt of the number of nodes)")
    check_weights(as_weights(model.weights), model.self_weight)


def as_weights(weights: Any) -> Any:
    """A list of any kind as a tuple; what is none, as it is."""
    return tuple(weights) if np.iterable(weights) else weights


def check_weights(weights: Any, own: float) -> None:
    """Raise InputError unless these are w_1 ... w_q, not all 0 where w_0 is."""
    if not isinstance(weights, tuple) or not weights:
        raise InputError(f"weights is {shown(weights)}; give one number per order, at least one")
    for order, weight in enumerate(weights, 1):
        if not _is_finite(weight):
            raise InputError(f"weight {order} is {shown(weight)}; weights are finite numbers")
    if not any(weights) and not own:
        raise InputError("all weights are 0, so all vectors would be; give one that is not")


def _is_finite(value: Any) -> bool:
    # Integers have no end.
    return is_number(value) and abs(plain(value)) <= LARGEST_FLOAT
