"""The compiled form of a model, and passes through all of its blocks."""
# Shapes: T tokens of a step, R rows of it, A layers, K choices of a row, S slots, G key-value heads, D width

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from anabranch.lm.decoder import Decoder
from anabranch.serving.core.batch import Chunk
from anabranch.serving.core.request import Route
from anabranch.serving.engine.layout import StepLayout
from anabranch.serving.engine.paged import PagedPool
from anabranch.serving.engine.served_adapters import ServedAdapters
from anabranch.serving.fast import FastDecoder

__all__ = ["compiled_form", "compiled_hidden"]


def compiled_form(model: Decoder, pool: PagedPool, *, takes_weights: bool = False) -> FastDecoder | None:
    """That which keeps keys and values in ``pool``; None where there is none. ``takes_weights``: see `FastDecoder`."""
    if pool.shape.streams != 1 or FastDecoder.supports(model) is not None:
        return None
    pool_ASGD = tuple(part[: model.config.num_layers, 0] for part in (pool.key, pool.value))
    return FastDecoder(model, *pool_ASGD, block_tokens=pool.block_tokens, takes_weights=takes_weights)


def compiled_hidden(
    fast: FastDecoder,
    chunks: Sequence[Chunk],
    tokens: Sequence[int],
    rows: Sequence[int],
    block_tokens: int,
    *,
    adapters: ServedAdapters | None = None,
    routes: Mapping[int, Route] | None = None,
    layers: Iterable[int] = (),
) -> Tensor:
    """x_RD of ``rows`` of a step, after the last norm.

    Args:
        fast: the compiled form.
        chunks, tokens, rows: of the step.
        block_tokens: of the pool.
        adapters: of requests among these.
        routes: by row, which are filled in.
        layers: numbers of those that route.
    """
    layout = StepLayout(chunks, block_tokens)
    x_TD, route_ATK = fast.hidden(
        torch.tensor(tokens, dtype=torch.int64),
        torch.from_numpy(layout.position_T),
        layout.sequence_N4,
        layout.table_U,
        with_routes=bool(routes),
        adapters=None if adapters is None else adapters.uses(chunks),
    )
    if routes and route_ATK is not None:
        for layer, route_TK in zip(layers, route_ATK, strict=True):
            for route, index_K in zip(routes.values(), route_TK[list(routes)].tolist(), strict=True):
                route[layer] = tuple(index for index in index_K if index >= 0)
    return x_TD if list(rows) == list(range(len(tokens))) else x_TD[list(rows)]
