"""`Trajectory`: an episode in tokens, part by part; and many of them as tensors."""
# Shapes: B sequences, L tokens of the longest, A layers that route, K choices

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.rl.tokens.world import Outcome

__all__ = ["NOWHERE", "Samples", "Trajectory", "padded"]

# A choice that is not used, or was not recorded.
NOWHERE = -1
Route = Mapping[int, tuple[int, ...]]


@dataclass
class Trajectory:
    """An episode.

    Attributes:
        prompt: tokens of the world that it begins with.
        tokens: what was written after it, by the policy and by the world.
        own: which of them the policy wrote.
        log_probs: what the engine held each of its own for, 0 for the world's.
        routes: where the engine sent each token of prompt and response: {layer: experts} by place; none where that is not recorded.
        turns: that the policy has had.
        is_cut: there was no room for a further turn, or for all that the world had to say.
        outcome: what became of it.
    """

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    routes: dict[int, Route] = field(default_factory=dict)
    turns: int = 0
    is_cut: bool = False
    outcome: Outcome | None = None

    def write(self, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """A turn of the policy."""
        self.tokens += tokens
        self.own += [True] * len(tokens)
        self.log_probs += log_probs
        self.turns += 1

    def told(self, tokens: Sequence[int]) -> None:
        """What the world has written."""
        self.tokens += tokens
        self.own += [False] * len(tokens)
        self.log_probs += [0.0] * len(tokens)

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and response."""
        return (*self.prompt, *self.tokens)


class Samples(NamedTuple):
    """Episodes as a mini-batch, or a part of one; padding stands on the right.

    Attributes:
        token_BL: int64.
        real_BL: bool, no padding.
        own_BL: bool, the policy's own tokens.
        rollout_BL: log probability of each of its own, as the engine had it.
        old_BL: the same as the model that learns had it, before it learned from this.
        reference_BL: the same of the reference; 0 without one.
        value_BL: what the critic said before each token; 0 without one.
        advantage_BL: of each of its own.
        return_BL: what the critic should have said.
        route_BLAK: int16, where the engine sent each token in each layer that routes; `NOWHERE` for unused choices, and of no layers where
            nothing is replayed.
    """

    token_BL: Tensor
    real_BL: Tensor
    own_BL: Tensor
    rollout_BL: Tensor
    old_BL: Tensor
    reference_BL: Tensor
    value_BL: Tensor
    advantage_BL: Tensor
    return_BL: Tensor
    route_BLAK: Tensor

    def rows(self, row_B: Tensor) -> Samples:
        """Some episodes, cut to the longest of them."""
        longest = int(self.real_BL[row_B].sum(-1).max())
        return Samples(*(tensor[row_B][:, :longest] for tensor in self))


def padded(trajectories: Sequence[Trajectory], layers: Sequence[int] = ()) -> Samples:
    """Episodes as tensors; what is not known of them yet is 0.

    Args:
        trajectories: at least one.
        layers: those whose routes are kept.
    """
    longest, batch = max(len(each.ids) for each in trajectories), len(trajectories)
    choices = max(
        (len(route) for each in trajectories for of in each.routes.values() for route in of.values()), default=0
    )
    token_BL = torch.zeros(batch, longest, dtype=torch.int64)
    real_BL, own_BL = (torch.zeros(batch, longest, dtype=torch.bool) for _ in range(2))
    rollout_BL = torch.zeros(batch, longest)
    route_BLAK = torch.full((batch, longest, len(layers), choices if layers else 0), NOWHERE, dtype=torch.int16)
    for row, each in enumerate(trajectories):
        begin, end = len(each.prompt), len(each.ids)
        token_BL[row, :end] = torch.tensor(each.ids)
        real_BL[row, :end] = True
        own_BL[row, begin:end] = torch.tensor(each.own, dtype=torch.bool)
        rollout_BL[row, begin:end] = torch.tensor(each.log_probs)
        if not layers:
            continue
        for place, routes in each.routes.items():
            for layer, experts in routes.items():
                route_BLAK[row, place, layers.index(layer), : len(experts)] = torch.tensor(experts, dtype=torch.int16)
    zero = torch.zeros(batch, longest)
    return Samples(
        token_BL, real_BL, own_BL, rollout_BL, zero, zero.clone(), zero.clone(), zero.clone(), zero.clone(), route_BLAK
    )
