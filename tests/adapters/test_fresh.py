"""Untrained layers beside the matrices of a model that is there."""

import pytest
import torch

from adapter_models import CONFIGS, OTHERS, TOKENS, logits
from anabranch.adapters import DynMoLE, LowRank, RoutedLowRank, add_layers
from anabranch.adapters.fresh import BESIDE
from anabranch.errors import ConfigError
from anabranch.lm.recipes import start_from
from anabranch.nn import Dense

SMALL = DynMoLE(num_experts=2, rank=2)


def start(model, config):
    return start_from(model, config, seed=3, sample=lambda: TOKENS)


def test_the_model_computes_what_it_did_and_only_the_layers_learn():
    model = CONFIGS["qwen2"]().build(seed=1)
    before = logits(model)
    assert add_layers(model, SMALL.linears(2), seed=3) is model
    assert torch.equal(logits(model), before)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(BESIDE in name for name in learning)
    assert model.config.linears == SMALL.linears(2)
    again = add_layers(CONFIGS["qwen2"]().build(seed=1), SMALL.linears(2), seed=3)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    model.train()(TOKENS, TOKENS.roll(-1, 1)).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == learning


def test_beside_single_experts():
    model = OTHERS["qwen3_moe"]().build(seed=1)
    before = logits(model)
    add_layers(model, {"*.experts.*.down": LowRank.Config(rank=2)})
    torch.testing.assert_close(logits(model), before)
    with pytest.raises(
        ConfigError, match="beside a matrix of one of several experts, which a run that is started so cannot"
    ):
        start(OTHERS["qwen3_moe"]().build(), model.config)


def test_a_run_starts_with_them():
    model, wanted = CONFIGS["llama"]().build(seed=1), SMALL.on(CONFIGS["llama"]())
    before = logits(model)
    started = start(model, wanted)
    assert (started.recipe, started.learns) == (("added_layers",), BESIDE)
    assert torch.equal(logits(started.model), before)
    assert started.model.config == wanted


def test_a_run_goes_on_with_those_of_another():
    wanted = SMALL.on(CONFIGS["llama"]())
    model = wanted.build(seed=1)
    started = start(model, wanted)
    assert (started.model, started.learns) == (model, BESIDE)
    assert {BESIDE in name for name, value in model.named_parameters() if value.requires_grad} == {True}
    with pytest.raises(ConfigError, match="already, and not as the design wants it; start from its base"):
        start(model, SMALL.replace(rank=3).on(CONFIGS["llama"]()))


@pytest.mark.parametrize(
    ("linears", "message"),
    [
        ({}, "there are no layers to add"),
        ({"*.q": Dense.Config()}, r"linears has '\*\.q', a 'dense' layer that takes the place of its matrix"),
        ({"*.nothing": LowRank.Config()}, "fits no linear layer of this model"),
    ],
)
def test_what_cannot_be_added(linears, message):
    model = CONFIGS["llama"]().build()
    with pytest.raises(ConfigError, match=message):
        add_layers(model, linears)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_are_added_once():
    model = add_layers(CONFIGS["llama"]().build(), {"*.q": RoutedLowRank.Config(ranks=(2, 2))})
    with pytest.raises(ConfigError, match=r"linears of the model has '\*\.q' already"):
        add_layers(model, {"*.v": LowRank.Config()})
