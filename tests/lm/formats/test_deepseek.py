"""DeepSeekMoE's first version, which transformers has no class for.

The reference is put together of transformers' parts as the published model is: Llama's attention, norms and rotary positions, and
the expert block of DeepSeek-V2, which took the first version's over (softmax gate, shared experts); renormalising the gate, which
only the first version can, is added here.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DeepseekV2Config, LlamaConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP

from anabranch.errors import CheckpointError
from anabranch.lm import Decoder, convert, export_huggingface, load_model
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.routing import Router, TopK

TOLERANCE = 1e-4
BASE = {
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
}
CASES = {
    "16B": {},
    "renormalised": {"norm_topk_prob": True},
    "renormalised top-1 is not": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "every second layer": {"moe_layer_freq": 2, "first_k_dense_replace": 1},
    "no shared experts, all routed": {"n_shared_experts": None, "first_k_dense_replace": 0},
    "grouped heads, bias, linear rope": {
        "num_key_value_heads": 2,
        "attention_bias": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "tie_word_embeddings": True,
    },
    "all dense": {"n_routed_experts": None},
}


class Renormalised(nn.Module):
    """The gate of the first version with norm_topk_prob: weights of the chosen are divided by their sum, unless there is one."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, x):
        logits, weights, index = self.gate(x)
        return logits, weights / (weights.sum(-1, keepdim=True) + 1e-20), index


class NoShared(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def reference(fields, weights):
    """Logits for ``tokens`` of the published model with ``weights``."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "attention_bias",
    )
    more = (
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_scaling",
        "rope_theta",
    )
    llama = LlamaForCausalLM(LlamaConfig(**{name: fields[name] for name in names + more})).eval()
    for index, layer in enumerate(llama.model.layers):
        if _is_routed(fields, index):
            layer.mlp = _moe_block(
                fields, {k: v for k, v in weights.items() if k.startswith(f"model.layers.{index}.mlp.")}
            )
        else:
            assert isinstance(layer.mlp, LlamaMLP)
    rest = {name: value for name, value in weights.items() if ".mlp." not in name or _is_dense_name(fields, name)}
    missing, unexpected = llama.load_state_dict(rest, strict=False)
    assert not unexpected
    assert all(".mlp." in name or name == "lm_head.weight" for name in missing)
    with torch.no_grad():
        return llama(tokens()).logits


def _is_routed(fields, index):
    every = index % fields["moe_layer_freq"] == 0
    return fields["n_routed_experts"] is not None and index >= fields["first_k_dense_replace"] and every


def _is_dense_name(fields, name):
    return not _is_routed(fields, int(name.split(".")[2]))


def _moe_block(fields, weights):
    names = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
    config = DeepseekV2Config(
        **{name: fields[name] for name in names},
        n_shared_experts=fields["n_shared_experts"] or 1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        num_attention_heads=4,
    )
    config._experts_implementation = "eager"
    block = DeepseekV2Moe(config)
    local = {name.split(".mlp.")[1]: value for name, value in weights.items()}
    with torch.no_grad():
        block.gate.weight.copy_(local["gate.weight"])
        for e in range(fields["n_routed_experts"]):
            gate, up, down = (local[f"experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            block.experts.gate_up_proj[e].copy_(torch.cat([gate, up]))
            block.experts.down_proj[e].copy_(down)
        if fields["n_shared_experts"]:
            for part in ("gate_proj", "up_proj", "down_proj"):
                getattr(block.shared_experts, part).weight.copy_(local[f"shared_experts.{part}.weight"])
        else:
            block.shared_experts = NoShared()
    if fields["norm_topk_prob"] and fields["num_experts_per_tok"] > 1:
        block.gate = Renormalised(block.gate)
    return block


def random_weights(fields):
    """As the published files name them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, mean=0.0):
        return torch.randn(shape, generator=generator) * 0.3 + mean

    dim, heads, stores = fields["hidden_size"], fields["num_attention_heads"], fields["num_key_value_heads"]
    head_dim = dim // heads
    weights = {"model.embed_tokens.weight": draw(fields["vocab_size"], dim), "model.norm.weight": draw(dim, mean=1)}
    if not fields["tie_word_embeddings"]:
        weights["lm_head.weight"] = draw(fields["vocab_size"], dim)
    for layer in range(fields["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{norm}.weight"] = draw(dim, mean=1)
        rows = {"q_proj": heads * head_dim, "k_proj": stores * head_dim, "v_proj": stores * head_dim, "o_proj": dim}
        for name, size in rows.items():
            weights[f"{at}.self_attn.{name}.weight"] = draw(size, dim)
            if fields["attention_bias"]:
                weights[f"{at}.self_attn.{name}.bias"] = draw(size)
        blocks = {f"{at}.mlp": fields["intermediate_size"]}
        if _is_routed(fields, layer):
            width = fields["moe_intermediate_size"]
            blocks = {f"{at}.mlp.experts.{e}": width for e in range(fields["n_routed_experts"])}
            if fields["n_shared_experts"]:
                blocks[f"{at}.mlp.shared_experts"] = width * fields["n_shared_experts"]
            weights[f"{at}.mlp.gate.weight"] = draw(fields["n_routed_experts"], dim)
        for block, width in blocks.items():
            for part in ("gate_proj", "up_proj"):
                weights[f"{block}.{part}.weight"] = draw(width, dim)
            weights[f"{block}.down_proj.weight"] = draw(dim, width)
    return weights


def tokens():
    return torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model.eval()(tokens()).logits_BLV


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_published_model_in_both_directions(case, tmp_path, caplog):
    fields = BASE | CASES[case]
    weights = random_weights(fields)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text(json.dumps(fields))
    save_file(weights, tmp_path / "in/model.safetensors")
    expected = reference(fields, weights)
    assert expected.std() > 0.1
    ours, _ = load_model(tmp_path / "in")
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=TOLERANCE)
    convert(tmp_path / "in", tmp_path / "out", "huggingface")
    written = json.loads((tmp_path / "out/config.json").read_text())
    if case == "all dense":
        assert written["model_type"] == "llama"
        return
    assert written["model_type"] == "deepseek"
    assert "transformers has no class for model_type deepseek: it reads this folder only with" in caplog.text
    if "; family qwen2_moe (--family) writes the same model" in caplog.text:
        convert(tmp_path / "in", tmp_path / "qwen", "huggingface", family="qwen2_moe")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "qwen").eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(tokens()).logits, expected, rtol=0, atol=TOLERANCE)
    else:
        with pytest.raises(CheckpointError, match="qwen2_moe has no "):
            convert(tmp_path / "in", tmp_path / "qwen", "huggingface", family="qwen2_moe")
    given = load_file(tmp_path / "out/model.safetensors")
    assert given.keys() == weights.keys()
    torch.testing.assert_close(reference(BASE | written, given), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("normalize", ["none", "sum"])
def test_a_model_of_ours_is_exported_on_request(normalize, tmp_path):
    config = Decoder.Config(
        vocab_size=61,
        dim=32,
        num_layers=4,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=MoE.Config(
            num_experts=5,
            hidden_dim=12,
            shared_experts=2,
            router=Router.Config(select=TopK.Config(top_k=2, normalize=normalize)),
        ),
        dense_feed_forward=SwiGLU.Config(hidden_dim=40),
        dense_layers=(0,),
        init_std=0.3,
    )
    ours = config.build(seed=1)
    export_huggingface(tmp_path / "out", ours, family="deepseek")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["model_type"] == "deepseek"
    given = load_file(tmp_path / "out/model.safetensors")
    torch.testing.assert_close(logits(ours), reference(BASE | written, given), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logits(load_model(tmp_path / "out")[0]), logits(ours), rtol=0, atol=0)
