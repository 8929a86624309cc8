"""`MixedLowRank`: experts beside one matrix, who choose them by a router that several matrices may have in common, or by labels.

    state = labelled_rows(expert_B, length)                              # hard: each row by the expert of its task
    state = labelled_rows(expert_B, length, soft=0.25, alignment=0.1)    # annealed: p = 0.75 onehot + 0.25 softmax

Three things say who is used, the first that is there: adapters that rows were told (`anabranch.adapters.rows_for`), labels, the router.
"""
# Shapes: B rows, L positions, N = B L items, E experts, K choices per item

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.adapters.lora_mixer.loss import SoftThenTopK, SpecialisationLoss
from anabranch.adapters.routed import RoutedLowRank, is_told
from anabranch.config import configclass
from anabranch.errors import ConfigError, InputError
from anabranch.nn import BuildContext, Count
from anabranch.nn.context import set_unregistered
from anabranch.nn.linear import Projection
from anabranch.routing import UNUSED, Candidates, LinearScore, OfPass, Router, Routing, RoutingContext
from anabranch.routing.destinations import Destinations

__all__ = ["MixedLowRank", "labelled_rows", "preservation"]

# Of a forward context's state: what `labelled_rows` makes.
_LABEL, _STAGE, _SOFT, _ALIGNMENT, _KEEPING = (
    f"lora_mixer.{name}" for name in ("label", "stage", "soft", "alignment", "keeping")
)
# Of what it carries: decisions of a group, by its name.
_HELD = "lora_mixer.held."
# A row without a label.
NO_LABEL = -1


def labelled_rows(
    expert_B: Tensor, length: int, *, soft: float = 0.0, alignment: float = 0.0, preservation: float = 0.0
) -> dict[str, Any]:
    """The ``state`` of a forward pass whose rows are of tasks that have an expert each.

    Args:
        expert_B: int64 ``[B]``, the expert of each row's task; -1 for a row without one, which the router alone decides.
        length: L of the pass.
        soft: a in p = (1 - a) onehot + a softmax, in [0, 1]; 0, the default, is hard: the router is not asked. 1 leaves it to the router.
            In evaluation what is in between is left to the router too.
        alignment: c_T of the loss c_T cross-entropy(mean_t p(x_t), expert), which is emitted in training.
        preservation: weight of what `MixedLowRank.drift` gives of each layer, which is emitted in training; the mean over layers counts.

    Raises InputError for another shape, ConfigError for a number outside of its range.
    """
    if expert_B.dim() != 1 or expert_B.is_floating_point():
        raise InputError(
            f"labels have shape {list(expert_B.shape)} and type {expert_B.dtype}; they must be int64 [rows]"
        )
    if not 0 <= soft <= 1:
        raise ConfigError(f"soft is {soft}; it must be 0 to 1")
    for name, weight in (("alignment", alignment), ("preservation", preservation)):
        if not weight >= 0:
            raise ConfigError(f"{name} is {weight}; it must be at least 0")
    stage: Literal["hard", "blend", "soft"] = "hard" if soft == 0 else "soft" if soft == 1 else "blend"
    state: dict[str, Any] = {
        _LABEL: expert_B.unsqueeze(1).expand(-1, length),
        _STAGE: stage,
        _SOFT: OfPass(torch.tensor(float(soft), device=expert_B.device)),
    }
    weights = {_ALIGNMENT: alignment, _KEEPING: preservation}
    return state | {name: OfPass(float(weight)) for name, weight in weights.items() if weight}


class MixedLowRank(RoutedLowRank, kind="mixed_low_rank"):
    """A `RoutedLowRank` whose matrix may have its router in common with others, lack experts, and learn by labels."""

    @configclass
    class Config(RoutedLowRank.Config):
        """Its experts, and who chooses.

        Attributes:
            router: as of `RoutedLowRank`; soft in training and the best three afterwards by default, with the loss of the paper.
            router_group: layers beside each other (``q``, ``k``, ``v``) that name the same group have one router; they read the same.
            closed: experts that the router must not choose, since no layer of the group has them.
            preserved: keep what experts were (`MixedLowRank.keep`), from which `preservation` measures how far they moved.
            preserved_experts: those that it measures, by their numbers; empty for all.
            experts: what each is called, as of `load_mixture`; empty where they have no names.
        """

        router: Router.Config | None = Router.Config(
            score=LinearScore.Config(init="kaiming_uniform"),
            select=SoftThenTopK.Config(),
            balance=(SpecialisationLoss.Config(),),
        )
        router_group: str | None = None
        closed: tuple[int, ...] = ()
        preserved: bool = False
        preserved_experts: tuple[int, ...] = ()
        experts: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            RoutedLowRank.Config.__post_init__(self)
            number = len(self.ranks)
            for name, chosen in (("closed", self.closed), ("preserved_experts", self.preserved_experts)):
                outside = [expert for expert in chosen if not 0 <= expert < number]
                if outside:
                    raise ConfigError(f"{name} has {outside[0]}, but experts are 0 to {number - 1}")
            if self.preserved_experts and not self.preserved:
                raise ConfigError("preserved_experts names some, and preserved is false; set it")
            if len(set(self.closed)) == number:
                raise ConfigError(f"closed has all {number} experts; one at least must be open")
            if self.experts and len(self.experts) != number:
                raise ConfigError(f"experts has {len(self.experts)} names for {number} adapters; give one for each")

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """As of `RoutedLowRank`; the router counts for the first layer of its group."""
            if self.router_group is None or self.router is None:
                return RoutedLowRank.Config.count(self, projection, context)
            first = context.companions.setdefault(
                f"count.{_group_name(projection, self.router_group)}", projection.name
            )
            alone = RoutedLowRank.Config.count(self, projection, context)
            if first == projection.name:
                return alone
            score, size = self.router.score, (projection.in_dim, len(self.ranks))
            parameters = score.num_parameters(*size)
            return alone + Count(-parameters, -parameters, -score.num_flops(*size))

    config: Config
    kept_a: Tensor
    kept_b: Tensor
    # A router is not asked where labels decide, and experts may be frozen in the midst of a training.
    has_idle_parameters = True

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        group = None if config.router_group is None else _group_name(projection, config.router_group)
        leader = None if group is None else context.companions.get(group)
        own = config if leader is None else config.replace(router=None)
        super().__init__(own, projection, context)
        self.config = config
        self.group = _Group(group) if leader is None else leader.group
        self.group.size += 1
        if leader is not None:
            _check_same(leader, config, projection)
            # It is the leader's.
            set_unregistered(self, "router", leader.router)
        elif config.router is not None:
            if config.closed:
                self._close(config.closed, projection, context)
            if group is not None:
                context.companions[group] = self
        if config.preserved:
            for name, stack in (("kept_a", self.pool.a), ("kept_b", self.pool.b)):
                self.register_buffer(name, stack.detach().clone())

    def _close(self, closed: tuple[int, ...], projection: Projection, context: BuildContext) -> None:
        """Let the router know what is closed. Nothing more is drawn: it keeps its weights."""
        assert self.router is not None
        candidates = Lacking(len(self.config.ranks), closed)
        self.router.destinations = Destinations(candidates=candidates)
        self.router.candidates = candidates

    @torch.no_grad()
    def keep(self) -> None:
        """Take what the experts are now as what they are to stay near."""
        if self.config.preserved:
            self.kept_a.copy_(self.pool.a)
            self.kept_b.copy_(self.pool.b)

    def drift(self, experts: Tensor | None = None) -> Tensor:
        """sum ||theta_i - theta_i(0)||^2 of the experts that the bool ``[E]`` names; None for those of the config.

        Raises ConfigError if nothing was kept.
        """
        if not self.config.preserved:
            raise ConfigError("the layer keeps nothing of its experts; build it with preserved=True")
        halves = (self.pool.a - self.kept_a, self.pool.b - self.kept_b)
        moved_E = torch.stack([half.square().flatten(1).sum(1) for half in halves]).sum(0)
        if experts is not None:
            return (moved_E * experts.to(moved_E)).sum()
        chosen = self.config.preserved_experts
        return moved_E[list(chosen)].sum() if chosen else moved_E.sum()

    def route(self, x: Tensor, context: Any) -> Routing | None:
        """See the top of this file."""
        x_NC, state = x.flatten(0, -2), {} if context is None else context.state
        if self.router is None or is_told(state):
            return self._told(x_NC, context, x.shape[:-1])
        if context is None:
            context = RoutingContext()
        label_N = self._labels(state, len(x_NC))
        if label_N is None:
            return self._by_router(x, x_NC, context)
        if _KEEPING in state and context.training:
            context.emit_loss("preservation", state[_KEEPING].value * self.drift())
        stage = state[_STAGE]
        if stage == "hard":
            if _ALIGNMENT in state and context.training and self._leads(x, context):
                self._align(self.router.score.activate(self.router.score.project(x_NC, context)), label_N, context)
            return self._hard(label_N, x_NC, context)
        leads = self._leads(x, context)
        routing = self._by_router(x, x_NC, context)
        if _ALIGNMENT in state and context.training and leads:
            self._align(routing.score_NE, label_N, context)
        if stage == "blend" and context.training:
            routing = _blended(routing, label_N, state[_SOFT].value)
        return routing

    def _labels(self, state: dict[str, Any], num_items: int) -> Tensor | None:
        """int64 [N]: the expert of each item. Raises InputError for one that there is not, and for another number of items."""
        if _LABEL not in state:
            return None
        label_N = state[_LABEL].reshape(-1)
        if len(label_N) != num_items:
            raise InputError(f"labels are given for {len(label_N)} tokens of a pass of {num_items}")
        if not torch.compiler.is_compiling() and num_items:
            wrong = label_N[(label_N >= self.pool.num_experts) | (label_N < NO_LABEL)]
            if len(wrong):
                raise InputError(f"label {int(wrong[0])} names no expert; there are 0 to {self.pool.num_experts - 1}")
        return label_N

    def _hard(self, label_N: Tensor, x_NC: Tensor, context: RoutingContext) -> Routing:
        """Each item to the expert of its label alone, with weight 1."""
        real_N = label_N >= 0
        if context.item_mask_N is not None:
            real_N = real_N & context.item_mask_N
        for expert in self.config.closed:
            real_N = real_N & (label_N != expert)
        index_N1 = label_N.masked_fill(~real_N, UNUSED).unsqueeze(-1)
        weight_N1 = real_N.unsqueeze(-1).to(torch.promote_types(x_NC.dtype, torch.float32))
        return Routing(index_N1, weight_N1, weight_N1.new_zeros(len(x_NC), self.pool.num_experts))

    def _align(self, score_NE: Tensor, label_N: Tensor, context: RoutingContext) -> None:
        """Emit c_T cross-entropy(mean_t p(x_t), expert), the mean over the rows that have a label."""
        length = context.sequence_length or len(score_NE)
        score_BLE, label_BL = score_NE.unflatten(0, (-1, length)), label_N.view(-1, length)
        mask_BL = label_BL >= 0
        if context.item_mask_N is not None:
            mask_BL = mask_BL & context.item_mask_N.view(-1, length)
        weight_BL1 = mask_BL.unsqueeze(-1).to(score_NE.dtype)
        mean_BE = torch.where(mask_BL.unsqueeze(-1), score_BLE, 0.0).sum(1) / weight_BL1.sum(1).clamp_min(1)
        has_label_B = mask_BL.any(1)
        label_B = label_BL.max(1).values.clamp_min(0)
        right_B = mean_BE.gather(1, label_B.unsqueeze(1)).squeeze(1).clamp_min(1e-20)
        loss = -(right_B.log() * has_label_B).sum() / has_label_B.sum().clamp_min(1)
        context.emit_loss("task_alignment", context.state[_ALIGNMENT].value * loss)

    # Groups

    def _leads(self, x: Tensor, context: RoutingContext) -> bool:
        """Whether this layer is the first of its group that reads ``x``, so that what is emitted once is emitted by it."""
        if self.group.size == 1 or self.group.name is None:
            return True
        held = context.carry.get(_HELD + self.group.name)
        if held is not None and held.value.x is x:
            if context.state.get(_STAGE) == "hard":
                self._count(held.value, context)
            return False
        if context.state.get(_STAGE) == "hard":
            context.carry[_HELD + self.group.name] = OfPass(_Held(x, None, self.group.size - 1))
        return True

    def _by_router(self, x: Tensor, x_NC: Tensor, context: RoutingContext) -> Routing:
        """The router's decision, made once for all layers of the group, which read the same."""
        assert self.router is not None
        if self.group.size == 1 or self.group.name is None:
            return self.router(x_NC, context)
        held = context.carry.get(_HELD + self.group.name)
        if held is not None and held.value.x is x and held.value.routing is not None:
            self._count(held.value, context)
            return held.value.routing
        routing = self.router(x_NC, context)
        context.carry[_HELD + self.group.name] = OfPass(_Held(x, routing, self.group.size - 1))
        return routing

    def _count(self, held: "_Held", context: RoutingContext) -> None:
        """One layer less that waits for what is held: with the last, nothing is held any longer."""
        assert self.group.name is not None
        if held.left <= 1:
            del context.carry[_HELD + self.group.name]
        else:
            context.carry[_HELD + self.group.name] = OfPass(replace(held, left=held.left - 1))


class Lacking(Candidates):
    """Closes experts that no matrix of a router has."""

    stage = "pre_softmax"
    open_E: Tensor

    def __init__(self, num_experts: int, closed: tuple[int, ...]) -> None:
        nn.Module.__init__(self)
        open_E = torch.ones(num_experts, dtype=torch.bool)
        open_E[list(closed)] = False
        self.register_buffer("open_E", open_E, persistent=False)

    def open_NE(self, num_items: int, context: RoutingContext) -> Tensor | None:
        """bool [E]."""
        return self.open_E


@dataclass
class _Group:
    """Layers with one router; ``name`` None for a layer alone."""

    name: str | None
    size: int = 0


@dataclass(frozen=True)
class _Held:
    """A decision for ``x``, that ``left`` layers wait for."""

    x: Tensor
    routing: Routing | None
    left: int


def preservation(model: nn.Module, beta: float = 0.01, experts: Tensor | None = None) -> Tensor:
    """beta sum_i ||theta_i - theta_i(0)||^2 over the experts of all mixed layers of ``model``; those that the bool ``[E]`` names, or those
    of each layer's config, which is all where it names none.

    Raises ConfigError for a model without such layers, or whose layers keep nothing.
    """
    layers = [module for module in model.modules() if isinstance(module, MixedLowRank)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no mixed layers, so there is nothing to preserve")
    return beta * torch.stack([layer.drift(experts) for layer in layers]).sum()


def _blended(routing: Routing, label_N: Tensor, soft: Tensor) -> Routing:
    """p = (1 - a) onehot(label) + a p, of the items with a label."""
    mine_NK = (routing.index_NK == label_N.unsqueeze(-1)) & routing.used_NK
    soft = soft.to(routing.weight_NK)
    weight_NK = (1 - soft) * mine_NK + soft * routing.weight_NK
    return replace(routing, weight_NK=torch.where((label_N >= 0).unsqueeze(-1), weight_NK, routing.weight_NK))


def _group_name(projection: Projection, group: str) -> str:
    """Of the layers beside this one that name ``group``."""
    return f"mixed.{projection.name.rpartition('.')[0]}.{group}"


def _check_same(leader: "MixedLowRank", config: "MixedLowRank.Config", projection: Projection) -> None:
    """Raise ConfigError where a layer cannot have the router of its group's first."""
    pairs = {
        "inputs": (leader.pool.dim, projection.in_dim),
        "experts": (leader.pool.num_experts, len(config.ranks)),
        "router": (leader.config.router, config.router),
        "closed": (leader.config.closed, config.closed),
    }
    for what, (first, own) in pairs.items():
        if first != own:
            raise ConfigError(
                f"router_group is {config.router_group!r} for layers with {what} {first} and {own} ({projection.name}); they have one "
                "router, so these must be the same"
            )
