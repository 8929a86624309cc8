"""Losses of token policies by hand and against plain autograd; and that what a world wrote bears no gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.rl.tokens import divergence_of, mean_over, surrogate, value_loss

OWN_BL = torch.tensor([[False, True, True, False, True], [False, False, True, False, False]])


def naive(log_prob_BL, old_BL, advantage_BL, mask_BL, low, high):
    """The mean over the mask, a token at a time."""
    losses = []
    for row in range(len(mask_BL)):
        for place in range(mask_BL.shape[1]):
            if mask_BL[row, place]:
                ratio = torch.exp(log_prob_BL[row, place] - old_BL[row, place])
                advantage = advantage_BL[row, place]
                bounded = torch.clamp(ratio, 1 - low, 1 + high)
                losses.append(torch.max(-advantage * ratio, -advantage * bounded))
    return torch.stack(losses).mean()


def drawn(seed):
    torch.manual_seed(seed)
    made = [torch.randn(2, 5, dtype=torch.float64) for _ in range(3)]
    return 0.5 * made[0], 0.5 * made[1], made[2]


@pytest.mark.parametrize("seed", range(4))
def test_the_surrogate_and_its_gradient_are_those_of_plain_autograd(seed):
    log_prob_BL, old_BL, advantage_BL = drawn(seed)
    ours, theirs = log_prob_BL.clone().requires_grad_(), log_prob_BL.clone().requires_grad_()
    made = surrogate(ours, old_BL, advantage_BL, OWN_BL, clip_low=0.2, clip_high=0.3)
    found = mean_over(made.loss_BL, OWN_BL)
    found.backward()
    expected = naive(theirs, old_BL, advantage_BL, OWN_BL, 0.2, 0.3)
    expected.backward()
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)
    # Where the clip took the gradient away, and nowhere else, there is none.
    assert torch.equal((ours.grad == 0) & OWN_BL, made.clipped_BL)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.6, True),  # better only up to 1.3
        (1.5, -2.0, 3.0, False),  # and a bad token counts whole
        (0.5, 2.0, -1.0, False),
        (0.5, -2.0, 1.6, True),  # down to 0.8
    ],
)
def test_the_surrogate_by_hand(ratio, advantage, loss, clipped):
    one = torch.ones(1, 1, dtype=torch.bool)
    log_prob_BL = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    found = surrogate(log_prob_BL, torch.zeros(1, 1), torch.tensor([[advantage]]), one, clip_low=0.2, clip_high=0.3)
    assert found.loss_BL.item() == pytest.approx(loss)
    assert found.clipped_BL.item() is clipped


@given(st.integers(0, 2**20), st.sampled_from([float("nan"), float("inf"), -1e30, 3.0]))
def test_tokens_outside_of_the_mask_change_nothing_and_get_no_gradient(seed, other):
    log_prob_BL, old_BL, advantage_BL = drawn(seed)

    def loss_and_gradient(filled):
        values = [torch.where(OWN_BL, each, filled) for each in (log_prob_BL, old_BL, advantage_BL)]
        values[0].requires_grad_()
        made = surrogate(*values, OWN_BL, clip_low=0.2, clip_high=0.2)
        loss = mean_over(made.loss_BL, OWN_BL)
        loss.backward()
        return loss, values[0].grad

    plain, gradient_BL = loss_and_gradient(0.0)
    changed, changed_gradient_BL = loss_and_gradient(other)
    assert torch.equal(plain, changed)
    assert torch.equal(gradient_BL, changed_gradient_BL)
    assert bool((gradient_BL[~OWN_BL] == 0).all())


def test_one_ratio_for_a_sequence_by_hand():
    log_prob_BL = torch.tensor([[0.0, 0.1, 0.3, 9.0, -0.1]], dtype=torch.float64).requires_grad_()
    advantage_BL = torch.full((1, 5), 2.0, dtype=torch.float64)
    found = surrogate(
        log_prob_BL, torch.zeros(1, 5), advantage_BL, OWN_BL[:1], clip_low=1, clip_high=1, whole_sequences=True
    )
    # The mean of .1, .3 and -.1.
    assert found.ratio_BL[OWN_BL[:1]].tolist() == pytest.approx([math.exp(0.1)] * 3)
    mean_over(found.loss_BL, OWN_BL[:1]).backward()
    expected = torch.where(OWN_BL[:1], -2 * math.exp(0.1) / 3, 0.0)
    assert torch.allclose(log_prob_BL.grad, expected.double())


def test_means_by_hand():
    value_BL = torch.tensor([[9.0, 1.0, 2.0, 9.0, 3.0], [9.0, 9.0, 10.0, 9.0, 9.0]])
    assert mean_over(value_BL, OWN_BL).item() == 4.0
    assert mean_over(value_BL, OWN_BL, "sequences").item() == 6.0
    assert mean_over(value_BL, OWN_BL, "fixed", 4).item() == pytest.approx((6 + 10) / 2 / 4)
    assert mean_over(value_BL, torch.zeros_like(OWN_BL)).item() == 0.0
    with pytest.raises(ConfigError, match="a mean is over 'words'"):
        mean_over(value_BL, OWN_BL, "words")


def test_estimators_of_the_divergence():
    gap = torch.tensor(0.4)
    for name, expected in (("k1", 0.4), ("k2", 0.08), ("k3", math.exp(-0.4) - 1 + 0.4)):
        assert divergence_of(gap, torch.zeros(()), name).item() == pytest.approx(expected)
    with pytest.raises(ConfigError, match="the estimator is 'k4'"):
        divergence_of(gap, gap, "k4")


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_have_the_divergence_as_their_mean(estimator):
    """Over all tokens of two distributions, weighed by the first."""
    torch.manual_seed(0)
    policy, reference = (torch.randn(7, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    assert torch.allclose((policy.exp() * divergence_of(policy, reference, estimator)).sum(), exact)


@pytest.mark.parametrize(
    ("value", "clip", "loss"),
    [(0.5, None, 0.125), (0.5, 0.1, 0.405), (0.05, 0.1, 0.45125), (3.0, 0.1, 2.0)],
)
def test_the_value_loss_by_hand(value, clip, loss):
    one = torch.ones(1, 1, dtype=torch.bool)
    found = value_loss(torch.tensor([[value]]), torch.zeros(1, 1), torch.ones(1, 1), one, clip=clip)
    assert found.item() == pytest.approx(loss, abs=1e-6)
