import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.config import from_dict, to_dict
from anabranch.errors import ConfigError
from anabranch.train import Constant, Cosine, Schedule, WarmupStableDecay


def factors(config, steps):
    schedule = config.build()
    return [schedule.factor(step, steps) for step in range(steps)]


def test_cosine_by_hand():
    # 2 steps of warmup: 1/2, 1. Then t = 0, 1/4, 1/2, 3/4 of 4 steps: 0.2 + 0.8 (1 + cos(pi t)) / 2
    expected = [0.5, 1.0, 1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5))]
    assert factors(Cosine.Config(warmup=2, final=0.2), 6) == pytest.approx(expected)


def test_warmup_stable_decay_by_hand():
    # warmup 1, then 5 stable, then 4 of decay: t = 0, 1/4, 1/2, 3/4
    stable = [1.0] * 6
    assert factors(WarmupStableDecay.Config(warmup=1, decay=0.4), 10) == pytest.approx([*stable, 1.0, 0.75, 0.5, 0.25])
    by_sqrt = [1 - 0.9 * math.sqrt(t) for t in (0, 0.25, 0.5, 0.75)]
    config = WarmupStableDecay.Config(warmup=1, decay=4, final=0.1, shape="sqrt")
    assert factors(config, 10) == pytest.approx([*stable, *by_sqrt])


def test_constant_after_warmup():
    assert factors(Constant.Config(warmup=0.5), 4) == [0.5, 1.0, 1.0, 1.0]
    assert factors(Constant.Config(warmup=0), 2) == [1.0, 1.0]


@given(
    st.sampled_from([Cosine, WarmupStableDecay, Constant]),
    st.one_of(st.floats(0, 1), st.integers(0, 300)),
    st.integers(1, 200),
)
def test_factors_rise_then_never_rise_again(cls, warmup, steps):
    values = factors(cls.Config(warmup=warmup), steps)
    assert all(0 <= value <= 1 for value in values)
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


def test_configs_read_back_equal_with_steps_and_fractions():
    for warmup in (100, 0.1, 1.0):
        config = Cosine.Config(warmup=warmup)
        again = from_dict(Schedule.Config, to_dict(config))
        assert again == config
        assert type(again.warmup) is type(warmup)


def test_a_fraction_above_one_is_refused():
    with pytest.raises(ConfigError, match=r"warmup is 1\.5; use a fraction up to 1\.0, or a whole number of steps"):
        Cosine.Config(warmup=1.5)
    with pytest.raises(ConfigError, match="decay is"):
        WarmupStableDecay.Config(decay=2.5)
