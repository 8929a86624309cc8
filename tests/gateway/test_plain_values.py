"""Numbers and truths of code of others, of whatever kind: taken where they equal one, and refused clearly where they do not."""

import asyncio
import json
import logging
import math
import sqlite3
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from anabranch.errors import ConfigError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.dispatch.provider_fault import checked
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.plain_values import number_of, plain_numbers, said, truth_of, whole_of
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.provider import Failure, UpstreamError, Usage
from anabranch.routers.money import Price

# Equal to the integer 12, as libraries give it; and what is none.
TWELVES = [
    12,
    12.0,
    np.int64(12),
    np.uint8(12),
    np.float32(12),
    np.float64(12),
    np.array(12),
    Decimal(12),
    Fraction(12),
]
NO_NUMBERS = [
    12.5,
    np.float32(12.5),
    math.nan,
    np.float64("inf"),
    True,
    np.True_,
    "12",
    b"12",
    [12],
    np.array([12]),
    (),
    -1,
    -1.0,
]
NO_NUMBERS += [10**400, np.datetime64(12, "s"), 12 + 0j, Decimal("nan"), object()]
TRUE = [True, np.True_, 1, 1.0, np.int8(1), np.array(True)]
FALSE = [False, np.False_, 0, 0.0, np.int8(0), np.array(False)]
NO_TRUTHS = ["yes", "", None, 2, -1, 0.5, math.nan, [], [True], np.array([True]), object()]


ASKED = {"model": "m", "messages": [{"role": "user", "content": "some words"}]}


def test_what_equals_a_number_or_a_truth():
    for one in TWELVES:
        assert (whole_of(one), type(whole_of(one)), truth_of(one)) == (12, int, None)
    for one in NO_NUMBERS:
        assert whole_of(one) in (None, -1, 10**400)
    assert [truth_of(one) for one in TRUE] == [True] * len(TRUE)
    assert [truth_of(one) for one in FALSE] == [False] * len(FALSE)
    assert [truth_of(one) for one in NO_TRUTHS] == [None] * len(NO_TRUTHS)
    assert [said(one) for one in (None, 12.5, "yes", np.float32(1), 10**5000)] == [
        "None",
        "12.5",
        "'yes'",
        "a float32",
        "an integer of about 5001 digits",
    ]


# Which of them were made integers.
made_integers = []


class Noted(Decimal):
    def __int__(self):
        made_integers.append(self)
        return super().__int__()


class NotedFraction(Fraction):
    def __int__(self):
        made_integers.append(self)
        return super().__trunc__()

    __trunc__ = __int__


LONG = [
    *("1e200000", "-1e200000", "1e3000000", "1e999999999999999999", "12" + "0" * 400, "9.5e309", "nan", "inf", "-inf"),
    "snan",
]


@pytest.mark.parametrize(
    "value",
    [*map(Noted, LONG), NotedFraction(10**400), NotedFraction(10**100_000, 3), NotedFraction(-(10**400))],
    ids=range(len(LONG) + 3),
)
def test_what_is_longer_than_any_float_is_no_number_and_not_made_an_integer(value):
    """Of 1e200000, which is short to say, that took seconds, on the event loop."""
    made_integers.clear()
    assert whole_of(value) is None
    assert truth_of(value) is None
    assert number_of(value) is None or not math.isfinite(number_of(value))
    assert made_integers == []


@pytest.mark.parametrize(
    ("value", "whole"),
    [
        (Decimal("0e3000000"), 0),
        (Decimal("1e-3000000"), None),
        (Decimal("1e308"), 10**308),
        (Decimal("12." + "0" * 10_000), 12),
        (Decimal("12." + "0" * 400 + "1"), None),
        (Fraction(10**300), 10**300),
        (Fraction(10**400 + 1, 10**400), None),
        (10**5000, 10**5000),
        ("1" * 10_000, None),
    ],
    ids=range(9),
)
def test_long_numbers_that_equal_an_integer_are_that(value, whole):
    assert (whole_of(value), type(whole_of(value))) == (whole, type(whole))


class Raising:
    """What cannot even be looked at."""

    shape = ()

    def item(self):
        raise SystemExit


class Counting(Mock, kind="counting"):
    """Says of a prompt, of an answer and of itself what a test has it say."""

    text = prompt = usage = 0
    failed = crowded = False
    status = None

    @property
    def has_failed(self):
        return type(self).failed

    async def prompt_tokens(self, call):
        return type(self).prompt

    def counter(self, text):
        return type(self).text

    def parse(self, request, body):
        answer = super().parse(request, body)
        answer.usage = Usage(type(self).usage, type(self).usage)
        return answer


def counting(tmp_path):
    deployment = DeploymentConfig(provider=Counting.Config(model="m", tokens=4))
    model = ModelConfig(name="m", max_tokens=50, price=Price.of_dollars(1, 1), deployments=(deployment,))
    return GatewayConfig(models=(model,), require_key=False, store=str(tmp_path / "g.db"))


class Telling:
    """Tells of a stream the counts that a test has it tell: at its end, or only as what was said so far."""

    def __init__(self):
        self.is_done, self.told = False, None

    def feed(self, data):
        if b"[DONE]" in data:
            self.is_done = True
            return []
        chunk = json.loads(data)
        count = Streaming.usage
        if Streaming.says_so_far:
            self.told = Usage(count, count, count)
            chunk.pop("usage", None)
        elif chunk.get("usage"):
            details = {"cached_tokens": count, "other": None}
            chunk["usage"] = {
                "prompt_tokens": count,
                "completion_tokens": count,
                "total_tokens": count,
                "prompt_tokens_details": details,
                "completion_tokens_details": {"audio_tokens": count},
            }
        return [chunk]


class Streaming(Mock, kind="streaming_counts"):
    usage, says_so_far = 0, False
    is_billed = True

    def translator(self, request):
        return Telling()


def stream_of(tmp_path, monkeypatch, values, *, says_so_far=False):
    """What streams that tell these counts tell their reader of them."""
    monkeypatch.setattr(Streaming, "says_so_far", says_so_far)
    deployment = DeploymentConfig(provider=Streaming.Config(model="m", tokens=4))
    model = ModelConfig(name="m", max_tokens=50, price=Price.of_dollars(1, 1), deployments=(deployment,))
    config = GatewayConfig(models=(model,), require_key=False, store=str(tmp_path / "g.db"))
    asked = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}

    async def main():
        told = []
        async with asyncio.timeout(60), Gateway(config) as gateway:
            for value in values:
                monkeypatch.setattr(Streaming, "usage", value)
                reply = await gateway.handle("chat", asked)
                events = b"".join([piece async for piece in reply.stream]).split(b"\n\n")
                chunks = [json.loads(one[6:]) for one in events if one.startswith(b"data: {")]
                told.append([chunk["usage"] for chunk in chunks if chunk.get("usage")])
                await gateway.settled()
        return told

    return asyncio.run(main())


def test_counts_of_a_stream_are_taken_as_those_of_a_whole_answer(tmp_path, monkeypatch):
    """Numpy's 12 was as if none had been told, and stood in quotes in what its reader was told."""
    told = stream_of(tmp_path, monkeypatch, TWELVES)
    assert {row[:2] for row in rows_of(tmp_path)} == {(12, 12)}
    assert len(set(rows_of(tmp_path))) == 1
    assert told == [told[0]] * len(TWELVES)
    assert told[0][-1]["prompt_tokens_details"]["cached_tokens"] == 12
    stream_of(tmp_path, monkeypatch, NO_NUMBERS)
    refused = rows_of(tmp_path)[len(TWELVES) :]
    assert len(refused) == len(NO_NUMBERS)
    assert {row[:2] for row in refused}.isdisjoint({(12, 12)})
    assert len({row[:2] for row in refused}) == 1


def test_counts_that_are_told_so_far_are_taken_likewise(tmp_path, monkeypatch):
    stream_of(tmp_path, monkeypatch, TWELVES, says_so_far=True)
    taken = rows_of(tmp_path)
    assert len(set(taken)) == 1
    assert taken[0][0] == 12
    stream_of(tmp_path, monkeypatch, [one for one in NO_NUMBERS if one is not True], says_so_far=True)
    refused = rows_of(tmp_path)[len(taken) :]
    assert len(refused) == len(NO_NUMBERS) - 1
    assert 12 not in {row[0] for row in refused}


def test_a_table_has_numbers_of_ours_for_those_of_others():
    given = {
        "a": np.int64(3),
        "b": [np.float32(0.5), Decimal(2)],
        "c": {"d": np.True_, "e": "x", "f": np.array([1, 2])},
    }
    made = plain_numbers(given)
    assert made == {"a": 3, "b": [0.5, 2], "c": {"d": True, "e": "x", "f": given["c"]["f"]}}
    assert [type(one) for one in (made["a"], *made["b"], made["c"]["d"])] == [int, float, int, bool]
    circle = {}
    circle["circle"] = circle
    assert plain_numbers(circle)["circle"]["circle"]["circle"]["circle"] is circle


def rows_of(tmp_path):
    with sqlite3.connect(tmp_path / "g.db") as store:
        return store.execute(
            "SELECT prompt_tokens, completion_tokens, cost_nano, reserved_nano FROM ledger ORDER BY ts_us"
        ).fetchall()


@pytest.mark.parametrize("where", ["text", "prompt", "usage"])
def test_counts_of_any_kind_that_equal_an_integer_are_that_and_others_are_none(tmp_path, monkeypatch, caplog, where):
    """Of a text, of a prompt, of an answer: 12.0 was no number, and numpy's 12 was left out without a word."""

    async def main(values):
        async with asyncio.timeout(60), Gateway(counting(tmp_path)) as gateway:
            for value in values:
                monkeypatch.setattr(Counting, where, value)
                await gateway.handle("chat", ASKED)
                await gateway.settled()

    monkeypatch.setattr(Counting, "text", 3)
    monkeypatch.setattr(Counting, "prompt", None)
    monkeypatch.setattr(Counting, "usage", 5)
    with caplog.at_level(logging.WARNING):
        asyncio.run(main(TWELVES))
    taken = rows_of(tmp_path)
    assert len(set(taken)) == 1
    assert not caplog.text
    if where == "usage":
        assert taken[0][:2] == (12, 12)
    # Of usage that is none the most is charged, without a word; what cannot be looked at is no answer.
    odd = NO_NUMBERS if where == "usage" else [*NO_NUMBERS, Raising()]
    with caplog.at_level(logging.WARNING):
        asyncio.run(main(odd))
    refused = rows_of(tmp_path)[len(taken) :]
    assert set(refused).isdisjoint(taken)
    if where != "usage":
        assert len(set(refused)) == 1
        assert caplog.text.count("count a ") == len(odd)


def test_truths_of_any_kind_are_those_and_others_are_none(tmp_path, monkeypatch, caplog):
    def given_up(gateway, value):
        monkeypatch.setattr(Counting, "failed", value)
        return gateway.runtime.given_up

    async def main():
        async with asyncio.timeout(60), Gateway(counting(tmp_path)) as gateway:
            assert [given_up(gateway, one) for one in TRUE] == [["m"]] * len(TRUE)
            assert [given_up(gateway, one) for one in FALSE] == [[]] * len(FALSE)
            assert not caplog.text
            assert [given_up(gateway, one) for one in [*NO_TRUTHS, Raising()]] == [[]] * (len(NO_TRUTHS) + 1)

    asyncio.run(main())
    assert caplog.text.count("has_failed is ") == len(NO_TRUTHS)
    assert caplog.text.count("it must be true or false") == len(NO_TRUTHS)
    assert caplog.text.count("cannot say whether it has failed") == 1


@pytest.mark.parametrize(
    ("fields", "field", "equal"),
    [
        *(({"kind": "busy", "status": status}, "status", 503) for status in (503.0, np.int16(503), np.array(503))),
        *(({"kind": "busy", "is_crowded": one}, "is_crowded", True) for one in TRUE),
        *(({"kind": "busy", "is_crowded": one}, "is_crowded", False) for one in FALSE),
    ],
)
def test_numbers_and_truths_of_a_failure_are_taken_likewise(fields, field, equal):
    found = getattr(checked(UpstreamError(Failure(message="m", **fields))).failure, field)
    assert (found, type(found)) == (equal, type(equal))


class Sized(Mock, kind="sized"):
    """Says how much context it has: at once, or once it has started."""

    made, started, now = None, None, None

    @property
    def context(self):
        if isinstance(Sized.now, type):
            raise Sized.now("by the provider")
        return Sized.now

    def __init__(self, config):
        super().__init__(config)
        Sized.now = Sized.made

    async def start(self):
        Sized.now = Sized.started


def context_of(tmp_path, monkeypatch, made, started):
    """Of the model, once the gateway has started."""
    monkeypatch.setattr(Sized, "made", made)
    monkeypatch.setattr(Sized, "started", started)
    deployment = DeploymentConfig(provider=Sized.Config(model="m"))
    models = (ModelConfig(name="m", deployments=(deployment,)),)

    async def main():
        config = GatewayConfig(models=models, require_key=False, store=str(tmp_path / "g.db"))
        async with asyncio.timeout(60), Gateway(config) as gateway:
            return gateway.runtime.models["m"].context

    return asyncio.run(main())


@pytest.mark.parametrize("value", TWELVES)
def test_a_context_that_equals_an_integer_is_that(tmp_path, monkeypatch, value):
    for made in (None, value):
        found = context_of(tmp_path, monkeypatch, made, value)
        assert (found, type(found)) == (12, int)
    assert context_of(tmp_path, monkeypatch, value, None) is None


FAILING = [Raising(), ValueError, AttributeError, SystemExit]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 0.0])
def test_a_context_that_is_no_number_of_tokens_is_told_once_its_provider_has_started(tmp_path, monkeypatch, value):
    """A text fell over its first request, and 0 refused each. Before, it may stand for what is not known yet."""
    said = r"deployment m: context of its provider \(sized\) is .*; it must be a whole number"
    for made in (value, None, ValueError):
        with pytest.raises(ConfigError, match=said):
            context_of(tmp_path, monkeypatch, made, value)
    assert context_of(tmp_path, monkeypatch, value, 12) == 12
    assert context_of(tmp_path, monkeypatch, value, None) is None


@pytest.mark.parametrize("value", FAILING)
def test_a_provider_need_not_know_its_context_until_it_has_started(tmp_path, monkeypatch, value):
    """It was asked when it was made: one that reads it from what it starts kept the gateway from starting."""
    assert context_of(tmp_path, monkeypatch, value, 12) == 12
    assert context_of(tmp_path, monkeypatch, value, None) is None
    for made in (None, 12, value):
        with pytest.raises(ConfigError, match=r"deployment m: its provider \(sized\) cannot say its context: "):
            context_of(tmp_path, monkeypatch, made, value)
