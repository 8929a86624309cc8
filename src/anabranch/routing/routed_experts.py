"""Records of vLLM's `routed_experts`: where a rollout that vLLM made sent its tokens, read so that training sends them there again.

    experts = [routed_experts(choice["routed_experts"]) for choice in answers]           # each [T, A, K]
    with replay_routing(model, trace_of(model, experts), weights="own"):
        loss = model(token_BL, target_BL).loss

vLLM (``--enable-return-routed-experts``) gives an array of integers, of one row less than prompt and output have tokens: the last one was
drawn and never run. Its second axis has all layers of the model, dense ones as zeros; over HTTP it is an ``.npy`` file in base64.
"""
# Shapes: T rows (tokens that were run), A layers of the record, K choices

import base64
import binascii
import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from anabranch.errors import ConfigError, DataError
from anabranch.routing.discovery import RouterLayer, find_routers, router_layers
from anabranch.routing.router import Router
from anabranch.routing.trace import RoutingTrace
from anabranch.routing.trace_builder import TraceBuilder
from anabranch.routing.trace_schema import TraceLayer

__all__ = ["routed_experts", "routes_of", "trace_of"]


def routed_experts(record: object) -> NDArray[np.int64]:
    """The experts of each row, layer and choice, ``[T, A, K]``.

    Args:
        record: an array (vLLM's ``CompletionOutput.routed_experts``), nested lists, or base64 of an ``.npy`` file.

    Raises DataError for what is none, or holds no whole numbers of at least 0. Nothing is unpickled.
    """
    if isinstance(record, str | bytes):
        try:
            with io.BytesIO(base64.b64decode(record, validate=True)) as file:
                record = np.load(file, allow_pickle=False)
        except (binascii.Error, ValueError, EOFError, OSError) as error:
            raise DataError(f"routed_experts is no .npy file in base64: {error}") from None
    try:
        array = np.asarray(record)
    except ValueError as error:
        raise DataError(f"routed_experts is no array: {error}") from None
    if array.ndim != 3 or not array.shape[2] or array.dtype.kind not in "iu":
        raise DataError(
            f"routed_experts is {array.dtype} of shape {list(array.shape)}; it must be whole numbers [tokens, layers, choices]"
        )
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 2**31):
        raise DataError(
            f"routed_experts names expert {int(array.min())} to {int(array.max())}; they are numbers from 0 on"
        )
    return array.astype(np.int64)


def routes_of(
    experts_TAK: NDArray[np.int64], layers: Sequence[int], *, start: int = 0
) -> dict[int, Mapping[int, tuple[int, ...]]]:
    """{place of a token: {layer: experts}}, as episodes of `anabranch.rl.tokens` keep it.

    Args:
        experts_TAK: see `routed_experts`.
        layers: numbers of the layers that route.
        start: place of the first row: what vLLM left out in front (``routed_experts_prompt_start``).

    Raises DataError for a record of other layers.
    """
    columns = _columns(experts_TAK, layers)
    return {
        start + place: {layer: tuple(row_AK[column].tolist()) for layer, column in columns.items()}
        for place, row_AK in enumerate(experts_TAK)
    }


def trace_of(model: nn.Module, records: Sequence[NDArray[np.int64]]) -> RoutingTrace:
    """A trace of ``model`` in which sequence 0, 1, ... went where the records say, from position 0 on.

    It has destinations alone: replay it with ``weights="own"``. The last token of a sequence, which nothing was drawn from, has none;
    leave it out of the passes that replay.

    Raises ConfigError for a model without routers, or whose routers are no `Router`s that route once; DataError for records of other
    layers, experts or numbers of choices.
    """
    routers = {name: module for name, module in find_routers(model).items() if isinstance(module, Router)}
    layers = router_layers(model, routers) if routers else []
    if not layers or any(layer.num_passes > 1 for layer in layers):
        raise ConfigError(
            f"{type(model).__name__} has no routers that route once each; there is nothing to replay into"
        )
    made = TraceBuilder()
    for item, experts_TAK in enumerate(records):
        columns = _columns(experts_TAK, [layer.number for layer in layers])
        for layer in layers:
            index_TK = experts_TAK[:, columns[layer.number]]
            _check(index_TK, layer)
            made.add(
                _described(layer, index_TK.shape[1]),
                index_TK,
                np.full(index_TK.shape, 1 / index_TK.shape[1], np.float32),
                item_N=item,
                position_N=np.arange(len(index_TK)),
            )
    return made.trace()


def _columns(experts_TAK: NDArray[np.int64], layers: Sequence[int]) -> dict[int, int]:
    """Which column of a record is which layer: by their numbers where it has all layers, else in their order."""
    count = experts_TAK.shape[1]
    if layers and max(layers) < count:
        return {layer: layer for layer in layers}
    if len(layers) == count:
        return dict(zip(sorted(layers), range(count), strict=True))
    raise DataError(
        f"routed_experts has {count} layers, and the model routes in {list(layers)}; it is of another model"
    )


def _check(index_TK: NDArray[np.int64], layer: RouterLayer) -> None:
    router = layer.router
    assert isinstance(router, Router), "others were left out"
    experts, choices = router.num_destinations, router.num_choices
    if index_TK.size and int(index_TK.max()) >= experts:
        raise DataError(
            f"routed_experts names expert {int(index_TK.max())} of layer {layer.number}, which has 0 to {experts - 1}"
        )
    if choices is not None and index_TK.shape[1] != choices:
        raise DataError(
            f"routed_experts has {index_TK.shape[1]} choices, and layer {layer.number} makes {choices}; it is of another model"
        )
    ordered_TK = np.sort(index_TK, axis=1)
    if (ordered_TK[:, 1:] == ordered_TK[:, :-1]).any():
        raise DataError(
            f"routed_experts sends a token to one expert twice in layer {layer.number}; is that layer dense there?"
        )


def _described(layer: RouterLayer, choices: int) -> TraceLayer:
    router = layer.router
    assert isinstance(router, Router), "others were left out"
    return TraceLayer(
        layer=layer.number,
        name=layer.name,
        num_destinations=router.num_destinations,
        top_k=choices,
        pool=router.destinations.pool or "",
        own_start=router.destinations.own_start,
    )
