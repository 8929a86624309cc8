"""Weights of several types in one model, as published mixtures have them: norms and routers in float32, the rest in bfloat16."""

from torch import nn

from anabranch.lm.decoder import Decoder
from anabranch.nn import RMSNorm
from anabranch.routing import Score

__all__ = ["fit_types"]


def fit_types(model: Decoder) -> None:
    """Make a model of mixed types one that computes, in place: all weights in the type of the embedding, but for norms and routers.

    Those compute in float32 whatever comes in, so they keep the type that they have.
    """
    kind = model.embedding.weight.dtype
    for module in _parts_of_one_type(model):
        for parameter in module.parameters(recurse=False):
            if parameter.dtype != kind:
                parameter.data = parameter.data.to(kind)


def _parts_of_one_type(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, (RMSNorm, Score)):
        return []
    return [module, *(part for child in module.children() for part in _parts_of_one_type(child))]
