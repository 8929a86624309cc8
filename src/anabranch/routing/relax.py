"""Discrete choices that gradients pass: Gumbel noise, the relaxed choice, the straight-through estimator, and a temperature that falls.

    soft_NE = gumbel_softmax(logit_NE, temperature.value)     # a relaxed sample: argmax is distributed as softmax(logit)
    hard_NE = straight_through(soft_NE)                       # its one-hot argmax forward, its own gradient backward

Jang et al. 2017, arXiv 1611.01144; Maddison et al. 2017, arXiv 1611.00712; the straight-through estimator: Bengio et al. 2013, arXiv
1308.3432. Noise comes from torch's global generator, which the trainer seeds in every step and activation recompute restores.
"""
# Shapes: N items, E destinations

import torch
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.errors import ConfigError


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise, -log(Exponential(1)), in the shape and dtype of ``like``."""
    return torch.empty_like(like, memory_format=torch.contiguous_format).exponential_().log().neg()


def gumbel_softmax(logit_NE: Tensor, temperature: Tensor | float, *, noise: bool = True) -> Tensor:
    """softmax((logit + Gumbel noise) / temperature) over the last dimension; without ``noise`` the plain softmax at that temperature."""
    noisy_NE = logit_NE + gumbel_noise(logit_NE) if noise else logit_NE
    return (noisy_NE / temperature).softmax(-1)


def straight_through(soft_NE: Tensor, index_N1: Tensor | None = None) -> Tensor:
    """One-hot of the largest entry (the first of equals), or of ``index_N1``, exactly; its gradient is that of ``soft_NE``."""
    index_N1 = soft_NE.argmax(-1, keepdim=True) if index_N1 is None else index_N1
    hard_NE = torch.zeros_like(soft_NE).scatter(-1, index_N1, 1.0)
    # In this order the bracket is exactly zero, so that the hard value stays exact.
    return hard_NE + (soft_NE - soft_NE.detach())


class Temperature(Part, nn.Module):
    """A temperature that falls geometrically with the step; its value is a buffer, so checkpoints have it.

    Attributes:
        value: fp32 scalar, the temperature of the next step.
    """

    @configclass
    class Config(BaseConfig):
        """The schedule.

        Attributes:
            start: before the first step (default 5.0).
            end: the lowest value (default 0.1).
            decay: factor per step (default 0.99984, which takes 24,450 steps from 5.0 to 0.1).
            until: the fraction of training where ``end`` is reached; takes the place of ``decay``. None: by ``decay``.
        """

        start: float = Field(default=5.0, gt=0)
        end: float = Field(default=0.1, gt=0)
        decay: float = Field(default=0.99984, gt=0, le=1)
        until: float | None = Field(default=None, gt=0, le=1)

        def __post_init__(self) -> None:
            if self.end > self.start:
                raise ConfigError(f"temperature.end is {self.end}, temperature.start {self.start}; it must not rise")

        def at(self, step: int, fraction: float) -> float:
            """The temperature after ``step`` steps, ``fraction`` of the whole training."""
            if self.until is not None:
                return self.start * (self.end / self.start) ** min(fraction / self.until, 1.0)
            return max(self.end, self.start * self.decay**step)

    value: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("value", torch.tensor(float(config.start)))

    def on_step(self, step: int, fraction: float) -> None:
        """Set the temperature for the step after ``step`` finished ones."""
        self.value.fill_(self.config.at(step, fraction))
