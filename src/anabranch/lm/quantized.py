"""Load or save a model whose linear layers are in few bits: GGUF blocks as they are stored, anything else rounded, layer by layer.

A layer is read, rounded and let go before the next one is read, so that what a model takes on its way is itself and a layer.
"""

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import ConfigError
from anabranch.files import read_json
from anabranch.lm.checkpoint import find_model, is_foreign, load_model, open_any, quantization_of
from anabranch.lm.decoder import Decoder
from anabranch.lm.gguf import GgufFile
from anabranch.lm.gguf_blocks import BLOCKS
from anabranch.lm.mixed_types import fit_types
from anabranch.lm.quantized_form import check_scheme
from anabranch.lm.quantized_layers import EMBEDDING, Bits, Layers, Made
from anabranch.lm.tensors import Layout, TensorSource, check, fill, has_weights, state_once
from anabranch.nn.packed import SHARE
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import FEWEST, module_of, put, replace

__all__ = ["Rounding", "check_some", "has_few_bits", "load_quantized", "makes_experts", "open_quantized"]

logger = logging.getLogger(__name__)

# How GGUF files store what is in floating point.
_FLOATS = ("F64", "F32", "F16", "BF16")


def load_quantized(
    path: str | Path, bits: Bits, *, dtype: torch.dtype | None = None, group: int | None = None
) -> tuple[Decoder, Tokenizer | None]:
    """A model in ``bits`` and its tokenizer.

    With int4, matrices that a GGUF file stores in blocks of Q4_0, Q4_1, Q8_0, Q4_K, Q5_K or Q6_K keep these numbers, scales and minima to
    the bit, and with int8 those in Q8_0; with int4 those that GPTQ and AWQ store in four bits keep numbers and scales, see
    `anabranch.lm.formats.few_bits`. Parts of a matrix (query, key and value; gate and up, also of experts) may be in several of these, see
    `anabranch.nn.parts`; where parts cannot be apart, the matrix becomes int8. A folder that was saved in ``bits`` is loaded as it is;
    everything else is rounded as `anabranch.nn.quantize.quantize` does, one layer after the other.

    With ``stored`` all of that is kept likewise, the embedding of a GGUF file too, and everything else is in floating point: a model that
    has nothing to keep is what `load_model` gives.

    Args:
        path: as for `load_model`.
        bits: of linear layers and experts.
        dtype: of what is left (embedding, norms, routers); None keeps the stored one (float32 for GGUF).
        group: weights that share a scale where they are rounded here, see `quantize`.

    Raises:
        CheckpointError, TokenizerError, BackendError: as `load_model`.
        ConfigError: as `quantize`; for a folder that was saved in other bits, or with another ``group``; no layer can be quantised.
    """
    found = find_model(path)
    saved = quantization_of(found)
    if saved is not None and bits != "stored":
        check_scheme(saved, bits, group, found)
    if saved is not None or (bits == "stored" and not has_few_bits(found)):
        return load_model(found, dtype=dtype)
    opened = open_quantized(found, bits, dtype=dtype, group=group)
    for name, make in opened.makers.items():
        put(opened.model, name, make())
    return opened.model, opened.tokenizer


def has_few_bits(found: Path) -> bool:
    """Whether the weights of what `find_model` gave may be stored in few bits that others chose: of a GGUF file, or GPTQ and the like."""
    if found.is_file():
        return True
    table = read_json(found / "config.json")
    return is_foreign(table) and bool(table.get("quantization_config"))


def makes_experts(found: Path, bits: Bits | None) -> bool:
    """Whether experts of what `find_model` gave that stay on disk are made of what is stored, in ``bits``, whenever they are wanted."""
    if found.is_file():
        return bits in (None, "stored")
    if bits == "stored":
        return quantization_of(found) is None and has_few_bits(found)
    return bits is None and _is_rearranged(found)


def _is_rearranged(found: Path) -> bool:
    """Whether numbers of experts stand in another order in a folder than here, as gates and ups of gpt-oss do, which alternate."""
    if not is_foreign(read_json(found / "config.json")) or not has_weights(found):
        return False
    layout = open_any(found).layout
    return any(piece.change for name in layout if name.endswith((".w13", ".w2")) for piece in layout[name])


@dataclass(frozen=True)
class Rounding:
    """A model about to be rounded.

    Attributes:
        model: all of it but the layers to be quantised, which only tell their sizes (on the device ``meta``).
        makers: makes each of these by its name, in this order: reads the weights and rounds them.
        tokenizer: None if there is none.
        layers: reads single experts.
        source, layout: the stored tensors, and how they make up the model's.
    """

    model: Decoder
    makers: dict[str, Callable[[], Made]]
    tokenizer: Tokenizer | None
    layers: Layers
    source: TensorSource
    layout: Layout


def open_quantized(
    path: str | Path,
    bits: Bits | None,
    *,
    dtype: torch.dtype | None = None,
    group: int | None = None,
    pools_apart: bool = False,
) -> Rounding:
    """`load_quantized` before layers are read, of a model that is not in few bits yet. Arguments and errors as that.

    With ``bits`` None nothing will be in few bits. With ``pools_apart`` pools that will not be only tell their sizes too.
    """
    opened = open_any(path, dtype=dtype)
    model, source, layout = opened.model, opened.source, opened.layout
    check(state_once(model), source, layout, where=opened.where, ignore=opened.ignore, hint=opened.hint)
    kind = opened.dtype or torch.float32
    layers = Layers(source, layout, kind, bits)
    chosen = layers.chosen(model, group)
    if bits in ("int8", "int4"):
        check_some(chosen, bits, str(path))
        _tell_of_others(model, chosen, bits, path)
    elif bits is not None and isinstance(source, GgufFile):
        _tell_of_dequantised(source, {name for own in chosen for name in layers.tensors_of(own)}, kind)
    is_tied = model.head is None
    stands = layers.empties(model, chosen)
    makers: dict[str, Callable[[], Made]] = {
        name: layers.maker(name, module_of(model, name), *chosen[name]) for name in chosen if name != EMBEDDING
    }
    if EMBEDDING in chosen:
        makers[EMBEDDING] = partial(layers.table, model, stands[EMBEDDING], is_tied=is_tied)
    empty: dict[str, nn.Module] = {**stands, **(_apart(model, chosen, kind) if pools_apart else {})}
    used = []
    for name in empty:
        if name != "head" or not is_tied:
            used += layers.tensors_of(name)
            # With no parameters there, filling leaves it alone.
            replace(model, name, nn.Identity())
    ignore = [*opened.ignore, *used]
    # Of GGUF, which has no type of its own, None is float32 too.
    rest = dtype or (torch.float32 if isinstance(source, GgufFile) else None)
    fill(model, source, layout, where=opened.where, dtype=rest, ignore=ignore, hint=opened.hint)
    for name, module in empty.items():
        put(model, name, module)
    fit_types(model)
    return Rounding(model, makers, opened.tokenizer, layers, source, layout)


def _apart(model: Decoder, chosen: Collection[str], dtype: torch.dtype) -> dict[str, nn.Module]:
    """The pools that stay in floating point, without memory, in the type that they shall have."""
    pools = {name: module for name, module in model.named_modules() if isinstance(module, ExpertPool)}
    found: dict[str, nn.Module] = {name: pool for name, pool in pools.items() if name not in chosen}
    for pool in found.values():
        for weight in pool.parameters():
            weight.data = weight.data.to(dtype)
    return found


def _tell_of_dequantised(file: GgufFile, kept: Collection[str], dtype: torch.dtype) -> None:
    """Warn of what a file stores in blocks and is not kept: since no kernel computes with them, or for what they are in one matrix with."""
    left = [name for name in file.names if name not in kept and file.kind(name) not in _FLOATS]
    if left:
        kinds = {file.kind(name) for name in left}
        odd, beside = (", ".join(sorted(some)) for some in (kinds - BLOCKS.keys(), kinds & BLOCKS.keys()))
        reasons = [
            odd and f"{odd}, which no kernel computes with where they stand",
            beside and f"{beside} in one matrix with others",
        ]
        numbers = sum(math.prod(file.shape(name)) for name in left)
        share = numbers / sum(math.prod(file.shape(name)) for name in file.names)
        logger.warning(
            "%d tensors of %s are stored in %s: %.0f%% of the weights become %s",
            len(left),
            file.path,
            ", and ".join(filter(None, reasons)),
            100 * share,
            str(dtype).removeprefix("torch."),
        )


def check_some(chosen: Collection[str], bits: Bits, path: str) -> None:
    """Raise ConfigError for a model of which no layer can be in ``bits``."""
    if not chosen:
        raise ConfigError(
            f"quantize is {bits!r}, but no layer of {path} can be in {bits}: that takes inputs that are a multiple of {SHARE} and "
            f"at least {FEWEST} outputs; leave it out"
        )


def _tell_of_others(model: Decoder, chosen: Collection[str], bits: Bits, path: str | Path) -> None:
    """Warn of experts that no kernel for few bits takes."""
    pools = {name: module for name, module in model.named_modules() if isinstance(module, ExpertPool)}
    left = [module for name, module in pools.items() if name not in chosen and not module.is_plain]
    if left:
        share = sum(part.numel() for pool in left for part in pool.parameters())
        logger.warning(
            "experts of %s have biases or another activation, which no %s kernel has: %.0f%% of the weights stay in floating point",
            path,
            bits,
            100 * share / sum(part.numel() for part in model.parameters()),
        )
