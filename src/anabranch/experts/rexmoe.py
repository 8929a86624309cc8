"""ReXMoE: routers that may pick experts owned by neighbouring layers, trained with a growing set of candidates.

"ReXMoE: Reusing Experts with Minimal Overhead in Mixture-of-Experts", 2025, arXiv 2510.17483.

With L routed layers (index l, dense layers not counted), N experts per layer and reuse factor r:
  eq. 1  groups      g(l) = floor(l / r): layers g r ... min((g + 1) r, L) - 1; the last group may be short, r_g layers
         pool        U_g = the experts of the group's layers, one after the other; layer l owns slots [o_l, o_l + N), o_l = (l - g r) N
  eq. 2  scores      s = softmax(W_l h) over all r_g N slots, in fp32
  eq. 3  output      h' = sum over TopK(s) of s_u U_u(h), gates not renormalised
  eq. 6  PSR         N_t = N until t_s; floor((1 + (r - 1)(t - t_s) / (t_e - t_s)) N) until t_e; r N after. In every step a random set
                     of r N - N_t slots is closed: their scores are set to zero after the softmax and before TopK.
Experts, active experts and FLOPs per token stay those of the plain model; only the router grows.

Departures: the paper prints groups as {floor(l / r) + k}; its text and figure mean {r floor(l / r) + k}, built here. Mask granularity,
balance loss and router init are not stated; ours: one mask per (layer, step), Switch loss over open slots and z-loss, N(0, 0.02).
PSR is off by default, and a model that is grown from a trained one begins with its own experts (`GROWING`).
A depth embedding, a loss and a bias over the whole pool are options from later work. Evidence: `anabranch study rexmoe`.
"""
# Shapes: N items or own experts (paper), S = r_g N slots of a pool, E destinations, D width, B batch, L positions

import math
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Repeats, configclass
from anabranch.errors import CheckpointError, ConfigError
from anabranch.experts.group_pool import GroupPool
from anabranch.lm.decoder import Decoder
from anabranch.lm.recipes import Material, fields_beyond, recipe
from anabranch.nn.context import BuildContext, Count, ForwardContext
from anabranch.nn.description import FeedForwardForm, passes_as
from anabranch.nn.moe import MoE
from anabranch.nn.pool import check_stacked
from anabranch.routing import BiasBalancer, Candidates, RoutingContext, WeightField


class ProgressiveScaling(Candidates, kind="psr"):
    """Progressive scaling routing (PSR): the schedule of open slots, and the mask of the current step.

    The mask is a function of (seed, layer, step) alone, so every rank and every resumed run draws the same; it is drawn in the step
    hook, outside the forward pass, so micro-batches and activation recompute share it.
    """

    @configclass
    class Config(Candidates.Config):
        """The schedule.

        Attributes:
            start: t_s, where the pool begins to grow (0.21 of training in the paper: 10k of 47.7k steps).
            end: t_e, where all slots are open (0.63: 30k steps).
            unit: ``start`` and ``end`` are a ``fraction`` of training or a ``step`` number.
            mode: ``linear`` (eq. 6), or ``stepwise``: 2 N, 3 N, ... r N from evenly spaced points of start ... end.
            mask: ``random`` closes any slots (the paper's words); ``local_first`` keeps the layer's own slots open; ``nested`` follows one
                fixed order per layer, so the open set only grows.
            scope: one mask per ``step`` and layer, or one per ``token`` (drawn from torch's global generator).
            stage: ``post_softmax`` zeroes closed scores (paper): they stay in the denominator and their logits still get gradient;
                ``pre_softmax`` sets closed logits to minus infinity.
            evaluate: outside training use the ``full`` pool (paper) or the ``current`` candidates.
            as_reuse: mask a pool as if the reuse factor were this; on a plain layer it is the control "does PSR need reuse?".
        """

        start: float = Field(default=0.21, ge=0)
        end: float = Field(default=0.63, gt=0)
        unit: Literal["fraction", "step"] = "fraction"
        mode: Literal["linear", "stepwise"] = "linear"
        mask: Literal["random", "local_first", "nested"] = "random"
        scope: Literal["step", "token"] = "step"
        stage: Literal["post_softmax", "pre_softmax"] = "post_softmax"
        evaluate: Literal["full", "current"] = "full"
        as_reuse: Repeats | None = Field(default=None, ge=2)

        def __post_init__(self) -> None:
            if self.start >= self.end:
                raise ConfigError(f"psr.start is {self.start}, psr.end is {self.end}; start must be smaller")
            if self.unit == "fraction" and self.end > 1:
                raise ConfigError(f"psr.end is {self.end}; with unit 'fraction' it must be at most 1")
            if self.scope == "token" and self.mask == "nested":
                raise ConfigError("psr.mask 'nested' is one order per layer; it needs psr.scope 'step'")

        def closes(self, size: int) -> bool:
            """Whether some slots of a group of ``size`` layers are ever closed."""
            return size > 1 or self.as_reuse is not None

        def candidates(self, t: float, num_own: int, reuse: int) -> int:
            """N_t, the number of open slots at time ``t`` (in ``unit``), eq. 6. ``reuse`` is the size of the group."""
            progress = min(max((t - self.start) / (self.end - self.start), 0.0), 1.0)
            if self.mode == "linear":
                # 1e-9: t = t_s + 1 / 3 (t_e - t_s) must give the integer that exact arithmetic gives
                return math.floor((1 + (reuse - 1) * progress) * num_own + 1e-9)
            if progress == 0 or reuse == 1:
                return num_own
            passed = 1 + math.floor((reuse - 2) * progress + 1e-9)
            return num_own * (1 + passed)

    open_E: Tensor
    step: Tensor

    def __init__(
        self, config: Config, num_own: int, reuse: int, *, own_start: int, layer: int, seed: int, min_open: int = 1
    ) -> None:
        """A schedule for one layer: ``num_own`` experts of its own in a pool of ``reuse`` layers, at least ``min_open`` open."""
        super().__init__()
        self.config = config
        self.num_own, self.reuse, self.own_start = num_own, reuse, own_start
        self.layer, self.seed, self.min_open = layer, seed, min_open
        self.stage = config.stage
        self.register_buffer("open_E", torch.ones(num_own * reuse, dtype=torch.bool))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.on_step(0, 0.0)

    @property
    def num_slots(self) -> int:
        """S."""
        return self.num_own * self.reuse

    @property
    def only_in_training(self) -> bool:
        """Whether all slots are open outside of training: always with the ``full`` pool, else once the schedule has opened them."""
        return self.config.evaluate == "full" or bool(self.open_E.all())

    def num_open(self, step: int, fraction: float) -> int:
        """Open slots at a point of training."""
        t = fraction if self.config.unit == "fraction" else step
        if self.config.as_reuse is None:
            count = self.config.candidates(t, self.num_own, self.reuse)
        else:
            share = self.config.candidates(t, self.num_own, self.config.as_reuse) / (
                self.num_own * self.config.as_reuse
            )
            count = math.floor(share * self.num_slots + 1e-9)
        return min(max(count, self.min_open), self.num_slots)

    def on_step(self, step: int, fraction: float) -> None:
        """Draw the mask for the step after ``step`` finished ones."""
        count = self.num_open(step, fraction)
        self.step.fill_(step)
        if self.config.scope == "token":
            # Only the number matters, see `_per_token`.
            self.open_E.copy_(torch.arange(self.num_slots) < count)
        else:
            self.open_E.copy_(torch.from_numpy(self._draw(step, count)))

    def _draw(self, step: int, count: int) -> np.ndarray:
        when = () if self.config.mask == "nested" else (step,)
        order = np.random.default_rng([self.seed, self.layer, *when]).permutation(self.num_slots)
        if self.config.mask == "local_first":
            own = (order >= self.own_start) & (order < self.own_start + self.num_own)
            order = np.concatenate([order[own], order[~own]])
        opened = np.zeros(self.num_slots, dtype=bool)
        opened[order[:count]] = True
        return opened

    def open_NE(self, num_items: int, context: RoutingContext) -> Tensor | None:
        """The mask, ``[S]`` or with token scope ``[N, S]``; None when evaluating with the full pool."""
        if not context.training and self.config.evaluate == "full":
            return None
        return self.open_E if self.config.scope == "step" else self._per_token(num_items)

    def _per_token(self, num_items: int) -> Tensor:
        rank_NS = torch.rand(num_items, self.num_slots, device=self.open_E.device)
        if self.config.mask == "local_first":
            rank_NS[:, self.own_start : self.own_start + self.num_own] -= 1.0
        return rank_NS.argsort(-1).argsort(-1) < self.open_E.sum()


@configclass
class ReusedExperts(BaseConfig):
    """The fields of a layer that reuses the experts of its neighbours, beside those of a mixture of experts.

    Attributes:
        reuse: r, layers per group; 1 is the plain layer. Above 4 the paper sees experts go idle; training warns where it happens.
        psr: the schedule of candidates, `ProgressiveScaling.Config()` for the paper's; None for a pool that is open from the start. With
            the paper's, small models ended clearly worse than plain ones (see the page), so it is off by default.
        depth_embedding: add a learned vector per layer (zero at first) to the input, so shared experts can tell layers apart.
        pool_balance: alpha of the balance loss over the whole pool (`PoolLoss`), 0 for none.
        pool_bias: the bias balancers of ``router.balance`` are one per pool, not one per layer.
    """

    reuse: Repeats = Field(default=2, ge=1)
    psr: ProgressiveScaling.Config | None = None
    depth_embedding: bool = False
    pool_balance: float = Field(default=0.0, ge=0)
    pool_bias: bool = False

    def check_schedule(self) -> None:
        """Raise ConfigError for a schedule of candidates that has no pool to grow."""
        if self.reuse == 1 and self.psr and self.psr.mode == "stepwise" and self.psr.as_reuse is None:
            raise ConfigError("psr.mode 'stepwise' needs reuse of at least 2, reuse is 1")

    def group_pool(self, calls: int = 1) -> GroupPool:
        """The experts of the layer's group, used ``calls`` times in a forward pass."""
        return GroupPool(self.reuse, self.psr, self.pool_balance, self.pool_bias, calls=calls)

    def pool_conversions(self) -> tuple[WeightField, ...]:
        """A pool of more layers, or of fewer, is of other weights."""
        grown, unshared = "experts.rexmoe.from_vanilla", "to huggingface"
        pool = WeightField(
            "reuse",
            self.reuse,
            f"grow a plain model with {grown}, or convert the checkpoint {unshared}, which unshares its experts",
            plain=1,
            hint=f"to change the reuse factor use {grown} on a plain model, or convert {unshared} for a plain export",
        )
        return (pool,)

    def count_depth(self, dim: int) -> Count:
        """The depth embedding."""
        vector = dim * self.depth_embedding
        return Count(vector, vector, 0)

    def new_depth(self, dim: int) -> nn.Parameter | None:
        """The depth embedding of a layer as it begins, ``[D]``; None without one."""
        return nn.Parameter(torch.zeros(dim)) if self.depth_embedding else None


# What a trained model grows by: it computes the same as before, in training and out of it, until foreign experts join its own.
# Any other way its routers would at once choose experts they were never trained on.
GROWING = ProgressiveScaling.Config(mask="local_first", stage="pre_softmax", evaluate="current")


def at_depth(x_BLD: Tensor, depth_D: Tensor | None) -> Tensor:
    """What shared experts see of a layer's input: with the depth embedding added, if there is one."""
    return x_BLD if depth_D is None else x_BLD + depth_D.to(x_BLD.dtype)


class ReXMoE(MoE, kind="rexmoe"):
    """A mixture-of-experts layer whose router chooses among the experts of its whole group.

    The group's pool is owned once, by the model (``model.shared``); layers hold references. With ``reuse=1`` this is `MoE` to the bit.
    """

    @configclass
    class Config(ReusedExperts, MoE.Config):
        """`MoE.Config` and `ReusedExperts`."""

        def __post_init__(self) -> None:
            MoE.Config.__post_init__(self)
            self.check_schedule()

        @property
        def pool_policy(self) -> GroupPool:
            """The experts of the layer's group."""
            return self.group_pool()

        def count(self, context: BuildContext) -> Count:
            """As the plain layer, with a router of r_g N rows; a pooled expert counts for the layer that owns it."""
            return MoE.Config.count(self, context) + self.count_depth(context.dim)

        def conversions(self) -> tuple[WeightField, ...]:
            """Those of the router's score, and of the pool."""
            return (*MoE.Config.conversions(self), *self.pool_conversions())

        def expand_decoder(self, model: Decoder) -> Decoder:
            """The plain model that computes the same, see `export_expanded`."""
            return export_expanded(model)

    config: Config

    def __init__(self, config: Config, context: BuildContext) -> None:
        super().__init__(config, context)
        self.depth_embedding = config.new_depth(context.dim)

    def describe(self) -> FeedForwardForm | str:
        """The plain layer, of an input that the depth embedding shifts."""
        return passes_as(MoE.describe(self), shift_D=self.depth_embedding)

    def forward(self, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        """y_BLD."""
        return self.run(self.router, at_depth(x_BLD, self.depth_embedding), context)


def from_vanilla(
    model: Decoder,
    *,
    reuse: int,
    foreign_rows: Literal["home", "zero", "noise"] = "home",
    seed: int = 0,
    **options: Any,
) -> Decoder:
    """Turn a plain mixture-of-experts model into a ReXMoE one with the same experts.

    Args:
        model: a decoder whose routed layers are `MoE`.
        reuse: r.
        foreign_rows: router rows of experts of other layers: ``home`` copies the row of the owner's router (adjacent layers see
            similar states), ``zero``, or ``noise`` as freshly initialised.
        seed: of the noise and of the masks.
        options: other fields of `ReXMoE.Config`. Without ``psr`` it is `GROWING`: the logits equal the plain model's until t_s.

    Returns a new model in the mode (training or evaluation) of the old one.
    Raises ConfigError if the model is not plain, or ``reuse`` does not fit.
    """
    plain = model.config.feed_forward
    if type(plain) is not MoE.Config:
        raise ConfigError(f"from_vanilla needs a model of plain 'moe' layers, this one has {plain.owner.kind!r}")
    moe_fields = {field.name: getattr(plain, field.name) for field in fields(plain)}
    layer = ReXMoE.Config(**{**moe_fields, "reuse": reuse, "psr": GROWING, **options})
    # A projection that is half as wide as there are experts stays so wide when there are more.
    router = layer.router.replace(score=layer.router.score.settled(plain.num_experts))
    config = model.config.replace(feed_forward=layer.replace(router=router))
    grown = Decoder(config, seed=seed).to(model.embedding.weight)
    state = grown.state_dict()
    source = model.state_dict()
    layers = _routed(model)
    for name, value in source.items():
        if name in state and state[name].shape == value.shape:
            state[name] = value
    if reuse > 1:
        check_stacked(model)
        _fill_pools(state, source, layers, reuse)
        _fill_routers(state, source, layers, layer, foreign_rows)
    grown.load_state_dict(state)
    return grown.train(model.training)


def _routed(model: Decoder) -> list[int]:
    return [number for number, block in enumerate(model.blocks) if isinstance(block.feed_forward, MoE)]


def _fill_pools(state: dict[str, Tensor], source: dict[str, Tensor], layers: list[int], reuse: int) -> None:
    for group in range(math.ceil(len(layers) / reuse)):
        members = layers[group * reuse : (group + 1) * reuse]
        for weight in ("w13", "w2"):
            parts = [source[f"blocks.{layer}.feed_forward.experts.{weight}"] for layer in members]
            state[f"shared.experts_{group}.{weight}"] = torch.cat(parts)


def _fill_routers(
    state: dict[str, Tensor], source: dict[str, Tensor], layers: list[int], config: ReXMoE.Config, foreign_rows: str
) -> None:
    """Rows of own experts from the layer's router, rows of foreign ones as asked. Other tensors of one row per expert (a bias) too."""
    num_own, reuse = config.num_experts, config.reuse
    for position, layer in enumerate(layers):
        members = layers[position // reuse * reuse : position // reuse * reuse + reuse]
        prefix = f"blocks.{layer}.feed_forward.router."
        for name in [name for name in source if name.startswith(prefix)]:
            if name not in state or state[name].shape == source[name].shape:
                continue
            rows = state[name].clone()
            for place, owner in enumerate(members):
                slots = slice(place * num_own, (place + 1) * num_own)
                if owner == layer or foreign_rows == "home":
                    rows[slots] = source[name.replace(f"blocks.{layer}.", f"blocks.{owner}.", 1)]
                elif foreign_rows == "zero":
                    rows[slots] = 0.0
            state[name] = rows


def export_expanded(model: Decoder) -> Decoder:
    """A plain mixture-of-experts decoder with r N experts in every layer (duplicated weights) and the same logits.

    What any engine for OLMoE or Qwen3-MoE can run, at r times the expert memory.

    Raises CheckpointError where a plain model cannot express it: a depth embedding, a last group shorter than the others, or slots that
    its schedule still keeps closed outside of training.
    """
    config = model.config.feed_forward
    if type(config) is not ReXMoE.Config:
        raise CheckpointError(f"export_expanded needs a 'rexmoe' model, this one is {config.owner.kind!r}")
    layers = _routed(model)
    if config.depth_embedding:
        raise CheckpointError("a depth embedding cannot be expressed by a plain mixture-of-experts model")
    if len(layers) % config.reuse:
        raise CheckpointError(
            f"{len(layers)} routed layers are not a multiple of reuse={config.reuse}: the last group has fewer experts, "
            "which a plain model with one expert count cannot express"
        )
    _check_open(model, layers)
    check_stacked(model)
    values = {field.name: getattr(config, field.name) for field in fields(MoE.Config)}
    plain = MoE.Config(**{**values, "num_experts": config.num_experts * config.reuse})
    expanded = Decoder(model.config.replace(feed_forward=plain)).to(model.embedding.weight)
    state, source = expanded.state_dict(), model.state_dict()
    for name in state:
        if name in source:
            state[name] = source[name]
    for position, layer in enumerate(layers):
        for weight in ("w13", "w2"):
            pooled = f"shared.experts_{position // config.reuse}.{weight}"
            if pooled in source:
                state[f"blocks.{layer}.feed_forward.experts.{weight}"] = source[pooled]
        _copy_pool_bias(state, source, layer, position // config.reuse, config)
    expanded.load_state_dict(state)
    return expanded.train(model.training)


def _check_open(model: Decoder, layers: list[int]) -> None:
    for layer in layers:
        block: Any = model.blocks[layer]
        candidates = block.feed_forward.router.candidates
        if candidates is not None and not candidates.only_in_training:
            raise CheckpointError(
                f"layer {layer} has {int(candidates.open_E.sum())} of {candidates.num_slots} experts open, and a plain model has no "
                "schedule that keeps experts closed; train until psr.end, or set psr.evaluate to 'full'"
            )


def _copy_pool_bias(
    state: dict[str, Tensor], source: dict[str, Tensor], layer: int, group: int, config: ReXMoE.Config
) -> None:
    """With ``pool_bias`` the bias balancers stand in the pool; a plain layer has its own copy."""
    if not config.pool_bias or config.reuse == 1:
        return
    biases = [place for place, part in enumerate(config.router.balance) if isinstance(part, BiasBalancer.Config)]
    for number, place in enumerate(biases):
        state[f"blocks.{layer}.feed_forward.router.balance.{place}.expert_bias"] = source[
            f"shared.bias_{group}_{number}.expert_bias"
        ]


@recipe(
    "from_vanilla",
    makes=lambda config: type(config.feed_forward) is ReXMoE.Config,
    takes=lambda config: type(config.feed_forward) is MoE.Config,
    needs="a model of plain 'moe' layers",
    sets=("psr",),
)
def _from_plain(model: Decoder, config: Decoder.Config, material: Material) -> Decoder:
    asked = fields_beyond(config.feed_forward, MoE.Config)
    if asked["psr"] is None:
        del asked["psr"]
    return from_vanilla(model, seed=material.seed, **asked)
