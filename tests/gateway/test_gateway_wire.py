"""Streams of other servers with oddities on the wire, in each form through a real gateway."""

import json

import pytest

from gateway_process import call
from gateway_scripted import fronted, model, scripted, sse


def chunk(delta, reason=None, **more):
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}


FIRST, SECOND, END = chunk({"role": "assistant", "content": "hel"}), chunk({"content": "lo"}), chunk({}, "stop")
DONE = b"data: [DONE]\n\n"
STREAMS = {
    "null": sse(*({**one, "error": None} for one in (FIRST, SECOND, END)), DONE),
}
FORMS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    "/v1/responses": {"input": "hi"},
}


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    with scripted(STREAMS) as url:
        models = [model(name, "openai", url) for name in STREAMS]
        with fronted(tmp_path_factory.mktemp("wire"), models, {"OPENAI_API_KEY": "sk-0123456789abcdef"}) as running:
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
