"""Adapters of every kind that are damaged, or of another model: one line, and the model stays as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_kinds import opened
from adapter_models import KINDS, linear_layers, logits, make_adapter, make_kind, stacked
from anabranch.adapters import load_peft
from anabranch.errors import CheckpointError


def retable(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def retensor(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(
        {name: tensor.contiguous() for name, tensor in change(load_file(path)).items() if tensor is not None}, path
    )


def swap(ending, make):
    """Another tensor in place of the first whose name ends so; None takes it out."""

    def change(tensors):
        name = next(name for name in sorted(tensors) if name.endswith(ending))
        return {**tensors, name: make(tensors[name])}

    return lambda folder: retensor(folder, change)


def without_layer(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.v_proj" not in name}


def a_layer_more(tensors):
    return tensors | {
        name.replace("layers.1.", "layers.7."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }


ENDING = {"dora": "lora_magnitude_vector", "ia3": "v_proj.ia3_l", "poly": "poly_lora_B", "prompt": "", "prefix": ""}
WRONG = {
    **{
        f"{kind} nan": (
            kind,
            swap(ENDING[kind], lambda t: torch.full_like(t, torch.nan)),
            "holds NaN or infinity; the adapter",
        )
        for kind in KINDS
    },
    **{
        f"{kind} integers": (
            kind,
            swap(ENDING[kind], lambda t: t.to(torch.int8)),
            "is stored as int8; it must be float32",
        )
        for kind in KINDS
    },
    **{
        f"{kind} a layer missing": (
            kind,
            lambda folder: retensor(folder, without_layer),
            r"lacks .* of model\.layers\.1\.self_attn\.v_proj, which target_modules in .* names",
        )
        for kind in ("dora", "ia3", "poly")
    },
    **{
        f"{kind} a deeper model": (
            kind,
            lambda folder: retensor(folder, a_layer_more),
            r"adapts model\.layers\.7\.\S+ .*for which the model, a llama, has no linear layer",
        )
        for kind in ("dora", "ia3", "poly")
    },
    **{
        f"{kind} no layers": (
            kind,
            lambda folder: retensor(folder, lambda t: {"model.norm.weight": torch.ones(32)}),
            "holds no .*, so there is",
        )
        for kind in ("dora", "ia3", "poly")
    },
    "dora a length missing": (
        "dora",
        swap("vector", lambda t: None),
        "lacks lora_magnitude_vector of .*, of which it has the rest",
    ),
    "dora lengths": (
        "dora",
        swap("vector", lambda t: t[:-1]),
        r"lora_magnitude_vector of .* has shape \[\d+\]; it must have one number",
    ),
    "dora rank 0": (
        "dora",
        swap("lora_A.weight", lambda t: t[:0]),
        r"lora_A of .* has shape \[0, 32\]; it must be a matrix",
    ),
    "dora as lora": ("dora", lambda f: retable(f, use_dora=False), r"DoRA, which adapter_config\.json does not say"),
    "ia3 the other side": (
        "ia3",
        lambda f: retable(f, feedforward_modules=[]),
        r"down_proj in .* has shape \[1, 48\]; it must be \[outputs, 1\]",
    ),
    "ia3 of inputs": (
        "ia3",
        lambda f: retable(f, feedforward_modules=["v_proj", "down_proj"]),
        r"ia3_l of .*v_proj in .* has shape \[16, 1\]; it must be \[1, inputs\], as feedforward_modules",
    ),
    "ia3 a width": (
        "ia3",
        swap("v_proj.ia3_l", lambda t: t[:-1]),
        r"v_proj with 15 outputs, and the model's has 32 and 16; is it an",
    ),
    "ia3 an input": (
        "ia3",
        swap("down_proj.ia3_l", lambda t: t[:, :-1]),
        r"down_proj with 47 inputs, and the model's has 48 and 32; is it an",
    ),
    "ia3 a vector": (
        "ia3",
        swap("v_proj.ia3_l", lambda t: t.flatten()),
        r"has shape \[16\]; it must be \[outputs, 1\]",
    ),
    "ia3 as lora": (
        "ia3",
        lambda f: retable(f, peft_type="LORA"),
        r"IA3, which adapter_config\.json does not say \(peft_type\)",
    ),
    "poly skills": (
        "poly",
        lambda f: retable(f, n_skills=5),
        r"poly_lora_A of .* has shape .*; by adapter_config\.json .* must be \[2, 5, inputs / 2, 3\]",
    ),
    "poly splits": ("poly", lambda f: retable(f, n_splits=1), r"it must be \[1, 4, inputs / 1, 3\]"),
    "poly tasks": (
        "poly",
        lambda f: retable(f, n_tasks=9),
        r"poly_router\.module_logits of .* has shape \[3, 8\]; .* must be \[9, 8\]",
    ),
    "poly rank 0": ("poly", swap("poly_lora_A", lambda t: t[..., :0]), r"has shape \[2, 4, 16, 0\]; by"),
    "poly a half": ("poly", swap("poly_lora_B", lambda t: None), "lacks poly_lora_B of .*, of which it has the rest"),
    "poly a width": (
        "poly",
        swap("q_proj.poly_lora_B", lambda t: t[..., :-1]),
        r"q_proj with 32 inputs and 30 outputs, and the model's has 32 and 32",
    ),
    "poly as lora": (
        "poly",
        lambda f: retable(f, peft_type="LORA", r=3),
        r"Poly, which adapter_config\.json does not say",
    ),
    "prompt fewer": (
        "prompt",
        lambda f: retable(f, num_virtual_tokens=6),
        r"has shape \[5, 32\]; it must be a row for each of the 6 virtual",
    ),
    "prompt none": ("prompt", swap("", lambda t: t[:0]), r"has shape \[0, 32\]; it must be a row for each of the 5"),
    "prompt wider": (
        "prompt",
        swap("", lambda t: torch.ones(5, 40)),
        "has 40 numbers for each virtual token, and this model wants 32; is it an",
    ),
    "prompt of a wider": (
        "prompt",
        lambda f: retable(f, token_dim=64),
        "whose token_dim is 64, and this one's is 32; is it an adapter",
    ),
    "prompt beside": (
        "prompt",
        lambda f: retensor(f, lambda t: {**t, "lm_head.weight": torch.ones(61, 32)}),
        "holds lm_head.weight; PROMPT_TUNING of peft has",
    ),
    "prompt as lora": (
        "prompt",
        lambda f: retable(f, peft_type="LORA"),
        r"virtual tokens, which adapter_config\.json does not say",
    ),
    "prefix deeper": (
        "prefix",
        lambda f: retable(f, num_layers=3),
        "whose num_layers is 3, and this one's is 2; is it an adapter of another",
    ),
    "prefix heads": (
        "prefix",
        lambda f: retable(f, num_attention_heads=4),
        "whose num_attention_heads is 4, and this one's is 2",
    ),
    "prefix a width": (
        "prefix",
        swap("", lambda t: t[:, :-1]),
        "has 63 numbers for each virtual token, and this model wants 64",
    ),
    "prefix as prompt": (
        "prefix",
        lambda f: retable(f, peft_type="PROMPT_TUNING", token_dim=None),
        "has 64 numbers for each virtual token, and this",
    ),
    "prefix of an encoder": (
        "prefix",
        lambda f: retable(f, num_transformer_submodules=2),
        "it must be 1: models here have no encoder",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told_in_one_line_and_nothing_changes(places, wrong, tmp_path):
    kind, damage, message = WRONG[wrong]
    make_kind(tmp_path / "a", kind, places["llama"][1])
    damage(tmp_path / "a")
    model = opened(places)
    before, config = logits(model), model.config
    with pytest.raises(CheckpointError, match=message) as error:
        load_peft(tmp_path / "a", model)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    assert torch.equal(logits(model), before)
    assert model.config is config
    assert model.streams is None


def test_stacked_experts_are_plain_lora_alone(places, tmp_path):
    layers = linear_layers(places["olmoe"][1], ["q_proj"])
    lengths = {f"{module}.lora_magnitude_vector": torch.ones(32) for module in layers}
    extra = {**stacked([0, 1]), **lengths}
    make_adapter(
        tmp_path / "a", layers, rank=3, extra=extra, use_dora=True, target_parameters=["gate_up_proj", "down_proj"]
    )
    with pytest.raises(CheckpointError, match=r"experts that are stacked, for which peft has plain LoRA alone"):
        load_peft(tmp_path / "a", opened(places, "olmoe"))
