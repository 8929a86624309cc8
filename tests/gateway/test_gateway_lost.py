"""What calls are charged that brought nothing: exactly what a provider bills, or the most it may bill until it says less."""

import asyncio
import contextlib
import json
import re

import pytest

from anabranch.gateway.config import (
    BreakerConfig,
    DeploymentConfig,
    FeedbackConfig,
    GatewayConfig,
    HedgeConfig,
    LimitsConfig,
    LostConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.dispatch.hedge import HedgeDelay
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.store import LedgerQuery, open_store
from anabranch.routers.contract.query import Candidate, Decision
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError
from paced_time import run_paced
from waiting import until_async

# 1,000 and 20,000 nano-dollars a token.
PRICE = Price.of_dollars(1, 20)

# "hello" is 5 bytes, and 7 tokens are around it; it says one word, and 4 tokens are answered.
MOST = 12 * 1_000 + 1_000 * 20_000
TOLD = 1 * 1_000 + 4 * 20_000


def mock(name="small", at="", timeout_s=None, weight=1.0, **behaviour):
    provider = Mock.Config(model=name, **{"tokens": 4, **behaviour})
    return DeploymentConfig(provider=provider, name=name + at, timeout_s=timeout_s, weight=weight)


def config(tmp_path, *deployments, price=PRICE, lost=None, **fields):
    models = (ModelConfig(name="small", price=price, max_tokens=1_000, deployments=deployments),)
    fields = {
        "strategies": {"cheapest": StrategyConfig(use="cheapest")},
        "retries": RetryConfig(base_s=0.0),
        "lost": lost or LostConfig(),
        **fields,
    }
    return GatewayConfig(models=models, require_key=False, store=str(tmp_path / "g.db"), **fields)


def ask(**fields):
    return {"model": "small", "messages": [{"role": "user", "content": "hello"}], **fields}


async def rows_of(gateway):
    return await gateway.store.ledger(LedgerQuery(limit=1000, newest_first=False))


def run(config, work, **options):
    async def main():
        async with Gateway(config, **options) as gateway:
            await gateway.store.set_budget("global", 10**12)
            return await work(gateway)

    return run_paced(main())


async def money_of(gateway):
    [budget] = await gateway.store.budgets()
    return budget.spent_nano, budget.reserved_nano


async def left(gateway, after_s=0.05, **fields):
    """A client that goes away while it waits."""
    task = asyncio.create_task(gateway.achat(ask(**fields)))
    await asyncio.sleep(after_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# Attempts that took too long


def test_three_calls_that_took_too_long_are_charged_what_may_be_billed(tmp_path):
    """They cost up to 6 cents upstream, and were charged 0.006."""

    async def work(gateway):
        with pytest.raises(ApiError):
            await gateway.achat(ask())
        return await rows_of(gateway), await money_of(gateway)

    [row], money = run(config(tmp_path, mock(script=("hang",) * 3, timeout_s=0.03), lost=LostConfig(read_on_s=0)), work)
    assert (row.attempts, row.status) == (3, "error")
    assert row.cost_nano == row.reserved_nano == 3 * MOST == 60_036_000
    assert row.is_estimated
    assert money == (60_036_000, 0)


def test_what_was_given_up_is_charged_what_it_says_in_the_end(tmp_path):
    async def work(gateway):
        began = asyncio.get_running_loop().time()
        with pytest.raises(ApiError):
            await gateway.achat(ask())
        told_s = asyncio.get_running_loop().time() - began
        before = await rows_of(gateway), await money_of(gateway), gateway.in_flight
        await gateway.settled()
        return told_s, before, await rows_of(gateway), await money_of(gateway)

    made = config(tmp_path, mock(script=("slow:0.5",) * 3, timeout_s=0.03))
    told_s, before, [row], money = run(made, work)
    assert told_s < 0.5  # nobody waits for it
    assert before == ([], (0, 3 * MOST), 0)
    assert (row.cost_nano, row.prompt_tokens, row.completion_tokens, row.is_estimated) == (3 * TOLD, 3, 12, False)
    assert row.reserved_nano == 3 * MOST
    assert money == (3 * TOLD, 0)


def test_an_answer_that_does_not_come_in_time_is_charged_what_may_be_billed(tmp_path):
    async def work(gateway):
        with pytest.raises(ApiError):
            await gateway.achat(ask())
        await asyncio.wait_for(gateway.settled(), 60)
        return await rows_of(gateway), await money_of(gateway)

    retries = RetryConfig(attempts=1)
    made = config(tmp_path, mock(script=("hang",), timeout_s=0.03), lost=LostConfig(read_on_s=0.1), retries=retries)
    [row], money = run(made, work)
    assert (row.cost_nano, money) == (MOST, (MOST, 0))


def test_an_answer_that_fails_in_the_end_costs_nothing(tmp_path):
    async def work(gateway):
        with pytest.raises(ApiError):
            await gateway.achat(ask())
        await gateway.settled()
        return await rows_of(gateway)

    async def refuses(reader, writer):
        await read_request(reader)
        await asyncio.sleep(0.1)
        writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    [row] = asyncio.run(against(tmp_path, refuses, work, timeout_s=0.03))
    assert (row.status, row.cost_nano) == ("error", 0)


# Hedges


@pytest.mark.parametrize(("lost", "loser"), [(LostConfig(), TOLD), (LostConfig(read_on_s=0), MOST)])
def test_a_hedge_that_lost_is_charged_too(tmp_path, monkeypatch, lost, loser):
    monkeypatch.setattr(HedgeDelay, "delay_s", 0.02)

    async def work(gateway):
        reply = await gateway.handle("chat", ask())
        assert reply.headers["x-route-deployment"] == "small-2"
        await gateway.settled()
        return await rows_of(gateway)

    pair = mock(at="-1", weight=1e9, latency_s=0.3), mock(at="-2", weight=1e-9)
    [row] = run(config(tmp_path, *pair, hedge=HedgeConfig(), lost=lost), work)
    assert (row.status, row.flags, row.attempts) == ("ok", ("hedged",), 2)
    assert row.cost_nano == TOLD + loser <= row.reserved_nano


# Clients that leave


@pytest.mark.parametrize(("lost", "cost"), [(LostConfig(), TOLD), (LostConfig(read_on_s=0), MOST)])
def test_a_whole_answer_whose_client_left_is_charged(tmp_path, lost, cost):
    async def work(gateway):
        await left(gateway)
        at_once = len(await rows_of(gateway))
        await gateway.settled()
        return at_once, await rows_of(gateway)

    at_once, [row] = run(config(tmp_path, mock(latency_s=0.2), lost=lost), work)
    assert (row.status, row.cost_nano) == ("cancelled", cost)
    assert at_once == (1 if cost == MOST else 0)


def test_a_stream_whose_client_left_is_charged_what_can_have_been_made(tmp_path):
    async def work(gateway):
        stream = await gateway.achat(ask(stream=True))
        for _ in range(3):
            await anext(stream)
        await stream.aclose()
        return await rows_of(gateway), len(gateway.unsettled)

    made = config(tmp_path, mock(tokens=900, tokens_per_s=20), lost=LostConfig(margin_s=2.0, output_speed=20))
    [row], open_rows = run(made, work)
    assert (row.status, open_rows, row.prompt_tokens) == ("cancelled", 0, 12)
    # Two or three came, a few are made until it is noticed, 2 seconds more, and what may have come before the first.
    assert 2 + 8 + 40 <= row.completion_tokens <= 900
    assert row.cost_nano == 12 * 1_000 + row.completion_tokens * 20_000 < MOST


def test_a_stream_of_which_nothing_came_is_charged_the_time_it_had(tmp_path):
    async def work(gateway):
        await left(gateway, stream=True)
        return await rows_of(gateway)

    [row] = run(config(tmp_path, mock(latency_s=5), lost=LostConfig(margin_s=0.2, output_speed=1000)), work)
    assert row.status == "cancelled"
    assert 12 * 1_000 + (8 + 200) * 20_000 <= row.cost_nano <= MOST


def test_a_deployment_that_is_faster_than_is_declared_is_told_of_and_stays_so_over_a_reload(tmp_path, caplog):
    declared = LostConfig(margin_s=0.1, output_speed=20)
    made = config(tmp_path, mock(tokens=900), mock(at="-2", weight=1e-9), lost=declared)

    async def work(gateway):
        before = gateway.metrics_text().decode()
        async for _ in await gateway.achat(ask(stream=True)):
            pass
        await gateway.reload(made)
        kept = gateway.metrics_text().decode()
        await gateway.reload(made.replace(lost=LostConfig(output_speed=1e6)))
        return before, kept, gateway.metrics_text().decode()

    found = [re.findall(r'output_speed_exceeded\{deployment="small(?:-2)?"\} (.*)', text) for text in run(made, work)]
    assert found[0] == found[2] == ["0.0", "0.0"]
    assert sorted(float(one) > 20 for one in found[1]) == [False, True]
    assert "declare output_speed = " in caplog.text


def test_a_stream_that_was_all_there_when_its_reader_left_is_charged_what_it_said(tmp_path):
    async def work(gateway):
        stream = await gateway.achat(ask(stream=True))
        await anext(stream)
        await stream.aclose()
        return await rows_of(gateway)

    [row] = run(config(tmp_path, mock()), work)
    assert (row.cost_nano, row.is_estimated) == (TOLD, False)


def test_models_that_cost_nothing_are_stopped(tmp_path):
    async def work(gateway):
        await left(gateway)
        late = gateway.runtime.dispatcher.late
        return len(late), await rows_of(gateway)

    late, [row] = run(config(tmp_path, mock(latency_s=9), price=Price()), work)
    assert (late, row.status, row.cost_nano) == (0, "cancelled", 0)


def test_only_so_many_are_read_on(tmp_path):
    async def work(gateway):
        await left(gateway)
        await left(gateway)
        at_once = await rows_of(gateway)
        await gateway.settled()
        return at_once, await rows_of(gateway)

    [first], rows = run(config(tmp_path, mock(latency_s=0.4), lost=LostConfig(read_on=1)), work)
    assert first.cost_nano == MOST
    assert sorted(row.cost_nano for row in rows) == [TOLD, MOST]


def test_stopping_settles_what_is_read_on(tmp_path):
    made = config(tmp_path, mock(script=("hang",)))

    async def work(gateway):
        await left(gateway)
        assert len(gateway.unsettled) == 1

    async def look():
        async with open_store(made.store) as store:
            assert store.recovered == 0
            return await store.ledger(), await store.budgets()

    run(made, work)
    [row], [budget] = asyncio.run(look())
    assert (row.status, row.cost_nano) == ("cancelled", MOST)
    assert (budget.spent_nano, budget.reserved_nano) == (MOST, 0)


def test_a_reload_waits_for_what_is_read_on(tmp_path):
    made = config(tmp_path, mock(latency_s=0.3))

    async def work(gateway):
        await left(gateway)
        await gateway.reload(made.replace(deadline_s=60.0))
        await gateway.settled()
        return await rows_of(gateway)

    [row] = run(made, work)
    assert row.cost_nano == TOLD


def test_feedback_finds_a_request_that_is_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr(HedgeDelay, "delay_s", 0.02)

    async def work(gateway):
        reply = await gateway.handle("chat", ask())
        assert len(gateway.unsettled) == 1
        return await gateway.feedback({"request_id": reply.headers["x-request-id"], "score": 1})

    pair = mock(at="-1", weight=1e9, latency_s=0.3), mock(at="-2", weight=1e-9)
    told = run(config(tmp_path, *pair, hedge=HedgeConfig()), work)
    assert told["model"] == "small"


def test_what_may_have_been_billed_is_not_taken_from_the_tokens_of_a_minute(tmp_path):
    async def work(gateway):
        with pytest.raises(ApiError):
            await gateway.achat(ask())
        return await gateway.achat(ask(max_tokens=4))

    made = config(
        tmp_path,
        mock(script=("hang",), timeout_s=0.03),
        lost=LostConfig(read_on_s=0),
        limits=LimitsConfig(tpm=500),
        retries=RetryConfig(attempts=1),
    )
    assert run(made, work)["choices"]


# Budgets


def test_attempts_that_may_be_billed_do_not_pass_a_budget(tmp_path):
    """Two fit in it, and the third is not made."""

    async def work(gateway):
        await gateway.store.set_budget("global", 2 * MOST + 1)
        with pytest.raises(ApiError):
            await gateway.achat(ask())
        return await rows_of(gateway), await gateway.store.budgets()

    [row], [budget] = run(
        config(tmp_path, mock(script=("hang",) * 3, timeout_s=0.03), lost=LostConfig(read_on_s=0)), work
    )
    assert (row.attempts, row.cost_nano) == (2, 2 * MOST)
    assert budget.spent_nano <= budget.limit_nano


class Asks(Strategy):
    """Asks a model that takes too long before it decides."""

    is_async = True

    def __init__(self):
        super().__init__(None)

    async def aroute(self, query, pool, ask):
        await ask("small", "hello", max_tokens=100, temperature=0)
        return Decision(candidates=(Candidate(model="small", score=1),), strategy="asks", reason="so")


def test_calls_of_a_strategy_that_took_too_long_are_charged_within_what_was_set_aside(tmp_path):
    made = config(
        tmp_path,
        mock(script=("hang", "ok", "ok"), timeout_s=0.05),
        lost=LostConfig(read_on_s=0),
        strategies={"asks": StrategyConfig(use="static", timeout_s=5.0)},
    )

    async def work(gateway):
        await gateway.achat(ask(model="auto/asks"))
        rows = await gateway.store.ledger(LedgerQuery(limit=10, calls=True))
        return sorted(rows, key=lambda row: row.request_id)

    row, call = run(made, work, strategies={"asks": Asks()})
    lost = 12 * 1_000 + 100 * 20_000
    assert (row.cost_nano, call.parent_id, call.attempts) == (TOLD, row.request_id, 2)
    assert call.cost_nano == lost + TOLD <= call.reserved_nano


# What was sent, and what not


async def read_request(reader):
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    return json.loads(await reader.readexactly(length))


async def against(tmp_path, answer, work, scheme="http", provider=OpenAI, **limits):
    """What ``work`` gives with a gateway in front of a server that answers a connection so."""

    handlers = set()

    async def handled(reader, writer):
        handlers.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await answer(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(handled, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    base = f"{scheme}://127.0.0.1:{port}" + ("/v1" if provider is OpenAI else "")
    deployment = DeploymentConfig(provider=provider.Config(model="m", base_url=base, key_env=None), **limits)
    retries = RetryConfig(attempts=1)
    try:
        async with Gateway(config(tmp_path, deployment, retries=retries, lost=LostConfig(read_on_s=5))) as gateway:
            return await work(gateway)
    finally:
        server.close()
        await asyncio.wait(handlers, timeout=60)


async def fails(gateway, **fields):
    """The row of a request that fails."""

    async def read():
        async for _ in await gateway.achat(ask(**fields)):
            pass

    with pytest.raises(ApiError):
        await read()
    await gateway.settled()
    [row] = await rows_of(gateway)
    return row


@pytest.mark.parametrize("stream", [False, True])
def test_where_nobody_listens_nothing_is_charged(tmp_path, stream):
    deployment = DeploymentConfig(provider=OpenAI.Config(model="m", base_url="http://127.0.0.1:9/v1", key_env=None))
    row = run(config(tmp_path, deployment), lambda gateway: fails(gateway, stream=stream))
    assert (row.attempts, row.cost_nano) == (3, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_never_stands_costs_nothing(tmp_path, stream):
    async def silent(reader, writer):
        """No greeting to a TLS client."""
        await reader.read()

    row = asyncio.run(
        against(tmp_path, silent, lambda gateway: fails(gateway, stream=stream), scheme="https", timeout_s=0.1)
    )
    assert (row.attempts, row.cost_nano) == (1, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_after_the_body_was_sent_may_be_billed(tmp_path, stream):
    """It was called a failure to connect, and cost nothing."""

    async def breaks(reader, writer):
        await read_request(reader)
        writer.close()

    row = asyncio.run(against(tmp_path, breaks, lambda gateway: fails(gateway, stream=stream)))
    assert (row.attempts, row.code, row.cost_nano) == (1, "upstream_cut", MOST)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "cost"), [(400, 0), (429, 0), (500, 0), (503, 0), (408, MOST), (504, MOST), (524, MOST)]
)
def test_what_was_refused_costs_nothing_and_what_a_proxy_gave_up_may(tmp_path, status, cost, stream):
    async def refuses(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 %d No\r\ncontent-length: 2\r\n\r\n{}" % status)
        writer.close()

    row = asyncio.run(against(tmp_path, refuses, lambda gateway: fails(gateway, stream=stream)))
    assert (row.status, row.cost_nano) == ("error", cost)


def test_an_answer_that_cannot_be_read_may_be_billed(tmp_path):
    async def garbles(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{oops")
        writer.close()

    row = asyncio.run(against(tmp_path, garbles, fails))
    assert row.cost_nano == MOST


def test_the_prompt_is_charged_as_the_provider_told_it_at_the_beginning(tmp_path):
    """Anthropic does; of a stream that breaks before its first token that is all that is known."""
    started = {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 9, "output_tokens": 1}}}

    async def breaks(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        writer.write(b"event: message_start\ndata: " + json.dumps(started).encode() + b"\n\n")
        await writer.drain()
        writer.close()

    row = asyncio.run(against(tmp_path, breaks, lambda gateway: fails(gateway, stream=True), provider=Anthropic))
    assert (row.prompt_tokens, row.completion_tokens) == (9, 1_000)


def test_a_stream_that_ends_without_the_usage_that_others_told_is_charged_with_care(tmp_path):
    """The connection broke behind the last token, before what it came to."""
    told = [True, False]

    def event(value):
        return b"data: " + json.dumps({"id": "c", **value}).encode() + b"\n\n"

    async def answers(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        writer.write(event({"choices": [{"index": 0, "delta": {"content": "word word word "}}]}))
        writer.write(event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
        if told.pop(0):
            writer.write(event({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}))
        await writer.drain()
        writer.close()

    async def work(gateway):
        for _ in range(2):
            async for _ in await gateway.achat(ask(stream=True)):
                pass
        return await rows_of(gateway)

    first, second = asyncio.run(against(tmp_path, answers, work))
    assert (first.prompt_tokens, first.completion_tokens, first.status) == (10, 5, "ok")
    assert (second.prompt_tokens, second.status) == (12, "ok")
    assert second.completion_tokens >= 5


# Naming calls


@pytest.mark.parametrize("header", [None, "Idempotency-Key"])
def test_a_call_that_is_tried_again_has_the_same_name(tmp_path, header):
    names = []

    async def fails_once(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        names.append(head.partition("idempotency-key: ")[2].partition("\r\n")[0])
        writer.write(b"HTTP/1.1 500 No\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        writer.close()

    async def work():
        server = await asyncio.start_server(fails_once, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        provider = OpenAI.Config(model="m", base_url=url, key_env=None, idempotency_header=header)
        try:
            made = config(tmp_path, DeploymentConfig(provider=provider), breaker=BreakerConfig(failures=100))
            async with Gateway(made) as gateway:
                for _ in range(2):
                    with pytest.raises(ApiError):
                        await gateway.achat(ask())
        finally:
            server.close()

    asyncio.run(work())
    assert len(names) == 6
    if header is None:
        assert set(names) == {""}
    else:
        assert names[0] == names[1] == names[2] != names[3] == names[4] == names[5]
        assert all(len(name) == 32 for name in names)


# What everybody else is told of it


class Learns(Strategy):
    """Remembers what it is told."""

    is_fast = True

    def __init__(self):
        super().__init__(None)
        self.told = []

    def route(self, query, pool):
        return Decision(candidates=(Candidate(model="small", score=1),), strategy="learns", reason="so")

    def observe(self, outcome):
        self.told.append((outcome.quality, outcome.cost))


def learning(tmp_path, *script, **fields):
    strategies, feedback = {"learns": StrategyConfig(use="static")}, FeedbackConfig(who="own", share=1)
    slow = mock(script=script or ("slow:0.3", "ok"), timeout_s=0.05)
    return config(tmp_path, slow, strategies=strategies, feedback=feedback, **fields)


def test_page_metrics_and_strategy_are_told_what_a_request_cost_in_the_end(tmp_path):
    """Not the most that it might have cost, which is all that is known as it ends."""

    async def work(gateway):
        await gateway.achat(ask(model="auto/learns"))
        guess, text = gateway.recent[-1].nano, gateway.metrics_text().decode()
        assert guess >= MOST
        assert 'anabranch_requests_total{endpoint="chat",model="small"' in text
        assert "anabranch_spend_nano_dollars_total{" not in text
        assert (await gateway.snapshot()).timeline[-1].nano == 0
        await gateway.settled()
        [row] = await rows_of(gateway)
        return row, gateway.recent[-1], gateway.metrics_text().decode(), (await gateway.snapshot()).timeline[-1]

    strategy = Learns()
    made = learning(tmp_path, lost=LostConfig(read_on_s=5))
    row, seen, text, moment = run(made, work, strategies={"learns": strategy})
    assert row.cost_nano == 2 * TOLD
    assert (seen.nano, seen.completion_tokens, moment.nano) == (row.cost_nano, row.completion_tokens, row.cost_nano)
    assert f'anabranch_spend_nano_dollars_total{{model="small",strategy="learns"}} {row.cost_nano:.1f}' in text
    assert f'anabranch_tokens_total{{direction="completion",model="small"}} {row.completion_tokens:.1f}' in text
    assert strategy.told == [(None, pytest.approx(row.cost_nano / 1e9))]


def test_a_score_does_not_wait_for_what_its_request_cost(tmp_path):
    """Whose it is, and what was decided, is known; what it cost, the strategy learns as soon as that is. The store keeps it then."""

    async def work(gateway):
        mine, _ = await gateway.store.create_key("mine")
        other, _ = await gateway.store.create_key("other")
        reply = await gateway.handle("chat", ask(model="auto/learns"), key=mine)
        said = {"request_id": reply.headers["x-request-id"], "score": 1}
        with pytest.raises(ApiError, match="no request"):
            await gateway.feedback(said, key=other)
        answer = await gateway.feedback(said, key=mine)
        with pytest.raises(ApiError, match="has scored"):
            await gateway.feedback(said, key=mine)
        assert said["request_id"] in gateway.unsettled
        before = list(strategy.told)
        await gateway.settled()
        await until_async(gateway.store.feedbacks)
        with pytest.raises(ApiError, match="has scored"):
            await gateway.feedback(said, key=mine)
        return answer["learned"], before, await gateway.store.feedbacks(), await rows_of(gateway)

    strategy = Learns()
    made = learning(tmp_path, lost=LostConfig(read_on_s=5))
    learned, before, [kept], [row] = run(made, work, strategies={"learns": strategy})
    assert (learned, before) == (True, [(1, None)])
    assert strategy.told == [(1, None), (None, pytest.approx(row.cost_nano / 1e9))]
    assert (kept.request_id, kept.score) == (row.request_id, 1)


def test_a_score_is_kept_by_a_gateway_that_stops_before_the_cost_is_known(tmp_path):
    made = learning(tmp_path, "hang", "ok", lost=LostConfig(read_on_s=50))

    async def main():
        async with Gateway(made, strategies={"learns": Learns()}) as gateway:
            reply = await gateway.handle("chat", ask(model="auto/learns"))
            await gateway.feedback({"request_id": reply.headers["x-request-id"], "score": 0.5})
            assert len(gateway.unsettled) == 1
        async with open_store(made.store) as store:
            return await store.feedbacks(), await store.ledger()

    [kept], [row] = asyncio.run(main())
    assert (kept.request_id, kept.score) == (row.request_id, 0.5)
