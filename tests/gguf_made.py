"""Tiny GGUF files of every architecture, made from transformers' models as llama.cpp's converter makes them."""

import re

import numpy as np
import pytest
import torch

from gguf_files import interleaved

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

VOCAB, DIM, HEADS, STORES, HEAD_DIM = 96, 64, 4, 2, 32
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": STORES,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
}
WIDE = {"head_dim": HEAD_DIM}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
# Architecture in the file: (transformers' config, its changes, fields of the file beside those of all).
MADE = {
    "llama": ("LlamaConfig", {"intermediate_size": 96}, {"feed_forward_length": 96}),
    "mistral3": ("LlamaConfig", {"intermediate_size": 96, **WIDE}, {"feed_forward_length": 96}),
    "llama with experts": (
        "MixtralConfig",
        {"intermediate_size": 96, "num_local_experts": 5, "num_experts_per_tok": 2},
        {"feed_forward_length": 96, "expert_count": 5, "expert_used_count": 2},
    ),
    "qwen2": ("Qwen2Config", {"intermediate_size": 96}, {"feed_forward_length": 96}),
    "qwen3": ("Qwen3Config", {"intermediate_size": 96, **WIDE}, {"feed_forward_length": 96}),
    "qwen2moe": (
        "Qwen2MoeConfig",
        {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        {
            "feed_forward_length": 96,
            "expert_count": 5,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 64,
        },
    ),
    "qwen3moe": (
        "Qwen3MoeConfig",
        {**EXPERTS, **WIDE, "moe_intermediate_size": 32, "norm_topk_prob": True},
        {"feed_forward_length": 96, "expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "olmoe": (
        "OlmoeConfig",
        {**EXPERTS, "intermediate_size": 32, "num_key_value_heads": HEADS},
        {"feed_forward_length": 32, "expert_count": 5, "expert_used_count": 2},
    ),
}
GEMMA = {
    "intermediate_size": 96,
    **WIDE,
    "num_hidden_layers": 7,
    "sliding_window": 8,
    "query_pre_attn_scalar": HEAD_DIM,
    "tie_word_embeddings": True,
}
MADE["gemma3"] = (
    "Gemma3TextConfig",
    GEMMA,
    {
        "feed_forward_length": 96,
        "attention.sliding_window": 8,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "block_count": 7,
    },
)


MADE["mistral3 with a temperature"] = (
    "Ministral3Config",
    {
        "intermediate_size": 96,
        **WIDE,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 6,
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    {
        "feed_forward_length": 96,
        "attention.temperature_scale": 0.4,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 6,
        "rope.scaling.yarn_log_multiplier": 1.0,
    },
)
GPT_OSS = {
    **WIDE,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
MADE["gpt-oss"] = (
    "GptOssConfig",
    GPT_OSS,
    {
        "block_count": 3,
        "expert_count": 5,
        "expert_used_count": 2,
        "expert_feed_forward_length": 32,
        "attention.sliding_window": 8,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
    },
)
NOPE, TURNED, VALUE, RANK = 24, 8, 20, 32
LATENT = {
    "num_key_value_heads": HEADS,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "kv_lora_rank": RANK,
    "q_lora_rank": 24,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": TURNED,
    "v_head_dim": VALUE,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 1.5,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
LATENT_FIELDS = {
    "block_count": 3,
    "feed_forward_length": 96,
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_shared_count": 2,
    "expert_feed_forward_length": 32,
    "leading_dense_block_count": 1,
    "expert_weights_scale": 1.5,
    "rope.dimension_count": TURNED,
    "attention.q_lora_rank": 24,
    "attention.kv_lora_rank": RANK,
}
WHOLE = {"attention.key_length": NOPE + TURNED, "attention.value_length": VALUE}
APART = {
    "attention.head_count_kv": 1,
    "attention.key_length": RANK + TURNED,
    "attention.value_length": RANK,
    "attention.key_length_mla": NOPE + TURNED,
    "attention.value_length_mla": VALUE,
}
MADE["deepseek2"] = ("DeepseekV2Config", {**LATENT, "topk_method": "greedy"}, {**LATENT_FIELDS, **APART})
# As files were made until April 2025.
MADE["deepseek2 whole"] = ("DeepseekV2Config", {**LATENT, "topk_method": "greedy"}, {**LATENT_FIELDS, **WHOLE})
MADE["deepseek2 lite, groups"] = (
    "DeepseekV2Config",
    {**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    {
        **{key: value for key, value in LATENT_FIELDS.items() if "q_lora" not in key},
        **APART,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "expert_gating_func": 1,
    },
)
MADE["deepseek2 v3"] = (
    "DeepseekV3Config",
    {**LATENT, "n_group": 4, "topk_group": 2, "norm_topk_prob": True},
    {
        **LATENT_FIELDS,
        **APART,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
    },
)


def theirs(name):
    """A random model of transformers', with no norm of ones and no bias of zeros."""
    kind, changes, _ = MADE[name]
    config = getattr(transformers, kind)(**{**COMMON, **changes})
    config.is_apart = "attention.key_length_mla" in MADE[name][2]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for key, parameter in (*model.named_parameters(), *model.named_buffers()):
                if "inv_freq" in key:
                    continue
                if parameter.dim() == 1 or "bias" in key:
                    parameter.normal_(1.0 if "norm" in key else 0.0, 0.2)
    return model


def tensors_of(model, architecture):
    """(name in the file, array) as convert_hf_to_gguf.py gives them: names of the package's table, experts stacked."""
    table = name_table(architecture)
    for key, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "kv_b_proj" in key and model.config.is_apart:
            heads = array.reshape(HEADS, NOPE + VALUE, RANK)
            yield table.get_name(key.replace("kv_b", "k_b"), (".weight",)), heads[:, :NOPE].swapaxes(1, 2)
            yield table.get_name(key.replace("kv_b", "v_b"), (".weight",)), heads[:, NOPE:]
            continue
        if architecture == "gemma3":
            if key == "lm_head.weight":
                continue
            array = array + 1 if key.endswith("norm.weight") else array
        layer = re.match(r"model\.layers\.(\d+)\.", key)
        if architecture == "gpt-oss" and "experts" in key:
            kind = "bias" if "bias" in key else "weight"
            array = array.swapaxes(1, 2) if kind == "weight" else array
            parts = {"gate": array[:, ::2], "up": array[:, 1::2]} if "gate_up" in key else {"down": array}
            yield from ((f"blk.{layer[1]}.ffn_{part}_exps.{kind}", value) for part, value in parts.items())
            continue
        if key.endswith("experts.gate_up_proj"):  # as transformers 5 has them in memory
            gate, up = np.split(array, 2, axis=1)
            yield f"blk.{layer[1]}.ffn_gate_exps.weight", gate
            yield f"blk.{layer[1]}.ffn_up_exps.weight", up
            continue
        if key.endswith("experts.down_proj"):
            yield f"blk.{layer[1]}.ffn_down_exps.weight", array
            continue
        if architecture in ("llama", "mistral3") and re.search(r"[qk]_proj", key):
            array = interleaved(array, HEADS if "q_proj" in key else STORES)
        if "shared_expert_gate" in key:
            array = array[0]
        key = key.replace("block_sparse_moe", "mlp").replace("correction_bias", "correction.bias")
        key = f"{key}.weight" if key.endswith("sinks") else key
        name = table.get_name(key, (".weight", ".bias"))
        assert name is not None, key
        yield name, array


def name_table(architecture):
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(arch, 8)


def keeps_blocks(tensor, array):
    """Whether llama.cpp stores it in blocks: matrices whose rows fill them, but routers, not biases."""
    return array.ndim > 1 and tensor.endswith(".weight") and "gate_inp" not in tensor and array.shape[-1] % 32 == 0


def write(path, model, name, *, kind=None, split=None, tensors=None, extra=None):
    """The file of a model, its matrices stored as ``kind``; ``split`` tensors in each of its parts."""
    architecture, fields = name.split()[0], MADE[name][2]
    options = {} if split is None else {"split_max_tensors": split}
    writer = gguf.GGUFWriter(path, architecture, **options)
    config = model.config
    for key, value in {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": DIM,
        "attention.head_count": HEADS,
        "attention.head_count_kv": config.num_key_value_heads,
        **fields,
    }.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[
            type(value)
        ]
        add(f"{architecture}.{key}", value)
    if (
        "attention.key_length" not in fields
        and (head_dim := getattr(config, "head_dim", None) or DIM // HEADS) != DIM // HEADS
    ):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rotary = config.rope_parameters
    writer.add_rope_freq_base(
        rotary["rope_theta"] if "rope_theta" in rotary else rotary["full_attention"]["rope_theta"]
    )
    writer.add_layer_norm_rms_eps(1e-5)
    if extra is not None:
        extra(writer)
    for tensor, array in tensors or tensors_of(model, architecture):
        if kind is None or not keeps_blocks(tensor, array):
            writer.add_tensor(tensor, np.ascontiguousarray(array))
        else:
            writer.add_tensor(tensor, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Bytes of a block of 256 weights, and where the scales over its scales are. The package cannot quantise to these.
SUPERBLOCKS = {"Q4_K": (144, 4), "Q5_K": (176, 4), "Q6_K": (210, -2)}


def random_blocks(shape, kind, seed):
    """Blocks whose scales make weights of about 0.05."""
    size, low = SUPERBLOCKS[kind]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (int(np.prod(shape)) // 256, size), dtype=np.uint8)
    # Of q6_k they are multiplied by signed bytes.
    least = 2e-6 if kind == "Q6_K" else 2e-5
    scale = draw.uniform(least, 10 * least, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    blocks[:, slice(0, low) if low > 0 else slice(low, None)] = scale[:, : abs(low)]
    return blocks.reshape(*shape[:-1], -1)


def with_blocks(path, kinds, *, experts=3, layers=2, hidden=256, extra=None, vocabulary=VOCAB):
    """A small Mixtral whose matrices are of whole superblocks and stored as ``kinds`` says of a name; None for float32."""
    sizes = {"hidden_size": 256, "intermediate_size": hidden, "num_local_experts": experts}
    config = transformers.MixtralConfig(**COMMON | sizes | {"num_hidden_layers": layers, "vocab_size": vocabulary})
    model = transformers.AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": layers,
        "context_length": 64,
        "embedding_length": 256,
        "attention.head_count": HEADS,
        "attention.head_count_kv": STORES,
        "feed_forward_length": hidden,
        "expert_count": experts,
        "expert_used_count": 2,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    if extra is not None:
        extra(writer)
    for number, (name, array) in enumerate(tensors_of(model, "llama")):
        kind = None if array.ndim == 1 or "gate_inp" in name else kinds(name)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(array))
        else:
            type_, array = gguf.GGMLQuantizationType[kind], np.ascontiguousarray(array)
            drawn = kind in SUPERBLOCKS
            data = random_blocks(array.shape, kind, number) if drawn else gguf.quants.quantize(array, type_)
            writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def medium(name):
    """As llama.cpp mixes them in Q4_K_M."""
    return "Q6_K" if name.startswith("output") or "attn_v" in name or "ffn_down" in name else "Q4_K"
