"""`Stragglers`: whoever is slow stops acting when most processes have acted enough (DD-PPO: Wijmans et al., arXiv 1911.00357).

Processes that act in environments of their own are never equally quick, and the update waits for the slowest. Once ``share`` of them have
all their steps, the others stop, if they have at least ``least`` of theirs. What a rollout holds then depends on how quick they were, so
two runs with one seed differ; each still goes on, after a stop, with what it had.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch.distributed as dist

from anabranch.errors import ConfigError

__all__ = ["Stragglers"]

# Steps between two looks: each asks another process.
_LOOK_EVERY = 4


class _Counts(Protocol):
    """Numbers that all processes share, such as a store of torch.distributed."""

    def add(self, key: str, value: int) -> int:
        """Add to a number that begins at 0, and return it."""
        ...


class Stragglers:
    """Tells who is slow when to stop.

    Args:
        steps: of a whole rollout.
        world_size: processes.
        share: of them that must have all their steps.
        least: share of its own steps that a process makes in any case.
        counts: what processes count in. Default: the store that they met in.

    Raises ConfigError for shares outside of (0, 1], and without a process group where no ``counts`` are given.
    """

    def __init__(
        self, steps: int, world_size: int, *, share: float = 0.6, least: float = 0.25, counts: _Counts | None = None
    ) -> None:
        for name, value in (("preempt_share", share), ("preempt_least", least)):
            if not 0 < value <= 1:
                raise ConfigError(f"{name} is {value}; it must be above 0 and at most 1")
        self._steps, self._least = steps, max(math.ceil(least * steps), 1)
        self._enough = math.ceil(share * world_size)
        self._counts = counts or _store()

    def finished(self, rollout: int) -> None:
        """This process has all steps of a rollout."""
        self._counts.add(_key(rollout), 1)

    def is_over(self, rollout: int, steps: int) -> bool:
        """Whether this process, which has made so many steps of a rollout, is to stop."""
        if steps < self._least or steps >= self._steps or steps % _LOOK_EVERY:
            return False
        return self._counts.add(_key(rollout), 0) >= self._enough


def _key(rollout: int) -> str:
    return f"anabranch.rl/finished/{rollout}"


def _store() -> Any:
    if not dist.is_initialized():
        raise ConfigError(
            "processes that wait for each other are needed where stragglers are stopped; start with torchrun"
        )
    # Torch has no public name for it.
    return dist.distributed_c10d._get_default_store()
