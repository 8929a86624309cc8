"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama checkpoints."""
# Shapes: B batch, L positions, H heads, D head width

import math
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, Size, configclass
from anabranch.errors import ConfigError
from anabranch.nn.derivatives import asks_for_plain
from anabranch.nn.kernels import rows as native
from anabranch.nn.kernels.operands import takes


class Rotary(Part, nn.Module):
    """Angles of position p and pair i: p * theta^(-2i/D), optionally rescaled for longer contexts."""

    @configclass
    class Config(BaseConfig):
        """How positions turn into angles.

        Attributes:
            theta: base of the geometric series of frequencies.
            scaling: ``none``; ``linear``, positions divided by ``factor``; ``llama3``, low frequencies divided by ``factor``, high ones
                kept, a smooth ramp between (Llama 3.1).
            factor: see ``scaling``.
            low_freq_factor: llama3: wavelengths longer than original_positions / low_freq_factor are scaled in full.
            high_freq_factor: llama3: wavelengths shorter than original_positions / high_freq_factor are kept.
            original_positions: llama3: context length before scaling.
        """

        theta: float = Field(default=10000.0, gt=0)
        scaling: Literal["none", "linear", "llama3"] = "none"
        factor: float = Field(default=1.0, gt=0)
        low_freq_factor: float = Field(default=1.0, gt=0)
        high_freq_factor: float = Field(default=4.0, gt=0)
        original_positions: Size = Field(default=8192, ge=1)

        def __post_init__(self) -> None:
            if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
                raise ConfigError(
                    f"high_freq_factor is {self.high_freq_factor}; it must be greater than low_freq_factor={self.low_freq_factor}"
                )

    def __init__(self, config: Config, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("frequency", _frequencies(config, head_dim), persistent=False)

    frequency: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move, but never cast: in bf16 the angles of position 1000 would be off by whole radians."""
        frequency = self.frequency
        super()._apply(fn, recurse)
        if not self.frequency.is_meta:
            self.frequency = frequency.to(self.frequency.device)
        return self

    def forward(self, position_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each ``[B, 1, L, D]``; angles are computed in fp32."""
        angle = position_BL[:, None, :, None].float() * self.frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def _frequencies(config: Rotary.Config, head_dim: int) -> Tensor:
    # On the CPU even under a meta device: this buffer is not in checkpoints, so nothing would fill it later.
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequency = 1.0 / config.theta**exponent
    if config.scaling == "linear":
        return frequency / config.factor
    if config.scaling == "llama3":
        # Full rotations within the original context.
        rotations = config.original_positions * frequency / (2 * math.pi)
        keep = (rotations - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        keep = keep.clamp(0.0, 1.0)
        return keep * frequency + (1 - keep) * frequency / config.factor
    return frequency


def rotate(x_BHLD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by its angle."""
    cos, sin = rotary
    if not torch.is_grad_enabled() and native.can_rotate(x_BHLD, cos, sin):
        return native.rotate(x_BHLD, cos, sin, 1.0)
    # A compiler makes one pass of it by itself.
    if not takes() or not torch.is_grad_enabled() or cos.requires_grad or sin.requires_grad:
        return _rotate(x_BHLD, cos, sin)
    return _Rotate.apply(x_BHLD, cos, sin)


def _rotate(x_BHLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same by torch."""
    left, right = x_BHLD.chunk(2, dim=-1)
    return x_BHLD * cos + torch.cat((-right, left), dim=-1) * sin


class _Rotate(torch.autograd.Function):
    """Rotation in one pass over memory, or a few. Its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_BHLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_at_once(x_BHLD, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient_BHLD: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if asks_for_plain(gradient_BHLD):
            return _rotate(gradient_BHLD, cos, -sin), None, None
        return _rotate_at_once(gradient_BHLD, cos, sin, -1.0), None, None


def _rotate_at_once(x_BHLD: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    if native.can_rotate(x_BHLD, cos, sin):
        return native.rotate(x_BHLD, cos, sin, sign)
    half = x_BHLD.shape[-1] // 2
    left, right = x_BHLD[..., :half], x_BHLD[..., half:]
    # Both halves are the same.
    cos, sin = cos[..., :half], sin[..., :half]
    y_BHLD = torch.empty_like(x_BHLD)
    torch.mul(left, cos, out=y_BHLD[..., :half]).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=y_BHLD[..., half:]).addcmul_(left, sin, value=sign)
    return y_BHLD
