"""Policies by a clock of their own."""

import pytest

from anabranch.errors import ConfigError
from anabranch.serving.elasticmoe.policy import Autoscaler, Load, Policy


def load(devices=2, running=0, waiting=0):
    return Load(devices, running, waiting, max_seqs=4)


def test_slo_grows_when_too_few_meet_their_targets():
    scaler = Autoscaler(Policy(by="slo", ttft_s=1.0, tpot_s=0.1, window_s=10, cool_down_s=5, min_requests=4))
    for second in range(4):
        scaler.served(second, 2.0 if second == 0 else 0.5, 0.05)  # one of four misses: 75%
    assert scaler.attainment(4) == 0.75
    assert scaler.decide(4, load(running=6)) == 3
    scaler.changed(4)
    assert scaler.attainment(4) is None  # what was served by fewer devices says nothing of more
    for second in range(4):
        scaler.served(5 + second, 2.0, 0.05)
    assert scaler.decide(8, load(3, running=9)) == 3  # cooling down
    assert scaler.decide(9, load(3, running=9)) == 4
    assert scaler.decide(9, load(3, running=1)) == 3  # idle devices that miss are not helped by more
    assert scaler.decide(20, load(3, running=9)) == 3  # the window has moved on


def test_a_slow_token_misses_as_well():
    scaler = Autoscaler(Policy(by="slo", ttft_s=1.0, tpot_s=0.1))
    assert scaler.served(0, 0.5, 0.1)
    assert not scaler.served(0, 0.5, 0.11)


def test_it_shrinks_only_after_patience_and_not_into_trouble():
    scaler = Autoscaler(Policy(by="slo", patience_s=10, cool_down_s=0, low=0.3))
    assert scaler.decide(0, load(2, running=1)) == 2
    assert scaler.decide(9, load(2, running=1)) == 2
    assert scaler.decide(10, load(2, running=1)) == 1
    scaler.changed(10)
    assert scaler.decide(11, load(2, running=1)) == 2
    assert scaler.decide(15, load(2, running=6)) == 2  # busy in between: patience begins anew
    assert scaler.decide(22, load(2, running=1)) == 2
    assert scaler.decide(32, load(2, running=1)) == 1
    assert scaler.decide(50, load(1, running=0)) == 1


def test_queue_follows_the_requests():
    scaler = Autoscaler(Policy(by="queue", cool_down_s=0, patience_s=0, high=1.0, low=0.4, max_devices=3))
    assert scaler.decide(0, load(2, running=8, waiting=1)) == 3
    assert scaler.decide(1, load(3, running=12, waiting=9)) == 3  # the most there may be
    assert scaler.decide(2, load(3, running=2)) == 2
    assert scaler.decide(3, load(2, running=3)) == 1
    assert scaler.decide(3, load(2, running=4)) == 2


def test_schedule_and_manual():
    scaler = Autoscaler(Policy(by="schedule", hours=((8.0, 4), (20.0, 1))))
    assert [scaler.decide(0, load(), hour) for hour in (3.0, 8.0, 19.9, 20.0)] == [1, 4, 4, 1]
    assert Autoscaler(Policy()).decide(0, load(2, 8, 100)) == 2


def test_refusals():
    with pytest.raises(ConfigError, match="min_devices is 3"):
        Policy(min_devices=3, max_devices=2)
    with pytest.raises(ConfigError, match="the group would swing"):
        Policy(low=1.0, high=1.0)
    with pytest.raises(ConfigError, match="hours must be"):
        Policy(by="schedule")
