"""Layers put beside the matrices of a model that is there, and a folder of theirs."""

import json

import pytest
import torch

from adapter_models import CONFIGS, TOKENS
from anabranch.adapters import LowRank, RoutedLowRank
from anabranch.adapters.around import put_around
from anabranch.adapters.attached import check_bare
from anabranch.adapters.catalogue import apply, load_applied
from anabranch.adapters.dora import Dora
from anabranch.adapters.front import Front
from anabranch.adapters.graft import layers_of
from anabranch.adapters.own_folder import read_own, write_own
from anabranch.adapters.put_on import added_names, put_on, take_off
from anabranch.errors import CheckpointError, ConfigError
from anabranch.experts.rexmoe import ReXMoE
from anabranch.lm import Decoder
from anabranch.lm.tensors import build_empty
from anabranch.nn import MoE, SelfAttention

Q = {"*.attention.q": LowRank.Config(rank=2)}
KINDS = {
    "low_rank": {"*.attention.*": LowRank.Config(rank=2)},
    "routed": {"blocks.0.attention.o": RoutedLowRank.Config(ranks=(2, 3)), "blocks.1.*": LowRank.Config(rank=1)},
}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits_BLV


def drawn(model):
    """The model, with numbers in what is zero at first."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("family", ["llama", "olmoe", "deepseek_v2"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_on_is_what_the_config_builds(family, kind):
    base = CONFIGS[family]().build(seed=3).eval()
    before = logits(base)
    model = put_on(base, KINDS[kind], seed=1)
    assert model is base
    assert model.config == CONFIGS[family]().replace(linears=KINDS[kind])
    torch.testing.assert_close(logits(model), before)  # B is zero
    assert model.state_dict().keys() == model.config.build().state_dict().keys()
    assert model.config.count().parameters == sum(parameter.numel() for parameter in model.parameters())
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {name for name in added_names(model) if name in dict(model.named_parameters())}
    assert learns
    assert not torch.equal(logits(drawn(model)), before)
    torch.testing.assert_close(logits(take_off(model)), before)
    assert model.config == CONFIGS[family]()
    assert not added_names(model)


def test_first_numbers_follow_from_seed_and_name():
    def a_of(linears, seed):
        model = put_on(CONFIGS["llama"]().build(), linears, seed=seed)
        return model.blocks[1].attention.qkv.beside["q"].a

    more = {"*.attention.v": LowRank.Config(rank=5), **Q}
    assert torch.equal(a_of(Q, 1), a_of(more, 1))
    assert not torch.equal(a_of(Q, 1), a_of(Q, 2))
    model = put_on(CONFIGS["llama"]().build(), Q)
    assert not torch.equal(*(block.attention.qkv.beside["q"].a for block in model.blocks))


def test_beside_experts_that_blocks_share():
    layer = ReXMoE.Config(num_experts=4, hidden_dim=8, reuse=2)
    config = Decoder.Config(vocab_size=61, dim=32, num_layers=4, feed_forward=layer, max_positions=64)
    model = config.build().eval()
    before = logits(model)
    model = put_on(model, {"shared.*.down": LowRank.Config(rank=2)})
    assert not torch.equal(logits(drawn(model)), before)
    torch.testing.assert_close(logits(take_off(model)), before)


@pytest.mark.parametrize(
    ("linears", "told"),
    [
        ({}, "nothing to put on"),
        ({"*.attention.z": LowRank.Config()}, "fits no linear layer"),
        ({"*.attention.q": "dense"}, "takes the place of a matrix"),
    ],
)
def test_what_cannot_be_put_on(linears, told):
    from anabranch.nn import Dense

    model = CONFIGS["llama"]().build()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    given = {pattern: Dense.Config() if kind == "dense" else kind for pattern, kind in linears.items()}
    with pytest.raises(ConfigError, match=told):
        put_on(model, given)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    put_on(model, Q)
    with pytest.raises(ConfigError, match="already"):
        put_on(model, Q)
    take_off(model)
    with pytest.raises(ConfigError, match="no layers"):
        take_off(model)


# Folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_same_outputs(tmp_path, kind):
    model = drawn(put_on(CONFIGS["olmoe"]().build(seed=3).eval(), KINDS[kind]))
    write_own(tmp_path / "a", model, base="somewhere")
    other = read_own(tmp_path / "a", CONFIGS["olmoe"]().build(seed=3).eval())
    assert torch.equal(logits(other), logits(model))
    assert not any(parameter.requires_grad for parameter in other.parameters())
    write_own(tmp_path / "a", model)  # in its place
    other = read_own(tmp_path / "a", CONFIGS["olmoe"]().build(seed=3), trainable=True)
    assert any(parameter.requires_grad for parameter in other.parameters())
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert size < 4 * sum(parameter.numel() for parameter in model.parameters())


def test_folders_that_do_not_fit(tmp_path):
    from safetensors.torch import load_file, save_file

    model = drawn(put_on(CONFIGS["llama"]().build(), Q))
    folder = tmp_path / "a"
    write_own(folder, model)
    table, numbers = json.loads((folder / "adapter.json").read_text()), load_file(folder / "adapter.safetensors")
    name = next(iter(numbers))
    changes = {
        "lacks": lambda: save_file(
            {key: value for key, value in numbers.items() if key != name}, folder / "adapter.safetensors"
        ),
        "for which the model has no layer": lambda: save_file(
            numbers | {"blocks.9.x": numbers[name].clone()}, folder / "adapter.safetensors"
        ),
        "has shape": lambda: save_file(numbers | {name: numbers[name][:1]}, folder / "adapter.safetensors"),
        "NaN or infinity": lambda: save_file(
            numbers | {name: numbers[name] * torch.nan}, folder / "adapter.safetensors"
        ),
        "no numbers": (folder / "adapter.safetensors").unlink,
        "this version reads": lambda: (folder / "adapter.json").write_text(json.dumps(table | {"schema": 2})),
        "whose dim is": lambda: (folder / "adapter.json").write_text(json.dumps(table | {"dim": 64})),
        "does not describe": lambda: (folder / "adapter.json").write_text(
            json.dumps(table | {"linears": {"*": {"kind": "x"}}})
        ),
        "no adapter of anabranch's": (folder / "adapter.json").unlink,
    }
    for told, change in changes.items():
        change()
        base = CONFIGS["llama"]().build()
        with pytest.raises(CheckpointError, match=told):
            read_own(folder, base)
        assert not base.config.linears
        assert all(parameter.requires_grad for parameter in base.parameters())
        if told not in ("no numbers", "no adapter of anabranch's"):
            write_own(tmp_path / "b", model)
            for path in (tmp_path / "b").iterdir():
                path.replace(folder / path.name)
        elif told == "no numbers":
            save_file(numbers, folder / "adapter.safetensors")


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    from anabranch.errors import DataError

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(DataError):
        write_own(tmp_path / "mine", put_on(CONFIGS["llama"]().build(), Q))
    with pytest.raises(ConfigError, match="no adapter"):
        write_own(tmp_path / "new", CONFIGS["llama"]().build())


def test_moe_layers_that_cannot_have_any():
    """Experts in memory of another form are refused before anything is changed."""
    config = Decoder.Config(
        vocab_size=61,
        dim=32,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=MoE.Config(num_experts=2, hidden_dim=8),
    )
    model = config.build()
    model.blocks[0].feed_forward.experts.exchange = object()
    with pytest.raises(ConfigError, match="nothing can stand beside"):
        put_on(model, {"*.down": LowRank.Config()})
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_begin_from_the_matrices_that_are_there():
    """DoRA's lengths are those of the trained matrices, in experts too, so that the model computes what it did."""
    model = CONFIGS["olmoe"]().build(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    before = logits(model)
    put_on(model, {"*.attention.q": Dora.Config(rank=2), "*.up": Dora.Config(rank=2)}, seed=5)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_another_base_of_the_same_sizes_is_told_by_its_numbers(tmp_path):
    """Whatever type it is read in; folders of before, which do not say, are taken as they are."""
    write_own(tmp_path / "a", put_on(CONFIGS["llama"]().build(seed=3), Q), base="somewhere")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        read_own(tmp_path / "a", CONFIGS["llama"]().build(seed=3).to(dtype))
        other = CONFIGS["llama"]().build(seed=4).to(dtype)
        with pytest.raises(CheckpointError, match="trained on another base, somewhere, with other numbers"):
            read_own(tmp_path / "a", other)
        assert not other.config.linears
    # The embedding alone would not tell one that was trained on.
    with torch.no_grad():
        near = CONFIGS["llama"]().build(seed=3)
        near.norm.weight[0] += 0.5
    with pytest.raises(CheckpointError, match="another base"):
        read_own(tmp_path / "a", near)
    table = json.loads((tmp_path / "a" / "adapter.json").read_text())
    for value in ("x", [], {"names": 3}):
        (tmp_path / "a" / "adapter.json").write_text(json.dumps({**table, "base_digest": value}))
        with pytest.raises(CheckpointError, match=r"no digest of a base|another base"):
            read_own(tmp_path / "a", CONFIGS["llama"]().build(seed=3))
    del table["base_digest"]
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(table))
    read_own(tmp_path / "a", near)


def test_onto_a_frame_whose_numbers_are_elsewhere(tmp_path):
    """A frame has the sizes of the base alone; who the base is, is asked of the base."""
    base, other = (CONFIGS["llama"]().build(seed=seed).eval() for seed in (3, 4))
    write_own(tmp_path / "a", drawn(put_on(CONFIGS["llama"]().build(seed=3).eval(), KINDS["low_rank"])))

    def frame():
        made = build_empty(CONFIGS["llama"]())
        made.embedding.weight = torch.nn.Parameter(base.embedding.weight.detach(), requires_grad=False)
        return made

    found = read_own(tmp_path / "a", frame(), base=base)
    wanted = read_own(tmp_path / "a", base)
    for (name, layer), own in zip(layers_of(found).items(), layers_of(wanted).values(), strict=True):
        assert torch.equal(layer.a, own.a), name
        assert torch.equal(layer.b, own.b), name
    with pytest.raises(CheckpointError, match="was trained on another base"):
        read_own(tmp_path / "a", frame(), base=other)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        read_own(tmp_path / "a", other)
    # Where there is nothing to compare with, nothing is compared.
    read_own(tmp_path / "a", frame(), is_base_known=False)


def test_what_is_no_model_of_ours_is_told():
    other = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for put in (
        lambda: put_around(other, front=Front.Config(num_tokens=1)),
        lambda: apply(other, "lora"),
        lambda: check_bare(other),
        lambda: load_applied("none", other),
    ):
        with pytest.raises(ConfigError, match="the model is a Sequential, and this is put onto a Decoder"):
            put()
