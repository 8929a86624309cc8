"""Feed-forward blocks: the interface every design fits, and the dense ones: SwiGLU (Shazeer 2020, arXiv 2002.05202) and `MLP`."""
# Shapes: B batch, L positions, D width, F hidden

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, Size, configclass
from anabranch.nn.activation import ActivationName, activation_of
from anabranch.nn.context import BuildContext, Count, ForwardContext
from anabranch.nn.description import Dense, FeedForwardForm
from anabranch.nn.grouped import dense_mlp
from anabranch.nn.kernels.expert_mlp import why_not
from anabranch.nn.kernels.operands import takes
from anabranch.nn.linear import Projection, build_linear, call_linear, count_linear, is_plain
from anabranch.routing.conversion import WeightField


class FeedForward(Part, nn.Module, family="feed_forward"):
    """Interface: ``(x_BLD, context) -> y_BLD``. A design is a subclass whose config has ``build(context)`` and ``count(context)``."""

    @configclass
    class Config(BaseConfig):
        """Base of feed-forward configs. ``is_routed`` says whether the layer counts as a routed one."""

        is_routed: ClassVar[bool] = False

        def conversions(self) -> tuple[WeightField, ...]:
            """Fields in which models that look like one of this design differ in their weights, and what converts them."""
            return ()

        def expand_decoder(self, model: Any) -> Any:
            """The model of other formats' layers that computes what ``model``, a decoder of this design, does; itself if there is none."""
            return model

        def count(self, context: BuildContext) -> Count:
            """Sizes of this layer."""
            raise NotImplementedError  # abstract

    def forward(self, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        """y_BLD."""
        raise NotImplementedError  # abstract

    def add_to(self, x_BLD: Tensor, norm: nn.Module, context: ForwardContext) -> Tensor:
        """The residual stream after this layer: x + f(norm(x)).

        A design that loops or needs the stream itself overrides this; ``norm`` is the block's, which such a design may use more than once.
        """
        return x_BLD + self(norm(x_BLD), context)

    def describe(self) -> FeedForwardForm | str:
        """What `add_to` computes outside of training, for fast paths; or why no record says it. Each class says it for itself."""
        return f"the feed-forward is a {type(self).__name__}"


class SwiGLU(FeedForward, kind="swiglu"):
    """W2 (silu(W1 x) * W3 x). W1 (gate) and W3 (up) are one matrix ``[2F, D]``, gate rows first."""

    @configclass
    class Config(FeedForward.Config):
        """Attributes: ``hidden_dim``, F."""

        hidden_dim: Size = Field(default=512, ge=1)

        def count(self, context: BuildContext) -> Count:
            """3 D F weights."""
            return sum((count_linear(projection, context) for projection in self.projections(context)), start=Count())

        def projections(self, context: BuildContext) -> tuple[Projection, Projection]:
            """(``gate`` and ``up`` in one, ``down``)."""
            return swiglu_projections(context, self.hidden_dim)

    def __init__(self, config: Config, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.w13, self.w2 = (build_linear(projection, context) for projection in config.projections(context))

    def forward(self, x_BLD: Tensor, context: ForwardContext | None = None) -> Tensor:
        """y_BLD."""
        return swiglu_of(self.w13, self.w2, x_BLD, context)

    def describe(self) -> FeedForwardForm | str:
        """Itself."""
        return Dense(self.w13, self.w2)


class MLP(FeedForward, kind="mlp"):
    """W2 act(W1 x), with GELU unless said otherwise; a gate, where the activation has one, is in W1's first rows."""

    @configclass
    class Config(FeedForward.Config):
        """Attributes: ``hidden_dim``, F; ``activation``, see `anabranch.nn.activation`."""

        hidden_dim: Size = Field(default=512, ge=1)
        activation: ActivationName = "gelu"

        def count(self, context: BuildContext) -> Count:
            """2 D F weights, 3 with a gate."""
            return sum((count_linear(projection, context) for projection in self.projections(context)), start=Count())

        def projections(self, context: BuildContext) -> tuple[Projection, Projection]:
            """(``up``, with ``gate`` before it where there is one; ``down``)."""
            return mlp_projections(context, self.hidden_dim, self.activation)

    def __init__(self, config: Config, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.w13, self.w2 = (build_linear(projection, context) for projection in config.projections(context))

    def forward(self, x_BLD: Tensor, context: ForwardContext | None = None) -> Tensor:
        """y_BLD."""
        return mlp_of(self.w13, self.w2, self.config.activation, x_BLD, context)


def mlp_projections(context: BuildContext, hidden_dim: int, activation: str) -> tuple[Projection, Projection]:
    """The linear layers of a feed-forward of F = ``hidden_dim``: (the parts of its activation in one, ``down``)."""
    rows = activation_of(activation).rows(hidden_dim)
    return (
        context.projection("w13", context.dim, sum(rows.values()), parts=rows),
        context.projection("w2", hidden_dim, context.dim, residual=True, parts={"down": context.dim}),
    )


def mlp_of(
    w13: nn.Module, w2: nn.Module, activation: str, x_BLD: Tensor, context: ForwardContext | None = None
) -> Tensor:
    """w2(act(w13(x))), by the kernels where they compute it."""
    if activation == "swiglu":
        return swiglu_of(w13, w2, x_BLD, context)
    return call_linear(w2, activation_of(activation).apply(call_linear(w13, x_BLD, context)), context)


def swiglu_projections(context: BuildContext, hidden_dim: int) -> tuple[Projection, Projection]:
    """The linear layers of a SwiGLU of F = ``hidden_dim``: (``gate`` and ``up`` in one, ``down``)."""
    return mlp_projections(context, hidden_dim, "swiglu")


def swiglu_of(w13: nn.Module, w2: nn.Module, x_BLD: Tensor, context: ForwardContext | None = None) -> Tensor:
    """w2(silu(gate) * up) with gate and up from ``w13``; in one kernel where that computes it all (`is_fused`)."""
    if is_fused(w13, w2, x_BLD):
        return dense_mlp(x_BLD.reshape(-1, x_BLD.shape[-1]), w13.weight, w2.weight).view_as(x_BLD)  # type: ignore[arg-type]
    gate, up = call_linear(w13, x_BLD, context).chunk(2, dim=-1)
    return call_linear(w2, F.silu(gate) * up, context)


def is_fused(w13: nn.Module, w2: nn.Module, x_BLD: Tensor) -> bool:
    """Whether the compiled kernels do it: in training on a CPU, unless a matrix was replaced or is watched by hooks."""
    if x_BLD.device.type != "cpu" or not torch.is_grad_enabled() or not takes():
        return False
    if not all(is_plain(part) and part.bias is None for part in (w13, w2)):
        return False
    w13_EFD, w2_EDF = (part.weight.unsqueeze(0) for part in (w13, w2))  # type: ignore[operator]
    return why_not(x_BLD.reshape(-1, x_BLD.shape[-1]), w13_EFD, w2_EDF, x_BLD.dtype) is None
