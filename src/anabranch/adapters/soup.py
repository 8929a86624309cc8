"""`average_own`: the mean of the numbers of adapters of our own form (AdapterSoup, Chronopoulou et al. 2023, arXiv 2302.07027).

Of adapters of whatever kind that began on one base with the same settings: bottlenecks, prefixes, ladders, inventories. LoRA in folders of
peft's is averaged by `anabranch.adapters.combine`, whose ``mean`` this is too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from anabranch.adapters.algebra import shares
from anabranch.adapters.base_digest import is_same_base
from anabranch.adapters.own_folder import OWN, OwnAdapter
from anabranch.errors import ConfigError
from anabranch.lm.tensors import some

__all__ = ["Averaged", "average_own"]


@dataclass(frozen=True)
class Averaged:
    """What `average_own` wrote: names of ``layers`` by pattern, and how many numbers."""

    layers: int
    parameters: int


def average_own(folders: Sequence[str | Path], weights: Sequence[float], out: str | Path) -> Averaged:
    """Write the mean of the adapters in ``folders``, of which each counts by its share of ``weights``.

    Raises CheckpointError as `read_own` does of a folder that is damaged; ConfigError for adapters of other kinds or settings than the
    first, of another base, with entries at other places, for weights as `combine` does, and no folder; DataError where ``out`` holds
    something else.
    """
    if not folders or len(folders) != len(weights):
        raise ConfigError(f"there are {len(weights)} weights for {len(folders)} adapters; give one for each")
    parts = shares(weights)
    found = [OwnAdapter.read(folder) for folder in folders]
    first = found[0]
    for folder, one in zip(folders[1:], found[1:], strict=True):
        if one.parts != first.parts:
            raise ConfigError(
                f"{folder} has other layers or settings than {folders[0]} (compare their {OWN}); a mean is of adapters that began alike"
            )
        if not _have_one_base(one, first):
            raise ConfigError(
                f"{folder} was trained on another base than {folders[0]}; a mean is of adapters of one base"
            )
        odd = sorted(one.numbers.keys() ^ first.numbers.keys())
        odd = odd or [name for name, value in one.numbers.items() if value.shape != first.numbers[name].shape]
        if odd:
            raise ConfigError(f"{some(odd)} is not the same in {folder} and {folders[0]}; is one of them damaged?")
    numbers = {}
    for name, value in first.numbers.items():
        values = [one.numbers[name] for one in found]
        if value.is_floating_point():
            total = sum(part * own.double() for part, own in zip(parts, values, strict=True))
            assert isinstance(total, torch.Tensor)
            numbers[name] = total.to(value.dtype)
        elif all(torch.equal(own, value) for own in values):
            numbers[name] = value
        else:
            raise ConfigError(f"{name} says other places in these adapters, and places have no mean")
    first.with_numbers(numbers).write(out)
    return Averaged(len(first.parts.linears), sum(value.numel() for value in numbers.values()))


def _have_one_base(one: OwnAdapter, other: OwnAdapter) -> bool:
    """Whether both were trained on one base, however it was loaded; adapters of earlier versions do not say."""
    told, wanted = one.table.get("base_digest"), other.table.get("base_digest")
    try:
        return told == wanted or is_same_base(told, wanted)  # type: ignore[arg-type]  # damaged ones are no digests
    except (AttributeError, KeyError, TypeError):
        return False
