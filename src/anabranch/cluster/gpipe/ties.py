"""Parameters that several layers have (an embedding that is the head too), in one stage or in several."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from anabranch.cluster.gpipe.stage import Failure
from anabranch.cluster.schedules import BACKWARD
from anabranch.errors import InputError

__all__ = ["StandIns", "Tie", "Ties", "stand_ins", "ties_of"]

Ties = Sequence[Sequence[str]] | Literal["auto"]


@dataclass(frozen=True)
class Tie:
    """One parameter with several names.

    Attributes:
        names: as in the model's state dict.
        layers: the layer of each name.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]


def ties_of(model: nn.Sequential, declared: Ties) -> list[Tie]:
    """The parameters of a model that several layers have.

    Args:
        model: with its layers in order.
        declared: groups of names; or ``auto`` for those that there are.

    Raises InputError for a parameter that stands in several layers and is not declared, and for a declared name that is not tied so.
    """
    names: dict[int, list[str]] = defaultdict(list)
    layer_of: dict[str, int] = {}
    for number, (prefix, layer) in enumerate(model.named_children()):
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(f"{prefix}.{name}")
            layer_of[f"{prefix}.{name}"] = number
    found = [tuple(group) for group in names.values() if len({layer_of[name] for name in group}) > 1]
    if declared != "auto":
        known = {name: frozenset(group) for group in found for name in group}
        for group in declared:
            for name in group:
                if name not in layer_of:
                    raise InputError(f"tied names {name!r}, and the model has no such parameter")
                if known.get(name) != frozenset(group):
                    others = ", ".join(sorted(known.get(name, frozenset((name,)))))
                    raise InputError(
                        f"tied says that {' and '.join(group)} are one parameter; those of {name!r} are {others}"
                    )
        said = {name for group in declared for name in group}
        for group in found:
            if not said.issuperset(group):
                raise InputError(
                    f"{' and '.join(group)} are one parameter in several layers; declare it with tied=[{list(group)}], or tied='auto'"
                )
    return [Tie(group, tuple(layer_of[name] for name in group)) for group in found]


class StandIns:
    """One tied parameter in one step: while the stages here work, each has a parameter of its own in its place, over the same memory.

    Stages of one process work at once, and the order in which they would add to one gradient is that of their threads; over ranks, what is
    there from steps before must not be summed again. So each stage adds to its own, and the sum comes to the parameter at last, through
    autograd: hooks see it whole and once.

    Args:
        model: with the layers of the stages that are here.
        tie: the parameter.
        stage_of: the stage of each layer.
        here: the stages that are here.
    """

    def __init__(self, model: nn.Module, tie: Tie, stage_of: Sequence[int], here: Collection[int]) -> None:
        self.tie = tie
        self.stages = sorted({stage_of[layer] for layer in tie.layers})
        self._places = [
            (*_place(model, name), stage_of[layer])
            for name, layer in zip(tie.names, tie.layers, strict=True)
            if stage_of[layer] in here
        ]
        self._parts: dict[int, nn.Parameter] = {}
        # What came past the stand-ins, of a layer that keeps the parameter in another place too.
        self._beside: Tensor | None = None
        self._before: Tensor | None = None

    @property
    def original(self) -> nn.Parameter | None:
        """The parameter; None where no stage has it here."""
        return self._places[0][0]._parameters[self._places[0][1]] if self._places else None

    @property
    def learns(self) -> bool:
        """Whether it is here, and gradients are wanted."""
        return self.original is not None and self.original.requires_grad

    def put(self) -> None:
        """Let stages have stand-ins. One that learns nothing stays as it is."""
        original = self.original
        if original is None or not original.requires_grad or isinstance(original, DTensor):
            return
        self._original = original
        self._before, original.grad = original.grad, None
        for owner, last, stage in self._places:
            if stage not in self._parts:
                self._parts[stage] = nn.Parameter(original.detach())
                self._parts[stage].__dict__.update(original.__dict__)
            # Not into `_parameters` alone: recurrent layers have a list of theirs beside it.
            setattr(owner, last, self._parts[stage])

    def take_back(self) -> None:
        """Let stages have the parameter again, with the gradient that it had before."""
        if self._parts:
            for owner, last, _ in self._places:
                setattr(owner, last, self._original)
            self._beside, self._original.grad = self._original.grad, self._before

    def problem(self) -> str | None:
        """Why the sum cannot come to the parameter."""
        names = " and ".join(self.tie.names)
        if self.learns and isinstance(self.original, DTensor):
            return f"{names} are one parameter of several stages, and it is in shards (FSDP2); leave its layers whole"
        if self._beside is not None and (self._original._backward_hooks or self._original._post_accumulate_grad_hooks):
            return (
                f"{names} are one parameter of several stages with hooks, and a layer works with it by another way than its own attribute "
                "(a closure, a list), where hooks would see parts of the gradient; let it read the attribute, or leave the hooks out"
            )
        return None

    def check(self, learning: int) -> None:
        """Raise InputError where ``learning`` ranks want gradients of it and others do not: their weights would part."""
        if learning not in (0, len(self.stages)):
            raise InputError(
                f"{' and '.join(self.tie.names)} are one parameter of {len(self.stages)} stages, and requires_grad is set on {learning} of "
                "them; freeze it on all ranks or on none"
            )

    def gradient(self) -> Tensor | None:
        """The sum of what the stages here gave in this step, in their order; None for nothing."""
        found = [self._parts[stage].grad for stage in sorted(self._parts)]
        total: Tensor | None = None
        for part in (*found, self._beside):
            if part is not None:
                total = part if total is None else _sum(total, part.to(total.device))
        return total

    def deliver(self, total: Tensor | None) -> None:
        """Add the sum over all stages to the parameter's gradient, through its hooks."""
        if total is not None and self.original is not None:
            torch.autograd.backward([self.original], [total.to(self.original.device)])

    def over_ranks(self, group: dist.ProcessGroup | None) -> Tensor | None:
        """The sum over the ranks of all its stages, in their order, on each of them; None on ranks without it. They call it together."""
        rank = dist.get_rank(group)
        if self.original is None:
            return None
        found = self.gradient()
        total = torch.zeros_like(self.original) if found is None else found.to_dense().contiguous()
        first, *others = self.stages
        if rank == first:
            other = torch.empty_like(total)
            for stage in others:
                dist.recv(other, group=group, group_src=stage)
                total = total + other
            for stage in others:
                dist.send(total, group=group, group_dst=stage)
        else:
            dist.send(total, group=group, group_dst=first)
            dist.recv(total, group=group, group_src=first)
        return total


@contextmanager
def stand_ins(
    model: nn.Module, ties: Sequence[Tie], stage_of: Sequence[int], here: Collection[int]
) -> Iterator[list[StandIns]]:
    """In the block the stages that are here have stand-ins for what is tied; see `StandIns`, one for each of ``ties``."""
    found = [StandIns(model, tie, stage_of, here) for tie in ties]
    try:
        for each in found:
            each.put()
        yield found
    finally:
        for each in found:
            each.take_back()


def unfit(shared: Sequence[StandIns], stage: int, micro_batches: int) -> Failure | None:
    """That the sum of one of them cannot come to its parameter, as a failure of the last backward of ``stage``; None where all can."""
    why = next((problem for each in shared if (problem := each.problem()) is not None), None)
    if why is None:
        return None
    return Failure(stage, micro_batches - 1, BACKWARD, f"InputError: {why}", InputError(why))


def _sum(one: Tensor, other: Tensor) -> Tensor:
    """Of two gradients; it is sparse where both are, since torch adds a sparse one to others and not the other way round."""
    if one.layout != other.layout:
        return one.to_dense() + other.to_dense()
    return one + other


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(the module that has a parameter as its own, under which name)."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last
