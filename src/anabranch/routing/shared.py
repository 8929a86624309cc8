"""Scores that share modules with those of other layers of a model: what such a score declares, beside what every score has.

A score declares it by having `join`, and its config says what of its parameters are shared (`num_shared`). All others stand alone.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import nn

from anabranch.routing.score import Score

Share = Callable[[str, Callable[[], nn.Module]], nn.Module]


@runtime_checkable
class SharesModules(Protocol):
    """A score some of whose modules are one for all layers of a model."""

    def join(self, share: Share, layer: int) -> None:
        """Take a place in a model, once, in the order in which routers route.

        ``share(name, make)`` is that of the build context: the module ``name`` of the model, made by the first who asks.
        """


@runtime_checkable
class CountsShared(Protocol):
    """The config of such a score."""

    def num_shared(self, dim: int) -> int:
        """How many of its parameters all layers of a model of width ``dim`` have in common."""


def join_model(score: Score, share: Share, layer: int) -> None:
    """Let a score that shares modules take its place in a model as the router of ``layer``."""
    if isinstance(score, SharesModules):
        score.join(share, layer)


def shared_parameters(config: Score.Config, dim: int) -> int:
    """Parameters of a score that all layers have in common, so that they count for the first layer only; 0 for one that stands alone."""
    return config.num_shared(dim) if isinstance(config, CountsShared) else 0
