"""Calls told apart from text, however it is cut; calls that are demanded."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import InputError
from anabranch.serving import chat, grammar
from anabranch.serving.chat import Called, Refused, Said, ToolParser

NAMES = ("add", "get.time")
ADD = '{"name": "add", "arguments": {"a": 2}}'
CALL = Called("add", '{"a": 2}')


def told(pieces, names=NAMES):
    """The events of a text in pieces, neighbouring texts joined."""
    parser, events = ToolParser(names), []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.end():
        if isinstance(event, Said) and events and isinstance(events[-1], Said):
            events[-1] = Said(events[-1].text + event.text)
        else:
            events.append(event)
    return events


CASES = {
    "Hello, world.\n": [Said("Hello, world.\n")],
    "": [],
    "  \n": [Said("  \n")],
    "a < b and <b>bold</b> [TOOL] <tool": [Said("a < b and <b>bold</b> [TOOL] <tool")],
    f"<tool_call>\n{ADD}\n</tool_call>": [CALL],
    f"Let me see.\n<tool_call>{ADD}</tool_call>\n": [Said("Let me see."), CALL],
    f"<tool_call>{ADD}</tool_call>\n<tool_call>{ADD}</tool_call>": [CALL, CALL],
    f"<tool_call>{ADD}</tool_call> Done.": [CALL, Said(" Done.")],
    f"<tool_call>{ADD}": [CALL],  # the end of text instead of the closing tag
    f"<tool_call>{ADD}\n</tool": [CALL, Said("\n</tool")],
    '<tool_call>{"name": "add", "arguments": {"a": "}</tool_call>\\""}}</tool_call>': [Called("add", '{"a": "}</tool_call>\\""}')],
    '<tool_call>{"name": "get.time", "arguments": {}}</tool_call>': [Called("get.time", "{}")],
    '<tool_call>{"name": "add", "parameters": {"a": 2}}</tool_call>': [CALL],
    '<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>': [CALL],
    ADD: [CALL],
    f"\n {ADD}\n": [CALL],
    f"{ADD}; {ADD}": [CALL, CALL],
    f"{ADD}\nand {ADD}": [CALL, Said(f"\nand {ADD}")],
    f"[{ADD}, {ADD}]": [CALL, CALL],
    '{"type": "function", "name": "add", "parameters": {"a": 2}}': [CALL],
    f"<|python_tag|>{ADD}": [CALL],
    '<function=add>{"a": 2}</function>': [CALL],
    f"[TOOL_CALLS][{ADD}]": [CALL],
    "[1] says so": [Said("[1] says so")],
    '{"name": "Ann", "age": 3}': [Said('{"name": "Ann", "age": 3}')],
    '{"age": 3}': [Said('{"age": 3}')],
    '{"name": "add", "arg': [Said('{"name": "add", "arg')],
    f"So: {ADD}": [Said(f"So: {ADD}")],  # a call without a marker only where nothing was said
}  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_whole_texts(text):
    assert told([text]) == CASES[text]


@pytest.mark.parametrize("text", CASES)
def test_character_by_character(text):
    assert told(list(text)) == CASES[text]


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 80), max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_cut_tells_the_same(text, cuts):
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    assert told([text[a:b] for a, b in itertools.pairwise(places)]) == CASES[text]


@given(st.text('<tol_cal>/{}[]" \nname:', max_size=60), st.integers(1, 7))
@settings(max_examples=300, deadline=None)
def test_any_text_tells_the_same_in_pieces_and_loses_nothing_but_blanks(text, size):
    events = told([text[at : at + size] for at in range(0, len(text), size)])
    assert events == told([text])
    kept = "".join(event.text for event in events if not isinstance(event, Called))
    assert "".join(kept.split()) == "".join(text.split())


def test_text_is_not_held_back_longer_than_needed():
    parser = ToolParser(NAMES)
    assert parser.push("One moment") == [Said("One moment")]
    assert parser.push(", a <") == [Said(", a")]
    assert parser.push(" b") == [Said(" < b")]
    assert parser.push(" <tool") == []
    assert parser.push("_call>") == []
    assert parser.push(ADD) == []
    assert parser.push("</tool_call>") == [CALL]
    assert ToolParser(NAMES).push('{"answer') == [Said('{"answer')]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "there is no tool 'rm'"),
        ('{"name": "rm", "arguments": {}}', "there is no tool 'rm'"),
        ('<function=rm>{"a": 1}</function>', "there is no tool 'rm'"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "no JSON object with"),
        ('<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', "no JSON object with"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1,}}</tool_call>', "no JSON object with"),
        ('<tool_call>{"name": "add"}</tool_call>', "no JSON object with"),
        ("<tool_call>add(2)</tool_call>", "no JSON object"),
        ('<tool_call>{"name": "add", "arguments": {"a"', "cut off"),
        ("<|python_tag|>print(1)", "cut off"),
    ],
)
def test_what_is_no_call_of_an_offered_tool_is_refused(text, reason):
    for pieces in ([text], list(text)):
        (event,) = told(pieces)
        assert isinstance(event, Refused)
        assert reason in event.reason
        assert event.text.removesuffix("</tool_call>") in text


# -- calls that are demanded

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/n"}},
                "required": ["a"],
                "$defs": {"n": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def takes(form, text):
    compiled = grammar.compile(form, ByteTokenizer())
    state = compiled.start()
    for byte in text.encode():
        state = compiled.advance(state, byte)
        if state is None:
            return False
    return compiled.is_final(state)


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_choices_make_grammars():
    assert chat.call_grammar(TOOLS, "auto") is None
    assert chat.call_grammar(TOOLS, "none") is None
    required = chat.call_grammar(TOOLS, "required")
    assert takes(required, call("add", a=1))
    assert takes(required, call("now") + "\n" + call("add", a=-3))
    assert not takes(required, call("add"))
    assert not takes(required, call("rm"))
    assert not takes(required, "")
    one = chat.call_grammar(TOOLS, "required", is_parallel=False)
    assert takes(one, call("now"))
    assert not takes(one, call("now") + "\n" + call("now"))
    named = chat.call_grammar(TOOLS, {"type": "function", "function": {"name": "now"}})
    assert takes(named, call("now"))
    assert not takes(named, call("add", a=1))


def test_what_a_demanded_call_says_is_parsed():
    parser = chat.parser_for(TOOLS)
    text = call("now") + "\n" + call("add", a=-3)
    assert [*parser.push(text), *parser.end()] == [Called("now", "{}"), Called("add", '{"a": -3}')]


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "required", "no tools"),
        (TOOLS, "any", "tool_choice is 'any'"),
        (TOOLS, {"type": "function", "function": {"name": "rm"}}, "tool_choice names 'rm'"),
    ],
)
def test_choices_that_cannot_be_are_refused(tools, choice, message):
    with pytest.raises(InputError, match=message):
        chat.call_grammar(tools, choice)
