"""`outline`: a model as it would be loaded, without its weights: every tensor of the shape and type it would have, and no memory for it.

From an outline one reads what a model takes before it is there: bytes, experts, keys and values per token.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from anabranch.lm import formats
from anabranch.lm.checkpoint import find_model, identity, load_config, quantization_of
from anabranch.lm.decoder import Decoder
from anabranch.lm.gguf import GgufFile
from anabranch.lm.gguf_blocks import kept_form
from anabranch.lm.quantized import check_some, empty_layers
from anabranch.lm.quantized_form import check_scheme, empty_quantized
from anabranch.lm.tensors import Layout, TensorSource, build_empty, open_tensors
from anabranch.nn.quantize import put, quantizable

__all__ = ["outline", "stored_bits", "weight_bytes"]

Bits = Literal["int8", "int4"]


def outline(model: str | Path | Decoder.Config, *, bits: Bits | None = None, dtype: torch.dtype) -> Decoder:
    """What `anabranch.lm.load_model`, or with ``bits`` `anabranch.lm.quantized.load_quantized`, would give.

    Args:
        model: a path as for `load_model`, where of a folder in floating point config.json is enough; or a config.
        bits: of linear layers and experts.
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
        else:
            made, layout = build_empty(load_config(found)), None
        if table is not None:
            if bits is not None:
                check_scheme(table, bits, None, found)
            for name, module in empty_quantized(made, open_tensors(found), table, where=found, dtype=dtype).items():
                put(made, name, module)
            return _retyped(made, dtype)
    if bits is not None:
        chosen = dict(quantizable(made, bits))
        check_some(chosen, bits, str(model))
        layers = empty_layers(made, chosen, source, layout or identity(made), dtype, bits)
        for name, module in layers.items():
            put(made, name, module)
    return _retyped(made, dtype)


def stored_bits(model: str | Path | Decoder.Config) -> Bits | None:
    """``int4`` for a GGUF file all of whose matrices stay as they are stored when int4 is asked for; None for everything else."""
    if isinstance(model, Decoder.Config) or not (found := find_model(model)).is_file():
        return None
    source, made, layout = _of_gguf(found)
    for name in quantizable(made, "int4"):
        for key, pieces in layout.items():
            is_weight = key.startswith(f"{name}.") and not key.endswith(".bias")
            if is_weight and kept_form(source, [piece.name for piece in pieces], "int4") is None:
                return None
    return "int4"


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
