"""Tensors of the base that peft writes beside an adapter of the head: no numbers of the adapter's, and held against those of the model."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapter_models import TOKENS, drawn, linear_layers, logits, make_adapter, make_base
from anabranch.adapters import (
    combine,
    copies,
    export_mixture,
    load_mixture,
    load_peft,
    load_pool,
    merge,
    read_peft,
    rows_for,
    save_peft,
    unload,
    unmerge,
    write_peft,
)
from anabranch.adapters.copies import same_numbers
from anabranch.adapters.glider import GateMethod
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import load_model
from anabranch.nn.packed import Packed
from anabranch.nn.quantize import quantize
from anabranch.nn.superblocks import arranged

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
STORED = "lm_head.base_layer.weight"
OTHER = drawn("another head", (61, 32))


def make(root, family, names=(STORED,), *, other=None, dtype=None):
    """A base, and adapters a and b of its head and queries with copies under ``names``; plain a and b have none."""
    base = make_base(root / "base", family)
    table_VD = base.get(HEAD, base[EMBEDDING])
    layers = {**linear_layers(base, ["q_proj"]), "lm_head": (32, 61)}
    for seed in "ab":
        held = {name: (table_VD if other is None else other).clone() for name in names}
        if EMBEDDING in held and other is None:
            held[EMBEDDING] = base[EMBEDDING].clone()
        held = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in held.items()}
        make_adapter(root / seed, layers, seed=seed, extra=held)
        make_adapter(root / f"plain {seed}", layers, seed=seed)
    return root


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def place(request, tmp_path_factory):
    """Where the head is a matrix of its own, and where it is the embedding."""
    return make(tmp_path_factory.mktemp("copies"), request.param)


def opened(place):
    return load_model(place / "base")[0].eval()


def alone(place, name):
    return logits(load_peft(place / name, opened(place)))


def test_a_copy_is_no_number_of_the_adapter(place, tmp_path):
    found, plain = read_peft(place / "a"), read_peft(place / "plain a")
    assert found.saved == {}
    assert found.copies.keys() == {HEAD}
    assert found.num_parameters == plain.num_parameters
    write_peft(tmp_path / "copy", found)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "copy", place / "a"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_put_on_it_is_the_adapter_without_it(place, tmp_path):
    model = load_peft(place / "a", opened(place))
    expected = alone(place, "plain a")
    assert torch.equal(logits(model), expected)
    save_peft(tmp_path / "again", model)
    assert torch.equal(logits(load_peft(tmp_path / "again", opened(place))), expected)
    torch.testing.assert_close(logits(merge(model)), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(unmerge(model)), expected)
    assert torch.equal(logits(unload(model)), logits(opened(place)))
    assert model.config.tie_embeddings == opened(place).config.tie_embeddings


@pytest.mark.parametrize("names", [(HEAD,), (STORED, EMBEDDING), (HEAD, EMBEDDING)])
def test_other_ways_in_which_peft_writes_them(place, tmp_path, names):
    make(tmp_path, "qwen2" if opened(place).config.tie_embeddings else "llama", names)
    assert read_peft(tmp_path / "a").saved == {}
    assert torch.equal(alone(tmp_path, "a"), alone(tmp_path, "plain a"))


def test_head_and_embedding_beside_an_adapter_of_neither_part_nothing(tmp_path):
    """As peft's save_pretrained does where it is told to save them."""
    base = make_base(tmp_path / "base", "qwen2")
    copies = {name: base[EMBEDDING].clone() for name in (HEAD, EMBEDDING)}
    layers = linear_layers(base, ["q_proj"])
    make_adapter(tmp_path / "a", layers, extra=copies)
    make_adapter(tmp_path / "plain a", layers)
    model = load_peft(tmp_path / "a", opened(tmp_path))
    assert model.head is None
    assert torch.equal(logits(model), alone(tmp_path, "plain a"))
    assert torch.equal(logits(unload(model)), logits(opened(tmp_path)))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_others_than_the_model_has_are_put_on_as_peft_does(tmp_path, family):
    """Where head and embedding are one matrix it is filled; nothing of it learns, and all of it can be taken off."""
    make(tmp_path, family, other=OTHER)
    changed = load_file(tmp_path / "base" / "model.safetensors")
    changed[HEAD if family == "llama" else EMBEDDING] = OTHER.clone()
    (tmp_path / "changed").mkdir()
    save_file(changed, tmp_path / "changed" / "model.safetensors")
    (tmp_path / "changed" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    expected = logits(load_peft(tmp_path / "plain a", load_model(tmp_path / "changed")[0]))
    model = load_peft(tmp_path / "a", opened(tmp_path), trainable=True)
    assert torch.equal(logits(model), expected)
    assert all(".beside." in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    save_peft(tmp_path / "again", model)
    assert torch.equal(alone(tmp_path, "again"), expected)
    assert torch.equal(logits(unload(model)), logits(opened(tmp_path)))


def test_sums_keep_the_copy_that_all_hold(place, tmp_path):
    made = combine([read_peft(place / seed) for seed in "ab"], [0.5, -0.25]).adapter
    plain = combine([read_peft(place / f"plain {seed}") for seed in "ab"], [0.5, -0.25]).adapter
    assert torch.equal(made.copies[HEAD], read_peft(place / "a").copies[HEAD])
    write_peft(tmp_path / "sum", made)
    write_peft(tmp_path / "plain", plain)
    assert f"base_model.model.{STORED}" in load_file(tmp_path / "sum" / "adapter_model.safetensors")
    found, wanted = (logits(load_peft(tmp_path / name, opened(place))) for name in ("sum", "plain"))
    assert torch.equal(found, wanted)
    mixed = combine([read_peft(place / "plain a"), read_peft(place / "b")], [1, 1]).adapter
    assert mixed.copies.keys() == {HEAD}


def test_copies_of_two_bases_have_no_sum(tmp_path):
    make(tmp_path / "one", "llama")
    make(tmp_path / "two", "llama", other=OTHER)
    with pytest.raises(ConfigError, match=r"adapter 2 holds other numbers for lm_head\.weight than one before it"):
        combine([read_peft(tmp_path / "one" / "a"), read_peft(tmp_path / "two" / "b")], [1, 1])


def test_rows_choose_adapters_of_the_head(place):
    model = load_pool({seed: place / seed for seed in "ab"}, opened(place)).eval()
    with torch.no_grad():
        found = model(TOKENS, state=rows_for(model, ["b", "a"], TOKENS.shape[1])).logits_BLV
    expected = torch.stack([alone(place, "b")[0], alone(place, "a")[1]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(unload(model)), logits(opened(place)))


def test_rows_do_not_choose_another_head(tmp_path):
    make(tmp_path, "llama", other=OTHER)
    model = opened(tmp_path)
    with pytest.raises(
        ConfigError, match=r"adapter 'a' brings lm_head\.weight whole, with other numbers than the model's, which all"
    ):
        load_pool({"a": tmp_path / "a"}, model)
    assert torch.equal(logits(model), logits(opened(tmp_path)))


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("head", ["int8", "int4", None])
def test_a_quantised_head_is_that_of_its_copy(place, bits, head):
    """As near as its bits tell."""

    def rounded():
        model = opened(place)
        quantize(model, bits, head=head)
        return model

    model = load_peft(place / "a", rounded())
    assert torch.equal(logits(model), logits(load_peft(place / "plain a", rounded())))
    assert torch.equal(logits(unload(model)), logits(rounded()))


def test_a_great_head_is_looked_at_in_pieces(place, monkeypatch):
    """A panel of 16 rows at a time here, of which the last has 13."""
    monkeypatch.setattr(copies, "_AT_ONCE", 1)
    model = opened(place)
    quantize(model, "int8")
    load_peft(place / "a", model)
    made = list(copies._pieces(model.head.matrix.packed))
    assert [(first, part.rows) for first, part in made] == [(0, 16), (16, 16), (32, 16), (48, 13)]
    whole = model.head.matrix.packed.unpack()[0]
    assert torch.equal(torch.cat([part.unpack()[0] for _, part in made]), whole)


def test_kinds_of_gguf_are_held_against_a_share_of_the_norm():
    """Whatever made the file chose their steps, so a head that was tuned a little is taken for the base's."""
    generator = torch.Generator().manual_seed(0)
    # Two numbers a byte.
    number_NSX = torch.randint(0, 256, (16, 1, 128), generator=generator, dtype=torch.uint8)
    scales, leasts = (torch.randint(1, 64, (16, 1, 8), generator=generator, dtype=torch.uint8) for _ in range(2))
    wholes = torch.full((16, 1, 2), 0.01, dtype=torch.float16)
    blocks = arranged([number_NSX.view(torch.int32), scales, leasts, wholes])
    packed = Packed(blocks.unsqueeze(0), 16, 256, "q4_k", 256)
    own_NK = packed.unpack()[0]
    assert own_NK.norm() > 10
    assert copies._is_near(packed, own_NK * 1.1)
    assert not copies._is_near(packed, own_NK * 1.2)
    assert not copies._is_near(packed, own_NK.flip(0))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_another_head_is_not_put_where_bits_are_few(tmp_path, family, symmetric):
    near = load_file(make(tmp_path, family, other=OTHER) / "base" / "model.safetensors")
    near = near.get(HEAD, near[EMBEDDING])
    # One number, by a tenth of itself, which is 13 steps of its row.
    greatest = int(near[57].abs().argmax())
    near[57, greatest] *= 1.1
    for name, other in (("a", OTHER), ("near", near)):
        make_adapter(tmp_path / name, {"lm_head": (32, 61)}, extra={STORED: other.clone()})
        model = opened(tmp_path)
        quantize(model, "int8", head="int8" if name == "near" else "int4", symmetric=symmetric)
        before = logits(model)
        with pytest.raises(ConfigError, match=r"holds other numbers for lm_head\.weight than the model, which stores"):
            load_peft(tmp_path / name, model)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_that_round_are_not_taken_for_other_numbers(tmp_path, dtype):
    make(tmp_path, "llama", dtype=dtype)
    for model in (opened(tmp_path), load_model(tmp_path / "base", dtype=torch.bfloat16)[0]):
        if dtype == torch.float16 and model.embedding.weight.dtype == torch.bfloat16:
            continue
        load_pool({"a": tmp_path / "a"}, model)
    whole = torch.tensor([1.001, 2.002, 3.003])
    assert same_numbers(whole, whole.to(dtype))
    assert same_numbers(whole.to(dtype), whole)
    assert not same_numbers(whole, whole + 1e-6)
    assert not same_numbers(whole, whole[:2])
    assert not same_numbers(whole.to(dtype), whole + 0.1)


def test_a_copy_of_another_size_is_another_model_s(tmp_path):
    make(tmp_path, "llama", other=torch.ones(62, 32))
    for put_on in (load_peft, lambda folder, model: load_pool({"a": folder}, model)):
        with pytest.raises(CheckpointError, match=r"brings lm_head\.weight of shape \[62, 32\], and the model's is"):
            put_on(tmp_path / "a", opened(tmp_path))


def test_what_is_exported_needs_no_copy(place, tmp_path):
    made = export_mixture(tmp_path / "out", opened(place), {place / "a": 0.5, place / "b": 0.5})
    assert made.difference < 1e-4
    assert made.made.adapter.copies == read_peft(tmp_path / "out").copies == {}


def test_experts_of_a_mixture_may_have_them(place, tmp_path):
    folders = {seed: place / seed for seed in "ab"}
    load_mixture(folders, opened(place))
    foreign = nn.Module()
    foreign.lm_head = nn.Linear(32, 61, bias=False)
    for seed in "ab":
        make_adapter(tmp_path / seed, {"lm_head": (32, 61)}, extra={STORED: foreign.lm_head.weight.detach().clone()})
    load_mixture({seed: tmp_path / seed for seed in "ab"}, foreign)
    other = nn.Module()
    other.lm_head = nn.Linear(32, 61, bias=False)
    with pytest.raises(ConfigError, match=r"a brings lm_head\.weight whole, with other numbers than the model's"):
        load_mixture({seed: tmp_path / seed for seed in "ab"}, other)


def test_gates_are_trained_of_an_adapter_of_the_head(place):
    model = GateMethod.Config(adapter=str(place / "a")).build().begin(opened(place), ["all"], seed=0)
    assert "head.beside.head.gate" in {name for name, parameter in model.named_parameters() if parameter.requires_grad}
