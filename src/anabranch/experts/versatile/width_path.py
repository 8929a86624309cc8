"""The width path of VersatileFFN: virtual experts that are slices of one feed-forward, and the router that chooses among them.

The full feed-forward computes all hidden units a = phi(W_in norm(H)), and a virtual expert's are a slice of them:

    sum_j g_j f_j(H) = W_out (m * a),      m_i = the sum of g_j over the experts j that own hidden unit i

Running the chosen experts on their own is the same sum: k d_e hidden units through three matrices against all of them through one.
"""
# Shapes: N items, D width, F hidden, E virtual experts, K of them per token, S = d_e width of a virtual expert

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anabranch.experts.versatile.branch import Branch
from anabranch.nn.grouped import expert_mlp
from anabranch.nn.norm import RMSNorm
from anabranch.precision import full_precision
from anabranch.routing import Router, Routing, plan_dispatch

if TYPE_CHECKING:
    from anabranch.experts.versatile.layer import VersatileFFN

__all__ = ["WidthPath"]


class WidthPath(nn.Module):
    """The router of virtual experts, and their compute. ``config`` is a `VersatileFFN.Config`.

    Attributes:
        router: scores the virtual experts by the un-normalised stream; None for depth only.
        width_norm: the width path's own norm, None if it shares the block's.
        starts: the first hidden unit of each virtual expert.
        width: d_e.
        owner_EF: 1 where a virtual expert owns a hidden unit.
    """

    owner_EF: Tensor

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
        self.width_norm: RMSNorm | None = None
        if config.fusion != "depth_only":
            self.router = config.router.build(dim, config.num_experts, layer=layer, generator=generator)
            self.width_norm = RMSNorm(dim) if config.norm == "separate" else None
        owner_EF = torch.zeros(config.num_experts, hidden_dim)
        for owner_F, start in zip(owner_EF, self.starts, strict=True):
            owner_F[start : start + self.width] = 1.0
        self.register_buffer("owner_EF", owner_EF, persistent=False)

    def width_change(self, x_ND: Tensor, branch: Branch, width: Routing, context: Any = None) -> Tensor:
        """sum_j g_j f_j(H), with a matmul of its own into the hidden layer; ``width`` is the routing."""
        norm = branch.norm if self.width_norm is None else self.width_norm
        h_ND = norm(x_ND)
        if not self.is_grouped(branch):
            a_NF = branch.hidden(h_ND, context)
            return branch.output(self.gate_NF(width, a_NF.dtype) * a_NF, context)
        w13_ESD, w2_EDS = self.stacked(branch)
        plan, backend, activation = plan_dispatch(width), self.config.backend, branch.activation
        y_ND = expert_mlp(h_ND, plan, width.weight_NK, w13_ESD, w2_EDS, backend=backend, activation=activation)
        return y_ND if branch.after is None else branch.after(y_ND)

    def gate_NF(self, width: Routing, dtype: torch.dtype) -> Tensor:
        """m: for each hidden unit the gates of the chosen experts that own it, summed."""
        gate_NE = torch.zeros_like(width.score_NE).scatter_add(1, width.index_NK.clamp_min(0), width.weight_NK)
        with full_precision(gate_NE.device.type):
            return (gate_NE @ self.owner_EF.to(gate_NE.dtype)).to(dtype)

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

    def grouped_flops(self, branch: Branch) -> int:
        """Of the chosen experts run on their own, per token."""
        return 2 * branch.dim * self.width * self.config.num_choices * (branch.num_inputs + 1)

    def is_grouped(self, branch: Branch) -> bool:
        """Whether the experts may be cut from the weights and run on their own."""
        return branch.weights is not None and self.config.width_compute != "masked"
