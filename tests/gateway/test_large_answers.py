"""Large answers are read, and written where they are translated, in another thread than the loop's, and are what small ones would be."""

import asyncio
import json
import threading

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.core.held_body import HeldBody
from anabranch.gateway.dispatch import late
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http import counting, exchange, messages, responses
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.store import LedgerQuery
from anabranch.web.large_json import LARGE, SLICE
from waiting import until_async

VECTORS = {
    "object": "list",
    "data": [
        {"object": "embedding", "index": index, "embedding": [index + place / 7 for place in range(2000)]}
        for index in range(12)
    ],
    "usage": {"prompt_tokens": 12, "total_tokens": 12},
}
LONG = {
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "naïve \\ " * 50_000}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 7},
}
EMBED = {"model": "small", "input": ["a"] * 12}
CHAT = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}


def is_main():
    return threading.current_thread() is threading.main_thread()


def noted(monkeypatch, module, name, seen):
    """The function as it is, but it says whether it ran on the loop."""
    inner = getattr(module, name)

    def run(*given, **named):
        seen.append((name, is_main()))
        return inner(*given, **named)

    monkeypatch.setattr(module, name, run)


def against(tmp_path, answer, work, monkeypatch=None):
    """What ``work(gateway, post)`` gives, where the upstream's every answer is ``answer``; ``post(path, body)`` gives status and bytes."""

    async def upstream(request):
        return web.Response(body=answer, content_type="application/json")

    async def main():
        app = web.Application()
        app.router.add_post("/v1/{rest:.*}", upstream)
        async with TestServer(app) as server, aiohttp.ClientSession() as session:
            made = OpenAI.Config(model="m", base_url=str(server.make_url("/v1")), key_env=None)
            config = GatewayConfig(
                models=(ModelConfig(name="small", deployments=(DeploymentConfig(provider=made),)),),
                store=str(tmp_path / "g.db"),
                require_key=False,
            )
            async with Gateway(config) as gateway:
                served = App(gateway).server()
                listener = await asyncio.get_running_loop().create_server(served, "127.0.0.1", 0)
                url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"

                async def post(path, body):
                    async with session.post(f"{url}/{path}", json=body) as reply:
                        return reply.status, await reply.read()

                try:
                    return await work(gateway, post)
                finally:
                    listener.close()
                    await served.shutdown(0.1)

    return asyncio.run(main())


def test_vectors_are_read_beside_the_loop_and_come_as_they_were(tmp_path, monkeypatch):
    seen, raw = [], json.dumps(VECTORS).encode()
    assert len(raw) > LARGE
    noted(monkeypatch, late, "read_answer", seen)

    async def work(gateway, post):
        assert await post("embeddings", EMBED) == (200, raw)
        # From a cache it is not read at all.
        assert await post("embeddings", EMBED) == (200, raw)
        await gateway.settled()
        rows = await gateway.store.ledger(LedgerQuery(newest_first=False))
        assert [(row.prompt_tokens, row.cache) for row in rows] == [(12, ""), (0, "exact")]

    against(tmp_path, raw, work)
    assert seen == [("read_answer", False)]


def test_a_small_answer_is_read_at_once(tmp_path, monkeypatch):
    seen = []
    noted(monkeypatch, late, "read_answer", seen)
    small = {**VECTORS, "data": VECTORS["data"][:1]}
    against(tmp_path, json.dumps(small).encode(), lambda gateway, post: post("embeddings", EMBED))
    assert seen == [("read_answer", True)]


@pytest.mark.parametrize(
    ("path", "body", "module", "name"),
    [
        ("messages", {**CHAT, "max_tokens": 9}, exchange, "_told"),
        ("responses", {"model": "small", "input": "hi"}, exchange, "_told"),
    ],
)
def test_a_long_answer_in_another_form_is_made_beside_the_loop(tmp_path, monkeypatch, path, body, module, name):
    seen, raw = [], json.dumps(LONG).encode()
    assert len(raw) > LARGE
    noted(monkeypatch, module, name, seen)
    status, made = against(tmp_path, raw, lambda gateway, post: post(path, body))
    assert status == 200
    said = json.loads(made)
    text = said["content"][0]["text"] if path == "messages" else said["output"][0]["content"][0]["text"]
    assert text == LONG["choices"][0]["message"]["content"]
    assert seen == [(name, False)]


@pytest.mark.parametrize("path", ["messages", "responses"])
def test_a_large_answer_in_another_form_is_written_in_short_steps(tmp_path, monkeypatch, path):
    """It was in one: in another thread, but with Python's lock, so that nobody else went on either."""
    written, dumps = [], json.dumps

    def noted(*given, **named):
        written.append(dumps(*given, **named))
        return written[-1]

    large = {
        **LONG,
        "choices": [{**LONG["choices"][0], "message": {"role": "assistant", "content": "naïve " * 200_000}}],
    }
    body = {"model": "small", "input": "hi"} if path == "responses" else CHAT
    raw = dumps(large).encode()

    async def work(gateway, post):
        monkeypatch.setattr(json, "dumps", noted)
        return await post(path, body)

    status, made = against(tmp_path, raw, work)
    assert (status, len(made) > 1_200_000) == (200, True)
    assert max(map(len, written)) <= 2 * SLICE


def test_a_stream_that_is_answered_whole_is_read_beside_the_loop(tmp_path, monkeypatch):
    seen = []
    noted(monkeypatch, late, "read_answer", seen)
    status, got = against(
        tmp_path, json.dumps(LONG).encode(), lambda gateway, post: post("chat/completions", {**CHAT, "stream": True})
    )
    assert (status, seen) == (200, [("read_answer", False)])
    assert got.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "answer",
    [
        b"[" * (LARGE + 9),
        b'{"data": [' + b"1," * LARGE + b"}",
        b'{"data": ["' + b"x" * LARGE + b'"]}',
        b"\xff" * (LARGE + 1),
    ],
)
def test_a_large_answer_that_is_none_is_told_as_a_small_one(tmp_path, answer):
    async def work(gateway, post):
        status, body = await post("embeddings", EMBED)
        await gateway.settled()
        [row] = await gateway.store.ledger()
        return status, json.loads(body)["error"]["code"], row.status

    assert against(tmp_path, answer, work)[0::2] == (502, "error")


def test_tokens_of_a_large_prompt_are_counted_beside_the_loop(tmp_path, monkeypatch):
    """All of it: what the body is turned into, and how deep it is, among it."""
    seen = []
    for module, name in ((messages, "check_depth"), (messages, "to_chat"), (counting, "count_prompt")):
        noted(monkeypatch, module, name, seen)
    text = "word " * (LARGE // 4)
    found = []

    async def work(gateway, post):
        for content in ("word", text):
            seen.clear()
            status, body = await post(
                "messages/count_tokens", {**CHAT, "messages": [{"role": "user", "content": content}]}
            )
            assert status == 200, body
            found.append((json.loads(body)["input_tokens"] > LARGE // 4, [*seen]))

    against(tmp_path, b"{}", work)
    names = ("check_depth", "to_chat", "count_prompt")
    assert found == [(False, [(name, True) for name in names]), (True, [(name, False) for name in names])]


def test_a_prompt_is_held_whole_until_it_is_counted_though_its_client_goes_away(tmp_path, monkeypatch):
    began, gate, closes = threading.Event(), threading.Event(), []
    inner = counting.count_prompt
    monkeypatch.setattr(counting, "count_prompt", lambda *given: began.set() or (gate.wait() and inner(*given)))
    body = {**CHAT, "messages": [{"role": "user", "content": "word " * (LARGE // 4)}]}

    async def work(gateway, post):
        room, hold = gateway._keys._room, gateway.hold

        async def noted_hold(*given):
            held = await hold(*given)
            close = held.close
            monkeypatch.setattr(HeldBody, "close", lambda self: closes.append(1) or close())
            return held

        monkeypatch.setattr(gateway, "hold", noted_hold)
        task = asyncio.ensure_future(post("messages/count_tokens", body))
        await asyncio.to_thread(began.wait)
        # It is whole: nobody takes it for one that has been coming for long.
        assert (room.num_bytes > LARGE, room._coming) == (True, {})
        task.cancel()
        await until_async(lambda: closes and room.num_bytes > LARGE)
        gate.set()
        await until_async(lambda: not room.num_bytes and gateway.senders._counts == {})

    try:
        against(tmp_path, b"{}", work)
    finally:
        gate.set()


@pytest.mark.parametrize("path", ["messages", "responses"])
def test_large_requests_in_another_form_are_turned_into_chats_beside_the_loop(tmp_path, monkeypatch, path):
    seen, text = [], "word " * (LARGE // 4)
    noted(monkeypatch, messages if path == "messages" else responses, "to_chat", seen)
    body = (
        {**CHAT, "messages": [{"role": "user", "content": text}]}
        if path == "messages"
        else {"model": "small", "input": text}
    )
    status, _ = against(tmp_path, json.dumps(LONG).encode(), lambda gateway, post: post(path, body))
    assert (status, seen) == (200, [("to_chat", False)])
