"""Advantages: by hand, against a sum over all later steps, and where episodes end or are cut off."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.rl import Ends, advantages


def ends(terminated, truncated=None, final=None):
    terminated = torch.tensor(terminated, dtype=torch.bool)
    truncated = torch.zeros_like(terminated) if truncated is None else torch.tensor(truncated, dtype=torch.bool)
    final = torch.zeros(terminated.shape) if final is None else torch.tensor(final)
    return Ends(terminated, truncated, final)


def column(*values):
    return torch.tensor(values)[:, None]


NEVER = [[False], [False], [False]]


def test_three_steps_by_hand():
    # gamma 0.5, lambda 0.5, so 0.25 is carried. delta: 1 + 0.5*3 - 2 = 0.5; 0 + 0.5*4 - 3 = -1; 2 + 0.5*8 - 4 = 2.
    # A_2 = 2; A_1 = -1 + 0.25*2 = -0.5; A_0 = 0.5 + 0.25*-0.5 = 0.375.
    found = advantages(
        column(1.0, 0.0, 2.0), column(2.0, 3.0, 4.0), torch.tensor([8.0]), ends(NEVER), gamma=0.5, gae_lambda=0.5
    )
    assert found[:, 0].tolist() == [0.375, -0.5, 2.0]


def test_a_terminated_episode_has_nothing_behind_it_by_hand():
    # Step 1 ends it: delta_1 = 0 - 3 = -3, and nothing of A_2 comes back; A_0 = 0.5 + 0.25 * -3 = -0.25.
    found = advantages(
        column(1.0, 0.0, 2.0),
        column(2.0, 3.0, 4.0),
        torch.tensor([8.0]),
        ends([[False], [True], [False]]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    assert found[:, 0].tolist() == [-0.25, -3.0, 2.0]


@pytest.mark.parametrize(("bootstraps", "first"), [(True, [1.0, 2.0]), (False, [-0.25, -3.0])])
def test_a_truncated_episode_goes_on_by_the_value_of_its_last_observation(bootstraps, first):
    # The last observation is worth 10: delta_1 = 0 + 0.5*10 - 3 = 2, A_0 = 0.5 + 0.25*2 = 1. Without: as terminated.
    found = advantages(
        column(1.0, 0.0, 2.0),
        column(2.0, 3.0, 4.0),
        torch.tensor([8.0]),
        ends(NEVER, [[False], [True], [False]], [[99.0], [10.0], [99.0]]),
        gamma=0.5,
        gae_lambda=0.5,
        bootstrap_truncated=bootstraps,
    )
    assert found[:, 0].tolist() == [*first, 2.0]


def test_what_is_both_ends_for_good():
    both = ends([[True]], [[True]], [[10.0]])
    found = advantages(column(1.0), column(0.25), torch.tensor([5.0]), both, gamma=1.0, gae_lambda=1.0)
    assert found.tolist() == [[0.75]]


def naive(reward, value, last, over, cut, final, gamma, lam):
    """Sum of discounted errors over all later steps of the episode, one at a time."""
    steps = len(reward)
    following = [*value[1:], last]

    def delta(t):
        after = 0.0 if over[t] else final[t] if cut[t] else following[t]
        return reward[t] + gamma * after - value[t]

    found = []
    for t in range(steps):
        total = 0.0
        for later in range(t, steps):
            total += (gamma * lam) ** (later - t) * delta(later)
            if over[later] or cut[later]:
                break
        found.append(total)
    return found


@given(
    st.integers(1, 12).flatmap(
        lambda steps: st.tuples(
            *(st.lists(st.floats(-5, 5, width=32), min_size=steps, max_size=steps) for _ in range(3)),
            *(st.lists(st.booleans(), min_size=steps, max_size=steps) for _ in range(2)),
        )
    ),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(-5, 5, width=32),
)
def test_it_is_the_sum_over_later_steps(lists, gamma, lam, last):
    reward, value, final, over, cut = lists
    found = advantages(
        column(*reward).double(),
        column(*value).double(),
        torch.tensor([last], dtype=torch.float64),
        Ends(torch.tensor(over)[:, None], torch.tensor(cut)[:, None], column(*final).double()),
        gamma=gamma,
        gae_lambda=lam,
    )
    expected = naive(reward, value, last, over, cut, final, gamma, lam)
    torch.testing.assert_close(found[:, 0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.5}, "gamma is 1.5; it must be from 0 to 1"),
        ({"gae_lambda": float("nan")}, "gae_lambda is nan"),
        ({"last_value_N": torch.zeros(2)}, "last values"),
    ],
)
def test_what_does_not_fit_is_told(changes, message):
    given = {
        "reward_TN": torch.zeros(3, 1),
        "value_TN": torch.zeros(3, 1),
        "last_value_N": torch.zeros(1),
        "ends": ends(NEVER),
        "gamma": 0.9,
        "gae_lambda": 0.9,
    }
    with pytest.raises(ConfigError, match=message):
        advantages(**(given | changes))
