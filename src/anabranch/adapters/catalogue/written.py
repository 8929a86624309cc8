"""Which file `anabranch adapt` writes of a method, and of how many bytes: by names and shapes of tensors that have no numbers yet."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from anabranch.adapters.around import around_config
from anabranch.adapters.catalogue.card import Card, Options
from anabranch.adapters.catalogue.shape import Matrix, Shape
from anabranch.adapters.front import Front
from anabranch.adapters.graft import layers_of, patterns_of
from anabranch.adapters.numbers import Holder
from anabranch.adapters.own_folder import own_of
from anabranch.adapters.peft_file import PREFIX
from anabranch.adapters.saving import adapter_on
from anabranch.errors import CheckpointError
from anabranch.lm.decoder import Decoder
from anabranch.lm.quantized_form import stored_state
from anabranch.lm.shards import file_size
from anabranch.lm.tensors import build_empty

__all__ = ["goes_to_peft", "written_bytes"]

_FLOAT = 4
# Of a tensor that somebody else writes: its entry in the header, and its name there, such as
# base_model.model.model.layers.10.self_attn.q_proj.lora_A.weight.
_ENTRY, _TENSORS = 130, 2


def goes_to_peft(model: Decoder) -> bool:
    """Whether peft has a form for what is on ``model``: factors beside matrices, or virtual tokens, and not both."""
    layers, is_front = layers_of(model).values(), isinstance(model.streams, Front)
    return is_front != bool(layers) and all(isinstance(layer, Holder) for layer in layers)


def written_bytes(
    card: Card, shape: Shape, chosen: Sequence[Matrix], options: Options, numbers: int, base_width: float
) -> int:
    """Bytes of the file with the numbers.

    Args:
        card: the method.
        shape: of the model.
        chosen: its adapted matrices.
        options: all of the card.
        numbers: that are stored, of 4 bytes; asked for where somebody else writes them, whose header is counted roughly.
        base_width: bytes of one of the base's weights, with which a method that trains some of them is written whole.
    """
    if card.trains_base:
        state = stored_state(build_empty(shape.config))
        weights = sum(math.prod(tensor.shape) for tensor in state.values())
        return file_size(state) - sum(tensor.nbytes for tensor in state.values()) + math.ceil(weights * base_width)
    if card.backend != "own":
        return numbers * _FLOAT + _ENTRY * _TENSORS * len(chosen)
    return file_size(_tensors(card, _adapted(card, shape, chosen, options)))


def _adapted(card: Card, shape: Shape, chosen: Sequence[Matrix], options: Options) -> Decoder:
    """The model with the method on it, without any numbers."""
    make = card.layer
    layers = {} if make is None else {matrix.part: make(matrix, shape, options) for matrix in chosen}
    linears = patterns_of(layers, [matrix.part for matrix in shape.matrices])
    front = None if card.front is None else card.front(shape, options)
    ladder = None if card.ladder is None else card.ladder(shape, options)
    return build_empty(around_config(shape.config.replace(linears=linears), front, ladder))


def _tensors(card: Card, model: Decoder) -> Mapping[str, Tensor]:
    """What is written of it, by name, in the form that it goes to."""
    if goes_to_peft(model):
        try:
            adapter = adapter_on(model)
        except CheckpointError:
            pass
        else:
            prefix = PREFIX if adapter.prompt_MW is None else ""
            return {f"{prefix}{name}": tensor for name, tensor in adapter.tensors().items()}
    own = own_of(model, {})
    return (own if card.written is None else card.written(own)).numbers
