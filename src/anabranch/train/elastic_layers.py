"""A decoder as layers that ranks can move between them: each with the parameters of its own, handing on nothing but rows of sequences.

What the layers of a pipeline hand on beside hidden states (what designs carry, sums of losses, parts of losses over layers) is of a block
of sequences. It travels as rows too: each row of the block has all of it, so it is there wherever the block goes on; what it is, is said
in bytes beside it.
"""
# Shapes: B sequences of a block, L positions, D width, V vocabulary, T tensors

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn.context import set_unregistered
from anabranch.train.evaluate import autocast
from anabranch.train.pipeline_layers import METRIC, Handed, layers_of

__all__ = ["ElasticLayer", "block_loss", "elastic_layers"]

# How a tensor lies in rows: as it is, a position of a sequence after the other, or all of it in each row.
_ROWS, _ITEMS, _ALL = "rows", "items", "all"
# Bytes that say what the tensors are come in multiples of this, so that blocks have as many.
_UNIT = 256


def elastic_layers(model: Decoder, *, precision: str) -> list[nn.Module]:
    """The layers of a model: embedding, blocks (those that share a module together), head."""
    layers, _ = layers_of(model, 1)
    return [ElasticLayer(layer, precision) for layer in layers]


class ElasticLayer(nn.Module):
    """A layer of a pipeline with its parameters, from rows to rows.

    Args:
        layer: of `layers_of`.
        precision: as of `TrainConfig`.
    """

    def __init__(self, layer: nn.Module, precision: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList({id(part): part for part in layer.parts()}.values())  # type: ignore[operator]
        # What it is part of is the model's, and no other layer's.
        set_unregistered(self, "layer", layer)
        self._precision = precision

    def forward(self, rows: Any) -> tuple[Tensor, ...]:
        """``token_BL`` of the first layer, or what the layer before gave; rows of whatever comes out."""
        given = rows if isinstance(rows, Tensor) else _unpacked(rows)
        device = rows.device if isinstance(rows, Tensor) else rows[0].device
        with autocast(device, self._precision):
            found = self.layer(given)  # type: ignore[operator]
        return _packed(found) if isinstance(found, Handed) else _packed_scores(*found)


def block_loss(output: tuple[Tensor, ...], target: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The loss of a block, with its terms and metrics by name.

    Args:
        output: of the head.
        target: ``[B, L]`` tokens to predict, -100 for none; and ``[B]``, in each row how many of them a sequence of the batch has on
            average.
    """
    logits_BLV, said, *tensors = output
    target_BL, mean_B = target
    names, counts = _said(said)
    total = F.cross_entropy(logits_BLV.flatten(0, 1).float(), target_BL.flatten(), ignore_index=-100, reduction="sum")
    # Over blocks that weigh by their sequences this adds up to the mean over all targets of the batch.
    cross_entropy = total / (mean_B[0] * len(target_BL)).clamp_min(torch.finfo(torch.float32).tiny)
    means = {name: tensor[0] / counts[name] for (name, _), tensor in zip(names, tensors, strict=True)}
    auxiliary = [value for name, value in means.items() if not name.startswith(METRIC)]
    loss: Tensor = sum(auxiliary, start=cross_entropy)
    return loss, {name: float(value.detach()) for name, value in {"cross_entropy": cross_entropy, **means}.items()}


def _packed(handed: Handed) -> tuple[Tensor, ...]:
    batch, length = handed.token_BL.shape
    tensors: list[Tensor] = []
    carried, sums, parts = [], [], []
    for name, value in handed.carry.items():
        carried.append([name, _lay(value, batch, length, tensors)])
    for name, value in handed.sums.items():
        sums.append([name, _lay(value, batch, length, tensors, whole=True)])
    for key, found in handed.parts.items():
        parts.append([key, [[_lay(value, batch, length, tensors, whole=True) for value in part] for part in found]])
    said = _bytes_of([carried, sums, handed.counts, parts], handed.token_BL)
    return (handed.x_BLD, handed.token_BL, said, *tensors)


def _unpacked(rows: Sequence[Tensor]) -> Handed:
    x_BLD, token_BL, said, *tensors = rows
    carried, sums, counts, parts = _said(said)
    left = iter(tensors)
    carry = {name: _taken(how, next(left)) for name, how in carried}
    summed = {name: _taken(how, next(left)) for name, how in sums}
    closed = {key: [tuple(_taken(how, next(left)) for how in part) for part in found] for key, found in parts}
    return Handed(x_BLD, token_BL, carry, summed, counts, closed)


def _packed_scores(logits_BLV: Tensor, sums: dict[str, Tensor], counts: dict[str, int]) -> tuple[Tensor, ...]:
    batch, length = logits_BLV.shape[:2]
    tensors: list[Tensor] = []
    names = [[name, _lay(value, batch, length, tensors, whole=True)] for name, value in sums.items()]
    return (logits_BLV, _bytes_of([names, counts], logits_BLV), *tensors)


def _lay(value: Tensor, batch: int, length: int, tensors: list[Tensor], *, whole: bool = False) -> str:
    """Add a tensor as rows; how it lies in them. ``whole``: it is of the block, whatever its shape."""
    first = value.shape[0] if value.ndim and not whole else -1
    if first == batch:
        tensors.append(value)
        return _ROWS
    if first == batch * length:
        tensors.append(value.unflatten(0, (batch, length)))
        return _ITEMS
    tensors.append(value[None].expand(batch, *value.shape))
    return _ALL


def _taken(how: str, rows: Tensor) -> Tensor:
    if how == _ROWS:
        return rows
    return rows.flatten(0, 1) if how == _ITEMS else rows[0]


def _bytes_of(said: Any, like: Tensor) -> Tensor:
    """JSON as rows of bytes, the same in each."""
    told = json.dumps(said).encode()
    told += b" " * (-len(told) % _UNIT)
    row = torch.frombuffer(bytearray(told), dtype=torch.uint8).to(like.device)
    return row[None].expand(len(like), -1)


def _said(rows: Tensor) -> Any:
    try:
        return json.loads(rows[0].cpu().numpy().tobytes())
    except ValueError as error:
        raise ConfigError(f"what a layer handed on says nothing of itself ({error})") from None
