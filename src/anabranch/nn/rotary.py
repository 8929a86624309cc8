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
                kept, a smooth ramp between (Llama 3.1); ``yarn``, the same with a ramp over pairs, and longer vectors (YaRN,
                arXiv 2309.00071).
            factor: see ``scaling``.
            low_freq_factor: llama3: wavelengths longer than original_positions / low_freq_factor are scaled in full.
            high_freq_factor: llama3: wavelengths shorter than original_positions / high_freq_factor are kept.
            original_positions: llama3, yarn: context length before scaling.
            beta_fast: yarn: pairs that turn at least so often within original_positions are kept.
            beta_slow: yarn: pairs that turn at most so often are scaled in full.
            truncate: yarn: the ramp begins and ends at whole pairs.
            attention_factor: yarn: factor on what is rotated; None for 0.1 ln(factor) + 1.
            fraction: share of a head's numbers that is rotated, the first ones; the rest knows no position (GLM).
        """

        theta: float = Field(default=10000.0, gt=0)
        scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
        factor: float = Field(default=1.0, gt=0)
        low_freq_factor: float = Field(default=1.0, gt=0)
        high_freq_factor: float = Field(default=4.0, gt=0)
        original_positions: Size = Field(default=8192, ge=1)
        beta_fast: float = Field(default=32.0, gt=0)
        beta_slow: float = Field(default=1.0, gt=0)
        truncate: bool = True
        attention_factor: float | None = Field(default=None, gt=0)
        fraction: float = Field(default=1.0, gt=0, le=1)

        @property
        def length_factor(self) -> float:
            """What cosines and sines are multiplied by."""
            if self.scaling != "yarn":
                return 1.0
            return yarn_factor(self.factor) if self.attention_factor is None else self.attention_factor

        def width(self, head_dim: int) -> int:
            """How many numbers of a head are rotated. Raises ConfigError for none, or an odd number."""
            width = int(head_dim * self.fraction)
            if width < 2 or width % 2:
                raise ConfigError(
                    f"fraction is {self.fraction}, which rotates {width} numbers of a head of {head_dim}; it must be an even number"
                )
            return width

        def __post_init__(self) -> None:
            if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
                raise ConfigError(
                    f"high_freq_factor is {self.high_freq_factor}; it must be greater than low_freq_factor={self.low_freq_factor}"
                )

    def __init__(self, config: Config, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.length_factor = config.length_factor
        self.register_buffer("frequency", _frequencies(config, config.width(head_dim)), persistent=False)

    frequency: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move, but never cast: in bf16 the angles of position 1000 would be off by whole radians."""
        frequency = self.frequency
        super()._apply(fn, recurse)
        if not self.frequency.is_meta:
            self.frequency = frequency.to(self.frequency.device)
        return self

    def forward(self, position_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each ``[B, 1, L, R]`` for the R numbers that are rotated; angles are computed in fp32."""
        angle = position_BL[:, None, :, None].float() * self.frequency
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos(), angle.sin()
        if self.length_factor != 1.0:
            cos, sin = cos * self.length_factor, sin * self.length_factor
        return cos.to(dtype), sin.to(dtype)


def yarn_factor(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1, by which YaRN makes scores larger where the context was made longer; 1 where it was not."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


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
    if config.scaling == "yarn":
        keep = 1 - _yarn_ramp(config, head_dim)
        return keep * frequency + (1 - keep) * frequency / config.factor
    return frequency


def _yarn_ramp(config: Rotary.Config, head_dim: int) -> Tensor:
    """0 for pairs that are kept, 1 for those that are scaled in full."""

    def pair_that_turns(times: float) -> float:
        turns = config.original_positions / (times * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # A step where both are the same.
    high = high + 0.001 if low == high else high
    pair = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    return ((pair - low) / (high - low)).clamp(0.0, 1.0)


def rotate(x_BHLD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + R/2}) of the first R numbers by its angle; what is behind them stays."""
    cos, sin = rotary
    width = cos.shape[-1]
    if width < x_BHLD.shape[-1]:
        return torch.cat((rotate(x_BHLD[..., :width], rotary), x_BHLD[..., width:]), dim=-1)
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
