"""What is sent as it came is counted: never less than the chat that was made of it, and never less than its letters."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.native_tokens import count_native
from anabranch.gateway.prompt_tokens import count_prompt
from anabranch.web.messages import to_chat as messages_to_chat
from anabranch.web.responses import to_chat
from gateway_process import call, served
from gateway_scripted import scripted, whole

LONG = "word " * 2_000
USER = {"role": "user", "content": "hi"}
ADMIN = "operator-key-1"


def counts(body, counter=None):
    chat = to_chat(body)
    return count_native(chat, body, counter), count_prompt(chat, counter)


def function(name, text="x"):
    return {"type": "function", "name": name, "description": text, "parameters": {}}


def allowed(*names):
    tools = [{"type": "function", "name": name} for name in names]
    return {"type": "allowed_tools", "mode": "auto", "tools": tools}


@pytest.mark.parametrize(
    "body",
    [
        {"input": "hi", "tools": [function("f"), function("g", LONG)], "tool_choice": allowed("f")},
        {"input": [USER, {"type": "reasoning", "summary": [], "encrypted_content": LONG}, USER]},
        {"input": [USER, {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": LONG}]}]},
        {"input": [USER, {"type": "reasoning", "summary": [{"type": "summary_text", "text": LONG}]}]},
        {"input": [{**USER, "of_tomorrow": [{"text": LONG}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi", "of_tomorrow": LONG}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi", "annotations": [{LONG: 1}]}]}]},
        {"input": [{**USER, "status": LONG}]},
        {"input": "hi", "reasoning": {"summary": LONG}},
        {"input": "hi", "text": {"format": {"type": "text", "of_tomorrow": LONG}}},
        {"input": "hi", "tools": [{"type": "custom", "name": "c", "format": {"type": "text", "more": LONG}}]},
    ],
)
def test_what_a_chat_leaves_out_counts(body):
    native, chat = counts(body)
    assert chat.at_most < 1_000
    assert native.at_most >= len(LONG)
    assert native.tokens >= len(LONG) / 4
    # By the tokenizer of the model too.
    native, _ = counts(body, lambda text: len(text.split()))
    assert native.tokens >= 2_000


def test_a_thought_is_an_item_as_a_message_is_one():
    thought = {"type": "reasoning", "summary": []}
    native, chat = counts({"input": [USER, thought, thought]})
    assert (native.tokens - chat.tokens, native.at_most - chat.at_most) == (8, 8)


def test_what_is_said_twice_is_paid_for_twice():
    body = {"input": [{"role": "user", "content": LONG}, {"type": "reasoning", "summary": [{"text": LONG}]}]}
    assert counts(body)[0].at_most >= 2 * len(LONG)
    picture = "data:image/png;base64," + "A" * 9_000
    shown = {"role": "user", "content": [{"type": "input_image", "image_url": picture}]}
    made = {"type": "image_generation_call", "result": "A" * 9_000}
    for item in (shown, made):
        native, chat = counts({"input": [item, USER]})
        assert native.at_most - chat.at_most < 100
        # As a text it is one.
        thought = {"type": "reasoning", "summary": [], "content": [{"text": picture}]}
        assert counts({"input": [item, thought, USER]})[0].at_most >= chat.at_most + len(picture)


def test_what_a_chat_has_other_words_for_counts_once():
    grammar = {"type": "grammar", "syntax": "lark", "definition": LONG}
    body = {
        "instructions": LONG,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": LONG}]},
            {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": LONG}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": LONG},
            {"type": "function_call_output", "call_id": "c", "output": LONG},
            {"type": "custom_tool_call", "call_id": "d", "name": "c", "input": LONG},
            {"type": "custom_tool_call_output", "call_id": "d", "output": LONG},
        ],
        "tools": [function("f", LONG), {"type": "custom", "name": "c", "description": LONG, "format": grammar}],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"description": LONG}}},
    }
    native, chat = counts(body)
    assert chat.at_most <= native.at_most <= chat.at_most + 50


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"name": "f", "input_schema": {}, "input_examples": [{"a": LONG}]}]},
        {"messages": [{"role": "user", "content": "hi", "of_tomorrow": LONG}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "of_tomorrow": [LONG]}]}]},
        {"of_tomorrow": {"a": LONG}},
    ],
)
def test_what_is_left_out_of_a_message_counts_too(more):
    body = {"model": "m", "max_tokens": 5, "messages": [USER], **more}
    chat = messages_to_chat(body)
    assert count_prompt(chat).at_most < 1_000
    assert count_native(chat, body).at_most >= len(LONG)


def test_a_message_counts_once():
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 9_000}}
    paper = {"type": "document", "title": "t", "source": {**picture["source"], "media_type": "application/pdf"}}
    text = {"type": "text", "text": LONG, "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    calls = [
        {"type": "thinking", "thinking": LONG, "signature": "s" * 90},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": LONG, "b": [1, 2.5, True]}},
    ]
    result = {"type": "tool_result", "tool_use_id": "t", "content": [picture, text]}
    body = {
        "model": "m",
        "max_tokens": 5,
        "system": [text],
        "messages": [
            {"role": "user", "content": [text, picture, paper]},
            {"role": "assistant", "content": calls},
            {"role": "user", "content": [result]},
        ],
        "tools": [{"name": "f", "description": LONG, "input_schema": {"properties": {"a": {"description": LONG}}}}],
        "output_config": {"format": {"type": "json_schema", "schema": {"description": LONG}}},
        "stop_sequences": [LONG],
    }
    chat = messages_to_chat(body)
    native, counted = count_native(chat, body), count_prompt(chat)
    assert counted.at_most <= native.at_most <= counted.at_most + 50
    assert native.images == counted.images


def test_pictures_within_thoughts_are_pictures():
    part = {"type": "input_image", "image_url": "https://x/y.png"}
    native, chat = counts({"input": [USER, {"type": "reasoning", "summary": [], "content": [part]}]})
    assert native.images > 1_000
    assert native.at_most - chat.at_most > native.images


TEXT = st.text("ab \u00e9", min_size=65, max_size=90)
_OTHERS = st.dictionaries(
    st.sampled_from(["id", "status", "extra", "name"]), TEXT | st.lists(TEXT, max_size=2), max_size=2
)


def _item(made):
    return st.builds(lambda item, more: {**more, **item}, made, _OTHERS)


_PART = _item(
    st.builds(lambda kind, text: {"type": kind, "text": text}, st.sampled_from(["input_text", "output_text"]), TEXT)
)
_CONTENT = TEXT | st.lists(_PART, min_size=1, max_size=3)
_ITEM = st.one_of(
    _item(
        st.builds(
            lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), _CONTENT
        )
    ),
    _item(
        st.builds(
            lambda content, summary, sealed: {
                "type": "reasoning",
                "content": content,
                "summary": summary,
                "encrypted_content": sealed,
            },
            st.lists(_PART, max_size=2),
            st.lists(_PART, max_size=2),
            st.none()
            | TEXT
            | TEXT.map(lambda text: "anabranch-1." + base64.b64encode(f'[{{"t":"{text}"}}]'.encode()).decode()),
        )
    ),
    _item(st.builds(lambda text: {"type": "function_call", "call_id": "c", "name": "f", "arguments": text}, TEXT)),
    _item(st.builds(lambda text: {"type": "custom_tool_call", "call_id": "c", "name": "f", "input": text}, TEXT)),
    _item(st.builds(lambda made: {"type": "function_call_output", "call_id": "c", "output": made}, _CONTENT)),
)
_TOOLS = st.lists(st.tuples(st.sampled_from("fgh"), TEXT), max_size=4).map(
    lambda made: [function(*one) for one in made]
)


def letters(value):
    if isinstance(value, str):
        return len(value.encode()) if len(value) > 64 else 0
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(letters, inner))


@given(st.lists(_ITEM, min_size=1, max_size=5), _TOOLS, st.booleans(), st.none() | TEXT)
def test_never_less_than_the_chat_nor_than_what_is_sent(items, tools, is_filtered, instructions):
    body = {"input": items}
    if instructions:
        body["instructions"] = instructions
    if tools:
        body["tools"] = tools
        if is_filtered:
            body["tool_choice"] = allowed(tools[0]["name"])
    native, chat = counts(body)
    assert native.tokens >= chat.tokens
    assert native.at_most >= max(chat.at_most, letters(body))
    by_words, in_chat = counts(body, lambda text: len(text.encode()))
    assert by_words.tokens >= max(in_chat.tokens, letters(body))


def test_a_budget_covers_what_is_sent(tmp_path):
    sent = []
    answer = {
        "id": "r",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "status": "completed",
        "output": [
            {"type": "message", "id": "m", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]}
        ],
        "usage": {"input_tokens": 9, "output_tokens": 4, "total_tokens": 13},
    }

    def told(body):
        sent.append(body)
        return whole(answer)

    with scripted({"up": told}) as url:
        (tmp_path / "g.toml").write_text(
            f"""store = "{tmp_path}/g.db"
admin = {{ key = "env:TK" }}
[[models]]
name = "native"
max_tokens = 100
price = {{ input_usd = 1, output_usd = 1 }}
deployments = [{{ provider = {{ kind = "openai", model = "m", responses = true, base_url = "{url}/up", key_env = "" }} }}]
"""
        )
        with served("--config", str(tmp_path / "g.toml"), environment={"TK": ADMIN}) as server:
            made = call(server.url, "POST", "/admin/keys", {"name": "k", "budget_usd": 0.01}, key=ADMIN)[1]
            long = "word " * 8_000
            bodies = [
                {"input": "hi", "tools": [function("f"), function("g", long)], "tool_choice": allowed("f")},
                {"input": [USER, {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": long}]},
            ]
            for body in bodies:
                body["model"] = "native"
                count = call(server.url, "POST", "/v1/responses/input_tokens", body, key=made["secret"])[1]
                assert count["input_tokens"] >= len(long) / 4
                status, refused = call(server.url, "POST", "/v1/responses", body, key=made["secret"])[:2]
                assert (status, refused["error"]["code"]) == (429, "insufficient_quota"), refused
            assert sent == []
            body = {"model": "native", "input": "hi"}
            assert call(server.url, "POST", "/v1/responses", body, key=made["secret"])[0] == 200
            assert len(sent) == 1
