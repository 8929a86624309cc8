"""When a rank that has stopped is ended: with made-up ranks, on the clock."""

import threading
import time
from concurrent.futures import Future

import pytest

from anabranch.serving.elasticmoe.watchdog import Watchdog
from serving_thread import until

PATIENCE_S = 0.6


class Ranks:
    """Of one instance; they answer at once, or as long after as a step takes, until they hang."""

    is_broken = is_closed = False

    def __init__(self, devices=(0, 1), step_s=0.0):
        self.devices, self.step_s, self.hangs = devices, step_s, set()
        self.heard, self.killed = {}, {}

    def call(self, device, name):
        assert name == "ping"
        future = Future()
        if device not in self.hangs:
            timer = threading.Timer(self.step_s, self._answer, (device, future))
            timer.start()
        return future

    def _answer(self, device, future):
        self.heard[device] = time.monotonic()
        future.set_result(None)

    def kill(self, device):
        self.killed.setdefault(device, time.monotonic())
        self.is_broken = True


@pytest.mark.parametrize("answers", [1, 2, 3])
def test_a_rank_is_ended_when_it_has_been_silent_for_so_long_and_not_half_as_long_again(answers):
    ranks = Ranks()
    watchdog = Watchdog(lambda: ranks, PATIENCE_S)
    try:
        for _ in range(answers):
            before = ranks.heard.get(1)
            until(lambda before=before: ranks.heard.get(1) != before)
        ranks.hangs.add(1)
        until(lambda: 1 in ranks.killed)
        assert PATIENCE_S <= ranks.killed[1] - ranks.heard[1] < 1.25 * PATIENCE_S
        assert 0 not in ranks.killed
    finally:
        watchdog.close()


def test_ranks_whose_steps_are_long_but_not_too_long_are_left_alone():
    ranks = Ranks(step_s=0.6 * PATIENCE_S)
    watchdog = Watchdog(lambda: ranks, PATIENCE_S)
    time.sleep(4 * PATIENCE_S)
    watchdog.close()
    assert not ranks.killed
    assert ranks.heard
