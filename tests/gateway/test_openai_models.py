"""Parameters as OpenAI's models take them, and what came in Anthropic's form in words that all of them know."""

import pytest

from anabranch.errors import ConfigError
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.openai_models import effort_of, fitted, reasons
from anabranch.gateway.providers.plain_chat import plain
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest
from anabranch.web.messages import to_chat

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("o1", True),
        ("o3-mini", True),
        ("openai/o4-mini", True),
        ("gpt-5", True),
        ("gpt-5-mini", True),
        ("gpt-5.1", True),
        ("gpt-5.6-luna", True),
        ("gpt-6", True),
        ("codex-mini-latest", True),
        ("gpt-5-chat-latest", False),
        ("gpt-5.1-chat-latest", False),
        ("gpt-4o", False),
        ("gpt-4.1", False),
        ("gpt-35-turbo", False),
        ("gpt-41-mini", False),
        ("openai/gpt-oss-120b", False),
        ("claude-opus-4-8", False),
        ("ollama3", False),
        ("", False),
    ],
)
def test_which_models_reason(model, wanted):
    assert reasons(model) == wanted


@pytest.mark.parametrize(
    ("model", "fields", "found"),
    [
        (
            "gpt-5",
            {"max_tokens": 9, "temperature": 0.5, "top_p": 1, "presence_penalty": 1},
            {"max_completion_tokens": 9},
        ),
        (
            "o3",
            {"max_tokens": 9, "max_completion_tokens": 12, "reasoning_effort": "low"},
            {"max_completion_tokens": 12, "reasoning_effort": "low"},
        ),
        (
            "gpt-5.1",
            {"reasoning_effort": "none", "temperature": 0.5, "logprobs": True},
            {"reasoning_effort": "none", "temperature": 0.5, "logprobs": True},
        ),
        ("gpt-5", {"reasoning_effort": "none", "temperature": 0.5}, {"reasoning_effort": "none"}),
        (
            "gpt-4o",
            {"max_tokens": 9, "temperature": 0.5, "reasoning_effort": "low", "verbosity": "low"},
            {"max_tokens": 9, "temperature": 0.5},
        ),
        ("qwen3", {"max_tokens": 9, "reasoning_effort": "low"}, {"max_tokens": 9, "reasoning_effort": "low"}),
    ],
)
def test_fields_as_each_model_takes_them(model, fields, found):
    body = {"messages": HELLO, **fields}
    before = dict(body)
    assert fitted(body, model) == {"messages": HELLO, **found}
    assert body == before


def test_a_name_may_be_told_otherwise_and_nothing_to_change_changes_nothing():
    body = {"messages": HELLO, "max_tokens": 3, "temperature": 0.1}
    assert fitted(body, "gpt-5", False) is body
    assert fitted(body, "my-model", True) == {"messages": HELLO, "max_completion_tokens": 3}
    assert fitted(body, "qwen") is body


@pytest.mark.parametrize("fields", [{"logprobs": True}, {"top_logprobs": 3}, {"logit_bias": {"1": 2}}])
def test_what_a_reasoning_model_cannot_give_is_refused(fields):
    with pytest.raises(UpstreamError) as caught:
        fitted({"messages": HELLO, **fields}, "o3")
    assert caught.value.failure.kind == "unsupported"


@pytest.mark.parametrize(
    ("thinking", "effort"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, "low"),
        ({"type": "enabled", "budget_tokens": 8000}, "medium"),
        ({"type": "enabled", "budget_tokens": 30_000}, "high"),
        ({"type": "adaptive"}, "medium"),
        ({"type": "disabled"}, None),
        (None, None),
    ],
)
def test_thinking_becomes_effort_of_models_that_reason(thinking, effort):
    assert effort_of(thinking, "gpt-5") == effort
    assert effort_of(thinking, "gpt-4o") is None


def test_an_endpoint_is_not_sent_what_it_refuses():
    config = OpenAI.Config(model="m", key_env=None, drops=("seed", "user"))
    call = config.build().build(UpstreamRequest("chat", {"messages": HELLO, "seed": 1, "user": "u", "top_k": 3}))
    assert call.body == b'{"model":"m","messages":[{"role":"user","content":"hello"}],"top_k":3}'
    with pytest.raises(ConfigError, match="max_tokens"):
        OpenAI.Config(model="m", drops=("max_tokens",))


def messages(*turns, **fields):
    return plain(to_chat({"model": "x", "max_tokens": 5, "messages": list(turns), **fields}), "gpt-4o")


MARK = {"cache_control": {"type": "ephemeral"}}


def test_a_request_of_anthropics_form_in_openais_words_alone():
    found = messages(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look", **MARK},
                {"type": "image", "source": {"type": "url", "url": "https://x"}, **MARK},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "so"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}, **MARK},
                {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "is_error": True,
                    "content": [
                        {"type": "text", "text": "no"},
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}},
                    ],
                },
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "content": [{"type": "image", "source": {"type": "url", "url": "https://y"}}],
                    **MARK,
                },
                {
                    "type": "document",
                    "title": "T",
                    "source": {"type": "text", "media_type": "text/plain", "data": "words"},
                },
                {"type": "text", "text": "and?"},
            ],
        },
        system=[{"type": "text", "text": "be", **MARK}, {"type": "text", "text": "brief"}],
        tools=[{"name": "f", "input_schema": {"type": "object"}, **MARK}],
        tool_choice={"type": "any"},
        top_k=3,
        thinking={"type": "adaptive"},
        metadata={"user_id": "u"},
        stop_sequences=["x"],
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert found == {
        "model": "x",
        "max_tokens": 5,
        "user": "u",
        "stop": ["x"],
        "tool_choice": "required",
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "messages": [
            {"role": "system", "content": "be\n\nbrief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "https://x"}}],
            },
            {
                "role": "assistant",
                "content": "so",
                "tool_calls": [
                    {"id": "t1", **call},
                    {"id": "t2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                ],
            },
            {"role": "tool", "tool_call_id": "t1", "content": "Error: no"},
            {"role": "tool", "tool_call_id": "t2", "content": "(see the next message)"},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
                    {"type": "image_url", "image_url": {"url": "https://y"}},
                ],
            },
            {"role": "user", "content": "T\nwords\n\nand?"},
        ],
    }


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ([{"type": "document", "source": {"type": "file", "file_id": "f"}}], {}),
        ([{"type": "image", "source": {"type": "file", "file_id": "f"}}], {}),
        ([{"type": "container_upload", "file_id": "f"}], {}),
        ("x", {"tools": [{"type": "web_search_20260209", "name": "web_search"}]}),
    ],
)
def test_what_runs_at_anthropic_alone_is_refused(content, fields):
    with pytest.raises(UpstreamError) as caught:
        messages({"role": "user", "content": content}, **fields)
    assert caught.value.failure.kind == "unsupported"


@pytest.mark.parametrize("model", ["gpt-5", "gpt-4o"])
def test_thoughts_of_another_model_are_not_sent_to_openais(model):
    said = {"role": "assistant", "content": "so", "thinking_blocks": [{"type": "thinking"}], "reasoning_content": "hm"}
    body = {"messages": [*HELLO, said]}
    assert fitted(body, model)["messages"] == [*HELLO, {"role": "assistant", "content": "so"}]
    assert fitted(body, "qwen3") is body
