"""What tells the base of an adapter from other models, by some of its numbers."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from anabranch.adapters.around import bare_config, bare_name
from anabranch.adapters.beside import Beside
from anabranch.adapters.onto_module import SHARED
from anabranch.adapters.put_on import added_names
from anabranch.lm.checkpoint import open_any
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import read_parts
from anabranch.nn.offloaded import OffloadedPool
from anabranch.nn.quantize import FewBitLinear, PackedEmbedding, QuantizedPool
from anabranch.nn.weight_kinds import FLOATS, numbers_of_kinds

__all__ = ["Digest", "base_digest", "is_same_base", "stored_digest"]

# By part and type, see `base_digest`.
Digest = dict[str, dict[str, str]]

# Numbers of each tensor by which a base is known again, and the types in which it may be read.
_SAMPLED = 512
_EMBEDDING = "embedding.weight"
_READ_IN = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def base_digest(model: nn.Module) -> Digest:
    """What the base of ``model`` is, by some numbers of each of its tensors: a digest for each type that it may be read in.

    ``whole`` is of all tensors, with their names and sizes; of a model that is not ours, of its parameters, without what was put beside
    them. ``embedding``, of a model of ours, is of that alone, which stays as it is where matrices are quantized. A table in few
    bits counts by the rows that it gives: those of the same file in floating point. ``few_bits`` is there where other matrices are in few
    bits, which they may have been rounded to.
    """
    if isinstance(model, Decoder):
        state = _of_decoder(model)
        parts = {"whole": state, "embedding": {_EMBEDDING: state[_EMBEDDING]}}
    else:
        state = _of_module(model)
        parts = {"whole": state}
    found = _digests(parts)
    found["names"] = {"all": hashlib.sha256("\n".join(sorted(state)).encode()).hexdigest()[:16]}
    if isinstance(model, Decoder) and _has_few_bits(model):
        found["few_bits"] = {"kinds": ", ".join(sorted(numbers_of_kinds(model).keys() - set(FLOATS)))}
    return found


@torch.no_grad()
def stored_digest(path: str | Path, dtype: torch.dtype) -> Digest:
    """What is known of `base_digest` of a model that is not in memory: that of its embedding, which is read in ``dtype``.

    ``path`` as for `anabranch.lm.load_model`. Raises CheckpointError as `anabranch.lm.checkpoint.open_any`.
    """
    opened = open_any(path)
    like = torch.empty_like(opened.model.embedding.weight, dtype=dtype, device="meta")
    state = read_parts(opened.source, opened.layout, {_EMBEDDING: like}, where=opened.where)
    embedding = {name: _some_of(value) for name, value in state.items()}
    # As of matrices that may have been rounded: nothing is said of these.
    return _digests({"embedding": embedding}) | {"names": {}, "few_bits": {}}


def _digests(parts: Mapping[str, Mapping[str, tuple[list[int], Tensor]]]) -> Digest:
    """Of each part's tensors, (shape, some numbers) by name."""
    found = {}
    for part, tensors in parts.items():
        digests = {dtype: hashlib.sha256() for dtype in _READ_IN}
        for name, (shape, some_of) in sorted(tensors.items()):
            for dtype, digest in digests.items():
                kept = some_of.to(dtype) if some_of.is_floating_point() else some_of
                digest.update(f"{name} {shape};".encode())
                digest.update(kept.contiguous().view(torch.uint8).numpy().tobytes())
        found[part] = {str(dtype).removeprefix("torch."): each.hexdigest()[:16] for dtype, each in digests.items()}
    return found


def is_same_base(told: Digest, other: Digest) -> bool:
    """Whether two digests may be of one base, however it was loaded; of one in few bits the embedding says it alone.

    What matrices are rounded to depends on the type that they are rounded from, and a type of bits on what it may be.
    Raises AttributeError, KeyError or TypeError for what is no digest.
    """
    is_other = "few_bits" in told or "few_bits" in other or told["names"] != other["names"]
    # A model that is not ours has no embedding that we know of, and is in few bits for nobody but itself.
    part = "embedding" if is_other and "embedding" in {*told} & {*other} else "whole"
    # One read in bfloat16 is that of float32 where the same numbers are left of both.
    return any(told[part].get(dtype) == digest for dtype, digest in other[part].items())


def _of_decoder(model: Decoder) -> dict[str, tuple[list[int], Tensor]]:
    """(shape, some numbers) of each tensor of the base, by its name there."""
    added = set(added_names(model)) if bare_config(model.config) != model.config else set()
    state = {bare_name(name): _some_of(value) for name, value in model.state_dict().items() if name not in added}
    if isinstance(model.embedding, PackedEmbedding):
        del state["embedding.data"]
        state["embedding.weight"] = _some_of_table(model.embedding)
    return state


def _of_module(model: nn.Module) -> dict[str, tuple[list[int], Tensor]]:
    """The same of a model that is not ours. Its buffers, which may be counted in training, are left out."""
    state = {name: _some_of(value) for name, value in model.named_parameters()}
    for place, module in model.named_modules():
        if isinstance(module, Beside):
            state = {
                _within(name, f"{place}.matrix."): value
                for name, value in state.items()
                if not name.startswith(f"{place}.beside.")
            }
    return {name: value for name, value in state.items() if not name.startswith(f"{SHARED}.")}


def _within(name: str, matrix: str) -> str:
    """What a parameter of ``matrix`` is called where nothing stands beside it."""
    return f"{matrix.removesuffix('matrix.')}{name.removeprefix(matrix)}" if name.startswith(matrix) else name


def _has_few_bits(model: Decoder) -> bool:
    """Whether matrices are in few bits beside the table of vectors, which may be the head too."""
    return any(
        isinstance(module, FewBitLinear | QuantizedPool)
        or (isinstance(module, OffloadedPool) and module.packed is not None)
        for name, module in model.named_modules()
        if name.partition(".")[0] not in ("embedding", "head")
    )


def _some_of(value: Tensor) -> tuple[list[int], Tensor]:
    """(shape, some numbers) of a tensor."""
    flat = value.detach().reshape(-1)
    return list(value.shape), flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].cpu()


def _some_of_table(table: PackedEmbedding) -> tuple[list[int], Tensor]:
    """What `_some_of` gives of the same table in floating point; no other rows are unpacked."""
    rows, depth = table.num_embeddings, table.embedding_dim
    at_S = torch.arange(0, rows * depth, max(1, rows * depth // _SAMPLED), device=table.data.device)[:_SAMPLED]
    # Before they are rounded to what the table gives them in.
    rows_SD = table.packed.rows_at(at_S // depth)
    return [rows, depth], rows_SD.gather(1, (at_S % depth).unsqueeze(1)).squeeze(1).cpu()
