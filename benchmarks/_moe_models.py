"""Mixtures of experts to serve, in Q4_0: shapes of published models with random weights, and one of our own that is trained.

Each is written once as GGUF, which the peers read, and converted to a native folder, which keeps the file's blocks: all compute with the
same numbers. Random weights are drawn so that tokens differ in what experts they choose: the residual stream is mostly the token's own
embedding, and a router's scores have a standard deviation of 2. Layers and vocabulary are fewer than the published model's, experts are
as wide and as many.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
GROUP = 32  # numbers of a block
VOCABULARY = 16384  # of random models: a large part of 4 layers, as in 16 the published one is


@dataclass(frozen=True)
class Shape:
    """A mixture of experts. ``layers`` are those written, of ``of_layers`` that the published model has."""

    name: str
    architecture: str
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    hidden: int
    layers: int
    of_layers: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    vocabulary: int = VOCABULARY

    @property
    def expert_bytes(self) -> int:
        """Of all experts, in Q4_0: 18 bytes a block."""
        return self.layers * self.experts * 3 * self.dim * self.hidden // GROUP * 18

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], str, float]]:
        """(name, shape, type, standard deviation) of each; norms have deviation 0 and are 1."""
        dim, wide = self.dim, self.heads * self.head_dim
        stored = self.kv_heads * self.head_dim
        is_full = self.architecture == "olmoe"
        yield "token_embd.weight", (self.vocabulary, dim), "Q8_0", 1.0
        yield "output_norm.weight", (dim,), "F32", 0.0
        yield "output.weight", (self.vocabulary, dim), "Q8_0", 3 / dim**0.5
        for layer in range(self.layers):
            at = f"blk.{layer}"
            yield f"{at}.attn_norm.weight", (dim,), "F32", 0.0
            yield f"{at}.ffn_norm.weight", (dim,), "F32", 0.0
            yield f"{at}.attn_q.weight", (wide, dim), "Q4_0", dim**-0.5
            yield f"{at}.attn_k.weight", (stored, dim), "Q4_0", dim**-0.5
            yield f"{at}.attn_v.weight", (stored, dim), "Q4_0", dim**-0.5
            yield f"{at}.attn_output.weight", (dim, wide), "Q4_0", 0.5 * wide**-0.5
            yield f"{at}.attn_q_norm.weight", (wide if is_full else self.head_dim,), "F32", 0.0
            yield f"{at}.attn_k_norm.weight", (stored if is_full else self.head_dim,), "F32", 0.0
            yield f"{at}.ffn_gate_inp.weight", (self.experts, dim), "F32", 2 * dim**-0.5
            yield f"{at}.ffn_gate_exps.weight", (self.experts, self.hidden, dim), "Q4_0", dim**-0.5
            yield f"{at}.ffn_up_exps.weight", (self.experts, self.hidden, dim), "Q4_0", dim**-0.5
            yield f"{at}.ffn_down_exps.weight", (self.experts, dim, self.hidden), "Q4_0", 0.5 * self.hidden**-0.5


SHAPES = {
    "olmoe": Shape("OLMoE-1B-7B", "olmoe", 2048, 16, 16, 128, 64, 8, 1024, layers=4, of_layers=16),
    "qwen3": Shape(
        "Qwen3-30B-A3B",
        "qwen3moe",
        2048,
        32,
        4,
        128,
        128,
        8,
        768,
        layers=3,
        of_layers=48,
        rope_theta=1e6,
        norm_eps=1e-6,
    ),
}
# To try the programs.
SMALL = {
    "olmoe": Shape("OLMoE-1B-7B", "olmoe", 256, 4, 4, 64, 16, 4, 128, layers=2, of_layers=16, vocabulary=512),
    "qwen3": Shape("Qwen3-30B-A3B", "qwen3moe", 256, 4, 2, 64, 16, 4, 128, layers=2, of_layers=48, vocabulary=512),
}


def blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: str, std: float) -> Array:
    """Random numbers of mean 0, as the bytes of Q4_0 (4 bits, from -7 to 7) or Q8_0 (8 bits) blocks of 32 with half a scale's spread."""
    groups = int(np.prod(shape)) // GROUP
    top = {"Q4_0": 7, "Q8_0": 127}[kind]
    # Whole numbers from -top to top, all alike.
    usual = ((2 * top + 1) ** 2 - 1) / 12
    scale = (std / usual**0.5 * rng.uniform(0.75, 1.25, groups)).astype(np.float16)
    if kind == "Q4_0":
        number = rng.integers(1, 16, (groups, 2, GROUP // 2), dtype=np.uint8)
        number = number[:, 0] | (number[:, 1] << 4)
    else:
        number = rng.integers(-127, 128, (groups, GROUP), dtype=np.int8).view(np.uint8)
    packed = np.concatenate([scale.view(np.uint8).reshape(groups, 2), number], 1)
    return packed.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path,
    shape: Shape,
    made: Callable[[str, tuple[int, ...], str, float], Array],
    tokens: list[str],
    merges: list[str],
) -> None:
    """A file of tensors that ``made(name, shape, kind, deviation)`` gives, one at a time: bytes of blocks, or float32."""
    import gguf

    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    if shape.architecture != "olmoe":
        writer.add_expert_feed_forward_length(shape.hidden)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges)
    for name, size, kind, _ in shape.tensors():
        if kind == "F32":
            writer.add_tensor_info(name, size, np.dtype(np.float32), int(np.prod(size)) * 4)
        else:
            each = {"Q4_0": 18, "Q8_0": 34}[kind]
            row = size[-1] // GROUP * each
            count = int(np.prod(size[:-1]))
            known = gguf.GGMLQuantizationType[kind]
            writer.add_tensor_info(name, (*size[:-1], row), np.dtype(np.uint8), count * row, raw_dtype=known)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, size, kind, std in shape.tensors():
        writer.write_tensor_data(np.ascontiguousarray(made(name, size, kind, std)))
    writer.close()


def write_random(path: Path, shape: Shape, seed: int = 0) -> None:
    """A file of this shape. Tokens are the bytes, then numbers with a space before them."""
    rng = np.random.default_rng(seed)

    def made(name: str, size: tuple[int, ...], kind: str, std: float) -> Array:
        if kind != "F32":
            return blocks(rng, size, kind, std)
        return np.ones(size, np.float32) if std == 0 else rng.normal(0, std, size).astype(np.float32)

    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # One pair is merged: a tokenizer without merges is none.
    tokens = [*alphabet, "Ġ1", *(f"Ġ{number}" for number in range(257, shape.vocabulary))]
    write_gguf(path, shape, made, tokens, ["Ġ 1"])


def write_own(path: Path, is_quick: bool) -> Shape:
    """A mixture of experts that is trained here on the standard library for some minutes, rounded to Q4_0; its shape."""
    import gguf
    import torch
    from safetensors import safe_open

    from anabranch.data import BpeTokenizer
    from anabranch.lm import export_huggingface
    from anabranch.nn import MoE, SelfAttention
    from anabranch.presets import language_model
    from anabranch.routing import Router, SwitchLoss, TopK, ZLoss
    from anabranch.train import Trainer

    experts, hidden, dim, layers, steps = (8, 64, 64, 2, 10) if is_quick else (64, 256, 256, 6, 400)
    vocabulary = 512 if is_quick else 2048
    router = Router.Config(
        select=TopK.Config(top_k=2, normalize="sum"), balance=(SwitchLoss.Config(alpha=0.01), ZLoss.Config())
    )
    config = language_model(
        MoE.Config(num_experts=experts, hidden_dim=hidden, router=router), dim=dim, num_layers=layers, steps=steps
    )
    attention = SelfAttention.Config(num_heads=4, num_kv_heads=2, qk_norm="head")
    config = config.replace(
        data=config.data.replace(tokenizer=BpeTokenizer.Config(vocab_size=vocabulary)),
        model=config.model.replace(vocab_size=vocabulary, attention=attention),
    )
    with tempfile.TemporaryDirectory() as name:
        trainer = Trainer(config, Path(name) / "run")
        trainer.fit()
        model, tokenizer = trainer.model, trainer.data.tokenizer
        export_huggingface(Path(name) / "hf", model, tokenizer, family="qwen3_moe")
        shape = Shape(
            "our own",
            "qwen3moe",
            dim,
            4,
            2,
            dim // 4,
            experts,
            2,
            hidden,
            layers,
            layers,
            rope_theta=model.config.rotary.theta,
            norm_eps=model.config.norm_eps,
            vocabulary=vocabulary,
        )
        places = {
            key: file
            for file in sorted((Path(name) / "hf").glob("*.safetensors"))
            for key in safe_open(file, "pt").keys()
        }

        def read(key: str) -> Array:
            with safe_open(places[key], "pt") as file:
                return file.get_tensor(key).to(torch.float32).numpy()

        def made(name: str, size: tuple[int, ...], kind: str, std: float) -> Array:
            keys = _theirs(name, shape.experts)
            values = read(keys[0]) if len(keys) == 1 else np.stack([read(key) for key in keys])
            assert values.shape == size, f"{name} is {values.shape}, not {size}"
            return values if kind == "F32" else gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])

        write_gguf(path, shape, made, *_vocabulary(Path(name) / "hf" / "tokenizer.json"))
    return shape


_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}


def _theirs(name: str, experts: int) -> list[str]:
    """Names of a GGUF tensor in a Hugging Face folder: of each expert, or one."""
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = name.removesuffix(".weight").split(".")
    if parts[0] != "blk":
        return [f"{whole[parts[0]]}.weight"]
    at = f"model.layers.{parts[1]}.{_PARTS[parts[2]]}.weight"
    return [at.format(number) for number in range(experts)] if "{}" in at else [at]


def _vocabulary(tokenizer: Path) -> tuple[list[str], list[str]]:
    """Tokens by id and merges of a ``tokenizer.json``."""
    stored = json.loads(tokenizer.read_text())
    table = stored["model"]["vocab"] | {token["content"]: token["id"] for token in stored["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    return sorted(table, key=table.__getitem__), merges


@dataclass(frozen=True)
class Written:
    """A model on disk, as a GGUF file and as a native folder of the same numbers."""

    shape: Shape
    gguf: Path
    native: Path

    @property
    def other_bytes(self) -> int:
        """Of what is no expert, as the file has it."""
        return self.gguf.stat().st_size - self.shape.expert_bytes

    @property
    def native_expert_bytes(self) -> int:
        """Of all experts as the native folder has them: a minimum beside each scale, so 20 bytes a block where the file has 18."""
        found = 0
        for path in self.native.glob("*.safetensors"):
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            places = (value["data_offsets"] for key, value in header.items() if ".feed_forward.experts." in key)
            found += sum(end - begin for begin, end in places)
        return found

    @property
    def title(self) -> str:
        """As rows name it."""
        shape = self.shape
        if shape.layers == shape.of_layers:
            return shape.name
        return f"{shape.name}-shaped, {shape.layers} of {shape.of_layers} layers"


def written(name: str, folder: Path, *, is_quick: bool = False) -> Written:
    """The model ``own``, ``olmoe`` or ``qwen3``, made in ``folder`` unless it lies there already."""
    place = folder / (f"{name}-quick" if is_quick else name)
    place.mkdir(parents=True, exist_ok=True)
    gguf, native, kept = place / "model.gguf", place / "native", place / "shape.json"
    if not kept.exists():
        if name == "own":
            shape = write_own(gguf, is_quick)
        else:
            shape = (SMALL if is_quick else SHAPES)[name]
            write_random(gguf, shape)
        # Last, so that what was not finished is made anew.
        kept.write_text(json.dumps(asdict(shape)))
    shape = Shape(**json.loads(kept.read_text()))
    if not (native / "config.json").exists():
        words = ["convert", str(gguf), str(native), "--to", "native", "--quantize", "int4", "--force", "--quiet"]
        subprocess.run([sys.executable, "-m", "anabranch.cli.main", *words], check=True)
    return Written(shape, gguf, native)
