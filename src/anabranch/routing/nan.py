"""Scores that are not numbers: a router that goes on with them sends items anywhere, and nobody sees from where it came."""
# Shapes: N items, E destinations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.errors import NotFiniteError
from anabranch.routing.context import RoutingContext

__all__ = ["count_nan", "is_seen_at_once", "refuse_nan"]


def is_seen_at_once(score_NE: Tensor) -> bool:
    """Whether looking at scores makes nobody wait: on the CPU, outside compiled graphs, in one process.

    Elsewhere `anabranch.train.meter.LoadMeter` counts them, and training looks where a gradient is not finite.
    """
    is_here = score_NE.is_cpu and not torch.compiler.is_compiling()
    return is_here and (not dist.is_initialized() or dist.get_world_size() == 1)


def refuse_nan(score_NE: Tensor, context: RoutingContext, layer: int | str, *, who: str = "router") -> None:
    """Raise NotFiniteError, which names ``who`` and its ``layer``, if a real item has a score that is NaN. Padding may hold anything.

    Where items are positions of sequences it names the first such row of the batch. Where ``context.refuses_nan`` is off, or looking
    would make someone wait (`is_seen_at_once`), nobody looks.
    """
    if not (context.refuses_nan and is_seen_at_once(score_NE)):
        return
    # One sum tells it for all: a sum with a NaN is one. Where none is, this is all the work.
    if not math.isnan(score_NE.sum().item()):
        return
    count = int(count_nan(score_NE, context.item_mask_N))
    if count:
        where = ""
        if context.sequence_length and context.num_streams == 1:
            first = int(_is_nan(score_NE, context.item_mask_N).nonzero()[0])
            where = f", first in row {first // context.sequence_length} of the batch"
        raise NotFiniteError(
            f"the {who} of layer {layer} has NaN scores for {count} of {score_NE.shape[0]} items{where}: what comes into the layer, or the "
            f"{who}'s weights, are not finite"
        )


def count_nan(score_NE: Tensor, item_mask_N: Tensor | None) -> Tensor:
    """int64: the real items that have a NaN score."""
    return _is_nan(score_NE, item_mask_N).sum()


def _is_nan(score_NE: Tensor, item_mask_N: Tensor | None) -> Tensor:
    is_nan_N = score_NE.isnan().any(-1)
    return is_nan_N if item_mask_N is None else is_nan_N & item_mask_N
