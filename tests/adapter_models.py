"""Tiny models in Hugging Face folders, and adapters for them in folders of peft's, made without either package.

Numbers come from generators of torch by name, so that they are the same wherever a folder is made anew: `golden.json` of
tests/adapters holds what peft computes on these.
"""

import json
import zlib

import torch
from safetensors.torch import load_file, save_file

from anabranch.lm import Decoder, export_huggingface
from anabranch.nn import LatentAttention, MoE, Rotary, SelfAttention, SwiGLU
from anabranch.routing import Router, SwitchLoss, TopK

VOCAB = 61
BODY = {"vocab_size": VOCAB, "dim": 32, "num_layers": 2, "max_positions": 64, "depth_scaled_init": False}
DENSE = SwiGLU.Config(hidden_dim=48)
ROUTER = Router.Config(select=TopK.Config(top_k=2, normalize="none"), balance=(SwitchLoss.Config(alpha=0.01),))
CONFIGS = {
    "llama": lambda: Decoder.Config(
        **BODY, attention=SelfAttention.Config(num_heads=4, num_kv_heads=2), feed_forward=DENSE
    ),
    "qwen2": lambda: Decoder.Config(
        **BODY,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, qkv_bias=True),
        feed_forward=DENSE,
        tie_embeddings=True,
    ),
    "qwen3": lambda: Decoder.Config(
        **BODY,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm="head"),
        feed_forward=DENSE,
    ),
    # Rows of its queries and keys stand in another order in files.
    "deepseek_v2": lambda: Decoder.Config(
        **BODY,
        attention=LatentAttention.Config(num_heads=2, kv_rank=8, q_rank=12, head_dim=8, rotary_dim=4, value_dim=8),
        feed_forward=MoE.Config(num_experts=4, hidden_dim=16, router=ROUTER, shared_experts=2),
        rotary=Rotary.Config(),
    ),
    "olmoe": lambda: Decoder.Config(
        **BODY,
        attention=SelfAttention.Config(num_heads=4, qk_norm="full"),
        feed_forward=MoE.Config(num_experts=4, hidden_dim=16, router=ROUTER),
    ),
}
OTHERS = {
    "mixtral": lambda: Decoder.Config(
        **BODY,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=MoE.Config(
            num_experts=4, hidden_dim=16, router=ROUTER.replace(select=TopK.Config(top_k=2, normalize="sum"))
        ),
    ),
    "qwen3_moe": lambda: Decoder.Config(
        **BODY,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm="head"),
        feed_forward=MoE.Config(
            num_experts=4, hidden_dim=16, router=ROUTER.replace(select=TopK.Config(top_k=2, normalize="sum"))
        ),
    ),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TOKENS = torch.tensor([[3, 17, 60, 8, 8, 41], [0, 5, 22, 1, 59, 30]])


def drawn(name, shape):
    """Numbers for a tensor of this name: the same ones whenever they are asked for."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    value = torch.randn(*shape, generator=generator) * 0.3
    return value + 1 if "norm" in name else value


def make_base(folder, family):
    """A model of the family in ``folder``; returns its tensors by transformers' names."""
    model = (CONFIGS | OTHERS)[family]().build()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(drawn(name, tensor.shape))
    export_huggingface(folder, model, family=family)
    return load_file(folder / "model.safetensors")


def linear_layers(base, words):
    """{module: (inputs, outputs)} of the base's layers whose last word is one of ``words``."""
    return {
        name.removesuffix(".weight"): (tensor.shape[1], tensor.shape[0])
        for name, tensor in base.items()
        if name.endswith(".weight") and name.split(".")[-2] in words
    }


def make_adapter(folder, layers, *, rank=4, ranks=None, extra=None, seed="", **table):
    """An adapter of ``layers`` ({module: (inputs, outputs)}); ``extra`` are tensors beside the pairs. Returns all its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (inputs, outputs) in layers.items():
        own = (ranks or {}).get(module, rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = drawn(f"{seed}{module}.A", (own, inputs))
        tensors[f"base_model.model.{module}.lora_B.weight"] = drawn(f"{seed}{module}.B", (outputs, own))
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in (extra or {}).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    words = sorted({module.split(".")[-1] for module in layers})
    usual = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": words,
        "bias": "none",
        "base_model_name_or_path": "base",
        "lora_dropout": 0.05,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**usual, **table}))
    return tensors


def stacked(layers, *, rank=3, experts=4, dim=32, hidden=16, seed=""):
    """Tensors of adapters of stacked experts, for `make_adapter`'s ``extra``: gate and up innermost, as peft wraps them."""
    made = {}
    for layer in layers:
        place = f"model.layers.{layer}.mlp.experts"
        for name, inputs, outputs in ((f"{place}.base_layer", dim, 2 * hidden), (place, hidden, dim)):
            made[f"{name}.lora_A.weight"] = drawn(f"{seed}{name}.A", (experts * rank, inputs))
            made[f"{name}.lora_B.weight"] = drawn(f"{seed}{name}.B", (outputs, rank * experts))
    return made


def with_deltas(folder, base_folder, base, adapter, scales, whole=None):
    """The base as a folder whose matrices are W + scale B A, by the formula, and whose ``whole`` tensors are others."""
    changed = dict(base)
    for module, scale in scales.items():
        a, b = (adapter[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
        changed[f"{module}.weight"] = (changed[f"{module}.weight"].double() + scale * (b @ a)).float()
    changed |= {
        name: tensor for name, tensor in (whole or {}).items() if f"{name.removesuffix('.weight')}" not in scales
    }
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / "model.safetensors")
    table = json.loads((base_folder / "config.json").read_text())
    if whole and "lm_head.weight" in changed:
        table["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(table))
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits_BLV


# Kinds that are no plain LoRA, by name; `make_kind` makes a folder with one.
KINDS = ("dora", "ia3", "poly", "prompt", "prefix")
TASKS, SKILLS, SPLITS, VIRTUAL = 3, 4, 2, 5


def make_kind(folder, kind, base, family="llama", *, words=None, seed="", extra=None, splits=SPLITS, **table):
    """An adapter of this kind for the ``base`` of `make_base`; returns all its tensors. ``words`` are layers' last ones."""
    is_mixture = any(".experts." in name for name in base)
    usual = {"dora": ATTENTION, "ia3": ["k_proj", "v_proj", "o_proj" if is_mixture else "down_proj"], "poly": ATTENTION}
    layers = linear_layers(base, words or usual.get(kind, []))
    if kind == "dora":
        lengths = {
            f"{module}.lora_magnitude_vector": 1.5 + drawn(f"{seed}{module}.m", (outputs,))
            for module, (_, outputs) in layers.items()
        }
        return make_adapter(folder, layers, seed=seed, extra={**lengths, **(extra or {})}, use_dora=True, **table)
    made = {
        "ia3": lambda: ia3_tensors(layers, seed),
        "poly": lambda: poly_tensors(layers, seed, splits=splits),
        "prompt": lambda: {"prompt_embeddings": drawn(f"{seed}prompt", (VIRTUAL, BODY["dim"]))},
        "prefix": lambda: {"prompt_embeddings": drawn(f"{seed}prefix", (VIRTUAL, 2 * 2 * kept_width(family)))},
    }[kind]()
    prefix = "" if kind in ("prompt", "prefix") else "base_model.model."
    tensors = {f"{prefix}{name}": tensor for name, tensor in {**made, **(extra or {})}.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    table = {"n_splits": splits, **table} if kind == "poly" else table
    told = {**table_of_kind(kind, layers, family), "base_model_name_or_path": "base", "inference_mode": True, **table}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return tensors


def ia3_tensors(layers, seed=""):
    """Factors of outputs; of inputs where a layer is the last of its kind."""
    return {
        f"{module}.ia3_l": 1 + drawn(f"{seed}{module}.l", (1, inputs) if of_inputs(module) else (outputs, 1))
        for module, (inputs, outputs) in layers.items()
    }


def of_inputs(module):
    """Whether `make_kind` multiplies what a layer gets."""
    return module.endswith(("down_proj", "o_proj"))


def poly_tensors(layers, seed="", rank=3, splits=SPLITS):
    """Skills of layers, and what each task makes of them."""
    made = {}
    for module, (inputs, outputs) in layers.items():
        made[f"{module}.poly_lora_A"] = drawn(f"{seed}{module}.A", (splits, SKILLS, inputs // splits, rank))
        made[f"{module}.poly_lora_B"] = drawn(f"{seed}{module}.B", (splits, SKILLS, rank, outputs // splits))
        made[f"{module}.poly_router.module_logits"] = 5 * drawn(f"{seed}{module}.t", (TASKS, splits * SKILLS))
    return made


def kept_width(family):
    """Numbers of the keys of one position."""
    config = (CONFIGS | OTHERS)[family]()
    return config.attention.kv_heads * config.attention.width(config.dim)


def table_of_kind(kind, layers, family):
    """What an adapter_config.json says of an adapter of `make_kind`."""
    words = sorted({module.split(".")[-1] for module in layers})
    heads = (CONFIGS | OTHERS)[family]().attention
    front = {"num_virtual_tokens": VIRTUAL, "num_layers": 2, "num_transformer_submodules": 1}
    kept = {"token_dim": kept_width(family), "num_attention_heads": heads.kv_heads, "prefix_projection": False}
    return {
        "task_type": "CAUSAL_LM",
        **{
            "ia3": {
                "peft_type": "IA3",
                "target_modules": words,
                "feedforward_modules": [word for word in words if of_inputs(word)],
            },
            "poly": {
                "peft_type": "POLY",
                "target_modules": words,
                "r": 3,
                "n_tasks": TASKS,
                "n_skills": SKILLS,
                "n_splits": SPLITS,
            },
            "prompt": {
                **front,
                "peft_type": "PROMPT_TUNING",
                "token_dim": BODY["dim"],
                "num_attention_heads": getattr(heads, "num_heads", None),
            },
            "prefix": {**front, **kept, "peft_type": "PREFIX_TUNING"},
        }[kind],
    }
