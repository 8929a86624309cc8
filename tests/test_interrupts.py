"""Signals that end work of many parts, whatever a part does with them."""

import os
import signal

import pytest

pytest.importorskip("torch")

from anabranch.interrupts import Ending
from anabranch.train.interrupt import Interrupts

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_what_runs_and_handlers_are_those_of_before(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt), Ending():
        signal.raise_signal(number)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def noting(number, error=None):
    """Work that notes a signal, comes to its end all the same, and may fail after that; what it noted."""
    with Interrupts() as noted:
        if number is not None:
            signal.raise_signal(number)
        if error is not None:
            raise error
    return noted.received


@pytest.mark.parametrize("number", SIGNALS)
def test_who_only_notes_one_tells_of_it_as_it_is_left(number):
    with pytest.raises(KeyboardInterrupt), Ending():
        noting(number)
    # By itself it only notes.
    assert noting(number) == number.name


def test_where_nothing_came_nothing_is_told():
    with Ending():
        assert noting(None) is None


@pytest.mark.parametrize("number", SIGNALS)
def test_where_trainings_are_not_ended_the_first_is_noted_and_the_second_raises(number):
    """The second SIGTERM ended the process as the first one would have: calls that were out, and may be billed, were in no file."""
    before = [signal.getsignal(each) for each in SIGNALS]
    with Ending(ends_trainings=False):
        assert noting(number) == number.name
        with Interrupts() as noted:
            signal.raise_signal(number)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert noted.received == number.name
        # And within one that ends them they are ended.
        with pytest.raises(KeyboardInterrupt), Ending(), Ending(ends_trainings=False):
            noting(number)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_what_went_wrong_is_told_before_a_signal_that_was_noted():
    with pytest.raises(ValueError, match="full"), Ending():
        noting(signal.SIGTERM, ValueError("full"))


@pytest.mark.parametrize("ends_trainings", [True, False])
def test_what_is_ignored_stays_ignored(ends_trainings):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Ending(ends_trainings=ends_trainings):
            assert noting(signal.SIGHUP) is None
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_who_notes_one_tells_of_it_where_others_are_ignored(number):
    """By handlers of theirs it was known whether to tell: under ``nohup`` and a parent that ignored SIGTERM there was none."""
    others = {each: signal.signal(each, signal.SIG_IGN) for each in SIGNALS[1:] if each != number}
    try:
        with pytest.raises(KeyboardInterrupt), Ending():
            noting(number)
        assert noting(number) == number.name
    finally:
        for each, handler in others.items():
            signal.signal(each, handler)


def test_a_copy_of_the_process_is_ended_by_a_signal_as_ever():
    with Ending():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
