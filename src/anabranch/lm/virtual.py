"""What the layers of a decoder make of virtual tokens in front of every sequence: keys and values, which no token after them changes."""
# Shapes: M virtual tokens, W model width, H key-value heads, D head width

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anabranch.nn.context import ForwardContext
from anabranch.nn.shared_prefix import SharedPrefix

if TYPE_CHECKING:
    from anabranch.lm.decoder import Decoder

__all__ = ["entries_of"]


class _Kept:
    """The store of that one pass: it keeps what comes, by layer."""

    def __init__(self) -> None:
        self.layers: dict[int, SharedPrefix] = {}

    def append(
        self, layer: int, key_BHLD: Tensor, value_BHLD: Tensor, *, visit: int = 0, rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, None]:
        """See `anabranch.nn.context.KeyValueStore`."""
        self.layers[layer] = key_BHLD, value_BHLD
        return key_BHLD, value_BHLD, None


def entries_of(model: "Decoder", prompt_MW: Tensor) -> list[SharedPrefix]:
    """(key_1HMD, value_1HMD) of each layer, in order: of embeddings at positions 0 to M - 1, each of which sees those before it.

    Gradients flow through. Nothing of the pass is recorded, measured or balanced, as no token is in it.
    """
    length, device = len(prompt_MW), prompt_MW.device
    position_1M = torch.arange(length, device=device)[None]
    kept = _Kept()
    context = ForwardContext(
        sequence_length=length,
        is_measured=False,
        training=False,
        state={"repeated_N": torch.ones(length, dtype=torch.bool, device=device)},
        position_BL=position_1M,
        rotary=model.rotary(position_1M, model._dtype(device)),
        cache=kept,
    )
    x_1MW = prompt_MW.to(model.embedding.weight.dtype)[None]
    for block in model.blocks:
        x_1MW = model._run(block, x_1MW, context)
    return [kept.layers[layer] for layer in range(len(model.blocks))]
