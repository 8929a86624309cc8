"""Layers beside matrices: how few patterns say which, and that a model gets them and gives them back."""

import pytest
import torch

from adapter_models import CONFIGS, logits
from anabranch.adapters import LowRank
from anabranch.adapters.graft import check_pools, graft, layers_of, patterns_of, strip, with_layers
from anabranch.errors import ConfigError
from anabranch.nn.quantize import quantize

A, B = LowRank.Config(rank=2), LowRank.Config(rank=3)
PARTS = [f"blocks.{layer}.{name}" for layer in range(3) for name in ("attention.q", "feed_forward.down")]
EXPERTS = [f"blocks.{layer}.experts.{expert}.up" for layer in range(2) for expert in range(3)]


def every(name, config=A, parts=PARTS):
    return {part: config for part in parts if part.endswith(name)}


@pytest.mark.parametrize(
    ("configs", "parts", "wanted"),
    [
        (every(".q"), PARTS, {"blocks.*.attention.q": A}),
        (every(".q") | every(".down", B), PARTS, {"blocks.*.attention.q": A, "blocks.*.feed_forward.down": B}),
        # One layer lacks, or is another: each is named.
        (dict.fromkeys(PARTS[:3:2], A), PARTS, dict.fromkeys(PARTS[:3:2], A)),
        (every(".q") | {PARTS[0]: B}, PARTS, {PARTS[0]: B, PARTS[2]: A, PARTS[4]: A}),
        (every(".up", A, EXPERTS), EXPERTS, {"blocks.*.experts.*.up": A}),
        # All experts of one layer.
        (every(".up", A, EXPERTS[:3]), EXPERTS, {"blocks.0.experts.*.up": A}),
        ({"head": A}, [*PARTS, "head"], {"head": A}),
        ({}, PARTS, {}),
    ],
)
def test_as_few_patterns_as_say_the_same(configs, parts, wanted):
    assert patterns_of(configs, parts) == wanted


def test_a_pattern_that_fits_more_is_not_used():
    """* spans dots: a name of the same beginning and end would be taken too."""
    parts = ["blocks.0.q", "blocks.1.q", "blocks.0.inner.q"]
    configs = {"blocks.0.q": A, "blocks.1.q": A}
    assert patterns_of(configs, parts) == configs


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_a_model_gets_layers_and_gives_them_back(family):
    model = CONFIGS[family]().build(seed=0).eval()
    before, config = logits(model), model.config
    parts = ["blocks.0.attention.q", "blocks.1.attention.o"]
    parts += ["blocks.1.feed_forward.experts.2.up"] if family == "olmoe" else ["blocks.1.feed_forward.down"]
    made = with_layers(config, dict.fromkeys(parts, A), parts)
    assert all(parameter.is_meta for parameter in made.parameters())
    put = []

    def fill(part, layer):
        put.append(part)
        layer.a, layer.b = (torch.nn.Parameter(torch.full(half.shape, 0.3)) for half in (layer.a, layer.b))

    graft(model, made, fill)
    assert sorted(put) == sorted(parts)
    assert layers_of(model).keys() == set(parts)
    assert model.config == made.config
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not torch.equal(logits(model), before)
    strip(model)
    assert layers_of(model) == {}
    assert model.config == config
    assert torch.equal(logits(model), before)


def test_pools_that_nothing_can_stand_beside_are_told():
    model = CONFIGS["olmoe"]().replace(dim=64).build()
    part = "blocks.0.feed_forward.experts.1.down"
    made = with_layers(model.config, {part: A}, [part])
    check_pools(model, made)
    for block in model.blocks:
        block.feed_forward.experts.exchange = lambda *_: None
    with pytest.raises(
        ConfigError,
        match=r"experts of blocks\.0\.feed_forward\.experts are a ExpertPool, which nothing can stand beside",
    ):
        check_pools(model, made)
    config = model.config.replace(feed_forward=model.config.feed_forward.replace(hidden_dim=64))
    packed = config.build()
    assert quantize(packed, "int8", head=None)
    with pytest.raises(
        ConfigError, match=r"are a QuantizedPool, which nothing can stand beside; load the model with all its experts"
    ):
        check_pools(packed, with_layers(config, {part: A}, [part]))
    attention = "blocks.0.attention.q"
    check_pools(packed, with_layers(config, {attention: A}, [attention]))
