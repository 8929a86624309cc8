"""Anthropic's form in front of chat: what is refused, answers, and streams event by event."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.web.api_error import ApiError
from anabranch.web.messages import MessageEvents, to_chat, to_error, to_message

ASK = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": ["x"]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]},
            "messages[0].content[0].source",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]}]},
            "messages[0].content[0].source.url",
        ),
        ({"system": 3}, "system"),
        ({"system": ["x"]}, "system[0]"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"tools": {}}, "tools"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": []}}, "tool_choice"),
        ({"metadata": "u"}, "metadata"),
        ({"thinking": "on"}, "thinking"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "max_tokens"),
        ({"output_config": {"format": {"type": "x"}}}, "output_config.format"),
    ],
)
def test_a_request_of_another_shape_is_refused_with_the_fields_name(fields, param):
    with pytest.raises(ApiError) as caught:
        to_chat({**ASK, **fields})
    assert (caught.value.status, caught.value.param) == (400, param)
    assert to_error(caught.value, "r")["error"]["type"] == "invalid_request_error"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "content", "source", "id", "role", "input"]), inner)
    ),
    max_leaves=8,
)


@given(
    st.sampled_from(
        ["messages", "system", "tools", "tool_choice", "thinking", "metadata", "output_config", "stop_sequences"]
    ),
    JSON,
)
def test_any_json_is_read_or_refused(field, value):
    with contextlib.suppress(ApiError):
        assert json.dumps(to_chat({**ASK, field: value}))


def test_tokens_are_counted_of_a_request_without_an_end():
    assert "max_tokens" not in to_chat(
        {name: value for name, value in ASK.items() if name != "max_tokens"}, counts=True
    )


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_errors_have_anthropics_form(status, kind):
    error = ApiError(status, "x", "no", headers={"x-request-id": "r"})
    assert to_error(error, "r") == {"type": "error", "error": {"type": kind, "message": "no"}, "request_id": "r"}


def test_an_answer():
    answer = {
        "id": "chatcmpl-1",
        "model": "m2",
        "choices": [
            {
                "finish_reason": "tool_calls",
                "message": {
                    "content": "so",
                    "reasoning_content": "hm",
                    "tool_calls": [
                        {"id": "c1", "function": {"name": "f", "arguments": '{"a": 1}'}},
                        {"id": "c2", "function": {"name": "g", "arguments": "[1"}},
                    ],
                },
            }
        ],
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 30},
        },
    }
    found = to_message(ASK, answer)
    assert found.pop("id").startswith("msg_")
    assert found == {
        "type": "message",
        "role": "assistant",
        "model": "m2",
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "so"},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "c2", "name": "g", "input": {"arguments": "[1"}},
        ],
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 30,
            "cache_read_input_tokens": 60,
            "output_tokens": 7,
        },
    }
    assert to_message(ASK, {**answer, "anthropic": {"id": "msg_as_it_came"}}) == {"id": "msg_as_it_came"}


def events_of(chunks, ended=True):
    made = MessageEvents(ASK)
    raw = b"".join(piece for chunk in chunks for piece in made.add(chunk)) + (b"".join(made.end()) if ended else b"")
    values = [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: ")]
    names = [line[7:] for line in raw.decode().splitlines() if line.startswith("event: ")]
    assert names == [value["type"] for value in values]
    return values


def delta(reason=None, **fields):
    return {"id": "msg_1", "model": "m2", "choices": [{"index": 0, "delta": fields, "finish_reason": reason}]}


def blocks_of(values):
    """Blocks as a client puts them together; each begins and ends once, one after another."""
    blocks, is_open = [], False
    for value in values:
        kind = value["type"]
        if kind == "content_block_start":
            assert not is_open
            assert value["index"] == len(blocks)
            blocks.append(dict(value["content_block"]))
            is_open = True
        elif kind == "content_block_delta":
            assert is_open
            assert value["index"] == len(blocks) - 1
            said = dict(value["delta"])
            said.pop("type")
            [(name, text)] = said.items()
            name = {"partial_json": "json"}.get(name, name)
            blocks[-1][name] = blocks[-1].get(name, "") + text
        elif kind == "content_block_stop":
            assert is_open
            assert value["index"] == len(blocks) - 1
            is_open = False
    assert not is_open
    return blocks


STREAM = [
    delta(role="assistant", content=""),
    delta(reasoning_content="h"),
    delta(reasoning_content="m"),
    delta(thinking_blocks=[{"type": "thinking", "thinking": "hm", "signature": "s"}]),
    delta(content="so "),
    delta(content="it"),
    delta(tool_calls=[{"index": 0, "id": "c1", "function": {"name": "f", "arguments": ""}}]),
    delta(tool_calls=[{"index": 0, "function": {"arguments": '{"a"'}}]),
    delta(
        tool_calls=[
            {"index": 0, "function": {"arguments": ": 1}"}},
            {"index": 1, "id": "c2", "function": {"name": "g", "arguments": "{}"}},
        ]
    ),
    delta("tool_calls"),
    {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 6}},
]


def test_a_stream_event_by_event():
    values = events_of(STREAM)
    assert [value["type"] for value in values[:2]] == ["message_start", "content_block_start"]
    assert (values[0]["message"]["id"], values[0]["message"]["model"], values[0]["message"]["content"]) == (
        "msg_1",
        "m2",
        [],
    )
    assert blocks_of(values) == [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "so it"},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {}, "json": '{"a": 1}'},
        {"type": "tool_use", "id": "c2", "name": "g", "input": {}, "json": "{}"},
    ]
    assert values[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert (values[-2]["usage"]["input_tokens"], values[-2]["usage"]["output_tokens"]) == (5, 6)
    assert values[-1] == {"type": "message_stop"}


@pytest.mark.parametrize("begins", [[], [delta(reasoning_content="C")]])
def test_the_thoughts_of_a_whole_answer_stay_apart_each_with_its_seal(begins):
    """As a kept answer comes: all in one chunk, the texts of its thoughts run together beside them."""
    thoughts = [{"type": "thinking", "thinking": text, "signature": f"s{text}"} for text in "AB"]
    whole = delta(role="assistant", content="so", reasoning_content="AB", thinking_blocks=thoughts)
    first = [{"type": "thinking", "thinking": "C", "signature": ""}] if begins else []
    assert blocks_of(events_of([*begins, whole, delta("stop")])) == [*first, *thoughts, {"type": "text", "text": "so"}]


@given(
    st.lists(
        st.sampled_from(
            [
                delta(content="a"),
                delta(content="b"),
                delta(reasoning_content="t"),
                delta(refusal="r"),
                delta(),
                delta(thinking_blocks=[{"type": "redacted_thinking", "data": "z"}]),
                delta(thinking_blocks=[{"type": "thinking", "thinking": "x", "signature": "s"}]),
            ]
        ),
        max_size=12,
    ),
    st.integers(0, 3),
)
def test_whatever_comes_the_blocks_are_well_formed_and_say_all_of_it(chunks, calls):
    made = [
        delta(tool_calls=[{"index": at, "id": f"c{at}", "function": {"name": "f", "arguments": "{}"}}])
        for at in range(calls)
    ]
    values = events_of([*chunks, *made, delta("stop")])
    blocks = blocks_of(values)
    wanted = "".join(
        part.get("content") or part.get("refusal") or "" for chunk in chunks for part in [chunk["choices"][0]["delta"]]
    )
    assert "".join(block["text"] for block in blocks if block["type"] == "text") == wanted
    assert sum(block["type"] == "tool_use" for block in blocks) == calls
    assert values[-2]["delta"]["stop_reason"] == ("tool_use" if calls else "end_turn")


def test_a_call_that_goes_on_after_the_next_began_makes_no_message():
    late = delta(tool_calls=[{"index": 0, "function": {"arguments": "}"}}])
    with pytest.raises(ValueError, match="goes on"):
        events_of([*STREAM[:-2], late])


def piece(text, at=None, **more):
    """A piece of a call's arguments; with its id and name its beginning."""
    begun = (
        {"id": more["id"], "function": {"name": more["id"], "arguments": text}}
        if more
        else {"function": {"arguments": text}}
    )
    return delta(tool_calls=[begun if at is None else {"index": at, **begun}])


def test_calls_that_are_told_side_by_side_become_blocks_one_after_the_other():
    """The first is told as it comes; a text waits for it too, and what is whole does not wait."""
    side = [
        piece("", 0, id="a"),
        piece("", 1, id="b"),
        piece('{"x"', 0),
        piece('{"y"', 1),
        piece(":1}", 0),
        delta(content="so"),
    ]
    values = events_of([*side, piece(":2}", 1), piece('{"z": 3}', 2, id="c"), piece("\n", 0), delta("tool_calls")])
    assert blocks_of(values) == [
        {"type": "tool_use", "id": "a", "name": "a", "input": {}, "json": '{"x":1}'},
        {"type": "tool_use", "id": "b", "name": "b", "input": {}, "json": '{"y":2}'},
        {"type": "text", "text": "so"},
        {"type": "tool_use", "id": "c", "name": "c", "input": {}, "json": '{"z": 3}'},
    ]
    # Of the first, each piece at once.
    told = [
        value["delta"]["partial_json"]
        for value in events_of(side, ended=False)
        if value["type"] == "content_block_delta"
    ]
    assert told == ['{"x"', ":1}", '{"y"']


def test_a_call_without_arguments_ends_with_the_message():
    values = events_of([piece("", 0, id="a"), piece("{}", 1, id="b"), delta("tool_calls")])
    assert [block.get("json") for block in blocks_of(values)] == [None, "{}"]


def test_calls_of_a_server_that_numbers_none_are_told_apart_by_their_names():
    values = events_of([piece('{"x"', id="a"), piece(":1}"), piece("{}", id="b"), delta("tool_calls")])
    assert [(block["id"], block["json"]) for block in blocks_of(values)] == [("a", '{"x":1}'), ("b", "{}")]


NATIVE = [
    {"type": "message_start", "message": {"id": "msg_9"}},
    {"type": "ping"},
    {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
    },
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "it is"}},
    {"type": "content_block_stop", "index": 1},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
    {"type": "message_stop"},
]


def test_events_of_anthropics_own_models_are_passed_on_as_they_came():
    assert events_of([*({"choices": [], "anthropic": value} for value in NATIVE), STREAM[-1]]) == NATIVE


def test_another_model_goes_on_where_one_of_anthropics_broke_off():
    values = events_of(
        [*({"choices": [], "anthropic": value} for value in NATIVE[:6]), delta(content=" so"), delta("stop")]
    )
    assert values[:6] == NATIVE[:6]
    assert blocks_of(values)[1:] == [{"type": "text", "text": "it is"}, {"type": "text", "text": " so"}]
    again = events_of([*({"choices": [], "anthropic": value} for value in (*NATIVE[:6], *NATIVE))])
    assert [value["index"] for value in again if value["type"] == "content_block_start"] == [0, 1, 2, 3]
    assert sum(value["type"] == "message_start" for value in again) == 1


def test_a_stream_that_breaks_ends_in_an_error():
    made = MessageEvents(ASK)
    [told] = made.fail("no", "deadline_exceeded")
    assert told == b'event: error\ndata: {"type":"error","error":{"type":"timeout_error","message":"no"}}\n\n'


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("rate_limit_exceeded", "rate_limit_error"),
        ("upstream_unavailable", "overloaded_error"),
        ("upstream_timeout", "timeout_error"),
        ("context_length_exceeded", "invalid_request_error"),
        ("upstream_cut", "api_error"),
        (None, "api_error"),
    ],
)
def test_the_error_of_a_stream_is_one_that_anthropic_documents(code, kind):
    [told] = MessageEvents(ASK).fail("no", code)
    assert json.loads(told.decode().partition("data: ")[2])["error"] == {"type": kind, "message": "no"}
