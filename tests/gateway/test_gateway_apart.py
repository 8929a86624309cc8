"""Large bodies are read, counted and written in other threads than the loop's; and how many requests a key may have under way."""

import asyncio
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from anabranch.errors import RateError
from anabranch.gateway.cache import Entry, Retold
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LimitsConfig, ModelConfig, StrategyConfig
from anabranch.gateway.core import beginning, cached_answers, call_bodies
from anabranch.gateway.core import relay as relayed
from anabranch.gateway.dispatch import stream as dispatched
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http import counting, exchange
from anabranch.gateway.http.app import App
from anabranch.gateway.in_flight import InFlight
from anabranch.gateway.providers import upstream_request
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.upstream_request import UpstreamRequest
from anabranch.web.api_error import ApiError
from anabranch.web.large_json import LARGE
from anabranch.web.turns import Turns


def config(tmp_path, made, **fields):
    return GatewayConfig(
        **{
            "models": (ModelConfig(name="small", deployments=(DeploymentConfig(provider=made),)),),
            "strategies": {"cheapest": StrategyConfig(use="cheapest")},
            "store": str(tmp_path / "g.db"),
            "require_key": False,
            **fields,
        },
    )


def served(config, work):
    async def main():
        async with Gateway(config) as gateway, aiohttp.ClientSession() as session:
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            try:
                return await work(gateway, session, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
            finally:
                listener.close()
                await server.shutdown(0.1)

    return asyncio.run(main())


def noted(monkeypatch, module, name, seen):
    """The function as it is, but it says in which thread it ran."""
    inner = getattr(module, name)

    def run(*given, **named):
        seen.setdefault(name, set()).add(threading.current_thread() is threading.main_thread())
        return inner(*given, **named)

    monkeypatch.setattr(module, name, run)


WORK = [
    (exchange, "check_json_size"),
    (exchange, "parse"),
    (exchange, "parse_large"),
    (beginning, "count_prompt"),
    (beginning, "check_chat"),
    (cached_answers, "exact_key"),
    (cached_answers, "shortened"),
    (upstream_request, "dump_parts"),
]


@pytest.mark.parametrize("endpoint", ["chat/completions", "responses"])
def test_large_bodies_are_worked_on_in_other_threads_and_small_ones_at_once(tmp_path, monkeypatch, endpoint):
    seen = {}
    for module, name in WORK:
        noted(monkeypatch, module, name, seen)

    async def work(gateway, session, url):
        found = []
        for text in ("short", "long " * (LARGE // 4)):
            seen.clear()
            asked = {"messages": [{"role": "user", "content": text}]} if "chat" in endpoint else {"input": text}
            body = {"model": "small", "temperature": 0, **asked}
            async with session.post(f"{url}/v1/{endpoint}", data=json.dumps(body)) as answer:
                assert answer.status == 200, await answer.text()
            found.append(dict(seen))
        return found

    small, large = served(config(tmp_path, Mock.Config(model="m")), work)
    assert small == {name: {True} for name in ("check_json_size", "parse", "count_prompt", "check_chat", "exact_key")}
    assert large == {name: {False} for _, name in WORK if name != "parse"}


@pytest.mark.parametrize("endpoint", ["chat/completions", "responses", "messages", "messages/count_tokens"])
def test_bodies_of_very_many_short_values_are_worked_on_in_other_threads_too(tmp_path, monkeypatch, endpoint):
    """9,000 messages without a word are less than 256 KiB, and held the loop for 90 to 140 ms."""
    seen = {}
    names = [
        (exchange, "parse"),
        (beginning, "check_chat"),
        (cached_answers, "exact_key"),
        (exchange, "check_json_size"),
    ]
    for module, name in names:
        noted(monkeypatch, module, name, seen)

    async def work(gateway, session, url):
        given = "input" if endpoint == "responses" else "messages"
        body = {"model": "small", "temperature": 0, given: [{"role": "user", "content": "a"}] * 1_500}
        if endpoint == "messages":
            body["max_tokens"] = 5
        raw = json.dumps(body)
        assert len(raw) < LARGE / 2
        async with session.post(f"{url}/v1/{endpoint}", data=raw) as answer:
            assert answer.status == 200, await answer.text()
        return seen

    found = served(config(tmp_path, Mock.Config(model="m")), work)
    assert set().union(*found.values()) == {False}
    assert {"parse", "check_json_size"} <= set(found)


@pytest.mark.parametrize("path", ["chat/completions", "messages/count_tokens"])
def test_what_a_tokenizer_counts_is_counted_in_other_threads(tmp_path, path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "t.json"))
    model = ModelConfig(
        name="small",
        tokenizer=str(tmp_path / "t.json"),
        deployments=(DeploymentConfig(provider=Mock.Config(model="small")),),
    )

    async def work(gateway, session, url):
        where = []
        count = gateway.runtime.counters["small"]

        def noted(text):
            where.append(threading.current_thread() is threading.main_thread())
            return count(text)

        gateway.runtime.counters["small"] = noted
        found = []
        for text in ("a b", "a b " * 10_000):
            where.clear()
            body = {"model": "small", "messages": [{"role": "user", "content": text}]}
            async with session.post(f"{url}/v1/{path}", json=body) as answer:
                assert answer.status == 200, await answer.text()
            found.append(set(where))
        return found

    assert served(config(tmp_path, Mock.Config(model="m"), models=(model,)), work) == [{True}, {False}]


@pytest.mark.parametrize("tokens", [20, 4_000])
def test_a_long_stream_is_put_together_and_a_kept_one_told_again_in_other_threads(tmp_path, monkeypatch, tokens):
    """The end of a kept stream of 4,000 chunks held the loop for 71 ms, and telling it again as a stream for 36 to 250."""
    seen = {}
    for module, name in ((dispatched, "assembled"), (relayed, "as_chunks"), (relayed, "load_large")):
        noted(monkeypatch, module, name, seen)

    async def work(gateway, session, url):
        body = {
            "model": "small",
            "temperature": 0,
            "stream": True,
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": tokens,
        }
        told = []
        for _ in range(2):
            async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                chunks = [
                    json.loads(line[6:]) for line in (await answer.text()).split("\n\n") if line.startswith("data: {")
                ]
            told.append("".join(one["delta"].get("content") or "" for chunk in chunks for one in chunk["choices"]))
        assert told[0] == told[1]
        return seen

    made = Mock.Config(model="m", reply="word " * tokens, tokens_per_s=1e9)
    found = served(config(tmp_path, made), work)
    assert found["assembled"] == {tokens == 20}
    # A kept answer of few bytes is told again at once, whatever it was before.
    assert found["as_chunks"] == {True}
    assert "load_large" not in found


def test_a_kept_answer_of_many_values_is_told_again_in_another_thread(monkeypatch):
    seen = {}
    noted(monkeypatch, relayed, "as_chunks", seen)
    content = [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}] * 400
    body = {
        "id": "x",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}, "logprobs": {"content": content}}],
    }
    entry = Entry(body=json.dumps(body).encode(), model="m")
    services = SimpleNamespace(turns=Turns(ThreadPoolExecutor(1)))
    state = SimpleNamespace(
        id="r", elapsed=lambda: 0.0, body={"stream": True}, endpoint="chat", tenant="t", services=services, runtime=None
    )

    async def main():
        made = cached_answers.CachedAnswers.__new__(cached_answers.CachedAnswers)
        made._state, made._caches = state, SimpleNamespace(retold=Retold())
        reply, again = await made.reply(entry, "exact"), await made.reply(entry, "exact")
        # Whoever reads the same meanwhile reads the same chunks.
        assert reply.stream._told is again.stream._told
        return b"".join([piece async for piece in reply.stream])

    told = [json.loads(line[6:]) for line in asyncio.run(main()).split(b"\n\n") if line.startswith(b"data: {")]
    assert told[0]["choices"][0]["logprobs"] == {"content": content}
    assert seen == {"as_chunks": {False}}


def test_a_cascade_s_calls_with_a_large_body_are_worked_on_in_other_threads(tmp_path, monkeypatch):
    seen = {}
    for module, name in ((call_bodies, "count_prompt"), (upstream_request, "dump_parts")):
        noted(monkeypatch, module, name, seen)
    counted = []
    inner = call_bodies.count_prompt
    monkeypatch.setattr(call_bodies, "count_prompt", lambda body: counted.append(1) or inner(body))

    async def work(gateway, session, url):
        messages = [{"role": "user", "content": "word " * 60} for _ in range(1_000)]
        body = {"model": "auto/c", "messages": messages}
        async with session.post(f"{url}/v1/chat/completions", data=json.dumps(body)) as answer:
            assert answer.status == 200, await answer.text()
            return int(answer.headers["x-route-calls"])

    made = tuple(
        ModelConfig(name=name, deployments=(DeploymentConfig(provider=Mock.Config(model=name, reply="no")),))
        for name in ("small", "large")
    )
    cascade = StrategyConfig(use="consistency", fields={"models": ("small", "large"), "samples": 4})
    asked = served(config(tmp_path, made[0].deployments[0].provider, models=made, strategies={"c": cascade}), work)
    assert asked >= 4
    assert (seen, len(counted)) == ({"count_prompt": {False}, "dump_parts": {False}}, 1)


def test_a_large_body_arrives_whole_and_without_a_warning(tmp_path):
    text = 'naïve \\ "text" \U0001f98a\n' * 100_000
    got = []

    async def answer(request):
        got.append(await request.json())
        message = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        return web.json_response({"choices": [message], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    async def main():
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/chat/completions", answer)
        async with TestServer(app) as server:
            made = OpenAI.Config(model="theirs", base_url=str(server.make_url("/v1")), key_env=None)
            async with Gateway(config(tmp_path, made)) as gateway:
                body = {"model": "small", "messages": [{"role": "user", "content": text}]}
                await gateway.handle("chat", body, num_bytes=len(text))

    assert len(text) > LARGE
    asyncio.run(main())
    assert got[0]["messages"] == [{"role": "user", "content": text}]
    assert got[0]["model"] == "theirs"


@pytest.mark.parametrize("path", ["messages/count_tokens", "responses/input_tokens"])
def test_tokens_of_a_large_body_are_counted_in_another_thread_and_it_is_written_nowhere(tmp_path, monkeypatch, path):
    seen = {}
    for module, name in (*WORK, (counting, "count_prompt"), (counting, "count_native")):
        noted(monkeypatch, module, name, seen)

    async def work(gateway, session, url):
        text = "long " * (LARGE // 4)
        asked = {"messages": [{"role": "user", "content": text}]} if "messages" in path else {"input": text}
        async with session.post(f"{url}/v1/{path}", data=json.dumps({"model": "small", **asked})) as answer:
            assert answer.status == 200, await answer.text()
            return (await answer.json())["input_tokens"]

    assert served(config(tmp_path, Mock.Config(model="m")), work) > LARGE // 4
    assert seen == {name: {False} for name in ("check_json_size", "parse_large", "count_prompt")}


def test_a_large_body_in_many_parts_is_put_together_in_another_thread(tmp_path, monkeypatch):
    """However it comes: its parts are read as they come, and nothing is made of them on the loop."""
    seen, text, parts = {}, "x" * 3_000_000, []
    noted(monkeypatch, exchange, "parse_large", seen)
    inner = exchange.read_parts

    async def read(*given, **named):
        parts.extend(found := await inner(*given, **named))
        return found

    monkeypatch.setattr(exchange, "read_parts", read)

    async def work(gateway, session, url):
        body = {"model": "small", "messages": [{"role": "user", "content": text}]}
        data = io.BytesIO(json.dumps(body).encode())
        async with session.post(f"{url}/v1/messages/count_tokens", data=data) as answer:
            return (await answer.json())["input_tokens"]

    assert served(config(tmp_path, Mock.Config(model="m")), work) == pytest.approx(len(text) / 4, rel=1e-3)
    assert (seen, len(parts) > 1) == ({"parse_large": {False}}, True)
    assert sum(map(len, parts)) > len(text)


def test_other_messages_of_a_large_request_are_not_written_to_see_how_long_they_are(monkeypatch):
    seen = {}
    noted(monkeypatch, upstream_request, "dump_parts", seen)
    text = "long " * (LARGE // 4)
    request = UpstreamRequest("chat", {"messages": []}, prompt_tokens=7, num_bytes=len(text))
    other = request.with_body(messages=[{"role": "user", "content": text}])
    assert not seen
    assert other.prompt_tokens == pytest.approx(len(text) / 4, rel=1e-2)
    # A small one to the byte.
    small = UpstreamRequest("chat", {"messages": []}, prompt_tokens=7).with_body(a="x" * 8)
    assert small.prompt_tokens == len(b'{"model":"","messages":[],"a":"xxxxxxxx"}') // 4


def test_a_large_body_with_a_mistake_is_told_so(tmp_path):
    async def work(gateway, session, url):
        found = []
        for raw in (
            b'{"model": "small", "messages": "' + b"x" * LARGE + b'"}',
            b'{"a": "' + b"x" * LARGE,
            b"[" * LARGE + b'"' + b"x" * 9000 + b'"',
        ):
            async with session.post(f"{url}/v1/chat/completions", data=raw) as answer:
                found.append((answer.status, json.loads(await answer.read())["error"]["code"]))
        return found

    assert served(config(tmp_path, Mock.Config(model="m")), work) == [
        (400, "invalid_value"),
        (400, "invalid_json"),
        (400, "too_many_values"),
    ]


# How many at a time


def test_requests_under_way_by_sender():
    held = InFlight()
    held.enter("a", 2)
    held.enter("a", 2)
    with pytest.raises(RateError, match="2 requests under way at a time"):
        held.enter("a", 2)
    held.enter("b", None)
    held.leave("a")
    held.enter("a", 2)
    for whose in "aab":
        held.leave(whose)
    assert held._counts == {}


def ask(**fields):
    return {"model": "small", "messages": [{"role": "user", "content": "hello"}], **fields}


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_has_so_many_requests_under_way_and_others_have_their_own(tmp_path, stream):
    async def main():
        made = config(tmp_path, Mock.Config(model="small", latency_s=0.2), limits=LimitsConfig(max_in_flight=3))
        async with Gateway(made) as gateway:
            two, _ = await gateway.store.create_key("two", max_in_flight=2)
            other, _ = await gateway.store.create_key("other")

            async def one(key):
                reply = await gateway.handle("chat", ask(stream=stream), key=key)
                if reply.stream is not None:
                    async for _ in reply.stream:
                        pass

            for _ in range(2):  # and again, once they have ended
                calls = [one(key) for key in [two] * 5 + [other] * 5 + [None] * 5]
                found = await asyncio.gather(*calls, return_exceptions=True)
                refused = [isinstance(item, ApiError) for item in found]
                assert [refused[at : at + 5].count(False) for at in (0, 5, 10)] == [2, 3, 3]
                error = next(item for item in found if item is not None)
                assert (error.status, error.code, error.headers["Retry-After"]) == (429, "rate_limit_exceeded", "1")
            assert gateway.senders._counts == {}
            await gateway.store.edit_key("two", max_in_flight=None)
            assert (await gateway.store.keys())[0].max_in_flight is None

    asyncio.run(main())


def test_a_refused_or_broken_request_gives_its_place_back(tmp_path):
    async def main():
        made = config(
            tmp_path,
            Mock.Config(model="small", fails=1.0, fail_with="422"),
            limits=LimitsConfig(max_in_flight=1, rpm=4),
        )
        async with Gateway(made) as gateway:
            statuses = []
            for body in [ask(), ask(model="none"), ask(temperature=9), *[ask()] * 4]:
                with pytest.raises(ApiError) as caught:
                    await gateway.achat(body)
                statuses.append(caught.value.status)
            assert statuses == [422, 404, 400, 422, 422, 422, 429]
            assert gateway.senders._counts == {}

    asyncio.run(main())
