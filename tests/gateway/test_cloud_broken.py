"""Clouds that break: streams that end badly over a real socket, and requests and answers of any shape."""

import asyncio
import contextlib
import json
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.providers import Answer, UpstreamError, UpstreamRequest
from anabranch.routers.money import Price
from cloud_providers import chat, keys, made
from recorded_conversations import KEY, event_frame, exchanges, pieces, played

__all__ = ["keys"]
pytestmark = pytest.mark.usefixtures("keys")
TRANSLATE = ("bedrock", "gemini", "ollama", "vertex")


def stream_of(kind):
    """The pieces of a stream that says something, and its media type."""
    reply = exchanges(kind)[3]["reply"]
    return pieces(reply), reply["headers"]


def broken(kind, how):
    """A stream that goes wrong after its first words: these, and what comes later."""
    whole, _ = stream_of(kind)
    at = next(place for place, piece in enumerate(whole) if b"It rains" in piece) + 1
    said, rest = b"".join(whole[:at]), whole[at:]
    if how == "cut":
        return [said]
    if how == "within":
        return [said, rest[0][: len(rest[0]) // 2]]
    if how == "bits":
        return [said, rest[0][:-3] + bytes(byte ^ 0xFF for byte in rest[0][-3:]) + b"".join(rest[1:])]
    return [said, ERRORS[kind]]


def data(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


GOOGLES = data({"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}})
ERRORS = {
    "azure": data({"error": {"code": "content_filter", "message": "The response was filtered"}}),
    "bedrock": event_frame("modelStreamErrorException", {"message": "The model stopped"}),
    "gemini": GOOGLES,
    "vertex": GOOGLES,
    "ollama": b'{"error":"an error was encountered while running the model"}\n',
    "openrouter": b": OPENROUTER PROCESSING\n\n"
    + data(
        {
            "id": "gen-1",
            "object": "chat.completion.chunk",
            "error": {"code": 502, "message": "Provider disconnected"},
            "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}],
        }
    ),
}


async def streamed(provider, exchange):
    """What came of a stream, the failure that ended it, and what it is charged."""
    with played([exchange]) as server:
        config = provider.config.replace(base_url=server.url + urlsplit(provider.config.base_url or "").path)
        group = Group(name="a", deployments=(Deployment(name="a-0", provider=config),), price=Price(output=10**9))
        dispatcher = Dispatcher([group], DispatchRules(retries=0))
        blocks, failure = b"", None
        try:
            plan = Plan(candidates=("a",), deadline=dispatcher.now() + 5)
            stream = await dispatcher.stream(plan, chat(stream=True))
            async for block in stream:
                blocks += block
            failure = stream.report.attempts[-1].status
        finally:
            await dispatcher.close()
        assert not server.faults
        return blocks, failure


def exchange_of(kind, body):
    provider = made(kind, **({"base_url": "http://x"} if kind != "azure" else {}))
    call = provider.build(chat(stream=True))
    parts = urlsplit(call.url)
    sent = {name: value for name, value in call.headers.items() if KEY in value}
    request = {"path": parts.path, "query": parts.query, "headers": sent, "body": json.loads(call.body)}
    _, headers = stream_of(kind)
    return provider, {"request": request, "reply": {"status": 200, "headers": headers, "raw": body}}


@pytest.mark.parametrize(
    ("kind", "how", "status"),
    [
        *((kind, "error", "server") for kind in ("bedrock", "gemini", "vertex", "ollama", "openrouter")),
        ("azure", "error", "filter"),
        *((kind, "cut", "cut") for kind in (*TRANSLATE, "azure", "openrouter")),
        *((kind, "within", "garbage") for kind in ("gemini", "ollama", "openrouter")),
        ("bedrock", "within", "cut"),
        ("bedrock", "bits", "cut"),
    ],
)
def test_a_stream_that_breaks_is_told_as_broken(kind, how, status):
    provider, exchange = exchange_of(kind, broken(kind, how))
    blocks, failure = asyncio.run(streamed(provider, exchange))
    assert b"It rains" in blocks
    assert b"[DONE]" not in blocks
    assert b'"error"' in blocks
    assert failure == status


@pytest.mark.parametrize("kind", [*TRANSLATE, "azure", "openrouter"])
def test_a_stream_without_what_comes_behind_its_end_is_whole(kind):
    """The usage, and OpenAI's mark, come behind the last words; who leaves them out has said all the same why it ended."""
    whole, _ = stream_of(kind)
    ends = {"bedrock": b"messageStop", "gemini": b"STOP", "vertex": b"STOP", "ollama": b"done_reason"}
    last = next(at for at, piece in enumerate(whole) if ends.get(kind, b'"finish_reason": "stop"') in piece)
    provider, exchange = exchange_of(kind, [b"".join(whole[: last + 1])])
    blocks, failure = asyncio.run(streamed(provider, exchange))
    assert (failure, blocks.endswith(b"data: [DONE]\n\n")) == ("ok", True)


# Any shape

WORDS = (
    "candidates content parts text thought functionCall name args index finishReason usageMetadata promptTokenCount error code details "
    "output message toolUse toolUseId input reasoningContent reasoningText stopReason usage inputTokens outputTokens cacheDetails "
    "contentBlockDelta contentBlockIndex delta contentBlockStart start contentBlockStop messageStop metadata exception type "
    "role thinking tool_calls function arguments done done_reason eval_count embeddings values predictions statistics embedding"
).split()
LEAVES = st.none() | st.booleans() | st.integers(-5, 10**40) | st.floats() | st.sampled_from(("", "STOP", "text", "{}"))
ANY = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.sampled_from(WORDS), ANY, max_size=4)


@pytest.mark.parametrize("kind", ["bedrock", "gemini", "ollama"])
@settings(max_examples=25, deadline=None)
@given(value=OBJECTS)
def test_an_answer_of_any_shape_is_read_or_garbage(kind, value):
    provider, body = provider_of(kind), json.dumps(value).encode()
    embedding = UpstreamRequest("embeddings", {"input": "a"}, prompt_tokens=1)
    translator = provider.translator(chat(stream=True))
    readers = (
        lambda: provider.parse(chat(), body),
        lambda: provider.parse(embedding, body),
        lambda: translator.feed(body),
    )
    for read in readers:
        with contextlib.suppress(UpstreamError):
            found = read()
            json.dumps(found.body if isinstance(found, Answer) else found)
    assert provider.error(400, {}, body).message


FIELDS = (
    "role content type text image_url url input_audio format data file file_data tool_calls id function name arguments tool_call_id "
    "thinking_blocks thinking signature cache_control ttl"
).split()
TEXTS = ("", "user", "assistant", "tool", "system", "text", "image_url", "file", "{}", "data:a/b;base64,AA")
PART = st.recursive(
    st.none()
    | st.integers()
    | st.sampled_from(
        ("", "user", "assistant", "tool", "system", "text", "image_url", "file", "{}", "data:a/b;base64,AA")
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=14,
)
ASKED = st.fixed_dictionaries(
    {"messages": st.lists(st.dictionaries(st.sampled_from(FIELDS), PART, max_size=5), max_size=3)},
    optional={
        "tools": st.lists(PART, max_size=2),
        "tool_choice": PART,
        "stop": PART,
        "response_format": PART,
        "reasoning_effort": PART,
        "max_tokens": PART,
        "temperature": PART,
        "thinking": PART,
    },
)


@pytest.mark.parametrize("kind", ["bedrock", "gemini", "ollama"])
@settings(max_examples=25, deadline=None)
@given(body=ASKED, is_foreign=st.booleans())
def test_a_request_of_any_shape_is_sent_or_refused(kind, body, is_foreign):
    before = json.dumps(body)
    request, kind_of_failure = UpstreamRequest("chat", body, is_foreign=is_foreign, prompt_tokens=1), "request"
    try:
        json.loads(provider_of(kind).build(request).body)
    except UpstreamError as error:
        kind_of_failure = error.failure.kind
    assert kind_of_failure in ("request", "unsupported")
    assert json.dumps(body) == before


def provider_of(kind):
    """One for all examples."""
    if kind not in MADE:
        MADE[kind] = made(kind)
    return MADE[kind]


MADE = {}
