"""`AdapterInventory`: K skills of one linear layer, each of q heads, and the one adapter that weights make of them.

    A[h] in R^{K x din/q x r}, B[h] in R^{K x r x dout/q}
    A_tau[h] = sum_k alpha[h,k] A[h,k];  B_tau[h] = sum_k alpha[h,k] B[h,k]        heads side by side along din and dout
    y = scale (x A_tau) B_tau

Weights are merged first, so a product of halves of two skills is in it: it is no sum of outputs (`outputs_of` is that, for one head).
"""
# Shapes: U adapters to merge, q heads, K skills, C inputs, O outputs, R rank, N items, B rows, L positions

import math

import torch
from torch import Tensor, nn

from anabranch.adapters.low_rank import Pair
from anabranch.adapters.mhr.product import merged_halves
from anabranch.errors import ConfigError

__all__ = ["AdapterInventory", "check_heads"]


def check_heads(heads: int, in_dim: int, out_dim: int, layer: str) -> None:
    """Raise ConfigError, with the layer, where q does not divide its inputs or outputs."""
    for what, size in (("inputs", in_dim), ("outputs", out_dim)):
        if size % heads:
            near = [
                number for number in range(1, min(heads, 512) + 1) if in_dim % number == 0 and out_dim % number == 0
            ]
            raise ConfigError(
                f"heads is {heads}, which does not divide the {size} {what} of {layer}; {near[-1]} does, or leave the layer out"
            )


class AdapterInventory(nn.Module):
    """K skills of q heads.

    Args:
        in_dim: C.
        out_dim: O.
        skills: K.
        heads: q.
        rank: R.
        alpha: the scale is alpha / R.
        layer: its name, for messages.
        generator: of A; B is zero at first.

    Attributes:
        a: parameter [q, K, C/q, R].
        b: parameter [q, K, R, O/q].

    Raises ConfigError for a size below 1, an alpha that is not finite, and heads that do not divide.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        skills: int = 8,
        heads: int = 1,
        rank: int = 16,
        alpha: float = 1.0,
        layer: str = "the layer",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("skills", skills), ("heads", heads), ("rank", rank)):
            if value < 1:
                raise ConfigError(f"{name} is {value} for {layer}; it must be at least 1")
        if not math.isfinite(alpha):
            raise ConfigError(f"alpha is {alpha} for {layer}; it must be a finite number")
        check_heads(heads, in_dim, out_dim, layer)
        self.alpha, self.scale = float(alpha), alpha / rank
        self.a = nn.Parameter(torch.empty(heads, skills, in_dim // heads, rank))
        self.b = nn.Parameter(torch.zeros(heads, skills, rank, out_dim // heads))
        self.draw(generator)

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> None:
        """The first numbers: A uniform in +-1 / sqrt(3 C), of all inputs though a head sees some, and B zero. Meta is left alone."""
        if self.a.is_meta:
            return
        bound = 1 / math.sqrt(3 * self.a.shape[0] * self.a.shape[2])
        # On the CPU, where generators draw the same for every device.
        drawn = torch.empty(self.a.shape).uniform_(-bound, bound, generator=generator)
        self.a.copy_(drawn)
        self.b.zero_()

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[3]

    def merged(self, alpha_UqK: Tensor) -> tuple[Tensor, Tensor]:
        """(a_UCR, b_URO): the halves of one adapter for each row of weights."""
        return merged_halves(alpha_UqK, self.a, self.b)

    def outputs_of(self, x_NC: Tensor, alpha_NK: Tensor) -> Tensor:
        """y_NO = scale sum_k alpha_k (x A_k) B_k: outputs of skills, mixed; of one head."""
        skills, inputs, rank = self.a.shape[1:]
        all_CX = self.a[0].permute(1, 0, 2).reshape(inputs, skills * rank)
        low_NKR = (x_NC @ all_CX).unflatten(1, (skills, rank)) * alpha_NK.to(x_NC.dtype).unsqueeze(2)
        return low_NKR.flatten(1) @ self.b[0].flatten(0, 1) * self.scale

    @torch.no_grad()
    def pair(self, alpha_qK: Tensor, *, mixes_outputs: bool = False) -> Pair:
        """The adapter that these weights make, as plain LoRA: of rank R, or K R where outputs are mixed."""
        if mixes_outputs:
            weighted_KRO = self.b[0] * alpha_qK[0].to(self.b.dtype)[:, None, None]
            a_RC = self.a[0].permute(0, 2, 1).flatten(0, 1)
            return Pair(a_RC.contiguous(), weighted_KRO.flatten(0, 1).T.contiguous(), self.alpha * self.a.shape[1])
        a_UCR, b_URO = self.merged(alpha_qK.unsqueeze(0))
        return Pair(a_UCR[0].T.contiguous(), b_URO[0].T.contiguous(), self.alpha)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        heads, skills, inputs, rank = self.a.shape
        out = self.b.shape[3] * heads
        return f"in={inputs * heads}, out={out}, skills={skills}, heads={heads}, rank={rank}, scale={self.scale:g}"
