"""Load or save a model whose linear layers are in few bits: GGUF blocks as they are stored, anything else rounded, layer by layer.

A layer is read, rounded and let go before the next one is read, so that what a model takes on its way is itself and a layer.
"""
# Shapes: N rows (outputs), K depth (inputs), E experts

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import ConfigError
from anabranch.lm.checkpoint import find_model, load_model, open_any, quantization_of
from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.few_bits import Dequantised
from anabranch.lm.gguf import GgufFile
from anabranch.lm.gguf_blocks import is_mixed, kept_form, packed_rows
from anabranch.lm.mixed_types import fit_types
from anabranch.lm.quantized_form import Quantized, check_scheme
from anabranch.lm.tensors import Layout, Piece, TensorSource, check, fill, state_once
from anabranch.nn.packed import SHARE, Packed
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import FEWEST, QuantizedLinear, QuantizedPool, module_of, put, quantizable, replace

__all__ = ["Rounding", "check_some", "empty_layers", "load_quantized", "open_quantized"]

logger = logging.getLogger(__name__)

Bits = Literal["int8", "int4"]


def load_quantized(
    path: str | Path, bits: Bits, *, dtype: torch.dtype | None = None, group: int | None = None
) -> tuple[Decoder, Tokenizer | None]:
    """A model in ``bits`` and its tokenizer.

    With int4, matrices that a GGUF file stores in blocks of Q4_0, Q4_1, Q8_0, Q4_K, Q5_K or Q6_K keep these numbers, scales and minima to
    the bit, and with int8 those in Q8_0; with int4 those that GPTQ and AWQ store in four bits keep numbers and scales, see
    `anabranch.lm.formats.few_bits`; one whose parts (query, key and value; gate and up) are in several of these becomes int8. A folder
    that was saved in ``bits`` is loaded as it is; everything else is rounded as `anabranch.nn.quantize.quantize` does, one layer after the
    other.

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
    if saved is not None:
        check_scheme(saved, bits, group, found)
        return load_model(found, dtype=dtype)
    opened = open_quantized(found, bits, dtype=dtype, group=group)
    for name, make in opened.makers.items():
        put(opened.model, name, make())
    return opened.model, opened.tokenizer


@dataclass(frozen=True)
class Rounding:
    """A model about to be rounded.

    Attributes:
        model: all of it but the layers to be quantised, which only tell their sizes (on the device ``meta``).
        makers: makes each of these by its name: reads the weights and rounds them.
        tokenizer: None if there is none.
    """

    model: Decoder
    makers: dict[str, Callable[[], Quantized]]
    tokenizer: Tokenizer | None


def open_quantized(
    path: str | Path, bits: Bits, *, dtype: torch.dtype | None = None, group: int | None = None
) -> Rounding:
    """`load_quantized` before layers are read, of a model that is not in few bits yet. Arguments and errors as that."""
    opened = open_any(path, dtype=dtype)
    model, source, layout = opened.model, opened.source, opened.layout
    check(state_once(model), source, layout, where=opened.where, ignore=opened.ignore, hint=opened.hint)
    chosen: dict[str, tuple[Any, int | None]] = dict(quantizable(model, bits, group=group))
    check_some(chosen, bits, str(path))
    _tell_of_others(model, bits, path)
    kind = opened.dtype or torch.float32
    rounding = _Layers(source, layout, kind, bits)
    makers = {name: rounding.maker(name, module_of(model, name), *chosen[name]) for name in chosen}
    empty = empty_layers(model, chosen, source, layout, kind, bits)
    used = []
    for name in chosen:
        if name != "head" or model.head is not None:
            used += [piece.name for key, part in layout.items() if key.startswith(f"{name}.") for piece in part]
            # With no parameters there, filling leaves it alone.
            replace(model, name, nn.Identity())
    ignore = [*opened.ignore, *used]
    # Of GGUF, which has no type of its own, None is float32 too.
    rest = dtype or (torch.float32 if isinstance(source, GgufFile) else None)
    fill(model, source, layout, where=opened.where, dtype=rest, ignore=ignore, hint=opened.hint)
    fit_types(model)
    for name, module in empty.items():
        put(model, name, module)
    return Rounding(model, makers, opened.tokenizer)


def check_some(chosen: Collection[str], bits: Bits, path: str) -> None:
    """Raise ConfigError for a model of which no layer can be in ``bits``."""
    if not chosen:
        raise ConfigError(
            f"quantize is {bits!r}, but no layer of {path} can be in {bits}: that takes inputs that are a multiple of {SHARE} and "
            f"at least {FEWEST} outputs; leave it out"
        )


def _tell_of_others(model: Decoder, bits: Bits, path: str | Path) -> None:
    """Warn of experts that no kernel for few bits takes."""
    left = [module for module in model.modules() if isinstance(module, ExpertPool) and not module.is_plain]
    if left:
        share = sum(part.numel() for pool in left for part in pool.parameters())
        logger.warning(
            "experts of %s have biases or another activation, which no %s kernel has: %.0f%% of the weights stay in floating point",
            path,
            bits,
            100 * share / sum(part.numel() for part in model.parameters()),
        )


def empty_layers(
    model: Decoder,
    chosen: Mapping[str, tuple[Any, int | None]],
    source: TensorSource | None,
    layout: Layout,
    dtype: torch.dtype,
    bits: Bits,
) -> dict[str, Quantized]:
    """What stands in place of the layers ``chosen`` of a model, by name, without weights (on the device ``meta``).

    ``source`` may be None where all is rounded: of GGUF it says which blocks are kept.
    """
    layers = _Layers(source, layout, dtype, bits)
    return {name: layers.empty(name, module_of(model, name), *chosen[name]) for name in chosen}


class _Layers:
    """Makes the quantised layers of a model from the stored tensors.

    Args:
        source, layout: the tensors, and how they make up the model's.
        dtype: that weights are rounded to first.
        bits: that are asked for.
    """

    def __init__(self, source: TensorSource | None, layout: Layout, dtype: torch.dtype, bits: Bits) -> None:
        # Without one nothing can be made, but for what tells sizes.
        self._source: Any = source
        self._layout, self._dtype, self._bits = layout, dtype, bits

    def maker(self, name: str, module: Any, bits: Bits, group: int | None) -> Callable[[], Quantized]:
        """Makes the layer ``name``, whose sizes are those of ``module``."""
        if isinstance(module, ExpertPool):
            return partial(self._pool, name, self.empty(name, module, bits, group))
        return partial(self._linear, name, self.empty(name, module, bits, group))

    def empty(self, name: str, module: Any, bits: Bits, group: int | None) -> Any:
        """The layer without its weights, on the device ``meta``."""
        if isinstance(module, ExpertPool):
            return QuantizedPool(
                *(self._like(f"{name}.{part}", getattr(module, part).shape, bits, group) for part in ("w13", "w2"))
            )
        like = self._like(self._weight(name), (1, *module.weight.shape), bits, group)
        bias = None if module.bias is None else torch.empty(module.bias.shape, dtype=self._dtype, device="meta")
        return QuantizedLinear(like, bias)

    def _like(self, weight: str, shape: Sequence[int], bits: Bits, group: int | None) -> Packed:
        """Sizes of the matrices ``[E, N, K]`` of a weight: as they are stored where they stay so, else as they are asked for."""
        kept = self._kept(weight)
        kind, size = (bits, group) if kept is None else kept
        source, names = self._source, [piece.name for piece in self._layout[weight]]
        if kept is None and isinstance(source, GgufFile) and is_mixed(source, names):
            # Rounding what has six bits to four would lose what the file was made to keep.
            kind, size = "int8", SHARE
        num, rows, depth = shape
        return Packed.empty(num, rows, depth, kind, size or depth, device="meta")

    def _kept(self, weight: str) -> tuple[Any, int] | None:
        names, source = [piece.name for piece in self._layout[weight]], self._source
        if any(piece.change for piece in self._layout[weight]):
            return None
        if isinstance(source, Dequantised) and self._bits == "int4":
            groups = {source.group_of(name) for name in names}
            group = groups.pop()
            return None if groups or group is None else ("int4", group)
        return kept_form(source, names, self._bits) if isinstance(source, GgufFile) else None

    def _weight(self, name: str) -> str:
        """The stored weight of a linear layer: the embedding's for a head that is one with it."""
        weight = f"{name}.weight"
        return weight if weight in self._layout else "embedding.weight"

    @torch.no_grad()
    def _linear(self, name: str, like: QuantizedLinear) -> QuantizedLinear:
        weight = self._weight(name)
        packed = self._packed(weight, like.packed, [_of_one(self._layout[weight])])
        bias = None if like.bias is None else self._read(_of_one(self._layout[f"{name}.bias"]), tuple(like.bias.shape))
        return QuantizedLinear(packed, bias)

    @torch.no_grad()
    def _pool(self, name: str, like: QuantizedPool) -> QuantizedPool:
        weights = [f"{name}.{part}" for part in ("w13", "w2")]
        return QuantizedPool(
            *(
                self._packed(weight, packed, _of_experts(self._layout[weight], packed.num_experts))
                for weight, packed in zip(weights, like.packed, strict=True)
            )
        )

    def _packed(self, weight: str, like: Packed, parts: Sequence[Sequence["_Part"]]) -> Packed:
        """The matrices of a weight, each put together of its parts."""
        made = Packed.empty(like.num_experts, like.rows, like.depth, like.kind, like.group)
        is_kept, source = self._kept(weight) is not None, self._source
        for number, pieces in enumerate(parts):
            names = [part.piece.name for part in pieces]
            if is_kept and isinstance(source, GgufFile):
                made.data[number] = packed_rows(source, names, like)
            elif is_kept and isinstance(source, Dequantised):
                number_NK, scale_NG, least_NG = map(torch.cat, zip(*map(source.integers, names), strict=True))
                made.data[number] = Packed.of_integers(number_NK, scale_NG, least_NG, "int4").data[0]
            else:
                made.put(number, self._read(pieces, (like.rows, like.depth)))
        return made

    def _read(self, parts: Sequence["_Part"], shape: tuple[int, ...]) -> Tensor:
        """A tensor of ours in the type that weights are rounded to first."""
        if len(parts) == 1 and not parts[0].where:
            return parts[0].read(self._source).to(self._dtype)
        value = torch.empty(shape, dtype=self._dtype)
        for part in parts:
            value[part.where].copy_(part.read(self._source))
        return value


@dataclass(frozen=True)
class _Part:
    """A stored tensor, or one of a stored stack, that is a part of a matrix.

    Attributes:
        piece: the stored tensor.
        where: which part of the matrix.
        index: which of the stack; None for all of the tensor.
    """

    piece: Piece
    where: tuple[int | slice, ...] = ()
    index: int | None = None

    def read(self, source: TensorSource) -> Tensor:
        name = self.piece.name
        # What stands in another order does so in each matrix of a stack.
        return self.piece.read(source.read(name) if self.index is None else source.read_one(name, self.index))


def _of_one(pieces: Sequence[Piece]) -> list[_Part]:
    """The parts of a matrix, from the first row on."""
    return sorted((_Part(piece, piece.where) for piece in pieces), key=_first_row)


def _of_experts(pieces: Sequence[Piece], num_experts: int) -> list[list[_Part]]:
    """The parts of each expert's matrix. A stored tensor is of one expert, or stacked as ours."""
    found: list[list[_Part]] = [[] for _ in range(num_experts)]
    for piece in pieces:
        if piece.where and isinstance(piece.where[0], int):
            found[piece.where[0]].append(_Part(piece, piece.where[1:]))
            continue
        for expert, parts in enumerate(found):
            parts.append(_Part(piece, piece.where[1:], expert))
    return [sorted(parts, key=_first_row) for parts in found]


def _first_row(part: _Part) -> int:
    rows = part.where[0] if part.where else None
    return rows.start or 0 if isinstance(rows, slice) else 0
