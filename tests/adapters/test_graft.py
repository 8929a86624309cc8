"""Layers beside matrices: how few patterns say which, and that a model gets them and gives them back."""

import copy

import pytest
import torch

from adapter_models import CONFIGS, logits
from anabranch.adapters import LowRank
from anabranch.adapters.dora import Dora
from anabranch.adapters.graft import check_pools, graft, layers_of, patterns_of, strip, with_layers
from anabranch.adapters.put_on import put_on
from anabranch.errors import ConfigError
from anabranch.lm import save_model
from anabranch.nn.quantize import QuantizedPool, dequantize, quantize
from anabranch.serving.expertflow import offload

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


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_layers_beside_experts_in_few_bits_add_what_they_add_beside_their_numbers(bits, tmp_path):
    config = CONFIGS["olmoe"]()
    layer = config.feed_forward
    # All experts of each item, so that rounded activations change no choice.
    select = layer.router.select.replace(top_k=layer.num_experts)
    layer = layer.replace(hidden_dim=64, router=layer.router.replace(select=select))
    config = config.replace(dim=64, feed_forward=layer)
    few = config.build(seed=0).eval()
    quantize(few, bits, head=None)
    numbers = copy.deepcopy(few)
    dequantize(numbers)
    bare = logits(few)
    parts = [
        "blocks.0.feed_forward.experts.1.up",
        "blocks.0.feed_forward.experts.1.down",
        "blocks.1.feed_forward.experts.2.gate",
    ]
    for model in (few, numbers):
        generator = torch.Generator().manual_seed(1)

        def fill(part, layer, generator=generator):
            layer.a, layer.b = (
                torch.nn.Parameter(0.3 * torch.randn(half.shape, generator=generator)) for half in (layer.a, layer.b)
            )

        graft(model, with_layers(config, dict.fromkeys(parts, A), parts), fill)
    assert layers_of(few).keys() == layers_of(numbers).keys() == set(parts)
    found, wanted = logits(few), logits(numbers)
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert (found - bare).norm() > 0.1 * bare.norm()
    # Gradients go through the numbers, whose inputs are not rounded there.
    tokens, changes = torch.arange(12)[None], []
    for model in (few, numbers):
        model.requires_grad_(False)
        for layer in layers_of(model).values():
            layer.requires_grad_(True)
        model(tokens, tokens).loss.backward()
        changes.append(
            torch.cat([one.grad.flatten() for layer in layers_of(model).values() for one in (layer.a, layer.b)])
        )
    assert (changes[0] - changes[1]).norm() < 0.05 * changes[1].norm()
    with pytest.raises(ConfigError, match="in few bits and have layers beside them, which are saved as an adapter"):
        save_model(tmp_path / "m", few, None)
    strip(few)
    assert torch.equal(logits(few), bare)
    assert all(pool.is_plain for pool in few.modules() if isinstance(pool, QuantizedPool))


def test_lengths_of_experts_in_few_bits_are_those_of_their_numbers():
    config = CONFIGS["olmoe"]()
    model = config.replace(dim=64, feed_forward=config.feed_forward.replace(hidden_dim=64)).build(seed=1).eval()
    quantize(model, "int8", head=None)
    before = logits(model)
    put_on(model, {"*.experts.*.up": Dora.Config(rank=2)}, seed=5)
    assert (logits(model) - before).norm() < 1e-3 * before.norm()


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
    check_pools(packed, with_layers(config, {part: A}, [part]))
    with (
        offload(packed, None),
        pytest.raises(
            ConfigError,
            match=r"are a OffloadedPool, which nothing can stand beside; load the model with all its experts",
        ),
    ):
        check_pools(packed, with_layers(config, {part: A}, [part]))
    attention = "blocks.0.attention.q"
    check_pools(packed, with_layers(config, {attention: A}, [attention]))
