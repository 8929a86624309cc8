"""What OpenRouter says of a model's thoughts goes out in every form, and back with the result of a tool as it came."""

import json

import pytest

from anabranch.config import from_dict
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.chunks import as_chunks
from anabranch.gateway.providers.provider import Native, Provider, UpstreamRequest
from anabranch.web import messages, responses
from anabranch.web.reasoning_details import details_of
from anabranch.web.responses import ResponseStream
from anabranch.web.sse import read_data

DETAILS = [
    {"type": "reasoning.text", "text": "Look it up.", "signature": "c2ln", "format": "anthropic-claude-v1", "index": 0},
    {"type": "reasoning.encrypted", "data": "ZGF0YQ==", "id": "rs_1", "format": "openai-responses-v1", "index": 1},
]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}
ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {
                "role": "assistant",
                "content": "Wait.",
                "reasoning": "Look it up.",
                "reasoning_details": DETAILS,
                "tool_calls": [CALL],
            },
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}
TOOL = {"name": "look", "parameters": {"type": "object"}}


def provider(kind, **fields):
    made = {"kind": kind, "model": "vendor/m", "key_env": None, "base_url": "http://x/v1", **fields}
    return from_dict(Provider.Config, made).build()


def pieces():
    """The answer as a stream tells it."""

    def chunk(reason=None, **delta):
        return {"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    first, second = DETAILS
    begun = {name: value for name, value in first.items() if name not in ("text", "signature")}
    return [
        chunk(role="assistant", content=""),
        chunk(reasoning="Look ", reasoning_details=[{**begun, "text": "Look "}]),
        chunk(reasoning="it up.", reasoning_details=[{**begun, "text": "it up."}]),
        chunk(reasoning_details=[{**begun, "signature": "c2ln"}]),
        chunk(reasoning_details=[second]),
        chunk(content="Wait."),
        chunk(tool_calls=[{**CALL, "index": 0}]),
        chunk("tool_calls"),
        {"choices": [], "usage": ANSWER["usage"]},
    ]


def streams():
    return {"in pieces": pieces(), "whole at once": as_chunks(ANSWER, with_usage=True)}


def message_of(made):
    """What Anthropic's clients put together."""
    blocks = []
    for raw in made:
        value = json.loads(raw.decode().partition("data: ")[2])
        if value["type"] == "content_block_start":
            blocks.append(value["content_block"])
        elif value["type"] == "content_block_delta":
            delta, block = value["delta"], blocks[-1]
            if delta["type"] == "signature_delta":
                block["signature"] = delta["signature"]
            elif delta["type"] == "thinking_delta":
                block["thinking"] += delta["thinking"]
            elif delta["type"] == "text_delta":
                block["text"] += delta["text"]
            else:
                block["input"] = json.loads(delta["partial_json"])
    return blocks


def by_messages(content, kind="openrouter", **fields):
    """What is sent after a turn in Anthropic's form."""
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "4"}
    body = {
        "model": "m",
        "max_tokens": 9,
        "tools": [{"name": "look", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": content},
            {"role": "user", "content": [result]},
        ],
    }
    request = UpstreamRequest("chat", messages.to_chat(body), native=Native(body, {}))
    return json.loads(provider(kind, **fields).build(request).body)["messages"]


def by_responses(output, kind="openrouter", **fields):
    """Likewise in that of the Responses API."""
    result = {"type": "function_call_output", "call_id": "c1", "output": "4"}
    body = {
        "model": "m",
        "tools": [{"type": "function", **TOOL}],
        "input": [{"role": "user", "content": "?"}, *output, result],
    }
    request = UpstreamRequest("chat", responses.to_chat(body))
    return json.loads(provider(kind, **fields).build(request).body)["messages"]


def check(sent):
    [said] = [one for one in sent if one["role"] == "assistant"]
    assert said["reasoning_details"] == DETAILS
    assert (said["content"], [call["id"] for call in said["tool_calls"]]) == ("Wait.", ["c1"])
    assert "thinking_blocks" not in said


def test_in_a_chat_they_go_as_they_came():
    said = ANSWER["choices"][0]["message"]
    talk = [{"role": "user", "content": "?"}, said, {"role": "tool", "tool_call_id": "c1", "content": "4"}]
    request = UpstreamRequest("chat", {"model": "m", "messages": talk})
    assert json.loads(provider("openrouter").build(request).body)["messages"] == talk
    # No model of OpenAI's own is sent what it would refuse.
    sent = json.loads(provider("openai", model="gpt-4o").build(request).body)["messages"]
    assert sent[1] == {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]}


@pytest.mark.parametrize("how", streams())
def test_a_stream_put_together_says_what_a_whole_answer_says(how):
    assert assembled(streams()[how])["choices"] == ANSWER["choices"]


def test_a_whole_message_holds_them_in_the_signature_of_its_thought():
    content = messages.to_message({"model": "m"}, ANSWER)["content"]
    assert [block["type"] for block in content] == ["thinking", "text", "tool_use"]
    assert content[0]["thinking"] == "Look it up."
    check(by_messages(content))


@pytest.mark.parametrize("how", streams())
def test_a_streamed_message_does_too(how):
    made = messages.MessageEvents({"model": "m"})
    content = message_of([*(raw for chunk in streams()[how] for raw in made.add(chunk)), *made.end()])
    whole = messages.to_message({"model": "m"}, ANSWER)["content"]
    assert details_of(content) == details_of(whole) == DETAILS
    assert [{**block, "signature": ""} for block in content] == [{**block, "signature": ""} for block in whole]
    check(by_messages(content))


def test_details_behind_the_last_words_are_told_before_the_end():
    late = pieces()
    late.insert(7, late.pop(4))
    made = messages.MessageEvents({"model": "m"})
    content = message_of([*(raw for chunk in late for raw in made.add(chunk)), *made.end()])
    assert [block["type"] for block in content] == ["thinking", "text", "tool_use", "thinking"]
    check(by_messages(content))


INCLUDE = {"model": "m", "include": ["reasoning.encrypted_content"]}


def test_a_whole_response_holds_them_sealed_where_that_is_asked_for():
    output = responses.to_response(INCLUDE, ANSWER)["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call"]
    check(by_responses(output))
    plain = responses.to_response({"model": "m"}, ANSWER)["output"]
    assert "encrypted_content" not in plain[0]
    [said] = [one for one in by_responses(plain) if one["role"] == "assistant"]
    assert "reasoning_details" not in said


@pytest.mark.parametrize("how", streams())
@pytest.mark.parametrize("is_late", [False, True])
def test_a_streamed_response_does_too(how, is_late):
    chunks = streams()[how]
    if is_late and len(chunks) > 5:
        chunks.insert(7, chunks.pop(4))
    made = ResponseStream(INCLUDE)
    raw = [*made.begin(), *(piece for chunk in chunks for piece in made.add(chunk)), *made.end()]
    last = [value for piece in raw for value in read_data(piece)][-1]
    check(by_responses(last["response"]["output"]))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("anthropic", {"model": "claude-sonnet-4-5"}), ("openai", {"model": "gpt-4o"}), ("openai", {"model": "other"})],
)
def test_another_model_is_sent_nothing_of_it(kind, fields):
    content = messages.to_message({"model": "m"}, ANSWER)["content"]
    text = json.dumps(by_messages(content, kind, **fields))
    assert "Wait." in text
    assert "details." not in text
    assert "Look it up" not in text


def test_what_another_model_signed_does_not_go_to_openrouter():
    signed = [{"type": "thinking", "thinking": "hm", "signature": "EqQB"}, {"type": "text", "text": "Wait."}]
    [said] = [one for one in by_messages(signed) if one["role"] == "assistant" and one.get("content") == "Wait."]
    assert said == {"role": "assistant", "content": "Wait."}
    # And what it did not sign does, as text.
    [said] = [one for one in by_messages([{**signed[0], "signature": ""}, signed[1]]) if one["role"] == "assistant"]
    assert said == {"role": "assistant", "content": "Wait.", "reasoning": "hm"}
