"""The two paths of VersatileFFN over any feed-forward: virtual experts (width), loops (depth), and their mix by difficulty.

`Paths` holds the two small heads and nothing else. The weights are the feed-forward's: it is described by a `Branch`, a handful of
functions, so our own SwiGLU and the MLPs of other libraries go through the same code. Everything is computed as the *change* of the
residual stream, Y - H, since some blocks add the stream themselves.

The first loop computes all hidden units a = phi(W_in norm(H)) of the full feed-forward, and a virtual expert's are a slice of them. So the
width path needs no matmul of its own into the hidden layer:

    sum_j g_j f_j(H) = W_out (m * a),      m_i = the sum of g_j over the experts j that own hidden unit i

Where many tokens take all loops, as in training, running the chosen experts on their own is the same sum and may be cheaper: k d_e hidden
units through three matrices against all of them through one.
"""
# Shapes: N items, D width, F hidden, E virtual experts, K of them per token, T = max_loops, S = d_e width of a virtual expert

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anabranch.experts.versatile.loop_gate import LoopGate
from anabranch.nn.grouped import expert_mlp
from anabranch.nn.items import on_items
from anabranch.nn.linear import call_linear
from anabranch.nn.norm import RMSNorm
from anabranch.nn.weighted import weighted_sum
from anabranch.precision import full_precision
from anabranch.routing import Router, Routing, RoutingContext, plan_dispatch
from anabranch.routing.balance import masked_mean
from anabranch.routing.relax import straight_through

if TYPE_CHECKING:
    from anabranch.experts.versatile.layer import VersatileFFN

# Items for which virtual experts are cut from the weights.
MANY = 256

# Gate [F, D] where there is one, up [F, D], down [D, F].
Weights = tuple[Tensor, ...]
Layer = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Branch:
    """A feed-forward as the paths see it: f(H) = after(down(hidden(norm(H)))).

    Attributes:
        norm: the block's norm before the feed-forward.
        hidden: ``[N, D] -> [N, F]``, the activated hidden units; called with the rows and a forward context of them.
        down: ``[N, F] -> [N, D]``.
        after: the block's norm behind the feed-forward, where it has one (OLMo 2).
        dim: D.
        hidden_dim: F.
        num_inputs: matrices into the hidden layer, 2 with a gate.
        weights: what leads into the hidden units (gate and up, or up alone), and down, without biases; None where they cannot be cut.
        activation: between them, see `anabranch.nn.activation`.
        whole: down(hidden(h)) at once, where that is quicker than the two.
        asks: whether a matrix was replaced: it may ask what rows it is given, and need not be a linear map.
    """

    norm: Callable[[Tensor], Tensor]
    hidden: Layer
    down: nn.Module
    dim: int
    hidden_dim: int
    after: Callable[[Tensor], Tensor] | None = None
    num_inputs: int = 2
    weights: Callable[[], Weights] | None = None
    activation: str = "swiglu"
    whole: Layer | None = None
    asks: bool = False

    def output(self, a_NF: Tensor, context: Any = None) -> Tensor:
        """From hidden units to the change of the stream."""
        y_ND = call_linear(self.down, a_NF, context)
        return y_ND if self.after is None else self.after(y_ND)

    def change(self, x_ND: Tensor, context: Any = None) -> Tensor:
        """f(H) for the stream ``x_ND``."""
        h_ND = self.norm(x_ND)
        if self.whole is not None and self.after is None:
            return self.whole(h_ND, context)
        return self.output(self.hidden(h_ND, context), context)

    @property
    def flops(self) -> int:
        """Of one pass, per token."""
        return 2 * self.dim * self.hidden_dim * (self.num_inputs + 1)

    @property
    def output_flops(self) -> int:
        """Of the second matrix alone."""
        return 2 * self.dim * self.hidden_dim


@dataclass(frozen=True)
class Mix:
    """What the heads decided.

    Attributes:
        width: virtual experts of each item; None without a width path.
        depth_NT: weight of the state after each number of loops; None if it is the last one's for all, or without a depth path.
        loops_N: int64, the loops that count; ``depth_NT`` is one-hot there unless it is soft.
        lambda_N1: share of the width path.
    """

    width: Routing | None
    depth_NT: Tensor | None
    loops_N: Tensor
    lambda_N1: Tensor


class Paths(nn.Module):
    """The heads, and the compute of both paths. ``config`` is a `VersatileFFN.Config`.

    Attributes:
        router: scores the virtual experts by the un-normalised stream; None for depth only.
        loops: the loop gate; None for width only, and where every token takes every loop.
        width_norm: the width path's own norm, None if it shares the block's.
        owner_EF: 1 where a virtual expert owns a hidden unit.
        count_T: 1 to the number of loops.
    """

    owner_EF: Tensor
    count_T: Tensor

    def __init__(
        self,
        config: "VersatileFFN.Config",
        dim: int,
        hidden_dim: int,
        *,
        layer: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.starts, self.width = config.slice_starts(hidden_dim), config.slice_width(hidden_dim)
        self.router: Router | None = None
        self.loops: LoopGate | None = None
        self.width_norm: RMSNorm | None = None
        self.num_loops = config.loops
        if config.fusion != "depth_only":
            self.router = config.router.build(dim, config.num_experts, layer=layer, generator=generator)
            self.width_norm = RMSNorm(dim) if config.norm == "separate" else None
        if self.num_loops and config.gate != "none":
            self.loops = LoopGate(config, dim, layer=layer, generator=generator)
        owner_EF = torch.zeros(config.num_experts, hidden_dim)
        for owner_F, start in zip(owner_EF, self.starts, strict=True):
            owner_F[start : start + self.width] = 1.0
        self.register_buffer("owner_EF", owner_EF, persistent=False)
        self.register_buffer("count_T", torch.arange(1, self.num_loops + 1), persistent=False)

    def forward(self, x_ND: Tensor, branch: Branch, context: RoutingContext) -> Tensor:
        """The change of the stream, Y - H."""
        # Shapes of the early exit depend on data, and it writes in place: not for compiled graphs, not for gradients.
        whole = context.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        exits = self.num_loops > 0 and self.config.early_exit and not whole
        mix = self.decide(x_ND, context, one_hot=not exits)
        change_ND = (self._early_exit if exits else self._all_loops)(x_ND, branch, mix, context)
        if context.is_measured:
            self._emit(mix, branch, context, exits=exits)
        return change_ND.to(x_ND.dtype)

    # Decisions

    def decide(self, x_ND: Tensor, context: RoutingContext, *, one_hot: bool = True) -> Mix:
        """Run the heads. Without ``one_hot`` no ``depth_NT`` is made: a number of loops is all that the early exit needs."""
        config, num_items = self.config, x_ND.shape[0]
        width = None if self.router is None else self.router(x_ND, context)
        share = {"width_only": 1.0, "average": 0.5, "depth_only": 0.0, "difficulty": None}[config.fusion]
        if self.loops is None:
            loops_N = torch.full((num_items,), self.num_loops, device=x_ND.device)
            return Mix(width, None, loops_N, torch.full_like(x_ND[:, :1], share))  # type: ignore[arg-type]  # 'difficulty' needs a gate
        chosen = self.loops(x_ND, context)
        soft_NT, loops_N = chosen.score_NE, chosen.index_NK[:, 0] + 1
        depth_NT = None
        if one_hot:
            is_soft = config.relaxation == "soft" and context.training
            depth_NT = soft_NT if is_soft else straight_through(soft_NT, chosen.index_NK)
        if share is not None:
            return Mix(width, depth_NT, loops_N, soft_NT.new_full((num_items, 1), share))
        weight_NT = soft_NT if config.gate == "soft" else depth_NT
        if weight_NT is None:
            expected_N1 = loops_N.unsqueeze(-1).to(soft_NT.dtype)
        else:
            expected_N1 = (weight_NT * self.count_T).sum(-1, keepdim=True)
        lambda_N1 = (config.max_loops - expected_N1) / config.max_loops  # eq. 12
        if config.width_threshold and not context.training:
            lambda_N1 = lambda_N1.masked_fill(lambda_N1 <= config.width_threshold, 0.0)
        return Mix(width, depth_NT, loops_N, lambda_N1)

    def _emit(self, mix: Mix, branch: Branch, context: RoutingContext, *, exits: bool) -> None:
        """Means over the real tokens: lambda, loops and how they are distributed, FLOPs of the layer's matrices."""
        dtype = mix.lambda_N1.dtype
        taken_NT = (mix.loops_N.unsqueeze(-1) == self.count_T).to(dtype)
        mean_X = masked_mean(torch.cat([mix.lambda_N1.detach(), taken_NT], dim=-1), context.item_mask_N)
        share_T = mean_X[1:]
        mean_loops = (share_T * self.count_T).sum()
        flops = torch.full_like(mean_X[0], self.most_flops(branch, len(mix.loops_N)))
        if exits:
            # Tokens of more loops have no width path, and a fused one of one loop costs nothing more.
            first, last = int(self._is_fused(branch)), self._last_wide
            flops = branch.flops * mean_loops + self.width_flops(branch) * share_T[first:last].sum()
        for name, value in (("mean_lambda", mean_X[0]), ("mean_loops", mean_loops), ("ffn_flops", flops)):
            context.emit_metric(name, value)
        for number, value in enumerate(share_T.unbind(0), start=1):
            context.emit_metric(f"share_loops_{number}", value)

    # The width path

    @property
    def is_masked(self) -> bool:
        """Whether the width path may mask the hidden units of the first loop, and has no matmul into the hidden layer of its own."""
        wanted = self.config.width_compute != "grouped" and self.width_norm is None
        return wanted and self.router is not None and self.num_loops > 0

    @property
    def _last_wide(self) -> int:
        """The most loops that a token with a width path may take: in a hard mix by difficulty its lambda must exceed the threshold."""
        config, total = self.config, self.num_loops
        if config.fusion != "difficulty" or config.gate != "hard":
            return total
        return sum((total - number) / total > config.width_threshold for number in range(1, total + 1))

    def _is_fused(self, branch: Branch) -> bool:
        """Whether a token that ends after one loop takes both paths in one product."""
        return self.is_masked and branch.after is None and not branch.asks

    def _masks_all(self, branch: Branch, num_items: int) -> bool:
        """Whether it does so where all items take all loops: not if they pay for cutting out the experts, which have fewer FLOPs."""
        own = num_items >= MANY and self._is_grouped(branch) and self._grouped_flops(branch) <= branch.output_flops
        return self.is_masked and not own

    def most_flops(self, branch: Branch, num_items: int) -> int:
        """Of a token that takes all loops and both paths."""
        own = self.is_masked and not self._masks_all(branch, num_items)
        return (self._grouped_flops(branch) if own else self.width_flops(branch)) + branch.flops * self.num_loops

    def width_flops(self, branch: Branch) -> int:
        """What the width path adds for a token, beside the first loop that it may share."""
        if self.router is None:
            return 0
        if self.is_masked:
            return branch.output_flops
        if not self._is_grouped(branch):
            return branch.flops
        return self._grouped_flops(branch)

    def _grouped_flops(self, branch: Branch) -> int:
        return 2 * branch.dim * self.width * self.config.num_choices * (branch.num_inputs + 1)

    def _is_grouped(self, branch: Branch) -> bool:
        return branch.weights is not None and self.config.width_compute != "masked"

    def gate_NF(self, width: Routing, dtype: torch.dtype) -> Tensor:
        """m: for each hidden unit the gates of the chosen experts that own it, summed."""
        gate_NE = torch.zeros_like(width.score_NE).scatter_add(1, width.index_NK.clamp_min(0), width.weight_NK)
        with full_precision(gate_NE.device.type):
            return (gate_NE @ self.owner_EF.to(gate_NE.dtype)).to(dtype)

    def _wide(self, x_ND: Tensor, branch: Branch, width: Routing, context: Any = None) -> Tensor:
        """sum_j g_j f_j(H), on its own."""
        norm = branch.norm if self.width_norm is None else self.width_norm
        h_ND = norm(x_ND)
        if not self._is_grouped(branch):
            a_NF = branch.hidden(h_ND, context)
            return branch.output(self.gate_NF(width, a_NF.dtype) * a_NF, context)
        w13_ESD, w2_EDS = self.stacked(branch)
        plan, backend, activation = plan_dispatch(width), self.config.backend, branch.activation
        y_ND = expert_mlp(h_ND, plan, width.weight_NK, w13_ESD, w2_EDS, backend=backend, activation=activation)
        return y_ND if branch.after is None else branch.after(y_ND)

    def stacked(self, branch: Branch) -> tuple[Tensor, Tensor]:
        """The virtual experts as a stacked pool: w13 ``[E, 2 d_e, D]`` (``[E, d_e, D]`` without a gate) and w2 ``[E, D, d_e]``.

        Where slices are contiguous w2 is a view.
        """
        assert branch.weights is not None
        *inputs, down_DF = branch.weights()
        width, count = self.width, len(self.starts)
        slices = [slice(start, start + width) for start in self.starts]
        if self.starts == tuple(range(0, count * width, width)):
            parts = [weight[: count * width].unflatten(0, (count, width)) for weight in inputs]
            w2_EDS = down_DF[:, : count * width].unflatten(1, (count, width)).transpose(0, 1)
        else:
            parts = [torch.stack([weight[part] for part in slices]) for weight in inputs]
            w2_EDS = torch.stack([down_DF[:, part] for part in slices])
        return torch.cat(parts, dim=1), w2_EDS

    # All loops for all tokens: training, and the plain way that the early exit must equal

    def _all_loops(self, x_ND: Tensor, branch: Branch, mix: Mix, context: RoutingContext) -> Tensor:
        """The change of the stream."""
        if not self.num_loops:
            assert mix.width is not None
            return self._wide(x_ND, branch, mix.width, context)
        gate_NF = None
        if mix.width is not None and self._masks_all(branch, x_ND.shape[0]):
            gate_NF = self.gate_NF(mix.width, x_ND.dtype)
        state_ND, wide_ND = self._loop(_first, branch, context, x_ND, gate_NF)
        states = [state_ND]
        for _ in range(1, self.num_loops):
            states.append(self._loop(_further, branch, context, x_ND, states[-1]))
        # The last state counts for all.
        if mix.depth_NT is None:
            states, depth_NT = states[-1:], torch.ones_like(mix.lambda_N1)
        else:
            depth_NT = mix.depth_NT
        if mix.width is None:
            return states[0] if mix.depth_NT is None else weighted_sum(states, depth_NT)
        if wide_ND is None:
            wide_ND = self._wide(x_ND, branch, mix.width, context)
        weight_NC = torch.cat((mix.lambda_N1, (1 - mix.lambda_N1) * depth_NT), dim=1)
        return weighted_sum([wide_ND.to(states[0].dtype), *states], weight_NC)

    def _loop(self, run: Callable[..., Any], branch: Branch, context: RoutingContext, *inputs: Tensor | None) -> Any:
        """One loop; with ``recompute`` its activations are not kept, and what it emits counts once."""
        if not (self.config.recompute and torch.is_grad_enabled()):
            return run(branch, context, *inputs)
        if not branch.asks:
            return checkpoint(run, branch, None, *inputs, use_reentrant=False)
        before = context.fork()

        def forked(carry: dict[str, Tensor], *inputs: Tensor | None) -> tuple[Any, RoutingContext]:
            local = before.fork(carry)
            return run(branch, local, *inputs), local

        made, local = checkpoint(forked, dict(context.carry), *inputs, use_reentrant=False)
        context.take_over(local)
        return made

    # Every token only as far as it goes

    def _early_exit(self, x_ND: Tensor, branch: Branch, mix: Mix, context: RoutingContext) -> Tensor:
        """As `_all_loops`. Tokens are sorted by loops, most first: those still looping are a prefix, those with a width path a suffix.

        Tokens that end after one loop take both paths in one product with W_out, since both mix the same hidden units (``[begin:]``).
        """
        num_items = x_ND.shape[0]
        count = torch.bincount(mix.loops_N, minlength=self.num_loops + 1).tolist()
        # Take more than ``number`` loops.
        active = [num_items - sum(count[: number + 1]) for number in range(self.num_loops)]
        # Nothing to sort: a single token, or all alike.
        is_even = max(count) == num_items
        is_sorted = branch.asks or not is_even
        order_N: Any = mix.loops_N.argsort(descending=True, stable=True) if is_sorted else slice(None)

        def run(layer: Layer, x_RD: Tensor, begin: int = 0, end: int = num_items) -> Tensor:
            """A layer on the sorted items from ``begin`` to ``end``."""
            return on_items(layer, x_RD, context, order_N[begin:end], num_items) if branch.asks else layer(x_RD, None)

        x_ND, share_N1 = x_ND[order_N], mix.lambda_N1[order_N].to(x_ND.dtype)
        # [narrow:] have a width path.
        narrow = num_items
        if mix.width is not None:
            narrow = num_items - sum(count[: self._last_wide + 1])
        begin = max([*active[1:2], narrow]) if self._is_fused(branch) else num_items
        a_NF = run(branch.hidden, branch.norm(x_ND))
        wide_XD = None
        if mix.width is None or narrow == num_items:
            state_ND = run(branch.output, a_NF).to(x_ND.dtype)
        elif self.is_masked and branch.asks:
            gate_XF = self.gate_NF(_rows(mix.width, order_N, narrow), a_NF.dtype)
            state_ND = run(branch.output, a_NF).to(x_ND.dtype)
            wide_XD = run(branch.output, gate_XF * a_NF[narrow:], narrow).to(x_ND.dtype)
        elif self.is_masked:
            gate_XF = self.gate_NF(_rows(mix.width, order_N, narrow), a_NF.dtype)
            share = share_N1[begin:].to(a_NF.dtype)
            mixed = (share * gate_XF[begin - narrow :] + (1 - share)) * a_NF[begin:]
            rows = (a_NF[:begin], mixed, gate_XF[: begin - narrow] * a_NF[narrow:begin])
            state_ND, wide_XD = branch.output(torch.cat(rows)).to(x_ND.dtype).split((num_items, begin - narrow))
        else:
            state_ND = run(branch.output, a_NF).to(x_ND.dtype)
            width = _rows(mix.width, order_N, narrow)
            wide_XD = run(lambda x_XD, part: self._wide(x_XD, branch, width, part), x_ND[narrow:], narrow)
        for number in active[1:]:
            if number:
                state_ND[:number] += run(branch.change, x_ND[:number] + state_ND[:number], 0, number)
        if wide_XD is not None and begin > narrow:
            share = share_N1[narrow:begin]
            state_ND[narrow:begin] = share * wide_XD + (1 - share) * state_ND[narrow:begin]
        return state_ND if not is_sorted else torch.empty_like(state_ND).index_copy(0, order_N, state_ND)


def _first(branch: Branch, context: Any, x_ND: Tensor, gate_NF: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The first loop, and with gates from its hidden units the width path."""
    if gate_NF is None:
        return branch.change(x_ND, context).to(x_ND.dtype), None
    a_NF = branch.hidden(branch.norm(x_ND), context)
    return branch.output(a_NF, context).to(x_ND.dtype), branch.output(gate_NF.to(a_NF.dtype) * a_NF, context)


def _further(branch: Branch, context: Any, x_ND: Tensor, state_ND: Tensor) -> Tensor:
    """H^(l) - H from H^(l-1) - H."""
    return state_ND + branch.change(x_ND + state_ND, context)


def _rows(routing: Routing, order_N: Any, start: int) -> Routing:
    """The items from ``start`` on, in that order."""
    parts = (routing.index_NK, routing.weight_NK, routing.score_NE)
    return Routing(*(part[order_N][start:] for part in parts))
