"""Anthropic's form, both ways, against messages written by hand from its documentation."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.providers.anthropic import Anthropic, merged, translated
from anabranch.gateway.providers.anthropic_request import ANSWER_TOOL
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.provider import Native, UpstreamError, UpstreamRequest
from anabranch.gateway.providers.sse import Splitter, events

KEY = "sk-ant-0123456789abcdef"


@pytest.fixture
def provider(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    return Anthropic(Anthropic.Config(model="claude"))


def chat(**fields):
    return UpstreamRequest("chat", {"model": "x", "messages": [{"role": "user", "content": "hi"}], **fields})


def test_a_request_with_all_kinds_of_parts():
    tool = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what is it"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                    {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
                ],
            },
            {
                "role": "assistant",
                "content": "wait",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}},
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
            {"role": "user", "content": "and?"},
        ],
        "tools": [tool],
        "tool_choice": "required",
        "stop": "END",
        "temperature": 1.5,
        "max_tokens": 7,
        "parallel_tool_calls": False,
    }
    assert translated(body, "claude", 4096) == {
        "model": "claude",
        "max_tokens": 7,
        "system": "Be brief.",
        "temperature": 1.0,
        "stop_sequences": ["END"],
        "tools": [{"name": "look", "description": "d", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what is it"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                    {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "wait"},
                    {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": "a cat"},
                    {"type": "text", "text": "and?"},
                ],
            },
        ],
    }


@pytest.mark.parametrize("fields", [{"n": 2}, {"logprobs": True}, {"logit_bias": {"1": 2}}])
def test_what_has_no_counterpart_is_said_to_be_unsupported(fields):
    with pytest.raises(UpstreamError) as caught:
        translated({"messages": [], **fields}, "m", 1)
    assert caught.value.failure.kind == "unsupported"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ('{"a":[' + "[]," * 40_000 + "[]]}", "more than 65,536 lists, objects"),
        ("[" * 10_000 + "]" * 10_000, "too deep"),
        ("[1]", "no JSON object"),
    ],
)
def test_arguments_that_take_long_to_parse_are_not(arguments, why):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(UpstreamError, match=why) as raised:
        translated({"messages": [{"role": "assistant", "tool_calls": [call] * 2}]}, "m", 1)
    assert raised.value.failure.status == 400


def test_arguments_that_are_no_json_are_the_senders_mistake():
    call = {"id": "c", "function": {"name": "f", "arguments": "{"}}
    with pytest.raises(UpstreamError) as caught:
        translated({"messages": [{"role": "assistant", "tool_calls": [call]}]}, "m", 1)
    assert caught.value.failure.kind == "request"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": ["x"]},
        {"messages": 7},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        {"tools": [{"type": "function"}]},
        {"tools": ["f"]},
        {"response_format": "json"},
        {"tool_choice": {"type": "function"}, "tools": [{"function": {"name": "f"}}]},
        {"temperature": "hot"},
    ],
)
def test_a_request_of_another_shape_is_the_senders_mistake(provider, fields):
    with pytest.raises(UpstreamError) as caught:
        provider.build(chat(**fields))
    assert (caught.value.failure.kind, caught.value.status) == ("request", 400)


@pytest.mark.parametrize(
    "value",
    [
        {"content": [7]},
        {"content": [{"type": "tool_use"}]},
        {"content": [{"type": "text", "text": 1}]},
        {"content": "x"},
        [],
        3,
        {"content": [], "usage": {"input_tokens": "many"}},
    ],
)
def test_an_answer_of_another_shape_is_garbage(provider, value):
    with pytest.raises(UpstreamError) as caught:
        provider.parse(chat(), json.dumps(value).encode())
    assert caught.value.failure.kind == "garbage"


@pytest.mark.parametrize(
    "value",
    [
        {"type": "content_block_start", "content_block": {"type": "tool_use"}},
        {"type": "message_delta", "usage": 3},
        [],
        {"type": "content_block_delta", "delta": {"type": "text_delta"}},
        {"type": "message_start", "message": "m"},
        {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "{"}},
        {"type": "message_delta", "delta": 5},
    ],
)
def test_an_event_of_another_shape_is_garbage(provider, value):
    with pytest.raises(UpstreamError) as caught:
        provider.translator(chat()).feed(json.dumps(value).encode())
    assert caught.value.failure.kind == "garbage"


def test_an_answer(provider):
    body = {
        "id": "msg_1",
        "type": "message",
        "model": "claude-x",
        "stop_reason": "tool_use",
        "content": [
            {"type": "thinking", "thinking": "hm"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": 2}},
        ],
        "usage": {
            "input_tokens": 10,
            "cache_read_input_tokens": 90,
            "cache_creation_input_tokens": 5,
            "output_tokens": 7,
        },
    }
    answer = provider.parse(chat(), json.dumps(body).encode())
    choice = answer.body["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"at": 2}'}}],
    }
    assert (answer.usage.prompt, answer.usage.cached, answer.usage.completion) == (105, 90, 7)
    assert answer.body["usage"]["prompt_tokens_details"] == {"cached_tokens": 90, "cache_write_tokens": 5}


COMPACTED = {
    "input_tokens": 23_000,
    "output_tokens": 1000,
    "iterations": [
        {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3500},
        {"type": "message", "input_tokens": 23_000, "output_tokens": 1000},
    ],
}


@pytest.mark.parametrize(
    ("usage", "told"),
    [
        (COMPACTED, (203_000, 0, 0, 0, 4500)),
        # No compaction took place, or nobody can say: never less than is said of the whole.
        ({**COMPACTED, "iterations": COMPACTED["iterations"][1:]}, (23_000, 0, 0, 0, 1000)),
        ({**COMPACTED, "iterations": []}, (23_000, 0, 0, 0, 1000)),
        ({**COMPACTED, "iterations": None}, (23_000, 0, 0, 0, 1000)),
        ({**COMPACTED, "iterations": [5, {"input_tokens": "9", "output_tokens": -4}, {}]}, (23_000, 0, 0, 0, 1000)),
        (
            {
                "input_tokens": 5,
                "cache_read_input_tokens": 10,
                "cache_creation_input_tokens": 20,
                "output_tokens": 1,
                "iterations": [
                    {"type": "compaction", "input_tokens": 7, "cache_read_input_tokens": 30, "output_tokens": 2},
                    {
                        "type": "message",
                        "input_tokens": 5,
                        "cache_read_input_tokens": 10,
                        "cache_creation_input_tokens": 20,
                        "cache_creation": {"ephemeral_5m_input_tokens": 15, "ephemeral_1h_input_tokens": 5},
                        "output_tokens": 1,
                    },
                ],
            },
            (72, 40, 15, 5, 3),
        ),
    ],
)
def test_a_compaction_which_is_among_the_steps_alone_is_counted(provider, usage, told):
    body = {"type": "message", "stop_reason": "end_turn", "content": [{"type": "text", "text": "ok"}], "usage": usage}
    found = provider.parse(chat(), json.dumps(body).encode()).usage
    assert (found.prompt, found.cached, found.cache_write, found.cache_write_1h, found.completion) == told
    streamed = last_usage(provider, {"input_tokens": 5, "output_tokens": 1}, usage)
    assert (streamed["prompt_tokens"], streamed["completion_tokens"]) == (told[0], told[-1])


@pytest.mark.parametrize(
    ("later", "told"),
    [
        ({"input_tokens": None, "cache_read_input_tokens": None, "output_tokens": 5}, (14_000, 9000, 5)),
        ({"input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 5}, (14_000, 9000, 5)),
        ({"output_tokens": None}, (14_000, 9000, 1)),
        ({"input_tokens": 6000, "output_tokens": 5}, (15_000, 9000, 5)),
        ({}, (14_000, 9000, 1)),
        (None, (14_000, 9000, 1)),
    ],
)
def test_what_is_said_later_takes_nothing_back(provider, later, told):
    usage = last_usage(provider, {"input_tokens": 5000, "cache_read_input_tokens": 9000, "output_tokens": 1}, later)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert (usage["prompt_tokens"], cached, usage["completion_tokens"]) == told


def last_usage(provider, first, later):
    values = [
        {"type": "message_start", "message": {"id": "m1", "model": "c", "usage": first}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "hi"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": later},
        {"type": "message_stop"},
    ]
    return chunks_of(provider, [event_stream(*values)])[-1]["usage"]


COUNTS = st.dictionaries(st.sampled_from("abc"), st.none() | st.integers(0, 9))
USAGES = st.dictionaries(st.sampled_from("abcd"), st.none() | st.integers(0, 9) | COUNTS)


@given(USAGES, USAGES)
def test_of_two_usages_each_count_is_the_larger(told, more):
    found = merged(told, more)
    for one in (told, more):
        for name, value in one.items():
            if type(value) is int and type(found[name]) is int:
                assert found[name] >= value
            assert value is None or found[name] is not None


STREAM = "".join(
    f"event: {value['type']}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"
    for value in [
        {
            "type": "message_start",
            "message": {"id": "m1", "model": "c", "usage": {"input_tokens": 3, "output_tokens": 1}},
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Grüße "}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "🦊"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "content_block_start",
            "index": 1,
            "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}},
        },
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"a":'}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "1}"}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}},
        {"type": "message_stop"},
    ]
).encode()


def chunks_of(provider, pieces):
    splitter, translator, made = Splitter(), provider.translator(chat(stream=True)), []
    for piece in pieces:
        for _, data in events(splitter.feed(piece)):
            made += translator.feed(data)
    assert translator.is_done
    for chunk in made:
        chunk.pop("created")
    return made


def test_a_stream(provider):
    made = chunks_of(provider, [STREAM])
    deltas = [choice["delta"] for chunk in made for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Grüße 🦊"
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert calls[0] == {"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": ""}}
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a":1}'
    assert made[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert made[-1]["usage"]["prompt_tokens"] == 3
    assert made[-1]["usage"]["completion_tokens"] == 9
    assert all(chunk["id"] == "m1" for chunk in made)


def test_a_stream_cut_at_any_byte_is_the_same(provider):
    whole = chunks_of(provider, [STREAM])
    for at in range(1, len(STREAM)):
        assert chunks_of(provider, [STREAM[:at], STREAM[at:]]) == whole
    assert chunks_of(provider, [STREAM[at : at + 1] for at in range(len(STREAM))]) == whole


def test_line_ends_of_any_kind_are_the_same(provider):
    whole = chunks_of(provider, [STREAM])
    for end in (b"\r\n", b"\r"):
        other = STREAM.replace(b"\n", end)
        assert chunks_of(provider, [other[at : at + 3] for at in range(0, len(other), 3)]) == whole


@pytest.mark.parametrize(
    ("kind", "failure"),
    [
        ("overloaded_error", "server"),
        ("rate_limit_error", "rate_limit"),
        ("authentication_error", "auth"),
        ("billing_error", "credit"),
    ],
)
def test_an_error_within_a_stream(provider, kind, failure):
    data = json.dumps({"type": "error", "error": {"type": kind, "message": f"bad key {KEY}"}}).encode()
    with pytest.raises(UpstreamError) as caught:
        provider.translator(chat()).feed(data)
    assert caught.value.failure.kind == failure
    assert KEY not in str(caught.value)


def test_the_key_is_in_the_headers_and_nowhere_else(provider):
    call = provider.build(chat())
    assert call.headers["x-api-key"] == KEY
    assert KEY not in repr(call) + repr(provider) + repr(provider.config)
    assert call.url == "https://api.anthropic.com/v1/messages"


@pytest.mark.parametrize("model", ["claude-sonnet-4-5", "claude-3-haiku-20240307"])
@pytest.mark.parametrize("named", [{"name": "x"}, {"name": "x", "schema": {"type": "object"}}])
def test_an_answer_is_read_as_json_wherever_it_was_asked_for_as_a_call(model, named):
    """Without a schema there is none that a model could take, whether it takes any or not."""
    request = chat(response_format={"type": "json_schema", "json_schema": named})
    provider = Anthropic(Anthropic.Config(model=model, key_env=None))
    is_forced = "tool_choice" in json.loads(provider.build(request).body)
    use = {"type": "tool_use", "id": "t", "name": ANSWER_TOOL, "input": {"a": 1}}
    content = [use] if is_forced else [{"type": "text", "text": '{"a": 1}'}]
    body = {"content": content, "stop_reason": "tool_use" if is_forced else "end_turn", "usage": {"input_tokens": 1}}
    answer = provider.parse(request, json.dumps(body).encode())
    assert (answer.text, answer.finish_reason) == ('{"a": 1}', "stop")
    assert is_forced is not ("schema" in named and "sonnet" in model)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_a_stream_may_begin_with_a_mark_of_its_encoding(provider, size):
    plain = event_stream(START, *THINKING, *CALLS, *END)
    marked = b"\xef\xbb\xbf" + plain
    pieces = [marked[at : at + size] for at in range(0, len(marked), size)]
    assert chunks_of(provider, pieces) == chunks_of(provider, [plain])


def event_stream(*values):
    return "".join(f"event: {value['type']}\ndata: {json.dumps(value)}\n\n" for value in values).encode()


START = {
    "type": "message_start",
    "message": {"id": "m1", "model": "c", "usage": {"input_tokens": 9, "output_tokens": 1}},
}
THINKING = [
    {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "!"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "s1"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "redacted_thinking", "data": "zz"}},
    {"type": "content_block_stop", "index": 1},
]
CALLS = [
    {
        "type": "content_block_start",
        "index": 2,
        "content_block": {"type": "tool_use", "id": "t1", "name": "now", "input": {}},
    },
    {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": ""}},
    {"type": "content_block_stop", "index": 2},
    {
        "type": "content_block_start",
        "index": 3,
        "content_block": {"type": "tool_use", "id": "t2", "name": "at", "input": {"a": 1}},
    },
    {"type": "content_block_stop", "index": 3},
]
END = [
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}},
    {"type": "message_stop"},
]


def test_a_streamed_call_without_arguments_has_an_empty_object_of_them(provider):
    whole = assembled(chunks_of(provider, [event_stream(START, *CALLS, *END)]))
    calls = whole["choices"][0]["message"]["tool_calls"]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        ("now", "{}"),
        ("at", '{"a": 1}'),
    ]
    assert whole["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("kind", ["server_tool_use", "mcp_tool_use", "new_tool_use"])
@pytest.mark.parametrize("has_call", [False, True])
def test_what_a_tool_at_anthropic_is_asked_is_no_call_of_the_senders(provider, kind, has_call):
    """Its arguments once became the first call's, or a call of none."""

    def block(at, arguments, **fields):
        return [
            {"type": "content_block_start", "index": at, "content_block": {**fields, "input": {}}},
            {
                "type": "content_block_delta",
                "index": at,
                "delta": {"type": "input_json_delta", "partial_json": arguments},
            },
            {"type": "content_block_stop", "index": at},
        ]

    own = block(1, '{"city":"Ghent"}', type="tool_use", id="t", name="weather") if has_call else []
    at_anthropic = block(0, '{"query":"x"}', type=kind, id="s", name="web_search")
    later = block(2, '{"query":"y"}', type=kind, id="s2", name="web_search")
    message = assembled(chunks_of(provider, [event_stream(START, *at_anthropic, *own, *later, *END)]))["choices"][0]
    call = {"id": "t", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ghent"}'}}
    assert message["message"].get("tool_calls") == ([call] if has_call else None)


def test_streamed_thoughts_are_those_of_the_whole_answer_and_go_back_whole(provider):
    message = assembled(chunks_of(provider, [event_stream(START, *THINKING, *CALLS, *END)]))["choices"][0]["message"]
    thoughts = [{"type": "thinking", "thinking": "hm!", "signature": "s1"}, {"type": "redacted_thinking", "data": "zz"}]
    tools = [
        {"type": "tool_use", "id": "t1", "name": "now", "input": {}},
        {"type": "tool_use", "id": "t2", "name": "at", "input": {"a": 1}},
    ]
    body = {"content": [*thoughts, *tools], "stop_reason": "tool_use", "usage": {"input_tokens": 9, "output_tokens": 9}}
    whole = provider.parse(chat(), json.dumps(body).encode()).body["choices"][0]["message"]
    assert {**message, "content": message["content"] or None} == whole
    assert (message["reasoning_content"], message["thinking_blocks"]) == ("hm!", thoughts)
    again = translated({"messages": [{"role": "user", "content": "x"}, message]}, "claude", 9)
    assert again["messages"][1]["content"] == body["content"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_that_was_forced_into_json_is_text_again(provider, is_streamed):
    wanted = chat(response_format={"type": "json_object"}, stream=is_streamed)
    sent = json.loads(provider.build(wanted).body)
    assert sent["tool_choice"]["name"] == ANSWER_TOOL
    call = {"type": "tool_use", "id": "t1", "name": ANSWER_TOOL, "input": {"a": 1}}
    if is_streamed:
        pieces = [
            {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": part}}
            for part in ('{"a"', ": 1}")
        ]
        aside = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Here:"}}
        began = {"type": "content_block_start", "index": 1, "content_block": {**call, "input": {}}}
        translator = provider.translator(wanted)
        chunks = []
        for value in (START, aside, began, *pieces, {"type": "content_block_stop", "index": 1}, *END):
            chunks += translator.feed(json.dumps(value).encode())
        choice = assembled(chunks)["choices"][0]
    else:
        body = {
            "content": [{"type": "text", "text": "Here:"}, call],
            "stop_reason": "tool_use",
            "usage": {"input_tokens": 9, "output_tokens": 9},
        }
        choice = provider.parse(wanted, json.dumps(body).encode()).body["choices"][0]
    assert (json.loads(choice["message"]["content"]), choice["finish_reason"]) == ({"a": 1}, "stop")
    assert "tool_calls" not in choice["message"]


def test_who_asks_in_anthropics_form_gets_every_event_and_the_whole_message_as_they_came(provider):
    native = Native({"model": "x", "max_tokens": 5, "messages": [], "system": "s"}, {"anthropic-beta": "b1"})
    asked = UpstreamRequest("chat", chat(stream=True).body, native=native)
    call = provider.build(asked)
    assert json.loads(call.body) == {**native.body, "model": "claude", "stream": True}
    assert call.headers["anthropic-beta"] == "b1"
    translator, given = provider.translator(asked), [START, {"type": "ping"}, *THINKING, *CALLS, *END]
    chunks = [chunk for value in given for chunk in translator.feed(json.dumps(value).encode())]
    assert [chunk["anthropic"] for chunk in chunks if "anthropic" in chunk] == given
    assert "anthropic" not in assembled(chunks)
    body = {
        "id": "m",
        "content": [{"type": "web_search_tool_result", "content": []}],
        "usage": {"input_tokens": 1, "output_tokens": 2},
    }
    assert provider.parse(asked, json.dumps(body).encode()).body["anthropic"] == body
    # Other messages are sent in place of the sender's: it is translated after all.
    changed = provider.build(asked.with_body(messages=[{"role": "user", "content": "other"}]))
    assert json.loads(changed.body)["messages"][0]["content"] == [{"type": "text", "text": "other"}]
