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

__all__ = ["Area", "Pop", "Route", "Stash", "copy_before_changes", "routes_of", "works_in_place"]

_here = threading.local()


class Area:
    """Where the skips of one micro-batch wait in one pass through a chunk."""

    def __init__(self, imports: dict[str, Tensor] | None = None) -> None:
        self.waiting: dict[str, Tensor] = dict(imports or {})
        # Of what was stashed here, how often it had been changed by then.
        self.versions: dict[str, int] = {}

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

    What is kept is what was there: a `Pop` refuses what a later layer has changed in place, unless a copy was kept.

    Args:
        name: one that no other `Stash` of the model has.
        take: what to keep of the input; all of it by default.

    Attributes:
        copies: keep a copy. A `GPipe` sets it where the next layer works in place.
    """

    def __init__(self, name: str, take: Callable[[Any], Tensor] | None = None) -> None:
        super().__init__()
        self.name, self.take = name, take
        self.copies = False

    def forward(self, x: Any) -> Any:
        """``x``, unchanged."""
        kept = x if self.take is None else self.take(x)
        area = _area()
        area.waiting[self.name] = kept = kept.clone() if self.copies else kept
        area.versions[self.name] = kept._version
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
        """What ``combine`` makes of ``x`` and the skip. Raises InputError if nothing was kept, or what was kept has changed."""
        area = _area()
        if self.name not in area.waiting:
            raise InputError(f"nothing is stashed under {self.name!r}")
        kept = area.waiting.pop(self.name)
        if kept._version != area.versions.pop(self.name, kept._version):
            raise InputError(
                f"what was stashed under {self.name!r} was changed in place by a later layer; let that make a new tensor (inplace=False)"
            )
        return self.combine(x, kept)

    def extra_repr(self) -> str:
        """For ``repr``."""
        return repr(self.name)


@dataclass(frozen=True)
class Route:
    """A skip of a partitioned model: its name, and the chunks of its two ends."""

    name: str
    source: int
    target: int


def copy_before_changes(layers: Sequence[nn.Module]) -> None:
    """Let stashes keep copies where the layer behind them, or one behind others that only hand on, may work in place."""
    for number, layer in enumerate(layers):
        if isinstance(layer, Stash):
            following = next((later for later in layers[number + 1 :] if not isinstance(later, Stash)), None)
            layer.copies = following is not None and works_in_place(following)


def works_in_place(layer: nn.Module) -> bool:
    """Whether a layer has a part that changes what it is given."""
    return any(getattr(module, "inplace", False) for module in layer.modules())


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
