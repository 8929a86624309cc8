"""Streams of other servers with oddities on the wire, in each form through a real gateway."""

import asyncio
import json
from threading import Event, Thread

import pytest

from anabranch.gateway.store import open_store
from gateway_process import call
from gateway_scripted import fronted, model, scripted, sse


def chunk(delta, reason=None, **more):
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}


FIRST, SECOND, END = chunk({"role": "assistant", "content": "hel"}), chunk({"content": "lo"}), chunk({}, "stop")
DONE = b"data: [DONE]\n\n"
NAMES = b"foo: bar\nx-more:1\nid: 1\nretry: 5\nevent: message\n"
STREAMS = {
    "empty": sse(FIRST, b"data:\n\n", b"data: \n\n", SECOND, END, DONE),
    "bom": (200, "text/event-stream", b"\xef\xbb\xbf" + sse(FIRST, SECOND, END, DONE)[2]),
    "unknown": sse(FIRST, b"more: of it\n\n", NAMES + b"data: " + json.dumps(SECOND).encode() + b"\n\n", END, DONE),
    "null": sse(*({**one, "error": None} for one in (FIRST, SECOND, END)), DONE),
}
FORMS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    "/v1/responses": {"input": "hi"},
}


KEYS = {
    "slow": {"rpm": 2},
    "busy": {"max_in_flight": 1},
    "closed": {"models": ["null"]},
}


async def made_keys(path):
    store = open_store(path)
    try:
        return {name: (await store.create_key(name, **fields))[0] for name, fields in KEYS.items()}
    finally:
        await store.close()


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wire")
    keys = asyncio.run(made_keys(str(folder / "gateway.db")))
    asked, go = Event(), Event()

    def held(body):
        asked.set()
        go.wait(60)
        return STREAMS["null"]

    with scripted({**STREAMS, "held": held}) as url:
        models = [model(name, "openai", url) for name in (*STREAMS, "held")]
        with fronted(folder, models, {"OPENAI_API_KEY": "sk-0123456789abcdef"}) as running:
            running.keys, running.asked, running.go = keys, asked, go
            yield running


def text_of(form, said):
    lines = said.decode() if isinstance(said, bytes) else str(said)
    events = [json.loads(line[5:]) for line in lines.splitlines() if line.startswith("data: {")]
    if form == "/v1/messages":
        assert events[-1]["type"] == "message_stop"
        return "".join(one["delta"].get("text", "") for one in events if one["type"] == "content_block_delta")
    if form == "/v1/responses":
        assert events[-1]["type"] == "response.completed"
        return "".join(one["delta"] for one in events if one["type"] == "response.output_text.delta")
    return "".join(one["choices"][0]["delta"].get("content") or "" for one in events if one["choices"])


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", list(STREAMS))
def test_the_stream_is_read(front, name, form):
    status, said, _ = call(front.url, "POST", form, {"model": name, "stream": True, **FORMS[form]})
    assert (status, text_of(form, said)) == (200, "hello")


def count(front, key, name="null"):
    body = {"model": name, "messages": [{"role": "user", "content": "hello world"}]}
    status, said, _ = call(front.url, "POST", "/v1/messages/count_tokens", body, key=front.keys[key])
    return status, said.get("input_tokens") or said["error"]["type"]


def test_counting_tokens_is_a_request_of_its_key(front):
    assert [count(front, "slow")[0] for _ in range(3)] == [200, 200, 429]


def test_counting_tokens_is_for_the_models_of_the_key(front):
    assert count(front, "closed")[0] == 200
    assert count(front, "closed", "bom") == (403, "permission_error")
    assert count(front, "closed", "none") == (404, "not_found_error")


def test_counting_tokens_waits_for_what_its_key_has_under_way(front):
    body = {"model": "held", "stream": True, **FORMS["/v1/chat/completions"]}
    chat = Thread(
        target=call, args=(front.url, "POST", "/v1/chat/completions", body), kwargs={"key": front.keys["busy"]}
    )
    chat.start()
    try:
        assert front.asked.wait(60)
        assert count(front, "busy") == (429, "rate_limit_error")
    finally:
        front.go.set()
        chat.join()
    # And is under way itself no longer than it lasts.
    assert [count(front, "busy")[0] for _ in range(3)] == [200] * 3
