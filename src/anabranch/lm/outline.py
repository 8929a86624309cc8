"""`outline`: a model as it would be loaded, without its weights: every tensor of the shape and type it would have, and no memory for it.

From an outline one reads what a model takes before it is there: bytes, experts, keys and values per token.
"""

from pathlib import Path

import torch
from torch import nn

from anabranch.lm import formats
from anabranch.lm.checkpoint import find_model, identity, load_config, open_model, quantization_of
from anabranch.lm.decoder import Decoder
from anabranch.lm.gguf import GgufFile
from anabranch.lm.quantized import check_some, has_few_bits
from anabranch.lm.quantized_form import check_scheme, empty_quantized
from anabranch.lm.quantized_layers import Bits, Layers
from anabranch.lm.tensors import Layout, TensorSource, build_empty, has_weights, open_tensors
from anabranch.nn.quantize import put

__all__ = ["outline", "weight_bytes"]


def outline(model: str | Path | Decoder.Config, *, bits: Bits | None = None, dtype: torch.dtype) -> Decoder:
    """What `anabranch.lm.load_model`, or with ``bits`` `anabranch.lm.quantized.load_quantized`, would give.

    Args:
        model: a path as for `load_model`, where of a folder in floating point config.json is enough; or a config.
        bits: of linear layers and experts; ``stored`` of a folder with a config.json alone is None.
        dtype: of the weights, or of what is left of them beside ``bits``.

    Returns:
        The model with parameters, and the buffers of quantised layers, on the device ``meta``.

    Raises:
        CheckpointError, ConfigError, BackendError: as those functions, as far as it shows without weights.
    """
    source: TensorSource | None = None
    if isinstance(model, Decoder.Config):
        made, layout, table = build_empty(model), None, None
    else:
        found = find_model(model)
        table = quantization_of(found)
        if found.is_file():
            source, made, layout = _of_gguf(found)
        elif bits in ("stored", "int4") and has_few_bits(found) and has_weights(found):
            opened = open_model(found, dtype=dtype)
            source, made, layout = opened.source, opened.model, opened.layout
        else:
            made, layout = build_empty(load_config(found)), None
        if table is not None:
            if bits is not None and bits != "stored":
                check_scheme(table, bits, None, found)
            for name, module in empty_quantized(made, open_tensors(found), table, where=found, dtype=dtype).items():
                put(made, name, module)
            return _retyped(made, dtype)
    if bits is not None:
        layers = Layers(source, layout or identity(made), dtype, bits)
        chosen = layers.chosen(made)
        if bits != "stored":
            check_some(chosen, bits, str(model))
        for name, layer in layers.empties(made, chosen).items():
            put(made, name, layer)
    return _retyped(made, dtype)


def weight_bytes(module: nn.Module) -> int:
    """Memory of the parameters and buffers of a module, of what stands in several places once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _of_gguf(path: Path) -> tuple[GgufFile, Decoder, Layout]:
    file = GgufFile(path)
    model, layout, _, _ = formats.prepare(file, file.foreign_config(), path)
    return file, model, layout


def _retyped(model: Decoder, dtype: torch.dtype) -> Decoder:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
