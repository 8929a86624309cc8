"""OpenAI's responses as answers of chat, with themselves beside them; errors within them."""

import json

import pytest

from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import Native, UpstreamError, UpstreamRequest
from recorded_conversations import exchanges

NATIVE = Native({"model": "x", "input": "hi", "reasoning": {"effort": "low"}}, {}, "responses")


def provider(responses=True):
    return OpenAI.Config(model="gpt-5.1", key_env=None, responses=responses).build()


def asked(**fields):
    return UpstreamRequest("chat", {"messages": [{"role": "user", "content": "hi"}], **fields}, native=NATIVE)


def recorded(kind):
    replies = [one["reply"] for one in exchanges("openai") if one["request"]["path"].endswith("/responses")]
    return next(reply[kind] for reply in replies if kind in reply)


def test_what_is_sent_is_what_came_with_the_end_that_was_set():
    call = provider().build(asked(max_tokens=7, stream=True))
    assert call.url == "https://api.openai.com/v1/responses"
    assert json.loads(call.body) == {**NATIVE.body, "model": "gpt-5.1", "max_output_tokens": 7, "stream": True}
    chat = provider(False).build(asked(max_tokens=7))
    assert chat.url.endswith("/chat/completions")
    assert (
        provider()
        .build(asked().with_body(messages=[{"role": "user", "content": "other"}]))
        .url.endswith("/chat/completions")
    )


def test_whole_and_streamed_say_the_same_in_chat():
    value, events = recorded("json"), recorded("events")
    whole = provider().parse(asked(), json.dumps(value).encode())
    assert whole.body["responses"] == value
    translator = provider().translator(asked(stream=True))
    chunks = [chunk for event in events for chunk in translator.feed(json.dumps(event).encode())]
    assert translator.is_done
    assert [chunk["responses"] for chunk in chunks if "responses" in chunk] == events
    streamed = assembled(chunks)
    message = streamed["choices"][0]["message"]
    assert {**message, "content": message["content"] or None} == whole.body["choices"][0]["message"]
    assert streamed["choices"][0]["finish_reason"] == whole.finish_reason == "tool_calls"
    assert streamed["usage"] == whole.body["usage"]
    assert (whole.usage.prompt, whole.usage.cached, whole.usage.completion) == (55, 16, 40)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"status": "failed", "error": {"code": "rate_limit_exceeded", "message": "no"}, "output": []}, "rate_limit"),
        ({"status": "failed", "error": None, "output": []}, "server"),
        ({"object": "response"}, "garbage"),
        ({"output": [{"type": "message", "content": 3}]}, "garbage"),
        ({"output": ["x"]}, "garbage"),
    ],
)
def test_a_response_that_failed_is_a_failure(value, kind):
    with pytest.raises(UpstreamError) as caught:
        provider().parse(asked(), json.dumps(value).encode())
    assert caught.value.failure.kind == kind


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"type": "error", "code": "server_error", "message": "no"}, "server"),
        (
            {
                "type": "response.failed",
                "response": {"status": "failed", "error": {"code": "insufficient_quota", "message": "no"}},
            },
            "credit",
        ),
        ({"type": "response.output_text.delta"}, "garbage"),
        ({"type": "response.function_call_arguments.delta", "output_index": 3, "delta": "x"}, "garbage"),
    ],
)
def test_an_event_that_tells_of_an_error_is_a_failure(value, kind):
    with pytest.raises(UpstreamError) as caught:
        provider().translator(asked(stream=True)).feed(json.dumps(value).encode())
    assert caught.value.failure.kind == kind


def test_an_answer_that_was_cut_off_says_so():
    value = {**recorded("json"), "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    assert provider().parse(asked(), json.dumps(value).encode()).finish_reason == "length"
