"""GGUF files of the Llama family (llama.cpp's format): weights dequantised, tokenizer rebuilt from the file's metadata.

A file is shown to the rest as a Llama checkpoint under Hugging Face's names. Two things differ beside names: dimensions are listed
backwards, and the rows of query and key projections are interleaved for llama.cpp's rotary layout, pair (2i, 2i + 1); ours and
Hugging Face's is pair (i, i + D/2).
"""
# Shapes: H heads, D head width, W model width

import logging
import re
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from torch import Tensor

from anabranch.bounds import MOST_LAYERS, MOST_SIZE, shown
from anabranch.data.tokenizer import HuggingFaceTokenizer
from anabranch.errors import CheckpointError, TokenizerError
from anabranch.extras import require
from anabranch.lm import formats
from anabranch.lm.decoder import Decoder
from anabranch.lm.gguf_file import Container
from anabranch.lm.tensors import Layout
from anabranch.nn import Rotary

__all__ = ["load_gguf", "open_gguf", "read_gguf_config"]

logger = logging.getLogger(__name__)

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What each rotary frequency is divided by (Llama 3.1).
_ROPE_FACTORS = "rope_freqs.weight"

# How text is cut before merging, by tokenizer.ggml.pre: regular expressions applied one after the other (llama.cpp, llama-vocab.cpp).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
}
# Token types of the format.
_CONTROL, _USER_DEFINED = 3, 4


def load_gguf(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Decoder, HuggingFaceTokenizer | None]:
    """Model and tokenizer of a GGUF file; ``dtype`` None gives float32. The tokenizer is None, with a warning, if it is not a BPE.

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
    """A GGUF file as a Llama checkpoint: a `TensorSource` under Hugging Face's names, its config, its tokenizer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gguf = _package()
        try:
            reader = Container(path, self._gguf)
        except Exception as error:
            # Broken bytes may raise anything.
            raise CheckpointError(f"cannot read {path}: {error}; it is truncated or corrupt, copy it again") from None
        self._fields = reader.fields
        architecture = self.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"general.architecture in {path} is {architecture!r}; supported: 'llama'")
        for name, most in (("split.count", 1), ("llama.expert_count", 0)):
            given = self.integer(name, 0, default=0)
            if given > most:
                raise CheckpointError(f"{name} in {path} is {given}, which is not supported; supported: {most}")
        self._tensors = {_foreign_name(tensor.name): tensor for tensor in reader.tensors}
        heads = self.integer("llama.attention.head_count")
        self._heads = {"q_proj": heads, "k_proj": self.integer("llama.attention.head_count_kv", 0, default=0) or heads}

    def get(self, name: str) -> Any:
        """A metadata value, None if there is none."""
        return self._fields.get(name)

    def require(self, name: str) -> Any:
        """A metadata value that must be there."""
        value = self.get(name)
        if value is None:
            raise CheckpointError(f"{self.path} has no {name}, without which the model cannot be built")
        return value

    def integer(self, name: str, low: int = 1, *, most: int = MOST_SIZE, default: int | None = None) -> int:
        """A whole number from ``low`` to ``most``, ``default`` where there is none. Raises CheckpointError for another value."""
        value = self.require(name) if default is None else self._fields.get(name, default)
        if type(value) is not int or not low <= value <= most:
            raise CheckpointError(
                f"{name} in {self.path} is {shown(value)}; it must be a whole number from {low} to {most}"
            )
        return value

    def real(self, name: str, *, default: float | None = None) -> float:
        """A finite number above 0, ``default`` where there is none or 0. Raises CheckpointError for another value."""
        value = self.require(name) if default is None else self._fields.get(name) or default
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise CheckpointError(f"{name} in {self.path} is {shown(value)}; it must be a finite number above 0")
        return value

    def list_of(self, kind: type, name: str) -> list[Any]:
        """A list of values of one type, empty where there is none. Raises CheckpointError for another value."""
        value = self._fields.get(name, [])
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise CheckpointError(f"{name} in {self.path} is {shown(value)}; it must be a list of {kind.__name__}")
        return value

    @property
    def names(self) -> Collection[str]:
        """See `TensorSource`."""
        return [name for name in self._tensors if name != _ROPE_FACTORS]

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """Always float32: what dequantising gives."""
        return torch.float32

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised, query and key rows in our order."""
        heads, tensor = self._heads_of(name), self._dequantized(name).view(self.shape(name))
        return tensor if heads is None else half_split(tensor, heads)

    def read_one(self, name: str, index: int) -> Tensor:
        """See `TensorSource`."""
        return self._dequantized(name, index).view(self.shape(name)[1:])

    def _dequantized(self, name: str, index: int | None = None) -> Tensor:
        """Rows as they are stored; ``index`` takes one of a stack."""
        stored = self._tensors[name]
        data = stored.data if index is None else stored.data[index]
        try:
            values = self._gguf.dequantize(data, stored.tensor_type)
        except NotImplementedError:
            kind = stored.tensor_type.name
            raise CheckpointError(
                f"{stored.name} in {self.path} is stored as {kind}, which cannot be dequantised"
            ) from None
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def _heads_of(self, name: str) -> int | None:
        """Heads whose rows are interleaved in this tensor; None where none are."""
        return next((heads for part, heads in self._heads.items() if f".{part}." in name), None)

    def kind(self, name: str) -> str:
        """How a tensor is stored: ``F32``, ``Q4_1``, ..."""
        return self._tensors[name].tensor_type.name

    def raw(self, name: str, index: int | None = None) -> tuple[Any, int | None]:
        """(bytes as stored, a row of uint8 for each row; heads whose rows are interleaved in them, see `half_split`).

        ``index`` takes one of a stack.
        """
        data = self._tensors[name].data
        return (data if index is None else data[index]), self._heads_of(name)

    def foreign_config(self) -> dict[str, Any]:
        """The metadata in the words of a Hugging Face config.json."""
        head_dim = self.integer("llama.attention.key_length", 0, default=0) or None
        width, heads = self.integer("llama.embedding_length"), self._heads["q_proj"]
        if head_dim is None and width < heads:
            raise CheckpointError(f"llama.embedding_length in {self.path} is {width}, less than its {heads} heads")
        rotated = self.integer("llama.rope.dimension_count", 0, default=0) or head_dim or width // heads
        embedding = "model.embed_tokens.weight"
        if embedding not in self._tensors or len(self.shape(embedding)) != 2:
            raise CheckpointError(
                f"{self.path} has no matrix token_embd.weight, without which the model cannot be built"
            )
        return {
            "model_type": "llama",
            "vocab_size": self.shape(embedding)[0],
            "hidden_size": width,
            "num_hidden_layers": self.integer("llama.block_count", most=MOST_LAYERS),
            "num_attention_heads": heads,
            "num_key_value_heads": self._heads["k_proj"],
            "head_dim": head_dim,
            "intermediate_size": self.integer("llama.feed_forward_length"),
            "max_position_embeddings": self.integer("llama.context_length"),
            # Stored in single precision.
            "rms_norm_eps": round(self.real("llama.attention.layer_norm_rms_epsilon"), 12),
            "rope_theta": self.real("llama.rope.freq_base", default=10000.0),
            "rope_scaling": self._rope_scaling(rotated),
            "partial_rotary_factor": rotated / (head_dim or width // heads),
            "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self._tensors,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        """As llama.cpp reads it (llama-model.cpp, load_hparams): a kind that is not said is linear, ``scale_linear`` the older factor."""
        kind = "linear" if (said := self.get("llama.rope.scaling.type")) is None else said
        named = "llama.rope.scaling.factor" in self._fields
        factor = self.real(f"llama.rope.{'scaling.factor' if named else 'scale_linear'}", default=1.0)
        is_scaled = kind != "none" and factor != 1
        if (magnitude := self.real("llama.rope.scaling.attn_factor", default=1.0)) != 1:
            raise CheckpointError(
                f"llama.rope.scaling.attn_factor in {self.path} is {magnitude}, which is not supported; supported: 1.0"
            )
        if _ROPE_FACTORS not in self._tensors:
            return {"rope_type": kind, "factor": factor} if is_scaled else None
        if is_scaled:
            raise CheckpointError(
                f"{self.path} divides rotary frequencies by {_ROPE_FACTORS} and by {factor} ({shown(kind)}); one of the two is supported"
            )
        return self._llama3(head_dim)

    def _llama3(self, head_dim: int) -> dict[str, Any]:
        """Llama 3.1's scaling from the table of divisors that it became. Its other constants are the same in all releases."""
        stored = self._tensors[_ROPE_FACTORS]
        divisors = torch.from_numpy(np.array(stored.data, dtype=np.float32))
        if divisors.dim() != 1 or len(divisors) != head_dim // 2:
            raise CheckpointError(
                f"{_ROPE_FACTORS} in {self.path} has shape {list(divisors.shape)}; it must be [{head_dim // 2}]"
            )
        theta = self.real("llama.rope.freq_base", default=10000.0)
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
        """The byte-level BPE of the file; None, with a warning, for a file that has another kind or none."""
        kind, cut = self.get("tokenizer.ggml.model"), self.get("tokenizer.ggml.pre") or "default"
        if kind != "gpt2" or not isinstance(cut, str) or cut not in _SPLITS:
            logger.warning(
                "%s has a tokenizer of kind %r (%r), so the model comes without one; supported: 'gpt2' with %s",
                self.path,
                kind,
                cut,
                ", ".join(map(repr, _SPLITS)),
            )
            return None
        tokens = self.list_of(str, "tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self.list_of(str, "tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        try:
            backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut == "llama-bpe"))
        except Exception as error:
            # A merge of one piece, or of tokens that do not exist, raises anything.
            raise TokenizerError(f"the tokenizer in {self.path} cannot be read: {error}") from None
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[cut]]
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        added = {
            index: AddedToken(tokens[index], special=kind == _CONTROL, normalized=False)
            for index, kind in enumerate(self.list_of(int, "tokenizer.ggml.token_type")[: len(tokens)])
            if kind in (_CONTROL, _USER_DEFINED)
        }
        backend.add_tokens(list(added.values()))
        frame = self._frame(tokens, cut)
        if frame is not None:
            backend.post_processor = frame
        return HuggingFaceTokenizer(
            backend,
            bos_id=self._token_id("bos"),
            eos_id=self._token_id("eos"),
            pad_id=self._token_id("padding"),
            chat_template=template if isinstance(template := self.get("tokenizer.chat_template"), str) else None,
            ends=[index for name in ("eot", "eom") if (index := self._token_id(name)) is not None],
        )

    def _frame(self, tokens: list[str], cut: str) -> processors.TemplateProcessing | None:
        """What puts tokens around prompts. llama.cpp begins those of Llama 3 where a file does not say (llama-vocab.cpp)."""
        adds = {"bos": cut == "llama-bpe", "eos": False}
        for name, default in adds.items():
            adds[name] = self._fields.get(field := f"tokenizer.ggml.add_{name}_token", default)
            if not isinstance(adds[name], bool):
                raise CheckpointError(f"{field} in {self.path} is {shown(adds[name])}; it must be true or false")
        ids = {name: index for name in adds if adds[name] and (index := self._token_id(name)) is not None}
        if not ids or max(ids.values()) >= len(tokens):
            return None
        single = [*(["bos"] if "bos" in ids else []), "$A", *(["eos"] if "eos" in ids else [])]
        special = [{"id": name, "ids": [index], "tokens": [tokens[index]]} for name, index in ids.items()]
        return processors.TemplateProcessing(single=single, special_tokens=special)

    def _token_id(self, name: str) -> int | None:
        field = f"tokenizer.ggml.{name}_token_id"
        return None if self.get(field) is None else self.integer(field, 0)


def half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection ``[H D, ...]`` from pairs (2i, 2i + 1) to pairs (i, i + D/2)."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _foreign_name(name: str) -> str:
    layer = re.match(r"blk\.(\d+)\.", name)
    stem, _, kind = name[layer.end() if layer else 0 :].rpartition(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{_NAMES.get(stem, stem)}.{kind}"


def _package() -> ModuleType:
    require("gguf", by="reading .gguf files")
    import gguf

    return gguf
