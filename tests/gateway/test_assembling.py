"""A whole answer of the chunks of a stream: the same as piece by piece, and the chunks stay as they were."""

import copy
import json

from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.providers.assembling import assembled
from anabranch.web.beside import joined

TEXTS = ("content", "reasoning_content", "reasoning", "refusal")


def place(item, default):
    at = item.get("index", default)
    return at if type(at) is int and 0 <= at < 1024 else min(default, 1023)


def naive(chunks, endpoint):
    """Each piece is put behind what there is of it, which is copied each time."""
    body, choices = {}, {}
    for chunk in chunks:
        body |= {
            name: value
            for name, value in chunk.items()
            if name != "choices" and (value is not None or name not in body)
        }
        for choice in chunk["choices"]:
            at = place(choice, 0)
            whole = choices.setdefault(at, {"index": at, "finish_reason": None})
            if choice.get("finish_reason"):
                whole["finish_reason"] = choice["finish_reason"]
            for name, value in (choice.get("logprobs") or {}).items():
                kept = whole.setdefault("logprobs", {})
                before = kept.get(name)
                kept[name] = (
                    [*(before if isinstance(before, list) else []), *value] if isinstance(value, list) else value
                )
            if isinstance(choice.get("logprobs"), dict):
                whole.setdefault("logprobs", {})
            if endpoint != "chat":
                text = choice.get("text")
                whole["text"] = whole.get("text", "") + (text if isinstance(text, str) else "")
                continue
            message = whole.setdefault("message", {"role": "assistant", "content": None})
            for name, value in (choice.get("delta") or {}).items():
                old = message.get(name)
                if name == "tool_calls":
                    if isinstance(value, list):
                        calls(message.setdefault("tool_calls", []), value)
                elif name in TEXTS and isinstance(value, str):
                    message[name] = (old if isinstance(old, str) else "") + value
                elif isinstance(value, list) and isinstance(old, list):
                    message[name] = [*old, *value]
                elif isinstance(value, dict) and isinstance(old, dict):
                    message[name] = joined(old, value)
                elif value is not None:
                    message[name] = value
    body["object"] = "chat.completion" if endpoint == "chat" else "text_completion"
    body["choices"] = [choices[at] for at in sorted(choices)]
    return body


def calls(held, pieces):
    for piece in (one for one in pieces if isinstance(one, dict)):
        at = place(piece, len(held))
        while len(held) <= at:
            held.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        call = held[at]
        call["id"] = piece.get("id") or call["id"]
        call |= {name: value for name, value in piece.items() if name not in ("index", "id", "type", "function")}
        for name, value in (piece.get("function") or {}).items():
            if isinstance(value, str):
                call["function"][name] = call["function"].get(name, "") + value


SHORT = st.text("ab", max_size=2)
TABLES = st.dictionaries(
    st.sampled_from(["data", "x"]),
    st.one_of(SHORT, st.lists(st.integers(0, 2), max_size=2), st.integers(0, 3)),
    max_size=2,
)
VALUES = st.one_of(st.none(), SHORT, st.lists(st.integers(0, 3), max_size=2), TABLES, st.integers(0, 2))
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "index": st.integers(-1, 2),
        "id": st.one_of(st.none(), SHORT),
        "x": st.integers(0, 2),
        "function": st.dictionaries(
            st.sampled_from(["name", "arguments", "z"]), st.one_of(SHORT, st.integers(0, 1)), max_size=2
        ),
    },
)
DELTAS = st.dictionaries(
    st.sampled_from(["role", "content", "reasoning_content", "refusal", "audio", "foo"]), VALUES, max_size=3
)
LOGPROBS = st.dictionaries(
    st.sampled_from(["content", "tokens"]), st.one_of(st.none(), st.lists(st.integers(0, 3), max_size=2)), max_size=2
)
WITH_CALLS = st.tuples(DELTAS, st.lists(CALLS, max_size=3)).map(lambda both: {**both[0], "tool_calls": both[1]})
CHOICES = st.fixed_dictionaries(
    {"index": st.integers(0, 1)},
    optional={
        "delta": st.one_of(st.none(), WITH_CALLS, DELTAS),
        "finish_reason": st.sampled_from([None, "stop", "length"]),
        "text": VALUES,
        "logprobs": st.one_of(st.none(), LOGPROBS),
    },
)
CHUNKS = st.lists(
    st.fixed_dictionaries({"choices": st.lists(CHOICES, max_size=2)}, optional={"id": SHORT, "usage": VALUES}),
    max_size=6,
)


@given(CHUNKS, st.sampled_from(["chat", "completions"]))
def test_it_is_what_comes_of_it_piece_by_piece(chunks, endpoint):
    before = copy.deepcopy(chunks)
    # The order of the names too: clients see it.
    assert json.dumps(assembled(chunks, endpoint)) == json.dumps(naive(copy.deepcopy(chunks), endpoint))
    assert chunks == before


def test_no_piece_is_copied_once_for_each_that_comes_behind_it(monkeypatch):
    """Sound of 512 pieces was copied 512 times."""
    sizes = []

    def noted(one, other):
        found = joined(one, other)
        sizes.append(len(found["data"]))
        return found

    monkeypatch.setattr("anabranch.gateway.providers.assembling.joined", noted)
    made = assembled({"choices": [{"index": 0, "delta": {"audio": {"data": "abc"}}}]} for _ in range(512))
    assert made["choices"][0]["message"]["audio"]["data"] == "abc" * 512
    # Nine times all of it: each piece once for each time that the number is halved.
    assert sum(sizes) == 9 * 3 * 512


def test_pieces_go_behind_one_another_and_what_was_said_once_stays():
    deltas = [
        {
            "audio": {"id": "x", "data": "ab"},
            "note": {"a": "b"},
            "tool_calls": [{"index": 0, "id": "c", "function": {"name": "f"}}],
        },
        {"audio": {"data": "cd"}, "note": "text", "tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        {"audio": {"data": "ef"}, "list": [1]},
        {"list": [2]},
    ]
    kept = copy.deepcopy(deltas)
    [choice] = assembled([{"choices": [{"index": 0, "delta": delta}]} for delta in deltas])["choices"]
    assert choice["message"]["audio"] == {"id": "x", "data": "abcdef"}
    assert (choice["message"]["note"], choice["message"]["list"]) == ("text", [1, 2])
    [call] = choice["message"]["tool_calls"]
    assert (call["id"], call["function"]) == ("c", {"name": "f", "arguments": "{}"})
    assert deltas == kept
