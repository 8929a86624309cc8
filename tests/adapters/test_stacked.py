"""Adapters of experts that transformers has stacked in one parameter: against the formula, in both layouts, and damaged ones."""

import pytest
import torch
from safetensors.torch import load_file

from adapter_models import CONFIGS, TOKENS, linear_layers, logits, make_adapter, make_base, stacked, with_deltas
from anabranch.adapters import (
    Adapter,
    combine,
    load_peft,
    load_pool,
    merge,
    read_peft,
    rows_for,
    save_peft,
    unload,
    unmerge,
)
from anabranch.adapters.fits import check_fits
from anabranch.adapters.names import Names
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import load_model

RANK, EXPERTS, HIDDEN = 3, 4, 16
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stacked") / "base"
    return folder, make_base(folder, "olmoe")


def write(folder, base, extra=None, **table):
    layers = linear_layers(base[1], ["q_proj"])
    extra = stacked([0, 1]) if extra is None else extra
    table = {"rank": RANK, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": TARGETS, **table}
    return make_adapter(folder, layers, extra=extra, **table)


def one_by_one(made):
    """{module: (A, B)} of single experts, by the numbers of rows and columns."""
    found = {}
    for layer in (0, 1):
        place = f"base_model.model.model.layers.{layer}.mlp.experts"
        for expert in range(EXPERTS):
            for name, parts in ((f"{place}.base_layer", ("gate_proj", "up_proj")), (place, ("down_proj",))):
                a, b = (made[f"{name}.lora_{half}.weight"] for half in "AB")
                a, b = a[expert * RANK : (expert + 1) * RANK], b[:, [k * EXPERTS + expert for k in range(RANK)]]
                for number, part in enumerate(parts):
                    rows = b if len(parts) == 1 else b[number * HIDDEN : (number + 1) * HIDDEN]
                    found[f"model.layers.{layer}.mlp.experts.{expert}.{part}"] = a, rows
    return found


def expected(tmp_path, base, made):
    single = one_by_one(made)
    for module, (a, b) in single.items():
        made = {**made, f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    scales = dict.fromkeys([*single, *linear_layers(base[1], ["q_proj"])], 2.0)
    return logits(load_model(with_deltas(tmp_path / "merged", *base, made, scales))[0])


def test_logits_are_those_of_the_formula_on_merged_and_off(base, tmp_path):
    made = write(tmp_path / "a", base)
    wanted, model = expected(tmp_path, base, made), load_model(base[0])[0]
    plain = logits(model)
    load_peft(tmp_path / "a", model)
    assert len(model.config.linears) == 4
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge(model)), wanted, rtol=1e-5, atol=1e-5)
    save_peft(tmp_path / "copy", model)
    torch.testing.assert_close(logits(unmerge(model)), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(unload(model)), plain, rtol=1e-5, atol=1e-5)
    copy = load_file(tmp_path / "copy" / "adapter_model.safetensors")
    assert copy.keys() == made.keys()
    assert all(torch.equal(copy[name], made[name]) for name in made)


def test_the_older_layout_stands_for_the_transposed_matrix(base, tmp_path):
    made = write(tmp_path / "new", base)
    old = {}
    for name, tensor in stacked([0, 1]).items():
        half = name[-len("A.weight")]
        other = stacked([0, 1])[name.replace(f"lora_{half}", f"lora_{'AB'[half == 'A']}")]
        if half == "A":
            old[name] = other.unflatten(1, (RANK, EXPERTS)).permute(2, 1, 0).flatten(0, 1)
        else:
            old[name] = other.unflatten(0, (EXPERTS, RANK)).permute(2, 1, 0).flatten(1, 2)
        assert old[name].shape != tensor.shape or "down" not in name
    write(tmp_path / "old", base, old)
    wanted = expected(tmp_path, base, made)
    found = logits(load_peft(tmp_path / "old", load_model(base[0])[0]))
    # Gate and up have as many rows as the model is wide here, so that their two layouts look alike: the newer one is meant.
    assert not torch.allclose(found, wanted, atol=1e-3)
    mixed = {name: old[name] if ".base_layer." not in name else tensor for name, tensor in stacked([0, 1]).items()}
    write(tmp_path / "mixed", base, mixed)
    torch.testing.assert_close(
        logits(load_peft(tmp_path / "mixed", load_model(base[0])[0])), wanted, rtol=1e-5, atol=1e-5
    )


def test_one_parameter_alone(base, tmp_path):
    down = {name: tensor for name, tensor in stacked([0, 1]).items() if ".base_layer." not in name}
    write(tmp_path / "down", base, down, target_parameters=["experts.down_proj"])
    inner = {
        name.replace(".base_layer", ""): tensor for name, tensor in stacked([0, 1]).items() if ".base_layer." in name
    }
    write(tmp_path / "up", base, inner, target_parameters=["gate_up_proj"])
    assert {name.rpartition(".")[2] for name in read_peft(tmp_path / "up").stacks} == {"gate_up_proj"}
    model = load_model(base[0])[0]
    load_peft(tmp_path / "up", model)
    save_peft(tmp_path / "copy", model)
    copy, made = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("copy", "up"))
    assert copy.keys() == made.keys()
    first = logits(model)
    unload(model)
    assert not torch.allclose(first, logits(load_peft(tmp_path / "down", model)))


def test_in_a_pool_beside_others(base, tmp_path):
    write(tmp_path / "a", base)
    make_adapter(tmp_path / "b", linear_layers(base[1], ["v_proj"]))
    model = load_pool({name: tmp_path / name for name in "ab"}, load_model(base[0])[0])
    with torch.no_grad():
        found = model(TOKENS, state=rows_for(model, ["a", "b"], TOKENS.shape[1])).logits_BLV
    for number, name in enumerate("ab"):
        wanted = logits(load_peft(tmp_path / name, load_model(base[0])[0]))[number]
        torch.testing.assert_close(found[number], wanted, rtol=1e-5, atol=1e-5)


def change(make):
    return lambda: make(stacked([0, 1]))


def wider(made):
    return {
        name: torch.ones(tensor.shape[0], 24) if name.endswith("1.mlp.experts.lora_A.weight") else tensor
        for name, tensor in made.items()
    }


def ragged(made):
    return {
        name: torch.ones(13, 16) if name.endswith("1.mlp.experts.lora_A.weight") else tensor
        for name, tensor in made.items()
    }


WRONG = {
    "another width": (
        lambda: wider(stacked([0, 1])),
        {},
        r"\[experts, inputs, outputs\] \[4, 24, 32\], and the model's is \[4, 16, 32\]",
    ),
    "more experts": (lambda: stacked([0, 1], experts=8), {}, r"\[8, 32, 32\], and the model's is \[4, 32, 32\]"),
    "a deeper model": (
        lambda: stacked([0, 1, 2]),
        {},
        r"adapts model\.layers\.2\.mlp\.experts\.\w+, and the model has no such experts",
    ),
    "a layer missing": (
        lambda: stacked([0]),
        {},
        "lacks lora_A and lora_B of gate_up_proj in layer 1, which target_parameters names",
    ),
    "ranks": (lambda: ragged(stacked([0, 1])), {}, "rank 13, and lora_B 12; they must have one"),
    "no share for each": (
        lambda: stacked([0, 1]),
        {"r": 5},
        "has 12 rows, and adapter_config.json says 5 for each expert|has rank 3",
    ),
    "one not named": (
        lambda: stacked([0, 1]),
        {"target_parameters": ["down_proj"]},
        "holds 2 pairs for .*experts, of .* names down_proj",
    ),
    "none named": (
        lambda: stacked([0, 1]),
        {"target_parameters": None},
        "holds 2 pairs for .*experts, of .* names none",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_told_in_one_line(base, tmp_path, wrong):
    extra, table, message = WRONG[wrong]
    write(tmp_path / "a", base, extra(), **table)
    model = load_model(base[0])[0]
    before = logits(model)
    with pytest.raises(CheckpointError, match=message) as error:
        load_peft(tmp_path / "a", model)
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model), before)


def test_an_expert_is_not_adapted_twice_nor_where_nothing_can_stand(base, tmp_path):
    one = "model.layers.0.mlp.experts.1.up_proj"
    layers = {**linear_layers(base[1], ["q_proj"]), one: (32, 16)}
    table = {"target_modules": ["q_proj", one], "target_parameters": TARGETS}
    make_adapter(tmp_path / "a", layers, rank=RANK, extra=stacked([0, 1]), **table)
    with pytest.raises(CheckpointError, match=f"adapts {one} alone and in a stack of all experts"):
        load_peft(tmp_path / "a", load_model(base[0])[0])
    stacks = read_peft(tmp_path / "a").stacks
    nowhere = Names("llama", {}, {}, ())
    with pytest.raises(
        CheckpointError,
        match=r"adapts blocks\.0\.\S+, .* and 21 more \(\S+experts\S+, .* in its file\), beside which nothing can",
    ):
        check_fits(Adapter({"peft_type": "LORA"}, {}, {}, stacks), nowhere, CONFIGS["olmoe"](), tmp_path)


def test_what_is_not_done_with_stacks(base, tmp_path):
    write(tmp_path / "a", base)
    with pytest.raises(ConfigError, match="experts that are stacked, which cannot be combined yet"):
        combine([read_peft(tmp_path / "a")], [1.0])
    with pytest.raises(ConfigError, match="such an adapter cannot learn here"):
        load_peft(tmp_path / "a", load_model(base[0])[0], trainable=True)
    make_base(tmp_path / "dense", "llama")
    make_adapter(
        tmp_path / "b",
        {f"model.layers.{n}.self_attn.q_proj": (32, 32) for n in (0, 1)},
        rank=RANK,
        extra=stacked([0, 1]),
        target_parameters=TARGETS,
    )
    with pytest.raises(CheckpointError, match="and the model has no such experts; is it another model's adapter"):
        load_peft(tmp_path / "b", load_model(tmp_path / "dense")[0])


def test_parameters_of_one_layer_alone_may_be_named(base, tmp_path):
    """As peft writes it for target_parameters that name a layer; another that is named must be there."""
    extra = {
        name.replace(".base_layer", ""): tensor for name, tensor in stacked([1]).items() if ".base_layer" not in name
    }
    write(tmp_path / "a", base, extra, target_parameters=["layers.1.mlp.experts.down_proj"])
    model = load_model(base[0])[0]
    before = logits(model)
    load_peft(tmp_path / "a", model)
    assert not torch.equal(logits(model), before)
    both = [f"layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)]
    write(tmp_path / "b", base, extra, target_parameters=both)
    with pytest.raises(
        CheckpointError, match="lacks lora_A and lora_B of down_proj in layer 0, which target_parameters names"
    ):
        load_peft(tmp_path / "b", load_model(base[0])[0])


@pytest.mark.parametrize("rank", [5, 24])
def test_ranks_that_no_expert_has_a_share_of_are_told(base, tmp_path, rank):
    """Of an adapter that has stacks alone, so that no other layer's rank is told first."""
    make_adapter(
        tmp_path / "a", {}, rank=RANK, extra=stacked([0, 1]), target_modules=None, target_parameters=TARGETS, r=rank
    )
    message = rf"lora_A of .*experts\.\w+ in .* has 12 rows, and adapter_config\.json says {rank} for each expert"
    with pytest.raises(CheckpointError, match=message):
        read_peft(tmp_path / "a")


def test_pairs_of_experts_are_in_memory_as_matrices_are(base, tmp_path):
    """Both layouts are cut out of greater tensors."""
    write(tmp_path / "a", base)
    for name, stack in read_peft(tmp_path / "a").stacks.items():
        sizes = (HIDDEN, 32) if "down" in name else (32, 2 * HIDDEN)
        for pair in stack.pairs(*sizes):
            assert pair.a_RC.is_contiguous()
            assert pair.b_OR.is_contiguous()
