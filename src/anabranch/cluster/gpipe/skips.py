"""Connections between layers that are not neighbours: one layer stashes a tensor under a name, a later one pops it.

    model = nn.Sequential(Encoder(), Stash("long"), Middle(), Pop("long", torch.add), Head())

In a pipeline the tensor goes from the stage that stashes it to the one that pops it, directly. The model also runs as it is, without one:
then the tensor waits in this thread.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from anabranch.errors import InputError

__all__ = ["Area", "Pop", "Route", "Stash", "routes_of"]

_here = threading.local()


class Area:
    """Where the skips of one micro-batch wait in one pass through a chunk."""

    def __init__(self, imports: dict[str, Tensor] | None = None) -> None:
        self.waiting: dict[str, Tensor] = dict(imports or {})

    @contextmanager
    def here(self) -> Iterator[None]:
        """In this thread, layers stash here and pop from here."""
        before = getattr(_here, "area", None)
        _here.area = self
        try:
            yield
        finally:
            _here.area = before


def _area() -> Area:
    if getattr(_here, "area", None) is None:
        _here.area = Area()
    area: Area = _here.area
    return area


class Stash(nn.Module):
    """Hands on what it gets, and keeps it under a name for a later `Pop`.

    Args:
        name: one that no other `Stash` of the model has.
        take: what to keep of the input; all of it by default.
    """

    def __init__(self, name: str, take: Callable[[Any], Tensor] | None = None) -> None:
        super().__init__()
        self.name, self.take = name, take

    def forward(self, x: Any) -> Any:
        """``x``, unchanged."""
        _area().waiting[self.name] = x if self.take is None else self.take(x)
        return x

    def extra_repr(self) -> str:
        """For ``repr``."""
        return repr(self.name)


class Pop(nn.Module):
    """``combine(x, kept)`` of what it gets and what the `Stash` of this name kept.

    Args:
        name: of an earlier `Stash`.
        combine: a function or module of both, such as ``torch.add`` or a concatenation.
    """

    def __init__(self, name: str, combine: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.name, self.combine = name, combine

    def forward(self, x: Any) -> Any:
        """What ``combine`` makes of ``x`` and the skip. Raises InputError if nothing was kept."""
        waiting = _area().waiting
        if self.name not in waiting:
            raise InputError(f"nothing is stashed under {self.name!r}")
        return self.combine(x, waiting.pop(self.name))

    def extra_repr(self) -> str:
        """For ``repr``."""
        return repr(self.name)


@dataclass(frozen=True)
class Route:
    """A skip of a partitioned model: its name, and the chunks of its two ends."""

    name: str
    source: int
    target: int


def routes_of(layers: Sequence[nn.Module], parts: Sequence[range]) -> list[Route]:
    """The skips of a model, in order of their stashes.

    Raises InputError for a name that is stashed twice, popped twice, popped and never (or only later) stashed, or stashed and never popped.
    """
    stashed, popped = ({}, {})  # type: tuple[dict[str, int], dict[str, int]]
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if not isinstance(module, Stash | Pop):
                continue
            where = stashed if isinstance(module, Stash) else popped
            if module.name in where:
                done = "stashed" if isinstance(module, Stash) else "popped"
                raise InputError(f"skip {module.name!r} is {done} twice, in layers {where[module.name]} and {number}")
            where[module.name] = number
    for name, number in popped.items():
        if name not in stashed:
            raise InputError(f"layer {number} pops the skip {name!r}, which no layer stashes")
        if stashed[name] > number:
            raise InputError(f"layer {number} pops the skip {name!r}, which layer {stashed[name]} stashes only later")
    for name, number in stashed.items():
        if name not in popped:
            raise InputError(f"layer {number} stashes the skip {name!r}, which no layer pops")
    chunk_of = {number: chunk for chunk, part in enumerate(parts) for number in part}
    return [Route(name, chunk_of[number], chunk_of[popped[name]]) for name, number in stashed.items()]
