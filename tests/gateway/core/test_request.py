"""A request's life from its key to its row, without a gateway around it: each end of it is one end."""

import asyncio
from dataclasses import replace

import pytest

from anabranch.gateway.config import CacheConfig, StrategyConfig
from anabranch.gateway.core.incoming import Incoming, KnownKey
from anabranch.gateway.core.request import CLIENT_GONE, RequestRun
from anabranch.gateway.metrics import StageClock
from anabranch.gateway.runtime import Runtime
from anabranch.gateway.store import KeyRecord
from anabranch.routers import Program
from anabranch.web.api_error import ApiError
from gateway_states import FakeStore, config, model, run, services

MESSAGES = [{"role": "user", "content": "hello there"}]
NOBODY = KnownKey(None)


def scripted(*steps, **fields):
    given = model("small", **fields)
    [deployment] = given.deployments
    provider = deployment.provider.replace(script=steps, loops=True)
    return config(given.replace(deployments=(deployment.replace(provider=provider),)))


def request(body=None, *, of=None, lent=None, **fields):
    lent, told = services(FakeStore()) if lent is None else lent
    incoming = Incoming(endpoint="chat", body={"model": "small", "messages": MESSAGES, **(body or {})}, **fields)
    return RequestRun(lent, Runtime(of or config()), incoming), lent.store, told


def stages(held):
    text = held.state.services.metrics.text().decode()
    lines = [line for line in text.splitlines() if line.startswith("anabranch_stage_seconds_count{")]
    return {line.partition('stage="')[2].partition('"')[0] for line in lines if not line.endswith(" 0.0")}


def test_a_key_is_looked_up_unless_it_is_known():
    asked = []

    async def authenticate(secret):
        asked.append(secret)
        return KeyRecord(id="k")

    async def work(key):
        lent, told = services()
        held, _, _ = request(lent=(replace(lent, authenticate=authenticate), told))
        await held.run(key)
        return held.state.tenant

    assert run(work, "sk") == "k"
    assert run(work, KnownKey(KeyRecord(id="l"))) == "l"
    assert run(work, NOBODY) == ""
    assert asked == ["sk"]


@pytest.mark.parametrize(
    ("header", "value", "says"),
    [
        ("x-cache", "maybe", "x-cache is 'maybe'; it must be allow or deny, or left out"),
        ("x-cache", "allow, deny", "x-cache is 'allow, deny'"),
        ("x-mid-stream", "continue", "x-mid-stream is 'continue'; it must be restart, or left out"),
        ("x-cache", "Allow", None),
        ("x-cache", "", None),
        ("x-mid-stream", "RESTART", None),
    ],
)
def test_a_header_that_is_a_word_is_one_that_is_heeded(header, value, says):
    async def work():
        held, _, _ = request(headers={header: value})
        if says is None:
            assert (await held.run(NOBODY)).status == 200
            return
        with pytest.raises(ApiError) as caught:
            await held.run(NOBODY)
        assert (caught.value.status, caught.value.param) == (400, header)
        assert str(caught.value).startswith(says)

    run(work)


def test_a_program_that_fails_is_timed_as_the_call_that_it_was():
    class Slow(Program):
        async def run(self, request, ask):
            told.append(asyncio.get_running_loop().time())
            await asyncio.sleep(0.05)
            raise ValueError
            yield

    told, seen = [], []
    of = config(strategies={"prog": StrategyConfig(use="static"), "cheapest": StrategyConfig(use="cheapest")})

    async def work():
        lent, _ = services(FakeStore())
        incoming = Incoming(endpoint="chat", body={"model": "auto/prog", "messages": MESSAGES})
        held = RequestRun(lent, Runtime(of, strategies={"prog": Slow(None)}), incoming)
        held.state.clock = StageClock(lambda stage, seconds: seen.append((stage, seconds)))
        assert (await held.run(NOBODY)).status == 200

    run(work)
    assert [stage for stage, _ in seen] == ["key", "read", "cache", "decide", "call", "reserve", "call"]
    assert seen[4][1] >= 0.05 > seen[5][1]


def test_a_whole_answer_ends_the_request():
    async def work():
        held, store, told = request()
        reply = await held.run(NOBODY)
        assert (reply.status, reply.stream, reply.headers["x-route-model"]) == (200, None, "small")
        [(_, row, _, _)] = store.settled
        assert (row.status, row.cost_nano, len(told.priced)) == ("ok", told.priced[0].nano, 1)
        held.end("error", 500)
        assert len(store.settled) == 1
        await asyncio.sleep(0)
        assert stages(held) >= {"key", "read", "cache", "decide", "call", "settle"}

    run(work)


@pytest.mark.parametrize(
    ("steps", "most", "status", "code"),
    [(("ok",), None, "ok", ""), (("ok",), 1, "cancelled", ""), (("cut:2",), None, "error", "upstream_cut")],
)
def test_a_stream_ends_it_whole_left_or_broken(steps, most, status, code):
    async def work():
        held, store, told = request({"stream": True}, of=scripted(*steps))
        reply = await held.run(NOBODY)
        assert store.settled == []
        got = 0
        async for _ in reply.stream:
            got += 1
            if got == most:
                await reply.stream.aclose()
                break
        [(_, row, _, _)] = store.settled
        return row.status, row.code, told.finished[0].http_status

    found = run(work)
    assert found[:2] == (status, code)
    assert status != "cancelled" or found[2] == CLIENT_GONE


def test_an_upstream_that_fails_is_told_with_its_report():
    async def work():
        held, store, _ = request(of=scripted("500"))
        with pytest.raises(ApiError) as caught:
            await held.run(NOBODY)
        [(_, row, _, _)] = store.settled
        return caught.value, row, held.state.id

    error, row, id = run(work)
    assert (error.status, row.status, row.attempts) == (502, "error", int(error.headers["x-route-attempts"]))
    assert error.headers["x-request-id"] == id


def test_what_is_refused_before_money_is_set_aside_has_a_row_too():
    async def work():
        store = FakeStore(limit=0)
        held, _, told = request(lent=services(store))
        with pytest.raises(ApiError) as caught:
            await held.run(NOBODY)
        return caught.value, store, told

    error, store, told = run(work)
    assert (error.code, store.settled, store.appended[0].status) == ("insufficient_quota", [], "refused")
    assert told.finished[0].http_status == 429


def test_a_fault_of_ours_is_an_internal_error_and_told_as_it_is():
    async def work():
        held, store, told = request({"model": "auto/cheapest"})
        held.state.runtime.decider.decide = None
        with pytest.raises(TypeError):
            await held.run(NOBODY)
        return store.appended[0], told.finished[0].http_status

    row, status = run(work)
    assert (row.status, row.code, status) == ("error", "internal_error", 500)


def test_who_goes_away_before_an_answer_cancels_it():
    async def work():
        held, store, told = request(of=scripted("hang"))
        task = asyncio.ensure_future(held.run(NOBODY))
        while held.state.report is None or not held.state.report.attempts:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # What it may cost is read on for; until then there is no row.
        await held.state.runtime.close()
        return store.settled[0][1].status, told.finished[0].http_status

    assert run(work) == ("cancelled", CLIENT_GONE)


def test_an_answer_that_is_kept_costs_nothing_and_asks_nobody():
    async def work():
        lent = services(FakeStore(), CacheConfig(exact=True))
        first, store, told = request({"temperature": 0}, lent=lent)
        await first.run(NOBODY)
        second, _, _ = request({"temperature": 0}, lent=lent)
        reply = await second.run(NOBODY)
        assert (reply.headers["x-cache"], second.state.hit.model) == ("exact", "small")
        [row] = store.appended
        assert (row.cache, row.cost_nano, row.attempts, told.finished[1].cached_model) == ("exact", 0, 0, "small")

    run(work)


def test_only_where_it_would_go_has_no_row():
    async def work():
        held, store, _ = request({"model": "auto/cheapest"})
        decision = await held.route(None)
        assert (decision.candidates[0].model, store.appended, store.settled, store.reserved) == ("small", [], [], [])

    run(work)
