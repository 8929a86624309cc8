"""Experts' vectors into the scores of a model that they are on, and who is in which cluster."""
# Shapes: E experts, G clusters, C inputs

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anabranch.adapters.attached import attached_on
from anabranch.adapters.glider.clusters import clusters_of
from anabranch.adapters.glider.score import Local
from anabranch.adapters.glider.vectors import vector_of
from anabranch.adapters.lora_mixer import MixedLowRank, mixed_layers
from anabranch.lm.decoder import Decoder

__all__ = ["give_vectors"]


def give_vectors(
    model: Decoder, gates: Mapping[str, Mapping[str, Tensor]], local: Local, clusters: int | None = None
) -> None:
    """Each expert's vector beside each matrix that it adapts.

    Args:
        model: with the experts on, whose scores are `GliderScore`.
        gates: of each, in order, by the names of transformers' modules; a prototype where there is none.
        local: with ``arrow`` prototypes alone.
        clusters: G; None for none.
    """
    module_of = {place.part: module for module, place in attached_on(model).names.places.items()}
    found: dict[str, dict[str, tuple[Tensor, bool]]] = {name: {} for name in gates}
    for part, layer in mixed_layers(model).items():
        score = _score(layer)
        for number, (name, own) in enumerate(gates.items()):
            vector_C, is_signed = vector_of(layer.pool.pair(number), own.get(module_of[part]), local)
            score.vectors.data[number] = vector_C.to(score.vectors)
            score.unsigned_E[number] = not is_signed
            if number not in layer.config.closed:
                found[name][part] = vector_C, is_signed
    if clusters is None:
        return
    cluster_E = torch.tensor(list(clusters_of(found, clusters).values()))
    for layer in mixed_layers(model).values():
        score = _score(layer)
        member_GE = cluster_E == torch.arange(clusters)[:, None]
        member_GE[:, list(layer.config.closed)] = False
        score.member_GE.copy_(member_GE)


def _score(layer: MixedLowRank) -> Any:
    assert layer.router is not None
    return layer.router.score
