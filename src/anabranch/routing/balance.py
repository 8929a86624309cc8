"""Balancers: what keeps destinations evenly used. Here the interface and the losses; `anabranch.routing.bias` has the bias without a loss.

Losses are per layer and emitted into the context; the trainer takes the mean over layers. Where only some destinations are
open, the loss looks at those alone: counting a closed one as idle would pull probability into it.
"""
# Shapes: N items, E destinations, K choices per item, S sequences, L positions, G device groups

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, Repeats, configclass
from anabranch.errors import ConfigError
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing, count_destinations


@dataclass(frozen=True)
class Observation:
    """One routing decision as balancers see it. ``open_NE`` is bool ``[E]`` or ``[N, E]``, None if all are open."""

    logit_NE: Tensor
    routing: Routing
    open_NE: Tensor | None = None

    def probability_NE(self) -> Tensor:
        """Scores as shares that sum to 1 over the open destinations (so sigmoid scores work too)."""
        score_NE = self.routing.score_NE
        if self.open_NE is not None:
            score_NE = score_NE.masked_fill(~self.open_NE, 0.0)
        return score_NE / score_NE.sum(-1, keepdim=True).clamp_min(1e-20)

    def num_open(self, item_mask_N: Tensor | None) -> Tensor | int:
        """Open destinations; the mean over real items where each has its own mask."""
        if self.open_NE is None:
            return self.routing.num_destinations
        return self.openness_E(item_mask_N).sum()

    def openness_E(self, item_mask_N: Tensor | None) -> Tensor:
        """fp32: 1 where a destination is open, 0 where closed; the share of real items where each has its own mask."""
        if self.open_NE is None:
            return self.routing.score_NE.new_ones(self.routing.num_destinations, dtype=torch.float32)
        open_NE = self.open_NE.float()
        return open_NE if open_NE.dim() == 1 else masked_mean(open_NE, item_mask_N)


class Balancer(Part, nn.Module, family="balance"):
    """Interface. ``forward`` sees a training step's decisions and emits; ``bias_E`` shifts the selection."""

    @configclass
    class Config(BaseConfig):
        """Base of balancer configs."""

        def advice(self, steps: int) -> tuple[str, str] | None:
            """Why a training of ``steps`` steps had better set a field otherwise, and ``field=value``; None where it need not."""
            return None

        def check(self, num_destinations: int) -> None:
            """Raise ConfigError if this cannot balance ``num_destinations``."""

    config: Config

    def __init__(self, config: Config, num_destinations: int) -> None:
        super().__init__()
        config.check(num_destinations)
        self.config = config
        self.num_destinations = num_destinations

    @property
    def bias_E(self) -> Tensor | None:
        """Added to the scores for selection only, or None where that depends on the scores, or is nothing."""
        return None

    @property
    def shifts_by_scores(self) -> bool:
        """Whether `shift` depends on the scores."""
        return False

    def shift(self, score_NE: Tensor) -> Tensor | None:
        """What is added to ``score_NE`` to select, ``[E]`` or ``[N, E]``; None for nothing."""
        return self.bias_E

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit losses or loads into ``context``."""
        raise NotImplementedError  # abstract


class LoadCounter(Balancer):
    """A balancer that adds up loads over the micro-batches of a step, and over data-parallel ranks (see `sync_loads`).

    What it counts stays fp32 whatever dtype the model is cast to: half precision cannot count beyond 256 (bf16) or 2048.
    """

    load_E: Tensor

    def __init__(self, config: Balancer.Config, num_destinations: int) -> None:
        super().__init__(config, num_destinations)
        self.register_buffer("load_E", torch.zeros(num_destinations), persistent=False)

    def counts(self) -> list[Tensor]:
        """The counters of the step, each ``[E]``."""
        return [self.load_E]

    def add_load(self, load_E: Tensor, open_E: Tensor | None = None) -> None:
        """Take the load of one forward pass, and which destinations were open in it (None: all)."""
        self.load_E += load_E

    def forget(self) -> None:
        """Set the counters to zero."""
        for count_E in self.counts():
            count_E.zero_()

    def on_step(self, step: int, fraction: float) -> None:
        """Forget the finished step."""
        self.forget()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            made = getattr(self, name)
            if made.dtype != torch.float32:
                setattr(self, name, buffer.to(made.device))
        return self


def sync_loads(model: nn.Module) -> None:
    """Sum the loads of all balancers over data-parallel ranks, in one all-reduce. Call before the step hooks."""
    counters = [module for module in model.modules() if isinstance(module, LoadCounter)]
    if not counters or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    counts = [count_E for counter in counters for count_E in counter.counts()]
    flat = torch.cat(counts)
    dist.all_reduce(flat)
    for count_E, sum_E in zip(counts, flat.split([count_E.numel() for count_E in counts]), strict=True):
        count_E.copy_(sum_E)


def discard_loads(model: nn.Module) -> None:
    """Forget the loads of a step whose update was skipped (gradient overflow)."""
    for module in model.modules():
        if isinstance(module, LoadCounter):
            module.forget()


class SwitchLoss(LoadCounter, kind="switch"):
    """alpha E sum_e f_e P_e (Switch Transformer, eqs. 4-6; GShard), f the share of choices, P the mean share of score.

    Equals alpha when balanced. ``scope`` says over which items f and P are taken: the ``micro_batch``, each ``sequence`` (DeepSeek's
    seq_aux), or ``global_batch``, where f counts all micro-batches of the step so far and all ranks (arXiv 2501.11873: a
    smaller scope hinders specialisation by domain).
    """

    @configclass
    class Config(Balancer.Config):
        """Attributes: ``alpha`` (default 0.01), ``scope``."""

        alpha: float = Field(default=1e-2, ge=0)
        scope: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"

    config: Config

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit ``load_balancing``."""
        probability_NE = seen.probability_NE()
        if self.config.scope == "sequence":
            product = self._by_sequence(seen.routing, probability_NE, context)
        else:
            load_E = seen.routing.load_E()
            if self.config.scope == "global_batch":
                context.emit_load(self, load_E)
                load_E = _sum_over_ranks(context.once(self, self.load_E.clone) + load_E)
            product = (_share(load_E) * masked_mean(probability_NE, context.item_mask_N)).sum()
        num_open = seen.num_open(context.item_mask_N)
        context.emit_loss("load_balancing", self.config.alpha * num_open * product)

    def _by_sequence(self, routing: Routing, probability_NE: Tensor, context: RoutingContext) -> Tensor:
        if context.sequence_length is None:
            raise ConfigError("balance scope is 'sequence', but the items are not sequences; use 'micro_batch'")
        length, num_destinations = max(context.sequence_length, 1), routing.num_destinations
        num_sequences = routing.num_items // length
        offset_S1 = torch.arange(num_sequences, device=probability_NE.device).unsqueeze(-1) * num_destinations
        index_SX = routing.index_NK.view(num_sequences, length * routing.num_choices)
        shifted_SX = torch.where(index_SX < 0, index_SX, index_SX + offset_S1)
        load_SE = count_destinations(shifted_SX, num_sequences * num_destinations)
        load_SE = load_SE.view(num_sequences, num_destinations)
        mask_N = context.item_mask_N
        weight_SL = torch.ones(num_sequences, length) if mask_N is None else mask_N.view(num_sequences, length).float()
        weight_SL = weight_SL.to(probability_NE)
        mean_SE = torch.einsum("sle,sl->se", probability_NE.view(num_sequences, length, num_destinations), weight_SL)
        mean_SE = mean_SE / weight_SL.sum(-1, keepdim=True).clamp_min(1)
        real_S = (weight_SL.sum(-1) > 0).to(mean_SE)
        return ((_share(load_SE) * mean_SE).sum(-1) * real_S).sum() / real_S.sum().clamp_min(1)


class PoolLoss(Balancer, kind="pool"):
    """The Switch loss of a pool of destinations that several layers share, on loads and scores averaged over those layers.

    alpha U sum_u mean_l(f_lu) mean_l(P_lu) over the U open destinations of the pool: it balances what physically exists, and
    leaves a layer free to specialise. One instance serves all layers of the pool (ReXMoE).
    """

    @configclass
    class Config(Balancer.Config):
        """Attributes: ``alpha`` (default 0.01)."""

        alpha: float = Field(default=1e-2, ge=0)

    config: Config

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit this layer's part."""
        probability_E = masked_mean(seen.probability_NE(), context.item_mask_N)
        num_open = torch.as_tensor(
            seen.num_open(context.item_mask_N), dtype=probability_E.dtype, device=probability_E.device
        )
        context.emit_part(self, (_share(seen.routing.load_E()), probability_E, num_open))

    def close(self, parts: list[tuple[Tensor, ...]]) -> tuple[str, Tensor]:
        """The loss of all layers of the pool."""
        share_E, probability_E, num_open = (torch.stack(values).mean(0) for values in zip(*parts, strict=True))
        return "pool_balancing", self.config.alpha * num_open * (share_E * probability_E).sum()


class ZLoss(Balancer, kind="z_loss"):
    """beta mean (logsumexp z)^2, which keeps logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""

    @configclass
    class Config(Balancer.Config):
        """Attributes: ``beta`` (default 0.001)."""

        beta: float = Field(default=1e-3, ge=0)

    config: Config

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit ``z_loss``."""
        logit_NE = seen.logit_NE
        if seen.open_NE is not None:
            logit_NE = logit_NE.masked_fill(~seen.open_NE, -torch.inf)
        square_N1 = logit_NE.logsumexp(-1, keepdim=True).square()
        context.emit_loss("z_loss", self.config.beta * masked_mean(square_N1, context.item_mask_N).squeeze(0))


class ImportanceLoss(Balancer, kind="importance"):
    """alpha CV^2 of the summed scores of each destination (Shazeer et al. 2017, eq. 7)."""

    @configclass
    class Config(Balancer.Config):
        """Attributes: ``alpha`` (default 0.01)."""

        alpha: float = Field(default=1e-2, ge=0)

    config: Config

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit ``importance``."""
        mean_E = masked_mean(seen.probability_NE(), context.item_mask_N)
        open_E = (seen.openness_E(context.item_mask_N) > 0).to(mean_E)
        mean = (mean_E * open_E).sum() / open_E.sum().clamp_min(1)
        variance = ((mean_E - mean).square() * open_E).sum() / open_E.sum().clamp_min(1)
        variation = variance / mean.square().clamp_min(1e-20)
        context.emit_loss("importance", self.config.alpha * variation)


class EntropyLoss(Balancer, kind="entropy"):
    """alpha (ln U - H(P)) + beta mean_i H(p_i), entropies in nats; p_i an item's scores as shares, P their mean, U open destinations.

    The first part is 0 where all destinations have the same score on average and alpha ln U where one has all; the second is 0 where
    every item is certain and beta ln U where none prefers anything. With alpha = beta it is, but for a constant, minus the mutual
    information of items and destinations (ModuleFormer, arXiv 2306.04640): items decide, and not all for the same.
    """

    @configclass
    class Config(Balancer.Config):
        """The weights.

        Attributes:
            alpha: of how uneven the mean scores are (default 0.01).
            beta: of how undecided items are; 0, the default, leaves them, and below 0 they are kept undecided (exploration).
        """

        alpha: float = Field(default=1e-2, ge=0)
        beta: float = 0.0

    config: Config

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit ``entropy``."""
        share_NE, mask_N = seen.probability_NE(), context.item_mask_N
        mean_E = masked_mean(share_NE, mask_N)
        uneven = (seen.openness_E(mask_N) > 0).sum().clamp_min(1).log() - _entropy(mean_E)
        undecided = masked_mean(_entropy(share_NE).unsqueeze(-1), mask_N).squeeze(0)
        loss = self.config.alpha * uneven + self.config.beta * undecided
        # Where there are no items the mean is no distribution.
        context.emit_loss("entropy", torch.where(mean_E.sum() > 0, loss, 0.0))


class DeviceLoss(Balancer, kind="device"):
    """alpha sum_g f'_g P'_g over ``num_devices`` equal groups of destinations (DeepSeekMoE, arXiv 2401.06066, eqs. 15-17).

    f'_g is the mean over the group of E f_e, P'_g the sum over the group of P_e; equals alpha when groups are balanced. Closed
    destinations count neither in E nor in the mean.
    """

    @configclass
    class Config(Balancer.Config):
        """Attributes: ``alpha`` (default 0.05, the paper's 16B value), ``num_devices``."""

        alpha: float = Field(default=0.05, ge=0)
        num_devices: Repeats = Field(default=8, ge=1)

        def check(self, num_destinations: int) -> None:
            """Equal groups."""
            if num_destinations % self.num_devices:
                raise ConfigError(
                    f"num_devices is {self.num_devices}, which does not divide {num_destinations} destinations"
                )

    config: Config

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit ``device_balancing``."""
        groups = (self.config.num_devices, self.num_destinations // self.config.num_devices)
        probability_E = masked_mean(seen.probability_NE(), context.item_mask_N)
        openness_G = seen.openness_E(context.item_mask_N).view(groups).sum(-1)
        share_G = _share(seen.routing.load_E()).view(groups).sum(-1)
        share_G = torch.where(openness_G > 0, share_G * openness_G.sum() / openness_G.clamp_min(1e-20), 0.0)
        product = (share_G * probability_E.view(groups).sum(-1)).sum()
        context.emit_loss("device_balancing", self.config.alpha * product)


def masked_mean(value_NX: Tensor, mask_N: Tensor | None) -> Tensor:
    """Mean over real items; zeros if there is none."""
    if mask_N is None:
        return value_NX.sum(0) / max(value_NX.shape[0], 1)
    real_N1 = mask_N.unsqueeze(-1)
    # where, not a product: padding items may hold infinities, and 0 * inf is nan
    return torch.where(real_N1, value_NX, 0.0).sum(0) / real_N1.sum().clamp_min(1)


def _entropy(share_XE: Tensor) -> Tensor:
    """In nats, over the last axis; the slope where a share is 0 is finite."""
    return -(share_XE * share_XE.clamp_min(1e-20).log()).sum(-1)


def _share(load_E: Tensor) -> Tensor:
    load_E = load_E.detach().float()
    return load_E / load_E.sum(-1, keepdim=True).clamp_min(1)


def _sum_over_ranks(load_E: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(load_E)
    return load_E
