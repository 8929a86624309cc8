"""A mixture that does not depend on the input, as one plain LoRA adapter: nothing is lost, ranks add up.

    A = [A_1; A_2; ...],  B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]           s: scales

Routed experts themselves cannot be merged, since which of them a token has is known with the token alone.
"""
# Shapes: E experts, C inputs, O outputs, R rank

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from anabranch.adapters.graft import layers_of
from anabranch.adapters.low_rank import Pair
from anabranch.adapters.peft_folder import Adapter
from anabranch.adapters.plain import peft_adapter
from anabranch.adapters.pool import LowRankPool
from anabranch.adapters.routed import RoutedLowRank
from anabranch.errors import ConfigError

__all__ = ["mu", "static_mixture"]


def static_mixture(
    model: nn.Module,
    weights: Mapping[str, Sequence[float]] | Sequence[float],
    *,
    at_most: int | None = None,
    family: str | None = None,
) -> Adapter:
    """One adapter that adds ``sum_e weight_e scale_e B_e A_e`` beside each matrix, whatever the token.

    Args:
        model: with `RoutedLowRank` layers; it stays as it is.
        weights: of each expert, for all layers, or by the names of what they stand beside.
        at_most: use so many experts of each layer, those of the greatest weights, made to keep their sum; None for all that have a weight.
        family: the ``model_type`` whose names are written, of a model of ours.

    Raises:
        ConfigError: no such layers, another number of weights than of experts, a weight that is not finite, or none that is not zero.
        CheckpointError: no family of Hugging Face's has a layer that is adapted.
    """
    found = _routed(model)
    pairs = {}
    for part, layer in found.items():
        own = weights.get(part) if isinstance(weights, Mapping) else weights
        if own is None:
            raise ConfigError(f"there are no weights for {part}")
        weight_E = torch.as_tensor(own, dtype=torch.float64)
        if weight_E.shape != (layer.pool.num_experts,) or not weight_E.isfinite().all():
            raise ConfigError(
                f"weights of {part} are {list(own)}; they must be {layer.pool.num_experts} finite numbers, one for each expert"
            )
        made = _pair(layer.pool, _largest(weight_E, at_most))
        if made is not None:
            pairs[part] = made
    if not pairs:
        raise ConfigError("all weights are 0, so there is nothing to add")
    return peft_adapter(model, pairs, family)


def mu(model: nn.Module, *, family: str | None = None) -> Adapter:
    """The plain average of the experts: what a routed mixture comes down to where it must be merged. Raises as `static_mixture`."""
    found = _routed(model)
    return static_mixture(
        model,
        {part: [1 / layer.pool.num_experts] * layer.pool.num_experts for part, layer in found.items()},
        family=family,
    )


def _routed(model: nn.Module) -> dict[str, RoutedLowRank]:
    found = layers_of(model)
    routed = {name: layer for name, layer in found.items() if isinstance(layer, RoutedLowRank)}
    if not routed:
        raise ConfigError(f"{type(model).__name__} has no routed experts beside its matrices")
    return routed


def _largest(weight_E: torch.Tensor, at_most: int | None) -> torch.Tensor:
    if at_most is None or at_most >= len(weight_E):
        return weight_E
    if at_most < 1:
        raise ConfigError(f"at_most is {at_most}; it must be at least 1")
    kept_E = torch.zeros_like(weight_E)
    best = weight_E.abs().topk(at_most).indices
    kept_E[best] = weight_E[best]
    total = kept_E.sum()
    return kept_E * (weight_E.sum() / total) if total != 0 else kept_E


def _pair(pool: LowRankPool, weight_E: torch.Tensor) -> Pair | None:
    """The weighted sum of a pool's adapters; None where nothing is left of it."""
    parts = [(pool.pair(number), float(weight)) for number, weight in enumerate(weight_E) if weight != 0]
    parts = [(pair, weight) for pair, weight in parts if pair.a_RC.any()]
    if not parts:
        return None
    wide = torch.promote_types(pool.a.dtype, torch.float32)
    a_RC = torch.cat([pair.a_RC.to(wide) for pair, _ in parts])
    b_OR = torch.cat([pair.b_OR.to(wide) * (weight * pair.scale) for pair, weight in parts], dim=1)
    return Pair(a_RC, b_OR, float(len(a_RC)))
