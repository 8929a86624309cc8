"""`combine`: one adapter out of several, by rules that say what is lost.

    exact    sum_i w_i scale_i B_i A_i, by putting ranks side by side: nothing is lost, ranks add up
    svd      the best adapter of a given rank for that sum, by its singular values (Eckart-Young); ``error`` tells what is cut off
    linear   A = sum_i c_i A_i and B = sum_i c_i' B_i with c c' = w scale, as peft's ``linear``: ranks stay, and the products of halves of
             different adapters, which are in no sum, come in (``error`` tells how much)

Each result is one plain LoRA adapter, which every program reads that reads peft's.
"""
# Shapes: C inputs, O outputs, R rank

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.adapters.low_rank import Pair
from anabranch.adapters.peft_folder import Adapter, described
from anabranch.errors import ConfigError

__all__ = ["METHODS", "Combined", "Method", "combine"]

Method = Literal["exact", "svd", "linear"]
METHODS: tuple[Method, ...] = ("exact", "svd", "linear")
# What a config says of how an adapter was trained or made, which the sum was not.
_OF_TRAINING = (
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "revision",
    "rank_pattern",
    "alpha_pattern",
)


@dataclass(frozen=True)
class Combined:
    """What `combine` made.

    Attributes:
        adapter: it.
        error: the Frobenius norm of its difference to the exact sum, over that of the sum, of all layers together; 0 where that is exact.
    """

    adapter: Adapter
    error: float


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], method: Method = "exact", *, rank: int | None = None
) -> Combined:
    """One adapter that adds ``sum_i weight_i delta_i``, or nearly so.

    Args:
        adapters: of one model; they may have other layers, ranks and scales.
        weights: of each; negative ones take away.
        method: see the top of this file.
        rank: of the result of ``svd``; None for the greatest that a layer has in any of them.

    Raises ConfigError: no adapters, another number of weights, one that is not finite, an unknown method, layers of other widths, ranks
    that differ (``linear``), a sum that the type of the adapters cannot hold, a ``rank`` below 1 or for another method, or adapters that
    bring whole tensors, which have no sum.
    """
    _check(adapters, weights, method, rank)
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.pairs))
    pairs, missed, total = {}, 0.0, 0.0
    for module in modules:
        parts = [
            (adapter.pairs[module], float(weight))
            for adapter, weight in zip(adapters, weights, strict=True)
            if module in adapter.pairs
        ]
        _check_sizes(module, parts, method)
        exact = _finite(module, _side_by_side(parts))
        if method == "svd":
            pairs[module], cut_off = _truncated(exact, rank or max(pair.rank for pair, _ in parts))
        elif method == "linear":
            pairs[module] = _finite(module, _linear(parts))
            cut_off = _square(_side_by_side([(pairs[module], 1.0), (exact, -1.0)]))
        else:
            pairs[module], cut_off = exact, 0.0
        missed, total = missed + cut_off, total + (_square(exact) if method != "exact" else 0.0)
    table = {name: value for name, value in adapters[0].table.items() if name not in _OF_TRAINING}
    bases = {adapter.table.get("base_model_name_or_path") for adapter in adapters}
    table["base_model_name_or_path"] = bases.pop() if len(bases) == 1 else None
    error = 0.0 if not missed else math.inf if not total else math.sqrt(missed / total)
    return Combined(Adapter(described({**table, "inference_mode": True}, pairs), pairs), error)


def _check(adapters: Sequence[Adapter], weights: Sequence[float], method: str, rank: int | None) -> None:
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; use one of {', '.join(METHODS)}")
    if rank is not None and method != "svd":
        raise ConfigError(f"rank is {rank}, and method {method!r} has none to choose; use 'svd', or leave it out")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; it must be at least 1")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"there are {len(weights)} weights for {len(adapters)} adapters; give one for each")
    wrong = [weight for weight in weights if not math.isfinite(weight)]
    if wrong:
        raise ConfigError(f"a weight is {wrong[0]}; it must be a finite number")
    for number, adapter in enumerate(adapters):
        if adapter.stacks:
            name = next(iter(adapter.stacks))
            raise ConfigError(
                f"adapter {number + 1} adapts {name}, experts that are stacked, which cannot be combined yet"
            )
        if adapter.saved:
            name = next(iter(adapter.saved))
            raise ConfigError(
                f"adapter {number + 1} brings {name} whole, which has no sum; merge it into its model instead"
            )


def _check_sizes(module: str, parts: Sequence[tuple[Pair, float]], method: str) -> None:
    sizes = {(pair.a_RC.shape[1], pair.b_OR.shape[0]) for pair, _ in parts}
    if len(sizes) > 1:
        raise ConfigError(
            f"{module} has (inputs, outputs) {sorted(sizes)} in these adapters; they must be of one model"
        )
    ranks = {pair.rank for pair, _ in parts}
    if method == "linear" and len(ranks) > 1:
        raise ConfigError(f"{module} has ranks {sorted(ranks)}; method 'linear' needs one, 'exact' does not")


def _finite(module: str, pair: Pair) -> Pair:
    """The pair. Raises ConfigError where weights and scales made it too great for its type: no program would read it."""
    for half in (pair.a_RC, pair.b_OR):
        if not half.isfinite().all():
            kind = str(half.dtype).removeprefix("torch.")
            raise ConfigError(
                f"the sum has numbers in {module} that {kind} cannot hold; give weights nearer to 0, or adapters of lesser scales"
            )
    return pair


def _side_by_side(parts: Sequence[tuple[Pair, float]]) -> Pair:
    """The sum, of the rank of all: weights and scales are in B, and the scale is 1."""
    a_RC = torch.cat([_wide(pair.a_RC) for pair, _ in parts])
    b_OR = torch.cat([_wide(pair.b_OR) * (weight * pair.scale) for pair, weight in parts], dim=1)
    return Pair(a_RC, b_OR, float(len(a_RC)))


def _square(pair: Pair) -> float:
    """The squared Frobenius norm of what a pair adds, see `_halves`."""
    _, r_b, _, r_a = _halves(pair)
    return float((r_b @ r_a.T).square().sum())


def _halves(pair: Pair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """QR of both halves: what is between the orthogonal ones is small, so that no matrix of the layer's size is ever made."""
    q_b, r_b = torch.linalg.qr(pair.b_OR.double() * pair.scale)
    q_a, r_a = torch.linalg.qr(pair.a_RC.double().T)
    return q_b, r_b, q_a, r_a


def _truncated(pair: Pair, rank: int) -> tuple[Pair, float]:
    """The pair of at most this rank that is nearest, and the square of what is cut off."""
    q_b, r_b, q_a, r_a = _halves(pair)
    left, value, right = torch.linalg.svd(r_b @ r_a.T)
    # What is zero is kept out, but something must stay.
    rank = min(rank, max(1, int((value > value[0] * 1e-12).sum())))
    root = value[:rank].sqrt()
    b_OR, a_RC = (q_b @ left[:, :rank]) * root, root[:, None] * (right[:rank] @ q_a.T)
    made = Pair(a_RC.to(pair.a_RC.dtype), b_OR.to(pair.b_OR.dtype), float(rank))
    return made, float(value[rank:].square().sum())


def _linear(parts: Sequence[tuple[Pair, float]]) -> Pair:
    """Halves summed apart, each with the root of its weight; the sign of a weight is in B."""
    roots = [math.sqrt(abs(weight * pair.scale)) for pair, weight in parts]
    signs = [math.copysign(1.0, weight * pair.scale) for pair, weight in parts]
    a_RC: Any = sum(_wide(pair.a_RC) * root for (pair, _), root in zip(parts, roots, strict=True))
    b_OR: Any = sum(_wide(pair.b_OR) * (root * sign) for (pair, _), root, sign in zip(parts, roots, signs, strict=True))
    return Pair(a_RC, b_OR, float(len(a_RC)))


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least, in which weights and scales are multiplied in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
