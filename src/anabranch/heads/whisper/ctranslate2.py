"""Whisper's weights in the files of CTranslate2, which faster-whisper and others ship: ``model.bin``, read as data.

    file = version, name of the spec, revision, variables, aliases        numbers are little-endian, names end with a zero byte
    variable = name, shape, type, bytes

There the projections of queries, keys and values are one matrix (those of another sequence: keys and values), which are taken apart here,
and the embedding is the head. Weights of fewer bits stand beside the scale by which they were multiplied: one for each row of int8, one
for all of int16.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from anabranch.errors import CheckpointError

__all__ = ["is_ctranslate2", "read_variables", "whisper_sizes", "whisper_tensors"]

WEIGHTS, SPEC = "model.bin", "WhisperSpec"
# The format's types by their numbers; those of 1 and 3 are integers, of which settings are made.
_TYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
# No name of a variable is as long, and no tensor has as many dimensions.
_MOST_NAME, _MOST_DIMS, _MOST_VARIABLES = 512, 8, 100_000


def is_ctranslate2(folder: Path) -> bool:
    """Whether the folder holds a Whisper of CTranslate2."""
    try:
        with (folder / WEIGHTS).open("rb") as file:
            file.seek(4)
            return _name(file) == SPEC
    except (OSError, CheckpointError):
        return False


def read_variables(path: Path) -> dict[str, Tensor]:
    """All variables of a file, by name. Raises CheckpointError for one that is cut, damaged, or of something else than Whisper."""
    try:
        room = path.stat().st_size
        with path.open("rb") as file:
            _, spec, _, count = _number(file, "<I"), _name(file), _number(file, "<I"), _number(file, "<I")
            if spec != SPEC:
                raise CheckpointError(f"it is a {spec!r}, and {SPEC!r} is read")
            if count > _MOST_VARIABLES:
                raise CheckpointError(f"it says that it has {count} variables")
            return dict(_variable(file, room) for _ in range(count))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no Whisper of CTranslate2 that can be read: {error}") from None


def _number(file: BinaryIO, form: str) -> int:
    size = struct.calcsize(form)
    held = file.read(size)
    if len(held) < size:
        raise CheckpointError("it ends in the midst")
    return int(struct.unpack(form, held)[0])


def _name(file: BinaryIO) -> str:
    length = _number(file, "<H")
    if not 0 < length <= _MOST_NAME:
        raise CheckpointError(f"a name of {length} bytes")
    held = file.read(length)
    if len(held) < length or held[-1]:
        raise CheckpointError("a name that does not end")
    try:
        return held[:-1].decode()
    except UnicodeDecodeError:
        raise CheckpointError("a name that is no text") from None


def _variable(file: BinaryIO, room: int) -> tuple[str, Tensor]:
    name, dims = _name(file), _number(file, "<B")
    if dims > _MOST_DIMS:
        raise CheckpointError(f"{name} has {dims} dimensions")
    shape = [_number(file, "<I") for _ in range(dims)]
    kind, size = _number(file, "<B"), _number(file, "<I")
    if kind not in _TYPES:
        raise CheckpointError(f"{name} is of type {kind}; known are {', '.join(map(str, _TYPES))}")
    dtype = _TYPES[kind]
    if math.prod(shape) * dtype.itemsize != size or size > room:
        raise CheckpointError(f"{name} of shape {shape} has {size} bytes")
    held = bytearray(file.read(size))
    if len(held) < size:
        raise CheckpointError(f"it ends in the midst of {name}")
    if not size:
        return name, torch.empty(shape, dtype=dtype)
    return name, torch.frombuffer(held, dtype=dtype).reshape(shape)


def whisper_sizes(variables: dict[str, Tensor]) -> dict[str, Any]:
    """Fields of transformers' ``WhisperConfig``. Raises CheckpointError for a file that lacks what tells them."""
    encoder, decoder = (_layers(variables, stack) for stack in ("encoder", "decoder"))
    embedding = _float(variables, "decoder/embeddings/weight", 2)
    mel = _float(variables, "encoder/conv1/weight", 3)
    heads = {stack: _whole(variables, f"{stack}/num_heads") for stack in ("encoder", "decoder")}
    for stack, count in heads.items():
        if count < 1 or embedding.shape[1] < count or embedding.shape[1] % count:
            raise CheckpointError(
                f"{stack}/num_heads is {count}, into which {embedding.shape[1]} dimensions are not divided"
            )
    return {
        "vocab_size": embedding.shape[0],
        "d_model": embedding.shape[1],
        "num_mel_bins": mel.shape[1],
        "encoder_layers": encoder,
        "decoder_layers": decoder,
        "encoder_attention_heads": heads["encoder"],
        "decoder_attention_heads": heads["decoder"],
        "encoder_ffn_dim": _float(variables, "encoder/layer_0/ffn/linear_0/weight", 2).shape[0],
        "decoder_ffn_dim": _float(variables, "decoder/layer_0/ffn/linear_0/weight", 2).shape[0],
        "max_source_positions": _float(variables, "encoder/position_encodings/encodings", 2).shape[0],
        "max_target_positions": _float(variables, "decoder/position_encodings/encodings", 2).shape[0],
    }


def whisper_tensors(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float32, by the names of transformers' ``WhisperForConditionalGeneration``.

    Raises CheckpointError for a file that lacks one, or whose keys have a bias, which Whisper's have not.
    """
    made = {"model.decoder.embed_tokens.weight": _float(variables, "decoder/embeddings/weight")}
    for number in (1, 2):
        made |= dict(_linear(variables, f"encoder/conv{number}", f"model.encoder.conv{number}"))
    for stack in ("encoder", "decoder"):
        place = _float(variables, f"{stack}/position_encodings/encodings")
        made[f"model.{stack}.embed_positions.weight"] = place
        made |= dict(_norm(variables, f"{stack}/layer_norm", f"model.{stack}.layer_norm"))
        for layer in range(_layers(variables, stack)):
            made |= dict(_block(variables, f"{stack}/layer_{layer}", f"model.{stack}.layers.{layer}"))
    return made


def _block(variables: dict[str, Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    yield from _norm(variables, f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
    yield from _attention(variables, f"{theirs}/self_attention", f"{ours}.self_attn", "qkv")
    if f"{theirs}/attention/linear_0/weight" in variables:
        yield from _norm(variables, f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
        yield from _attention(variables, f"{theirs}/attention", f"{ours}.encoder_attn", "kv")
    yield from _norm(variables, f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    for number in (0, 1):
        yield from _linear(variables, f"{theirs}/ffn/linear_{number}", f"{ours}.fc{number + 1}")


def _attention(variables: dict[str, Tensor], theirs: str, ours: str, together: str) -> Iterator[tuple[str, Tensor]]:
    """``together``: which projections are one matrix; queries of another sequence stand before them alone."""
    number = 0
    if together == "kv":
        yield from _linear(variables, f"{theirs}/linear_0", f"{ours}.q_proj")
        number = 1
    both = dict(_linear(variables, f"{theirs}/linear_{number}", ""))
    weight, bias = both[".weight"], both[".bias"]
    if weight.dim() != 2 or not len(weight) or len(weight) % len(together) or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{theirs}/linear_{number} has a weight of {list(weight.shape)} and a bias of {list(bias.shape)}, "
            f"where {len(together)} projections stand together"
        )
    weights, biases = weight.chunk(len(together)), bias.chunk(len(together))
    for letter, weight, bias in zip(together, weights, biases, strict=True):
        yield f"{ours}.{letter}_proj.weight", weight.contiguous()
        if letter != "k":
            yield f"{ours}.{letter}_proj.bias", bias.contiguous()
        elif bool(bias.any()):
            raise CheckpointError(f"the keys of {theirs} have a bias, and those of Whisper have none")
    yield from _linear(variables, f"{theirs}/linear_{number + 1}", f"{ours}.out_proj")


def _linear(variables: dict[str, Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    for part in ("weight", "bias"):
        yield f"{ours}.{part}", _float(variables, f"{theirs}/{part}")


def _norm(variables: dict[str, Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{ours}.weight", _float(variables, f"{theirs}/gamma")
    yield f"{ours}.bias", _float(variables, f"{theirs}/beta")


def _layers(variables: dict[str, Tensor], stack: str) -> int:
    count = 0
    while f"{stack}/layer_{count}/self_attention/linear_0/weight" in variables:
        count += 1
    if not count:
        raise CheckpointError(f"there are no layers of the {stack}")
    return count


def _float(variables: dict[str, Tensor], name: str, dims: int | None = None) -> Tensor:
    found = variables.get(name)
    if found is None:
        raise CheckpointError(f"there is no {name}")
    if dims is not None and (found.dim() != dims or not found.numel()):
        raise CheckpointError(f"{name} is of shape {list(found.shape)}, and {dims} dimensions above 0 are read")
    return found.float() if found.is_floating_point() else _scaled(variables, name, found)


def _scaled(variables: dict[str, Tensor], name: str, found: Tensor) -> Tensor:
    """Weights of whole numbers by their scale, in float32."""
    scale = variables.get(f"{name}_scale")
    if scale is None or not scale.is_floating_point():
        raise CheckpointError(f"{name} is {found.dtype}, and there is no {name}_scale beside it that says how large")
    if scale.numel() not in (1, len(found) if found.dim() else 1):
        raise CheckpointError(f"{name}_scale has {scale.numel()} numbers, and {name} is of shape {list(found.shape)}")
    if not bool((scale > 0).all() and scale.isfinite().all()):
        raise CheckpointError(f"{name}_scale has numbers that are not above 0, or not finite")
    return found.float() / scale.float().reshape(-1, *[1] * (found.dim() - 1))


def _whole(variables: dict[str, Tensor], name: str) -> int:
    found = variables.get(name)
    if found is None or found.numel() != 1 or found.is_floating_point():
        raise CheckpointError(f"there is no {name}, or it is no whole number")
    return int(found)
