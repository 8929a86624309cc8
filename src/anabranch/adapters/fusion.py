"""`AdapterFusion`: attention of a matrix's output over what several adapters behind it make of it (Pfeiffer et al. 2021, arXiv 2005.00247).

    z_k = U_k act(D_k y + e_k) + f_k
    s   = softmax over k of (Q y) . (K z_k)
    y  <- y + V sum_k s_k z_k

The adapters were trained one by one, each for its own task (`SerialBottleneck`), and stay as they are while Q, K and V learn; or they learn
with them. Behind the last matrix of a feed-forward layer (``down``) it is the paper's.
"""
# Shapes: O outputs, E adapters, M widths of all adapters together; y is [..., O]

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.bottleneck import ACTIVATIONS
from anabranch.adapters.low_rank import draw_a
from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection, Rows

__all__ = ["AdapterFusion"]

# Of Q and K, and of V beside its diagonal, as the reference starts them (adapter-hub/adapters, Apache-2.0).
_SPREAD, _BESIDE = 0.02, 1e-6


class AdapterFusion(Linear, kind="adapter_fusion"):
    """See above. U and f are zero at first, so it is y."""

    @configclass
    class Config(Linear.Config):
        """Its numbers.

        Attributes:
            widths: of each adapter.
            activation: what is between the two matrices of an adapter.
            value_penalty: in training, this times the squared distance of V from the identity is added to the loss, mean over matrices
                that have rows in the pass: as an expert's are none where no token is its own.
        """

        is_added: ClassVar[bool] = True

        widths: tuple[Size, ...] = Field(default=(64, 64), min_length=1)
        activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
        value_penalty: float = Field(default=0.01, ge=0)

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """2 M O + 3 O^2 weights, and M + E O of biases."""
            total, outputs = sum(self.widths), projection.out_dim
            biases = total + len(self.widths) * outputs
            return Count.dense(2 * total * outputs + 3 * outputs**2) + Count(biases, biases, 0)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        total, outputs = sum(config.widths), projection.out_dim
        self.down = nn.Parameter(torch.empty(total, outputs))
        self.down_bias = nn.Parameter(torch.zeros(total))
        self.up = nn.Parameter(torch.zeros(outputs, total))
        self.up_bias = nn.Parameter(torch.zeros(len(config.widths), outputs))
        draw_a(self.down.data, context.generator)
        self.query, self.key = (nn.Parameter(torch.empty(outputs, outputs)) for _ in range(2))
        self.value = nn.Parameter(torch.full((outputs, outputs), _BESIDE).fill_diagonal_(1.0))
        for matrix in (self.query, self.key):
            if not matrix.is_meta:
                nn.init.normal_(matrix, std=_SPREAD, generator=context.generator)

    def adapted(self, y: Tensor) -> Tensor:
        """z ``[..., E, O]``: what each adapter makes of y."""
        low = ACTIVATIONS[self.config.activation](F.linear(y, self.down, self.down_bias))
        widths = list(self.config.widths)
        parts = zip(low.split(widths, -1), self.up.split(widths, 1), self.up_bias, strict=True)
        return torch.stack([F.linear(part, up_OM, bias_O) for part, up_OM, bias_O in parts], dim=-2)

    def weights(self, y: Tensor, z: Tensor) -> Tensor:
        """s ``[..., E]``: how much each adapter counts."""
        # (Q y) . (K z) is (K^T Q y) . z, which is one product for all adapters.
        asked = F.linear(F.linear(y, self.query), self.key.T)
        return (z * asked.unsqueeze(-2)).sum(-1).softmax(-1)

    def around(self, rows: Rows, context: Any = None) -> Tensor:
        """y. It is computed in the adapters' type, which may be wider than that of the matrix."""
        y = rows.y.to(self.down.dtype)
        z = self.adapted(y)
        mixed = torch.einsum("nkd,nk->nd", z.flatten(0, -3), self.weights(y, z).flatten(0, -2)).view_as(y)
        # As an expert without rows is not called: what has no part in a pass has none in its loss.
        if context is not None and context.training and self.config.value_penalty and y.numel():
            apart = self.value - torch.eye(len(self.value), dtype=self.value.dtype, device=self.value.device)
            context.emit_loss("fusion_value", self.config.value_penalty * apart.square().sum())
        return (y + F.linear(mixed, self.value)).to(rows.y.dtype)

    @torch.no_grad()
    def take(self, number: int, down_MO: Tensor, down_bias_M: Tensor, up_OM: Tensor, up_bias_O: Tensor) -> None:
        """Take over one adapter's numbers, those of a `SerialBottleneck`, as the ``number``-th."""
        first = sum(self.config.widths[:number])
        own = slice(first, first + self.config.widths[number])
        self.down[own], self.down_bias[own] = down_MO, down_bias_M
        self.up[:, own], self.up_bias[number] = up_OM, up_bias_O

    def freeze_adapters(self) -> None:
        """Let Q, K and V alone learn."""
        for parameter in (self.down, self.down_bias, self.up, self.up_bias):
            parameter.requires_grad_(False)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"out={len(self.value)}, widths={list(self.config.widths)}, {self.config.activation}"
