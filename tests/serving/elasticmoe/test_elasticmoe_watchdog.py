"""When a process that has stopped is ended: with made-up ranks, on the clock; and each kind of process of a real group, stopped or dead."""

import os
import signal
import threading
import time
from concurrent.futures import Future
from functools import partial

import pytest

from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.group import Group
from anabranch.serving.elasticmoe.policy import Policy
from anabranch.serving.elasticmoe.watchdog import Watchdog, Watched
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

    def watched(self):
        if self.is_broken:
            return []
        return [
            Watched((self, device), f"device {device}", partial(self.call, device, "ping"), partial(self.kill, device))
            for device in self.devices
        ]

    def kill(self, device):
        self.killed.setdefault(device, time.monotonic())
        self.is_broken = True


@pytest.mark.parametrize("answers", [1, 2, 3])
def test_a_rank_is_ended_when_it_has_been_silent_for_so_long_and_not_half_as_long_again(answers):
    ranks = Ranks()
    watchdog = Watchdog(ranks.watched, PATIENCE_S)
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
    watchdog = Watchdog(ranks.watched, PATIENCE_S)
    time.sleep(4 * PATIENCE_S)
    watchdog.close()
    assert not ranks.killed
    assert ranks.heard


def test_of_a_process_that_is_gone_one_is_told_once():
    lost, processes, alive = [], ["first"], {"third"}

    def watched():
        return [
            Watched(
                (name,),
                name,
                Future,
                partial(alive.discard, name),
                partial(alive.__contains__, name),
                partial(lost.append, name),
            )
            for name in processes
        ]

    watchdog = Watchdog(watched, 0.2)
    until(lambda: lost == ["first"])
    time.sleep(0.2)
    processes[:] = ["second"]
    until(lambda: lost == ["first", "second"])
    processes[:] = ["third"]
    # It is there, but never answers.
    until(lambda: lost == ["first", "second", "third"])
    watchdog.close()


@pytest.mark.parametrize("start_s", [0.0, 1.0])
def test_one_that_starts_has_the_time_that_takes(start_s):
    killed, began = [], time.monotonic()
    watched = [Watched(("a",), "a", Future, lambda: killed.append(time.monotonic()), start_s=start_s)]
    watchdog = Watchdog(lambda: watched, 0.2)
    until(lambda: killed)
    watchdog.close()
    assert killed[0] - began >= max(start_s, 0.2)
    assert start_s or killed[0] - began < 0.9


@pytest.fixture
def group(folder):
    group = Group(ElasticConfig(model=str(folder), devices=2, watchdog_s=1.5, policy=Policy(max_devices=4)))
    group.start()
    group.settle()
    yield group
    group.close()


def rank(group):
    return next(iter(group.ledger.active.pids.values()))


def standby(group):
    return next(iter(group.standby.instances()[0].pids.values()))


PROCESSES = {
    "rank": rank,
    "standby": standby,
    "memory": lambda group: group.memory.process.pid,
    "fork server": lambda group: group.fork_server.pid,
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("name", PROCESSES)
def test_whichever_process_of_a_group_stops_or_dies_requests_are_answered_and_devices_change(group, name, number):
    outputs = {}

    def ask(id, tokens=60):
        done = threading.Event()
        given = outputs[id] = []

        def emit(output):
            given.extend(output.tokens)
            assert output.error is None
            if output.finish is not None:
                done.set()

        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        group.ledger.submit(Request(id=id, prompt=(1, 2, 3), sampling=sampling), emit)
        return done

    assert ask("alone").wait(30)
    pid = PROCESSES[name](group)
    # Each has been heard by then; before its first sign of life a fork server has the time that a start may take.
    time.sleep(group.config.watchdog_s)
    os.kill(pid, number)
    # What was stopped is found out without anybody asking for it.
    done = ask("meanwhile")
    until(lambda: pid not in group.pids, 30)
    assert done.wait(30)
    assert outputs["meanwhile"] == outputs["alone"]
    report = group.scale(3)
    assert report.new == (0, 1, 2)
    assert ask("after").wait(30)
    assert outputs["after"] == outputs["alone"]
    assert group.is_serving
