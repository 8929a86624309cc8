"""What the arguments of FastRP may be."""

import math
from typing import Any

import numpy as np

from anabranch.bounds import LARGEST_INT, is_whole, shown
from anabranch.errors import InputError

CHOICES = {
    "projection": ("sparse", "gaussian"),
    "matrix": ("transition", "adjacency", "symmetric"),
    "direction": ("out", "in", "both"),
    "dtype": ("float32", "float64"),
    "backend": ("numba", "scipy", "torch"),
    "engine": ("local", "spark"),
}


FLAGS = ("normalize", "standardize", "concatenate", "allow_negative", "keep_powers")


def check(model: Any) -> None:
    """Raise InputError for the first argument of a `FastRP` that has a value it may not have."""
    for name, allowed in CHOICES.items():
        if getattr(model, name) not in allowed:
            raise InputError(f"{name} is {getattr(model, name)!r}; it must be one of {', '.join(map(repr, allowed))}")
    for name in FLAGS:
        if not isinstance(getattr(model, name), bool | np.bool_):
            raise InputError(f"{name} is {shown(getattr(model, name))}; it must be True or False")
    for name in ("dim", "chunk", "threads", "workers", "partitions"):
        value = getattr(model, name)
        if value is None and name != "dim":
            continue
        if not is_whole(value) or not 1 <= value <= LARGEST_INT:
            raise InputError(f"{name} is {shown(value)}; it must be a whole number, at least 1")
    if isinstance(model.seed, bool) or not isinstance(model.seed, int | np.integer):
        raise InputError(f"seed is {model.seed!r}; it must be a whole number")
    for name, low, high in (
        ("beta", -math.inf, math.inf),
        ("feature_ratio", 0, 1),
        ("self_weight", -math.inf, math.inf),
    ):
        value = getattr(model, name)
        if not (_is_number(value) and math.isfinite(value) and low <= value <= high):
            limits = "finite" if math.isinf(low) else f"{low} to {high}"
            raise InputError(f"{name} is {value!r}; it must be a number, {limits}")
    if model.s is not None and not (_is_number(model.s) and 1 <= model.s < math.inf):
        raise InputError(f"s is {model.s!r}; it must be a number, at least 1 (None: sqrt of the number of nodes)")
    check_weights(tuple(model.weights) if np.iterable(model.weights) else model.weights, model.self_weight)


def check_weights(weights: Any, own: float) -> None:
    """Raise InputError unless these are w_1 ... w_q, not all 0 where w_0 is."""
    if not isinstance(weights, tuple) or not weights:
        raise InputError(f"weights is {weights!r}; give one number per order, at least one")
    for order, weight in enumerate(weights, 1):
        if not (_is_number(weight) and math.isfinite(weight)):
            raise InputError(f"weight {order} is {weight!r}; weights are finite numbers")
    if not any(weights) and not own:
        raise InputError("all weights are 0, so all vectors would be; give one that is not")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
