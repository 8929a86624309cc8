"""`export_mixture`: a mixture of adapters, whose weights are fixed, as one plain LoRA that every server loads; and whether it is the same.

exported = export_mixture("both", model, {"french": 0.5, "sql": 0.25})     # folders of peft's, and their weights
"""
# Shapes: B batch, L positions, V vocabulary

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from anabranch.adapters.algebra import Combined, combine
from anabranch.adapters.attach import load_peft, unload
from anabranch.adapters.peft_folder import read_peft, write_peft
from anabranch.adapters.pooled import load_pool, rows_for
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import evaluating

__all__ = ["Exported", "export_mixture"]

_LENGTH = 16


@dataclass(frozen=True)
class Exported:
    """What `export_mixture` wrote.

    Attributes:
        made: the adapter, and how far it is from the mixture by its numbers.
        difference: greatest difference of a logit between the mixture, run beside the matrices, and what was written, read again.
        greatest: the greatest logit of the mixture, to hold the difference against.
    """

    made: Combined
    difference: float
    greatest: float


@torch.no_grad()
def export_mixture(
    out: str | Path,
    model: Decoder,
    weights: Mapping[str | Path, float],
    *,
    rank: int | None = None,
    family: str | None = None,
) -> Exported:
    """Write ``sum_i weight_i adapter_i`` into a folder of peft's, and run ``model`` with it and with the mixture on tokens drawn at random.

    Args:
        out: the folder, as of `write_peft`.
        model: without adapters; it is so again afterwards.
        weights: of each adapter, by its folder.
        rank: of what is written, the nearest of that rank; None for all ranks together, which is the mixture itself.
        family: as of `load_peft`.

    Raises as `combine`, `load_pool` and `write_peft` do: nothing is written where an adapter does not fit the model.
    """
    if not weights:
        raise ConfigError("there is no adapter to export; give at least one folder")
    adapters = [read_peft(folder) for folder in weights]
    made = combine(adapters, list(weights.values()), "exact" if rank is None else "svd", rank=rank)
    names = {str(number): folder for number, folder in enumerate(weights)}
    mixture = dict(zip(names, weights.values(), strict=True))
    token_BL = torch.randint(
        model.config.vocab_size, (1, _length(model)), generator=torch.Generator().manual_seed(0)
    ).to(model.embedding.weight.device)
    with evaluating(model):
        load_pool(names, model, family=family)
        try:
            wanted_BLV = model(token_BL, state=rows_for(model, [mixture], token_BL.shape[1])).logits_BLV
        finally:
            unload(model)
        # The model has these: whoever loads it need not.
        made = replace(made, adapter=replace(made.adapter, copies={}))
        write_peft(out, made.adapter)
        load_peft(out, model, family=family)
        try:
            found_BLV = model(token_BL).logits_BLV
        finally:
            unload(model)
    return Exported(made, _greatest(found_BLV - wanted_BLV), _greatest(wanted_BLV))


def _length(model: Decoder) -> int:
    return min(_LENGTH, model.config.max_positions)


def _greatest(logits_BLV: Tensor) -> float:
    value = float(logits_BLV.abs().max())
    return value if math.isfinite(value) else math.inf
