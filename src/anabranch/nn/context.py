"""The two contexts: what a layer is told when it is built, and what travels down the layers of a forward pass."""
# Shapes: B batch, L positions, N = B L items, H heads, D width

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anabranch.routing.context import RoutingContext

M = TypeVar("M", bound=nn.Module)


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

    def share(self, name: str, make: Callable[[], M]) -> M:
        """The shared module ``name``, made by the first layer that asks."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]  # type: ignore[return-value]

    def linear(self, in_dim: int, out_dim: int, *, bias: bool = False, residual: bool = False) -> nn.Linear:
        """A linear layer with initial weights N(0, std) truncated at 3 std, bias zero."""
        layer = nn.Linear(in_dim, out_dim, bias=bias)
        self.init(layer.weight, residual=residual)
        if bias:
            nn.init.zeros_(layer.bias)
        return layer

    def init(self, weight: Tensor, *, residual: bool = False) -> None:
        """Fill ``weight`` in place from N(0, std) truncated at 3 std."""
        std = self.residual_std if residual else self.init_std
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=self.generator)


def hide(module: nn.Module, name: str, value: Any) -> None:
    """Set ``module.name`` without registering it: a reference to a module that someone else owns.

    It then is in ``parameters()`` and ``state_dict()`` once, under its owner. deepcopy and pickle keep the sharing.
    """
    object.__setattr__(module, name, value)


class KeyValueStore(Protocol):
    """What attention needs of a key-value cache (see `anabranch.lm.cache`)."""

    def append(self, layer: int, key_BHLD: Tensor, value_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of a layer; return all stored so far, new ones included."""


class AttendingStore(Protocol):
    """A store that attends itself, since what it keeps is not one tensor per batch (blocks of many sequences, other machines)."""

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
    """

    position_BL: Tensor
    rotary: tuple[Tensor, Tensor]
    attention_mask: Tensor | None = None
    is_causal: bool = True
    cache: KeyValueStore | AttendingStore | None = None
    token_BL: Tensor | None = None


def recomputed(run: Callable[[Tensor, Any], Tensor], x_BLD: Tensor, context: ForwardContext) -> Tensor:
    """``run(x_BLD, context)`` without keeping its activations. What it emits and carries on comes out as well, so it is counted once."""

    def forked(x_BLD: Tensor, carry: dict[str, Tensor]) -> tuple[Any, ...]:
        local = context.fork(carry)
        return run(x_BLD, local), local.carry, *local.collected()

    y_BLD, context.carry, *collected = checkpoint(forked, x_BLD, dict(context.carry), use_reentrant=False)
    context.merge(*collected)
    return y_BLD


@dataclass(frozen=True)
class Count:
    """Sizes of a part, known before it is built.

    Attributes:
        parameters: all parameters.
        active: parameters a token uses.
        flops: forward floating-point operations per token (a multiply-add counts 2).
    """

    parameters: int = 0
    active: int = 0
    flops: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.parameters + other.parameters, self.active + other.active, self.flops + other.flops)

    @classmethod
    def dense(cls, parameters: int) -> "Count":
        """Weights of matrices that every token goes through."""
        return cls(parameters, parameters, 2 * parameters)
