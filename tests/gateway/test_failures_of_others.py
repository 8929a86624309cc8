"""What a provider of others says went wrong: said so that it can be read, it is believed; else it is a fault of the provider, and no more.

A kind that is none, a time without end or a text for a number would break the end of an attempt off in the middle: its place at the
deployment and the money set aside for it would never come back.
"""

import asyncio
import enum
import sqlite3
from dataclasses import fields

import numpy as np
import pytest

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, RetryConfig
from anabranch.gateway.dispatch import Deployment, Dispatcher, Group, Plan
from anabranch.gateway.dispatch.provider_fault import LETTERS, OddFailureError, as_failure, checked
from anabranch.gateway.dispatch.shared_rooms import NoRoomError
from anabranch.gateway.dispatch.stream import LINGER_PIECES, linger
from anabranch.gateway.dispatch.upstream_stream import read_chunk
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.error_body import RETRY_AFTER_S, WORD_LETTERS
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.provider import Failure, UpstreamError, UpstreamRequest
from anabranch.routers.money import Price
from odd_errors import odd_failures

# The last is a word of the dispatcher's own, which takes it for "nothing was begun".
ODD = odd_failures() | {"NoRoomError": NoRoomError}
RAISING = ("build", "translator", "open", "read_some", "read_ready", "feed", "feed later", "parse", "error")
PLACES = (*RAISING, "error gives", "error in a stream")


class Odd(Mock, kind="odd_failures"):
    """Fails in one place, as soon as it is told to."""

    where, made, hits = None, None, 0

    def hit(self, where):
        if type(self).where == where:
            type(self).hits += 1
            raise type(self).made()

    def build(self, request):
        self.hit("build")
        return super().build(request)

    def parse(self, request, body):
        self.hit("parse")
        return super().parse(request, body)

    def translator(self, request):
        self.hit("translator")
        return _Translator(self) if type(self).where in ("feed", "feed later") else None

    def error(self, status, headers, body):
        self.hit("error")
        if type(self).where in ("error gives", "error in a stream"):
            type(self).hits += 1
            return getattr(type(self).made(), "failure", None)
        return super().error(status, headers, body)

    def transport(self, http):
        return _Transport(self, super().transport(http))


class _Translator:
    """Of chunks that are in OpenAI's form already."""

    is_done = False

    def __init__(self, provider):
        self._provider, self._count = provider, 0

    def feed(self, data):
        self._provider.hit("feed")
        self._count += 1
        # Behind the first token.
        if self._count > 2:
            self._provider.hit("feed later")
        return [read_chunk(data)]


class _Transport:
    def __init__(self, provider, inner):
        self._provider, self._inner = provider, inner

    async def open(self, call):
        self._provider.hit("open")
        return _Reply(self._provider, await self._inner.open(call))


class _Reply:
    def __init__(self, provider, inner):
        self._provider, self._inner = provider, inner
        self.headers, self._has_said = inner.headers, False
        self.status = 500 if Odd.where in ("error", "error gives") else inner.status

    def read_ready(self):
        self._provider.hit("read_ready")
        return b"" if Odd.where == "error in a stream" else self._inner.read_ready()

    async def read_some(self):
        self._provider.hit("read_some")
        if Odd.where == "error in a stream" and not self._has_said:
            self._has_said = True
            return b'event: error\ndata: {"error":{"message":"no"}}\n\n'
        return await self._inner.read_some()

    def close(self):
        return self._inner.close()


def settings(tmp_path):
    def model(name, made):
        deployment = DeploymentConfig(provider=made(model="m", tokens=40))
        return ModelConfig(name=name, max_tokens=50, price=Price.of_dollars(1, 1), deployments=(deployment,))

    models = (model("odd", Odd.Config), model("fine", Mock.Config))
    return GatewayConfig(
        models=models, require_key=False, retries=RetryConfig(attempts=1), store=str(tmp_path / "g.db")
    )


async def asked(gateway, model, is_stream, reads=None):
    """The class of what it failed with; None where an answer came, or ``reads`` pieces of a stream, which is closed then."""
    try:
        body = {"model": model, "stream": is_stream, "messages": [{"role": "user", "content": "x"}]}
        reply = await gateway.handle("chat", body)
        text = reply.body or b""
        if reply.stream is not None:
            async for piece in reply.stream:
                text += piece
                reads = None if reads is None else reads - 1
                if reads == 0:
                    await reply.stream.aclose()
                    break
        return "in the stream" if b'"error"' in text else None
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("where", PLACES)
def test_an_odd_failure_is_one_of_its_deployment_and_leaves_nothing_behind(tmp_path, monkeypatch, where):
    """Told as any other; nothing stays counted in, or set aside, and the deployment is asked again once it has rested."""
    config = settings(tmp_path)
    told = set()

    async def main():
        async with asyncio.timeout(240), Gateway(config) as gateway:
            [live] = gateway.runtime.dispatcher.groups["odd"].lives
            for name, made in ODD.items():
                monkeypatch.setattr(Odd, "made", made)
                monkeypatch.setattr(Odd, "hits", 0)
                for is_stream, reads in ((False, None), (True, None), (True, 1)):
                    monkeypatch.setattr(Odd, "where", where)
                    # Whatever opened its breaker is over.
                    live.breaker, live.rests_until = type(live.breaker)(), 0.0
                    told.add(await asked(gateway, "odd", is_stream, reads))
                    monkeypatch.setattr(Odd, "where", None)
                    assert live.rests_until <= gateway.runtime.dispatcher.now() + RETRY_AFTER_S, name
                    assert await asked(gateway, "fine", is_stream) is None, name
                    async with asyncio.timeout(60):
                        await gateway.settled()
                    assert [one.in_flight for one in gateway.runtime.dispatcher.lives()] == [0, 0], name
                    assert gateway.metrics_text()
                    live.breaker, live.rests_until = type(live.breaker)(), 0.0
                    assert await asked(gateway, "odd", is_stream) is None, name
                assert Odd.hits, "it was never called: the test would not see it fail"

    asyncio.run(main())
    assert told <= {None, "ApiError", "in the stream"}
    # What cannot be read without waiting is waited for.
    assert told != {None} or where == "read_ready"
    with sqlite3.connect(config.store) as store:
        assert store.execute("SELECT count(*) FROM reservations").fetchone() == (0,)


SAYS = {
    "raises": lambda status: (_ for _ in ()).throw(ValueError("by the provider")),
    "ends the process": lambda status: (_ for _ in ()).throw(SystemExit()),
    "says nothing": lambda status: None,
    "misspells": lambda status: Failure(kind="rate_limited", message="m", status=status),
    "leaves the status out": lambda status: Failure(kind="request", message="m"),
    "says it": lambda status: Failure(kind="request", message="m", status=status),
}
OTHERWISE = {
    "took too long": lambda status: Failure(kind="timeout", message="m"),
    "a proxy gave up": lambda status: Failure(kind="server", message="m", status=504),
}


class Refused(Mock, kind="refused_by_status"):
    """Answers with a status, of which its provider says what a test has it say."""

    status, says = 400, None

    def error(self, status, headers, body):
        return Refused.says(status)

    def transport(self, http):
        return _Refusing(super().transport(http))


class _Refusing:
    def __init__(self, inner):
        self._inner = inner

    async def open(self, call):
        reply = await self._inner.open(call)
        reply.status = Refused.status
        return reply


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("status", "said", "is_billed"),
    [
        *((status, said, False) for status in (400, 401, 422, 429, 500, 503) for said in SAYS),
        # Who waited for it may have given up, and the answer be made all the same.
        *((status, said, True) for status in (408, 504, 524) for said in SAYS),
        *((400, said, True) for said in OTHERWISE),
    ],
)
def test_an_answer_whose_status_says_that_it_was_refused_costs_nothing_unless_its_provider_says_so(
    tmp_path, monkeypatch, status, said, is_billed, is_stream
):
    """One that failed at reading a 400 was charged the most that the call may come to."""
    monkeypatch.setattr(Refused, "status", status)
    monkeypatch.setattr(Refused, "says", (SAYS | OTHERWISE)[said])
    deployment = DeploymentConfig(provider=Refused.Config(model="m", tokens=40))
    model = ModelConfig(name="m", max_tokens=50, price=Price.of_dollars(1, 1), deployments=(deployment,))
    config = GatewayConfig(
        models=(model,), require_key=False, retries=RetryConfig(attempts=1), store=str(tmp_path / "g.db")
    )

    async def main():
        async with asyncio.timeout(60), Gateway(config) as gateway:
            assert await asked(gateway, "m", is_stream) == "ApiError"
            await gateway.settled()

    asyncio.run(main())
    with sqlite3.connect(config.store) as store:
        [(cost_nano,)] = store.execute("SELECT cost_nano FROM ledger").fetchall()
    assert (cost_nano > 0) == is_billed


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_read_is_garbage_and_the_log_says_what(name, caplog):
    error = as_failure(ODD[name](), "m:d")
    assert error.failure.kind == "garbage"
    assert error.failure.message.startswith("the provider of m:d failed (")
    assert "the provider of deployment m:d failed" in caplog.text
    assert str(error.status)
    assert error.to_dict()


def test_every_field_is_looked_at():
    """A field that comes anew needs a look, and one here that is odd."""
    known = {name.split()[0] for name in ODD}
    assert {field.name for field in fields(Failure)} <= known


def test_the_log_says_which_field_and_what_may_stand_there():
    given = UpstreamError(Failure(kind="rate_limited", message="m"))
    with pytest.raises(
        OddFailureError, match="kind of a failure is 'rate_limited'; it must be one of connect, timeout"
    ):
        checked(given)
    with pytest.raises(OddFailureError, match="status of a failure is a list; it must be a whole number from 100 to"):
        checked(UpstreamError(Failure(kind="server", message="m", status=[500])))
    with pytest.raises(OddFailureError, match="retry_after_s of a failure is inf; it must be seconds from 0, or None"):
        checked(ODD["retry_after_s inf"]())


class Word(enum.StrEnum):
    """As some spell words."""

    LIMIT = "rate_limit"


def test_what_can_be_read_is_believed():
    given = Failure(
        kind=Word.LIMIT, message="m", status=np.int64(429), retry_after_s=np.float32(2.5), type="t", code="c", param="p"
    )
    found = checked(UpstreamError(given)).failure
    assert found == Failure(
        kind="rate_limit", message="m", status=429, retry_after_s=2.5, type="t", code="c", param="p"
    )
    assert [type(one) for one in (found.kind, found.status, found.retry_after_s)] == [str, int, float]
    whole = Failure(kind="request", message="", hint="credit", is_crowded=True)
    assert checked(UpstreamError(whole)).failure == whole


def test_times_are_held_to_what_is_believed_and_texts_to_what_is_passed_on():
    given = Failure(kind="rate_limit", message="x" * 10**6, retry_after_s=1e9, type="t" * 999, code="c" * 999)
    found = checked(UpstreamError(given)).failure
    assert found.retry_after_s == RETRY_AFTER_S
    assert [len(found.message), len(found.type), len(found.code)] == [LETTERS, WORD_LETTERS, WORD_LETTERS]


@pytest.mark.parametrize("status", [200, 302, 999])
def test_no_sender_is_told_that_all_is_well(status):
    assert UpstreamError(Failure(kind="busy", message="m", status=status)).status == 503


@pytest.mark.parametrize("name", ["kind misspelt", "retry_after_s inf", "without"])
def test_a_stream_that_is_judged_ends_its_attempt_too(monkeypatch, name):
    """It is read to its end before any of it is given."""
    monkeypatch.setattr(Odd, "where", "feed later")
    monkeypatch.setattr(Odd, "made", ODD[name])

    def group(model, made):
        return Group(name=model, deployments=(Deployment(name=model, provider=made.Config(model="m", tokens=40)),))

    async def main():
        dispatcher = Dispatcher([group("odd", Odd), group("fine", Mock)])
        plan = Plan(candidates=("odd", "fine"), deadline=dispatcher.now() + 60, accept=lambda model, answer: True)
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
        stream = await dispatcher.stream(plan, UpstreamRequest("chat", body))
        text = b"".join([piece async for piece in stream])
        stream.forget()
        await dispatcher.close()
        return text, stream.report, [live.in_flight for live in dispatcher.lives()]

    text, report, in_flight = asyncio.run(main())
    assert b"[DONE]" in text
    assert [attempt.status for attempt in report.attempts][-1] == "ok"
    assert {attempt.status for attempt in report.attempts[:-1]} == {"garbage"}
    assert report.model == "fine"
    assert in_flight == [0, 0]


def test_a_transport_that_always_has_more_ends_when_its_answer_has():
    """It never waits: nobody else would ever have a turn."""

    class Endless:
        num_reads, is_closed = 0, False

        async def read_some(self):
            self.num_reads += 1
            assert self.num_reads < 10**6
            return b": ping\n\n"

        def close(self):
            self.is_closed = True

    reply = Endless()
    asyncio.run(linger(reply))
    assert reply.is_closed
    assert reply.num_reads == LINGER_PIECES
