"""The Responses API on top of chat, and whole answers as streams and back."""

import json

import pytest

from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.chunks import as_chunks
from anabranch.web.api_error import ApiError
from anabranch.web.responses import ResponseStream, to_chat, to_response
from anabranch.web.sse import event, read_data

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 4}}


def answer(**message):
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 7,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": None, **message},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": USAGE,
    }


def test_a_request_becomes_one_of_chat():
    body = {
        "model": "m",
        "instructions": "be brief",
        "max_output_tokens": 5,
        "temperature": 0.5,
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        "tools": [{"type": "function", "name": "add", "parameters": {}}],
        "tool_choice": {"type": "function", "name": "add"},
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "2+2?"}]},
            {"type": "reasoning", "summary": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I add."}]},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "4"},
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": "https://x/y.png"},
                    {"type": "input_text", "text": "?"},
                ],
            },
        ],
        "stream": True,
        "a_field_of_tomorrow": 1,
    }
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    assert to_chat(body) == {
        "model": "m",
        "temperature": 0.5,
        "stream": True,
        "a_field_of_tomorrow": 1,
        "max_completion_tokens": 5,
        "reasoning_effort": "low",
        "stream_options": {"include_usage": True},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "I add.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "4"},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
                    {"type": "text", "text": "?"},
                ],
            },
        ],
    }


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": 3}, "tools"),
        ({"input": None}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"text": "json"}, "text"),
    ],
)
def test_what_chat_cannot_do_is_refused(change, param):
    with pytest.raises(ApiError) as caught:
        to_chat({"model": "m", "input": "hi", **change})
    assert (caught.value.status, caught.value.param) == (400, param)


def test_an_answer_becomes_a_response():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    made = to_response({"model": "auto", "input": "hi"}, answer(content="4", tool_calls=[call]))
    assert made["status"] == "completed"
    assert made["model"] == "m"
    assert [item["type"] for item in made["output"]] == ["message", "function_call"]
    assert made["output"][0]["content"] == [{"type": "output_text", "text": "4", "annotations": [], "logprobs": []}]
    assert made["output"][1]["call_id"] == "c1"
    assert made["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 12,
    }
    cut = answer(content="4")
    cut["choices"][0]["finish_reason"] = "length"
    made = to_response({"model": "m", "input": "hi"}, cut)
    assert (made["status"], made["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_a_stream_becomes_the_events_of_a_response():
    stream = ResponseStream({"model": "auto", "input": "hi"})

    def chunk(delta, reason=None):
        return {"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    chunks = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "fo"}),
        chunk({"content": "ur"}),
        chunk(
            {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}]}
        ),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}, "tool_calls"),
        {"choices": [], "usage": USAGE},
    ]
    raw = [*stream.begin(), *(piece for one in chunks for piece in stream.add(one)), *stream.end()]
    events = [json.loads(piece.split(b"data: ")[1]) for piece in raw]
    assert [piece.split(b"\n")[0].removeprefix(b"event: ").decode() for piece in raw] == [
        made["type"] for made in events
    ]
    assert [made["type"].removeprefix("response.") for made in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [made["sequence_number"] for made in events] == list(range(len(events)))
    last = events[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == "four"
    assert last["output"][1]["arguments"] == "{}"
    assert last["output"][1]["status"] == "completed"
    assert last["usage"]["total_tokens"] == 12


def test_a_stream_that_fails_says_so():
    stream = ResponseStream({"model": "m", "input": "hi"})
    list(stream.begin())
    [raw] = stream.fail("the upstream broke off", "upstream_cut")
    made = json.loads(raw.split(b"data: ")[1])
    assert made["response"]["status"] == "failed"
    assert made["response"]["error"] == {"code": "upstream_cut", "message": "the upstream broke off"}


@pytest.mark.parametrize(
    "message",
    [
        {"content": "héllo\n\nthere"},
        {"content": ""},
        {"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"content": "x", "reasoning_content": "hm"},
    ],
)
def test_a_whole_answer_streamed_and_put_together_is_the_same(message):
    whole = answer(**message)
    whole["service_tier"] = "flex"
    chunks = as_chunks(whole, with_usage=True)
    del whole["choices"][0]["logprobs"]  # there are none
    assert assembled(chunks) == whole
    assert all(chunk["service_tier"] == "flex" for chunk in chunks)


def test_completions_stream_too():
    whole = {
        "id": "1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "usage": None,
        "choices": [{"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": None}],
    }
    made = assembled(as_chunks(whole, "completions"), "completions")
    del whole["usage"], whole["choices"][0]["logprobs"]  # there are none
    assert made == whole


def test_an_event_is_one_line_of_data_whatever_the_text():
    assert event({"a": "x\ny"}, "e") == b'event: e\ndata: {"a":"x\\ny"}\n\n'
    assert list(read_data(event({"a": "\ud800"}))) == [{"a": "\ud800"}]


def test_an_answer_in_parts_is_a_text():
    whole = answer(content=[{"type": "text", "text": "a"}, {"type": "other"}, {"type": "text", "text": "b"}])
    [item] = to_response({"model": "m"}, whole)["output"]
    assert item["content"][0]["text"] == "ab"


SIGNED = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "z"}]
INCLUDED = {"model": "m", "input": "hi", "include": ["reasoning.encrypted_content"]}


def streamed(body, *deltas):
    """The last event of a stream of these, in which each item was told as the end has it."""
    made = ResponseStream(body)
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    pieces = [*made.begin(), *(piece for chunk in chunks for piece in made.add(chunk)), *made.end()]
    values = [next(read_data(piece)) for piece in pieces]
    done = [value["item"] for value in values if value["type"] == "response.output_item.done"]
    assert done == values[-1]["response"]["output"]
    return done


def test_signed_thoughts_go_out_sealed_where_they_are_asked_for_and_come_back_whole():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = answer(content=None, reasoning_content="hm", thinking_blocks=SIGNED, tool_calls=[call])
    whole = to_response(INCLUDED, said)["output"]
    pieces = (
        {"reasoning_content": "h"},
        {"reasoning_content": "m"},
        {"thinking_blocks": SIGNED[:1]},
        {"thinking_blocks": SIGNED[1:]},
    )
    parts = streamed(INCLUDED, *pieces, {"tool_calls": [{"index": 0, **call}]})
    for output in (whole, parts):
        thought, asked = output
        assert (thought["type"], thought["content"][0]["text"], asked["type"]) == ("reasoning", "hm", "function_call")
        result = {"type": "function_call_output", "call_id": "c1", "output": "r"}
        messages = to_chat({"model": "m", "input": [{"role": "user", "content": "hi"}, *output, result]})["messages"]
        assert messages[1] == {"role": "assistant", "content": "", "thinking_blocks": SIGNED, "tool_calls": [call]}
        assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert "encrypted_content" not in to_response({"model": "m", "input": "hi"}, said)["output"][0]
    assert "encrypted_content" not in streamed({"model": "m", "input": "hi"}, *pieces)[0]


def test_thoughts_without_words_are_an_item_too_and_those_sealed_elsewhere_stay_there():
    [thought, message] = streamed(INCLUDED, {"thinking_blocks": SIGNED[1:]}, {"content": "so"})
    assert (thought["content"], message["content"][0]["text"]) == ([], "so")
    turns = [thought, message, {"role": "user", "content": "and?"}]
    assert to_chat({"model": "m", "input": turns})["messages"][0] == {
        "role": "assistant",
        "content": "so",
        "thinking_blocks": SIGNED[1:],
    }
    for sealed in ("gAAAA", "anabranch-1.!!", "anabranch-1.e30=", 7):
        item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": sealed}
        assert to_chat({"model": "m", "input": [item, message]})["messages"] == [{"role": "assistant", "content": "so"}]


def test_a_message_behind_a_call_does_not_take_the_calls_place():
    items = [
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "message", "role": "assistant", "content": "so"},
    ]
    messages = to_chat({"model": "m", "input": items}, keeps_reasoning=True)["messages"]
    assert [bool(message.get("tool_calls")) for message in messages] == [True, False]


def test_files_sound_and_verbosity_have_their_place_in_chat():
    parts = [
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA"},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
    ]
    made = to_chat({"model": "m", "input": [{"role": "user", "content": parts}], "text": {"verbosity": "low"}})
    assert made["verbosity"] == "low"
    assert made["messages"][0]["content"] == [
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA", "filename": "a.pdf"}},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
    ]
