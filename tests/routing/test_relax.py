"""Relaxed choices: distribution, exactness of the straight-through form, gradients, the temperature's schedule."""

import math

import pytest
import torch

from anabranch.config import from_dict, to_dict
from anabranch.errors import ConfigError
from anabranch.routing.relax import Temperature, gumbel_noise, gumbel_softmax, straight_through


def test_noise_has_the_moments_of_a_gumbel():
    torch.manual_seed(0)
    noise = gumbel_noise(torch.empty(200_000, dtype=torch.float64))
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("temperature", [5.0, 0.1])
def test_the_sample_is_distributed_as_the_softmax_at_any_temperature(temperature):
    torch.manual_seed(0)
    logit_E = torch.tensor([0.0, 1.0, -1.0])
    soft_NE = gumbel_softmax(logit_E.expand(100_000, 3), temperature)
    torch.testing.assert_close(straight_through(soft_NE).mean(0), logit_E.softmax(-1), atol=0.006, rtol=0)
    torch.testing.assert_close(soft_NE.sum(-1), torch.ones(100_000))


def test_without_noise_it_is_the_softmax_of_the_temperature():
    logit_NE = torch.tensor([[0.0, math.log(2.0)]])
    torch.testing.assert_close(gumbel_softmax(logit_NE, 0.5, noise=False), torch.tensor([[0.2, 0.8]]))  # 1 : 2^2


def test_straight_through_is_exactly_one_hot_and_has_the_soft_gradient():
    generator = torch.Generator().manual_seed(0)
    logit_NE = torch.randn(50, 4, generator=generator, requires_grad=True)
    value_NE = torch.randn(50, 4, generator=generator)
    soft_NE = logit_NE.softmax(-1)
    hard_NE = straight_through(soft_NE)
    assert torch.equal(hard_NE, torch.nn.functional.one_hot(soft_NE.argmax(-1), 4).float())
    (gradient_NE,) = torch.autograd.grad((hard_NE * value_NE).sum(), logit_NE)
    (expected_NE,) = torch.autograd.grad((logit_NE.softmax(-1) * value_NE).sum(), logit_NE)
    assert torch.equal(gradient_NE, expected_NE)
    assert straight_through(torch.tensor([[0.5, 0.5]])).tolist() == [[1.0, 0.0]]  # ties go to the first


def test_schedule_by_hand():
    """5 * 0.99984^24450 = 0.1000, the floor; by fraction it is the geometric mean, sqrt(0.5), halfway."""
    config = Temperature.Config()
    assert config.at(0, 0.0) == 5.0
    assert config.at(1, 0.0) == pytest.approx(4.9992)
    assert config.at(24_440, 0.5) > 0.1
    assert config.at(24_460, 0.5) == 0.1
    by_fraction = Temperature.Config(until=0.8)
    assert by_fraction.at(7, 0.4) == pytest.approx(math.sqrt(0.5))
    assert by_fraction.at(7, 0.9) == pytest.approx(0.1)


def test_the_value_is_a_buffer_that_the_step_hook_sets():
    temperature = Temperature.Config(decay=0.5).build()
    assert temperature.state_dict().keys() == {"value"}
    temperature.on_step(2, 0.1)
    assert temperature.value.item() == pytest.approx(1.25)
    other = Temperature.Config().build()
    other.load_state_dict(temperature.state_dict())
    assert other.value.item() == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": 0.0}, "end is 0.0; it must be greater than 0"),
        ({"start": -1.0}, "start is -1.0; it must be greater than 0"),
        ({"start": 0.05}, r"temperature.end is 0.1, temperature.start 0.05; it must not rise"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        Temperature.Config(**options)


def test_config_reads_back_equal():
    config = Temperature.Config(until=0.5)
    assert from_dict(Temperature.Config, to_dict(config)) == config
