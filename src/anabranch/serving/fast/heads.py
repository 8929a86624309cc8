"""Which attentions the compiled step knows beside the plain one: those whose heads are weighed (`anabranch.nn.description`)."""
# Shapes: H heads, M of them routed, S shared, D width

from typing import Any

from torch import Tensor

from anabranch.nn.description import WeighedHeads
from anabranch.routing.description import described
from anabranch.serving.fast.layout import CHeads, floats

__all__ = ["heads", "plain_of", "why_not_weigh"]


def plain_of(attention: Any) -> Any:
    """The attention that makes queries, keys and values."""
    form = described(attention)
    return form.attention if isinstance(form, WeighedHeads) else attention


def why_not_weigh(attention: Any) -> str | None:
    """What an attention says against being computed elsewhere; None for nothing."""
    form = described(attention)
    return form if isinstance(form, str) else None


def heads(attention: Any, dim: int, keep: list[Tensor]) -> CHeads:
    """What the kernel is told of heads; an empty one where all count alike."""
    form = described(attention)
    if not isinstance(form, WeighedHeads):
        return CHeads()
    routed = len(form.routed_MD)
    shared = form.attention.num_heads - routed
    return CHeads(
        floats(form.routed_MD, keep, routed, dim),
        floats(form.bias_M, keep, routed),
        floats(form.pair_2D, keep, 2, dim),
        floats(form.shared_SD, keep, shared, dim),
        routed,
        form.top_k,
        form.floor,
        form.cap,
        form.most_pair,
        form.factor,
    )
