"""The architectures of GGUF files that we read: each as the family of Hugging Face that computes the same, with its names and config."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from anabranch.errors import CheckpointError
from anabranch.lm.gguf_file import Fields, Stored

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]

# Of ``expert_gating_func``.
_SOFTMAX, _SIGMOID, _SOFTMAX_OF_CHOSEN = 1, 2, 3
# Experts of a layer, at most.
_MOST_EXPERTS = 1 << 16

# By what stands behind "blk.N." and before ".weight".
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_EXPERTS = {kind: f"mlp.experts.{{}}.{kind}_proj" for kind in ("gate", "up", "down")}


def _logarithm(multiplier: float) -> dict[str, float]:
    """YaRN's two factors of ``rope.scaling.yarn_log_multiplier``: llama.cpp takes 1 for the one it does not store (llama-context.cpp)."""
    return {"mscale": 1.0, "mscale_all_dim": multiplier}


@dataclass(frozen=True)
class Architecture:
    """How an architecture is shown to the rest.

    Attributes:
        model_type: the family.
        config: fields of its config.json beside those that all have, of the file's fields and their prefix.
        interleaved: whether the rows of query and key projections are turned for llama.cpp's rotary layout.
        names: of its tensors, where they are not those of most; with the kind behind (``.weight``) where that goes too.
        experts: names of an expert's matrices, ``{}`` its number.
        heads: names of stacks with a matrix for each head, and of such a matrix, ``{}`` its number.
        norm_offset: what norms are stored with more than the family has them.
        reads: names of fields that ``config`` reads and `check_fields` does not know, without the prefix.
        logarithm: what the family says of YaRN where the file has a multiplier of its logarithm.
        yarn: what else it says of YaRN.
    """

    model_type: str
    config: Callable[[Fields, str], dict[str, Any]]
    interleaved: bool = False
    names: tuple[tuple[str, str], ...] = ()
    experts: tuple[tuple[str, str], ...] = tuple(_EXPERTS.items())
    heads: tuple[tuple[str, str], ...] = ()
    norm_offset: float = 0.0
    reads: tuple[str, ...] = ()
    logarithm: Callable[[float], dict[str, float]] = _logarithm
    yarn: Mapping[str, Any] = field(default_factory=dict)

    def places(self, tensor: Stored) -> Iterator[tuple[str, int | None]]:
        """(Hugging Face's name, which of the stack) of what a tensor holds: itself (None), or one matrix of each expert.

        Raises CheckpointError for a stack of more experts than there can be.
        """
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        stem, _, kind = tensor.name[layer.end() if layer else 0 :].rpartition(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        stacked, heads = re.fullmatch(r"ffn_(gate|up|down)(?:_exps|\.(\d+))", stem), dict(self.heads)
        if stacked is None and stem not in heads:
            names = {**_NAMES, **dict(self.names)}
            whole = names.get(f"{stem}.{kind}") or f"{names.get(stem, stem)}.{kind}"
            yield f"{prefix}{whole}", None
            return
        name = heads[stem] if stacked is None else dict(self.experts)[stacked[1]]
        name = f"{prefix}{name}.{kind}"
        # Files of before 2024 have a tensor for each expert.
        if stacked is not None and stacked[2] is not None:
            yield name.format(stacked[2]), None
            return
        count, dims = tensor.shape[-1], 2 if kind == "bias" else 3
        if len(tensor.shape) != dims or count > _MOST_EXPERTS:
            raise CheckpointError(
                f"{tensor.name} has shape {list(tensor.shape)}; a stack of at most {_MOST_EXPERTS} matrices is supported"
            )
        for index in range(count):
            yield name.format(index), index


def _dense(fields: Fields, prefix: str) -> dict[str, Any]:
    return {"intermediate_size": fields.integer(f"{prefix}.feed_forward_length")}


def _chosen(
    fields: Fields, prefix: str, *, renormalize: bool, gating: tuple[int, ...] = (0, _SOFTMAX), groups: bool = False
) -> dict[str, Any]:
    """What all mixtures have. Raises CheckpointError for a routing that the family has not."""
    known = {"expert_gating_func": gating} if groups else {"expert_gating_func": gating, "expert_group_count": (0, 1)}
    for name, allowed in known.items():
        given = fields.get(f"{prefix}.{name}")
        if given is not None and given not in allowed:
            raise CheckpointError(
                f"{prefix}.{name} in {fields.path} is {given!r}, which is not supported; supported: {allowed[1]}"
            )
    return {
        "num_experts": fields.integer(f"{prefix}.expert_count", most=_MOST_EXPERTS),
        "num_experts_per_tok": fields.integer(f"{prefix}.expert_used_count", most=_MOST_EXPERTS),
        "norm_topk_prob": fields.flag(f"{prefix}.expert_weights_norm", default=renormalize),
    }


def _mixtral(fields: Fields, prefix: str) -> dict[str, Any]:
    chosen = _chosen(fields, prefix, renormalize=True)
    width = fields.integer(f"{prefix}.feed_forward_length")
    return {**chosen, "num_local_experts": chosen["num_experts"], "intermediate_size": width}


def _olmoe(fields: Fields, prefix: str) -> dict[str, Any]:
    name = f"{prefix}.attention.clamp_kqv"
    clip = fields.real(name) if fields.get(name) else None
    return {**_chosen(fields, prefix, renormalize=False), **_dense(fields, prefix), "clip_qkv": clip}


def _qwen_moe(fields: Fields, prefix: str, *, renormalize: bool) -> dict[str, Any]:
    chosen = _chosen(fields, prefix, renormalize=renormalize)
    width = fields.integer(f"{prefix}.feed_forward_length", 0, default=0)
    own = fields.integer(f"{prefix}.expert_feed_forward_length", 0, default=0)
    # What llama.cpp takes where the file does not say.
    own = own or width // chosen["num_experts_per_tok"]
    return {
        **chosen,
        "moe_intermediate_size": own,
        "intermediate_size": width or own,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe(fields: Fields, prefix: str) -> dict[str, Any]:
    table = _qwen_moe(fields, prefix, renormalize=False)
    shared = fields.integer(f"{prefix}.expert_shared_feed_forward_length", 0, default=0)
    return {**table, "shared_expert_intermediate_size": shared or table["intermediate_size"]}


def _qwen3_moe(fields: Fields, prefix: str) -> dict[str, Any]:
    return _qwen_moe(fields, prefix, renormalize=True)


def _gemma3(fields: Fields, prefix: str) -> dict[str, Any]:
    """As llama.cpp reads it (gemma3.cpp): every sixth layer sees all unless told, and the largest model has its own scale."""
    width, heads = fields.integer(f"{prefix}.embedding_length"), fields.integer(f"{prefix}.attention.head_count")
    head_dim = fields.integer(f"{prefix}.attention.key_length", 0, default=0) or 256
    layers = fields.integer(f"{prefix}.block_count")
    return {
        **_dense(fields, prefix),
        "head_dim": head_dim,
        "query_pre_attn_scalar": width // heads if layers == _GEMMA3_27B else head_dim,
        "rope_theta": fields.real(f"{prefix}.rope.freq_base", default=1e6),
        "rope_local_base_freq": fields.real(f"{prefix}.rope.freq_base_swa", default=1e4),
        "sliding_window_pattern": fields.integer(f"{prefix}.attention.sliding_window_pattern", default=6),
    }


def _ministral3(fields: Fields, prefix: str) -> dict[str, Any]:
    """As llama.cpp reads it: the temperature goes with the length of the context that YaRN made longer."""
    length = fields.integer(f"{prefix}.rope.scaling.original_context_length", 0, default=0)
    scaling = {
        "beta": fields.real(f"{prefix}.attention.temperature_scale"),
        "original_max_position_embeddings": length or fields.integer(f"{prefix}.context_length"),
    }
    return {**_dense(fields, prefix), "llama_4_scaling": scaling}


def _gpt_oss(fields: Fields, prefix: str) -> dict[str, Any]:
    """As the model was published. llama.cpp rounds the bounds of YaRN's ramp to whole dimensions; the model does not."""
    chosen = _chosen(fields, prefix, renormalize=True, gating=(0, _SOFTMAX_OF_CHOSEN))
    return {
        **chosen,
        "num_local_experts": chosen["num_experts"],
        "intermediate_size": fields.integer(f"{prefix}.expert_feed_forward_length"),
        "attention_bias": True,
    }


def _deepseek2(fields: Fields, prefix: str, *, sigmoid: bool) -> dict[str, Any]:
    """As llama.cpp reads it (deepseek2.cpp): attention with a latent either way, keys and values of all heads in one matrix or apart."""
    attention = f"{prefix}.attention"
    chosen = _chosen(fields, prefix, renormalize=False, gating=(_SIGMOID,) if sigmoid else (0, _SOFTMAX), groups=True)
    # In files whose heads are apart, the plain lengths are those of the latent.
    whole, value = (
        fields.integer(f"{attention}.{name}_length_mla", 0, default=0) or fields.integer(f"{attention}.{name}_length")
        for name in ("key", "value")
    )
    rotated = fields.integer(f"{prefix}.rope.dimension_count")
    if rotated >= whole:
        raise CheckpointError(
            f"{prefix}.rope.dimension_count in {fields.path} is {rotated}; it must be less than a key's {whole}"
        )
    groups = fields.integer(f"{prefix}.expert_group_count", 0, default=0) or 1
    limited = {True: "noaux_tc", False: "greedy" if groups == 1 else "group_limited_greedy"}
    return {
        **chosen,
        **_dense(fields, prefix),
        "head_dim": None,
        "partial_rotary_factor": 1.0,
        "num_key_value_heads": fields.integer(f"{attention}.head_count"),
        "q_lora_rank": fields.integer(f"{attention}.q_lora_rank", 0, default=0) or None,
        "kv_lora_rank": fields.integer(f"{attention}.kv_lora_rank"),
        "qk_nope_head_dim": whole - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": value,
        "moe_intermediate_size": fields.integer(f"{prefix}.expert_feed_forward_length"),
        "first_k_dense_replace": fields.integer(f"{prefix}.leading_dense_block_count", 0, default=0),
        "n_routed_experts": chosen["num_experts"],
        "n_shared_experts": fields.integer(f"{prefix}.expert_shared_count", 0, default=0),
        # Nothing, and what is not there, stand for no factor.
        "routed_scaling_factor": fields.real(f"{prefix}.expert_weights_scale", default=1.0) or 1.0,
        "topk_method": limited[sigmoid],
        "n_group": groups,
        "topk_group": fields.integer(f"{prefix}.expert_group_used_count", 0, default=0) or groups,
    }


def _deepseek_v2(fields: Fields, prefix: str) -> dict[str, Any]:
    return _deepseek2(fields, prefix, sigmoid=False)


def _deepseek_v3(fields: Fields, prefix: str) -> dict[str, Any]:
    return _deepseek2(fields, prefix, sigmoid=True)


def _tenth(multiplier: float) -> dict[str, float]:
    """DeepSeek's files have a tenth of it, and llama.cpp takes both factors to be the same."""
    return {"mscale": multiplier * 10, "mscale_all_dim": multiplier * 10}


_DEEPSEEK = {
    "names": (
        ("attn_q_a", "self_attn.q_a_proj"),
        ("attn_q_b", "self_attn.q_b_proj"),
        ("attn_q_a_norm", "self_attn.q_a_layernorm"),
        ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
        ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
        ("attn_kv_b", "self_attn.kv_b_proj"),
        ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
        ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
        ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
        ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
    ),
    "heads": (("attn_k_b", "self_attn.k_b_proj.{}"), ("attn_v_b", "self_attn.v_b_proj.{}")),
    "reads": (
        "attention.key_length_mla",
        "attention.kv_lora_rank",
        "attention.q_lora_rank",
        "attention.value_length",
        "attention.value_length_mla",
        "expert_weights_scale",
    ),
    "logarithm": _tenth,
}
_GPT_OSS = (
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_gate_inp", "mlp.router"),
    ("attn_sinks.weight", "self_attn.sinks"),
)
# Layers of it.
_GEMMA3_27B = 62
_GEMMA3_NORMS = (
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)
_MIXTRAL = tuple(
    (kind, f"block_sparse_moe.experts.{{}}.{name}") for kind, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
)
ARCHITECTURES = {
    "llama": Architecture("llama", _dense, interleaved=True),
    "mistral3": Architecture("llama", _dense, interleaved=True),
    "qwen2": Architecture("qwen2", _dense),
    "qwen3": Architecture("qwen3", _dense),
    "qwen2moe": Architecture("qwen2_moe", _qwen2_moe),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe),
    "olmoe": Architecture("olmoe", _olmoe, reads=("attention.clamp_kqv",)),
    "gemma3": Architecture(
        "gemma3_text",
        _gemma3,
        names=_GEMMA3_NORMS,
        norm_offset=1.0,
        reads=("attention.sliding_window_pattern", "rope.freq_base_swa"),
    ),
    "gpt-oss": Architecture("gpt_oss", _gpt_oss, names=_GPT_OSS, yarn={"truncate": False}),
    "deepseek2": Architecture("deepseek_v2", _deepseek_v2, **_DEEPSEEK),  # type: ignore[arg-type]
}
_DEEPSEEK_V3 = Architecture("deepseek_v3", _deepseek_v3, **_DEEPSEEK)  # type: ignore[arg-type]
_MINISTRAL3 = Architecture("ministral3", _ministral3, interleaved=True, reads=("attention.temperature_scale",))
_LLAMA_WITH_EXPERTS = Architecture(
    "mixtral", _mixtral, interleaved=True, names=(("ffn_gate_inp", "block_sparse_moe.gate"),), experts=_MIXTRAL
)


def architecture_of(fields: Fields) -> tuple[str, Architecture]:
    """(prefix of its fields, architecture) of a file. Raises CheckpointError for one that is not known."""
    name = fields.get("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise CheckpointError(f"general.architecture in {fields.path} is {name!r}; supported: {known}")
    made = ARCHITECTURES[name]
    if name == "deepseek2" and fields.get(f"{name}.expert_gating_func") == _SIGMOID:
        return name, _DEEPSEEK_V3
    if name == "mistral3" and fields.get(f"{name}.attention.temperature_scale"):
        return name, _MINISTRAL3
    has_experts = fields.integer(f"{name}.expert_count", 0, default=0) > 0
    return name, _LLAMA_WITH_EXPERTS if made.model_type == "llama" and has_experts else made
