"""Advantages of token policies by hand: groups, tokens with a critic, rewards and the price of drift."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.rl.tokens import group_advantages, rewards_by_token, token_advantages, whitened


def test_groups_by_hand():
    reward_QG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    # Mean 1/4, deviation sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2.
    assert group_advantages(reward_QG)[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert group_advantages(reward_QG)[1].tolist() == [0.0] * 4
    assert group_advantages(reward_QG, scale="none")[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    # Against the mean of the others: 1 - 0, and 0 - 1/3.
    found = group_advantages(reward_QG, baseline="others", scale="none")[0]
    assert found.tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    whole = group_advantages(reward_QG, scale="batch")[0]
    assert whole.tolist() == pytest.approx(
        (torch.tensor([0.75, -0.25, -0.25, -0.25]) / reward_QG.std()).tolist(), rel=1e-5
    )
    assert group_advantages(reward_QG, baseline="none", scale="none").equal(reward_QG)


@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=5),
    st.floats(-50, 50, width=32),
)
def test_a_group_is_centred_and_does_not_mind_what_is_added_to_all(rewards, more):
    reward_QG = torch.tensor(rewards, dtype=torch.float64)
    found_QG = group_advantages(reward_QG)
    assert torch.allclose(found_QG.sum(-1), torch.zeros(len(rewards), dtype=torch.float64), atol=1e-6)
    moved_QG = group_advantages(reward_QG + more, scale="none")
    assert torch.allclose(moved_QG, group_advantages(reward_QG, scale="none"), atol=1e-9)
    # At most (G - 1) / sqrt(G) of a deviation.
    assert float(found_QG.abs().max()) <= 2 / math.sqrt(3) + 1e-9


def test_equal_rewards_are_worth_exactly_nothing():
    # Whose mean rounds.
    assert group_advantages(torch.full((1, 3), 0.1)).tolist() == [[0.0] * 3]


@pytest.mark.parametrize(
    ("reward_QG", "how", "why"),
    [
        ([[1.0]], {}, "a group has 1 answer"),
        ([[1.0, float("nan")]], {}, "NaN or infinite"),
        ([1.0, 2.0], {}, r"shape \[2\]"),
        ([[1.0, 2.0]], {"baseline": "median"}, "baseline is 'median'"),
        ([[1.0, 2.0]], {"scale": "world"}, "scale 'world'"),
    ],
)
def test_groups_that_cannot_be(reward_QG, how, why):
    with pytest.raises(ConfigError, match=why):
        group_advantages(torch.tensor(reward_QG), **how)


OWN_BL = torch.tensor([[False, True, True, False, True, False]])


def test_the_reward_stands_on_the_last_own_token_and_drift_costs_on_each():
    drift_BL = torch.tensor([[9.0, 1.0, -2.0, 9.0, 3.0, 9.0]])
    found = rewards_by_token(torch.tensor([2.0]), OWN_BL, drift_BL, 0.5)
    assert found.tolist() == [[0.0, -0.5, 1.0, 0.0, 0.5, 0.0]]
    assert rewards_by_token(torch.tensor([2.0]), torch.zeros_like(OWN_BL)).tolist() == [[0.0] * 6]


def by_definition(reward, value, gamma, gae_lambda):
    """A_t = sum_k (gamma lambda)^k delta_(t+k), in quadratic time."""
    later = [*value[1:], 0.0]
    delta = [r + gamma * n - v for r, n, v in zip(reward, later, value, strict=True)]
    return [sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.9, 0.95), (0.5, 0.0)])
def test_generalised_advantages_go_from_own_token_to_own_token(gamma, gae_lambda):
    reward_BL = torch.tensor([[7.0, 0.1, 0.2, 7.0, 1.0, 7.0]], dtype=torch.float64)
    value_BL = torch.tensor([[7.0, 0.5, 0.4, 7.0, 0.9, 7.0]], dtype=torch.float64)
    found = token_advantages(reward_BL, value_BL, OWN_BL, gamma=gamma, gae_lambda=gae_lambda)
    expected = by_definition([0.1, 0.2, 1.0], [0.5, 0.4, 0.9], gamma, gae_lambda)
    assert found[OWN_BL].tolist() == pytest.approx(expected)
    assert found[~OWN_BL].tolist() == [0.0] * 3
    with pytest.raises(ConfigError, match="gamma is 2"):
        token_advantages(reward_BL, value_BL, OWN_BL, gamma=2)


def test_whitened_over_the_mask():
    value_BL = torch.tensor([[9.0, 1.0, 2.0, 9.0, 3.0, float("inf")]])
    found = whitened(value_BL, OWN_BL)
    assert found[OWN_BL].tolist() == pytest.approx([-1.0, 0.0, 1.0])
    assert found[~OWN_BL].tolist() == [0.0] * 3
    one = torch.tensor([[False, True, False, False, False, False]])
    assert whitened(value_BL, one).tolist() == [[0.0] * 6]
    assert whitened(value_BL, torch.zeros_like(one)).tolist() == [[0.0] * 6]
