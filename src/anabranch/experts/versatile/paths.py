"""The two paths of VersatileFFN over any feed-forward: virtual experts (width), loops (depth), and their mix by difficulty.

`Paths` holds the two small heads and nothing else. The weights are the feed-forward's: it is described by a `Branch`, a handful of
functions, so our own SwiGLU and the MLPs of other libraries go through the same code. Everything is computed as the *change* of the
residual stream, Y - H, since some blocks add the stream themselves.

The first loop computes all hidden units of the full feed-forward, and a virtual expert's are a slice of them (see `width_path`), so the
width path needs no matmul of its own into the hidden layer. Where many tokens take all loops, as in training, running the chosen
experts on their own may be cheaper.
"""
# Shapes: N items, D width, F hidden, E virtual experts, K of them per token, T = max_loops, S = d_e width of a virtual expert

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anabranch.experts.versatile.branch import Branch
from anabranch.experts.versatile.early_exit import EarlyExit
from anabranch.experts.versatile.loop_gate import LoopGate
from anabranch.experts.versatile.width_path import WidthPath
from anabranch.nn.weighted import weighted_sum
from anabranch.routing import Routing, RoutingContext
from anabranch.routing.balance import masked_mean
from anabranch.routing.relax import straight_through

if TYPE_CHECKING:
    from anabranch.experts.versatile.layer import VersatileFFN

# Items for which virtual experts are cut from the weights.
MANY = 256


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


class Paths(WidthPath):
    """The heads, and the compute of both paths. ``config`` is a `VersatileFFN.Config`; ``options`` are ``layer`` and ``generator``.

    Attributes, beside those of the width path:
        loops: the loop gate; None for width only, and where every token takes every loop.
        count_T: 1 to the number of loops.
    """

    count_T: Tensor

    def __init__(self, config: "VersatileFFN.Config", dim: int, hidden_dim: int, **options: Any) -> None:
        super().__init__(config, dim, hidden_dim, **options)
        self.num_loops = config.loops
        self.loops: LoopGate | None = None
        if self.num_loops and config.gate != "none":
            self.loops = LoopGate(config, dim, **options)
        self.register_buffer("count_T", torch.arange(1, self.num_loops + 1), persistent=False)

    def forward(self, x_ND: Tensor, branch: Branch, context: RoutingContext) -> Tensor:
        """The change of the stream, Y - H."""
        # Shapes of the early exit depend on data, and it writes in place: not for compiled graphs, not for gradients.
        needs_all = context.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        exits = self.num_loops > 0 and self.config.early_exit and not needs_all
        mix = self.decide(x_ND, context, one_hot=not exits)
        if exits:
            change_ND = EarlyExit(self, branch, mix, context).change(x_ND)
        else:
            change_ND = self._all_loops(x_ND, branch, mix, context)
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
            first, last = int(self.is_fused(branch)), self.last_wide
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
    def last_wide(self) -> int:
        """The most loops that a token with a width path may take: in a hard mix by difficulty its lambda must exceed the threshold."""
        config, total = self.config, self.num_loops
        if config.fusion != "difficulty" or config.gate != "hard":
            return total
        return sum((total - number) / total > config.width_threshold for number in range(1, total + 1))

    def is_fused(self, branch: Branch) -> bool:
        """Whether a token that ends after one loop takes both paths in one product."""
        return self.is_masked and branch.after is None and not branch.is_replaced

    def _masks_all(self, branch: Branch, num_items: int) -> bool:
        """Whether it does so where all items take all loops: not if they pay for cutting out the experts, which have fewer FLOPs."""
        own = num_items >= MANY and self.is_grouped(branch) and self.grouped_flops(branch) <= branch.output_flops
        return self.is_masked and not own

    def most_flops(self, branch: Branch, num_items: int) -> int:
        """Of a token that takes all loops and both paths."""
        own = self.is_masked and not self._masks_all(branch, num_items)
        return (self.grouped_flops(branch) if own else self.width_flops(branch)) + branch.flops * self.num_loops

    def width_flops(self, branch: Branch) -> int:
        """What the width path adds for a token, beside the first loop that it may share."""
        if self.router is None:
            return 0
        if self.is_masked:
            return branch.output_flops
        if not self.is_grouped(branch):
            return branch.flops
        return self.grouped_flops(branch)

    # All loops for all tokens: training, and the plain way that the early exit must equal

    def _all_loops(self, x_ND: Tensor, branch: Branch, mix: Mix, context: RoutingContext) -> Tensor:
        """The change of the stream."""
        if not self.num_loops:
            assert mix.width is not None
            return self.width_change(x_ND, branch, mix.width, context)
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
            wide_ND = self.width_change(x_ND, branch, mix.width, context)
        weight_NC = torch.cat((mix.lambda_N1, (1 - mix.lambda_N1) * depth_NT), dim=1)
        return weighted_sum([wide_ND.to(states[0].dtype), *states], weight_NC)

    def _loop(self, run: Callable[..., Any], branch: Branch, context: RoutingContext, *inputs: Tensor | None) -> Any:
        """One loop; with ``recompute`` its activations are not kept, and what it emits counts once."""
        if not (self.config.recompute and torch.is_grad_enabled()):
            return run(branch, context, *inputs)
        if not branch.is_replaced:
            return checkpoint(run, branch, None, *inputs, use_reentrant=False)
        before = context.fork()

        def forked(carry: dict[str, Any], *inputs: Tensor | None) -> tuple[Any, RoutingContext]:
            local = before.fork(carry)
            return run(branch, local, *inputs), local

        made, local = checkpoint(forked, dict(context.carry), *inputs, use_reentrant=False)
        context.take_over(local)
        return made


def _first(branch: Branch, context: Any, x_ND: Tensor, gate_NF: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The first loop, and with gates from its hidden units the width path."""
    if gate_NF is None:
        return branch.change(x_ND, context).to(x_ND.dtype), None
    a_NF = branch.hidden(branch.norm(x_ND), context)
    return branch.output(a_NF, context).to(x_ND.dtype), branch.output(gate_NF.to(a_NF.dtype) * a_NF, context)


def _further(branch: Branch, context: Any, x_ND: Tensor, state_ND: Tensor) -> Tensor:
    """H^(l) - H from H^(l-1) - H."""
    return state_ND + branch.change(x_ND + state_ND, context)
