"""What hostile clients and broken upstreams must not get: money, memory, other people's answers, or a request that never ends."""

import asyncio
import json
import socket

import aiohttp
import pytest
from aiohttp import web

from anabranch.gateway.config import (
    AdminConfig,
    CacheConfig,
    DeploymentConfig,
    GatewayConfig,
    HedgeConfig,
    LimitsConfig,
    LostConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.config.secret import Secret
from anabranch.gateway.dispatch import Plan
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import UpstreamRequest, Usage
from anabranch.gateway.providers.scenes import Behaviour, Scene
from anabranch.gateway.store import LedgerQuery
from anabranch.routers.contract.query import Candidate, Decision
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.money import Price, nano_dollars
from anabranch.web.api_error import ApiError
from anabranch.web.sse import DONE, event
from paced_time import run_paced
from waiting import until_async

PRICE = Price.of_dollars(1, 2)  # 1,000 and 2,000 nano-dollars a token


def model(name, price=PRICE, max_tokens=100, **behaviour):
    provider = Mock.Config(**{"model": name, "tokens": 4, **behaviour})
    return ModelConfig(
        name=name, price=price, max_tokens=max_tokens, deployments=(DeploymentConfig(provider=provider),)
    )


def config(tmp_path, *models, **fields):
    fields = {
        "strategies": {"cheapest": StrategyConfig(use="cheapest")},
        "require_key": False,
        "store": str(tmp_path / "g.db"),
        **fields,
    }
    return GatewayConfig(models=models or (model("small"),), **fields)


def ask(text="hello", **fields):
    return {"model": "small", "messages": [{"role": "user", "content": text}], **fields}


def run(config, work, **options):
    """What ``work(gateway)`` gives, and all rows of the ledger, oldest first; nothing may be left under way."""

    async def main():
        async with Gateway(config, **options) as gateway:
            found = await work(gateway)
            await gateway.settled()
            rows = await gateway.store.ledger(LedgerQuery(limit=10_000, newest_first=False))
            assert all(budget.reserved_nano == 0 for budget in await gateway.store.budgets())
            left = await gateway.store._read(lambda connection: connection.rows("SELECT request_id FROM reservations"))
            assert left == []
            assert gateway.in_flight == gateway.runtime.users == 0
            assert len(gateway.caches.flights) == 0
            assert [state["in_flight"] for state in gateway.runtime.dispatcher.states() if state["in_flight"]] == []
            return found, rows

    return run_paced(main())


async def read(reply):
    """All of a stream."""
    try:
        return b"".join([piece async for piece in reply.stream])
    finally:
        await reply.stream.aclose()


async def refused(work):
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value


def says(monkeypatch, *parts, kind="text/event-stream", gap_s=0.0):
    """All mocks send these bytes."""

    def scene(self, path, body):
        return Scene(
            headers={"content-type": kind}, parts=[(gap_s if at else 0.0, part) for at, part in enumerate(parts)]
        )

    monkeypatch.setattr(Behaviour, "scene", scene)


def chunk(**choice):
    return event({"id": "x", "choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None, **choice}]})


# Money: no request may cost more than was set aside for it


def reserved(tmp_path, endpoint, body, **fields):
    """What one request sets aside, and what it cost."""

    async def work(gateway):
        return await gateway.handle(endpoint, body)

    _, [row] = run(config(tmp_path, **fields), work)
    return row


def test_a_list_of_prompts_is_reserved_for_as_many_answers(tmp_path):
    one = reserved(tmp_path, "completions", {"model": "small", "prompt": ["a"], "max_tokens": 10})
    (tmp_path / "many").mkdir()
    many = reserved(tmp_path / "many", "completions", {"model": "small", "prompt": ["a"] * 50, "max_tokens": 10})
    assert many.reserved_nano >= 50 * 10 * 2_000 > one.reserved_nano


def test_best_of_is_reserved_for_as_many_answers(tmp_path):
    row = reserved(tmp_path, "completions", {"model": "small", "prompt": "a", "max_tokens": 10, "n": 1, "best_of": 20})
    assert row.reserved_nano >= 20 * 10 * 2_000


def test_the_larger_of_two_limits_of_an_answer_is_reserved(tmp_path):
    row = reserved(tmp_path, "chat", ask(max_tokens=90, max_completion_tokens=1))
    assert row.reserved_nano >= 90 * 2_000


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("completions", {"model": "small", "prompt": "x" * 5000, "messages": [], "max_tokens": 1}),
        ("completions", {"model": "small", "prompt": "x" * 5000, "messages": [5], "max_tokens": 1}),
        ("embeddings", {"model": "small", "input": "x" * 5000, "messages": []}),
        ("embeddings", {"model": "small", "input": "short", "prompt": "x" * 5000}),
        ("chat", ask(max_tokens=1, functions=[{"name": "f", "description": "x" * 5000}])),
        ("chat", ask(max_tokens=1, response_format={"type": "json_schema", "json_schema": {"name": "x" * 5000}})),
        ("chat", ask(max_tokens=1, guided_json={"a": "x" * 5000})),
        (
            "chat",
            {**ask(max_tokens=1), "messages": [{"role": "user", "content": "hi", "reasoning_content": "x" * 5000}]},
        ),
        (
            "chat",
            {
                **ask(max_tokens=1),
                "messages": [{"role": "user", "content": [{"type": "file", "file": {"data": "x" * 5000}}]}],
            },
        ),
    ],
)
def test_no_text_of_a_body_goes_uncounted(tmp_path, endpoint, body):
    assert reserved(tmp_path, endpoint, body).reserved_nano >= 5000 * 1_000


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("embeddings", {"model": "small", "input": "a", "user": 5}),
        ("embeddings", {"model": "auto/cheapest", "input": "a", "messages": [5], "max_tokens": "x", "tools": 3}),
        ("completions", {"model": "auto/cheapest", "prompt": "a", "messages": 5}),
        ("completions", {"model": "small", "prompt": "a", "messages": [{"content": [5]}]}),
        ("completions", {"model": "small", "prompt": "a", "best_of": "many"}),
        ("chat", ask("half a pair: \ud800")),
        ("chat", ask("half a pair: \ud800", model="auto/knn")),
    ],
)
def test_odd_fields_are_answered_or_refused_never_a_bug(tmp_path, endpoint, body):
    class Vectors(Strategy):
        needs_vector = True

        def route(self, query, pool):
            return Decision(candidates=(Candidate(model="small", score=1),), strategy="v", reason="so")

    async def work(gateway):
        return (await asyncio.gather(gateway.handle(endpoint, body), return_exceptions=True))[0]

    strategies = {"cheapest": StrategyConfig(use="cheapest"), "knn": StrategyConfig(use="static")}
    made = config(tmp_path, strategies=strategies, embedder=Hashed.Config(), cache=CacheConfig(semantic=True))
    found, _ = run(made, work, strategies={"knn": Vectors(None)})
    assert getattr(found, "status", 500) in (200, 400), found


def hedged(tmp_path, limit_usd=None):
    """Two deployments, one slow at first, with hedging at once."""
    both = tuple(
        DeploymentConfig(name=name, provider=Mock.Config(model=name, tokens=4, latency_s=0.05)) for name in ("a", "b")
    )
    small = ModelConfig(name="small", price=PRICE, max_tokens=100, deployments=both)
    return config(tmp_path, small, hedge=HedgeConfig())


def hurry(gateway, seconds=0.01):
    group = gateway.runtime.dispatcher.groups["small"]
    group.hedge._delay_s = group.hedge_whole._delay_s = seconds


@pytest.mark.parametrize("streams", [False, True])
def test_a_hedge_is_set_aside_beside_the_first_attempt(tmp_path, streams):
    async def work(gateway):
        hurry(gateway)
        reply = await gateway.handle("chat", ask(stream=streams))
        if streams:
            await read(reply)

    _, [row] = run(hedged(tmp_path), work)
    assert row.attempts == 2
    assert row.flags == ("hedged",)
    worst = (len("hello") + 7) * 1_000 + 100 * 2_000
    assert row.reserved_nano >= 2 * worst


def test_a_hedge_that_no_budget_has_room_for_is_not_sent(tmp_path):
    async def work(gateway):
        hurry(gateway)
        await gateway.store.set_budget("global", 300_000)  # room for one, not for two
        await gateway.handle("chat", ask())

    _, [row] = run(hedged(tmp_path), work)
    assert (row.attempts, row.status) == (1, "ok")


@pytest.mark.parametrize("tokens", [10**30, 2**53, -1, True, 1.5])
@pytest.mark.parametrize("streams", [False, True])
def test_a_senseless_usage_is_not_believed(tmp_path, monkeypatch, tokens, streams):
    usage = {"prompt_tokens": tokens, "completion_tokens": tokens, "total_tokens": tokens}
    if streams:
        says(monkeypatch, chunk(), chunk(finish_reason="stop"), event({"choices": [], "usage": usage}), DONE)
    else:
        message = {"index": 0, "message": {"role": "assistant", "content": "word"}, "finish_reason": "stop"}
        says(monkeypatch, json.dumps({"choices": [message], "usage": usage}).encode(), kind="application/json")

    async def work(gateway):
        reply = await gateway.handle("chat", ask(stream=streams))
        if streams:
            await read(reply)

    _, [row] = run(config(tmp_path), work)
    assert row.status == "ok"
    assert row.is_estimated
    assert 0 < row.cost_nano <= row.reserved_nano


def test_what_was_asked_before_the_client_left_is_paid_for(tmp_path):
    async def work(gateway):
        task = asyncio.create_task(gateway.achat(ask("x" * 400)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    _, [row] = run(config(tmp_path, model("small", latency_s=5), lost=LostConfig(read_on_s=0)), work)
    assert (row.status, row.attempts) == ("cancelled", 1)
    assert row.cost_nano >= 100 * 1_000  # the prompt went upstream


def test_a_strategys_call_that_ran_out_of_time_is_paid_for(tmp_path):
    class Asks(Strategy):
        is_async = True

        async def aroute(self, query, pool, ask):
            async with asyncio.timeout(0.05):
                await ask("small", "x" * 400, max_tokens=2, temperature=0)

    async def work(gateway):
        await gateway.achat({**ask(), "model": "auto/asks"})

    strategies = {"cheapest": StrategyConfig(use="cheapest"), "asks": StrategyConfig(use="static")}
    made = config(
        tmp_path,
        model("small", script=("slow:5",)),
        strategies=strategies,
        default_strategy="cheapest",
        lost=LostConfig(read_on_s=0),
    )
    _, [row] = run(made, work, strategies={"asks": Asks(None)})
    assert (row.status, row.flags) == ("ok", ("bypassed",))
    assert row.calls == 1
    assert row.calls_nano >= 100 * 1_000


def test_explaining_gives_back_what_it_set_aside(tmp_path):
    class Asks(Strategy):
        is_async = True

        async def aroute(self, query, pool, ask):
            await ask("small", "which?", max_tokens=2, temperature=0)

    async def work(gateway):
        await gateway.store.set_budget("global", nano_dollars(1))
        await gateway.aroute({**ask(), "model": "auto/asks"})

    strategies = {"cheapest": StrategyConfig(use="cheapest"), "asks": StrategyConfig(use="static")}
    made = config(tmp_path, model("small", fails=1.0), strategies=strategies, default_strategy="cheapest")
    _, rows = run(made, work, strategies={"asks": Asks(None)})  # `run` asserts that nothing stays reserved
    assert [(row.calls, row.total_nano) for row in rows] == [(1, 0)]


def test_a_continued_stream_sets_aside_the_longer_prompt(tmp_path):
    async def work(gateway):
        await read(await gateway.handle("chat", ask(stream=True)))

    first = model("small", script=("cut:80",), tokens=90)
    made = config(tmp_path, first, model("next", tokens=90), fallbacks={"small": ("next",)}, mid_stream="continue")
    made = made.replace(retries=made.retries.replace(attempts=1))
    _, [row] = run(made, work)
    assert "stitched" in row.flags
    assert "over_reserved" not in row.flags
    assert row.reserved_nano >= (12 + 12 + 80) * 1_000 + (80 + 100) * 2_000


# Upstreams that send what nobody expects


@pytest.mark.parametrize(
    "bad",
    [
        b"data: this is no JSON\n\n",
        b"data: [1, 2]\n\n",
        chunk(index=[]),
        chunk(index={}),
        chunk(index="a"),
        chunk(delta={"tool_calls": [5]}),
        chunk(delta={"tool_calls": [{"index": "a", "function": 5}]}),
        chunk(logprobs={"content": 5}),
        event({"choices": {"a": 1}}),
        event({"error": {"status": "what", "message": "x"}}),
        event({"error": {"status": 10**30, "message": "x"}}),
    ],
)
@pytest.mark.parametrize("mode", ["error", "continue"])
def test_a_stream_with_a_senseless_chunk_ends_once(tmp_path, monkeypatch, bad, mode):
    says(monkeypatch, chunk(), bad, chunk(finish_reason="stop"), DONE, gap_s=0.001)

    async def work(gateway):
        await read(await gateway.handle("chat", ask(stream=True, temperature=0)))
        await read(await gateway.handle("chat", ask(stream=True, temperature=0)))

    made = config(tmp_path, mid_stream=mode, retries=RetryConfig(base_s=0.001, cap_s=0.01))
    _, rows = run(made, work)
    assert len(rows) == 2


def test_a_stream_without_end_is_not_kept_without_bound(tmp_path, monkeypatch):
    piece = chunk(delta={"content": "x" * 100_000})
    says(monkeypatch, chunk(), *[piece] * 400, chunk(finish_reason="stop"), DONE)
    held = []

    async def work(gateway):
        reply = await gateway.handle("chat", ask(stream=True, temperature=0))
        held.extend([sum(map(len, reply.stream._stream._kept._blocks)) async for _ in reply.stream])
        await reply.stream.aclose()

    _, [row] = run(config(tmp_path), work)
    assert row.status == "ok"
    assert max(held) <= 33 << 20


def test_what_comes_before_the_first_token_is_bounded(tmp_path, monkeypatch):
    piece = chunk(delta={"role": "assistant"}) + b": " + b"x" * 100_000 + b"\n\n"
    says(monkeypatch, *[piece] * 400, chunk(), DONE, gap_s=1e-5)

    async def work(gateway):
        return await refused(gateway.handle("chat", ask(stream=True)))

    error, [row] = run(config(tmp_path), work)
    assert (error.status, row.status) == (502, "error")


def test_codes_of_upstreams_are_no_labels(tmp_path, monkeypatch):
    count = iter(range(1000))
    monkeypatch.setattr(
        Behaviour,
        "scene",
        lambda self, path, body: Scene(
            400, parts=[(0.0, json.dumps({"error": {"message": "m", "code": f"odd-{next(count)}"}}).encode())]
        ),
    )

    async def work(gateway):
        for _ in range(3):
            assert (await refused(gateway.achat(ask()))).code.startswith("odd")
        return gateway.metrics_text().decode()

    text, _ = run(config(tmp_path), work)
    assert "odd-" not in text


# Requests under way


def test_a_race_left_in_the_middle_leaves_nothing_open(tmp_path):
    """The first attempt has its first token while the hedge's price is being asked for, and then the client goes."""

    async def work(gateway):
        hurry(gateway)
        dispatcher = gateway.runtime.dispatcher

        async def allow(model, spent):
            await asyncio.sleep(0.2)
            return True

        plan = Plan(candidates=("small",), deadline=dispatcher.now() + 5, allow=allow)
        task = asyncio.create_task(dispatcher.stream(plan, UpstreamRequest("chat", ask(stream=True))))
        await asyncio.sleep(0.12)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(hedged(tmp_path), work)


def test_those_who_wait_for_a_stream_that_breaks_do_not_pay_for_it(tmp_path):
    async def work(gateway):
        first = await gateway.handle("chat", ask(stream=True, temperature=0))
        waits = asyncio.create_task(gateway.handle("chat", ask(temperature=0)))
        await asyncio.sleep(0.02)
        await read(first)
        error = await refused(waits)
        assert error.status == 502
        return first.headers["x-request-id"], error.headers["x-request-id"]

    ids, rows = run(config(tmp_path, model("small", script=("cut:2",), tokens_per_s=50)), work)
    assert [row.request_id for row in rows] == [*ids]
    assert [row.status for row in rows] == ["error", "error"]
    assert rows[0].cost_nano > 0
    assert rows[1].cost_nano == 0


def test_those_who_wait_have_ids_of_their_own(tmp_path):
    async def work(gateway):
        found = await asyncio.gather(*(refused(gateway.handle("chat", ask(temperature=0))) for _ in range(3)))
        return {error.headers["x-request-id"] for error in found}

    ids, rows = run(config(tmp_path, model("small", latency_s=0.05, script=("context",) * 3)), work)
    assert {row.request_id for row in rows} == ids
    assert len(ids) == 3


def test_those_who_wait_do_so_until_their_deadline(tmp_path):
    async def work(gateway):
        first = await gateway.handle("chat", ask(stream=True, temperature=0))  # and does not read it
        error = await asyncio.wait_for(refused(gateway.handle("chat", ask(temperature=0))), 60)
        await first.stream.aclose()
        return error

    error, rows = run(config(tmp_path, deadline_s=0.2), work)
    assert error.status == 504
    assert sorted(row.status for row in rows) == ["cancelled", "error"]


def test_a_strategy_that_explains_nonsense_is_bypassed(tmp_path):
    class Odd(Strategy):
        def route(self, query, pool):
            return Decision(
                candidates=(Candidate(model="small", score=1),),
                strategy="odd",
                reason=query.text and odd[0],
                confidence=odd[1],
                details=odd[2],
            )

    async def work(gateway):
        for odd[:] in ([None, None, {}], ["so", "sure", {}], ["so", None, {(1, 2): 3}], ["so", None, 5]):
            await gateway.achat({**ask(), "model": "auto/odd"})
            await read(await gateway.handle("chat", {**ask(stream=True), "model": "auto/odd"}))

    odd = [None, None, {}]
    strategies = {"cheapest": StrategyConfig(use="cheapest"), "odd": StrategyConfig(use="static")}
    _, rows = run(
        config(tmp_path, strategies=strategies, default_strategy="cheapest"), work, strategies={"odd": Odd(None)}
    )
    assert [row.status for row in rows] == ["ok"] * 8


# Memory


def test_outcomes_that_wait_for_feedback_hold_no_conversations(tmp_path):
    class Learns(Strategy):
        def route(self, query, pool):
            return Decision(candidates=(Candidate(model="small", score=1),), strategy="l", reason="so")

        def observe(self, outcome):
            pass

    async def work(gateway):
        for number in range(40):
            await gateway.achat({**ask("x" * 1_000_000 + str(number)), "model": "auto/learns"})
        return sum(len(repr(one)) for own in gateway.teaching.waiting._by_key.values() for one in own.values())

    strategies = {"learns": StrategyConfig(use="static")}
    size, _ = run(config(tmp_path, strategies=strategies), work, strategies={"learns": Learns(None)})
    assert size < 34 << 20


def test_the_semantic_cache_is_bounded_by_bytes(tmp_path):
    async def work(gateway):
        for number in range(8):
            await gateway.achat(ask(f"{number} words that differ {number * 7}"))
        held = gateway.caches.semantic
        assert len(held) > 0
        return held.size_bytes

    made = config(
        tmp_path,
        model("small", reply="y" * 10_000),
        cache=CacheConfig(semantic=True, max_bytes=30_000),
        embedder=Hashed.Config(),
    )
    size, _ = run(made, work)
    assert 0 < size <= 30_000


def test_usage_may_be_large_but_not_without_bound():
    assert Usage.of({"usage": {"prompt_tokens": 10**7, "completion_tokens": 10**7}}) is not None
    assert Usage.of({"usage": {"prompt_tokens": 10**7 + 1, "completion_tokens": 1}}) is None


def test_limits_hold_before_a_tenant_may_do_anything(tmp_path):
    async def work(gateway):
        secret, _ = await gateway.store.create_key("k", rpm=1)
        await gateway.achat(ask(), key=secret)
        return await refused(gateway.achat(ask(), key=secret))

    error, _ = run(config(tmp_path, require_key=True, limits=LimitsConfig()), work)
    assert error.status == 429


# Over HTTP


def served(config, work, **options):
    """What ``work(gateway, url)`` gives, of a gateway that listens."""

    async def inside(gateway):
        apart = options.pop("apart", False)
        server = App(gateway, admin=not apart).server()
        listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        try:
            return await work(gateway, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        finally:
            listener.close()
            await server.shutdown(0.1)

    return run(config, inside)


@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings", "responses", "feedback"])
def test_the_body_of_somebody_without_a_key_is_not_read(tmp_path, path):
    async def work(gateway, url):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(
            f"POST /v1/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000000\r\n\r\n".encode() + b"{" * 1000
        )
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return answer

    answer, _ = served(config(tmp_path, require_key=True), work)
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_metrics_are_for_operators(tmp_path, monkeypatch):
    monkeypatch.setenv("SECURITY_ADMIN", "an-admin-key")
    made = config(tmp_path, admin=AdminConfig(key=Secret("env:SECURITY_ADMIN")))

    async def work(gateway, url):
        async with aiohttp.ClientSession() as session:
            found = []
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer an-admin-key"}):
                async with session.get(f"{url}/metrics", headers=headers) as answer:
                    found.append(answer.status)
            return found

    assert served(made, work)[0] == [401, 401, 200]
    assert served(made, work, apart=True)[0] == [404, 404, 404]


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_a_client_that_is_gone_before_the_head_is_settled(tmp_path, monkeypatch, path):
    async def gone(self, request):
        raise ConnectionResetError("gone")

    monkeypatch.setattr(web.StreamResponse, "prepare", gone)

    async def work(gateway, url):
        body = {**ask(stream=True), "input": "hello"}
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                await session.post(f"{url}/v1/{path}", json=body)
        await until_async(lambda: gateway.in_flight == 0)

    _, [row] = served(config(tmp_path, model("small", tokens_per_s=50)), work)
    assert row.status == "cancelled"


def test_a_client_that_does_not_read_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("anabranch.gateway.http.exchange.STALL_S", 0.1)

    async def work(gateway, url):
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        body = json.dumps(ask(stream=True, max_tokens=60_000)).encode()
        link.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        await until_async(lambda: gateway.in_flight == 1)
        await until_async(lambda: gateway.in_flight == 0)
        link.close()

    made = config(tmp_path, model("small", tokens=60_000), deadline_s=0.5)
    _, [row] = served(made, work)
    assert row.status in ("cancelled", "error")


@pytest.mark.parametrize("bad", [chunk(delta={"tool_calls": [5]}), b"data: {no JSON\n\n", chunk(delta={"content": 5})])
def test_a_response_of_senseless_chunks_fails_as_one(tmp_path, monkeypatch, bad):
    says(monkeypatch, chunk(), bad, chunk(finish_reason="stop"), DONE, gap_s=0.01)

    async def work(gateway, url):
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/responses", json={"model": "small", "input": "hello", "stream": True}) as answer,
        ):
            return await answer.text()

    text, rows = served(config(tmp_path), work)
    assert "response.failed" in text
    assert "HTTP/1.1" not in text
    assert len(rows) == 1


def test_clients_are_not_told_where_upstreams_are(tmp_path):
    provider = OpenAI.Config(base_url="http://127.0.0.1:9/v1", key_env=None, model="m")
    made = config(tmp_path, ModelConfig(name="small", deployments=(DeploymentConfig(provider=provider),)))

    async def work(gateway):
        return await refused(gateway.achat(ask()))

    error, _ = run(made, work)
    assert "no connection" in str(error)
    assert "127.0.0.1" not in json.dumps(error.to_dict())


def test_a_dear_fallback_that_is_asked_first_is_reserved_for_too(tmp_path):
    async def work(gateway):
        gateway.runtime.dispatcher.groups["small"].lives[0].rests_until = float("inf")  # so that nobody asks it
        await gateway.store.set_budget("global", 2_500_000)
        await gateway.achat(ask())
        await refused(gateway.achat(ask(max_tokens=100, n=2)))

    made = config(tmp_path, model("small"), model("large", Price.of_dollars(10, 20)), fallbacks={"small": ("large",)})
    _, [dear, none] = run(made, work)
    assert (dear.model, dear.status) == ("large", "ok")
    assert dear.reserved_nano >= 12 * 10_000 + 100 * 20_000
    assert (none.attempts, none.cost_nano) == (0, 0)


def test_a_key_is_told_of_no_model_that_it_may_not_use(tmp_path):
    """A name near to it was told: "did you mean 'merger-with-acme-ft'?"."""
    made = config(tmp_path, model("open"), model("merger-with-acme-ft").replace(aliases=("merger",)))

    async def work(gateway):
        said = []
        for models in (["open"], []):
            secret, _ = await gateway.store.create_key(f"k{len(models)}", models=models)
            for name in ("merger-with-acme", "mergr", "opn"):
                with pytest.raises(ApiError) as refused:
                    await gateway.achat(ask(model=name), key=secret)
                said.append((refused.value.status, str(refused.value)))
        return said

    found, _ = run(made, work)
    assert "merger-with-acme-ft" in found[3][1]
    assert {status for status, _ in found} == {404}
    assert not any("merger-with-acme-ft" in told or "'merger'" in told for _, told in found[:3])
    assert "'open'" in found[2][1]
