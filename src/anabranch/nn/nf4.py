"""NF4: weights of a frozen base in four bits each, beside which adapters learn (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

    quantize_nf4(model)        # linear layers, in place; routers, norms, embeddings, experts in pools and the head stay as they are

    w = c2 * NF4[code]         of blocks of 64 weights (section 3, eq. 5): the 16 values are quantiles of N(0, 1) with an exact zero, and
                               c2 is the largest of the block in absolute value
    c2 = m + c1 * FP8          double quantisation: c2 of all blocks less their mean m, in 8 bits, with one float32 c1 for 256 of them

That is 4 + 8/64 + 32/(64 * 256) = 4.13 bits a weight, in place of 4.5 with c2 in float32. Both passes compute in the type of what comes in
(bfloat16 in the paper): the matrix is made anew for each and not kept between them.

Departures: FP8 is E4M3 (torch.float8_e4m3fn), where the paper says 8-bit floats and bitsandbytes has a table of its own. It costs trained
weights little, and blocks that are hundreds of times smaller than others more (docs/systems/peft-survey.md has the figures).
"""
# Shapes: N outputs, K inputs, S blocks of 64 weights, G groups of 256 blocks

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.nn.linear import Dense
from anabranch.nn.quantize import FEWEST, FewBitLinear, replace
from anabranch.nn.remade import linear_remade

__all__ = ["BLOCK", "NF4", "Nf4Linear", "quantize_nf4"]

# Section 3 and appendix E of the paper.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Weights that share a c2, and c2 that share a c1.
BLOCK, GROUP = 64, 256
_MOST_FP8 = torch.finfo(torch.float8_e4m3fn).max


class Nf4Linear(FewBitLinear):
    """y = x W^T + b with W in NF4, in place of an ``nn.Linear``. It does not learn; gradients go through it to what comes in.

    Raises ConfigError for a matrix that holds what is no number.

    Attributes:
        code: uint8, two weights in each, the first in the low half.
        scale: c2 of each block: float32 ``[S]``, or with double quantisation float8 ``[S]``.
        group_scale: c1, float32 ``[G]``; None without double quantisation.
        mean: m, float32; None likewise.
        bias: ``[N]``, or None.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None, *, double: bool = True) -> None:
        super().__init__()
        self._sizes = weight_NK.shape[0], weight_NK.shape[1]
        code, scale_S = _packed(weight_NK.detach())
        # The largest of a block is finite where all of it is, in float32 as in what they came in.
        if not bool(scale_S.isfinite().all()):
            raise ConfigError("weights are not finite, for which NF4 has no code; keep this matrix in floating point")
        self.register_buffer("code", code)
        group_scale, mean = None, None
        if double:
            scale_S, group_scale, mean = _halved(scale_S)
        self.register_buffer("scale", scale_S)
        self.register_buffer("group_scale", group_scale)
        self.register_buffer("mean", mean)
        self.register_buffer("bias", None if bias_N is None else bias_N.detach().clone())

    code: Tensor
    scale: Tensor
    group_scale: Tensor | None
    mean: Tensor | None

    @property
    def in_features(self) -> int:
        """K."""
        return self._sizes[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self._sizes[0]

    @property
    def size_bytes(self) -> int:
        """Memory of the matrix."""
        parts = (self.code, self.scale, self.group_scale, self.mean)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """See `FewBitLinear`."""
        scale_S = self.scale.float()
        if self.group_scale is not None and self.mean is not None:
            scale_S = scale_S * self.group_scale.repeat_interleave(GROUP)[: len(scale_S)] + self.mean
        index = torch.stack((self.code & 15, self.code >> 4), dim=-1).flatten().int()
        table = torch.tensor(NF4, device=self.code.device)
        weight = (table[index].view(-1, BLOCK) * scale_S[:, None]).to(dtype).flatten()
        return weight[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """``[..., K]`` to ``[..., N]`` in the dtype of ``x``."""
        return linear_remade(x, self.weight_in, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, double={self.mean is not None}"


@torch.no_grad()
def quantize_nf4(model: nn.Module, *, double: bool = True) -> list[str]:
    """Replace the linear layers of ``model`` by `Nf4Linear`, in place, but for the head; the names of what was replaced.

    Those of fewer than 16 outputs stay too. Raises ConfigError for a model without such layers, and for weights that are no numbers; the
    model is then as it was.
    """
    # A class made of a linear layer computes something of its own, which its matrix alone does not say.
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (Dense, nn.Linear) and name != "head" and module.out_features >= FEWEST
    }
    if not found:
        raise ConfigError(f"quantize is 'nf4', but {type(model).__name__} has no linear layer that can be in NF4")
    odd = next((name for name, module in found.items() if not bool(module.weight.isfinite().all())), None)
    if odd is not None:
        raise ConfigError(f"{odd} has weights that are no numbers, for which NF4 has no code")
    for name, plain in found.items():
        replace(model, name, Nf4Linear(plain.weight, plain.bias, double=double).train(plain.training))
    return list(found)


def _packed(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(code, scale_S): the nearest of the 16 values to each weight over the largest of its block."""
    flat = weight_NK.float().flatten()
    block_SB = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale_S = block_SB.abs().amax(1)
    normal_SB = block_SB / scale_S.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    table = torch.tensor(NF4, device=flat.device)
    code = torch.bucketize(normal_SB, (table[1:] + table[:-1]) / 2).to(torch.uint8).flatten()
    return code[0::2] | (code[1::2] << 4), scale_S


def _halved(scale_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(FP8 of each scale, c1 of each group, mean): double quantisation."""
    mean = scale_S.mean()
    if not bool(mean.isfinite()):
        # The sum of finite weights may not be, and their mean is.
        mean = scale_S.double().mean().float()
    centred_GW = F.pad(scale_S - mean, (0, -len(scale_S) % GROUP)).view(-1, GROUP)
    group_G = centred_GW.abs().amax(1) / _MOST_FP8
    eighth_GW = centred_GW / group_G.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return eighth_GW.flatten()[: len(scale_S)].to(torch.float8_e4m3fn), group_G, mean
