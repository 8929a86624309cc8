"""What is put around a model that has an adapter: taking the adapter off, merging it, and what fails leaves all as it was."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_models import drawn, linear_layers, logits, make_adapter, make_base
from anabranch.adapters import LowRank, load_peft, merge, unload, unmerge
from anabranch.adapters.around import put_around, take_around
from anabranch.adapters.catalogue import apply, load_applied
from anabranch.adapters.catalogue.applied import WEIGHTS
from anabranch.adapters.front import Front
from anabranch.adapters.graft import layers_of
from anabranch.adapters.ladder import Ladder
from anabranch.adapters.own_folder import read_own, write_own
from anabranch.adapters.put_on import put_on, take_off
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import Decoder, load_model
from anabranch.nn.quantize import quantize
from anabranch.routing.fixed import is_fixed

AROUND = [{"front": Front.Config(num_tokens=2)}, {"ladder": Ladder.Config(reduction=2)}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, an adapter beside its matrices, and one that brings biases of its blocks whole."""
    root = tmp_path_factory.mktemp("around")
    base = make_base(root / "base", "qwen2")
    make_adapter(root / "plain", linear_layers(base, ["q_proj"]))
    bias = {
        f"model.layers.{number}.self_attn.q_proj.base_layer.bias": drawn(f"bias {number}", (32,)) for number in (0, 1)
    }
    make_adapter(root / "whole", linear_layers(base, ["q_proj"]), extra=bias, bias="all")
    return root


@pytest.mark.parametrize("adapter", ["plain", "whole"])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("steps", [(), (merge,), (merge, unmerge)])
def test_unloading_gives_the_base_back_whatever_was_done_meanwhile(folder, adapter, around, steps):
    model = load_model(folder / "base")[0].eval()
    before = logits(model)
    put_around(load_peft(folder / adapter, model), **around)
    for step in steps:
        step(model)
    assert torch.equal(logits(unload(model)), before)


@pytest.mark.parametrize("around", AROUND)
def test_merged_beneath_what_is_around_it_computes_the_same(folder, around):
    model = put_around(load_peft(folder / "whole", load_model(folder / "base")[0].eval()), **around)
    beside = logits(model)
    torch.testing.assert_close(logits(merge(model)), beside, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(unmerge(model)), beside)


@pytest.mark.parametrize("around", AROUND)
def test_unloading_that_is_refused_takes_nothing_off(folder, around):
    model = merge(load_peft(folder / "plain", load_model(folder / "base")[0].eval()))
    put_around(model, **around)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    assert quantize(model, "int8", head=None)
    config, streams, before = model.config, model.streams, logits(model)
    with pytest.raises(ConfigError, match="is stored in few bits"):
        unload(model)
    assert (model.config, model.streams) == (config, streams)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("around", AROUND)
def test_what_is_around_learns_on_once_the_adapter_is_in_the_matrices(folder, around):
    model = load_model(folder / "base")[0]
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    put_around(load_peft(folder / "plain", model), **around)
    new = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert new
    merge(model, keep=False)
    assert all(parameter.requires_grad for parameter in new)
    assert learned
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("around", AROUND)
def test_what_cannot_be_put_around_leaves_the_base_free(around, monkeypatch):
    model = Decoder.Config(num_layers=2, dim=32).build(seed=0)
    config = model.config

    def fails(*args, **options):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(Front, "put", fails)
    monkeypatch.setattr(Ladder, "__init__", fails)
    with pytest.raises(RuntimeError, match="no memory left"):
        put_around(model, **around)
    assert not any(map(is_fixed, model.modules()))
    assert model.config == config


@pytest.mark.parametrize("way", ["merge", "remove"])
def test_a_method_is_taken_off_beneath_a_ladder(way):
    model = Decoder.Config(num_layers=2, dim=32).build(seed=0).eval()
    bare = copy.deepcopy(model)
    applied = apply(model, "lora", rank=2)
    for layer in layers_of(model).values():
        torch.nn.init.normal_(layer.b, generator=torch.Generator().manual_seed(0))
    token_BL = torch.tensor([[3, 1, 4, 1, 5]])
    beside = model(token_BL).logits_BLV
    put_around(model, ladder=Ladder.Config(reduction=2))
    held = applied.state()
    assert {name.rpartition(".")[2] for name in held} == {"a", "b"}
    getattr(applied, way)()
    wanted = beside if way == "merge" else bare(token_BL).logits_BLV
    torch.testing.assert_close(take_around(model)(token_BL).logits_BLV, wanted, rtol=1e-5, atol=1e-5)
    assert not layers_of(model)


@pytest.mark.parametrize("id", ["lst", "unipelt"])
def test_single_numbers_that_were_written_without_an_axis_are_read(tmp_path, id):
    config = Decoder.Config(num_layers=2, dim=32)
    applied = apply(config.build(seed=0), id)
    singles = [name for name, value in applied.state().items() if value.numel() == 1]
    applied.save(tmp_path / "new")
    with pytest.raises(CheckpointError, match="load_applied reads in Python"):
        load_peft(tmp_path / "new", config.build(seed=0))
    held = load_file(tmp_path / "new" / WEIGHTS)
    assert singles
    save_file(
        {name: value.reshape(()) if name in singles else value for name, value in held.items()},
        tmp_path / "new" / WEIGHTS,
    )
    read = load_applied(tmp_path / "new", config.build(seed=0))
    assert all(torch.equal(value, held[name]) for name, value in read.state().items())


@pytest.mark.parametrize("order", [(take_off, take_around), (take_around, take_off)])
def test_layers_and_a_ladder_are_written_read_and_taken_off_in_any_order(tmp_path, order):
    base = Decoder.Config(num_layers=2, dim=32).build(seed=0).eval()
    model = put_on(copy.deepcopy(base), {"*.attention.q": LowRank.Config(rank=2)})
    put_around(model, ladder=Ladder.Config(reduction=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    token_BL = torch.tensor([[3, 1, 4, 1, 5]])
    both = model.eval()(token_BL).logits_BLV
    write_own(tmp_path / "both", model, base="base")
    read = read_own(tmp_path / "both", copy.deepcopy(base)).eval()
    assert torch.equal(read(token_BL).logits_BLV, both)
    for take in order:
        take(read)
    assert read.config == base.config
    assert torch.equal(read(token_BL).logits_BLV, base(token_BL).logits_BLV)
