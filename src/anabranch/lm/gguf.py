"""GGUF files (llama.cpp's format): weights dequantised, tokenizer rebuilt from the file's metadata.

A file is shown to the rest as a checkpoint under Hugging Face's names, of the family that computes the same. Three things differ beside
names: dimensions are listed backwards, experts are stacked, and in files of the Llama family the rows of query and key projections are
interleaved for llama.cpp's rotary layout, pair (2i, 2i + 1); ours and Hugging Face's is pair (i, i + D/2).
"""
# Shapes: E experts, H heads, D head width, W model width

from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.bounds import MOST_LAYERS, shown
from anabranch.data.tokenizer import HuggingFaceTokenizer
from anabranch.errors import CheckpointError
from anabranch.extras import require
from anabranch.lm import formats
from anabranch.lm.decoder import Decoder
from anabranch.lm.gguf_architectures import architecture_of
from anabranch.lm.gguf_fields import check_fields
from anabranch.lm.gguf_file import Fields, open_parts
from anabranch.lm.gguf_tokenizer import tokenizer_of
from anabranch.lm.tensors import Layout
from anabranch.nn import Rotary

__all__ = ["GgufFile", "half_split", "load_gguf", "open_gguf", "read_gguf_config"]

# What each rotary frequency is divided by (Llama 3.1).
_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Decoder, HuggingFaceTokenizer | None]:
    """Model and tokenizer of a GGUF file; ``dtype`` None gives float32. The tokenizer is None, with a warning, if it is of another kind.

    Raises:
        CheckpointError: the file is corrupt, of another architecture, or uses what we do not compute.
        BackendError: the ``gguf`` package is not installed.
    """
    file = GgufFile(path)
    model = formats.load(file, file.foreign_config(), path, dtype=dtype or torch.float32, device=device)
    return model, file.tokenizer()


def open_gguf(path: Path) -> tuple["GgufFile", Decoder, Layout, list[str], HuggingFaceTokenizer | None]:
    """(file, empty model, layout, names to ignore, tokenizer) of what `load_gguf` loads. Raises as that."""
    file = GgufFile(path)
    model, layout, _, ignore = formats.prepare(file, file.foreign_config(), path)
    return file, model, layout, ignore, file.tokenizer()


def read_gguf_config(path: Path) -> Decoder.Config:
    """The config alone. Raises as `load_gguf`."""
    return formats.read_config(GgufFile(path).foreign_config(), path)


class GgufFile:
    """A GGUF file, or all parts of one that was split, as a checkpoint: a `TensorSource`, its config, its tokenizer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gguf = _package()
        self._parts = open_parts(path, self._gguf)
        self.fields = Fields(path, self._parts[0].fields)
        self._prefix, self._architecture = architecture_of(self.fields)
        self._tensors = {
            name: (tensor, index)
            for part in self._parts
            for tensor in part.tensors
            for name, index in self._architecture.places(tensor)
        }
        self._names = dict.fromkeys(name for name in self._tensors if name != _ROPE_FACTORS).keys()
        heads = self._integer("attention.head_count")
        self._heads = {"q_proj": heads, "k_proj": self._integer("attention.head_count_kv", 0, default=0) or heads}

    def _integer(self, name: str, low: int = 1, **options: int) -> int:
        return self.fields.integer(f"{self._prefix}.{name}", low, **options)

    def _real(self, name: str, *, default: float | None = None) -> float:
        return self.fields.real(f"{self._prefix}.{name}", default=default)

    @property
    def names(self) -> Collection[str]:
        """See `TensorSource`."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        stored, index = self._tensors[name]
        sizes = tuple(int(size) for size in reversed(stored.shape))
        # A gate of one row is stored without an axis for it.
        if name.endswith("shared_expert_gate.weight") and len(sizes) == 1:
            sizes = (1, *sizes)
        return sizes if index is None else sizes[1:]

    def dtype(self, name: str) -> torch.dtype:
        """Always float32: what dequantising gives."""
        return torch.float32

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised, query and key rows in our order."""
        stored, _ = self._tensors[name]
        data, heads = self.raw(name)
        try:
            values = self._gguf.dequantize(data, stored.tensor_type)
        except NotImplementedError:
            kind = stored.tensor_type.name
            raise CheckpointError(
                f"{stored.name} in {self.path} is stored as {kind}, which cannot be dequantised"
            ) from None
        tensor = torch.from_numpy(values.astype(np.float32, copy=False)).view(self.shape(name))
        if self._architecture.norm_offset and name.endswith("norm.weight"):
            tensor -= self._architecture.norm_offset
        return tensor if heads is None else half_split(tensor, heads)

    def read_one(self, name: str, index: int) -> Tensor:
        """See `TensorSource`."""
        return self.read(name)[index]

    def _heads_of(self, name: str) -> int | None:
        """Heads whose rows are interleaved in this tensor; None where none are."""
        if not self._architecture.interleaved:
            return None
        return next((heads for part, heads in self._heads.items() if f".{part}." in name), None)

    def kind(self, name: str) -> str:
        """How a tensor is stored: ``F32``, ``Q4_1``, ..."""
        return self._tensors[name][0].tensor_type.name

    def raw(self, name: str) -> tuple[Any, int | None]:
        """(bytes as stored, a row of uint8 for each row; heads whose rows are interleaved in them, see `half_split`).

        Raises CheckpointError where the file was written to since it was opened.
        """
        stored, index = self._tensors[name]
        return stored.read(index), self._heads_of(name)

    def foreign_config(self) -> dict[str, Any]:
        """The metadata in the words of a Hugging Face config.json."""
        head_dim = self._integer("attention.key_length", 0, default=0) or None
        width, heads = self._integer("embedding_length"), self._heads["q_proj"]
        if head_dim is None and width < heads:
            raise CheckpointError(
                f"{self._prefix}.embedding_length in {self.path} is {width}, less than its {heads} heads"
            )
        rotated = self._integer("rope.dimension_count", 0, default=0) or head_dim or width // heads
        embedding = "model.embed_tokens.weight"
        if embedding not in self._tensors or len(self.shape(embedding)) != 2:
            raise CheckpointError(
                f"{self.path} has no matrix token_embd.weight, without which the model cannot be built"
            )
        table = {
            "model_type": self._architecture.model_type,
            "vocab_size": self.shape(embedding)[0],
            "hidden_size": width,
            "num_hidden_layers": self._integer("block_count", most=MOST_LAYERS),
            "num_attention_heads": heads,
            "num_key_value_heads": self._heads["k_proj"],
            "head_dim": head_dim,
            "max_position_embeddings": self._integer("context_length"),
            # Stored in single precision.
            "rms_norm_eps": round(self._real("attention.layer_norm_rms_epsilon"), 12),
            "rope_theta": self._real("rope.freq_base", default=10000.0),
            "rope_scaling": self._rope_scaling(rotated),
            "partial_rotary_factor": rotated / (head_dim or width // heads),
            "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self._tensors,
            "sliding_window": self._integer("attention.sliding_window", 0, default=0) or None,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            **self._architecture.config(self.fields, self._prefix),
        }
        check_fields(
            self.fields, self._prefix, head_dim=table["head_dim"] or width // heads, read=self._architecture.reads
        )
        return table

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        """As llama.cpp reads it (llama-model.cpp, load_hparams): a kind that is not said is linear, ``scale_linear`` the older factor."""
        kind = "linear" if (said := self.fields.get(f"{self._prefix}.rope.scaling.type")) is None else said
        named = self.fields.get(f"{self._prefix}.rope.scaling.factor") is not None
        factor = self._real(f"rope.{'scaling.factor' if named else 'scale_linear'}", default=1.0)
        is_scaled = kind != "none" and factor != 1
        if (magnitude := self._real("rope.scaling.attn_factor", default=1.0)) != 1:
            raise CheckpointError(
                f"{self._prefix}.rope.scaling.attn_factor in {self.path} is {magnitude}, which is not supported; supported: 1.0"
            )
        if _ROPE_FACTORS not in self._tensors:
            return self._scaled(kind, factor) if is_scaled else None
        if is_scaled:
            raise CheckpointError(
                f"{self.path} divides rotary frequencies by {_ROPE_FACTORS} and by {factor} ({shown(kind)}); one of the two is supported"
            )
        return self._llama3(head_dim)

    def _scaled(self, kind: Any, factor: float) -> dict[str, Any]:
        before = self._integer("rope.scaling.original_context_length", 0, default=0)
        table = {"rope_type": kind, "factor": factor}
        if before:
            table["original_max_position_embeddings"] = before
        if kind == "yarn":
            table["beta_fast"] = self._real("rope.scaling.yarn_beta_fast", default=32.0)
            table["beta_slow"] = self._real("rope.scaling.yarn_beta_slow", default=1.0)
            if self.fields.get(f"{self._prefix}.rope.scaling.yarn_log_multiplier"):
                table |= self._architecture.logarithm(self._real("rope.scaling.yarn_log_multiplier"))
            table |= self._architecture.yarn
        return table

    def _llama3(self, head_dim: int) -> dict[str, Any]:
        """Llama 3.1's scaling from the table of divisors that it became. Its other constants are the same in all releases."""
        stored, _ = self._tensors[_ROPE_FACTORS]
        divisors = torch.from_numpy(stored.read().astype(np.float32))
        if divisors.dim() != 1 or len(divisors) != head_dim // 2:
            raise CheckpointError(
                f"{_ROPE_FACTORS} in {self.path} has shape {list(divisors.shape)}; it must be [{head_dim // 2}]"
            )
        theta = self._real("rope.freq_base", default=10000.0)
        scaled = Rotary.Config(theta=theta, scaling="llama3", factor=float(divisors.max()))
        expected = Rotary.Config(theta=theta).build(head_dim).frequency / scaled.build(head_dim).frequency
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
            raise CheckpointError(
                f"{_ROPE_FACTORS} in {self.path} is not the scaling of Llama 3.1, the only one supported"
            )
        return {
            "rope_type": "llama3",
            "factor": scaled.factor,
            "low_freq_factor": scaled.low_freq_factor,
            "high_freq_factor": scaled.high_freq_factor,
            "original_max_position_embeddings": scaled.original_positions,
        }

    def tokenizer(self) -> HuggingFaceTokenizer | None:
        """See `tokenizer_of`."""
        return tokenizer_of(self.fields)


def half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection ``[H D, ...]`` from pairs (2i, 2i + 1) to pairs (i, i + D/2)."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _package() -> ModuleType:
    require("gguf", by="reading .gguf files")
    import gguf

    return gguf
