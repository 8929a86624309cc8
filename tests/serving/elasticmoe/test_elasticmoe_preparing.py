"""Requests of a rank that wait for their grammars."""

import threading
from concurrent.futures import Future

import pytest

from anabranch.errors import BackendError, InputError
from anabranch.serving.core.request import Request
from anabranch.serving.elasticmoe.handover import Carried
from anabranch.serving.elasticmoe.preparing import Preparing


def given(id):
    return Carried(Request(id=id, prompt=(1,)))


@pytest.fixture
def futures():
    return {}


@pytest.fixture
def preparing(futures):
    return Preparing(lambda request: futures.get(request.id))


def test_a_request_without_a_grammar_waits_for_nothing(preparing):
    assert not preparing.begin(given("a"))
    preparing.check("a")
    assert not preparing
    assert preparing.ready() == []


def test_each_is_told_once_when_its_grammar_is_there(preparing, futures):
    futures |= {"a": Future(), "b": Future(), "c": Future()}
    futures["c"].set_result("grammar")
    assert [preparing.begin(given(id)) for id in "abc"] == [True, True, False]
    assert preparing.ready() == []
    futures["b"].set_result("grammar")
    assert preparing.ready() == [given("b")]
    assert preparing
    threading.Timer(0.05, futures["a"].set_result, ("grammar",)).start()
    assert preparing.ready(wait=True) == [given("a")]
    assert not preparing


def test_a_grammar_that_cannot_be_had_is_an_error_of_its_request(preparing, futures):
    futures |= {"a": Future(), "b": Future()}
    futures["a"].set_exception(InputError("no"))
    futures["b"].set_exception(ValueError("a fault"))
    assert not preparing.begin(given("a"))
    assert not preparing.begin(given("b"))
    with pytest.raises(InputError, match="no"):
        preparing.check("a")
    with pytest.raises(BackendError, match="a fault"):
        preparing.check("b")
    preparing.forget("a")
    preparing.check("a")


def test_one_that_is_aborted_never_comes_and_one_that_is_paused_stays_so(preparing, futures):
    futures |= {"a": Future(), "b": Future(), "c": Future()}
    for id in "abc":
        preparing.begin(given(id))
    preparing.pause("unknown")
    for id in "bc":
        preparing.pause(id)
    preparing.resume("c")
    preparing.forget("a")
    assert futures.pop("a").cancelled()
    for future in futures.values():
        future.set_result(None)
    assert preparing.ready() == [given("b"), given("c")]
    assert [preparing.is_paused(id) for id in ("a", "b", "c", "unknown")] == [False, True, False, False]
