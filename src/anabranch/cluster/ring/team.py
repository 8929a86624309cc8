"""The ranks that this process runs, and attention over them as one step of autograd."""
# Shapes: B sequences, L positions of a rank, H query heads, G key heads, D head width

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from anabranch.cluster.ring import program
from anabranch.cluster.ring.by_heads import ByHeads
from anabranch.cluster.ring.hybrid import Hybrid
from anabranch.cluster.ring.inputs import Inputs, Program
from anabranch.cluster.ring.link import GroupLink, SimulatedLinks, Traffic, drive
from anabranch.cluster.ring.schedule import Schedule
from anabranch.errors import ConfigError, InputError

__all__ = ["Group", "GroupTeam", "Settings", "SimulatedTeam", "over_ranks", "process_group"]

Group = dist.ProcessGroup | DeviceMesh | None


class Team(Protocol):
    """The ranks that this process runs the programs of."""

    world: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    traffic: Traffic

    def run(self, make: Callable[[int, int, Any], Program]) -> list[tuple[Tensor, ...]]:
        """What the programs ``make(index, rank, link)`` give, in the order of ``ranks``."""


class GroupTeam:
    """This process alone, of a group."""

    def __init__(self, link: GroupLink) -> None:
        self.link, self.world, self.ranks, self.group = link, link.world, (link.rank,), link.group
        self.traffic = link.traffic

    def run(self, make: Callable[[int, int, Any], Program]) -> list[tuple[Tensor, ...]]:
        """See `Team`."""
        return [drive(make(0, self.ranks[0], self.link), self.traffic)]


class SimulatedTeam:
    """All ranks."""

    def __init__(self, links: SimulatedLinks) -> None:
        self.links, self.world, self.ranks = links, links.world, tuple(range(links.world))
        self.group: dist.ProcessGroup | None = None
        self.traffic = links.traffic

    def run(self, make: Callable[[int, int, Any], Program]) -> list[tuple[Tensor, ...]]:
        """See `Team`."""
        return self.links.run([make(rank, rank, self.links.link(rank)) for rank in self.ranks])


def process_group(group: Group) -> dist.ProcessGroup | None:
    """The group that is meant; None for this process alone. Raises ConfigError where one of several processes has not joined a group."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InputError(f"the mesh has {group.ndim} dimensions; pass one of them, as mesh['context']")
        return group.get_group()
    if group is not None:
        return group
    if dist.is_initialized():
        return dist.group.WORLD
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1":
        raise ConfigError(
            f"torchrun started {started} processes, and none has joined a group; call torch.distributed.init_process_group first"
        )
    return None


@dataclass(frozen=True)
class Settings:
    """What the passes are told beside tensors."""

    schedule: Schedule | ByHeads | Hybrid
    scale: float
    home_dtype: torch.dtype | None


def over_ranks(team: Team, settings: Settings, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(out_BHLD, lse_BHL) of each rank of the team, one after another, of (query_BHLD, key_BGSD, value_BGSD) of each."""
    found: tuple[Tensor, ...] = _Attention.apply(team, settings, *parts)
    return found


class _Attention(torch.autograd.Function):
    """`over_ranks`, with its gradient."""

    @staticmethod
    def forward(ctx: Any, team: Any, settings: Settings, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.team, ctx.settings = team, settings
        inputs = _inputs(settings, parts)
        schedule = settings.schedule
        with torch.autocast(parts[0].device.type, enabled=False):
            made = team.run(lambda index, rank, link: program.forward(schedule, rank, inputs[index], link))
        for rank in team.ranks:
            for step in range(schedule.world):
                key = (rank, step)
                team.traffic.pairs[key] = team.traffic.pairs.get(key, 0) + schedule.pairs(rank, step)
        found = [
            part for (out, lse), own in zip(made, inputs, strict=True) for part in (out.to(own.query_BHLD.dtype), lse)
        ]
        ctx.save_for_backward(*parts, *found)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Any, ...]:
        settings, team = ctx.settings, ctx.team
        count = 3 * len(team.ranks)
        # Read once: activations that are recomputed are given once.
        saved = ctx.saved_tensors
        parts, found = saved[:count], saved[count:]
        inputs = _inputs(settings, parts)
        deltas = [
            (dout.to(own.fine) * out.to(own.fine)).sum(-1) - dlse
            for own, out, dout, dlse in zip(inputs, found[::2], given[::2], given[1::2], strict=True)
        ]

        def make(index: int, rank: int, link: Any) -> Program:
            # Zeros that nothing was computed for are expanded ones.
            dout = given[2 * index].to(inputs[index].query_BHLD.dtype)
            lse = found[2 * index + 1]
            return program.backward(settings.schedule, rank, inputs[index], dout, lse, deltas[index], link)

        with torch.autocast(parts[0].device.type, enabled=False):
            made = team.run(make)
        flat = [part.to(own.query_BHLD.dtype) for grads, own in zip(made, inputs, strict=True) for part in grads]
        return None, None, *flat


def _inputs(settings: Settings, parts: Sequence[Tensor]) -> list[Inputs]:
    return [
        Inputs(query, key, value, settings.scale, settings.home_dtype)
        for query, key, value in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]
