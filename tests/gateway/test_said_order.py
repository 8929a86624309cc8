"""Text that a model says behind a call of a tool is told there, whole as streamed, in every form that has a place for it."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anabranch.gateway.providers import anthropic, conversed, generated_content, openai_responses
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.chunks import as_chunks
from anabranch.gateway.providers.native_events import message_events, response_events
from anabranch.web.messages import MessageEvents, to_message
from anabranch.web.responses import ResponseStream, to_response
from anabranch.web.said_order import said

ASK = {"model": "m", "max_tokens": 100, "input": "hi", "messages": [{"role": "user", "content": "hi"}]}
# A piece is a text, or None for a call.
PIECES = st.lists(st.none() | st.text("ab é\n", min_size=1, max_size=4), max_size=8)


def called(number):
    return {"id": f"call_{number}", "type": "function", "function": {"name": "f", "arguments": f'{{"n":{number}}}'}}


def deltas(pieces):
    """Of the stream that says them."""
    number = 0
    for piece in pieces:
        if piece is None:
            yield {"tool_calls": [{"index": number, **called(number)}]}
            number += 1
        else:
            yield {"content": piece}


def chunks(pieces, reason=None):
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    made = [{"role": "assistant", "content": ""}, *deltas(pieces)]
    reason = reason or ("tool_calls" if None in pieces else "stop")
    told = [{"index": 0, "delta": delta, "finish_reason": None} for delta in made]
    return [{**head, "choices": [one]} for one in (*told, {"index": 0, "delta": {}, "finish_reason": reason})]


def expected(pieces):
    """Texts that follow one another are one; a call is its number."""
    found, number = [], 0
    for piece in pieces:
        if piece is None:
            found.append(number)
            number += 1
        elif found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


def of_message(message):
    return [one if kind == "text" else int(one["id"].removeprefix("call_")) for kind, one in said(message)]


def of_items(output):
    texts = {
        "message": lambda item: item["content"][0]["text"],
        "function_call": lambda item: json.loads(item["arguments"])["n"],
    }
    return [texts[item["type"]](item) for item in output if item["type"] != "message" or item["content"][0]["text"]]


def of_blocks(content):
    return [block["text"] if block["type"] == "text" else block["input"]["n"] for block in content]


def streamed_items(told):
    made = ResponseStream(ASK)
    for _ in made.begin():
        pass
    for chunk in told:
        for _ in made.add(chunk):
            pass
    for _ in made.end():
        pass
    return made.response["output"]


def streamed_blocks(told):
    made, blocks = MessageEvents(ASK), {}
    events = [event for chunk in told for event in made.add(chunk)] + list(made.end())
    for event in events:
        value = json.loads(event.split(b"data: ", 1)[1])
        if value["type"] == "content_block_start":
            blocks[value["index"]] = {**value["content_block"], "json": ""}
        elif value["type"] == "content_block_delta":
            block, delta = blocks[value["index"]], value["delta"]
            block["text"] = block.get("text", "") + delta.get("text", "")
            block["json"] += delta.get("partial_json", "")
    return [
        {"type": "text", "text": block["text"]}
        if block["type"] == "text"
        else {"type": "tool_use", "input": json.loads(block["json"])}
        for _, block in sorted(blocks.items())
    ]


def test_the_order_by_hand():
    whole = assembled(chunks(["ab", None, "cde", None]))
    message = whole["choices"][0]["message"]
    assert message["content"] == "abcde"
    order = [{"text": 2}, {"call": 0}, {"text": 3}, {"call": 1}]
    assert message["extra_content"] == {"gateway": {"order": order}}
    assert [item["type"] for item in to_response(ASK, whole)["output"]] == [
        "message",
        "function_call",
        "message",
        "function_call",
    ]
    # It is told by where things stand, and not once more.
    assert "extra_content" not in to_response(ASK, whole)
    assert "extra_content" not in to_message(ASK, whole)
    assert "extra_content" not in assembled(chunks(["ab", None, None]))["choices"][0]["message"]


@given(PIECES)
def test_a_whole_answer_says_all_in_the_order_that_its_stream_does(pieces):
    told = chunks(pieces)
    whole = assembled(told)
    assert of_message(whole["choices"][0]["message"]) == expected(pieces)
    assert of_items(to_response(ASK, whole)["output"]) == of_items(streamed_items(told)) == expected(pieces)
    assert of_blocks(to_message(ASK, whole)["content"]) == of_blocks(streamed_blocks(told)) == expected(pieces)


@given(PIECES)
def test_what_is_cut_is_cut_where_its_stream_was(pieces):
    told = chunks(pieces, "length")
    whole = to_response(ASK, assembled(told))["output"]
    assert [item["status"] for item in whole] == [item["status"] for item in streamed_items(told)]


@given(PIECES)
def test_what_a_cache_streams_again_is_in_order_too(pieces):
    whole = assembled(chunks(pieces))
    again = as_chunks(whole)
    assert assembled(again) == whole
    assert of_items(streamed_items(again)) == expected(pieces)
    assert of_blocks(streamed_blocks(again)) == expected(pieces)


def scored(pieces):
    """Log probabilities of an answer: a token for each character of a text, and some that a call is written with."""
    tokens = [token for piece in pieces for token in (["<f>", "{", "}"] if piece is None else piece)]
    return {"content": [{"token": token, "at": at} for at, token in enumerate(tokens)], "refusal": None}


def places_in(output):
    """Of the tokens of each text."""
    parts = [item["content"][0] for item in output if item["type"] == "message"]
    return [[one["at"] for one in part["logprobs"]] for part in parts]


@given(PIECES, st.sampled_from([None, "hm"]))
@example([None, "a"], None)
@example(["a", None, "a", None, "b"], "hm")
def test_what_a_cache_streams_again_has_each_log_probability_once_beside_a_text(pieces, thought):
    """They stood beside the first piece, which has no text where a call comes first: whoever adds them up by their text had none."""
    whole = assembled(chunks(pieces))
    [choice] = whole["choices"]
    choice["logprobs"] = scored(pieces)
    if thought:
        choice["message"]["reasoning_content"] = thought
    again = as_chunks(whole)
    beside = [one for chunk in again for one in chunk["choices"] if one.get("logprobs")]
    told = [one for choice in beside for one in choice["logprobs"]["content"]]
    assert told == choice["logprobs"]["content"]
    if any(pieces):
        assert all(one["delta"].get("content") for one in beside)
    else:
        assert beside == [again[0]["choices"][0]]
    assert assembled(again) == whole
    assert places_in(streamed_items(again)) == places_in(to_response(ASK, whole)["output"])


def blocks_of(pieces):
    """In Anthropic's form."""
    for number, one in enumerate(deltas(pieces)):
        if "content" in one:
            yield {"type": "text", "text": one["content"]}
        else:
            call = one["tool_calls"][0]
            yield {
                "type": "tool_use",
                "id": call["id"],
                "name": "f",
                "input": json.loads(call["function"]["arguments"]),
            }
        assert number < len(pieces)


class Upstream:
    """As much of a provider as a stream of it asks for."""

    class config:  # noqa: N801
        model = "m"


def of_anthropic(pieces):
    content = list(blocks_of(pieces))
    stream = anthropic.MessageStream(Upstream())
    events = message_events(
        {"id": "msg_1", "model": "m", "role": "assistant", "content": content, "stop_reason": "end_turn"}
    )
    told = [chunk for event in events for chunk in stream.feed(json.dumps(event).encode())]
    return anthropic._message(content), told


def of_responses(pieces):
    output = [
        {
            "type": "message",
            "id": "m",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": one["content"], "annotations": []}],
        }
        if "content" in one
        else {
            "type": "function_call",
            "id": "fc",
            "status": "completed",
            "call_id": one["tool_calls"][0]["id"],
            **one["tool_calls"][0]["function"],
        }
        for one in deltas(pieces)
    ]
    stream = openai_responses.ResponseEvents(Upstream())
    events = response_events({"id": "resp_1", "model": "m", "created_at": 1, "status": "completed", "output": output})
    told = [chunk for event in events for chunk in stream.feed(json.dumps(event).encode())]
    return openai_responses._message(output), told


def of_bedrock(pieces):
    content = [
        {"text": block["text"]}
        if block["type"] == "text"
        else {"toolUse": {"toolUseId": block["id"], "name": "f", "input": block["input"]}}
        for block in blocks_of(pieces)
    ]
    usage = {"inputTokens": 1, "outputTokens": 1, "totalTokens": 2}
    value = {"output": {"message": {"content": content}}, "stopReason": "end_turn", "usage": usage}
    return conversed.answer(value, "m").body["choices"][0]["message"], None


def of_gemini(pieces):
    parts = [
        {"text": block["text"]}
        if block["type"] == "text"
        else {"functionCall": {"id": block["id"], "name": "f", "args": block["input"]}}
        for block in blocks_of(pieces)
    ]
    return generated_content.choice_of(0, {"content": {"parts": parts}, "finishReason": "STOP"})["message"], None


@pytest.mark.parametrize("upstream", [of_anthropic, of_responses, of_bedrock, of_gemini])
@given(pieces=PIECES)
def test_upstreams_that_have_an_order_keep_it(upstream, pieces):
    """Whole, all text stood before all calls."""
    message, told = upstream(pieces)
    assert [
        one if kind == "text" else json.loads(one["function"]["arguments"])["n"] for kind, one in said(message)
    ] == expected(pieces)
    if told is not None:
        streamed = assembled(told)["choices"][0]["message"]
        assert said(streamed) == said(message)
        assert streamed.get("extra_content") == message.get("extra_content")


ODD = [
    *(
        None,
        [],
        5,
        ["text"],
        [{"text": 3}],
        [{"text": 2}, {"call": 0}, {"text": 2}],
        [{"text": 3}, {"call": 0}, {"call": 0}],
    ),
    *([{"text": True}, {"call": 0}, {"text": 2}], [{"call": 1}, {"text": 3}], [{"text": 3}, {"call": -1}]),
    [{"text": -1}, {"call": 0}, {"text": 4}],
]


@pytest.mark.parametrize("order", ODD)
def test_an_order_that_is_not_of_what_it_stands_by_is_none(order):
    message = {"content": "abc", "tool_calls": [called(0)], "extra_content": {"gateway": {"order": order}}}
    assert of_message(message) == ["abc", 0]
    odd = {**message, "extra_content": {"gateway": order}}
    assert of_message(odd) == ["abc", 0]
