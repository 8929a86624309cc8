"""Runs that start with untrained layers beside the matrices of a trained model."""

import pytest
import torch

from adapter_models import CONFIGS, OTHERS, TOKENS, logits
from anabranch.adapters import DynMoLE, LowRank
from anabranch.adapters.fresh import BESIDE
from anabranch.errors import ConfigError
from anabranch.lm.recipes import start_from

SMALL = DynMoLE(num_experts=2, rank=2)


def start(model, config):
    return start_from(model, config, seed=3, sample=lambda: TOKENS)


def test_beside_single_experts():
    wanted = OTHERS["qwen3_moe"]().replace(linears={"*.experts.*.down": LowRank.Config(rank=2)})
    with pytest.raises(
        ConfigError, match="beside a matrix of one of several experts, which a run that is started so cannot"
    ):
        start(OTHERS["qwen3_moe"]().build(), wanted)


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
