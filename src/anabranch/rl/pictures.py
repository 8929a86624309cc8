"""`Pictures`: a small convolutional network that makes features of a picture, for policies and critics that see one."""
# Shapes: B pictures, C channels, H and W their sides, F features

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.errors import ConfigError

__all__ = ["Pictures"]

# Channels of each stage; every stage halves the sides, until the shorter one is at most `_SMALL`.
_CHANNELS = (16, 32, 64, 64)
_SMALL = 6
_GAIN = math.sqrt(2)
# Numbers that a picture may have.
_MOST_NUMBERS = 4_000_000


class Pictures(nn.Module):
    """Convolutions of 3 x 3 at a step of 2, each normalised over all that it gives, as CaRL's are, with relu; then a dense layer.

    Args:
        shape: C, H and W.
        features: F.

    Raises ConfigError for sides below 3, or pictures that nobody learns from by acting.
    """

    def __init__(self, shape: tuple[int, int, int], features: int) -> None:
        super().__init__()
        channels, height, width = shape
        if min(height, width) < 3 or channels < 1 or math.prod(shape) > _MOST_NUMBERS:
            raise ConfigError(
                f"pictures are {channels} x {height} x {width}; sides must be at least 3, and all of it at most {_MOST_NUMBERS:,} numbers"
            )
        stages: list[nn.Module] = []
        for given in _CHANNELS:
            if min(height, width) <= _SMALL and stages:
                break
            stages += [nn.Conv2d(channels, given, 3, stride=2, padding=1), nn.GroupNorm(1, given), nn.ReLU()]
            channels, height, width = given, (height + 1) // 2, (width + 1) // 2
        self.stages = nn.Sequential(*stages)
        self.last = nn.Linear(channels * height * width, features)
        layers: list[Any] = [stage for stage in stages if isinstance(stage, nn.Conv2d)]
        for layer in (*layers, self.last):
            nn.init.orthogonal_(layer.weight, _GAIN)
            nn.init.zeros_(layer.bias)

    def forward(self, picture_BCHW: Tensor) -> Tensor:
        """Features, ``[B, F]``."""
        return F.relu(self.last(torch.flatten(self.stages(picture_BCHW), 1)))
