"""What a strategy decided, or wants sent, is looked at before anything is paid."""

import json
import math
from collections import UserList, deque
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.decision_checks import BypassError, check_decision, plain_decision, plain_messages
from anabranch.routers.contract.query import Candidate, Decision, Model, Pool

POOL = Pool((Model(name="a"), Model(name="b")))
PLAIN = {"candidates": [Candidate(model="a", score=1.0)], "strategy": "s", "reason": "why"}
IMAGE = "data:image/png;base64," + "A" * 1000
CAME = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}]

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def test_what_came_is_given_on_and_not_copied():
    """Each candidate had a copy of all, written and read as JSON on the loop."""
    given = [{"role": "system", "content": "be short"}, CAME[0], {"role": "user", "content": IMAGE}]
    found = plain_messages(given, CAME)
    assert found == given
    assert found[1] is CAME[0]
    assert found[2]["content"] is IMAGE
    # Another's message is its own to change.
    assert found[0] is not given[0]


@given(JSON)
def test_values_of_json_are_as_they_are(value):
    message = {"role": "user", "content": value}
    assert plain_messages([message], CAME) == [message]


@pytest.mark.parametrize("kind", [list, tuple, deque, UserList])
def test_any_sequence_of_messages_may_be_sent(kind):
    assert plain_messages(kind([{"role": "user", "content": "hi"}]), CAME) == [{"role": "user", "content": "hi"}]


class Odd(str):
    """Text whose parts are code."""

    __slots__ = ()

    def encode(self, *_):
        raise SystemExit


def test_what_is_no_plain_value_becomes_one():
    found = plain_messages([{"role": Odd("user"), "content": (1, {2: "x"})}], CAME)
    assert found == [{"role": "user", "content": [1, {"2": "x"}]}]
    assert type(found[0]["role"]) is str


def deep(levels=100_000):
    found = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("user", "no list of messages"),
        ([], "no list of messages"),
        (None, "no list of messages"),
        (["hi"], "no list of messages"),
        ([{"content": "hi"}], "has no role"),
        ([{"role": 3}], "has no role"),
        ([{"role": "user", "content": math.nan}], "not ready for JSON"),
        ([{"role": "user", "content": math.inf}], "not ready for JSON"),
        ([{"role": "user", "content": {1, 2}}], "not ready for JSON"),
        ([{"role": "user", "content": b"hi"}], "not ready for JSON"),
        ([{"role": "user", "content": {(1, 2): 3}}], "not ready for JSON"),
        ([{"role": "user", "content": 10**5000}], "not ready for JSON"),
        ([{"role": "user", "content": deep()}], "not ready for JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_no_messages_can_be_is_refused(messages, says):
    with pytest.raises(BypassError, match=says) as caught:
        plain_messages(messages, CAME)
    assert caught.value.why == "odd"


def test_decisions_on_models_that_there_are_pass():
    pool = Pool((Model(name="a"), Model(name="b")))
    check_decision(
        Decision(
            candidates=(Candidate(model="a", score=1.0), Candidate(model="b", score=1.0)), strategy="s", reason="why"
        ),
        pool,
    )
    for decision, why in (
        (None, "empty"),
        (Decision(candidates=(Candidate(model="c", score=1.0),), strategy="s", reason="why"), "unknown_model"),
        (Decision(**PLAIN, beside=("a", "c")), "unknown_model"),
        (Decision(**PLAIN, beside=([],)), "unknown_model"),
        (Decision(**PLAIN, beside=None), "unknown_model"),
        (
            Decision(
                candidates=(Candidate(model="a", score=1.0), Candidate(model="a", score=1.0)),
                strategy="s",
                reason="why",
            ),
            "twice",
        ),
        (Decision(candidates=("a",), strategy="s", reason="why"), "odd"),
    ):
        with pytest.raises(BypassError) as caught:
            check_decision(decision, pool)
        assert caught.value.why == why


def decided(figure, chance):
    first = Candidate(model="a", score=figure, quality=figure, cost=figure)
    candidates = (first, Candidate(model="b", score=0.25))
    return Decision(candidates=candidates, strategy="s", reason="why", confidence=figure, probability=chance)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.array, Decimal, Fraction])
def test_figures_of_other_libraries_are_pythons_own(kind):
    """As a network gives them: a strategy with a score of numpy's float32 was passed over for every request."""
    found = plain_decision(decided(kind(0.5), kind(0.75)), POOL)
    assert found == decided(0.5, 0.75)
    first = found.candidates[0]
    figures = (first.score, first.quality, first.cost, found.confidence, found.probability)
    assert {type(one) for one in figures} == {float}
    json.dumps(figures)
    whole = plain_decision(decided(np.int64(3), None), POOL).candidates[0].score
    assert (whole, type(whole)) == (3, int)


def test_a_decision_of_pythons_figures_is_given_on_as_it_is():
    for one in (decided(0.5, 0.75), decided(3, None), Decision(**PLAIN)):
        assert plain_decision(one, POOL) is one


@pytest.mark.parametrize("odd", ["1", b"1", [1], np.array([1.0]), 1j, object()])
def test_figures_that_are_none_are_refused(odd):
    with pytest.raises(BypassError, match="a figure is no number"):
        plain_decision(decided(odd, 0.5), POOL)
    for none in (None, "a", [decided(0.5, 0.5)]):
        with pytest.raises(BypassError, match="it named no model"):
            plain_decision(none, POOL)


@pytest.mark.parametrize("chance", [0, 0.0, -0.5, 1.5, math.nan, math.inf, "1", [1]])
def test_a_probability_that_nothing_can_be_divided_by_or_that_is_none_is_refused(chance):
    """Off-policy estimates divide by it."""
    pool = Pool((Model(name="a"),))
    made = {"candidates": (Candidate(model="a", score=1.0),), "strategy": "s", "reason": "why"}
    with pytest.raises(BypassError, match="above 0 and at most 1"):
        check_decision(Decision(**made, probability=chance), pool)
    for usable in (None, 1, 1.0, 1e-9):
        check_decision(Decision(**made, probability=usable), pool)
