"""Calls told apart from text, however it is cut; calls that are demanded."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data.tokenizer import ByteTokenizer
from anabranch.serving import chat
from anabranch.serving.chat import ArgumentsDelta, TextDelta, ToolCallRefused, ToolCallStarted, ToolParser
from counted_calls import counted_calls, grow_in_proportion
from grammar_walks import takes

NAMES = ("add", "get.time")
ADD = '{"name": "add", "arguments": {"a": 2}}'


def call_of(name, arguments):
    return [ToolCallStarted(name), ArgumentsDelta(arguments)]


CALL = call_of("add", '{"a": 2}')


def told(pieces, names=NAMES):
    """The events of a text in pieces, neighbours of one kind joined; and that nothing is told in empty pieces."""
    parser, events = ToolParser(names), []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.end():
        if not isinstance(event, ToolCallStarted):
            assert event.text
        if isinstance(event, TextDelta | ArgumentsDelta) and events and isinstance(events[-1], type(event)):
            events[-1] = type(event)(events[-1].text + event.text)
        else:
            events.append(event)
    return events


CASES = {
    "Hello, world.\n": [TextDelta("Hello, world.\n")],
    "": [],
    "  \n": [TextDelta("  \n")],
    "a < b and <b>bold</b> [TOOL] <tool": [TextDelta("a < b and <b>bold</b> [TOOL] <tool")],
    f"<tool_call>\n{ADD}\n</tool_call>": CALL,
    f"Let me see.\n<tool_call>{ADD}</tool_call>\n": [TextDelta("Let me see."), *CALL],
    f"<tool_call>{ADD}</tool_call>\n<tool_call>{ADD}</tool_call>": CALL + CALL,
    f"<tool_call>{ADD}</tool_call> Done.": [*CALL, TextDelta(" Done.")],
    f"<tool_call>{ADD}": CALL,  # the end of text instead of the closing tag
    f"<tool_call>{ADD}\n</tool": [*CALL, TextDelta("\n</tool")],
    '<tool_call>{"name": "add", "arguments": {"a": "}</tool_call>\\""}}</tool_call>': call_of(
        "add", '{"a": "}</tool_call>\\""}'
    ),
    '<tool_call>{"name": "get.time", "arguments": {}}</tool_call>': call_of("get.time", "{}"),
    '<tool_call>{"name": "add", "parameters": {"a": 2}}</tool_call>': CALL,
    '<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>': CALL,
    ADD: CALL,
    f"\n {ADD}\n": CALL,
    f"{ADD}; {ADD}": CALL + CALL,
    f"{ADD}\nand {ADD}": [*CALL, TextDelta(f"\nand {ADD}")],
    f"[{ADD}, {ADD}]": CALL + CALL,
    '{"type": "function", "name": "add", "parameters": {"a": 2}}': CALL,
    f"<|python_tag|>{ADD}": CALL,
    f"<|python_tag|>{ADD}; {ADD}": CALL + CALL,
    '<function=add>{"a": 2}</function>': CALL,
    '<function=add>{"a": 2}</function><function=get.time>{}</function>': CALL + call_of("get.time", "{}"),
    f"[TOOL_CALLS][{ADD}]": CALL,
    f"[TOOL_CALLS][{ADD}, {ADD}]": CALL + CALL,
    f"[TOOL_CALLS]{ADD}": CALL,
    "[1] says so": [TextDelta("[1] says so")],
    '{"name": "Ann", "age": 3}': [TextDelta('{"name": "Ann", "age": 3}')],
    '{"age": 3}': [TextDelta('{"age": 3}')],
    '{"name": "add", "arg': [TextDelta('{"name": "add", "arg')],
    f"So: {ADD}": [TextDelta(f"So: {ADD}")],  # a call without a marker only where nothing was said
    # Arguments are the model's own text: blanks, escapes, numbers and characters of any width stay as they are.
    '<tool_call>{"name": "add", "arguments": {"a":1e400 , "b": "\\u00e9\\ud83d\\ude00 é😀\\\\"}}</tool_call>': call_of(
        "add", '{"a":1e400 , "b": "\\u00e9\\ud83d\\ude00 é😀\\\\"}'
    ),
    # As text within the JSON their escapes are undone once; half a character stays an escape.
    '<tool_call>{"name": "add", "arguments": " {\\"a\\": \\"\\\\u00e9\\u00e9\\ud83d\\ude00 \\ud83d.\\\\n\\"}"}</tool_call>': call_of(
        "add", '{"a": "\\u00e9é😀 \\ud83d.\\n"}'
    ),
    # What comes before the name is held until that is known.
    '<tool_call>{"arguments": {"a": 2}, "name": "add"}</tool_call>': CALL,
    '<tool_call>{"arguments": "{\\"a\\": 2}", "name": "add"}</tool_call>': CALL,
    '[TOOL_CALLS][{"name": "add", "arguments": {"a": 2}, "id": "x[}1"}]': CALL,
    # What has begun is not taken back: arguments are told as they are, cut off or no JSON, and the rest of the call is dropped.
    '<tool_call>{"name": "add", "arguments": {"a"': call_of("add", '{"a"'),
    '<tool_call>{"name": "add", "arguments": "{\\"a\\\\': call_of("add", '{"a\\'),
    '<tool_call>{"name": "add", "arguments": "{\\"a\\u00e': call_of("add", '{"a'),
    '<tool_call>{"name": "add", "arguments": {"a": NaN,}}</tool_call>': call_of("add", '{"a": NaN,}'),
    '<tool_call>{"name": "add", "arguments": {"a": 2}</tool_call>': CALL,  # a bracket is missing
    '<tool_call>{"name": "add", "arguments": {"a": 2}, "more": {"x": "}"},}</tool_call>': CALL,
    f"[TOOL_CALLS][{ADD}, ": CALL,
    f"[TOOL_CALLS][{ADD},]": CALL,
    f"[{ADD},]": [*CALL, TextDelta(",]")],
    '<tool_call>{"name": "add", "arguments": {"a": 2} so</tool_call>': [
        *CALL,
        TextDelta("so</tool_call>"),
    ],
    f'[{ADD}, {{"age": 3}}]': [*CALL, TextDelta(', {"age": 3}]')],
    f'[{{"name": "rm", "arguments": {{}}}}, {ADD}]': [
        ToolCallRefused('[{"name": "rm", "arguments": {}}', "there is no tool 'rm'"),
        *CALL,
    ],
}


@pytest.mark.parametrize("text", CASES)
def test_whole_texts(text):
    assert told([text]) == CASES[text]


@pytest.mark.parametrize("text", CASES)
def test_character_by_character(text):
    assert told(list(text)) == CASES[text]


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 110), max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_cut_tells_the_same(text, cuts):
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    assert told([text[a:b] for a, b in itertools.pairwise(places)]) == CASES[text]


@given(st.text('<tol_cal>/{}[]" \nname:', max_size=60), st.integers(1, 7))
@settings(max_examples=300, deadline=None)
def test_any_text_tells_the_same_in_pieces_and_loses_nothing_but_blanks(text, size):
    events = told([text[at : at + size] for at in range(0, len(text), size)])
    assert events == told([text])
    kept = "".join(event.text for event in events if not isinstance(event, ToolCallStarted))
    assert "".join(kept.split()) == "".join(text.split())


PARTS = [
    "<tool_call>",
    "</tool_call>",
    "<function=add>",
    "<function=rm>",
    "</function>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[",
    "]",
    "{",
    "}",
    '"',
    "\\",
    '\\"',
    '"name": "add"',
    '"name": "rm"',
    '"arguments": ',
    '"parameters": ',
    '"arguments": "{',
    '"id": "x"',
    ", ",
    ": ",
    "; ",
    '{"a": 2}',
    "\\u00e9",
    "\\ud83d",
    "\\ude00",
    "é",
    "😀",
    " ",
    "\n",
    "so",
    ADD,
]


@given(st.lists(st.sampled_from(PARTS), max_size=14).map("".join), st.data())
@settings(max_examples=300, deadline=None)
def test_any_mixture_of_parts_tells_the_same_in_pieces(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    places = [0, *cuts, len(text)]
    whole = told([text])
    assert told([text[a:b] for a, b in itertools.pairwise(places)]) == whole
    assert told(list(text)) == whole
    if not any(isinstance(event, ToolCallStarted) for event in whole):
        kept = "".join(event.text for event in whole)
        assert "".join(kept.split()) == "".join(text.split())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FORMS = {
    "hermes": lambda name, text: f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>',
    "llama": lambda name, text: f"<function={name}>{text}</function>",
    "python tag": lambda name, text: f'<|python_tag|>{{"type": "function", "name": "{name}", "parameters": {text}}}',
    "mistral": lambda name, text: f'[TOOL_CALLS][{{"name": "{name}", "arguments": {text}, "id": "a1"}}]',
    "plain": lambda name, text: f'{{"name": "{name}", "arguments": {text}}}',
    "as text": lambda name, text: f'<tool_call>{{"name": "{name}", "arguments": {json.dumps(text)}}}</tool_call>',
    "name last": lambda name, text: f'<tool_call>{{"arguments": {text}, "name": "{name}"}}</tool_call>',
}


@given(
    st.sampled_from(sorted(FORMS)),
    st.dictionaries(st.text(), json_values, max_size=4),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_arguments_of_every_form_are_told_to_the_letter(form, arguments, is_ascii, indent, data):
    inner = json.dumps(arguments, ensure_ascii=is_ascii, indent=indent)
    text = FORMS[form]("add", inner)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    for pieces in ([text], [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]):
        assert told(pieces) == call_of("add", inner)


@pytest.mark.parametrize("form", FORMS)
def test_arguments_are_told_as_they_come(form):
    inner = json.dumps({"text": "word " * 30})
    text, parser = FORMS[form]("add", inner), ToolParser(NAMES)
    begin = text.index("word")
    assert (
        [ToolCallStarted("add")] == [event for event in parser.push(text[:begin]) if isinstance(event, ToolCallStarted)]
    ) == (form != "name last")
    pieces = [parser.push(character) for character in text[begin : begin + 100]]
    wanted = [[] if form == "name last" else [ArgumentsDelta(character)] for character in text[begin : begin + 100]]
    assert pieces == wanted


def test_a_call_that_is_cut_off_is_known():
    for text, is_cut in (
        (ADD, False),
        (ADD[:-1], False),
        (ADD[:-2], True),
        (FORMS["as text"]("add", "{}")[:-14], True),
        ("", False),
    ):
        parser = ToolParser(NAMES)
        parser.push(text)
        parser.end()
        assert parser.is_cut == is_cut, text


def test_text_is_not_held_back_longer_than_needed():
    parser = ToolParser(NAMES)
    assert parser.push("One moment") == [TextDelta("One moment")]
    assert parser.push(", a <") == [TextDelta(", a")]
    assert parser.push(" b") == [TextDelta(" < b")]
    assert parser.push(" <tool") == []
    assert parser.push("_call>") == []
    assert parser.push('{"name": "add", "arguments": ') == []
    assert parser.push('{"a"') == [ToolCallStarted("add"), ArgumentsDelta('{"a"')]
    assert parser.push(": 2}") == [ArgumentsDelta(": 2}")]
    assert parser.push("}</tool_call>") == []
    assert ToolParser(NAMES).push('{"answer') == [TextDelta('{"answer')]
    assert ToolParser(NAMES).push('{"name": "add", "age') == []
    assert ToolParser(NAMES).push('{"name": "add", "age":') == [TextDelta('{"name": "add", "age":')]


def test_long_arguments_are_work_in_proportion():
    # One push of all, as for an answer that is not streamed, and a push for each character: a quadratic reader takes minutes.
    def length_of(form, size, is_whole):
        inner = json.dumps({"text": 'a "b" \\ é' * size})
        text = FORMS[form]("add", inner)
        assert told_length([text] if is_whole else text) == len(inner)

    for form, is_whole in itertools.product(("hermes", "as text", "name last"), (True, False)):
        assert grow_in_proportion(
            lambda size, form=form, is_whole=is_whole: counted_calls(lambda: length_of(form, size, is_whole))[1], 100
        )
        length_of(form, 4000, is_whole)


def told_length(pieces):
    parser = ToolParser(NAMES)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.end()
    return sum(len(event.text) for event in events if isinstance(event, ArgumentsDelta))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "there is no tool 'rm'"),
        ('{"name": "rm", "arguments": {}}', "there is no tool 'rm'"),
        ('{"arguments": {}, "name": "rm"}', "there is no tool 'rm'"),
        ('<function=rm>{"a": 1}</function>', "there is no tool 'rm'"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "no JSON object with"),
        ('<tool_call>{"name": "add", "arguments": "[1]"}</tool_call>', "no JSON object with"),
        ('<tool_call>{"arguments": {"a": NaN}, "name": "add"}</tool_call>', "no JSON object with"),
        ('<tool_call>{"name": ["add"], "arguments": {}}</tool_call>', "no JSON object with"),
        ('<tool_call>{"name": "add"}</tool_call>', "no JSON object with"),
        ('<tool_call>{"name": "add", "x": "<tool_call>", "arguments": {}}</tool_call>', "no JSON object with"),
        ('<tool_call>{"arguments": {"a"', "cut off"),
    ],
)
def test_what_is_no_call_of_an_offered_tool_is_refused(text, reason):
    for pieces in ([text], list(text)):
        (event,) = told(pieces)
        assert isinstance(event, ToolCallRefused)
        assert reason in event.reason
        assert event.text == text


@pytest.mark.parametrize(
    "text", ["<tool_call>add(2)</tool_call>", "<|python_tag|>print(1)", "<function=a b>{}", "[TOOL_CALLS] 1"]
)
def test_a_marker_without_json_is_text_at_once(text):
    for pieces in ([text], list(text)):
        first, *more = told(pieces)
        assert isinstance(first, ToolCallRefused)
        assert first.text + "".join(event.text for event in more) == text


# -- calls that are demanded

BYTES = ByteTokenizer()

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


ANYTHING = st.recursive(
    st.none() | st.integers() | st.sampled_from(["function", "auto", "required", "f", "a b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "function", "name", "parameters"]), inner, max_size=4)
    ),
    max_leaves=8,
)


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_choices_make_grammars():
    assert chat.call_grammar(TOOLS, "auto") is None
    assert chat.call_grammar(TOOLS, "none") is None
    required = chat.call_grammar(TOOLS, "required")
    assert takes(required, call("add", a=1), BYTES)
    assert takes(required, call("now") + "\n" + call("add", a=-3), BYTES)
    assert not takes(required, call("add"), BYTES)
    assert not takes(required, call("rm"), BYTES)
    assert not takes(required, "", BYTES)
    one = chat.call_grammar(TOOLS, "required", is_parallel=False)
    assert takes(one, call("now"), BYTES)
    assert not takes(one, call("now") + "\n" + call("now"), BYTES)
    named = chat.call_grammar(TOOLS, {"type": "function", "function": {"name": "now"}})
    assert takes(named, call("now"), BYTES)
    assert not takes(named, call("add", a=1), BYTES)


def test_what_a_demanded_call_says_is_parsed():
    parser = chat.parser_for(TOOLS)
    text = call("now") + "\n" + call("add", a=-3)
    assert [*parser.push(text), *parser.end()] == [*call_of("now", "{}"), *call_of("add", '{"a": -3}')]


@pytest.mark.parametrize(
    ("tools", "choice", "param", "message"),
    [
        ([], "required", "tool_choice", "no tools"),
        (TOOLS, "any", "tool_choice", "tool_choice is 'any'"),
        (TOOLS, {"type": "function"}, "tool_choice", "tool_choice must be"),
        (
            TOOLS,
            {"type": "function", "function": {"name": "rm"}},
            "tool_choice.function.name",
            "tool_choice.function.name is 'rm'",
        ),
        ([*TOOLS, TOOLS[1]], "auto", "tools", "two functions of the name 'now'"),
        ([5], "none", "tools[0].type", "only functions can be offered"),
        (
            [TOOLS[0], {"type": "function", "function": {"name": "a\n"}}],
            None,
            "tools[1].function.name",
            "1 to 64 letters",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": 1}}],
            None,
            "tools[0].function.parameters",
            "a JSON schema",
        ),
    ],
)
def test_tools_and_choices_that_cannot_be_are_refused_by_the_field_they_are_in(tools, choice, param, message):
    with pytest.raises(chat.FieldError, match=message) as raised:
        chat.call_grammar(tools, choice)
    assert raised.value.param == param


def test_parameters_that_are_null_are_none():
    null = {"type": "function", "function": {"name": "now", "parameters": None}}
    assert chat.call_grammar([null], "required") == chat.call_grammar([TOOLS[1]], "required")
    assert "now" in chat.render(ByteTokenizer(), [{"role": "user", "content": "?"}], tools=[null])


@given(tools=ANYTHING, choice=ANYTHING)
@settings(max_examples=200, deadline=None)
def test_whatever_is_sent_is_read_or_refused_by_a_field(tools, choice):
    param, read = "tool", None
    try:
        read = chat.read_tools(tools if isinstance(tools, list) else [tools], choice)
    except chat.FieldError as error:
        param = error.param
    assert param.startswith("tool")
    assert read is None or read.choice in ("none", "auto", "required", "named")
