"""The two contexts: what a layer is told when it is built, and what travels down the layers of a forward pass."""
# Shapes: B batch, L positions, N = B L items, H heads, D width

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anabranch.nn.count import Count
from anabranch.nn.linear import Linear, Projection, build_linear
from anabranch.nn.norm import RMSNorm
from anabranch.nn.visits import Path, Visits
from anabranch.routing.context import RoutingContext

if TYPE_CHECKING:
    from anabranch.nn.attention import Attention
    from anabranch.nn.feed_forward import FeedForward

M = TypeVar("M", bound=nn.Module)

__all__ = [
    "AttendingStore",
    "BuildContext",
    "Count",
    "ForwardContext",
    "KeyValueStore",
    "recomputed",
    "set_unregistered",
]


@dataclass
class BuildContext:
    """What a layer knows about its place in the model.

    Attributes:
        dim: model width.
        num_layers: all layers.
        layer: index of the layer being built.
        routed_layer: its index among the layers with a routed feed-forward (dense ones do not count).
        num_routed_layers: how many of those there are.
        init_std: standard deviation of initial weights.
        residual_std: the same for weights that write to the residual stream (smaller in deep models).
        seed: the model's seed, for what must be reproducible apart from the initial weights (candidate masks).
        generator: draws the initial weights.
        shared: modules that several layers use; the model registers them once, layers keep plain references.
        path: name of the module being built, as in the state dict, ``blocks.3.attention``; see `at`.
        linears: which linear layers are not plain, by patterns of their names, see `anabranch.nn.linear`.
        projections: names of the parts of all linear layers built so far.
        companions: what layers of one model leave for others that are built (or counted) after them, by a name; nobody registers it.
        attention: attention of the block being built; None where a part is built outside a model.
        feed_forward: feed-forward of the block being built, likewise.
        norm_eps: epsilon of the block's norms.
        norm_offset: what is added to the weights of all norms, see `anabranch.nn.norm`.
    """

    dim: int
    num_layers: int = 1
    layer: int = 0
    routed_layer: int = 0
    num_routed_layers: int = 1
    init_std: float = 0.02
    residual_std: float = 0.02
    seed: int = 0
    generator: torch.Generator | None = None
    shared: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    path: str = ""
    linears: Mapping[str, Linear.Config] = field(default_factory=dict)
    projections: list[str] = field(default_factory=list)
    companions: dict[str, Any] = field(default_factory=dict)
    attention: "Attention.Config | None" = None
    feed_forward: "FeedForward.Config | None" = None
    norm_eps: float = 1e-5
    norm_offset: float = 0.0

    def norm(self, dim: int, eps: float | None = None) -> RMSNorm:
        """A norm of the model; ``eps`` None for the block's."""
        return RMSNorm(dim, self.norm_eps if eps is None else eps, self.norm_offset)

    def at(self, name: str) -> Self:
        """The same for a module ``name`` of the one being built."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    def share(self, name: str, make: Callable[[], M]) -> M:
        """The shared module ``name``, made by the first layer that asks."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]  # type: ignore[return-value]

    def projection(
        self,
        name: str,
        in_dim: int,
        out_dim: int,
        *,
        bias: bool = False,
        residual: bool = False,
        parts: Mapping[str, int] | None = None,
    ) -> Projection:
        """Linear layer ``name`` of the module being built; its only part has the same name unless ``parts`` are given."""
        name = f"{self.path}.{name}" if self.path else name
        parts = {name.rpartition(".")[2]: out_dim} if parts is None else parts
        return Projection(name, in_dim, out_dim, bias, residual, parts)

    def linear(
        self,
        in_dim: int,
        out_dim: int,
        *,
        bias: bool = False,
        residual: bool = False,
        name: str | None = None,
        parts: Mapping[str, int] | None = None,
    ) -> Any:
        """A linear layer, called with ``(x, context)``; see `anabranch.nn.linear`. One without a ``name`` is always `Dense`."""
        made = self.projection(name or "", in_dim, out_dim, bias=bias, residual=residual, parts=parts)
        return build_linear(made if name else replace(made, parts={}), self)

    def init(self, weight: Tensor, *, residual: bool = False) -> None:
        """Fill ``weight`` in place from N(0, std) truncated at 3 std."""
        std = self.residual_std if residual else self.init_std
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=self.generator)


def set_unregistered(module: nn.Module, name: str, value: Any) -> None:
    """Set ``module.name`` without registering it: a reference to a module that someone else owns.

    It then is in ``parameters()`` and ``state_dict()`` once, under its owner. deepcopy and pickle keep the sharing.
    """
    object.__setattr__(module, name, value)


class KeyValueStore(Protocol):
    """What attention needs of a key-value cache (see `anabranch.lm.cache`).

    One whose sequences share entries in front has a method ``front(layer, rows)`` too, which gives them, as
    `anabranch.nn.shared_prefix.SharedPrefix`, or None; the mask is over them as well.
    """

    def append(
        self, layer: int, key_BHLD: Tensor, value_BHLD: Tensor, *, visit: int = 0, rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the new positions of one visit of a layer, by the sequences ``rows`` of the cache (None: all).

        Returns keys and values of this visit so far, new ones included, and a bool mask ``[B, L_all]``, False where a position did not
        come by here; None if all did. Attention with a window says ``window`` too, its positions: what lies further back than that of
        the first new position may be left out of all three.
        """


class AttendingStore(Protocol):
    """A store that attends itself, since what it keeps is not one tensor per batch (blocks of many sequences, other machines).

    It keeps one visit of each layer, by all sequences; or several, if it has ``keeps_visits`` and ``attend`` takes ``visit``, the number
    of one that is not the first. Where it has ``takes_scoring``, ``attend`` takes ``scoring``, how scores become weights, which is an
    `anabranch.nn.scored.Scoring`; where it has ``takes_gates``, ``gate_BL``, what each query multiplies by what stands in front of all.
    """

    def attend(self, layer: int, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor) -> Tensor:
        """y_BHLD: store the new positions of a layer, then let each query see what it may."""


@dataclass(kw_only=True)
class ForwardContext(RoutingContext):
    """What travels down the layers of one forward pass, beside x_BLD.

    Attributes:
        position_BL: int64, position of each token in its sequence.
        rotary: (cos, sin), each ``[B, 1, L, head_dim]``.
        attention_mask: bool ``[B, 1, L, L_all]``, True where a query may look; None means plain causal if
            ``is_causal``, else everything (a single new token).
        is_causal: see ``attention_mask``.
        cache: keys and values of earlier positions, or of a prefix before all of them; None when there is none. One with ``attend``
            does the attention itself, and the mask and ``is_causal`` say nothing.
        token_BL: the input tokens (hash routers, traces).
        path: blocks that the model runs instead of each once: in order, or so for each sequence; None for each once.
        visits: how often each layer's attention has run.
        rows: which sequences of the cache this pass is of, see `on_rows`; None means all, in their order.
        front_gates: see `anabranch.nn.streams.Streams.front_gates`.
    """

    position_BL: Tensor
    rotary: tuple[Tensor, Tensor]
    attention_mask: Tensor | None = None
    is_causal: bool = True
    cache: KeyValueStore | AttendingStore | None = None
    token_BL: Tensor | None = None
    path: Path | None = None
    visits: Visits = field(default_factory=dict)
    rows: list[int] | None = None
    front_gates: Callable[[int, Tensor], Tensor] | None = None

    def fork(self, carry: dict[str, Any] | None = None) -> Self:
        """See `RoutingContext.fork`; visits are counted on from here, on its own."""
        return replace(super().fork(carry), visits=dict(self.visits))

    def take_over(self, fork: RoutingContext) -> None:
        """See `RoutingContext.take_over`."""
        super().take_over(fork)
        self.visits = fork.visits if isinstance(fork, ForwardContext) else self.visits


def recomputed(run: Callable[[Tensor, Any], Tensor], x_BLD: Tensor, context: RoutingContext | None) -> Tensor:
    """``run(x_BLD, context)`` without keeping its activations. What it emits and carries on comes out as well, so it is counted once."""
    if context is None:
        return checkpoint(run, x_BLD, None, use_reentrant=False)
    before = context.fork()

    def forked(x_BLD: Tensor, carry: dict[str, Any]) -> tuple[Tensor, RoutingContext]:
        local = before.fork(carry)
        return run(x_BLD, local), local

    y_BLD, local = checkpoint(forked, x_BLD, dict(context.carry), use_reentrant=False)
    context.take_over(local)
    return y_BLD
