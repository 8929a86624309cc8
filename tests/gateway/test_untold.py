"""What answers are charged whose upstream does not say what they come to, or says what cannot be: exactly, against real servers."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from anabranch.gateway.config import (
    DeploymentConfig,
    GatewayConfig,
    LostConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.store import LedgerRow, batch, open_store
from anabranch.routers.money import MOST_NANO, Price
from anabranch.web.api_error import ApiError
from paced_time import pace, run_paced

# 1,000 and 2,000 nano-dollars a token.
PRICE = Price.of_dollars(1, 2)
ZEROS = {"prompt_tokens": 0, "completion_tokens": 0}
FULL = {"prompt_tokens": 500, "completion_tokens": 50}


def body(text="ok", usage=None, **fields):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], **({} if usage is None else {"usage": usage}), **fields}


def chunk(text="", reason=None, **fields):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}], **fields}


def sse(value):
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def whole(answer):
    async def handler(request):
        return web.json_response(answer)

    return handler


def stream(*parts):
    """Chunks, and numbers: seconds to wait."""

    async def handler(request):
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        try:
            for part in parts:
                if isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    await response.write(part if isinstance(part, bytes) else sse(part))
        except ConnectionError:
            return response
        return response

    return handler


@asynccontextmanager
async def serving(tmp_path, handler, price=PRICE, most=100, thinks=False, stops=None, first_s=None, **fields):
    app = web.Application()
    app.router.add_post("/v1/{tail:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    provider = OpenAI.Config(model="m", base_url=url, key_env=None)
    deployments = (DeploymentConfig(provider=provider, stops_when_closed=stops, first_token_timeout_s=first_s),)
    made = GatewayConfig(
        models=(ModelConfig(name="m", price=price, max_tokens=most, thinks=thinks, deployments=deployments),),
        require_key=False,
        strategies={"cheapest": StrategyConfig(use="cheapest")},
        store=str(tmp_path / "g.db"),
        **fields,
    )
    try:
        async with Gateway(made) as gateway:
            yield gateway
    finally:
        await runner.cleanup()


def ask(text="hello", **fields):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


def charged(tmp_path, handler, until=None, most=100, **fields):
    """The row of one request; its reader leaves once a chunk is as ``until`` says."""

    async def main():
        async with serving(tmp_path, handler, most=most, **fields) as gateway:
            given = await pace(gateway).achat(ask(stream=True) if until is not None else ask())
            if until is not None:
                async for one in given:
                    if until(one):
                        break
                await given.aclose()
            await asyncio.wait_for(gateway.settled(), 60)
            [row] = await gateway.store.ledger()
            [*budgets] = await gateway.store.budgets()
            assert not budgets
            return row

    # What may have been billed depends on how long it took.
    return run_paced(main())


def at_end(one):
    return bool(one["choices"]) and one["choices"][0]["finish_reason"] is not None


def never(one):
    return False


# Streams


@pytest.mark.parametrize("early", [ZEROS, {"prompt_tokens": 500, "completion_tokens": 1}, None])
def test_a_reader_who_stops_at_the_end_is_read_on_for(tmp_path, early):
    """Zeros in each chunk were taken for what the answer comes to."""
    fields = {} if early is None else {"usage": early}
    chunks = [chunk("word " if at < 9 else "", None if at < 9 else "stop", **fields) for at in range(10)]
    row = charged(tmp_path, stream(*chunks, 0.1, {"choices": [], "usage": FULL}, b"data: [DONE]\n\n"), at_end)
    assert (row.cost_nano, row.completion_tokens, row.is_estimated) == (500 * 1_000 + 50 * 2_000, 50, False)
    assert row.status == "cancelled"


def test_what_was_asked_counts_among_what_is_held_for_streams_that_are_read_on(tmp_path, monkeypatch):
    """R20d: requests of 8 MB whose streams were left stayed in memory, three times each, and counted 64 KiB."""
    monkeypatch.setattr("anabranch.gateway.dispatch.late.MOST_BYTES", 200_000)
    handler = stream(chunk("a"), 0.3, chunk("", "stop"), {"choices": [], "usage": FULL}, b"data: [DONE]\n\n")

    async def main():
        async with serving(tmp_path, handler, stops=False) as gateway:
            late, found = gateway.runtime.dispatcher.late, []
            for _ in range(3):
                given = await gateway.achat(ask("x" * 40_000, stream=True))
                async for _ in given:
                    break
                await given.aclose()
                found.append((len(late), sum(size for _, size in late._open.values())))
            await asyncio.wait_for(gateway.settled(), 60)
            return found

    found = asyncio.run(main())
    assert [count for count, _ in found] == [1, 1, 1]
    assert all(size >= 3 * 40_000 for _, size in found)


def test_a_usage_that_never_comes_is_waited_for_only_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr("anabranch.gateway.dispatch.upstream_stream.USAGE_S", 0.1)
    row = charged(tmp_path, stream(chunk("four", usage=ZEROS), chunk("", "stop", usage=ZEROS), 5.0), at_end)
    assert row.completion_tokens == 4 + 1 + 8
    assert (row.prompt_tokens, row.is_estimated) == (5 + 7, True)


def test_no_stream_is_read_on_where_nothing_can_be_learned(tmp_path):
    row = charged(
        tmp_path, stream(chunk("four"), chunk("", "stop"), 5.0), at_end, lost=LostConfig(read_on=0), price=PRICE
    )
    assert row.is_estimated
    assert row.completion_tokens >= 4


@pytest.mark.parametrize("early", [ZEROS, {"prompt_tokens": 12, "completion_tokens": 1}])
def test_a_whole_stream_that_told_only_of_its_beginning_is_charged_by_its_text(tmp_path, early):
    chunks = [chunk("1,2,3,4,5,", usage=early)] * 6
    row = charged(tmp_path, stream(*chunks, chunk("", "stop"), b"data: [DONE]\n\n"), never)
    assert (row.status, row.prompt_tokens) == ("ok", 12)
    assert row.completion_tokens == 60 + 1 + 8


async def late(request):
    """A whole answer, where a stream was asked for."""
    await asyncio.sleep(0.3)
    return web.json_response(body("four"))


@pytest.mark.parametrize("handler", [late, stream(0.3, chunk("four"), chunk("", "stop"), b"data: [DONE]\n\n")])
@pytest.mark.parametrize(("thinks", "least"), [(True, 150), (False, 0)])
def test_a_whole_stream_that_told_nothing_may_have_been_thought_about_all_its_time(tmp_path, handler, thinks, least):
    row = charged(tmp_path, handler, never, most=9_000, thinks=thinks)
    assert row.status == "ok"
    assert row.completion_tokens > least if thinks else row.completion_tokens == 4 + 1 + 8


@pytest.mark.parametrize("usage_at", ["before the end", "with the end", "behind it"])
def test_a_usage_that_covers_all_text_is_believed(tmp_path, usage_at):
    end = {
        "before the end": [{"choices": [], "usage": FULL}, chunk("", "stop")],
        "with the end": [chunk("", "stop", usage=FULL)],
        "behind it": [chunk("", "stop"), {"choices": [], "usage": FULL}],
    }[usage_at]
    row = charged(tmp_path, stream(chunk("word "), *end, b"data: [DONE]\n\n"), never)
    assert (row.prompt_tokens, row.completion_tokens, row.is_estimated) == (500, 50, False)


def test_a_dropped_stream_is_charged_a_token_for_each_byte(tmp_path):
    parts = [part for _ in range(40) for part in (chunk("1,2,3,4,5,"), 0.01)]
    seen = []
    row = charged(
        tmp_path,
        stream(*parts),
        lambda one: seen.append(one) or len(seen) == 20,
        most=4_000,
        lost=LostConfig(margin_s=0.1),
    )
    # What was made in the time after it too.
    assert 200 + 8 <= row.completion_tokens < 4_000
    assert row.cost_nano <= row.reserved_nano


def test_an_event_of_which_half_has_come_counts(tmp_path):
    half = sse(chunk("x" * 500))[:-100]
    row = charged(
        tmp_path,
        stream(chunk("a"), 0.2, sse(chunk("b")) + half, 1.0),
        lambda one: one["choices"][0]["delta"]["content"] == "b",
        most=4_000,
        lost=LostConfig(margin_s=0.0),
    )
    assert 400 <= row.completion_tokens < 4_000


def test_the_reader_is_not_told_a_usage_that_was_said_before_the_end(tmp_path):
    early = {"prompt_tokens": 12, "completion_tokens": 1}
    handler = stream(*[chunk("1,2,3,4,5,", usage=early)] * 6, chunk("", "stop"), b"data: [DONE]\n\n")

    async def main():
        async with serving(tmp_path, handler) as gateway:
            asked = ask(stream=True, stream_options={"include_usage": True})
            return [one async for one in await gateway.achat(asked)][-1]["usage"]

    usage = asyncio.run(main())
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (12, 15)


def test_the_config_may_know_better_how_dense_texts_are(tmp_path):
    handler = stream(chunk("word " * 10), chunk("", "stop"), b"data: [DONE]\n\n")
    row = charged(tmp_path, handler, never, lost=LostConfig(bytes_per_token=2.5))
    assert row.completion_tokens == 20 + 1 + 8


# Whole answers


def test_a_whole_answer_is_charged_by_its_text_alone(tmp_path):
    row = charged(tmp_path, whole(body("ok", system_fingerprint="f" * 4000)), most=50)
    assert (row.prompt_tokens, row.completion_tokens, row.is_estimated) == (12, 2 + 1 + 8, True)
    assert row.cost_nano <= row.reserved_nano


def test_no_answer_that_did_not_tell_is_charged_more_than_was_set_aside(tmp_path):
    row = charged(tmp_path, whole(body("7 " * 3_000)), most=50)
    assert (row.completion_tokens, row.cost_nano) == (50, row.reserved_nano)


@pytest.mark.parametrize("usage", [ZEROS, {"prompt_tokens": 10**9, "completion_tokens": 10**9}, {"prompt_tokens": -1}])
def test_a_usage_that_cannot_be_is_none(tmp_path, usage):
    row = charged(tmp_path, whole(body("1,2,3,", usage)))
    assert (row.prompt_tokens, row.completion_tokens, row.is_estimated) == (12, 6 + 1 + 8, True)


def test_completion_tokens_without_a_prompt_are_a_least(tmp_path):
    row = charged(tmp_path, whole(body("ok", {"prompt_tokens": 0, "completion_tokens": 70})))
    assert (row.prompt_tokens, row.completion_tokens) == (12, 70)


def test_calls_and_thoughts_are_text(tmp_path):
    answer = body(None)
    call = {"id": "c" * 99, "type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}
    answer["choices"][0]["message"] |= {"tool_calls": [call], "reasoning_content": "hm"}
    assert charged(tmp_path, whole(answer)).completion_tokens == 4 + 8 + 2 + 1 + 8


def test_what_cannot_be_paid_is_charged_as_far_as_it_can(tmp_path):
    """It raised, there was no row, and nobody got the money back."""

    async def main():
        dear = Price(input=MOST_NANO // 10, output=MOST_NANO // 10)
        told = {"prompt_tokens": 10**7, "completion_tokens": 10**7}
        async with serving(tmp_path, whole(body("ok", told)), price=dear) as gateway:
            await gateway.store.set_budget("global", MOST_NANO)
            assert (await gateway.achat(ask(max_tokens=5)))["choices"]
            await asyncio.wait_for(gateway.settled(), 60)
            return await gateway.store.ledger(), await gateway.store.budgets()

    [row], [budget] = asyncio.run(main())
    assert row.cost_nano == budget.spent_nano == MOST_NANO
    assert set(row.flags) == {"over_reserved", "capped"}
    assert budget.reserved_nano == 0


def test_what_was_spent_stays_a_number_that_a_database_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MOST_SPENT", MOST_NANO + 5)

    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            await store.set_budget("global", 1_000)
            held = [await store.reserve(name, ("global",), 10) for name in ("a", "b")]
            for one in held:
                await store.settle(one, LedgerRow(request_id=one.request_id, cost_nano=2 * MOST_NANO))
            return await store.budgets(), await store.ledger()

    [budget], rows = asyncio.run(main())
    assert (budget.spent_nano, budget.reserved_nano) == (MOST_NANO + 5, 0)
    assert [row.cost_nano for row in rows] == [MOST_NANO] * 2


# Providers that make a stream to its end, whoever closes the connection


def seen(one):
    return bool(one["choices"]) and bool(one["choices"][0]["delta"]["content"])


GOES_ON = (chunk("word "), 0.2, *[chunk("word ")] * 9, chunk("", "stop"))


@pytest.mark.parametrize(
    ("stops", "read_on", "tokens"),
    [(False, 9, 50), (True, 9, None), (False, 0, 4_000)],
    ids=["read on", "closed", "no room"],
)
def test_a_stream_that_is_left_is_read_on_where_its_provider_does_not_stop(tmp_path, stops, read_on, tokens):
    """3,000 were billed, 1,091 charged (S2 of R20c)."""
    handler = stream(*GOES_ON, {"choices": [], "usage": FULL}, b"data: [DONE]\n\n")
    row = charged(tmp_path, handler, seen, most=4_000, stops=stops, lost=LostConfig(read_on=read_on, margin_s=0.1))
    assert row.status == "cancelled"
    if tokens is None:
        assert row.is_estimated
        assert row.completion_tokens < 4_000
    else:
        assert (row.completion_tokens, row.is_estimated) == (tokens, read_on == 0)


def test_one_that_does_not_tell_even_then_is_charged_its_text(tmp_path):
    row = charged(tmp_path, stream(*GOES_ON, b"data: [DONE]\n\n"), seen, most=4_000, stops=False)
    assert (row.completion_tokens, row.is_estimated) == (50 + 1 + 8, True)


def test_and_one_that_breaks_then_the_most(tmp_path):
    row = charged(tmp_path, stream(*GOES_ON[:-1]), seen, most=4_000, stops=False)
    assert (row.completion_tokens, row.is_estimated) == (4_000, True)


@pytest.mark.parametrize("stops", [True, False])
def test_one_that_brought_no_token_in_time_is_read_on_too(tmp_path, stops):
    handler = stream(
        {"choices": [{"index": 0, "delta": {"role": "assistant"}}]}, 0.5, *GOES_ON, {"choices": [], "usage": FULL}
    )

    async def main():
        async with serving(
            tmp_path, handler, most=4_000, stops=stops, first_s=0.2, retries=RetryConfig(attempts=1)
        ) as gateway:
            with pytest.raises(ApiError):
                await gateway.achat(ask(stream=True))
            await asyncio.wait_for(gateway.settled(), 60)
            [row] = await gateway.store.ledger()
            return row

    row = asyncio.run(main())
    assert (row.completion_tokens == 50) is not stops
