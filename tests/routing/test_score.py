import math

import pytest
import torch
import torch.nn.functional as F

from anabranch.errors import ConfigError
from anabranch.routing import CosineScore, LinearScore, RoutingContext
from anabranch.routing.score import activate
from anabranch.routing.shared import shared_parameters

EVAL = RoutingContext()
TRAIN = RoutingContext(training=True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_activations_by_hand():
    logit_NE = torch.tensor([[0.0, math.log(3.0)]])
    # softmax: 1 / 4, 3 / 4; sigmoid: 1 / 2, 3 / 4; softplus: ln 2, ln 4
    torch.testing.assert_close(activate(logit_NE, "softmax"), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(activate(logit_NE, "sigmoid"), torch.tensor([[0.5, 0.75]]))
    expected = torch.tensor([[math.sqrt(math.log(2)), math.sqrt(math.log(4))]])
    torch.testing.assert_close(activate(logit_NE, "sqrt_softplus"), expected)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "sqrt_softplus"])
def test_far_logits_have_finite_gradients(activation):
    logit_NE = torch.tensor([[-500.0, -110.0, 0.0, 500.0], [-torch.inf, 1.0, 2.0, -torch.inf]], requires_grad=True)
    score_NE = activate(logit_NE, activation)
    assert torch.isfinite(score_NE).all()
    score_NE.sum().backward()
    assert torch.isfinite(logit_NE.grad).all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "sqrt_softplus"])
def test_a_closed_logit_scores_zero(activation):
    score_NE = activate(torch.tensor([[-torch.inf, 1.0]]), activation)
    assert score_NE[0, 0] == 0
    assert score_NE[0, 1] > 0


def test_linear_is_a_product_with_the_weight():
    score = LinearScore.Config(init_std=0.5).build(6, 4, generator=generator())
    x_ND = torch.randn(5, 6)
    torch.testing.assert_close(score.project(x_ND, EVAL), x_ND @ score.weight.T)
    assert score.weight.shape == (4, 6)


def test_cosine_is_the_angle_over_the_temperature():
    score = CosineScore.Config(projected_dim=3, temperature=0.5, init_std=0.5).build(6, 4, generator=generator())
    x_ND = torch.randn(5, 6)
    projected_NP = x_ND @ score.projection.T
    for n in range(5):
        for e in range(4):
            cosine = F.cosine_similarity(projected_NP[n], score.weight[e], dim=0)
            torch.testing.assert_close(score.project(x_ND, EVAL)[n, e], cosine / 0.5)
    assert score.project(x_ND * 100, EVAL).allclose(score.project(x_ND, EVAL), atol=1e-5)


def test_the_temperature_learns_and_has_a_floor():
    score = CosineScore.Config(init_std=0.5).build(6, 4, generator=generator())
    score.project(torch.randn(5, 6), EVAL).square().sum().backward()
    assert score.log_temperature.grad.abs() > 0
    with torch.no_grad():
        score.log_temperature.fill_(-100.0)
    assert score.project(torch.randn(5, 6), EVAL).abs().max() <= 100.0 + 1e-3


def test_cosine_projects_to_half_the_destinations_by_default():
    assert CosineScore.Config().build(6, 10).projection.shape == (5, 6)
    assert CosineScore.Config().build(6, 2).projection.shape == (2, 6)


@pytest.mark.parametrize("config", [LinearScore.Config(), CosineScore.Config()], ids=["linear", "cosine"])
def test_logits_are_fp32_even_under_autocast_and_for_bf16(config):
    score = config.build(16, 4, generator=generator())
    x_ND = torch.randn(5, 16)
    plain_NE = score.project(x_ND, EVAL)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score.project(x_ND, EVAL), plain_NE)
        assert score.activate(plain_NE).dtype == torch.float32
        assert score.project(x_ND.bfloat16(), EVAL).dtype == torch.float32
    assert score.project(x_ND.double(), EVAL).dtype == torch.float64
    half = config.build(16, 4, generator=generator()).bfloat16()
    assert half.project(x_ND.bfloat16(), EVAL).dtype == torch.float32


@pytest.mark.parametrize("config", [LinearScore.Config(), CosineScore.Config()], ids=["linear", "cosine"])
def test_initial_weights_follow_the_generator(config):
    first, same, other = (config.build(16, 8, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, other.weight)


def test_initial_weights_have_the_asked_spread():
    normal = LinearScore.Config(init_std=0.1).build(256, 64, generator=generator())
    assert normal.weight.std().item() == pytest.approx(0.1, rel=0.05)
    uniform = LinearScore.Config(init="kaiming_uniform").build(256, 64, generator=generator())
    bound = 1 / math.sqrt(256)  # gain sqrt(2 / (1 + 5)), times sqrt(3 / fan_in)
    assert bound * 0.98 < uniform.weight.abs().max() <= bound


def test_jitter_scales_each_input_within_its_range_in_training_only():
    score = LinearScore.Config(jitter=0.1).build(1, 3, generator=generator())
    with torch.no_grad():
        score.weight.fill_(1.0)
    x_N1 = torch.ones(1000, 1)
    assert (score.project(x_N1, EVAL) == 1).all()
    jittered_N = score.project(x_N1, TRAIN)[:, 0]
    assert 0.9 <= jittered_N.min() < 0.91
    assert 1.09 < jittered_N.max() <= 1.1
    assert jittered_N.mean().item() == pytest.approx(1.0, abs=0.01)


def test_jitter_is_reproducible_from_the_global_seed():
    score = LinearScore.Config(jitter=0.1).build(4, 3, generator=generator())
    x_ND, drawn = torch.ones(5, 4), []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(score.project(x_ND, TRAIN))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], score.project(x_ND, TRAIN))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScore.Config(jitter=1.0), "jitter is 1.0; it must be less than 1"),
        (lambda: LinearScore.Config(init_std=0.0), r"init_std is 0.0; it must be greater than 0"),
        (lambda: LinearScore.Config(activation="relu"), "activation is 'relu'; it must be 'softmax', 'sigmoid' or"),
        (lambda: LinearScore.Config(init="zero"), "init is 'zero'; it must be 'normal' or 'kaiming_uniform'"),
        (lambda: CosineScore.Config(temperature=-1.0), r"temperature is -1.0; it must be greater than 0"),
        (lambda: CosineScore.Config(projected_dim=0), "projected_dim is 0; it must be greater than or equal to 1"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("config", [LinearScore.Config(), CosineScore.Config(), CosineScore.Config(projected_dim=3)])
def test_sizes_are_known_before_building(config):
    built = config.build(6, 10)
    count = sum(parameter.numel() for parameter in built.parameters())
    assert config.num_parameters(6, 10) == count
    assert config.num_flops(6, 10) == 2 * count
    assert shared_parameters(config, 6) == 0
    assert config.settled(10).build(6, 20).state_dict().keys() == built.state_dict().keys()
