"""Chat requests in Anthropic's form: each field translated or refused, by what each model takes; nothing lost on the way there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.providers.anthropic_models import Takes, takes
from anabranch.gateway.providers.anthropic_request import ANSWER_TOOL, adapted, translated
from anabranch.gateway.providers.provider import UpstreamError
from anabranch.web.messages import to_chat

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
MARK = {"type": "ephemeral"}
NEW, MIDDLE, OLD = "claude-opus-4-8", "claude-sonnet-4-6", "claude-sonnet-4-20250514"


def made(model=OLD, most=4096, **fields):
    return translated({"messages": HELLO, **fields}, model, most)


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("claude-3-5-sonnet-20241022", Takes(budget=False)),
        ("claude-3-opus-20240229", Takes(budget=False)),
        ("claude-3-7-sonnet-latest", Takes()),
        ("claude-sonnet-4-20250514", Takes()),
        ("claude-opus-4-1-20250805", Takes(one_of_two=True)),
        ("claude-haiku-4-5-20251001", Takes(one_of_two=True, schema=True)),
        ("claude-opus-4-6", Takes(one_of_two=True, schema=True, adaptive=True)),
        ("claude-opus-4-7", Takes(False, True, False, True, True, True)),
        ("anthropic/claude-opus-5", Takes(False, True, False, True, True, True)),
        ("my-proxys-name", Takes(schema=True)),
    ],
)
def test_what_a_model_takes_is_told_by_its_name(model, wanted):
    assert takes(model) == wanted


@pytest.mark.parametrize(
    ("model", "fields", "found"),
    [
        (OLD, {"metadata": {"session": "abc"}, "store": True, "user": "u1"}, {"metadata": {"user_id": "u1"}}),
        (OLD, {"metadata": {"user_id": "u2", "x": "y"}, "user": "u1"}, {"metadata": {"user_id": "u2"}}),
        (OLD, {"metadata": {"x": "y"}}, {}),
        (OLD, {"service_tier": "default"}, {"service_tier": "standard_only"}),
        (OLD, {"temperature": 0.5, "top_p": 0.9, "top_k": 3}, {"temperature": 0.5, "top_p": 0.9, "top_k": 3}),
        (MIDDLE, {"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5}),
        (NEW, {"temperature": 0.5, "top_p": 0.9, "top_k": 3}, {}),
        (OLD, {"cache_control": MARK, "seed": 3}, {"cache_control": MARK}),
    ],
)
def test_fields_as_each_model_takes_them(model, fields, found):
    assert made(model, **fields) == {"model": model, "max_tokens": 4096, "messages": _TURNS, **found}


_TURNS = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]


@pytest.mark.parametrize(
    ("model", "fields", "most", "thinking", "config"),
    [
        (OLD, {"reasoning_effort": "high", "temperature": 0.2}, 4096, {"type": "enabled", "budget_tokens": 2048}, None),
        (
            OLD,
            {"reasoning_effort": "low", "max_tokens": 64_000},
            64_000,
            {"type": "enabled", "budget_tokens": 2048},
            None,
        ),
        (OLD, {"reasoning_effort": "high", "max_tokens": 1000}, 1000, None, None),
        (OLD, {"reasoning_effort": "none"}, 4096, None, None),
        ("claude-3-5-haiku-20241022", {"reasoning_effort": "high"}, 4096, None, None),
        (MIDDLE, {"reasoning_effort": "xhigh"}, 4096, {"type": "adaptive"}, {"effort": "high"}),
        (NEW, {"reasoning_effort": "minimal"}, 4096, {"type": "adaptive"}, {"effort": "low"}),
        (NEW, {"reasoning_effort": "xhigh"}, 4096, {"type": "adaptive"}, {"effort": "xhigh"}),
        (NEW, {"reasoning_effort": "high", "tools": [TOOL], "tool_choice": "required"}, 4096, None, {"effort": "high"}),
        (
            OLD,
            {"thinking": {"type": "enabled", "budget_tokens": 10_000}},
            14_096,
            {"type": "enabled", "budget_tokens": 10_000},
            None,
        ),
        (
            OLD,
            {"thinking": {"type": "enabled", "budget_tokens": 10_000}, "max_tokens": 12_000},
            12_000,
            {"type": "enabled", "budget_tokens": 10_000},
            None,
        ),
        (NEW, {"thinking": {"type": "enabled", "budget_tokens": 10_000}}, 4096, {"type": "adaptive"}, None),
    ],
)
def test_a_wish_for_effort_becomes_thinking_as_the_model_does_it(model, fields, most, thinking, config):
    found = made(model, **fields)
    assert (found["max_tokens"], found.get("thinking"), found.get("output_config")) == (most, thinking, config)
    assert "temperature" not in found


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "custom", "custom": {"name": "code"}}], "tool_choice": "required"},
        {"functions": [{"name": "f", "parameters": {}}], "function_call": {"name": "f"}},
        {"messages": [{"role": "function", "name": "f", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "f"}}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]},
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
        {"web_search_options": {"search_context_size": "low"}},
        {"modalities": ["text", "audio"]},
        {"service_tier": "flex"},
        {"reasoning_effort": "enormous"},
        {"stop": ["\n"]},
        {"response_format": {"type": "grammar"}},
        {"response_format": {"type": "json_object"}, "tools": [TOOL]},
    ],
)
def test_what_has_no_counterpart_is_refused_and_never_left_out(fields):
    with pytest.raises(UpstreamError) as caught:
        made(NEW, **fields)
    assert caught.value.failure.kind == "unsupported"


def test_a_schema_is_asked_for_where_the_model_knows_them_and_else_by_a_tool():
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    assert made(NEW, response_format=wanted)["output_config"] == {"format": {"type": "json_schema", "schema": SCHEMA}}
    both = made(NEW, response_format=wanted, reasoning_effort="low")["output_config"]
    assert both == {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}
    by_tool = made(OLD, response_format=wanted)
    assert [(tool["name"], tool["input_schema"]) for tool in by_tool["tools"]] == [(ANSWER_TOOL, SCHEMA)]
    assert by_tool["tool_choice"] == {"type": "tool", "name": ANSWER_TOOL, "disable_parallel_tool_use": True}
    assert made(NEW, response_format={"type": "json_object"})["tools"][0]["name"] == ANSWER_TOOL
    assert "tools" not in made(NEW, response_format={"type": "text"})


@pytest.mark.parametrize(
    ("own", "most", "sent"),
    [
        ({}, 3, 3),
        ({"max_uses": 5}, 3, 3),
        ({"max_uses": 2}, 3, 2),
        ({"max_uses": 2}, None, 2),
        ({}, None, None),
        ({}, 0, None),
    ],
)
def test_the_most_calls_of_tools_is_the_most_uses_of_each_that_runs_there(own, most, sent):
    """It was left out: Claude searched as often as it liked."""
    tools = [{"type": kind, "name": "t", **own} for kind in ("web_search_20250305", "web_fetch_20250910")]
    given = [*tools, {"type": "bash_20250124", "name": "bash"}, TOOL]
    found = made(NEW, tools=given, max_tool_calls=most)
    assert "max_tool_calls" not in found
    assert [tool.get("max_uses") for tool in found["tools"]] == [sent, sent, None, None]


def test_marks_of_caches_go_along_wherever_they_are():
    body = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "long", "cache_control": MARK}]},
            {"role": "user", "content": "a", "cache_control": MARK},
            {
                "role": "assistant",
                "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": ""}, "cache_control": MARK}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "b", "cache_control": MARK},
        ],
        "tools": [{**TOOL, "cache_control": MARK}],
    }
    found = translated(body, OLD, 5)
    assert found["system"] == [{"type": "text", "text": "long", "cache_control": MARK}]
    assert found["tools"][0]["cache_control"] == MARK
    assert [message["content"][-1]["cache_control"] for message in found["messages"]] == [MARK] * 3


def test_pictures_and_documents_in_the_results_of_tools():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,BBBB", "filename": "a.pdf"}},
        {"type": "file", "file": {"file_data": "data:text/plain;base64,aGk="}},
    ]
    results = {"role": "tool", "tool_call_id": "c", "content": parts, "is_error": True}
    found = made(messages=[*HELLO, {"role": "assistant", "tool_calls": [call]}, results])
    [result] = found["messages"][-1]["content"]
    assert result == {
        "type": "tool_result",
        "tool_use_id": "c",
        "is_error": True,
        "content": [
            {"type": "text", "text": "see"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
            {
                "type": "document",
                "source": {"type": "base64", "media_type": "application/pdf", "data": "BBBB"},
                "title": "a.pdf",
            },
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hi"}},
        ],
    }


def test_thoughts_come_first_and_only_those_that_are_signed():
    thoughts = [
        {"type": "thinking", "thinking": "a", "signature": "s"},
        {"type": "thinking", "thinking": "another model's", "signature": ""},
        {"type": "redacted_thinking", "data": "x"},
    ]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {
        "role": "assistant",
        "content": "so",
        "thinking_blocks": thoughts,
        "tool_calls": [call],
        "reasoning_content": "a",
    }
    found = made(messages=[*HELLO, said, {"role": "tool", "tool_call_id": "c", "content": "r"}])
    assert [block["type"] for block in found["messages"][1]["content"]] == [
        "thinking",
        "redacted_thinking",
        "text",
        "tool_use",
    ]
    assert found["messages"][1]["content"][0] == thoughts[0]


# Whole requests of Anthropic's own form, through chat and back.

_text = st.text(min_size=1, max_size=8)
_marks = st.sampled_from([{}, {"cache_control": MARK}, {"cache_control": {"type": "ephemeral", "ttl": "1h"}}])


def _with(block, marks=_marks):
    return st.builds(lambda fields, mark: {**fields, **mark}, block, marks)


TEXT = _with(st.builds(lambda text: {"type": "text", "text": text}, _text))
IMAGE = _with(
    st.sampled_from(
        [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
            {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
            {"type": "image", "source": {"type": "file", "file_id": "file_1"}},
        ]
    )
)
PAPER = _with(
    st.sampled_from(
        [
            {
                "type": "document",
                "source": {"type": "base64", "media_type": "application/pdf", "data": "BBBB"},
                "title": "a",
            },
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "BBBB"}},
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hi"}, "context": "c"},
            {"type": "document", "source": {"type": "url", "url": "https://x/y.pdf"}, "citations": {"enabled": True}},
            {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "x"}]},
        ]
    )
)
RESULT = _with(
    st.builds(
        lambda content, fails: {
            "type": "tool_result",
            "tool_use_id": "t1",
            "content": content,
            **({"is_error": True} if fails else {}),
        },
        st.one_of(_text, st.lists(st.one_of(IMAGE, PAPER), min_size=1, max_size=2)),
        st.booleans(),
    )
)
THOUGHT = st.sampled_from(
    [{"type": "thinking", "thinking": "hm", "signature": "sig"}, {"type": "redacted_thinking", "data": "zz"}]
)
CALL = _with(st.builds(lambda text: {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": [text]}}, _text))
USER = st.builds(
    lambda results, parts: [*results, *parts],
    st.lists(RESULT, max_size=2),
    st.lists(st.one_of(TEXT, IMAGE, PAPER), min_size=1),
)
ASSISTANT = st.builds(
    lambda thoughts, parts, calls: [*thoughts, *parts, *calls],
    st.lists(THOUGHT, max_size=2),
    st.lists(TEXT, max_size=2),
    st.lists(CALL, min_size=1, max_size=2),
)
TOOLS = st.lists(
    st.sampled_from(
        [
            {"name": "f", "description": "d", "input_schema": {"type": "object"}},
            {"name": "g", "description": "", "input_schema": SCHEMA, "cache_control": MARK},
            {"type": "web_search_20260209", "name": "web_search", "max_uses": 3},
        ]
    ),
    min_size=1,
    max_size=3,
)
CHOICE = st.sampled_from(
    [
        {"type": "auto"},
        {"type": "any", "disable_parallel_tool_use": True},
        {"type": "tool", "name": "f"},
        {"type": "none"},
    ]
)


@given(
    st.lists(st.tuples(USER, ASSISTANT), max_size=2),
    USER,
    st.one_of(st.just("be brief"), st.lists(TEXT, min_size=2, max_size=3)),
    TOOLS,
    CHOICE,
    st.sampled_from(
        [{}, {"metadata": {"user_id": "u"}, "stop_sequences": ["x"], "cache_control": MARK, "stream": True}]
    ),
)
def test_nothing_of_a_request_is_lost_between_anthropics_form_and_back(turns, last, system, tools, choice, more):
    said = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    body = {
        "model": MIDDLE,
        "max_tokens": 100,
        "messages": [*said, {"role": "user", "content": last}],
        "system": system,
        "tools": tools,
        "tool_choice": choice,
        **more,
    }
    back = translated(to_chat(body), MIDDLE, 7)
    if isinstance(system, list) and all(set(block) == {"type", "text"} for block in system):
        body["system"] = "\n\n".join(block["text"] for block in system)
    assert back == body


def test_a_request_of_anthropics_form_goes_as_it_came_but_for_what_the_model_does_not_take():
    body = {
        "model": "x",
        "max_tokens": 5,
        "messages": HELLO,
        "stream": True,
        "temperature": 0.5,
        "mcp_servers": [{"url": "u"}],
    }
    assert adapted(body, OLD, True) == {**body, "model": OLD}
    assert adapted(body, OLD, False) == {name: value for name, value in body.items() if name != "stream"} | {
        "model": OLD
    }
    thinks = {**body, "thinking": {"type": "enabled", "budget_tokens": 2000, "display": "omitted"}}
    assert adapted(thinks, NEW, True)["thinking"] == {"type": "adaptive", "display": "omitted"}
    assert "temperature" not in adapted(thinks, NEW, True)
    assert adapted(thinks, MIDDLE, True)["thinking"] == thinks["thinking"]
