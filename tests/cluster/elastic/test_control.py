"""A rank's connection to the coordinator: what beats tell, what ends a wait, and which answers stay."""

import threading
import time

import pytest

from anabranch.cluster.elastic.control import Control
from anabranch.cluster.elastic.links import CalledAwayError
from anabranch.cluster.elastic.wire import Listener
from anabranch.errors import PeerError
from waiting import until


class Clock:
    """Stands for the module ``time``: it goes on by what somebody sleeps, when a test says so."""

    def __init__(self):
        self.now, self.ticks = time.monotonic(), threading.Semaphore(0)

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.ticks.acquire()
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("anabranch.cluster.elastic.control.time", made)
    yield made
    # Nobody sleeps on.
    made.ticks.release(1000)


class Desk:
    """What a rank is connected to in place of a coordinator: it keeps what it hears, and says what a test wants."""

    def __init__(self, *, answers_beats=True, timeout_s=30.0):
        self.heard, self.channel, self.answers_beats = [], None, answers_beats
        self.there = threading.Event()
        self.listener = Listener("127.0.0.1", 0, b"s", self.on_frame, lambda *told: None)
        self.changed = threading.Condition()
        self.control = Control(self.changed, timeout_s=timeout_s)
        self.control.connect(f"127.0.0.1:{self.listener.port}", b"s")
        self.control.tell("hello")
        assert self.there.wait(60)
        self.control.is_in, self.control.epoch = True, 3

    def on_frame(self, channel, header, body):
        if self.channel is None:
            channel.admit()
            self.channel = channel
            self.there.set()
        if header["kind"] == "beat" and self.answers_beats:
            channel.send({"kind": "beat"})
        self.heard.append(header)

    def say(self, kind, **more):
        self.channel.send({"kind": kind, **more})

    def wait_for(self, holds):
        return until(lambda: [header for header in self.heard if holds(header)])[-1]

    def beats(self):
        return [header for header in self.heard if header["kind"] == "beat"]

    def beat(self, clock):
        """The next beat, for which time goes on; where it is answered the rank has heard that."""
        number = len(self.beats())
        clock.ticks.release()
        until(lambda: len(self.beats()) > number)
        until(lambda: not self.answers_beats or self.control._heard_s == clock.now)
        return self.beats()[-1]

    def later(self, work):
        found = []

        def run():
            try:
                found.append(work())
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()

        def result():
            thread.join(60)
            assert found
            return found[0]

        return result

    def close(self):
        self.control.part(is_done=True)
        self.control.close()
        self.listener.close()


@pytest.fixture
def desk():
    made = Desk()
    yield made
    made.close()


def test_beats_tell_who_is_waited_for_and_that_nobody_is(desk):
    desk.control.start()
    assert desk.wait_for(lambda header: header["kind"] == "beat") == {
        "kind": "beat",
        "epoch": 3,
        "waits": None,
        "is_long": False,
    }
    result = desk.later(lambda: desk.control.decided("commit"))
    desk.wait_for(lambda header: header.get("waits") == {"what": "commit"})
    desk.say("commit", epoch=3, step=7)
    assert result()["step"] == 7
    desk.heard.clear()
    desk.wait_for(lambda header: header["kind"] == "beat" and header["waits"] is None)


def test_a_long_wait_is_told_as_long(clock):
    desk = Desk(timeout_s=1.2)
    desk.control.start()
    result = desk.later(lambda: desk.control.agree("weights"))
    until(lambda: desk.control._standing[0])
    told = [desk.beat(clock) for _ in range(4)]
    assert [beat["waits"] for beat in told] == [{"round": "weights"}] * 4
    assert [beat["is_long"] for beat in told] == [False, False, True, True]
    desk.say("done", what="weights")
    assert result() is None
    desk.close()


def test_a_coordinator_that_says_nothing_ends_every_wait_and_one_that_answers_ends_none(clock):
    desk = Desk(timeout_s=1.0)
    desk.control.start()
    result = desk.later(lambda: desk.control.decided("commit"))
    for _ in range(6):
        desk.beat(clock)
    assert desk.control.stop is None
    desk.answers_beats = False
    for _ in range(3):
        assert desk.control.stop is None
        desk.beat(clock)
    assert isinstance(result(), CalledAwayError)
    with pytest.raises(PeerError, match="the coordinator has said nothing for 1 s"):
        desk.control.raise_if_stopped()
    desk.close()


def test_another_layout_ends_a_wait_but_not_what_all_have_done(desk):
    result = desk.later(lambda: desk.control.agree("weights"))
    desk.wait_for(lambda header: header["kind"] == "done")
    desk.say("epoch", epoch=4)
    assert isinstance(result(), CalledAwayError)
    desk.control.news.clear()
    desk.heard.clear()
    result = desk.later(lambda: desk.control.agree("weights"))
    desk.wait_for(lambda header: header["kind"] == "done")
    with desk.changed:
        # Both come before this rank looks.
        desk.control._on_frame(None, {"kind": "done", "what": "weights"}, b"")
        desk.control._on_frame(None, {"kind": "epoch", "epoch": 5}, b"")
    assert result() is None
    assert desk.control.is_called()


def test_a_decision_is_taken_before_a_layout_that_came_after_it(desk):
    desk.say("commit", epoch=3, step=7)
    desk.say("epoch", epoch=4)
    with desk.changed:
        assert desk.changed.wait_for(desk.control.is_called, 60)
    assert desk.control.decided("commit")["step"] == 7
    # What is next is no commit, and stays for who acts on it.
    with pytest.raises(CalledAwayError):
        desk.control.decided("commit")
    assert [news["kind"] for news in desk.control.news] == ["epoch"]


def test_a_layout_for_which_all_were_ready_is_taken_before_the_next_one(desk):
    """The coordinator goes on from there: who did not look in between answered out of the layout before."""
    with desk.changed:
        desk.control._on_frame(None, {"kind": "go", "epoch": 3}, b"")
        desk.control._on_frame(None, {"kind": "epoch", "epoch": 4}, b"")
    assert desk.control.decided("go")["epoch"] == 3
    assert [news["kind"] for news in desk.control.news] == ["epoch"]


def test_growth_waits_until_all_have_done_what_they_do_after_the_step(desk):
    desk.say("epoch", epoch=4, is_growth=True)
    with desk.changed:
        desk.changed.wait_for(desk.control.is_called, 60)

    def work():
        with desk.control.staying():
            desk.control.raise_if_called()
            desk.control.agree("weights")

    result = desk.later(work)
    assert desk.wait_for(lambda header: header["kind"] == "done")["epoch"] == 3
    desk.say("done", what="weights")
    assert result() is None
    # And is followed then.
    assert desk.control.is_called()
    desk.heard.clear()
    result = desk.later(work)
    desk.wait_for(lambda header: header["kind"] == "done")
    # A loss is not waited for.
    desk.say("epoch", epoch=5, is_growth=False)
    assert isinstance(result(), CalledAwayError)


def test_a_rank_that_stood_still_takes_nobody_for_silent(monkeypatch):
    desk = Desk(answers_beats=False, timeout_s=3.0)
    clock, ahead = time.monotonic, [0.0]
    monkeypatch.setattr("anabranch.cluster.elastic.control.time.monotonic", lambda: clock() + ahead[0])
    desk.control.start()
    result = desk.later(lambda: desk.control.agree("weights"))
    desk.wait_for(lambda header: header.get("waits"))
    ahead[0] = 60.0
    desk.heard.clear()
    assert not desk.wait_for(lambda header: header["kind"] == "beat")["is_long"]
    assert desk.control.stop is None
    desk.say("done", what="weights")
    assert result() is None
    desk.close()


def test_a_newcomer_takes_no_layout_for_a_commit(desk):
    """It stood still for as long as waits may last, and all others with it."""
    desk.control.is_in = False
    desk.say("epoch", epoch=4)
    with desk.changed:
        assert desk.changed.wait_for(lambda: desk.control.news, 60)
    with pytest.raises(CalledAwayError):
        desk.control.decided("commit")
    assert desk.control.news[0]["kind"] == "epoch"
