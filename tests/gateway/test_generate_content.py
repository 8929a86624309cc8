"""Conversations in the form of ``generateContent``: whose signature is whose, and what it costs to find it."""

import json
from collections import UserDict

import pytest

from anabranch.gateway.providers import generate_content
from anabranch.gateway.providers.gemini import Gemini
from anabranch.gateway.providers.thoughts import sealed
from anabranch.gateway.providers.upstream_request import UpstreamRequest

MODEL = "gemini-3-pro-preview"


def call_of(id):
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


def turn(id, signature, seal_of=None):
    """A call with its result, and a thought beside it that seals a call of some id, its own unless said otherwise."""
    block = {"type": "thinking", "thinking": "", "signature": sealed(f"c{seal_of or id}", signature)}
    said = {"role": "assistant", "content": None, "tool_calls": [call_of(id)], "thinking_blocks": [block]}
    return [said, {"role": "tool", "tool_call_id": id, "content": "r"}]


def signatures_sent(messages):
    provider = Gemini(Gemini.Config(model=MODEL, key_env=None))
    body = json.loads(provider.build(UpstreamRequest("chat", {"model": "m", "messages": messages})).body)
    parts = [part for content in body["contents"] for part in content["parts"]]
    return [part["thoughtSignature"] for part in parts if "functionCall" in part]


def test_a_message_goes_by_its_own_signatures_before_those_of_others():
    # Some servers number the calls of each turn from zero.
    messages = [*turn("call_0", "QQ=="), *turn("call_0", "Qg=="), *turn("call_0", "Qw==")]
    assert signatures_sent(messages) == ["QQ==", "Qg==", "Qw=="]


def test_a_message_without_one_of_its_own_goes_by_those_of_all():
    first, result = turn("a", "QQ==", seal_of="b")
    assert signatures_sent([first, result, *turn("b", "Qg==", seal_of="a")]) == ["Qg==", "QQ=="]


class Counted(UserDict):
    """A table that counts what is taken out of it."""

    touched = 0

    def __getitem__(self, name):
        Counted.touched += 1
        return super().__getitem__(name)

    def __iter__(self):
        for name in super().__iter__():
            Counted.touched += 1
            yield name

    def __or__(self, other):
        return {**self, **other}

    def copy(self):
        return {**self}


@pytest.mark.parametrize("num_turns", [1, 300])
def test_the_signatures_of_a_long_conversation_are_looked_up_and_not_copied_by_each_message(num_turns, monkeypatch):
    """Each message had a table of its own with all of them: the work grew with the square of the turns."""
    said = generate_content._said
    monkeypatch.setattr(
        generate_content,
        "_said",
        lambda given, kept, names, signed, model: said(given, kept, names, Counted(signed), model),
    )
    # What a table is made of is not counted, what is taken out of it is.
    monkeypatch.setattr(Counted, "__init__", lambda self, data: setattr(self, "data", data))
    monkeypatch.setattr(Counted, "touched", 0)
    messages = [
        one for at in range(num_turns) for one in turn(f"call_{at}", "QQ==", seal_of=f"call_{num_turns - 1 - at}")
    ]
    assert signatures_sent(messages) == ["QQ=="] * num_turns
    # One look for the call, and one for the text.
    assert Counted.touched <= 4 * num_turns
