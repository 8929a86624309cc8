"""What is sent as it came is counted: never less than the chat that was made of it, and never less than its letters."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.native_tokens import count_native
from anabranch.gateway.prompt_tokens import count_prompt
from anabranch.web.api_error import ApiError
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


def test_a_thought_is_an_item_as_a_message_is_one_and_counts_with_its_json():
    thought = {"type": "reasoning", "summary": []}
    native, chat = counts({"input": [USER, thought, thought]})
    sent = len(json.dumps(thought)) * 2
    assert native.tokens - chat.tokens == 8 + -(-(sent + len("[, ]")) // 4)
    assert native.at_most - chat.at_most == 8 + sent + len("[, ]")


NAMES = {f"k{at}".ljust(64, "x"): True for at in range(100)}
HIDDEN = {
    "names": NAMES,
    "nulls": [None] * 2_000,
    "brackets": [[]] * 3_000,
    "labels": [{"type": "word " * 12, "id": "word " * 12, "role": "user"}] * 60,
    "falses": {"a": [{"b": False}] * 800},
}


@pytest.mark.parametrize("value", HIDDEN.values(), ids=HIDDEN)
def test_all_json_of_what_is_left_out_counts(value):
    sent = len(json.dumps(value, separators=(",", ":")))
    left_out = {"type": "function", "name": "g", "parameters": {"default": value}}
    thought = {"type": "reasoning", "summary": [], "of_tomorrow": value}
    for body in (
        {"input": "hi", "tools": [function("f"), left_out], "tool_choice": allowed("f")},
        {"input": [USER, thought]},
        {"input": [USER, {**thought, "of_tomorrow": None, "summary": value if isinstance(value, list) else [value]}]},
        {"input": [{**USER, "content": [{"type": "input_text", "text": "hi", "annotations": value}]}]},
        {"input": "hi", "reasoning": {"effort": "low", "more": value}},
        {"input": "hi", "text": {"verbosity": "low", "more": value}},
        {"input": "hi", "messages": [value]},
    ):
        assert counts(body)[0].at_most >= sent
        assert counts(body)[0].tokens >= sent / 4
    body = {"model": "m", "max_tokens": 5, "messages": [USER]}
    for more in (
        {"tools": [{"name": "f", "input_schema": {}, "input_examples": [value]}]},
        {"messages": [{**USER, "more": value}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "more": value}]}]},
        {"mcp_servers": [value]},
        {"input": [value]},
    ):
        made = {**body, **more}
        assert count_native(messages_to_chat(made), made).at_most >= sent


def test_words_that_set_something_are_no_prompt():
    plain = counts({"input": "hi"})[0]
    more = {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low"}, "truncation": "auto"}
    assert counts({"input": "hi", "text": {"verbosity": "low"}, **more})[0].at_most <= plain.at_most + 10
    # Of many, each may be one.
    many = {f"setting_{at}": True for at in range(1_000)}
    assert counts({"input": "hi", **many})[0].at_most >= 10_000


def test_names_of_items_are_next_to_nothing():
    item = {"type": "message", "id": "msg_" + "a" * 50, "status": "completed", **USER}
    native, chat = counts({"input": [item]})
    assert native.tokens == chat.tokens
    assert native.at_most - chat.at_most == 54 // 4
    native, _ = counts({"input": [{**item, "id": "a" * 5_000}]})
    assert native.at_most >= 5_000


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


_NAME = st.sampled_from(["type", "role", "status", "id", "phase", "text", "content", "data", "name"]) | st.text(
    "kx", min_size=1, max_size=64
)
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 10**6)
    | st.floats(allow_nan=False)
    | st.text("ab \u00e9\n", max_size=70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_NAME, inner, max_size=4),
    max_leaves=8,
)
FORMS = {
    "responses": (
        to_chat,
        lambda: {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "ok"}]},
            ],
            "tools": [function("f"), function("g"), {"type": "custom", "name": "c", "format": {"type": "text"}}],
            "tool_choice": allowed("f"),
            "reasoning": {"effort": "low"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
        },
    ),
    "messages": (
        messages_to_chat,
        lambda: {
            "max_tokens": 5,
            "system": [{"type": "text", "text": "be"}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "ok"}]}
                    ],
                },
            ],
            "tools": [{"name": "f", "input_schema": {}}],
            "output_config": {"format": {"type": "json_schema", "schema": {}}},
        },
    ),
    "chat": (
        None,
        lambda: {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "hi"}]},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        },
    ),
}


def tables(value):
    """All objects and lists of a body but the choice of a tool, which no model reads."""
    if isinstance(value, dict):
        yield value
        for name, inner in value.items():
            if name != "tool_choice":
                yield from tables(inner)
    elif isinstance(value, list):
        yield value
        for inner in value:
            yield from tables(inner)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_wherever_json_is_put_that_is_sent_it_is_never_below_a_quarter_of_its_bytes(form, data):
    made, base = FORMS[form]
    body = base()
    places = list(tables(body))
    place = places[data.draw(st.integers(0, len(places) - 1))]
    value = data.draw(_JSON)
    size = len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())
    many = [value] * (6_000 // size + 1)
    if isinstance(place, list):
        place += many
    elif data.draw(st.booleans()):
        place |= {f"{'k' * 20}{at}": one for at, one in enumerate(many)}
    else:
        place[data.draw(_NAME)] = many
    try:
        chat = body if made is None else made(body)
    except ApiError:
        return
    count = count_prompt(chat) if made is None else count_native(chat, body)
    assert count.at_most >= len(json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()) / 4


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
            for value in HIDDEN.values():
                hidden = {"type": "function", "name": "g", "parameters": {"default": [value] * 3}}
                bodies.append({"input": "hi", "tools": [function("f"), hidden], "tool_choice": allowed("f")})
            for body in bodies:
                body["model"] = "native"
                count = call(server.url, "POST", "/v1/responses/input_tokens", body, key=made["secret"])[1]
                assert count["input_tokens"] >= 4_000
                status, refused = call(server.url, "POST", "/v1/responses", body, key=made["secret"])[:2]
                assert (status, refused["error"]["code"]) == (429, "insufficient_quota"), refused
            assert sent == []
            # Sound has no price there, in whatever form it comes.
            heard = {"type": "input_audio", "input_audio": {"data": "AAAA" * 400, "format": "wav"}}
            clip = {"type": "file", "file": {"file_data": "data:audio/wav;base64," + "AAAA" * 400}}
            thought = {"type": "reasoning", "summary": [], "content": [heard]}
            for path, name, value in (
                ("chat/completions", "messages", [{"role": "user", "content": [heard]}]),
                ("chat/completions", "messages", [{"role": "user", "content": [clip]}]),
                ("responses", "input", [{"role": "user", "content": [heard]}]),
                ("responses", "input", [USER, {"type": "function_call_output", "call_id": "c", "output": [heard]}]),
                ("responses", "input", [USER, thought]),
            ):
                body = {"model": "native", name: value}
                status, refused = call(server.url, "POST", f"/v1/{path}", body, key=made["secret"])[:2]
                assert (status, refused["error"]["code"]) == (400, "unpriced"), refused
            assert sent == []
            body = {"model": "native", "input": "hi"}
            assert call(server.url, "POST", "/v1/responses", body, key=made["secret"])[0] == 200
            assert len(sent) == 1


def test_fields_with_nothing_in_them_count_by_a_quarter_of_their_bytes():
    names = ("annotations", "logprobs", "title", "url", "data", "detail", "name", "filename")
    part = {"type": "input_text", "text": "a", **dict.fromkeys(names, "")}
    body = {"input": [{"type": "message", "role": "user", "content": [part] * 3_000}]}
    native, chat = counts(body)
    assert native.at_most >= chat.at_most + 3_000 * sum(len(f'"{name}":"",') for name in names) // 4
    assert native.tokens == chat.tokens
