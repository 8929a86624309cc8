"""Every family against transformers, in both directions, on tiny random models.

transformers has no class for DeepSeekMoE's first version: see test_deepseek.py.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from anabranch.data import ByteTokenizer
from anabranch.errors import CheckpointError
from anabranch.lm import Decoder, convert, export_huggingface, load_config, load_model, save_model
from anabranch.nn import MoE, Rotary, SelfAttention, SwiGLU
from anabranch.routing import Router, TopK
from foreign_models import VOCAB, build_theirs

TOLERANCE = 1e-4  # fp32 logits of order 1, summed in another order
QWEN = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
QWEN2 = {**QWEN, "shared_expert_intermediate_size": 40}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

GEMMA = {
    "intermediate_size": 48,
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
GPT_OSS = {
    "intermediate_size": 24,
    "head_dim": 8,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "rope_parameters": {**YARN, "truncate": False},
}
LATENT = {
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
DEEPSEEK = {**LATENT, "topk_method": "greedy", "routed_scaling_factor": 1.0}
DEEPSEEK3 = {**LATENT, "n_group": 4, "topk_group": 2}
GLM = {
    "intermediate_size": 48,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "head_dim": 16,
}

CASES = {
    "llama": ("Llama", {"intermediate_size": 48}),
    "llama tied": ("Llama", {"intermediate_size": 48, "tie_word_embeddings": True}),
    "llama bias, one kv head": ("Llama", {"intermediate_size": 48, "attention_bias": True, "num_key_value_heads": 1}),
    "llama wide heads": ("Llama", {"intermediate_size": 48, "head_dim": 12, "rms_norm_eps": 1e-3}),
    "llama linear": (
        "Llama",
        {"intermediate_size": 48, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.5}},
    ),
    "llama 3.1": ("Llama", {"intermediate_size": 48, "rope_parameters": LLAMA3}),
    "dense qwen2": ("Qwen2", {"intermediate_size": 48}),
    "dense qwen2 tied, one kv head, linear": (
        "Qwen2",
        {
            "intermediate_size": 48,
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.5},
        },
    ),
    "dense qwen2 wide heads": ("Qwen2", {"intermediate_size": 48, "head_dim": 12}),
    "qwen2 windows above": (
        "Qwen2",
        {"intermediate_size": 48, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3 dense": ("Qwen3", {"intermediate_size": 48, "head_dim": 12}),
    "qwen3 dense, bias, tied, windows above, yarn": (
        "Qwen3",
        {
            "intermediate_size": 48,
            "head_dim": 16,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "rope_parameters": YARN,
        },
    ),
    "mistral": ("Mistral", {"intermediate_size": 48, "sliding_window": 7}),
    "mistral without windows": ("Mistral", {"intermediate_size": 48, "sliding_window": None, "head_dim": 12}),
    "mistral, window of one, one kv head": (
        "Mistral",
        {"intermediate_size": 48, "sliding_window": 1, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama yarn": ("Llama", {"intermediate_size": 48, "rope_parameters": YARN}),
    "llama yarn, said in full": (
        "Llama",
        {
            "intermediate_size": 48,
            "rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False},
        },
    ),
    "llama yarn of two scales": (
        "Llama",
        {"intermediate_size": 48, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "gemma3": ("Gemma3Text", GEMMA),
    "gemma3, scaled positions, another pattern": (
        "Gemma3Text",
        {
            **GEMMA,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "sliding_window": 1,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
        },
    ),
    "gemma3, all with a window": ("Gemma3Text", {**GEMMA, "layer_types": ["sliding_attention"] * 3}),
    "gpt-oss": ("GptOss", GPT_OSS),
    "gpt-oss, plain positions, tied": (
        "GptOss",
        {
            **GPT_OSS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
            "num_experts_per_tok": 1,
            "sliding_window": 2,
            "tie_word_embeddings": True,
        },
    ),
    "ministral3": (
        "Ministral3",
        {"intermediate_size": 48, "head_dim": 12, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3}},
    ),
    "ministral3, windows, plain positions": (
        "Ministral3",
        {
            "intermediate_size": 48,
            "head_dim": 16,
            "sliding_window": 7,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "original_max_position_embeddings": 5,
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "deepseek v2": ("DeepseekV2", DEEPSEEK),
    "deepseek v2, no latent of queries, groups, all routed, bias": (
        "DeepseekV2",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
        },
    ),
    "deepseek v2, longer by yarn": (
        "DeepseekV2",
        {**DEEPSEEK, "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek v3": ("DeepseekV3", DEEPSEEK3),
    "deepseek v3, one group, raw weights, yarn, tied": (
        "DeepseekV3",
        {
            **DEEPSEEK3,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "q_lora_rank": None,
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
        },
    ),
    "glm4 moe": ("Glm4Moe", GLM),
    "glm4 moe, qk norm, bias, groups": (
        "Glm4Moe",
        {
            **GLM,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        },
    ),
    "mixtral with a window": (
        "Mixtral",
        {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "qwen2 moe, windows in some": (
        "Qwen2Moe",
        {**QWEN2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3 moe with a window": ("Qwen3Moe", {**QWEN, "use_sliding_window": True, "sliding_window": 6}),
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral top-1, wide heads": (
        "Mixtral",
        {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 10},
    ),
    "mixtral tied": (
        "Mixtral",
        {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 4, "tie_word_embeddings": True},
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe renormalised": (
        "Olmoe",
        {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "olmoe clipped, bias, tied": (
        "Olmoe",
        {
            "intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "clip_qkv": 0.5,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": ("Qwen2Moe", QWEN2),
    "qwen2 renormalised, no bias": ("Qwen2Moe", {**QWEN2, "norm_topk_prob": True, "qkv_bias": False}),
    "qwen2 every second layer": ("Qwen2Moe", {**QWEN2, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
    "qwen2 some dense, wide heads": ("Qwen2Moe", {**QWEN2, "mlp_only_layers": [0, 2], "head_dim": 12}),
    "qwen3": ("Qwen3Moe", QWEN),
    "qwen3 renormalised, bias": ("Qwen3Moe", {**QWEN, "norm_topk_prob": True, "attention_bias": True}),
    "qwen3 wide heads, tied": ("Qwen3Moe", {**QWEN, "head_dim": 20, "tie_word_embeddings": True}),
    "qwen3 some dense": ("Qwen3Moe", {**QWEN, "decoder_sparse_step": 2, "mlp_only_layers": [0]}),
    "qwen3 first dense": ("Qwen3Moe", {**QWEN, "mlp_only_layers": [0]}),
}


def tokens():
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    output = model(tokens())
    return output.logits_BLV if isinstance(model, Decoder) else output.logits


# Torch tells transformers that there is nothing to draw.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
@pytest.mark.parametrize(("family", "fields"), [("DeepseekV3", DEEPSEEK3), ("Glm4Moe", GLM)])
def test_no_shared_experts_are_shared_experts_of_no_width(family, fields, tmp_path):
    theirs = build_theirs(family, **{**fields, "n_shared_experts": 0})
    theirs.save_pretrained(tmp_path)
    assert_same(load_model(tmp_path)[0], theirs)


@torch.no_grad()
def cached_logits(model):
    """As in generation: a prompt, more of it, then token by token."""
    cache, made, start = model.new_cache(64), [], 0
    for count in (9, 4, *[1] * 11):
        made.append(model(tokens()[:, start : start + count], cache=cache).logits_BLV)
        start += count
    return torch.cat(made, dim=1)


def assert_same(ours, theirs):
    expected = logits(theirs)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(ours.eval()), expected, rtol=0, atol=TOLERANCE)
    if isinstance(ours, Decoder):
        torch.testing.assert_close(cached_logits(ours), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_import_and_export_give_the_logits_of_transformers(case, tmp_path):
    family, changes = CASES[case]
    theirs = build_theirs(family, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokenizer = load_model(tmp_path / "theirs")
    assert tokenizer is None
    assert ours.config == load_config(tmp_path / "theirs")
    assert_same(ours, theirs)

    convert(tmp_path / "theirs", tmp_path / "back", "huggingface")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config.model_type == theirs.config.model_type
    assert_same(ours, back.eval())
    stored, given = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert given.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(given[name], tensor, rtol=0, atol=0)


def ours_like(**changes):
    fields = {
        "vocab_size": VOCAB,
        "dim": 32,
        "num_layers": 3,
        "attention": SelfAttention.Config(num_heads=4, num_kv_heads=2, head_dim=10),
        "feed_forward": MoE.Config(num_experts=6, hidden_dim=24),
        "init_std": 0.3,
        "max_positions": 64,
    }
    return Decoder.Config(**{**fields, **changes}).build(seed=3).eval()


def router(top_k, normalize="none"):
    return Router.Config(select=TopK.Config(top_k=top_k, normalize=normalize))


FULL = SelfAttention.Config(num_heads=4, qk_norm="full", clip_qkv=2.0)
HEAD = SelfAttention.Config(num_heads=2, head_dim=24, qk_norm="head", qkv_bias=True, out_bias=True)
DENSE = SwiGLU.Config(hidden_dim=40)

OURS = {
    "dense": (
        "llama",
        {"feed_forward": DENSE, "rotary": Rotary.Config(theta=3e3), "attention": SelfAttention.Config(num_heads=2)},
    ),
    "dense tied, llama3": (
        "llama",
        {
            "feed_forward": DENSE,
            "tie_embeddings": True,
            "rotary": Rotary.Config(scaling="llama3", factor=4.0, original_positions=32),
        },
    ),
    "full qk norm": ("olmoe", {"attention": FULL}),
    "full qk norm, renormalised": (
        "olmoe",
        {"attention": FULL, "feed_forward": MoE.Config(num_experts=5, hidden_dim=16, router=router(3, "sum"))},
    ),
    "head qk norm": ("qwen3_moe", {"attention": HEAD, "rotary": Rotary.Config(scaling="linear", factor=2.0)}),
    "head qk norm, dense layers": (
        "qwen3_moe",
        {
            "attention": HEAD.replace(qkv_bias=False, out_bias=False),
            "dense_feed_forward": DENSE,
            "dense_layers": (2, 0),
        },
    ),
    "renormalised": ("mixtral", {"feed_forward": MoE.Config(num_experts=4, hidden_dim=24, router=router(2, "sum"))}),
    "softmax over the chosen": (
        "mixtral",
        {"feed_forward": MoE.Config(num_experts=4, hidden_dim=24, router=router(2, "softmax"))},
    ),
    "gated shared expert": (
        "qwen2_moe",
        {
            "attention": SelfAttention.Config(num_heads=4, qkv_bias=True),
            "feed_forward": MoE.Config(num_experts=4, hidden_dim=24, shared_experts=2, shared_gate=True),
        },
    ),
    # What no family has as it is, said with spare parts of Qwen2-MoE:
    "raw weights, no qk norm": ("qwen2_moe", {}),
    "shared experts without a gate": (
        "qwen2_moe",
        {
            "feed_forward": MoE.Config(num_experts=4, hidden_dim=24, shared_experts=2, router=router(2, "sum")),
            "dense_feed_forward": DENSE,
            "dense_layers": (0,),
            "tie_embeddings": True,
        },
    ),
}


@pytest.mark.parametrize("case", OURS)
def test_a_model_of_ours_is_exported_as_the_family_that_fits(case, tmp_path):
    family, changes = OURS[case]
    ours = ours_like(**changes)
    export_huggingface(tmp_path / "out", ours, ByteTokenizer())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.model_type == family
    assert theirs.dtype == torch.float32
    assert_same(ours, theirs.eval())
    again, tokenizer = load_model(tmp_path / "out")
    assert_same(again, theirs)
    assert tokenizer.encode("ab") == [97, 98]
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not [name for name in names if "gate_up" in name], "files have one tensor per expert"


def test_exported_tokenizer_and_special_ids(tmp_path):
    export_huggingface(tmp_path / "out", ours_like(vocab_size=257), ByteTokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ab")["input_ids"] == [97, 98]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id) == (256, None)
    assert theirs.generation_config.eos_token_id in (256, [256])


def test_dtype_is_kept_and_may_be_changed(tmp_path):
    theirs = build_theirs("Mixtral", **CASES["mixtral"][1]).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_model(tmp_path / "theirs")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    wide, _ = load_model(tmp_path / "theirs", dtype=torch.float32)
    # Not theirs.float(): that would keep rotary frequencies rounded to bfloat16.
    assert_same(
        wide, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    )
    convert(tmp_path / "theirs", tmp_path / "half", "huggingface", dtype=torch.float16)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.float16


def test_fused_experts_as_they_are_in_memory_can_be_read(tmp_path):
    for family, case in (("Mixtral", "mixtral"), ("Qwen2Moe", "qwen2"), ("Olmoe", "olmoe")):
        theirs = build_theirs(family, **CASES[case][1])
        folder = tmp_path / case
        theirs.config.save_pretrained(folder)
        state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
        assert "model.layers.0.mlp.experts.gate_up_proj" in state
        save_file(state, folder / "model.safetensors")
        assert_same(load_model(folder)[0], theirs)


@pytest.mark.parametrize("safe", [True, False])
def test_shards_and_pickles_can_be_read(tmp_path, safe):
    theirs = build_theirs("Qwen3Moe", **CASES["qwen3"][1])
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    if not safe:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        for file in files:
            torch.save(
                load_file(file), tmp_path / file.name.replace("model", "pytorch_model").replace("safetensors", "bin")
            )
            file.unlink()
        text = json.dumps(index).replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (tmp_path / "pytorch_model.bin.index.json").write_text(text)
        (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(load_model(tmp_path)[0], theirs)


def test_export_in_shards(tmp_path):
    ours = ours_like(attention=FULL)
    export_huggingface(tmp_path / "out", ours, max_shard_bytes=50_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in ours.parameters())
    assert_same(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    assert_same(load_model(tmp_path / "out")[0], ours)


def test_a_family_is_remembered_through_the_native_format(tmp_path):
    theirs = build_theirs("Qwen2Moe", **{**QWEN2, "mlp_only_layers": [0, 1, 2], "qkv_bias": False})
    theirs.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "llama", "huggingface")  # cannot go back: without experts it is a Llama
    assert json.loads((tmp_path / "llama/config.json").read_text())["model_type"] == "llama"
    assert_same(load_model(tmp_path / "llama")[0], theirs)

    theirs = build_theirs("Mixtral", **CASES["mixtral"][1])
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "back", "huggingface")
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "mixtral"
    assert_same(load_model(tmp_path / "native")[0], theirs)
    save_model(tmp_path / "native", load_model(tmp_path / "native")[0])
    convert(tmp_path / "native", tmp_path / "qwen", "huggingface", family="qwen2_moe")
    theirs_too = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "qwen")
    assert_same(load_model(tmp_path / "native")[0], theirs_too.eval())


def test_settings_as_transformers_4_wrote_them(tmp_path):
    theirs = build_theirs("Llama", intermediate_size=48, rope_parameters=LLAMA3)
    theirs.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    scaling = {name: value for name, value in table.pop("rope_parameters").items() if name != "rope_theta"}
    (tmp_path / "config.json").write_text(json.dumps(table | {"rope_theta": 500.0, "rope_scaling": scaling}))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # a table that old files carry
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load_model(tmp_path)[0], theirs)


def edited(folder, tensors=(), drop=(), **changes):
    """A folder's config.json with other fields, and its weights with further ones."""
    table = {
        name: value for name, value in json.loads((folder / "config.json").read_text()).items() if name not in drop
    }
    (folder / "config.json").write_text(json.dumps(table | changes))
    if tensors:
        save_file({**load_file(folder / "model.safetensors"), **dict(tensors)}, folder / "model.safetensors")


def test_gemma_as_its_makers_published_it(tmp_path):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
    }
    theirs = build_theirs(
        "Gemma3Text",
        **{**GEMMA, "num_hidden_layers": 4, "layer_types": None, "sliding_window_pattern": 3, "rope_parameters": rope},
    )
    theirs.save_pretrained(tmp_path)
    edited(
        tmp_path,
        drop=("rope_parameters", "layer_types", "tie_word_embeddings"),
        sliding_window_pattern=3,
        rope_theta=1e4,
        rope_local_base_freq=1e2,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        cache_implementation="hybrid",
    )
    assert load_config(tmp_path).local_layers == (0, 1, 3)
    assert_same(load_model(tmp_path)[0], theirs)


def test_deepseek_as_its_makers_published_it(tmp_path):
    yarn = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}
    theirs = build_theirs("DeepseekV3", **{**DEEPSEEK3, "rope_parameters": yarn})
    theirs.save_pretrained(tmp_path)
    scaling = {"type": "yarn", **{name: value for name, value in yarn.items() if not name.startswith("rope_")}}
    # One layer more, which predicts a further token, as V3's files have it.
    state = load_file(tmp_path / "model.safetensors")
    draft = {
        name.replace("layers.2.", "layers.3."): value.clone() for name, value in state.items() if "layers.2." in name
    }
    edited(
        tmp_path,
        {**draft, "model.layers.3.eh_proj.weight": torch.zeros(32, 64)},
        drop=("rope_parameters", "rope_interleave"),
        rope_theta=500.0,
        rope_scaling=scaling,
        num_nextn_predict_layers=1,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
    )
    assert_same(load_model(tmp_path)[0], theirs)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Gemma3Text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping in .* is 30.0"),
        ("Gemma3Text", {"use_bidirectional_attention": True}, "use_bidirectional_attention in .* is True"),
        ("Gemma3Text", {"hidden_activation": "silu"}, "hidden_act in .* is 'silu'"),
        ("Gemma3Text", {"layer_types": ["chunked_attention"] * 3}, "layer_types in .* is 'chunked_attention'"),
        ("Gemma3Text", {"layer_types": ["full_attention"]}, "layer_types in .* are 1, and num_hidden_layers is 3"),
        ("GptOss", {"swiglu_limit": 5.0}, "swiglu_limit in .* is 5.0"),
        (
            "GptOss",
            {"quantization_config": {"quant_method": "aqlm"}},
            "quantization_config.quant_method in .* is 'aqlm'",
        ),
        ("DeepseekV2", {"norm_topk_prob": True}, "norm_topk_prob in .* is True"),
        ("DeepseekV3", {"rope_interleave": False}, "rope_interleave in .* is False"),
        ("DeepseekV3", {"topk_method": "greedy"}, "topk_method in .* is 'greedy'"),
        ("DeepseekV3", {"moe_layer_freq": 2}, "moe_layer_freq in .* is 2"),
        (
            "Glm4Moe",
            {"partial_rotary_factor": 0.1, "rope_parameters": None},
            "fraction is 0.1, which rotates 1 numbers",
        ),
    ],
)
def test_what_the_families_may_ask_for_and_we_do_not_compute(family, changes, message, tmp_path):
    fields = {"Gemma3Text": GEMMA, "GptOss": GPT_OSS, "DeepseekV2": DEEPSEEK, "DeepseekV3": DEEPSEEK3, "Glm4Moe": GLM}
    build_theirs(family, **fields[family]).save_pretrained(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)
