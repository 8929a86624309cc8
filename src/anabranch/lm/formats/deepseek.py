"""DeepSeekMoE (arXiv 2401.06066), the first version (``model_type: deepseek``, 16B): shared experts beside the routed ones.

Attention is Llama's. Layers before ``first_k_dense_replace`` are dense, and so are those whose index is no multiple of
``moe_layer_freq``. transformers has no class of its own for it: it loads such folders with the authors' code beside them.
"""

from collections.abc import Collection
from typing import Any

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    dense_of,
    mixture,
    mixture_of,
    read_attention,
    read_body,
    read_moe,
    self_attention,
    with_dense_layers,
    write_body,
    write_moe,
)

MODEL_TYPE = "deepseek"
ARCHITECTURE = "DeepseekForCausalLM"


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    for name in ("kv_lora_rank", "q_lora_rank"):
        if foreign.get(name):
            foreign.refuse(name, foreign.get(name), "none (multi-head latent attention is not built)")
    foreign.require("scoring_func", ("softmax",))
    foreign.require("topk_method", ("greedy",))
    foreign.require("routed_scaling_factor", (1.0,))
    bias = foreign.get("attention_bias", False)
    attention = read_attention(foreign, qkv_bias=bias, out_bias=bias)
    body = read_body(foreign, attention)
    if not foreign.get("n_routed_experts"):
        return with_dense_layers(body, None, foreign["intermediate_size"], ())
    shared = foreign.get("n_shared_experts", 0)
    moe = read_moe(
        foreign,
        num_experts=foreign["n_routed_experts"],
        hidden_dim=foreign["moe_intermediate_size"],
        renormalize=foreign.get("norm_topk_prob", False) and foreign["num_experts_per_tok"] > 1,
        default_alpha=foreign.get("aux_loss_alpha", 0.001),
        shared_experts=shared,
    )
    first, every = foreign.get("first_k_dense_replace", 0), foreign.get("moe_layer_freq", 1)
    dense = [layer for layer in range(body["num_layers"]) if layer < first or layer % every]
    return with_dense_layers(body, moe, foreign["intermediate_size"], dense)


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json; dense layers that are not the first ones or a regular pattern cannot be said in it."""
    moe = mixture_of(config)
    dense = dense_of(config) if config.dense_layers else moe
    routed = [layer for layer in range(config.num_layers) if layer not in config.dense_layers]
    every = routed[1] - routed[0] if len(routed) > 1 else routed[0] or config.num_layers
    fields = write_moe(config)
    return {
        **write_body(config),
        **fields,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_width // moe.hidden_dim or None,
        "moe_intermediate_size": moe.hidden_dim,
        "intermediate_size": dense.hidden_dim,
        "first_k_dense_replace": routed[0],
        "moe_layer_freq": every,
        "scoring_func": "softmax",
        "aux_loss_alpha": fields["router_aux_loss_coef"],
        "seq_aux": any(getattr(part, "scope", "") == "sequence" for part in moe.router.balance),
        "attention_bias": self_attention(config).qkv_bias,
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names, shared="shared_experts")
