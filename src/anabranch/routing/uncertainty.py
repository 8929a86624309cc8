"""How undecided a router is: entropies of its scores from 0, one destination is certain, to 1, none is preferred; and losses of them.

    tsallis   (1 - sum_i p_i^q) / (q - 1)     over (1 - U^(1 - q)) / (q - 1)
    renyi     ln(sum_i p_i^q) / (1 - q)       over ln U
    shannon   -sum_i p_i ln p_i               over ln U; what both become at q = 1

p are an item's scores as shares, U its open destinations. DynMoLE (arXiv 2504.00661) chooses by them and has both losses.
"""
# Shapes: N items, E destinations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.config import Field, configclass
from anabranch.routing.balance import Balancer, Observation, masked_mean
from anabranch.routing.context import RoutingContext

__all__ = ["EntropyKind", "SoftLoss", "UncertaintyLoss", "shares", "uncertainty"]

EntropyKind = Literal["tsallis", "renyi", "shannon"]
# Below it a share is as good as none: its logarithm and powers stay finite in fp32.
_LEAST = 1e-30


def shares(score_NE: Tensor, open_NE: Tensor | None = None) -> Tensor:
    """p_NE: scores as shares of the open destinations, which sum to 1; zeros for an item without any."""
    if open_NE is not None:
        score_NE = score_NE.masked_fill(~open_NE, 0.0)
    return score_NE / score_NE.sum(-1, keepdim=True).clamp_min(1e-20)


def uncertainty(
    share_NE: Tensor, kind: EntropyKind = "tsallis", index: float = 1.1, num_open: Tensor | int | None = None
) -> Tensor:
    """H_N in [0, 1], in fp32 (fp64 for fp64 shares). 0 where one destination alone is open: there is nothing to be unsure of.

    Args:
        share_NE: not negative, each row sums to 1 (or to 0, where nothing is open).
        kind: see the top of this file.
        index: q, above 0; at 1 (and for ``shannon``) it is Shannon's.
        num_open: U, of all items or of each; None for all E.
    """
    share_NE = share_NE.to(torch.promote_types(share_NE.dtype, torch.float32))
    count = torch.as_tensor(share_NE.shape[-1] if num_open is None else num_open, device=share_NE.device)
    most = count.clamp_min(1).to(share_NE.dtype).log()
    log_NE = share_NE.clamp_min(_LEAST).log()
    order = 0.0 if kind == "shannon" else index - 1
    # sum p = 1 goes into each term, so that nothing cancels near q = 1: 1 - sum p^q = -sum p (p^(q-1) - 1).
    if order == 0:
        entropy_N = -(share_NE * log_NE).sum(-1)
    elif kind == "renyi":
        power_N = (share_NE * torch.expm1(order * log_NE)).sum(-1)
        entropy_N = -torch.log1p(power_N) / order
    else:
        entropy_N = -(share_NE * torch.expm1(order * log_NE)).sum(-1) / order
        most = -torch.expm1(-order * most) / order
    is_open = most > 0
    found_N = torch.where(is_open, entropy_N / torch.where(is_open, most, 1.0), 0.0)
    # Rounding alone leads out of it.
    return found_N.clamp(0, 1)


class UncertaintyLoss(Balancer, kind="uncertainty"):
    """coefficient mean_n H(p_n), which makes routers decide; H is `uncertainty`, the mean over real items (DynMoLE's entropy loss)."""

    @configclass
    class Config(Balancer.Config):
        """The entropy.

        Attributes:
            coefficient: of the loss (default 0.01).
            entropy: its kind (default Tsallis).
            entropy_index: q.
        """

        coefficient: float = Field(default=1e-2, ge=0)
        entropy: EntropyKind = "tsallis"
        entropy_index: float = Field(default=1.1, gt=0, le=2)

    config: Config

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit ``uncertainty``, and as metrics of the layer what a reader of a training asks of a router that switches."""
        config, mask_N = self.config, context.item_mask_N
        entropy_N = uncertainty(
            seen.probability_NE(), config.entropy, config.entropy_index, _open_of_each(seen.open_NE)
        )
        mean = masked_mean(entropy_N.unsqueeze(-1), mask_N).squeeze(0)
        context.emit_loss("uncertainty", config.coefficient * mean)
        if context.is_measured:
            context.emit_metric("routing_entropy", mean)
            active_N1 = seen.routing.used_NK.sum(-1, keepdim=True).to(mean.dtype)
            context.emit_metric("active_experts", masked_mean(active_N1, mask_N).squeeze(0))
            kept_N1 = seen.routing.weight_NK.sum(-1, keepdim=True)
            context.emit_metric("dropped_mass", 1 - masked_mean(kept_N1, mask_N).squeeze(0))


class SoftLoss(Balancer, kind="soft"):
    """alpha U sum_e f_e P_e, f the mean weight of each destination and P its mean share (DynMoLE's balance loss).

    Unlike `SwitchLoss` f is of weights and not of counts, and learns too. With ``scope`` ``model`` f and P are means over all layers that
    have this loss with as many destinations, as if their items were one set; with ``layer`` each layer has a loss of its own.
    """

    @configclass
    class Config(Balancer.Config):
        """Attributes: ``alpha`` (default 0.001), ``scope``."""

        alpha: float = Field(default=1e-3, ge=0)
        scope: Literal["model", "layer"] = "model"

    config: Config

    def __init__(self, config: Config, num_destinations: int) -> None:
        super().__init__(config, num_destinations)
        # Made here: a pass that is compiled would make one for each layer.
        self._all_layers = _over_layers(config.alpha, num_destinations)

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit ``soft_balancing``, or this layer's part of it."""
        routing, mask_N = seen.routing, context.item_mask_N
        weight_NE = torch.zeros_like(routing.score_NE).scatter_add(
            1, routing.index_NK.clamp_min(0), (routing.weight_NK * routing.used_NK).to(routing.score_NE.dtype)
        )
        weight_E = masked_mean(weight_NE, mask_N)
        share_E = masked_mean(seen.probability_NE(), mask_N)
        num_open = torch.as_tensor(seen.num_open(mask_N), dtype=share_E.dtype, device=share_E.device)
        if self.config.scope == "layer":
            context.emit_loss("soft_balancing", self.config.alpha * num_open * (weight_E * share_E).sum())
        else:
            context.emit_part(self._all_layers, (weight_E, share_E, num_open))


@dataclass(frozen=True)
class _OverLayers:
    """Makes one loss of the parts of all layers with as many destinations; it keeps nothing. Equal ones are the same in any process."""

    alpha: float
    num_destinations: int

    def __reduce__(self) -> Any:
        """A copy is the same one."""
        return _over_layers, (self.alpha, self.num_destinations)

    def close(self, parts: list[tuple[Tensor, ...]]) -> tuple[str, Tensor]:
        """(name, loss)."""
        weight_E, share_E, num_open = (torch.stack(values).mean(0) for values in zip(*parts, strict=True))
        return "soft_balancing", self.alpha * num_open * (weight_E * share_E).sum()


@cache
def _over_layers(alpha: float, num_destinations: int) -> _OverLayers:
    """The same for all layers that make one loss: a context joins parts by whose they are."""
    return _OverLayers(alpha, num_destinations)


def _open_of_each(open_NE: Tensor | None) -> Tensor | None:
    return None if open_NE is None else open_NE.sum(-1)
