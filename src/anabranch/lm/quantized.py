"""Load a model whose linear layers stay in few bits: GGUF blocks as they are stored, anything else rounded after loading."""
# Shapes: N rows (outputs), K depth (inputs), G = K / 32 blocks of a row

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import ConfigError
from anabranch.lm import formats
from anabranch.lm.checkpoint import find_model, load_model, quantization_of
from anabranch.lm.decoder import Decoder
from anabranch.lm.gguf import GgufFile, half_split
from anabranch.lm.quantized_form import check_scheme, describe
from anabranch.lm.tensors import Piece, build_empty, fill
from anabranch.nn.packed import Kind, Packed
from anabranch.nn.quantize import FEWEST, QuantizedLinear, quantize

__all__ = ["load_quantized"]

# Weights of a block.
SIZE = 32
BLOCKS: dict[str, Kind] = {"Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8"}


def load_quantized(
    path: str | Path, bits: Literal["int8", "int4"], *, dtype: torch.dtype | None = None, group: int | None = None
) -> tuple[Decoder, Tokenizer | None]:
    """A model in ``bits`` and its tokenizer.

    With int4, matrices that a GGUF file stores in blocks of Q4_0, Q4_1 or Q8_0 keep these numbers, scales and minima to the bit, and
    with int8 those in Q8_0; a folder that was saved in ``bits`` is loaded as it is; everything else is rounded by `quantize`.

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
    if found.is_file():
        kept = [name for name, kind in BLOCKS.items() if bits == "int4" or kind == "int8"]
        model, tokenizer = _load_gguf(GgufFile(found), found, dtype or torch.float32, kept)
    else:
        model, tokenizer = load_model(found, dtype=dtype)
    quantize(model, bits, group=group)
    if describe(model) is None:
        raise ConfigError(
            f"quantize is {bits!r}, but no layer of {path} can be in {bits}: that takes inputs that are a multiple of {SIZE} and "
            f"at least {FEWEST} outputs; leave it out"
        )
    return model, tokenizer


def _load_gguf(
    file: GgufFile, path: Path, dtype: torch.dtype, kept: Collection[str]
) -> tuple[Decoder, Tokenizer | None]:
    """The model with `QuantizedLinear`s where all pieces of a matrix are stored as one of ``kept``, and the tokenizer."""
    table = file.foreign_config()
    config = formats.read_config(table, path)
    layout = formats.FAMILIES[table["model_type"]].sanitize(config, file.names)
    model = build_empty(config)
    made: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        packed = _packed(file, layout[f"{name}.weight"], kept) if isinstance(module, nn.Linear) else None
        if packed is not None:
            bias = _joined(file, layout[f"{name}.bias"]) if module.bias is not None else None
            made[name] = QuantizedLinear(packed, bias)
            # With no parameters there, filling leaves it alone.
            _set(model, name, nn.Identity())
    used = {piece.name for name in made for key, part in layout.items() if key.startswith(f"{name}.") for piece in part}
    fill(model, file, layout, where=path, dtype=dtype, ignore=used)
    for name, layer in made.items():
        _set(model, name, layer)
    if config.tie_embeddings:
        head = _packed(file, layout["embedding.weight"], kept)
        if head is not None:
            _set(model, "head", QuantizedLinear(head))
    return model, file.tokenizer()


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _ordered(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of rows, from the first row on."""
    return sorted(pieces, key=lambda piece: getattr(piece.where[0], "start", None) or 0 if piece.where else 0)


def _joined(file: GgufFile, pieces: Sequence[Piece]) -> Tensor:
    return torch.cat([file.read(piece.name) for piece in _ordered(pieces)])


def _packed(file: GgufFile, pieces: Sequence[Piece], kept: Collection[str]) -> Packed | None:
    """One matrix of the blocks in the file; None where they are not all of one kind that is kept."""
    kinds = {file.kind(piece.name) for piece in pieces}
    if len(kinds) > 1 or not kinds <= set(kept):
        return None
    kind = kinds.pop()
    parts = [_blocks(kind, *file.raw(piece.name)) for piece in _ordered(pieces)]
    number_NK, scale_NG, least_NG = (torch.cat(part) for part in zip(*parts, strict=True))
    return Packed.of_integers(number_NK, scale_NG, least_NG, BLOCKS[kind])


def _blocks(kind: str, stored: Any, heads: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(number_NK, scale_NG, least_NG) of the bytes of one tensor; rows of ``heads`` heads in our order."""
    bytes_NGX = torch.from_numpy(np.array(stored, dtype=np.uint8)).unflatten(
        -1, (-1, {"Q4_0": 18, "Q4_1": 20}.get(kind, 34))
    )
    scale_NG = bytes_NGX[..., :2].contiguous().view(torch.float16).squeeze(-1)
    if kind == "Q8_0":
        # Two's complement plus 128.
        number_NGS = bytes_NGX[..., 2:] ^ 0x80
        least_NG = torch.zeros_like(scale_NG)
    else:
        nibbles = bytes_NGX[..., -SIZE // 2 :]
        number_NGS = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
        least_NG = -8 * scale_NG if kind == "Q4_0" else bytes_NGX[..., 2:4].contiguous().view(torch.float16).squeeze(-1)
    parts = number_NGS.flatten(1), scale_NG, least_NG
    return parts if heads is None else tuple(half_split(part, heads) for part in parts)  # type: ignore[return-value]
