"""Recordings: what is written down, how, and that it is answered the same."""

import asyncio
import json
import os
from typing import Any

import pytest

from anabranch.errors import ConfigError, DataError
from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest
from anabranch.gateway.providers.recorded import Record, Replay, request_key

MESSAGE = {
    "id": "m1",
    "type": "message",
    "model": "c",
    "stop_reason": "end_turn",
    "content": [{"type": "text", "text": "said once"}],
    "usage": {"input_tokens": 3, "output_tokens": 2},
}
EVENTS = [
    {"type": "message_start", "message": {"id": "m1", "model": "c", "usage": {"input_tokens": 3}}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "said once"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
    {"type": "message_stop"},
]


class Reply:
    def __init__(self, status: int, content_type: str, body: bytes) -> None:
        self.status, self.headers, self._body = status, {"content-type": content_type, "set-cookie": "secret"}, body

    def read_ready(self) -> bytes:
        return b""

    async def read_some(self) -> bytes:
        part, self._body = self._body[:50], self._body[50:]
        return part

    def close(self) -> None: ...


class Claude:
    """A transport that answers as Anthropic does."""

    async def open(self, call: Any) -> Reply:
        body = json.loads(call.body)
        if body["messages"][0]["content"][0]["text"] == "too much":
            return Reply(
                529, "application/json", b'{"type":"error","error":{"type":"overloaded_error","message":"busy"}}'
            )
        if body.get("stream"):
            raw = "".join(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in EVENTS)
            return Reply(200, "text/event-stream", raw.encode())
        return Reply(200, "application/json", json.dumps(MESSAGE).encode())


class Nowhere:
    async def open(self, call: Any) -> Any:
        raise AssertionError("a replay opens no connection")


def ask(provider: Any, http: Any, text: str = "hello", stream: bool = False) -> Any:
    """Text and usage of an answer. Raises what the dispatcher does."""

    async def work() -> Any:
        group = Group(name="a", deployments=(Deployment(name="a-0", provider=provider),))
        dispatcher = Dispatcher([group], DispatchRules(retries=0), http=http)
        body = {"model": "x", "messages": [{"role": "user", "content": text}], "stream": stream}
        plan = Plan(candidates=("a",), deadline=dispatcher.now() + 5, keep=True)
        if not stream:
            answer = await dispatcher.complete(plan, UpstreamRequest("chat", body))
        else:
            opened = await dispatcher.stream(plan, UpstreamRequest("chat", body))
            async for _ in opened:
                pass
            answer = opened.answer()
        await dispatcher.close()
        return answer.text, answer.usage.prompt, answer.usage.completion

    return asyncio.run(work())


def test_what_a_provider_of_another_form_said_is_answered_the_same(tmp_path):
    """Recordings of Anthropic were kept under one hash and looked for under another."""
    path, claude = str(tmp_path / "traffic.jsonl"), Anthropic.Config(model="c", key_env=None)
    recorder = Record.Config(provider=claude, path=path)
    heard = [ask(recorder, Claude(), stream=stream) for stream in (False, True)]
    assert heard == [("said once", 3, 2)] * 2
    with pytest.raises(UpstreamError) as caught:
        ask(recorder, Claude(), "too much")
    assert caught.value.failure.kind == "server"

    replay = Replay.Config(path=path, provider=claude)
    assert [ask(replay, Nowhere(), stream=stream) for stream in (False, True)] == heard
    with pytest.raises(UpstreamError) as caught:
        ask(replay, Nowhere(), "too much")
    assert (caught.value.failure.kind, caught.value.failure.status) == ("server", 529)
    with pytest.raises(UpstreamError, match="not recorded"):
        ask(replay, Nowhere(), "something else")


def test_a_line_holds_no_question_no_key_and_no_cookie(tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-0123456789")
    path = tmp_path / "traffic.jsonl"
    ask(Record.Config(provider=Anthropic.Config(model="c"), path=str(path)), Claude(), "a private question")
    (line,) = path.read_text().splitlines()
    assert sorted(json.loads(line)) == ["body", "headers", "key", "seconds", "status"]
    assert not any(word in line for word in ("private", "sk-ant", "secret", "set-cookie"))


def test_a_line_that_finds_no_room_leaves_nothing_behind(tmp_path, monkeypatch, caplog):
    path = tmp_path / "traffic.jsonl"
    recorder = Record.Config(provider=Mock.Config(model="m", reply="fine"), path=str(path))
    ask(recorder, Nowhere())
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[: len(data) // 2]))
    assert ask(recorder, Nowhere(), "again")[0] == "fine"  # the request does not suffer
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert "No space left" in caplog.text
    ask(recorder, Nowhere(), "again")
    assert path.read_bytes().count(b"\n") == 2


def test_answers_to_one_request_come_in_the_order_they_were_recorded(tmp_path):
    path = tmp_path / "traffic.jsonl"
    for reply in ("first", "second"):
        ask(Record.Config(provider=Mock.Config(model="m", reply=reply), path=str(path)), Nowhere())

    async def work() -> None:
        group = Group(name="a", deployments=(Deployment(name="a-0", provider=Replay.Config(path=str(path))),))
        dispatcher, seen = Dispatcher([group]), []
        request = UpstreamRequest("chat", {"messages": [{"role": "user", "content": "hello"}], "stream": False})
        for _ in range(3):
            plan = Plan(candidates=("a",), deadline=dispatcher.now() + 5)
            seen.append((await dispatcher.complete(plan, request)).text)
        assert seen == ["first", "second", "second"]

    asyncio.run(work())


def test_a_key_minds_neither_the_order_of_fields_nor_the_name_of_the_model():
    one = request_key("/chat/completions", b'{"model":"a","messages":[1],"temperature":0}')
    assert one == request_key("/chat/completions", b'{"temperature":0,"messages":[1],"model":"b"}')
    assert one != request_key("/chat/completions", b'{"model":"a","messages":[1],"temperature":1}')
    assert one != request_key("/embeddings", b'{"model":"a","messages":[1],"temperature":0}')


def test_recordings_that_cannot_be_read_are_told(tmp_path):
    with pytest.raises(ConfigError, match="no recording at"):
        Replay.Config(path=str(tmp_path / "none")).build()
    path = tmp_path / "broken.jsonl"
    path.write_text('{"key": "k", "status": 200, "headers": {}, "body": "", "seconds": 0}\n{"key":\n')
    with pytest.raises(DataError, match=r"broken.jsonl, line 2"):
        Replay.Config(path=str(path)).build()
    with pytest.raises(ConfigError, match="no folder"):
        Record.Config(provider=OpenAI.Config(key_env=None), path=str(tmp_path / "no" / "x")).build()


def test_a_recorded_provider_holds_tools_as_the_other_does(tmp_path):
    path = str(tmp_path / "traffic.jsonl")
    kinds = {True: Anthropic.Config(model="c", key_env=None), False: Mock.Config(model="m")}
    for holds, config in kinds.items():
        assert Record.Config(provider=config, path=path).build().holds_tool_calls is holds
