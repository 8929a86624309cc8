"""`Averages`: mean and deviation of numbers as they come, by which observations and rewards are normalised.

    count' = count + B      delta = mean_B - mean      mean' = mean + delta B / count'
    squares' = squares + squares_B + delta^2 count B / count'                               (Chan, Golub and LeVeque 1979)

They are buffers, so a checkpoint has them and whatever only looks at them leaves them as they are. They are taken in by whole rollouts, of
all processes, so that all processes have the same.
"""
# Shapes: B rows, D numbers of each

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Averages"]

# Added to variances, as gymnasium's wrappers do.
_LEAST = 1e-8


class Averages(nn.Module):
    """See the module.

    Args:
        width: D.
        clip: what is normalised is cut off at so many deviations.

    Attributes:
        rollouts: how many rollouts are in it.
    """

    count: Tensor
    mean_D: Tensor
    squares_D: Tensor
    rollouts: Tensor

    def __init__(self, width: int, clip: float) -> None:
        super().__init__()
        self.clip = clip
        # In double precision: sums of as many samples as there are.
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean_D", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares_D", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("rollouts", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def take_in(self, value_BD: Tensor, rollout: int) -> None:
        """Add what rollout number ``rollout`` had; nothing where that is in it already, as in a run that is resumed."""
        if rollout < int(self.rollouts):
            return
        value_BD = value_BD.to(self.mean_D)
        added, mean_D = len(value_BD), value_BD.mean(0)
        count, delta_D = self.count + added, mean_D - self.mean_D
        self.squares_D += ((value_BD - mean_D) ** 2).sum(0) + delta_D**2 * self.count * added / count
        self.mean_D += delta_D * added / count
        self.count.copy_(count)
        self.rollouts.fill_(rollout + 1)

    @property
    def variance_D(self) -> Tensor:
        """Of all that was taken in; 1 before."""
        return self.squares_D / self.count if self.count > 0 else torch.ones_like(self.squares_D)

    @property
    def deviation_D(self) -> Tensor:
        """What is divided by, float32."""
        return (self.variance_D + _LEAST).sqrt().float()

    def forward(self, value_BD: Tensor) -> Tensor:
        """Less the mean, over the deviation, and cut off."""
        return ((value_BD - self.mean_D.float()) / self.deviation_D).clamp(-self.clip, self.clip)

    def scaled(self, value_BD: Tensor) -> Tensor:
        """Over the deviation, and cut off: rewards keep their sign."""
        return (value_BD / self.deviation_D).clamp(-self.clip, self.clip)
