"""Tiny GGUF files, written with the gguf package from models of ours."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from anabranch.lm import Decoder
from anabranch.nn import Rotary, SelfAttention, SwiGLU

gguf = pytest.importorskip("gguf")

TEXT = "The quick brown fox jumps over the lazy dog 12345 times.\n\tdef f(x): return x + 2024  # it's fine\n" * 20
HEADS, STORES, DIM, HIDDEN = 4, 2, 64, 96


def interleaved(weight, num_heads):
    """As llama.cpp's converter turns query and key rows: pairs (i, i + D/2) to (2i, 2i + 1)."""
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tiny(vocab_size, **changes):
    fields = {
        "vocab_size": vocab_size,
        "dim": DIM,
        "num_layers": 2,
        "attention": SelfAttention.Config(num_heads=HEADS, num_kv_heads=STORES),
        "feed_forward": SwiGLU.Config(hidden_dim=HIDDEN),
        "rotary": Rotary.Config(theta=5e4),
        "max_positions": 128,
        "init_std": 0.2,
    }
    return Decoder.Config(**{**fields, **changes}).build(seed=5).eval()


def tensors_of(model):
    """(GGUF name, array) of each tensor."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    yield "token_embd.weight", state["embedding.weight"]
    yield "output_norm.weight", state["norm.weight"]
    if "head.weight" in state:
        yield "output.weight", state["head.weight"]
    head_dim = DIM // HEADS
    for layer in range(model.config.num_layers):
        at = f"blocks.{layer}"
        yield f"blk.{layer}.attn_norm.weight", state[f"{at}.attention_norm.weight"]
        yield f"blk.{layer}.ffn_norm.weight", state[f"{at}.feed_forward_norm.weight"]
        for kind in ("weight", "bias"):
            if f"{at}.attention.qkv.{kind}" not in state:
                continue
            q, k, v = np.split(state[f"{at}.attention.qkv.{kind}"], [HEADS * head_dim, (HEADS + STORES) * head_dim])
            yield f"blk.{layer}.attn_q.{kind}", interleaved(q, HEADS)
            yield f"blk.{layer}.attn_k.{kind}", interleaved(k, STORES)
            yield f"blk.{layer}.attn_v.{kind}", v
            yield f"blk.{layer}.attn_output.{kind}", state[f"{at}.attention.out.{kind}"]
        gate, up = np.split(state[f"{at}.feed_forward.w13.weight"], 2)
        yield f"blk.{layer}.ffn_gate.weight", gate
        yield f"blk.{layer}.ffn_up.weight", up
        yield f"blk.{layer}.ffn_down.weight", state[f"{at}.feed_forward.w2.weight"]


def write(path, model, tokenizer=None, *, kind=None, architecture="llama", extra=None):
    """``kind`` of the matrices: None for float32, or what gives it for a name; ``extra(writer)`` adds metadata and tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(model.config.num_layers)
    writer.add_context_length(model.config.max_positions)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(STORES)
    writer.add_rope_freq_base(model.config.rotary.theta)
    writer.add_layer_norm_rms_eps(model.config.norm_eps)
    if tokenizer is not None:
        table = tokenizer.get_vocab()
        tokens = sorted(table, key=table.get)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_eos_token_id(table["<|endoftext|>"])
        writer.add_chat_template("{{ messages[0]['content'] }}<|endoftext|>")
    if extra is not None:
        extra(writer)
    for name, array in tensors_of(model):
        own = kind(name) if callable(kind) else kind
        if own is None or array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bpe(pre_tokenizer):
    """A BPE trained with another pre-tokenizer; end of text is its last id."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return backend
