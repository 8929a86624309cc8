"""Gemma 3 (arXiv 2503.19786), its text models: norms on both sides of each layer, windows in five layers of six.

Norms scale by 1 + weight, embeddings are scaled by sqrt(dim) where they go in, and layers with a window have rotary positions of their own.
"""

from collections.abc import Collection
from typing import Any

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    body,
    dense_of,
    read_attention,
    read_body,
    self_attention,
    swiglu,
    write_body,
    write_head_dim,
)
from anabranch.lm.formats.positions import local_layers, rotary_of, rotary_table, write_windows
from anabranch.lm.tensors import Piece
from anabranch.nn import Rotary, SelfAttention
from anabranch.nn.block import Sandwich
from anabranch.nn.feed_forward import MLP

MODEL_TYPE = "gemma3_text"
ARCHITECTURE = "Gemma3ForCausalLM"
IS_DENSE = True
TANH = "gelu_pytorch_tanh"


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    # The defaults of transformers, of files that leave them out.
    usual = {"tie_word_embeddings": True, "max_position_embeddings": 131072, "sliding_window": 4096}
    foreign = Foreign({**usual, **foreign.table, "hidden_act": foreign.get("hidden_activation", TANH)}, foreign.path)
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        foreign.require(name, (False,))
    bias, scalar = foreign.get("attention_bias", False), foreign.get("query_pre_attn_scalar", 256)
    attention = read_attention(
        foreign, qk_norm="head", qkv_bias=bias, out_bias=bias, head_dim=foreign.get("head_dim", 256)
    )
    attention = attention.replace(scale=scalar**-0.5)
    whole, local = _rotaries(foreign)
    pattern = foreign.get("sliding_window_pattern", 6)
    layers = local_layers(foreign, [layer for layer in range(foreign.num_layers) if (layer + 1) % pattern])
    fields = read_body(_plain(foreign), attention, activations=(TANH,))
    fields |= {
        "block": Sandwich.Config(),
        "rotary": whole,
        "norm_offset": 1.0,
        "embedding_scale": fields["dim"] ** 0.5,
    }
    if layers:
        windowed = attention.replace(window=foreign["sliding_window"], rotary=None if local == whole else local)
        fields |= {"local_attention": windowed, "local_layers": tuple(layers)}
    return Decoder.Config(
        **fields, feed_forward=MLP.Config(hidden_dim=foreign["intermediate_size"], activation="geglu_tanh")
    )


def _plain(foreign: Foreign) -> Foreign:
    """Without what the family reads itself."""
    own = ("sliding_window", "layer_types", "rope_parameters", "rope_scaling")
    return Foreign({name: value for name, value in foreign.table.items() if name not in own}, foreign.path)


def _rotaries(foreign: Foreign) -> tuple[Rotary.Config, Rotary.Config]:
    """(of layers that see all, of those with a window): ``rope_parameters`` of both, or the fields of before."""
    tables = foreign.get("rope_parameters", {})
    whole = tables.get("full_attention") or foreign.get("rope_scaling", {})
    local = tables.get("sliding_attention") or {}
    thetas = (foreign.get("rope_theta", 1e6), foreign.get("rope_local_base_freq", 1e4))
    return tuple(  # type: ignore[return-value]
        rotary_of(foreign, f"rope_parameters.{name}", table, float(table.get("rope_theta") or theta))
        for name, table, theta in zip(("full_attention", "sliding_attention"), (whole, local), thetas, strict=True)
    )


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    feed_forward = dense_of(config)
    attention, local = self_attention(config), config.local_attention
    own = local.rotary if isinstance(local, SelfAttention.Config) and config.local_layers else None
    fields = {**write_body(config), **write_head_dim(config), **write_windows(config)}
    for name in ("hidden_act", "rope_theta", "rope_scaling"):
        del fields[name]
    scale = attention.scale or attention.width(config.dim) ** -0.5
    return {
        **fields,
        "hidden_activation": TANH,
        "intermediate_size": feed_forward.hidden_dim,
        "attention_bias": attention.qkv_bias,
        "query_pre_attn_scalar": round(scale**-2),
        "rope_parameters": {
            "full_attention": rotary_table(config.rotary),
            "sliding_attention": rotary_table(own or config.rotary),
        },
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    pieces = body(config)
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        norms = {
            "attention_after": "post_attention_layernorm",
            "feed_forward_norm": "pre_feedforward_layernorm",
            "feed_forward_after": "post_feedforward_layernorm",
        }
        pieces |= {f"{ours}.{name}.weight": [Piece(f"{theirs}.{stored}.weight")] for name, stored in norms.items()}
        feed_forward = dense_of(config)
        pieces |= swiglu(f"{ours}.feed_forward", f"{theirs}.mlp", feed_forward.hidden_dim)
    return pieces
