"""When a process that has stopped is ended: with made-up ranks, on the clock; and each kind of process of a real group, stopped or dead."""

import heapq
import math
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace

import pytest

from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.elasticmoe import watchdog
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.group import Group
from anabranch.serving.elasticmoe.policy import Policy
from anabranch.serving.elasticmoe.watchdog import Watchdog, Watched
from waiting import until

PATIENCE_S = 0.6


class Clock:
    """Stands for the modules ``time`` and ``threading`` of a watchdog: time goes on by what it waits, and ends after ``end_s``."""

    Thread = threading.Thread

    def __init__(self):
        self.now, self.end_s, self._later = 0.0, math.inf, []
        # How late each wait ends.
        self.late_s = 0.0

    def monotonic(self):
        return self.now

    def after(self, seconds, do):
        heapq.heappush(self._later, (self.now + seconds, len(self._later), do))

    def Event(self):
        return SimpleNamespace(wait=self._wait)

    def _wait(self, seconds):
        end = self.now + seconds
        while self._later and self._later[0][0] <= end:
            then, _, do = heapq.heappop(self._later)
            self.now = max(self.now, then)
            do()
        self.now = max(self.now, end) + self.late_s
        return end > self.end_s

    def watch(self, watched, patience_s, end_s):
        """All that a watchdog does by then."""
        self.end_s = end_s
        Watchdog(watched, patience_s)._thread.join()


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(watchdog, "time", made)
    monkeypatch.setattr(watchdog, "threading", made)
    return made


class Ranks:
    """Of one instance; they answer at once, or as long after as a step takes, until one has answered so often that it hangs."""

    is_broken = is_closed = False

    def __init__(self, clock, devices=(0, 1), step_s=0.0, hangs=None):
        self.clock, self.devices, self.step_s, self.hangs = clock, devices, step_s, hangs or {}
        self.heard, self.killed, self.answers = {}, {}, Counter()

    def call(self, device, name):
        assert name == "ping"
        future = Future()
        if self.answers[device] < self.hangs.get(device, math.inf):
            self.answers[device] += 1
            self.clock.after(self.step_s, partial(self._answer, device, future))
        return future

    def _answer(self, device, future):
        self.heard[device] = self.clock.now
        future.set_result(None)

    def watched(self):
        if self.is_broken:
            return []
        return [
            Watched((self, device), f"device {device}", partial(self.call, device, "ping"), partial(self.kill, device))
            for device in self.devices
        ]

    def kill(self, device):
        self.killed.setdefault(device, self.clock.now)
        self.is_broken = True


@pytest.mark.parametrize("answers", [1, 2, 3])
def test_a_rank_is_ended_when_it_has_been_silent_for_so_long_and_not_half_as_long_again(clock, answers):
    ranks = Ranks(clock, hangs={1: answers})
    clock.watch(ranks.watched, PATIENCE_S, 10 * PATIENCE_S)
    assert PATIENCE_S <= ranks.killed[1] - ranks.heard[1] + 1e-9 < 1.25 * PATIENCE_S
    assert 0 not in ranks.killed


def test_ranks_whose_steps_are_long_but_not_too_long_are_left_alone(clock):
    ranks = Ranks(clock, step_s=0.6 * PATIENCE_S)
    clock.watch(ranks.watched, PATIENCE_S, 20 * PATIENCE_S)
    assert not ranks.killed
    assert ranks.answers[0] == ranks.answers[1] > 10


def test_who_stood_still_itself_takes_nobody_for_dead(clock):
    """As with a machine that was asleep: it ended all ranks, whose last answer was before that."""
    ranks = Ranks(clock, step_s=0.1 * PATIENCE_S, hangs={1: 30})

    def stand_still():
        clock.now += 100 * PATIENCE_S

    for at in (3.05, 3.2, 3.3):
        clock.after(at * PATIENCE_S, stand_still)
    clock.watch(ranks.watched, PATIENCE_S, 330 * PATIENCE_S)
    # The one that stops later is found all the same.
    assert list(ranks.killed) == [1]
    assert ranks.answers[1] == 30


def test_who_is_always_a_little_late_still_ends_a_rank_that_is_silent(clock):
    clock.late_s = 0.2 * PATIENCE_S
    ranks = Ranks(clock, hangs={1: 5})
    clock.watch(ranks.watched, PATIENCE_S, 10 * PATIENCE_S)
    assert PATIENCE_S <= ranks.killed[1] - ranks.heard[1] + 1e-9 < 1.5 * PATIENCE_S


def test_a_rank_that_answered_while_nobody_looked_has_its_time_from_then_and_no_more(monkeypatch):
    num_heard_late = 0
    for answers in range(1, 30):
        made, ends = Clock(), []
        monkeypatch.setattr(watchdog, "time", made)
        monkeypatch.setattr(watchdog, "threading", made)
        ranks = Ranks(made, step_s=0.1 * PATIENCE_S, hangs={1: answers})

        def stand_still(made=made, ends=ends):
            made.now += 100 * PATIENCE_S
            ends.append(made.now)

        made.after(3.05 * PATIENCE_S, stand_still)
        made.watch(ranks.watched, PATIENCE_S, 220 * PATIENCE_S)
        if ranks.heard[1] >= ends[0]:
            num_heard_late += 1
            assert ranks.killed[1] - ranks.heard[1] < 1.25 * PATIENCE_S
    assert num_heard_late > 5


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

    watching = Watchdog(watched, 0.2)
    until(lambda: lost == ["first"])
    time.sleep(0.2)
    processes[:] = ["second"]
    until(lambda: lost == ["first", "second"])
    processes[:] = ["third"]
    # It is there, but never answers.
    until(lambda: lost == ["first", "second", "third"])
    watching.close()


@pytest.mark.parametrize("start_s", [0.0, 1.0])
def test_one_that_starts_has_the_time_that_takes(clock, start_s):
    killed = []
    watched = [Watched(("a",), "a", Future, lambda: killed.append(clock.now), start_s=start_s)]
    clock.watch(lambda: watched if not killed else [], 0.2, 5.0)
    # Looked at for the first time after a quarter of its patience.
    assert killed == [pytest.approx(0.05 + max(start_s, 0.2))]


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

    assert ask("alone").wait(60)
    pid = PROCESSES[name](group)
    # Each has been heard by then; before its first sign of life a fork server has the time that a start may take.
    time.sleep(group.config.watchdog_s)
    os.kill(pid, number)
    # What was stopped is found out without anybody asking for it.
    done = ask("meanwhile")
    until(lambda: pid not in group.pids)
    assert done.wait(60)
    assert outputs["meanwhile"] == outputs["alone"]
    report = group.scale(3)
    assert report.new == (0, 1, 2)
    assert ask("after").wait(60)
    assert outputs["after"] == outputs["alone"]
    assert group.is_serving
