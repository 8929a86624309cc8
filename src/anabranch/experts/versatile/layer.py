"""VersatileFFN: one feed-forward used wide (virtual experts cut from its own weights) and deep (looped per token), mixed by difficulty.

"VersatileFFN: Achieving Parameter Efficiency in LLMs via Adaptive Wide-and-Deep Reuse", 2025, arXiv 2512.14531. With the residual stream H,
the block's norm and F(H) = H + W_out phi(W_in norm(H)):
  width   expert j owns hidden units I_j = [floor(j S), floor(j S) + d_e), S = (d_h - d_e) / (N - 1); g = softmax over the top k of W_g H
          Y_width = H + sum_j g_j W_out[:, I_j] phi(W_in[I_j] norm(H))
  depth   H^(0) = H, H^(l) = F(H^(l-1)); p = Gumbel softmax(W_loop H, tau), straight-through; Y_depth = sum_l p_l H^(l)
          outside training l = argmax(W_loop H) and Y_depth = H^(l)
  tau     5.0 * 0.99984^step, at least 0.1
  mix     lambda = (L_max - sum_l l p_l) / L_max; Y = lambda Y_width + (1 - lambda) Y_depth
Extra parameters: d (N + L_max) a layer. Training FLOPs of the layer: L_max times the feed-forward, and the width path.

Departures: outside training the width path masks the hidden units that the first loop computes anyway (see `paths`), which gives the same
sum with one matmul less; ``width_compute="grouped"`` is the paper's way. The balance loss, which the published code does not wire, is the
Switch loss at the published weight. Initial weights of both heads are N(0, 0.02), not truncated. Evidence: `anabranch study versatile`.
"""
# Shapes: B batch, L positions, N items, D width, F hidden, E virtual experts

from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from anabranch.config import Field, Repeats, Size, configclass
from anabranch.errors import ConfigError
from anabranch.experts.versatile.branch import Branch
from anabranch.experts.versatile.paths import Paths
from anabranch.nn.activation import ActivationName, activation_of
from anabranch.nn.context import BuildContext, Count, ForwardContext
from anabranch.nn.description import FeedForwardForm, Loops
from anabranch.nn.feed_forward import MLP, FeedForward, SwiGLU, mlp_of, mlp_projections
from anabranch.nn.grouped import BACKENDS
from anabranch.nn.linear import Dense, Linear, Projection, build_linear, call_linear, count_linear, is_plain
from anabranch.routing import Router, SwitchLoss, TopK, WeightField
from anabranch.routing.relax import Temperature

PAPER_ROUTER = Router.Config(select=TopK.Config(top_k=2, normalize="softmax"), balance=(SwitchLoss.Config(alpha=5e-5),))


class VersatileFFN(FeedForward, kind="versatile"):
    """A feed-forward with a width and a depth path over its own weights. `forward` is the plain one; a block calls `add_to`."""

    @configclass
    class Config(FeedForward.Config):
        """The layer.

        Attributes:
            hidden_dim: d_h, of the one feed-forward.
            num_experts: N, virtual experts.
            expert_dim: d_e, hidden units of each; None takes hidden_dim // num_experts.
            slices: ``strided`` starts them at floor(j S), spread over all units (paper); ``contiguous`` puts them side by side.
            overlap: allow experts to share units (N d_e > d_h).
            router: of the virtual experts, on the un-normalised stream; gates should sum to 1.
            max_loops: L_max.
            temperature: tau of the Gumbel softmax.
            relaxation: ``straight_through`` trains on a one-hot sample (paper); ``soft`` mixes the states by the relaxed sample.
            fusion: ``difficulty`` (paper), ``average`` of both paths, or one path alone: ``width_only``, ``depth_only``.
            gate: expected loops from the ``hard`` sample (the published code) or from the ``soft`` probabilities; with ``none`` there is
                no loop head and every token takes every loop (the k-loop baseline, with fusion ``depth_only`` or ``average``).
            norm: the width path has the block's norm (``shared``, paper) or a ``separate`` one.
            width_compute: ``masked`` masks hidden units of the whole feed-forward, those of the first loop where there is one;
                ``grouped`` runs the experts as a stacked pool; ``auto`` is masked where a first loop can be shared, else grouped, and
                where many tokens take all loops (training) the one of fewer FLOPs.
            width_threshold: outside training tokens with lambda up to this have no width path, as if it were 0 (0: the paper's rule).
                With a soft gate it changes the mix and saves nothing.
            early_exit: outside training run only the loops that each token takes; False runs all for all (the same output).
            recompute: recompute each loop's activations in the backward pass, to save memory.
            backend: expert compute of ``grouped``, see `anabranch.nn.grouped`.
            activation: of the feed-forward, see `anabranch.nn.activation`.
        """

        is_routed: ClassVar[bool] = True

        hidden_dim: Size = Field(default=512, ge=1)
        num_experts: Repeats = Field(default=8, ge=1)
        expert_dim: Size | None = Field(default=None, ge=1)
        slices: Literal["strided", "contiguous"] = "strided"
        overlap: bool = False
        router: Router.Config = PAPER_ROUTER
        max_loops: Repeats = Field(default=4, ge=1)
        temperature: Temperature.Config = Temperature.Config()
        relaxation: Literal["straight_through", "soft"] = "straight_through"
        fusion: Literal["difficulty", "average", "width_only", "depth_only"] = "difficulty"
        gate: Literal["hard", "soft", "none"] = "hard"
        norm: Literal["shared", "separate"] = "shared"
        width_compute: Literal["auto", "masked", "grouped"] = "auto"
        width_threshold: float = Field(default=0.0, ge=0, lt=1)
        early_exit: bool = True
        recompute: bool = False
        backend: str = "auto"
        activation: ActivationName = "swiglu"

        def __post_init__(self) -> None:
            if self.backend not in BACKENDS:
                raise ConfigError(f"backend is {self.backend!r}; use one of {', '.join(BACKENDS)}")
            if self.gate == "none" and self.fusion == "difficulty":
                raise ConfigError(
                    "gate is 'none', so there is no difficulty to mix by; use fusion 'average' or 'depth_only'"
                )
            if self.fusion != "depth_only":
                self.router.check(self.num_experts)
                self.slice_starts(self.hidden_dim)

        @property
        def num_choices(self) -> int:
            """Most virtual experts per token."""
            return self.router.num_choices(self.num_experts)

        def conversions(self) -> tuple[WeightField, ...]:
            """Those of the score of virtual experts."""
            return self.router.score.conversions()

        def slice_width(self, hidden_dim: int) -> int:
            """d_e in a feed-forward of ``hidden_dim`` units."""
            return self.expert_dim or max(hidden_dim // self.num_experts, 1)

        def slice_starts(self, hidden_dim: int) -> tuple[int, ...]:
            """The first hidden unit of each virtual expert.

            Raises ConfigError if they do not fit, overlap without leave, or do not divide the units into whole blocks.
            """
            count, width = self.num_experts, self.slice_width(hidden_dim)
            if width > hidden_dim:
                raise ConfigError(f"expert_dim is {width}, but hidden_dim is {hidden_dim}; use 1 to {hidden_dim}")
            if self.slices == "contiguous":
                if self.expert_dim is None and hidden_dim % count:
                    raise ConfigError(
                        f"num_experts is {count}, which does not divide hidden_dim={hidden_dim} into contiguous slices; "
                        "use slices='strided', or set expert_dim"
                    )
                if count * width > hidden_dim:
                    raise ConfigError(
                        f"{count} contiguous slices of expert_dim={width} need {count * width} hidden units, there are {hidden_dim}; "
                        f"use expert_dim of at most {hidden_dim // count}, or slices='strided' with overlap=True"
                    )
                return tuple(range(0, count * width, width))
            if count * width > hidden_dim and not self.overlap:
                raise ConfigError(
                    f"{count} experts of expert_dim={width} need {count * width} hidden units, there are {hidden_dim}; "
                    f"use expert_dim of at most {hidden_dim // count}, or allow overlap=True"
                )
            return tuple(number * (hidden_dim - width) // max(count - 1, 1) for number in range(count))

        def count(self, context: BuildContext) -> Count:
            """3 D d_h weights, heads of D (N + L_max), and the FLOPs of training, where every token takes every loop."""
            projections, dim = self.projections(context), context.dim
            into, out = (count_linear(projection, context) for projection in projections)
            whole, heads = into + out, self.heads(dim)
            can_cut = not any(projection.chosen(context.linears) for projection in projections)
            grouped = self._grouped_flops(dim) if can_cut else None
            width = self._width_flops(into.flops, out.flops, grouped)
            # Training takes the cheaper way.
            if self.width_compute == "auto" and grouped is not None:
                width = min(width, grouped)
            used = whole.active
            if can_cut and not self.loops:
                used = min(self._num_matrices * dim * self.slice_width(self.hidden_dim) * self.num_choices, used)
            more = heads + dim * (self.norm == "separate" and self.fusion != "depth_only")
            return Count(whole.parameters + more, used + more, whole.flops * self.loops + 2 * heads + width)

        def projections(self, context: BuildContext) -> tuple[Projection, Projection]:
            """Into the hidden units, and out of them."""
            return mlp_projections(context, self.hidden_dim, self.activation)

        @property
        def _num_matrices(self) -> int:
            return activation_of(self.activation).num_matrices

        @property
        def loops(self) -> int:
            """L_max, or 0 without a depth path."""
            return 0 if self.fusion == "width_only" else self.max_loops

        def heads(self, dim: int) -> int:
            """Parameters of the two heads."""
            router = 0 if self.fusion == "depth_only" else self.router.score.num_parameters(dim, self.num_experts)
            return router + dim * self.loops * (self.gate != "none")

        def width_flops(self, dim: int) -> int:
            """FLOPs that the width path adds to a token: k d_e hidden units through all matrices, or all through the last one."""
            matrix = 2 * dim * self.hidden_dim
            return self._width_flops((self._num_matrices - 1) * matrix, matrix, self._grouped_flops(dim))

        def _width_flops(self, into: int, out: int, grouped: int | None) -> int:
            """The same from the FLOPs into and out of the hidden units; ``grouped`` is None where experts cannot be cut out."""
            if self.fusion == "depth_only":
                return 0
            if self.loops and self.norm == "shared" and self.width_compute != "grouped":
                return out
            return into + out if self.width_compute == "masked" or grouped is None else grouped

        def _grouped_flops(self, dim: int) -> int:
            return 2 * self._num_matrices * dim * self.slice_width(self.hidden_dim) * self.num_choices

        def inference_flops(self, dim: int, mean_loops: float, width_share: float) -> float:
            """FLOPs per token of the early exit, heads not counted: loops, and the width path for the share of tokens that take it.

            The paper's formula; where the width path shares the first loop, tokens of one loop add nothing (not in ``width_share``).
            """
            return 2 * self._num_matrices * dim * self.hidden_dim * mean_loops + self.width_flops(dim) * width_share

    def __init__(self, config: Config, context: BuildContext) -> None:
        super().__init__()
        self.config, self.dim = config, context.dim
        self.w13, self.w2 = (build_linear(projection, context) for projection in config.projections(context))
        self.paths = Paths(config, context.dim, config.hidden_dim, layer=context.layer, generator=context.generator)

    @classmethod
    def from_ffn(cls, ffn: SwiGLU | MLP, *, layer: int = 0, **options: Any) -> Self:
        """A versatile feed-forward on the weights of ``ffn`` itself; nothing is copied. ``options`` are fields of the config.

        Raises ConfigError if it is no SwiGLU or MLP, or one of its matrices is replaced or quantised.
        """
        if not isinstance(ffn, SwiGLU | MLP):
            raise ConfigError(
                f"from_ffn needs a SwiGLU or an MLP, this is {type(ffn).__name__}; patch_model wraps those of transformers"
            )
        for name, matrix in (("w13", ffn.w13), ("w2", ffn.w2)):
            if not isinstance(matrix, nn.Linear):
                raise ConfigError(
                    f"from_ffn needs a feed-forward of plain matrices, {name} is a {type(matrix).__name__}"
                )
        weight = ffn.w13.weight
        activation = ffn.config.activation if isinstance(ffn, MLP) else "swiglu"
        config = cls.Config(**{"hidden_dim": ffn.w2.in_features, "activation": activation, **options})
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.config, made.dim, made.w13, made.w2 = config, ffn.w13.in_features, ffn.w13, ffn.w2
        made.paths = Paths(config, made.dim, config.hidden_dim, layer=layer).to(weight)
        return made.train(ffn.training)

    def describe(self) -> FeedForwardForm | str:
        """Slices and loops, mixed by difficulty."""
        config, paths = self.config, self.paths
        if config.activation != "swiglu":
            return f"the activation is {config.activation!r}, not 'swiglu'"
        said = (config.fusion, config.gate, config.norm)
        if said != ("difficulty", "hard", "shared") or paths.router is None or paths.loops is None:
            return (
                f"paths have fusion {config.fusion!r}, gate {config.gate!r} and norm {config.norm!r}, not 'difficulty', 'hard' and "
                "'shared'"
            )
        gate = paths.loops.score.weight
        return Loops(self.w13, self.w2, paths.router, paths.starts, paths.width, gate, config.width_threshold)

    def forward(self, x_BLD: Tensor, context: ForwardContext | None = None) -> Tensor:
        """The plain feed-forward: what one loop adds to the stream, given the normalised stream."""
        return mlp_of(self.w13, self.w2, self.config.activation, x_BLD, context)

    def hidden(self, h_BLD: Tensor, context: ForwardContext | None = None) -> Tensor:
        """a_BLF, the activated hidden units."""
        return activation_of(self.config.activation).apply(call_linear(self.w13, h_BLD, context))

    def add_to(self, x_BLD: Tensor, norm: nn.Module, context: ForwardContext) -> Tensor:
        """Y = lambda Y_width + (1 - lambda) Y_depth."""
        return x_BLD + self.paths(x_BLD.flatten(0, -2), self.branch(norm), context).view_as(x_BLD)

    def branch(self, norm: nn.Module) -> Branch:
        """This feed-forward behind ``norm``, as the paths see it."""
        matrices, activation = (self.w13, self.w2), self.config.activation
        return Branch(
            norm,
            self.hidden,
            self.w2,
            self.dim,
            self.config.hidden_dim,
            num_inputs=len(activation_of(activation).parts),
            # Not quantised, not replaced.
            weights=self._weights if all(map(is_plain, matrices)) else None,
            activation=activation,
            at_once=self,
            is_replaced=any(isinstance(matrix, Linear) and type(matrix) is not Dense for matrix in matrices),
        )

    def _weights(self) -> tuple[Tensor, ...]:
        return *self.w13.weight.chunk(len(activation_of(self.config.activation).parts)), self.w2.weight
