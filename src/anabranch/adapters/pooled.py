"""`load_pool`: several adapters on one model, of which each row of a batch uses those that `rows_for` says."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.adapters.attached import attached_on, begin, check_bare, our_layers
from anabranch.adapters.copies import without_copies
from anabranch.adapters.fits import check_fits
from anabranch.adapters.graft import check_pools, graft, with_layers
from anabranch.adapters.low_rank import Pair, scale_of
from anabranch.adapters.names import names_of
from anabranch.adapters.peft_folder import Adapter, read_peft
from anabranch.adapters.routed import RoutedLowRank, chosen_rows
from anabranch.adapters.stacked import Stack
from anabranch.adapters.whole import with_parted_head
from anabranch.bounds import shown
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder

__all__ = ["load_pool", "rows_for"]

# In which weights of rows are multiplied.
_GREATEST = torch.finfo(torch.float32).max


def load_pool(
    folders: Mapping[str, str | Path],
    model: Decoder,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
) -> Decoder:
    """Put several adapters onto ``model``, in place, of which each row of a batch uses those that `rows_for` says; and return the model.

    They share a `LowRankPool` beside each matrix: one grouped product for all rows. Rows that are told nothing get the base. Ranks, scales
    and layers may differ.

    Args:
        folders: of peft's, by the names that rows are told with.
        model: as for `load_peft`.
        family: likewise.
        dtype: what A and B are kept in; float32 at least if None, as peft keeps them. In the model's own bfloat16 a pass reads half as
            much, and sums are of float32 all the same.

    Raises as `load_peft`; ConfigError also for no folder, and for adapters that bring whole tensors, or hold others of the base than the
    model has, which all rows would get.
    """
    if not folders:
        raise ConfigError("there is no adapter to put on; give at least one folder")
    adapters = {name: read_peft(folder) for name, folder in folders.items()}
    check_bare(model)
    for name, adapter in adapters.items():
        adapter.check_low_rank("rows choose among plain LoRA alone; load it alone, with load_peft", f"adapter {name!r}")
        if adapter.saved:
            raise ConfigError(
                f"adapter {name!r} brings {next(iter(adapter.saved))} whole, which all rows would get; load it alone, with load_peft"
            )
    config = with_parted_head(model.config, adapters.values())
    modules = list(dict.fromkeys(module for adapter in adapters.values() for module in adapter.pairs))
    names = names_of(config, modules, family)
    for name, adapter in adapters.items():
        check_fits(adapter, names, config, Path(folders[name]))
    why = "which all rows would get; load it alone, with load_peft"
    adapters = {
        name: without_copies(adapter, names, model, f"adapter {name!r}", why) for name, adapter in adapters.items()
    }
    config = with_parted_head(model.config, adapters.values())
    own: list[dict[str, Any]] = [our_layers(names, adapter, config) for adapter in adapters.values()]
    pairs = {part: [one.get(part) for one in own] for part in dict.fromkeys(part for one in own for part in one)}
    made = with_layers(config, {part: RoutedLowRank.config_of(own) for part, own in pairs.items()}, names.parts)
    check_pools(model, made)
    begin(model, adapters, names, config).is_pool = True
    device = model.embedding.weight.device
    graft(model, made, lambda part, layer: layer.put(pairs[part], device, dtype=dtype))
    return model


def rows_for(model: Decoder, rows: Sequence[str | Mapping[str, float] | None], length: int) -> dict[str, Tensor]:
    """The ``state`` of a forward pass whose rows use these adapters of `load_pool`.

    Args:
        model: with the adapters.
        rows: for each row a name, names with weights (a mixture), or None for the base.
        length: L of the pass.

    Raises ConfigError for a row that is none of these, a name that there is not, a model without a pool, and a weight that is no number or
    not finite, be it only once it is multiplied by the scale of its adapter: what is not finite in one row can end the pass of all.
    """
    attached = attached_on(model)
    if not attached.is_pool:
        raise ConfigError("the model has an adapter of load_peft, which all rows get; load_pool lets them choose")
    known = list(attached.adapters)
    told = [_weights_of(number, row) for number, row in enumerate(rows)]
    unknown = [name for row in told for name in row if name not in known]
    if unknown:
        raise ConfigError(f"adapter {shown(unknown[0])} is not on the model; there are {', '.join(map(repr, known))}")
    _check_weights(attached.adapters, told)
    most = max([1, *map(len, told)])
    index = [[*map(known.index, row), *[-1] * (most - len(row))] for row in told]
    index_BK = torch.tensor(index, dtype=torch.int64).view(-1, most)
    weight_BK = torch.tensor([[*row.values(), *[0.0] * (most - len(row))] for row in told]).view(-1, most)
    device = model.embedding.weight.device
    return chosen_rows(index_BK.to(device), length, weight_BK.to(device))


def _weights_of(number: int, row: Any) -> dict[str, float]:
    """Names with weights, floats all of them, of what ``row`` of this number says. Raises ConfigError for what says none."""
    if row is None or isinstance(row, str):
        return {} if row is None else {row: 1.0}
    if not isinstance(row, Mapping):
        raise ConfigError(
            f"row {number} is {shown(row)}; it must be the name of an adapter, a mapping of names to weights, or None for the base"
        )
    for name, weight in row.items():
        if not isinstance(weight, Real) or isinstance(weight, bool):
            raise ConfigError(f"row {number} has weight {shown(weight)} for adapter {shown(name)}; it must be a number")
    return {name: _float(weight) for name, weight in row.items()}


def _float(weight: Any) -> float:
    """The nearest float; infinity for a whole number that has none."""
    try:
        return float(weight)
    except OverflowError:
        return math.inf if weight > 0 else -math.inf


def _check_weights(adapters: Mapping[str, Adapter], told: Sequence[Mapping[str, float]]) -> None:
    """Raise ConfigError for a weight that is none in float32, alone or times a scale."""
    scales = {
        name: max([1.0, *(abs(scale_of(one.rank, one.alpha, one.rslora)) for one in _parts_of(adapters[name]))])
        for name in {name for row in told for name in row}
    }
    for number, row in enumerate(told):
        for name, weight in row.items():
            # A NaN is not less.
            if not abs(weight) * scales[name] <= _GREATEST:
                raise ConfigError(
                    f"row {number} has weight {weight} for adapter {name!r}, whose greatest scale is {scales[name]:g}; their product must "
                    f"be a number of at most {_GREATEST:.3g}"
                )


def _parts_of(adapter: Adapter) -> list[Pair | Stack]:
    return [*adapter.pairs.values(), *adapter.stacks.values()]
