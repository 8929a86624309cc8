"""Which layer of ours one of transformers' is, and how few patterns say which layers have an adapter."""

import pytest
import torch

from adapter_models import CONFIGS, linear_layers, make_adapter, make_base
from anabranch.adapters import LowRank, load_peft, load_pool, merge, names
from anabranch.adapters.graft import patterns_of
from anabranch.errors import CheckpointError
from anabranch.heads import put_heads, take_off_heads
from anabranch.lm.tensors import Change
from anabranch.serving.engine.adapter_reader import AdapterReader

LAST = {
    "q_proj": "attention.q",
    "k_proj": "attention.k",
    "v_proj": "attention.v",
    "o_proj": "attention.o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_linear_layer_has_its_place(family, tmp_path):
    base = make_base(tmp_path / "base", family)
    found = names.names_of(CONFIGS[family](), ())
    assert found.family == family
    every = {name.removesuffix(".weight") for name, tensor in base.items() if tensor.dim() == 2}
    routers = {name for name in every if name.endswith(".mlp.gate")}
    assert found.places.keys() == every - routers - {"model.embed_tokens"}
    for module, (inputs, outputs) in linear_layers(base, LAST).items():
        place, words = found.places[module], module.split(".")
        assert (place.in_dim, place.out_dim) == (inputs, outputs)
        assert place.part.startswith(f"blocks.{words[2]}.")
        assert place.part.endswith(f".{LAST[words[-1]]}")
        if "experts" in words:
            assert f".experts.{words[-2]}." in place.part
    # In memory experts are stacked.
    stacks = {name for name in found.tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert found.tensors.keys() - stacks == base.keys()
    assert bool(stacks) == any(".experts." in name for name in base)


@torch.no_grad()
def test_a_model_with_routed_heads_is_refused_with_a_way_out_that_works(tmp_path):
    """Its adapter is merged before heads are put on; the model as it was stays as it was."""
    model = CONFIGS["llama"]().build(seed=0).eval()
    dim = model.config.dim
    sizes = {f"model.layers.{layer}.self_attn.q_proj": (dim, dim) for layer in range(model.config.num_layers)}
    make_adapter(tmp_path / "a", sizes)
    routed, token_BL = put_heads(model, 1), torch.arange(8)[None]
    plain = routed(token_BL).logits_BLV
    for refused in (
        lambda: load_peft(tmp_path / "a", routed),
        lambda: load_pool({"a": tmp_path / "a"}, routed),
        lambda: AdapterReader(routed.config).look(str(tmp_path / "a")),
    ):
        with pytest.raises(
            CheckpointError, match=r"the model has routed heads, .* merge it .* before put_heads, or take"
        ):
            refused()
    assert torch.equal(routed(token_BL).logits_BLV, plain)
    merged = merge(load_peft(tmp_path / "a", take_off_heads(routed)), keep=False)
    expected = merged(token_BL).logits_BLV
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(put_heads(merged, 1)(token_BL).logits_BLV, expected)


def test_a_family_is_found_by_the_names_of_an_adapter(monkeypatch):
    """Of two families that can be the model, the one that has the adapter's layers."""
    config = CONFIGS["llama"]()
    assert names.names_of(config, ["model.layers.0.self_attn.q_proj"]).family == "llama"
    assert names.names_of(config, ["of.nobody"]).family == "llama"
    tried = []
    real = names.choose

    def choose(model, family):
        tried.append(family)
        return real(model, "llama" if family == "mistral" else family)

    monkeypatch.setattr(names, "choose", choose)
    monkeypatch.setattr(names, "FAMILIES", ["qwen3", "mistral", "llama"])
    assert names.names_of(config, ["model.layers.0.self_attn.q_proj"]).family == "mistral"
    assert tried == ["qwen3", "mistral"]


@pytest.mark.parametrize(
    ("change", "is_of_rows"),
    [
        (lambda x: x.flip(0), True),
        (lambda x: torch.cat([x[1:], x[:1]]), True),
        (lambda x: x.flip(-1), False),
        (lambda x: x.T, False),
        (lambda x: 2 * x, False),
        (lambda x: x[:-1], False),
        (lambda x: x.cumsum(-1), False),
    ],
)
def test_only_another_order_of_rows_is_followed(change, is_of_rows):
    assert names._is_of_rows(Change(change, change), 5, 4) is is_of_rows


ONE, OTHER = LowRank.Config(rank=1), LowRank.Config(rank=2)


@pytest.mark.parametrize(
    ("configs", "parts", "wanted"),
    [
        ({"b.0.q": ONE, "b.1.q": ONE}, ["b.0.q", "b.1.q", "b.0.k"], {"b.*.q": ONE}),
        ({"b.0.q": ONE, "b.1.q": OTHER}, ["b.0.q", "b.1.q"], {"b.0.q": ONE, "b.1.q": OTHER}),
        ({"b.0.q": ONE}, ["b.0.q", "b.1.q"], {"b.0.q": ONE}),
        ({"head": ONE}, ["head", "b.1.q"], {"head": ONE}),
        # All experts of one layer.
        (
            {"b.0.e.0.up": ONE, "b.0.e.1.up": ONE},
            [f"b.{n}.e.{e}.up" for n in (0, 1) for e in (0, 1)],
            {"b.0.e.*.up": ONE},
        ),
        # A pattern that would fit others too is not used.
        ({"b.0.up": ONE, "b.1.up": ONE}, ["b.0.up", "b.1.up", "b.0.e.2.up"], {"b.0.up": ONE, "b.1.up": ONE}),
    ],
)
def test_patterns(configs, parts, wanted):
    assert patterns_of(configs, parts) == wanted
