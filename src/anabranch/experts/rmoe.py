"""RMoE: a small recurrent state that goes from router to router, so each one knows where the token went before.

"Layerwise Recurrent Router for Mixture-of-Experts", ICLR 2025, arXiv 2408.06793. It is one new score part, "recurrent":

    x'  = P_i x_i                              a projector per layer, [p, D]
    s   = sigmoid(W_s x' + b_s + U_s h + c_s)  reset        h is the state of the router before; h_0 = 0
    z   = sigmoid(W_z x' + b_z + U_z h + c_z)  update       one cell for all layers, equal to torch.nn.GRUCell(p, p)
    n   = tanh(W_n x' + b_n + s (U_n h + c_n))
    h_i = (1 - z) n + z h                      handed on in ``context.carry``
    logits_i = G_i h_i                         [E, p] per layer, no bias

The state runs over depth and not over the sequence: a token's routing needs no other token, and decoding no cache. Gradients flow back
through all layers before. Dense layers let the state pass; a layer that routes several times (Chain-of-Experts) moves it on each time.

Departures: the paper does not say how the cell starts; ours as torch.nn.GRUCell, P and G from N(0, init_std). Evidence: `anabranch study
rmoe`.
"""
# Shapes: N items, E destinations, D width, P width of the state (p in the paper), X = P times the number of gates

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.config import Field, Size, configclass
from anabranch.errors import AnabranchError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import evaluating
from anabranch.lm.recipes import Material, fields_beyond, recipe
from anabranch.nn.context import set_unregistered
from anabranch.precision import autocast_dtype, cast, full_precision, wide
from anabranch.routing import LinearScore, Router, Routing, RoutingContext, Score, WeightField
from anabranch.routing.context import argument_of
from anabranch.routing.description import CellForm, ScoreForm
from anabranch.routing.shared import Share

logger = logging.getLogger(__name__)

SHARED_NAME = "recurrent_router"
NUM_GATES = {"gru": 3, "lstm": 4, "rnn": 1}


class Recurrence(nn.Module):
    """The cell that all routers of a model share, and their projector if ``shared_projector``.

    Weights are named, shaped and drawn as in torch's own cells: ``weight_ih`` and ``weight_hh`` ``[X, P]``, gates in the order
    r, z, n (gru) or i, f, g, o (lstm).
    """

    def __init__(self, config: "RecurrentScore.Config", dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        state_dim, bound = config.state_dim, 1 / math.sqrt(config.state_dim)
        rows = NUM_GATES[config.cell] * state_dim

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.weight_ih, self.weight_hh = drawn(rows, state_dim), drawn(rows, state_dim)
        self.bias_ih, self.bias_hh = drawn(rows), drawn(rows)
        self.projector: nn.Parameter | None = None
        if config.shared_projector:
            self.projector = config.new_projector(dim, generator)

    def forward(self, x_NP: Tensor, before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next state: (h_NP,), and for lstm (h_NP, c_NP). One matmul for all input gates and one for all recurrent gates."""
        dtype = x_NP.dtype
        weights = tuple(cast(part, dtype) for part in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh))
        if self.config.cell == "lstm":
            return torch.lstm_cell(x_NP, before, *weights)
        step = torch.gru_cell if self.config.cell == "gru" else torch.rnn_tanh_cell
        return (step(x_NP, before[0], *weights),)


class RecurrentScore(Score, kind="recurrent"):
    """Logits from a state that the routers of all layers hand on; works wherever a score does.

    Built alone it owns its cell and starts from zeros. In a model (`join`) the first router's cell is everybody's, registered once as
    ``shared.recurrent_router``.
    """

    @configclass
    class Config(Score.Config):
        """`Score.Config` and:

        Attributes:
            state_dim: p, width of the state (the paper: 128 at D = 1280, and 256 or 512 are no better).
            cell: ``gru``; ``rnn`` (tanh) and ``lstm`` are the paper's ablations.
            passing: hand the state on. False is the paper's NP: every layer starts from h_0, with the same parameters.
            detach_state: no gradient through what comes from the layer before (worse than no recurrence in the paper).
            shared_projector: one P for all layers (worse in the paper: norms differ between layers).
            logit_residual: alpha, adds alpha times the logits of the router before (the paper's NP + r).
            gate: ``linear``, or ``cosine`` of h and an embedding of the destination over a learned temperature, as X-MoE has it.
            temperature: of ``cosine``, at the start.
            init: P and G from N(0, ``init_std``), or ``scaled``: N(0, 1 / D) and N(0, 1 / p).
            cell_dtype: the cell runs in ``float32`` even under autocast (p is small), or in the ``autocast`` type.
        """

        state_dim: Size = Field(default=128, ge=1)
        cell: Literal["gru", "rnn", "lstm"] = "gru"
        passing: bool = True
        detach_state: bool = False
        shared_projector: bool = False
        logit_residual: float = Field(default=0.0, ge=0)
        gate: Literal["linear", "cosine"] = "linear"
        temperature: float = Field(default=0.07, gt=0)
        init: Literal["normal", "scaled"] = "normal"
        cell_dtype: Literal["float32", "autocast"] = "float32"

        def __post_init__(self) -> None:
            if self.detach_state and not self.passing and not self.logit_residual:
                raise ConfigError("detach_state is True, but nothing is handed on; set passing or logit_residual")

        def conversions(self) -> tuple[WeightField, ...]:
            """Linear routers become recurrent ones."""
            advice = "to go from linear routers to recurrent ones load the checkpoint as it is and use experts.rmoe.to_recurrent"
            return (WeightField("router", self.owner.kind, advice, path="router.score.kind"),)

        def num_cell(self) -> int:
            """Parameters of the cell: two matrices and two biases per gate (gru: 6 p^2 + 6 p)."""
            return 2 * NUM_GATES[self.cell] * self.state_dim * (self.state_dim + 1)

        def num_parameters(self, dim: int, num_destinations: int) -> int:
            """Projector, cell, gate."""
            gate = num_destinations * self.state_dim + (self.gate == "cosine")
            return self.state_dim * dim + self.num_cell() + gate

        def num_shared(self, dim: int) -> int:
            """The cell, and the projector if it is one for all."""
            return self.num_cell() + self.state_dim * dim * self.shared_projector

        def num_flops(self, dim: int, num_destinations: int) -> int:
            """2 p D + 12 p^2 + 2 E p for gru; biases and element-wise work are not counted."""
            matrices = dim + 2 * NUM_GATES[self.cell] * self.state_dim + num_destinations
            return 2 * self.state_dim * matrices

        def new_projector(self, dim: int, generator: torch.Generator | None) -> nn.Parameter:
            """P, drawn."""
            std = self.init_std if self.init == "normal" else 1 / math.sqrt(dim)
            return nn.Parameter(nn.init.normal_(torch.empty(self.state_dim, dim), std=std, generator=generator))

    config: Config
    recurrence: Recurrence

    def __init__(
        self, config: Config, dim: int, num_destinations: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config)
        self.hands_on = config.passing or config.logit_residual > 0
        self.layer, self.is_first = 0, True
        std = config.init_std if config.init == "normal" else 1 / math.sqrt(config.state_dim)
        self.projector = None if config.shared_projector else config.new_projector(dim, generator)
        self.weight = nn.Parameter(torch.empty(num_destinations, config.state_dim))
        nn.init.normal_(self.weight, std=std, generator=generator)
        self.log_temperature: nn.Parameter | None = None
        if config.gate == "cosine":
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)]))
        self.recurrence = Recurrence(config, dim, generator)

    def join(self, share: Share, layer: int) -> None:
        """Use the model's cell instead of our own; the first router gives its own to the model.

        Raises ConfigError if routers of one model have different cells.
        """
        own = self.recurrence
        shared: Any = share(SHARED_NAME, lambda: own)
        self.layer, self.is_first = layer, shared is own
        for name in ("state_dim", "cell", "shared_projector"):
            ours, theirs = getattr(self.config, name), getattr(shared.config, name)
            if ours != theirs:
                raise ConfigError(
                    f"{name} is {ours} in layer {layer}, but {theirs} in a layer before; recurrent routers share one cell"
                )
        del self.recurrence
        set_unregistered(self, "recurrence", shared)

    def describe(self) -> ScoreForm | str:
        """A gru behind a linear gate; other cells and gates have no record."""
        config, cell = self.config, self.recurrence
        if (config.cell, config.gate, config.logit_residual) != ("gru", "linear", 0.0):
            return "a recurrent router is not a gru behind a linear gate"
        projector = cell.projector if self.projector is None else self.projector
        assert projector is not None, "one of them has it"
        form = CellForm(projector, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh, config.passing)
        return ScoreForm(self.weight, config.activation, form)

    def project(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """logit_NE = G h.

        Raises AnabranchError if a router that is not the model's first gets no state, or one that does not fit the items.
        """
        x_ND = wide(x_ND)
        half = autocast_dtype(x_ND.device.type) if self.config.cell_dtype == "autocast" else None
        projector = self.recurrence.projector if self.projector is None else self.projector
        with full_precision(x_ND.device.type):
            x_NP = F.linear(x_ND, cast(projector, x_ND.dtype))  # type: ignore[arg-type]
            state = self._next(x_NP, self._before(x_NP, context), half)
            if self.config.passing:
                context.carry |= dict(zip(("routing_state", "routing_memory"), state, strict=False))
            logit_NE = self._gate(state[0])
        if self.config.logit_residual:
            before_NE = self._carried("routing_logits", logit_NE, context)
            if before_NE is not None:
                logit_NE = logit_NE + self.config.logit_residual * before_NE
            context.carry["routing_logits"] = logit_NE
        return logit_NE

    def _next(self, x_NP: Tensor, before: tuple[Tensor, ...], half: torch.dtype | None) -> tuple[Tensor, ...]:
        if half is None:
            return self.recurrence(x_NP, before)
        state = self.recurrence(x_NP.to(half), tuple(value.to(half) for value in before))
        return tuple(value.to(x_NP.dtype) for value in state)

    def _gate(self, state_NP: Tensor) -> Tensor:
        weight_EP = cast(self.weight, state_NP.dtype)
        if self.log_temperature is None:
            return F.linear(state_NP, weight_EP)
        cosine_NE = F.linear(F.normalize(state_NP, dim=-1), F.normalize(weight_EP, dim=-1))
        return cosine_NE / self.log_temperature.exp().clamp_min(0.01)

    def _before(self, x_NP: Tensor, context: RoutingContext) -> tuple[Tensor, ...]:
        """The state to go on from; zeros for the first router, and for all without ``passing``."""
        names = ("routing_state", "routing_memory") if self.config.cell == "lstm" else ("routing_state",)
        if not self.config.passing:
            return tuple(torch.zeros_like(x_NP) for _ in names)
        carried = (self._carried(name, x_NP, context) for name in names)
        return tuple(torch.zeros_like(x_NP) if value is None else value for value in carried)

    def _carried(self, name: str, like: Tensor, context: RoutingContext) -> Tensor | None:
        """What the router before handed on; None where there is none, for the first router."""
        value = context.carry.get(name)
        if value is None:
            # A path of blocks may leave the first one out: its first router starts from nothing.
            if self.is_first or getattr(context, "path", None) is not None:
                return None
            raise AnabranchError(
                f"the recurrent router of layer {self.layer} got no {name} from the routed layer before; only the first "
                "routed layer starts from zeros. A pipeline stage must hand context.carry on with x"
            )
        if (value.shape, value.dtype, value.device) != (like.shape, like.dtype, like.device):
            needs, got = (f"{list(one.shape)} {one.dtype} on {one.device}" for one in (like, value))
            raise AnabranchError(
                f"the recurrent router of layer {self.layer} needs {name} of {needs}, but got {got}; layers that hand it on must "
                "route the same items in one precision"
            )
        return value.detach() if self.config.detach_state else value


@dataclass(frozen=True)
class Conversion:
    """What `to_recurrent` made.

    Attributes:
        model: the model with recurrent routers.
        agreement: for each router, the share of calibration tokens whose first choice is that of the old router.
    """

    model: Decoder
    agreement: tuple[float, ...]


@torch.no_grad()
def to_recurrent(model: Decoder, token_BL: Tensor, *, seed: int = 0, **options: Any) -> Conversion:
    """Give a model with linear routers recurrent ones that begin near to them; ``model`` stays as it is.

    G_i P_i is the truncated singular value decomposition of the old router, of rank min(p, E). The cell starts as the identity: its
    update gate is closed (z = 0.0025), nothing comes in from the state before, and projections are so small (by ``token_BL``)
    that tanh is linear. Training then opens it.

    Args:
        model: a decoder whose routed layers all have linear routers.
        token_BL: int64, some hundreds of real tokens, to scale the projections and to compare choices.
        seed: of what the old routers do not decide.
        options: fields of `RecurrentScore.Config`, such as ``state_dim``.

    Raises:
        ConfigError: the routers are not linear, or the cell asked for is no gru of its own projector and linear gate.
    """
    layer: Any = model.config.feed_forward
    old = getattr(getattr(layer, "router", None), "score", None)
    if not isinstance(old, LinearScore.Config):
        kind = layer.owner.kind if old is None else old.owner.kind
        raise ConfigError(f"to_recurrent needs linear routers, this model has {kind!r}")
    score = RecurrentScore.Config(**{"activation": old.activation, "init_std": old.init_std, **options})
    if score.cell != "gru" or score.gate != "linear" or score.shared_projector:
        raise ConfigError("only a gru with a linear gate and a projector per layer can begin near linear routers")
    config = model.config.replace(feed_forward=layer.replace(router=layer.router.replace(score=score)))
    made = Decoder(config, seed=seed).to(model.embedding.weight)
    state = made.state_dict()
    for name, value in model.state_dict().items():
        if name in state and state[name].shape == value.shape:
            state[name] = value
    made.load_state_dict(state)
    _close_gates(made.shared[SHARED_NAME])  # type: ignore[arg-type]
    pairs = list(zip(_routers(model), _routers(made), strict=True))
    with _seen(model, token_BL) as (before, inputs):
        for old_router, new_router in pairs:
            _factor(old_router.score.weight, new_router.score, inputs[old_router])  # type: ignore[arg-type]
    with _seen(made, token_BL) as (after, _):
        agreement = tuple(
            (ours.index_NK[:, 0] == theirs.index_NK[:, 0]).float().mean().item()
            for ours, theirs in zip(after, before, strict=True)
        )
    if min(agreement) < 0.95:
        logger.warning("recurrent routers agree with the linear ones in %.1f%% of first choices", 100 * min(agreement))
    return Conversion(made.train(model.training), agreement)


def _close_gates(cell: Recurrence) -> None:
    """h = tanh(x'), but for a little of the state before: W_n = 1, U_n = 0, z = sigmoid(-6)."""
    for weight in (cell.weight_hh, cell.bias_ih, cell.bias_hh):
        weight.zero_()
    _, update, new = cell.weight_ih.chunk(3)
    update.zero_()
    new.copy_(torch.eye(cell.config.state_dim))
    cell.bias_ih.chunk(3)[1].fill_(-6.0)


def _factor(weight_ED: Tensor, score: RecurrentScore, x_ND: Tensor) -> None:
    """G P = W of rank min(p, E), with projections of ``x_ND`` of a root mean square of at most 0.05."""
    left_ER, value_R, right_RD = torch.linalg.svd(weight_ED.double(), full_matrices=False)
    rank = min(score.config.state_dim, value_R.numel())
    left_ER, value_R, right_RD = left_ER[:, :rank], value_R[:rank], right_RD[:rank]
    largest = (x_ND.double() @ right_RD.T).square().mean(0).sqrt().max().clamp_min(1e-6)
    scale = 0.05 / largest
    score.projector.mul_(scale)  # type: ignore[union-attr]  # of what is left of the state: as small
    score.projector[:rank].copy_(scale * right_RD)  # type: ignore[index]
    score.weight.zero_()
    score.weight[:, :rank].copy_(left_ER * value_R / scale)


def _routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


@contextmanager
def _seen(model: Decoder, token_BL: Tensor) -> Iterator[tuple[list[Routing], dict[Router, Tensor]]]:
    """What the routers of ``model`` decide, in order, and what they see, in evaluation on some tokens."""
    decided: list[Routing] = []
    inputs: dict[Router, Tensor] = {}

    def note(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> None:
        decided.append(routing)
        inputs[router] = argument_of(Tensor, args, kwargs)  # type: ignore[index, assignment]

    handles = [router.register_forward_hook(note, with_kwargs=True) for router in _routers(model)]
    try:
        with evaluating(model):
            model(token_BL)
    finally:
        for handle in handles:
            handle.remove()
    yield decided, inputs


def _score_of(config: Decoder.Config) -> Score.Config | None:
    router = getattr(config.feed_forward, "router", None)
    return None if router is None else router.score


@recipe(
    "to_recurrent",
    makes=lambda config: isinstance(_score_of(config), RecurrentScore.Config),
    takes=lambda config: isinstance(_score_of(config), LinearScore.Config),
    needs="a model with linear routers",
)
def _from_linear(model: Decoder, config: Decoder.Config, material: Material) -> Decoder:
    score = _score_of(config)
    assert score is not None
    return to_recurrent(model, material.sample(), seed=material.seed, **fields_beyond(score, Score.Config)).model
