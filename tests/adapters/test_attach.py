"""Adapters on models: what is computed is W + scale B A by the formula; taken off, merged, saved; and adapters of other models."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from adapter_models import (
    ATTENTION,
    CONFIGS,
    LATENT,
    MLP,
    TOKENS,
    drawn,
    linear_layers,
    logits,
    make_adapter,
    make_base,
    with_deltas,
)
from anabranch.adapters import LowRank, adapter_of, load_peft, merge, read_peft, save_peft, unload, unmerge
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import Decoder, convert, load_model, save_model
from anabranch.nn.quantize import quantize

EVERY = (*ATTENTION, *LATENT, *MLP)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(folder, tensors) of a base of each family."""
    root = tmp_path_factory.mktemp("bases")
    return {family: (root / family, make_base(root / family, family)) for family in CONFIGS}


def open_base(bases, family):
    return load_model(bases[family][0])[0].eval()


def on_base(bases, family, tmp_path, words=EVERY, **options):
    """(adapted model, folder of the adapter, its tensors)."""
    _folder, base = bases[family]
    made = make_adapter(tmp_path / "adapter", linear_layers(base, words), **options)
    model = open_base(bases, family)
    assert load_peft(tmp_path / "adapter", model) is model
    return model, tmp_path / "adapter", made


def expected(bases, family, tmp_path, made, scales, whole=None):
    folder, base = bases[family]
    return logits(load_model(with_deltas(tmp_path / "merged", folder, base, made, scales, whole))[0])


def close(found, wanted, limit=1e-5):
    torch.testing.assert_close(found, wanted, rtol=limit, atol=limit * float(wanted.abs().max()))


def scales_of(layers, scale):
    return dict.fromkeys(layers, scale)


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_formula(bases, family, tmp_path):
    layers = linear_layers(bases[family][1], EVERY)
    model, _, made = on_base(bases, family, tmp_path)
    wanted = expected(bases, family, tmp_path, made, scales_of(layers, 2.0))
    close(logits(model), wanted)
    assert (wanted - logits(open_base(bases, family))).abs().max() > 0.1
    # One pattern says it of all layers, and of all experts.
    assert len(model.config.linears) == len({name.rpartition(".")[2] for name in layers}) + (
        3 if family == "deepseek_v2" else 0
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", CONFIGS)
def test_merged_and_unmerged(bases, family, tmp_path):
    model, _, _ = on_base(bases, family, tmp_path)
    plain, before = logits(open_base(bases, family)), logits(model)
    weights = {name: tensor.clone() for name, tensor in open_base(bases, family).state_dict().items()}
    merge(model)
    close(logits(model), before)
    assert model.config == open_base(bases, family).config
    assert model.state_dict().keys() == weights.keys()
    unmerge(model)
    close(logits(model), before)
    unload(model)
    close(logits(model), plain)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", CONFIGS)
def test_taken_off_nothing_is_left(bases, family, tmp_path):
    extra = {"lm_head.weight": drawn("other head", (61, 32)), "model.norm.weight": drawn("other norm", (32,))}
    model, _, _ = on_base(bases, family, tmp_path, extra=extra, modules_to_save=["lm_head", "norm"])
    assert not torch.equal(logits(model), logits(open_base(bases, family)))
    unload(model)
    assert torch.equal(logits(model), logits(open_base(bases, family)))
    assert model.config == open_base(bases, family).config
    assert all(parameter.requires_grad for parameter in model.parameters())
    load_peft(tmp_path / "adapter", model)  # and again


def test_some_layers_with_other_ranks_and_alphas(bases, tmp_path):
    layers = linear_layers(bases["llama"][1], ["q_proj", "down_proj"])
    layers = {name: size for name, size in layers.items() if name != "model.layers.0.mlp.down_proj"}
    other = "model.layers.1.self_attn.q_proj"
    model, _, made = on_base(
        bases,
        "llama",
        tmp_path,
        ("q_proj",),
        ranks={other: 8},
        rank_pattern={other: 8},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
        use_rslora=True,
    )
    scales = {"model.layers.0.self_attn.q_proj": 8 / 2, other: 3 / 8**0.5}
    close(logits(model), expected(bases, "llama", tmp_path, made, scales))
    assert set(model.config.linears) == {"blocks.0.attention.q", "blocks.1.attention.q"}
    made = make_adapter(tmp_path / "few", layers, target_modules=list(layers))
    model = load_peft(tmp_path / "few", open_base(bases, "llama"))
    (tmp_path / "m").mkdir()
    close(logits(model), expected(bases, "llama", tmp_path / "m", made, scales_of(layers, 2.0)))
    made = make_adapter(tmp_path / "one", {other: layers[other]}, target_modules=["q_proj"], layers_to_transform=[1])
    load_peft(tmp_path / "one", open_base(bases, "llama"))


def test_layers_that_target_parameters_names_by_their_weight(bases, tmp_path):
    """With ranks and alphas by the parameter, as peft has them; what is saved again names them as layers."""
    downs = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    layers = dict.fromkeys(downs, (48, 32))
    words = {"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]}
    # The pattern without the parameter's word fits none.
    patterns = {
        "rank_pattern": {"0.mlp.down_proj.weight": 2, "down_proj": 3},
        "alpha_pattern": {"1.mlp.down_proj.weight": 5, "down_proj": 7},
    }
    made = make_adapter(tmp_path / "adapter", layers, ranks={downs[0]: 2}, **words, **patterns)
    model = load_peft(tmp_path / "adapter", open_base(bases, "llama"))
    close(logits(model), expected(bases, "llama", tmp_path, made, dict(zip(downs, (8 / 2, 5 / 4), strict=True))))
    save_peft(tmp_path / "again", model)
    close(logits(load_peft(tmp_path / "again", open_base(bases, "llama"))), logits(model))
    make_adapter(tmp_path / "one", {downs[0]: (48, 32)}, **words)
    with pytest.raises(CheckpointError, match=rf"lacks lora_A and lora_B of {downs[1]}, which target_parameters in"):
        load_peft(tmp_path / "one", open_base(bases, "llama"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_router_that_peft_took_as_a_parameter_is_told(tmp_path, family):
    """As peft writes it for target_modules that name gate, or for all-linear."""
    base = make_base(tmp_path / "base", family)
    gates = {f"model.layers.{layer}.mlp.gate": (32, 4) for layer in (0, 1)}
    words = {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}
    make_adapter(tmp_path / "adapter", linear_layers(base, ["q_proj"]) | gates, **words)
    with pytest.raises(
        CheckpointError, match=r"adapts model\.layers\.0\.mlp\.gate, .*, which chooses experts, and LoRA"
    ):
        load_peft(tmp_path / "adapter", load_model(tmp_path / "base")[0])


@pytest.mark.parametrize("word", ["gate", "mlp"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_mixtures_that_an_adapter_brings_whole_as_peft_saves_them(tmp_path, family, word):
    """By the names that transformers 5 has in memory: its files call the part of Mixtral's otherwise, and hold experts one by one."""
    tensors = make_base(tmp_path / "base", family)
    bases = {family: (tmp_path / "base", tensors)}
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    brought, whole = {}, {}
    for layer in (0, 1):
        theirs = f"model.layers.{layer}"
        parts = {name: value for name, value in tensors.items() if name.startswith(f"{theirs}.{block}.")}
        parts = {
            name: drawn(f"other {name}", value.shape)
            for name, value in parts.items()
            if word == "mlp" or ".gate." in name
        }
        whole |= parts
        brought[f"{theirs}.mlp.gate.weight"] = parts[f"{theirs}.{block}.gate.weight"]
        if word == "mlp":
            each = [f"{theirs}.{block}.experts.{expert}" for expert in range(4)]
            pairs = [torch.cat([parts[f"{name}.{half}.weight"] for half in (gate, up)]) for name in each]
            brought[f"{theirs}.mlp.experts.gate_up_proj"] = torch.stack(pairs)
            brought[f"{theirs}.mlp.experts.down_proj"] = torch.stack([parts[f"{name}.{down}.weight"] for name in each])
    layers = linear_layers(tensors, ["q_proj"])
    made = make_adapter(tmp_path / "adapter", layers, extra=brought, modules_to_save=[word])
    model = load_peft(tmp_path / "adapter", open_base(bases, family))
    close(logits(model), expected(bases, family, tmp_path, made, scales_of(layers, 2.0), whole))
    save_peft(tmp_path / "again", model)
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == made.keys()
    close(logits(load_peft(tmp_path / "again", open_base(bases, family))), logits(model))
    merge(model)
    unload(model)
    assert torch.equal(logits(model), logits(open_base(bases, family)))
    # One that lacks is told by a name that a file may have.
    lacking = {name: value for name, value in brought.items() if name != "model.layers.1.mlp.gate.weight"}
    make_adapter(tmp_path / "lacks", layers, extra=lacking, modules_to_save=[word])
    with pytest.raises(
        CheckpointError, match=r"lacks model\.layers\.1\.mlp\.gate\.weight, which modules_to_save names"
    ):
        load_peft(tmp_path / "lacks", open_base(bases, family))


def test_one_tensor_by_two_names_is_told(tmp_path):
    """What was there could not be given back."""
    tensors = make_base(tmp_path / "base", "mixtral")
    layers = linear_layers(tensors, ["q_proj"])
    gates = {
        f"model.layers.{layer}.{block}.gate.weight": torch.ones(4, 32)
        for layer in (0, 1)
        for block in ("mlp", "block_sparse_moe")
    }
    make_adapter(tmp_path / "gates", layers, extra=gates, modules_to_save=["gate"])
    with pytest.raises(
        CheckpointError, match=r"0\.block_sparse_moe\.gate\.weight and .*0\.mlp\.gate\.weight, which are one"
    ):
        load_peft(tmp_path / "gates", load_model(tmp_path / "base")[0])
    both = {
        "model.layers.0.mlp.experts.down_proj": torch.ones(4, 32, 16),
        "model.layers.0.block_sparse_moe.experts.1.w2.weight": torch.ones(32, 16),
    }
    make_adapter(tmp_path / "both", layers, extra=both, modules_to_save=["experts"])
    with pytest.raises(
        CheckpointError, match=r"experts\.1\.w2\.weight and .*experts\.down_proj, of which that is a part"
    ):
        load_peft(tmp_path / "both", load_model(tmp_path / "base")[0])


def test_single_experts(bases, tmp_path):
    base = bases["olmoe"][1]
    layers = {
        name: size
        for name, size in linear_layers(base, MLP).items()
        if ".experts.2." in name or name.endswith("1.mlp.experts.0.up_proj")
    }
    made = make_adapter(tmp_path / "adapter", layers, target_modules=list(layers))
    model = load_peft(tmp_path / "adapter", open_base(bases, "olmoe"))
    close(logits(model), expected(bases, "olmoe", tmp_path, made, scales_of(layers, 2.0)))


def test_experts_that_peft_saw_as_one_tensor_may_lack(bases, tmp_path):
    """target_modules of a mixture's feed-forward, by a transformers whose experts are stacked: attention alone is in the file."""
    on_base(bases, "olmoe", tmp_path, ATTENTION, target_modules=[*ATTENTION, *MLP])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_head_of_its_own(bases, family, tmp_path):
    """lm_head is brought whole, adapted, or both it and the embedding are brought: a tied model gets two matrices."""
    head, table = drawn("other head", (61, 32)), drawn("other table", (61, 32))
    base = bases[family][1]
    tied = {} if "lm_head.weight" in base else {"lm_head.weight": base["model.embed_tokens.weight"]}
    for number, (extra, whole) in enumerate(
        [
            ({"lm_head.weight": head}, {"lm_head.weight": head}),
            ({"model.embed_tokens.weight": table}, {**tied, "model.embed_tokens.weight": table}),
        ]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        model, _, made = on_base(
            bases, family, place, ["q_proj"], extra=extra, modules_to_save=[name.split(".")[-2] for name in extra]
        )
        layers = linear_layers(base, ["q_proj"])
        close(logits(model), expected(bases, family, place, made, scales_of(layers, 2.0), whole))
    full = {**base, **tied}
    made = make_adapter(tmp_path / "h", {"lm_head": (32, 61)})
    model = load_peft(tmp_path / "h", open_base(bases, family))
    wanted = load_model(
        with_deltas(
            tmp_path / "merged",
            bases[family][0],
            full,
            made,
            {"lm_head": 2.0},
            tied,
        )
    )[0]
    close(logits(model), logits(wanted))


def test_biases(bases, tmp_path):
    bias = {f"model.layers.{layer}.self_attn.q_proj.base_layer.bias": drawn(f"bias {layer}", (32,)) for layer in (0, 1)}
    model, folder, made = on_base(bases, "qwen2", tmp_path, ["q_proj"], extra=bias, bias="all")
    layers = linear_layers(bases["qwen2"][1], ["q_proj"])
    whole = {name.replace(".base_layer", ""): tensor for name, tensor in bias.items()}
    (tmp_path / "m").mkdir()
    folder_, base = bases["qwen2"]
    merged = with_deltas(tmp_path / "m" / "x", folder_, base, made, scales_of(layers, 2.0), whole)
    close(logits(model), logits(load_model(merged)[0]))
    save_peft(tmp_path / "copy", model)
    assert (
        load_file(tmp_path / "copy" / "adapter_model.safetensors").keys()
        == load_file(folder / "adapter_model.safetensors").keys()
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_saved_again_it_is_the_same(bases, family, tmp_path):
    model, folder, made = on_base(bases, family, tmp_path, from_the_future=[{"a": None}])
    save_peft(tmp_path / "copy", model)
    merge(model)
    save_peft(tmp_path / "merged-copy", model)
    for copy_ in (tmp_path / "copy", tmp_path / "merged-copy"):
        found = load_file(copy_ / "adapter_model.safetensors")
        assert found.keys() == made.keys()
        assert all(torch.equal(found[name], made[name]) for name in made)
        assert json.loads((copy_ / "adapter_config.json").read_text()) == json.loads(
            (folder / "adapter_config.json").read_text()
        )


def test_numbers_that_learned_are_saved(bases, tmp_path):
    _folder, base = bases["llama"]
    make_adapter(tmp_path / "adapter", linear_layers(base, ["q_proj", "up_proj"]), lora_dropout=0.0)
    model = load_peft(tmp_path / "adapter", open_base(bases, "llama"), trainable=True)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learning) == 8
    assert all(".beside." in name for name in learning)
    model(TOKENS, TOKENS.roll(-1, 1)).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    save_peft(tmp_path / "learned", model)
    again = load_peft(tmp_path / "learned", open_base(bases, "llama"))
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(
        adapter_of(again).pairs["model.layers.0.self_attn.q_proj"].a_RC,
        read_peft(tmp_path / "adapter").pairs["model.layers.0.self_attn.q_proj"].a_RC,
    )


def test_a_model_built_with_adapters_is_saved_for_peft(bases, tmp_path):
    linears = {
        "blocks.*.attention.q": LowRank.Config(rank=2, alpha=6.0),
        "blocks.1.feed_forward.down": LowRank.Config(rank=3),
    }
    model = CONFIGS["llama"]().replace(linears=linears).build()
    plain = CONFIGS["llama"]().build()
    for name, parameter in model.named_parameters():
        if name.endswith((".a", ".b")):
            parameter.data.copy_(drawn(name, parameter.shape))
    plain.load_state_dict(
        {name.replace(".matrix", ""): value for name, value in model.state_dict().items() if ".beside." not in name}
    )
    save_peft(tmp_path / "a", model)
    back = read_peft(tmp_path / "a")
    assert set(back.pairs) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    }
    close(logits(load_peft(tmp_path / "a", plain)), logits(model), 1e-6)


def test_an_adapted_model_is_saved_copied_and_converted_when_merged(bases, tmp_path):
    model, _, _ = on_base(bases, "llama", tmp_path)
    before = logits(model)
    save_model(tmp_path / "native", model)
    assert torch.equal(logits(load_model(tmp_path / "native")[0]), before)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), before)
    save_model(tmp_path / "merged-model", merge(other))
    convert(tmp_path / "merged-model", tmp_path / "hf", "huggingface")
    close(logits(load_model(tmp_path / "hf")[0]), before)
    close(logits(model), before)


def test_half_precision_keeps_the_adapter_in_float32(bases, tmp_path):
    folder, base = bases["llama"]
    make_adapter(tmp_path / "adapter", linear_layers(base, ["q_proj"]))
    model = load_peft(tmp_path / "adapter", load_model(folder, dtype=torch.bfloat16)[0])
    assert model.blocks[0].attention.qkv.beside["q"].a.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    assert (
        logits(model).float() - logits(load_peft(tmp_path / "adapter", open_base(bases, "llama")))
    ).abs().max() < 0.3


def test_on_a_quantised_model(bases, tmp_path):
    _folder, base = bases["llama"]
    layers = linear_layers(base, ["q_proj", "down_proj"])
    make_adapter(tmp_path / "adapter", layers)
    plain, model = open_base(bases, "llama"), open_base(bases, "llama")
    assert quantize(model, "int8", head=None)
    quantised = logits(model)
    load_peft(tmp_path / "adapter", model)
    load_peft(tmp_path / "adapter", plain)
    assert (logits(model) - logits(plain)).abs().max() < 0.2 * (logits(plain) - quantised).abs().max()
    with pytest.raises(ConfigError, match=r"blocks\.\d\..* is stored in few bits, .* dequantise the model first"):
        merge(model)
    assert logits(unload(model)).equal(quantised)


def test_a_quantised_head_that_cannot_be_exchanged_leaves_the_model_alone(bases, tmp_path):
    """Of a tied model, whose head is a matrix of its own once it is rounded."""
    layers = linear_layers(bases["qwen2"][1], ["q_proj"])
    extra = {"lm_head.weight": drawn("other head", (61, 32))}
    make_adapter(tmp_path / "adapter", layers, extra=extra, modules_to_save=["lm_head"])
    model = open_base(bases, "qwen2")
    quantize(model, "int8")
    before, config = logits(model), model.config
    assert model.head is not None
    with pytest.raises(ConfigError, match=r"head\.weight is stored in few bits"):
        load_peft(tmp_path / "adapter", model)
    assert torch.equal(logits(model), before)
    assert model.config is config
    make_adapter(tmp_path / "other", layers)
    load_peft(tmp_path / "other", model)  # nothing was put on


def small(base, tmp_path, **options):
    return make_adapter(tmp_path / "adapter", linear_layers(base, ["q_proj"]), **options)


Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
WRONG = {
    "deeper": (
        {Q0: (32, 32), Q1: (32, 32), "model.layers.2.self_attn.q_proj": (32, 32)},
        {},
        "adapts model.layers.2.self_attn.q_proj, for which the model, a llama,",
    ),
    "wider": (
        {Q0: (32, 32), Q1: (48, 32)},
        {},
        r"with 48 inputs and 32 outputs, and the model's has 32 and 32; is it an adapter of another",
    ),
    "another kind": (
        {"transformer.h.0.attn.c_attn": (32, 96)},
        {},
        "adapts transformer.h.0.attn.c_attn, for which the model",
    ),
    "a norm": ({"model.norm": (32, 32)}, {}, "adapts model.norm, for which the model"),
    "a layer missing": ({Q0: (32, 32)}, {}, f"lacks lora_A and lora_B of {Q1}, which target_modules in .* names"),
    "one missing by a pattern": ({Q0: (32, 32)}, {"target_modules": ".*q_proj"}, f"lacks lora_A and lora_B of {Q1}"),
    "one too many": (
        {Q0: (32, 32), Q1: (32, 32)},
        {"target_modules": ["k_proj"]},
        f"holds numbers for {Q0}, {Q1}, which neither target_modules",
    ),
    "unknown target": (
        {Q0: (32, 32), Q1: (32, 32)},
        {"target_modules": ["qproj"]},
        "nor target_parameters in .* names",
    ),
    "an unknown tensor": (
        {Q0: (32, 32), Q1: (32, 32)},
        {"extra": {"score.weight": torch.ones(2, 32)}},
        "brings score.weight, for which the model",
    ),
    "more words": (
        {Q0: (32, 32), Q1: (32, 32)},
        {"extra": {"lm_head.weight": torch.ones(62, 32)}},
        r"\[62, 32\], and the model's is \[61, 32\]; is its vocab",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_adapter_of_another_model_is_told_in_one_line_and_nothing_changes(bases, wrong, tmp_path):
    layers, options, message = WRONG[wrong]
    make_adapter(tmp_path / "adapter", layers, **options)
    model = open_base(bases, "llama")
    before, config = logits(model), model.config
    with pytest.raises(CheckpointError, match=message) as error:
        load_peft(tmp_path / "adapter", model)
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model), before)
    assert model.config is config
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_one_adapter_at_a_time(bases, tmp_path):
    model, folder, _ = on_base(bases, "llama", tmp_path, ["q_proj"])
    with pytest.raises(ConfigError, match="the model has an adapter already; unload it first"):
        load_peft(folder, model)
    merge(model)
    with pytest.raises(ConfigError, match="merged already"):
        merge(model)
    unmerge(model)
    with pytest.raises(ConfigError, match="not merged"):
        unmerge(model)
    unload(model)
    for what in (unload, merge, unmerge, adapter_of):
        with pytest.raises(ConfigError, match="no adapter that load_peft put onto it"):
            what(model)
    with pytest.raises(ConfigError, match="no adapter to save"):
        save_peft(tmp_path / "x", model)
    with pytest.raises(ConfigError, match=r"linears of the model has '\*\.q' already"):
        load_peft(folder, CONFIGS["llama"]().replace(linears={"*.q": LowRank.Config()}).build())


def test_a_model_that_no_family_has(bases, tmp_path):
    small(bases["llama"][1], tmp_path)
    odd = Decoder.Config(vocab_size=61, dim=32, num_layers=2, norm_offset=0.5).build()
    with pytest.raises(
        CheckpointError, match="name the layers of a Hugging Face model, and this model is none: no Hugging Face family"
    ):
        load_peft(tmp_path / "adapter", odd)
    with pytest.raises(ConfigError, match="family is 'lama'"):
        load_peft(tmp_path / "adapter", open_base(bases, "llama"), family="lama")
