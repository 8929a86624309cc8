"""Transports, replies and translators of providers of others: whatever they raise is a failure of their deployment, and of nothing else."""

import asyncio
import contextvars
import logging
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, RetryConfig, StrategyConfig
from anabranch.gateway.dispatch.plain_transport import PlainTransport, plain_transport
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock, MockTransport
from anabranch.gateway.providers.provider import HttpCall, UpstreamError
from anabranch.routers.contract.query import Candidate, Decision
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.money import Price
from anabranch.web import own_task
from odd_errors import LEFT_CANCELLED, UNUSUAL

# Ctrl-C cannot be told on the event loop.
ERRORS = (ValueError, RecursionError, TimeoutError, *(one for one in UNUSUAL if one is not KeyboardInterrupt))
PLACES = ("open", "status", "headers", "read_ready", "read_some", "close", "feed", "is_done", "told")


class Hostile(Mock, kind="hostile_transport"):
    """Raises in one place, as soon as it is told to."""

    where, error, count = None, None, 0

    def hit(self, where):
        if type(self).where == where:
            type(self).count += 1
            raise type(self).error("by the provider")

    def translator(self, request):
        return _Translator(self)

    def transport(self, http):
        return _Transport(self, super().transport(http))


class _Translator:
    """Of chunks that are in OpenAI's form already."""

    def __init__(self, provider):
        self._provider, self._is_done = provider, False

    def feed(self, data):
        from anabranch.gateway.dispatch.upstream_stream import read_chunk

        self._provider.hit("feed")
        chunk = read_chunk(data)
        # It is for `told` to say.
        chunk.pop("usage", None)
        return [chunk]

    @property
    def is_done(self):
        self._provider.hit("is_done")
        return self._is_done

    @property
    def told(self):
        self._provider.hit("told")


class _Transport:
    def __init__(self, provider, inner):
        self._provider, self._inner = provider, inner

    async def open(self, call):
        self._provider.hit("open")
        return _Reply(self._provider, await self._inner.open(call))


class _Reply:
    def __init__(self, provider, inner):
        self._provider, self._inner = provider, inner

    @property
    def status(self):
        self._provider.hit("status")
        return self._inner.status

    @property
    def headers(self):
        self._provider.hit("headers")
        return {name.title(): value for name, value in self._inner.headers.items()}

    def read_ready(self):
        self._provider.hit("read_ready")
        return self._inner.read_ready()

    async def read_some(self):
        self._provider.hit("read_some")
        return await self._inner.read_some()

    def close(self):
        self._provider.hit("close")
        return self._inner.close()


def settings(tmp_path, **fields):
    def model(name, made):
        deployment = DeploymentConfig(provider=made(model="m", tokens=4, **fields))
        return ModelConfig(name=name, max_tokens=10, price=Price.of_dollars(1, 1), deployments=(deployment,))

    models = (model("odd", Hostile.Config), model("fine", Mock.Config))
    retries = RetryConfig(attempts=1)
    return GatewayConfig(models=models, require_key=False, retries=retries, store=str(tmp_path / "g.db"))


async def asked(gateway, model, is_stream, reads=None):
    """Whether an answer came, whole; of a stream ``reads`` pieces are read."""
    try:
        body = {"model": model, "stream": is_stream, "messages": [{"role": "user", "content": "x"}]}
        reply = await gateway.handle("chat", body)
    except Exception:
        return False
    if reply.stream is None:
        return bool(reply.body)
    text = b""
    async with asyncio.timeout(60):
        async for piece in reply.stream:
            text += piece
            reads = None if reads is None else reads - 1
            if reads == 0:
                await reply.stream.aclose()
                return True
    return b"[DONE]" in text and b'"error"' not in text


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_transport_raises_is_a_failure_of_its_deployment(tmp_path, monkeypatch, where, error):
    monkeypatch.setattr(Hostile, "count", 0)

    async def main():
        async with asyncio.timeout(60), Gateway(settings(tmp_path)) as gateway:
            monkeypatch.setattr(Hostile, "error", error)
            for is_stream, reads in ((False, None), (True, None), (True, 1)):
                monkeypatch.setattr(Hostile, "where", where)
                await asked(gateway, "odd", is_stream, reads)
                monkeypatch.setattr(Hostile, "where", None)
                assert await asked(gateway, "fine", is_stream)
                await gateway.settled()
                groups = gateway.runtime.dispatcher.groups
                assert [groups[name].lives[0].in_flight for name in ("odd", "fine")] == [0, 0]
            task = asyncio.current_task()
            assert task is not None
            assert not task.cancelling()
        assert not own_task._alive

    asyncio.run(main())
    assert Hostile.count, "it was never called: the test would not see it fail"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("left", LEFT_CANCELLED)
def test_what_a_transport_leaves_cancelled_is_no_request(tmp_path, monkeypatch, left, is_stream):
    """One that asked two servers at once, of which one failed, had its answers dropped and charged."""

    async def opens(self, call):
        await LEFT_CANCELLED[left]()
        return _Reply(self._provider, await self._inner.open(call))

    async def reads(self):
        await LEFT_CANCELLED[left]()
        return await self._inner.read_some()

    async def fails(self):
        await LEFT_CANCELLED[left]()
        raise ConnectionError("by the provider")

    async def counts(call):
        await LEFT_CANCELLED[left]()
        return 3

    async def main():
        async with asyncio.timeout(60), Gateway(settings(tmp_path)) as gateway:
            monkeypatch.setattr(_Transport, "open", opens)
            monkeypatch.setattr(_Reply, "read_some", reads)
            monkeypatch.setattr(gateway.runtime.dispatcher.groups["odd"].lives[0].provider, "prompt_tokens", counts)
            assert await asked(gateway, "odd", is_stream)
            monkeypatch.setattr(_Reply, "read_some", fails)
            # A stream of it may have come whole at once.
            assert is_stream or not await asked(gateway, "odd", is_stream)
            assert await asked(gateway, "fine", is_stream)
            await gateway.settled()
            task = asyncio.current_task()
            assert task is not None
            assert not task.cancelling()
            return [live.in_flight for live in gateway.runtime.dispatcher.lives()]

    assert asyncio.run(main()) == [0, 0]


def test_one_that_behaves_answers(tmp_path):
    """Its headers are read in small letters, however it writes them."""

    async def main():
        async with asyncio.timeout(60), Gateway(settings(tmp_path)) as gateway:
            answered = [await asked(gateway, "odd", is_stream) for is_stream in (False, True)]
        assert not own_task._alive, "of each call that has ended a task stays"
        return answered

    assert asyncio.run(main()) == [True, True]


def test_a_reply_has_ended_before_its_provider_is_closed(tmp_path, monkeypatch):
    """What it does about its end is not cut off by the end of the gateway."""
    order, is_reading = [], asyncio.Event()

    async def reads(self):
        try:
            is_reading.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            order.append("tidied up")

    async def closes(self):
        order.append("provider")

    monkeypatch.setattr(_Reply, "read_some", reads)
    monkeypatch.setattr(_Reply, "read_ready", lambda self: b"")
    monkeypatch.setattr(_Reply, "close", lambda self: order.append("reply"))
    monkeypatch.setattr(Hostile, "close", closes)

    async def main():
        async with asyncio.timeout(60), Gateway(settings(tmp_path)) as gateway:
            asking = asyncio.ensure_future(asked(gateway, "odd", True))
            await is_reading.wait()
            asking.cancel()
            await asyncio.wait([asking])
        order.append("gateway")

    asyncio.run(main())
    assert order == ["tidied up", "reply", "provider", "gateway"]


class Never(Strategy):
    """Finds no answer good enough."""

    reads_answers = True

    def route(self, query, pool):
        candidates = tuple(Candidate(model=name, score=0.0) for name in ("odd", "fine"))
        return Decision(candidates=candidates, strategy="never", reason="so")

    def accept(self, query, model, answer, details):
        return model == "fine"


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_that_is_not_accepted_is_closed(tmp_path, is_stream):
    config = settings(tmp_path).replace(strategies={"never": StrategyConfig(use="static")})

    async def main():
        async with asyncio.timeout(60), Gateway(config, strategies={"never": Never(None)}) as gateway:
            assert await asked(gateway, "auto/never", is_stream)
            await gateway.settled()
            assert [live.in_flight for live in gateway.runtime.dispatcher.lives()] == [0, 0]
        assert not own_task._alive

    asyncio.run(main())


def test_ours_is_not_wrapped():
    http = MockTransport(None)
    assert plain_transport(http, http, "d") is http
    assert isinstance(plain_transport(MockTransport(None), http, "d"), PlainTransport)


class Scripted:
    """A reply made of values."""

    def __init__(self, status=200, headers=None, data=b""):
        self.status, self.headers, self.data, self.is_closed = status, headers or {}, data, False

    async def open(self, call):
        return self

    def read_ready(self):
        return self.data

    async def read_some(self):
        return self.data

    def close(self):
        self.is_closed = True


async def opened(reply):
    return await PlainTransport(reply, "m:d").open(HttpCall("", {}, b""))


@pytest.mark.parametrize(("given", "wanted"), [(b"a", b"a"), (bytearray(b"a"), b"a"), (memoryview(b"a"), b"a")])
def test_bytes_of_any_kind_are_read(given, wanted):
    async def main():
        reply = await opened(Scripted(data=given))
        return reply.read_ready(), await reply.read_some()

    assert asyncio.run(main()) == (wanted, wanted)


@pytest.mark.parametrize("given", ["text", None, 3])
def test_what_is_no_bytes_is_refused(given):
    async def main():
        reply = await opened(Scripted(data=given))
        for read in (reply.read_ready, reply.read_some):
            with pytest.raises(UpstreamError, match=f"gave {type(given).__name__} where bytes are due"):
                await read() if read == reply.read_some else read()

    asyncio.run(main())


def test_a_reply_whose_head_cannot_be_read_is_closed():
    reply = Scripted(status="none")
    with pytest.raises(UpstreamError, match="ValueError") as caught:
        asyncio.run(opened(reply))
    assert caught.value.failure.kind == "garbage"
    assert reply.is_closed


def test_of_a_header_that_comes_twice_the_first_counts():
    reply = asyncio.run(opened(Scripted(headers={"Retry-After": 3, "retry-after": 4})))
    assert reply.headers == {"retry-after": "3"}


def test_headers_are_found_however_they_are_spelt():
    """As in ours, which a provider's own `error` reads."""
    headers = asyncio.run(opened(Scripted(headers={"RETRY-AFTER": 3}))).headers
    for name in ("Retry-After", "retry-after", "RETRY-AFTER"):
        assert headers[name] == headers.get(name) == "3"
        assert name in headers
    assert headers.get("X-None") is None
    assert headers.get("X-None", "") == ""
    assert 5 not in headers


def test_its_own_time_out_is_one():
    class Slow(Scripted):
        async def read_some(self):
            raise TimeoutError

    async def main():
        with pytest.raises(UpstreamError) as caught:
            await (await opened(Slow())).read_some()
        return caught.value.failure.kind

    assert asyncio.run(main()) == "timeout"


@given(
    pieces=st.lists(st.tuples(st.binary(min_size=1, max_size=3), st.integers(0, 4)), max_size=6),
    cuts=st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=12),
    swallows=st.booleans(),
)
def test_no_byte_is_lost_or_moved_where_reads_are_cancelled(pieces, cuts, swallows):
    """As at heartbeats: whenever it is, and whatever a transport makes of a cancel; what has come may be asked for between."""

    class Slow(Scripted):
        def __init__(self):
            super().__init__()
            self.left, self.is_reading = list(pieces), False

        def read_ready(self):
            assert not self.is_reading
            return b""

        async def read_some(self):
            assert not self.is_reading
            self.is_reading = True
            try:
                data, ticks = self.left[0] if self.left else (b"", 1)
                for _ in range(ticks):
                    try:
                        await asyncio.sleep(0)
                    except asyncio.CancelledError:
                        if not swallows:
                            raise
                del self.left[:1]
                return data
            finally:
                self.is_reading = False

    async def main():
        reply, found = await opened(Slow()), b""
        for ticks, asks in cuts:
            reading = asyncio.ensure_future(reply.read_some())
            for _ in range(ticks):
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait({reading})
            if not reading.cancelled():
                found += reading.result()
            if asks:
                found += reply.read_ready()
        while data := await reply.read_some():
            found += data
        reply.close()
        return found

    assert asyncio.run(main()) == b"".join(data for data, _ in pieces)


def test_what_lies_behind_a_read_that_nobody_waited_for_has_come_too():
    """As after a heartbeat: what is charged of who goes away is what was made."""

    class Ahead(Scripted):
        async def read_some(self):
            data, self.data = self.data[:1], self.data[1:]
            return data

        def read_ready(self):
            data, self.data = self.data, b""
            return data

    async def main(ticks):
        reply = await opened(Ahead(data=b"abcdef"))
        reading = asyncio.ensure_future(reply.read_some())
        for _ in range(ticks):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait({reading})
        found = b"" if reading.cancelled() else reading.result()
        await asyncio.sleep(0)
        found += reply.read_ready()
        reply.close()
        return found

    for ticks in range(6):
        assert asyncio.run(main(ticks)) == b"abcdef"


@pytest.mark.parametrize("ticks", range(6))
def test_what_has_come_is_given_before_what_broke_behind_it(ticks):
    """Whether what read has come, has not begun, or reads: nothing of either is lost, and the fault is the transport's own."""

    class Breaks(Scripted):
        is_broken = False

        async def read_some(self):
            await asyncio.sleep(0)
            if self.is_broken:
                raise ConnectionResetError
            self.is_broken = True
            return b"a"

        def read_ready(self):
            if self.is_broken:
                raise ConnectionResetError
            return b""

    async def main():
        reply, found = await opened(Breaks()), b""
        reading = asyncio.ensure_future(reply.read_some())
        for _ in range(ticks):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait({reading})
        found += b"" if reading.cancelled() else reading.result()

        async def rest():
            nonlocal found
            for _ in range(9):
                found += reply.read_ready()
                await asyncio.sleep(0)
            while True:
                found += await reply.read_some()

        with pytest.raises(UpstreamError, match="ConnectionResetError"):
            await rest()
        assert found == b"a"
        reply.close()

    asyncio.run(main())


def test_what_fails_once_where_nobody_waits_is_told_to_who_waits():
    class Once(Scripted):
        def read_ready(self):
            raise ConnectionResetError

        async def read_some(self):
            await asyncio.Event().wait()

    async def main():
        reply = await opened(Once())
        for _ in range(2):
            with pytest.raises(UpstreamError, match="ConnectionResetError"):
                reply.read_ready()
        with pytest.raises(UpstreamError, match="ConnectionResetError"):
            await reply.read_some()
        reply.close()

    asyncio.run(main())


def test_what_was_read_for_nobody_and_cannot_be_taken_is_a_failure_of_the_transport():
    class Released(Scripted):
        async def read_some(self):
            view = memoryview(b"ab")
            view.release()
            return view

    async def main():
        reply = await opened(Released())
        reading = asyncio.ensure_future(reply.read_some())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait({reading})
        for _ in range(3):
            await asyncio.sleep(0)
        with pytest.raises(UpstreamError, match="ValueError"):
            reply.read_ready()
        reply.close()

    asyncio.run(main())


def test_a_closed_reply_is_closed_once_and_has_nothing_more():
    closed = []

    class Closes(Scripted):
        def close(self):
            closed.append(self)

        async def read_some(self):
            assert not closed
            return b"a"

    async def main():
        reply = await opened(Closes(data=b"b"))
        assert await reply.read_some() == b"a"
        for _ in range(2):
            reply.close()
            assert reply.read_ready() == b""
            assert await reply.read_some() == b""
            await asyncio.sleep(0)

    asyncio.run(main())
    assert len(closed) == 1


def test_what_it_keeps_of_its_task_and_its_context_holds_from_open_to_close():
    """As limiters and groups of tasks of anyio want it, and variables of a context."""
    variable, tasks = contextvars.ContextVar("variable"), []

    class Owned(Scripted):
        async def open(self, call):
            variable.set("mine")
            tasks.append(asyncio.current_task())
            return self

        async def read_some(self):
            assert variable.get() == "mine"
            tasks.append(asyncio.current_task())
            return b""

        def close(self):
            assert variable.get() == "mine"
            tasks.append(asyncio.current_task())

    async def main():
        reply = await opened(Owned())
        await asyncio.ensure_future(reply.read_some())
        await reply.read_some()
        reply.close()
        while len(tasks) < 4:
            await asyncio.sleep(0)
        assert tasks == tasks[:1] * 4
        # Of whoever waited it is none.
        assert variable.get(None) is None

    asyncio.run(main())


@pytest.mark.parametrize("goes_on", [False, True, "for long"])
def test_a_reply_that_comes_for_nobody_is_closed(monkeypatch, goes_on):
    monkeypatch.setattr(own_task, "GRACE_S", 0.01)
    reply = Scripted()

    class Late(Scripted):
        async def open(self, call):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if not goes_on:
                    raise
            if goes_on == "for long":
                await asyncio.sleep(0.1)
            return reply

    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await opened(Late())
        assert reply.is_closed == (goes_on is True)
        async with asyncio.timeout(60):
            while own_task._alive:
                await asyncio.sleep(0.01)

    asyncio.run(main())
    assert reply.is_closed == bool(goes_on)


def test_of_answers_that_are_not_accepted_the_last_is_held_alone(tmp_path, monkeypatch):
    """And none where whoever asked goes away while one is judged."""
    judging, closed = asyncio.Event(), []
    close = _Reply.close
    monkeypatch.setattr(_Reply, "close", lambda self: closed.append(self) or close(self))

    class Judge(Never):
        is_async = True
        num_judged = 0

        async def aroute(self, query, pool, ask):
            candidates = tuple(Candidate(model=name, score=0.0) for name in ("odd", "odd2", "odd3", "fine"))
            return Decision(candidates=candidates, strategy="never", reason="so")

        async def aaccept(self, query, model, answer, details, ask):
            self.num_judged += 1
            if self.num_judged == 3:
                async with asyncio.timeout(60):
                    while not closed:
                        await asyncio.sleep(0)
                judging.set()
                await asyncio.Event().wait()
            return False

    config = settings(tmp_path).replace(strategies={"never": StrategyConfig(use="static")})
    odd, fine = config.models
    config = config.replace(models=(odd, odd.replace(name="odd2"), odd.replace(name="odd3"), fine))

    async def main():
        async with asyncio.timeout(60), Gateway(config, strategies={"never": Judge(None)}) as gateway:
            asking = asyncio.ensure_future(asked(gateway, "auto/never", True))
            await judging.wait()
            assert len(closed) == 1
            asking.cancel()
            await asyncio.wait([asking])
            await gateway.settled()
        assert not own_task._alive

    asyncio.run(main())
    assert len(closed) == 3


def test_whoever_waits_is_cancelled_as_ever():
    class Endless(Scripted):
        async def read_some(self):
            await asyncio.Event().wait()

    async def main():
        reply = await opened(Endless())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await reply.read_some()

    asyncio.run(main())


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("error", [*(one for one in ERRORS if one is not GeneratorExit), None])
def test_a_cancel_that_a_transport_turns_into_something_else_is_one(tmp_path, monkeypatch, error, is_stream):
    """Another deployment would be asked, and charged, for a client that has gone. None: it goes on as if nothing had been."""
    num_opened, waiting = [], asyncio.Event()

    async def waits(self, call):
        num_opened.append(call)
        try:
            waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if error is not None:
                raise error("by the provider") from None
        return await MockTransport.open(self._inner, call)

    monkeypatch.setattr(_Transport, "open", waits)
    config = settings(tmp_path)
    odd = config.models[0]
    # What costs something is read on.
    twice = odd.replace(deployments=odd.deployments * 2, price=Price.of_dollars(0, 0))
    config = config.replace(models=(twice, config.models[1]), retries=RetryConfig(attempts=3, base_s=0.001))

    async def main():
        async with asyncio.timeout(60), Gateway(config) as gateway:
            asking = asyncio.ensure_future(
                gateway.handle(
                    "chat", {"model": "odd", "stream": is_stream, "messages": [{"role": "user", "content": "x"}]}
                )
            )
            await waiting.wait()
            asking.cancel()
            await asyncio.wait([asking])
            assert asking.cancelled()
            await gateway.settled()
            return [live.in_flight for live in gateway.runtime.dispatcher.lives()]

    assert asyncio.run(main()) == [0, 0, 0]
    assert len(num_opened) == 1


@pytest.mark.parametrize("error", [one for one in ERRORS if one is not TimeoutError])
def test_counters_and_numbers_of_a_provider_are_left_out_where_they_fail(tmp_path, monkeypatch, caplog, error):
    def fail(*arguments):
        raise error("by the provider")

    async def failing(call):
        fail()

    async def main():
        async with asyncio.timeout(60), Gateway(settings(tmp_path)) as gateway:
            live = gateway.runtime.dispatcher.groups["odd"].lives[0]
            monkeypatch.setattr(live.provider, "prompt_tokens", failing)
            monkeypatch.setattr(live.provider, "series", fail)
            assert await asked(gateway, "odd", False)
            text = gateway.metrics_text()
            assert b"anabranch" in text
            monkeypatch.setattr(live.provider, "series", lambda: b"# \xff")
            assert gateway.metrics_text()
            monkeypatch.setattr(live.provider, "series", lambda: b"# TYPE own_total counter\nown_total 3\n")
            assert b'own_total{deployment="' in gateway.metrics_text()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert "cannot count a prompt" in caplog.text
    assert caplog.text.count("are left out") == 2


def failing_with(error):
    def fail(*arguments):
        raise error("by the provider")

    return fail


# Of a text of nine letters.
NONSENSE = [-(10**6), 10**30, float("nan"), float("inf"), 3.9, "4", None, True]
UNCOUNTED = [*(failing_with(error) for error in ERRORS), *((lambda text, found=found: found) for found in NONSENSE)]


@pytest.mark.parametrize("counter", UNCOUNTED)
def test_a_counter_that_cannot_count_leaves_an_estimate(tmp_path, monkeypatch, caplog, counter):
    def count(given):
        async def main():
            monkeypatch.setattr(Hostile, "counter", given)
            async with asyncio.timeout(60), Gateway(settings(tmp_path)) as gateway:
                assert set(gateway.runtime.counters) == ({"odd"} if given else set())
                body = {"model": "odd", "messages": [{"role": "user", "content": "some text"}]}
                reply = await gateway.handle("chat", body)
                await gateway.settled()
                return reply.headers["x-route-model"]

        assert asyncio.run(main()) == "odd"
        with sqlite3.connect(tmp_path / "g.db") as store:
            [row] = store.execute("SELECT reserved_nano FROM ledger").fetchall()
            store.execute("DELETE FROM ledger")
        return row

    estimated = count(None)
    assert not caplog.text
    assert count(staticmethod(counter)) == estimated
    assert caplog.text.count("cannot count a text, which is estimated") == 1


@pytest.mark.parametrize(
    "given", [*(failing_with(error) for error in ERRORS), lambda self: "no", lambda self: None, lambda self: 2]
)
def test_a_provider_that_cannot_say_whether_it_has_failed_takes_no_server_out(tmp_path, monkeypatch, caplog, given):
    async def main():
        async with asyncio.timeout(60), Gateway(settings(tmp_path)) as gateway:
            monkeypatch.setattr(Hostile, "has_failed", property(given))
            assert gateway.runtime.given_up == []
            monkeypatch.setattr(Hostile, "has_failed", property(lambda self: True))
            assert len(gateway.runtime.given_up) == 1

    asyncio.run(main())
    assert caplog.text.count("the provider of deployment") == 1
