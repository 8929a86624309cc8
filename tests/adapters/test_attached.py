"""What is put onto a model knows of what kind it is, and a call that fails leaves the model as it was."""

import pytest
import torch

from adapter_models import TOKENS, drawn, linear_layers, logits, make_adapter, make_base
from anabranch.adapters import adapter_of, load_peft, load_pool, merge, read_peft, rows_for, save_peft, unload, unmerge
from anabranch.adapters.fits import check_fits
from anabranch.adapters.names import names_of
from anabranch.adapters.peft_config import LoraTable
from anabranch.errors import CheckpointError, ConfigError, InputError
from anabranch.lm import convert, export_huggingface, load_model, save_model
from anabranch.nn.quantize import quantize


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With a base, and adapters a and b of its q and down, s that brings a head."""
    root = tmp_path_factory.mktemp("attached")
    layers = linear_layers(make_base(root / "base", "llama"), ["q_proj", "down_proj"])
    make_adapter(root / "a", layers, seed="a")
    make_adapter(root / "b", layers, seed="b")
    make_adapter(root / "learns", layers, lora_dropout=0.0)
    head = {"lm_head.weight": drawn("head", (61, 32))}
    make_adapter(root / "s", layers, extra=head, modules_to_save=["lm_head"], lora_dropout=0.0)
    return root


def opened(place):
    return load_model(place / "base")[0].eval()


@pytest.mark.parametrize("call", [unmerge, unload])
def test_nothing_is_taken_out_where_a_matrix_is_stored_in_few_bits(place, call):
    model = merge(load_peft(place / "a", opened(place)))
    quantize(model, "int8", head=None, skip=("feed_forward",))
    before = logits(model)
    for _ in range(2):
        with pytest.raises(ConfigError, match="stored in few bits"):
            call(model)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_stays_on_where_the_head_cannot_be_given_back(place, merged):
    model = load_peft(place / "s", opened(place))
    if merged:
        merge(model)
    quantize(model, "int8", skip=("blocks",))
    before, config = logits(model), model.config
    with pytest.raises(ConfigError, match=r"head\.weight is stored in few bits"):
        unload(model)
    assert torch.equal(logits(model), before)
    assert model.config == config


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_learns_after_a_merge_as_before(place, trainable):
    model = load_peft(place / "learns", opened(place), trainable=trainable)
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert bool(before) == trainable
    unmerge(merge(model))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before


def test_a_pool_of_one_is_a_pool(place, tmp_path):
    model = load_pool({"one": place / "a"}, opened(place))
    for call in (merge, adapter_of, lambda model: save_peft(tmp_path / "x", model)):
        with pytest.raises(
            ConfigError, match=r"a pool of one adapter \(one\), for rows to choose from; load_peft puts it on"
        ):
            call(model)
    assert torch.equal(logits(unload(model)), logits(opened(place)))


def test_rows_do_not_choose_from_an_adapter_that_all_get(place):
    with pytest.raises(ConfigError, match="adapter of load_peft, which all rows get; load_pool lets them choose"):
        rows_for(load_peft(place / "a", opened(place)), [None, "default"], 6)


def test_as_many_tokens_of_other_rows_are_refused(place):
    model = load_pool({"a": place / "a", "b": place / "b"}, opened(place))
    with pytest.raises(InputError, match="chosen for 3 rows of 4 tokens in a pass of 2 rows of 6"), torch.no_grad():
        model(TOKENS, state=rows_for(model, ["a", "b", "a"], 4))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1e39, 3e38])
def test_weights_that_no_row_can_have(place, weight):
    """The last is a number, and not once it is multiplied by the scale of the adapter, 2."""
    model = load_pool({"a": place / "a"}, opened(place))
    with pytest.raises(
        ConfigError, match=r"row 1 has weight \S+ for adapter 'a', whose greatest scale is 2; .* at most 3.4e"
    ):
        rows_for(model, [None, {"a": weight}], 6)
    rows_for(model, [None, {"a": 1.5e38}], 6)


def test_which_modules_are_meant_is_asked_once_for_all(place, monkeypatch):
    """And not for each of them, of which a mixture has thousands."""
    asked, targets = [], LoraTable.targets
    monkeypatch.setattr(
        LoraTable, "targets", lambda table, modules: asked.append(len(modules)) or targets(table, modules)
    )
    adapter = read_peft(place / "a")
    config = opened(place).config
    check_fits(adapter, names_of(config, adapter.pairs), config, place / "a")
    assert len(asked) == 2


def test_biases_that_peft_would_train_are_refused(place, tmp_path):
    layers = linear_layers(make_base(tmp_path / "base", "qwen2"), ["q_proj"])
    bias = {f"model.layers.{n}.self_attn.q_proj.base_layer.bias": drawn(f"bias {n}", (32,)) for n in (0, 1)}
    make_adapter(tmp_path / "a", layers, extra=bias, bias="all")
    model = load_model(tmp_path / "base")[0]
    with pytest.raises(
        ConfigError, match="says bias 'all', and biases of the base do not learn here; train it with 'none'"
    ):
        load_peft(tmp_path / "a", model, trainable=True)
    load_peft(tmp_path / "a", model)  # nothing was put on


@pytest.mark.parametrize("table", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_base_under_an_adapted_head_does_not_learn(tmp_path, family, table):
    """peft writes the head beside an adapter of it: that is the base's, and no whole tensor of the adapter's."""
    base = make_base(tmp_path / "base", family)
    table_VD = base.get("lm_head.weight", base["model.embed_tokens.weight"])
    extra = {"lm_head.base_layer.weight": table_VD.clone()}
    if table:
        extra["lm_head.lora_magnitude_vector"] = table_VD.norm(dim=1)
    make_adapter(tmp_path / "a", {"lm_head": (32, 61)}, extra=extra, lora_dropout=0.0, **table)
    model = load_peft(tmp_path / "a", load_model(tmp_path / "base")[0], trainable=True)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning
    assert all(name.startswith("head.beside.") for name in learning), learning


def test_whole_tensors_learn_with_the_adapter_and_not_after_it(place, tmp_path):
    """As in peft; a part of a fused matrix cannot alone."""
    model = load_peft(place / "s", opened(place), trainable=True)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "head.weight" in learning
    assert all(".beside." in name for name in learning - {"head.weight"})
    model(TOKENS, TOKENS.roll(-1, 1)).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    found = adapter_of(model).saved["lm_head.weight"]
    assert not torch.equal(found, read_peft(place / "s").saved["lm_head.weight"])
    save_peft(tmp_path / "learned", model)
    assert torch.equal(read_peft(tmp_path / "learned").saved["lm_head.weight"], found)
    unload(model)
    assert torch.equal(logits(model), logits(opened(place)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    layers = linear_layers(make_base(tmp_path / "base", "llama"), ["q_proj"])
    part = {f"model.layers.{layer}.mlp.gate_proj.weight": drawn(f"gate {layer}", (48, 32)) for layer in range(2)}
    make_adapter(tmp_path / "part", layers, extra=part, modules_to_save=["gate_proj"])
    with pytest.raises(
        ConfigError, match=r"brings model\.layers\.0\.mlp\.gate_proj\.weight whole, which is a part of a greater tensor"
    ):
        load_peft(tmp_path / "part", opened(place), trainable=True)


def test_whole_tensors_that_did_not_change_are_saved_as_they_were(place, tmp_path):
    """And not as a model of 16 bits holds them."""
    given = read_peft(place / "s").saved["lm_head.weight"]
    model = load_peft(place / "s", load_model(place / "base", dtype=torch.bfloat16)[0])
    save_peft(tmp_path / "same", model)
    assert torch.equal(read_peft(tmp_path / "same").saved["lm_head.weight"], given)
    with torch.no_grad():
        model.head.weight[1, 2] += 1
    save_peft(tmp_path / "other", model)
    assert torch.equal(read_peft(tmp_path / "other").saved["lm_head.weight"], model.head.weight)


def test_dropout_is_of_what_goes_into_the_adapter_while_it_learns(place):
    """A share p is zero, the rest is divided by 1 - p; in evaluation, and where nothing learns, there is none."""
    model = load_peft(place / "a", opened(place), trainable=True)
    layer = model.blocks[0].attention.qkv.beside["q"]
    assert layer.config.dropout == 0.05
    x = torch.ones(2000, 32)
    torch.manual_seed(0)
    dropped = layer.train().dropped(x)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 1 / 0.95])
    assert (dropped == 0).float().mean() == pytest.approx(0.05, abs=0.005)
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x), 2 * dropped @ layer.a.T @ layer.b.T)
    assert torch.equal(layer.eval().dropped(x), x)
    still = load_peft(place / "a", opened(place))
    assert still.blocks[0].attention.qkv.beside["q"].config.dropout == 0


def test_a_merge_that_the_type_of_the_model_cannot_hold_changes_nothing(place, tmp_path):
    layers = linear_layers(make_base(tmp_path / "base", "llama"), ["q_proj", "down_proj"])
    make_adapter(tmp_path / "great", layers, alpha_pattern={"layers.1.self_attn.q_proj": 1e9})
    model = load_model(place / "base", dtype=torch.float16)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_peft(tmp_path / "great", model)
    with pytest.raises(
        ConfigError, match="has numbers that float16 cannot hold; leave it beside, or load the model in float32"
    ):
        merge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unload(model).state_dict().items())


def test_a_mixture_whose_file_lost_the_experts_of_a_layer_is_refused(tmp_path):
    """Where all layers lack them, peft saw them as one tensor; where one does, the file is not whole."""
    layers = linear_layers(make_base(tmp_path / "base", "olmoe"), ["q_proj", "up_proj"])
    held = {name: size for name, size in layers.items() if not ("layers.1." in name and ".experts." in name)}
    make_adapter(tmp_path / "torn", held)
    model = load_model(tmp_path / "base")[0]
    with pytest.raises(CheckpointError, match=r"lacks lora_A and lora_B of model\.layers\.1\.mlp\.experts\.0\.up_proj"):
        load_peft(tmp_path / "torn", model)
    make_adapter(
        tmp_path / "none",
        {name: size for name, size in layers.items() if "q_proj" in name},
        target_modules=["q_proj", "up_proj"],
    )
    load_peft(tmp_path / "none", model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_far_greater_than_the_matrices_leaves_the_base_to_the_bit(place, tmp_path, dtype):
    """Sums of numbers of another size do not hold the lesser ones, so what was there is kept."""
    layers = linear_layers(make_base(tmp_path / "base", "llama"), ["q_proj", "down_proj"])
    make_adapter(tmp_path / "great", layers, lora_alpha=1e9)
    model = load_model(place / "base", dtype=dtype)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_peft(tmp_path / "great", model)
    adapted = logits(model)
    merge(model)
    assert not torch.equal(model.blocks[0].attention.qkv.weight, before["blocks.0.attention.qkv.weight"])
    unmerge(model)
    assert torch.equal(logits(model), adapted)
    merge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unload(model).state_dict().items())


def test_a_merge_that_keeps_nothing_leaves_a_plain_model(place):
    model, other = load_peft(place / "a", opened(place)), load_peft(place / "a", opened(place))
    merge(model, keep=False)
    merge(other)
    assert torch.equal(logits(model), logits(other))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match="no adapter that load_peft put onto it"):
        unmerge(model)
    load_peft(place / "b", model)  # another may come


def test_a_sum_is_made_in_the_wider_type_and_rounded_once(place):
    """W + delta of a model in bfloat16: not of a delta that was rounded before."""
    model = load_model(place / "base", dtype=torch.bfloat16)[0]
    before = model.blocks[1].feed_forward.w2.weight.detach().clone()
    load_peft(place / "a", model)
    pair = model.blocks[1].feed_forward.w2.beside["down"].pair()
    merge(model)
    found = model.blocks[1].feed_forward.w2.weight
    assert torch.equal(found, (before.float() + pair.delta()).bfloat16())
    assert not torch.equal(found, before + pair.delta().bfloat16())


@pytest.mark.parametrize("training", [False, True])
def test_what_is_put_on_trains_or_not_as_the_model_does(place, training):
    model = load_peft(place / "learns", opened(place).train(training), trainable=True)
    assert {module.training for module in model.modules()} == {training}


def test_a_model_with_an_adapter_is_not_written_for_transformers(place, tmp_path):
    """And what to do is said: before, a list of fields that no family has."""
    model = load_peft(place / "a", opened(place))
    save_model(tmp_path / "native", model)
    for call in (
        lambda: convert(tmp_path / "native", tmp_path / "hf", "huggingface"),
        lambda: export_huggingface(tmp_path / "hf", model),
    ):
        with pytest.raises(
            CheckpointError,
            match=r"the model has an adapter beside its matrices .*; merge it into them",
        ):
            call()
    assert not (tmp_path / "hf").exists()
