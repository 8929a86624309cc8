"""Formats of calls: what is written in each is read back, however it is cut, and can be demanded; whatever comes, nothing raises."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import InputError
from anabranch.serving.chat import (
    FORMATS,
    ArgumentsDelta,
    Dialect,
    TextDelta,
    ToolCallRefused,
    ToolCallStarted,
    call_grammar,
)
from anabranch.serving.core.text import MARKS
from counted_calls import counted_calls, grow_in_proportion
from grammar_walks import takes

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "text": {"type": "string"},
                "on": {"type": "boolean"},
                "list": {"type": "array"},
                "map": {"type": "object"},
                "x": {"type": ["number", "null"]},
            },
            "required": ["a"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [ADD, NOW]


def told(format, pieces, tools=TOOLS):
    """The events of a text in pieces, neighbours of one kind joined."""
    parser, events = Dialect(tools=format).parser(tools), []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.end():
        assert isinstance(event, ToolCallStarted) or event.text
        if isinstance(event, TextDelta | ArgumentsDelta) and events and isinstance(events[-1], type(event)):
            events[-1] = type(event)(events[-1].text + event.text)
        else:
            events.append(event)
    return events, parser.is_cut


def calls_of(events):
    """[(name, arguments)], and nothing else among the events."""
    made = []
    for event in events:
        if isinstance(event, ToolCallStarted):
            made.append([event.name, ""])
        else:
            assert isinstance(event, ArgumentsDelta), events
            made[-1][1] += event.text
    return [(name, json.loads(arguments)) for name, arguments in made]


def cut(text, data):
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]


plain = st.text(st.characters(codec="utf-8", exclude_characters="<\x00"), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=6,
)
arguments = st.fixed_dictionaries(
    {"a": st.integers()},
    optional={
        "text": plain,
        "on": st.booleans(),
        "list": st.lists(values, max_size=3),
        "map": st.dictionaries(plain, values, max_size=3),
        "x": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    },
)
calls = st.lists(st.tuples(st.just("add"), arguments) | st.tuples(st.just("now"), st.just({})), min_size=1, max_size=3)


@pytest.mark.parametrize("format", FORMATS)
@given(made=calls, data=st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_however_it_is_cut(format, made, data):
    text = FORMATS[format].written([(name, json.dumps(values)) for name, values in made])
    for pieces in ([text], list(text), cut(text, data)):
        events, is_cut = told(format, pieces)
        assert calls_of(events) == made
        assert not is_cut


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"pythonic", "llama3", "harmony"}))
def test_text_before_calls_is_told(format):
    text = "Let me see.\n" + FORMATS[format].written([("add", '{"a": 1}')])
    events, _ = told(format, list(text))
    assert events[0] == TextDelta("Let me see.")
    assert calls_of(events[1:]) == [("add", {"a": 1})]


def test_harmony_tells_what_is_said_to_the_reader():
    text = (
        "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant to=functions.add<|channel|>commentary json<|message|>"
        '{"a": 1}<|call|><|start|>assistant<|channel|>commentary to=functions.rm<|message|>{}<|call|>'
        "<|start|>assistant<|channel|>final<|message|>It is <b>1</b>.<|return|>"
    )
    wanted = [
        TextDelta("Let me see."),
        ToolCallStarted("add"),
        ArgumentsDelta('{"a": 1}'),
        ToolCallRefused("{}", "there is no tool 'rm'"),
        TextDelta("It is <b>1</b>."),
    ]
    for pieces in ([text], list(text)):
        assert told("harmony", pieces) == (wanted, False)
    assert told("harmony", list("Plain text.")) == ([TextDelta("Plain text.")], False)
    # Its stop token is not part of the text.
    assert told("harmony", ['<|channel|>commentary to=functions.add<|message|>{"a": 1}'])[1] is False
    assert told("harmony", ['<|channel|>commentary to=functions.add<|message|>{"a": '])[1] is True


def test_harmony_reads_on_behind_reasoning_that_the_prompt_has_begun():
    """What the prompt began is dropped with the reasoning that it is of: what follows is said, also without a header of its own."""
    dialect = Dialect("harmony", "harmony")
    for begun, text, wanted in (
        ("<|channel|>analysis<|message|>", "So, so.<|end|>It is.", "It is."),
        (
            "<|channel|>analysis<|message|>",
            "So.<|end|><|start|>assistant<|channel|>final<|message|>It is.<|return|>",
            "It is.",
        ),
        ("<|channel|>final<|message|>", "It is.<|return|>", "It is."),
        ("", "<|channel|>analysis<|message|>So.<|end|>It is.", "It is."),
    ):
        reasoning = dialect.reasoning_after(f"<|start|>user<|message|>Is it?<|end|><|start|>assistant{begun}")
        splitter, parser = reasoning.splitter(), dialect.parser([], reasoning)
        parts = [part for letter in text for part in splitter.push(letter)] + splitter.end()
        said = [event for kind, part in parts if kind != "reasoning" for event in parser.push(part)] + parser.end()
        assert "".join(event.text for event in said) == wanted
    # A header goes on where the prompt has begun it.
    reasoning = dialect.reasoning_after("<|start|>assistant")
    parser = dialect.parser(TOOLS, reasoning)
    events = parser.push(' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>') + parser.end()
    assert calls_of(events) == [("add", {"a": 1})]


@pytest.mark.parametrize(
    ("format", "text", "wanted"),
    [
        (
            "qwen3_coder",
            "<tool_call><function=add><parameter=a>1</parameter><parameter=on>True</parameter></function></tool_call>",
            {"a": 1, "on": True},
        ),
        (
            "qwen3_coder",
            "<function=add><parameter=a>one</parameter><parameter=text>\n\n a\n\n</parameter></function>",
            {"a": "one", "text": "\n a\n"},
        ),
        (
            "qwen3_coder",
            "<tool_call><function=add><parameter=x>None</parameter><parameter=b>1</parameter></function>",
            {"x": None, "b": "1"},
        ),
        (
            "pythonic",
            "<|python_start|>[add(a=1, x=-2.5, list=(1, None), on=true)]<|python_end|>",
            {"a": 1, "x": -2.5, "list": [1, None], "on": True},
        ),
        ("pythonic", ' [ add ( text = "a]\\"b" ) ]', {"text": 'a]"b'}),
        ("pythonic", '<|python_start|>{"name": "add", "parameters": {"a": 2}}', {"a": 2}),
        (
            "deepseek_v3",
            '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>',
            {"a": 1},
        ),
        ("mistral_args", '[TOOL_CALLS]add[CALL_ID]abc[ARGS] {"a": 1}', {"a": 1}),
    ],
)
def test_other_ways_of_writing(format, text, wanted):
    for pieces in ([text], list(text)):
        assert calls_of(told(format, pieces)[0]) == [("add", wanted)]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("pythonic", "[1] says so"),
        ("pythonic", "[add(1)]"),
        ("pythonic", "[add(a=b)]"),
        ("pythonic", "[add(a=1e999)]"),
        ("pythonic", "[add(a=1"),
        ("pythonic", "[add(a={1: 2})]"),
        ("pythonic", "[add(a=0x" + "f" * 5000 + ")]"),
        ("pythonic", "[" * 999),
        ("pythonic", "[add(**x)]"),
        ("pythonic", "[add(a='\\d' '\\q' b''))]"),
        ("qwen3_coder", "<tool_call>add(1)</tool_call>"),
        ("qwen3_coder", "<function=rm><parameter=a>1</parameter></function>"),
        ("deepseek_v3", "<｜tool▁call▁begin｜>function"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>rm<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
        ("deepseek_v31", "<｜tool▁call▁begin｜>add<｜tool▁sep｜>[1]<｜tool▁call▁end｜>"),
        ("mistral_args", "[TOOL_CALLS]rm[ARGS]{}"),
        ("mistral_args", "[TOOL_CALLS]add"),
    ],
)
def test_what_is_no_call_is_content(format, text):
    whole = told(format, [text])[0]
    assert told(format, list(text))[0] == whole
    assert all(isinstance(event, TextDelta | ToolCallRefused) for event in whole)
    assert "".join("".join(event.text for event in whole).split()) == "".join(text.split())


HOSTILE = [
    *MARKS,
    "<function=",
    "<parameter=",
    "</parameter>",
    "</function>",
    "add",
    "now",
    "a",
    ">",
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    "=",
    '"',
    "'",
    "\\",
    "```json\n",
    "```",
    "\n",
    " ",
    '{"a": 1}',
    "[add(a=",
    "functions.add",
    "to=functions.add",
    "analysis",
    "final",
    "é😀",
    "function",
]


@pytest.mark.parametrize("format", FORMATS)
@given(parts=st.lists(st.sampled_from(HOSTILE), max_size=16), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_mixture_of_parts_tells_the_same_in_pieces(format, parts, data):
    text = "".join(parts)
    whole = told(format, [text])
    assert told(format, cut(text, data)) == whole
    assert told(format, list(text)) == whole


@pytest.mark.parametrize("format", FORMATS)
def test_long_answers_are_work_in_proportion(format):
    def texts(size):
        text = FORMATS[format].written([("add", json.dumps({"a": 1, "text": "a b é" * size}))])
        return [text], list(text), ["<" * 5 * size], list("[" * 5 * size)

    for number in range(4):
        assert grow_in_proportion(
            lambda size, number=number: counted_calls(lambda: told(format, texts(size)[number]))[1], 100
        )
    # What a function of C did for each piece would take minutes here.
    for pieces in texts(2000):
        told(format, pieces)


BYTES = ByteTokenizer()


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"pythonic"}))
def test_calls_that_are_demanded_are_read_back(format):
    dialect = Dialect(tools=format)
    form = call_grammar(TOOLS, "required", dialect=dialect)
    one = call_grammar(TOOLS, {"type": "function", "function": {"name": "add"}}, dialect=dialect)
    write = FORMATS[format].written
    add, now = ("add", '{"a": 1, "text": "b c"}'), ("now", "{}")
    assert takes(form, write([add]), BYTES)
    assert takes(form, write([now]), BYTES)
    assert takes(form, write([now, add]), BYTES) == (format != "harmony")
    assert takes(one, write([add]), BYTES)
    assert not takes(one, write([now]), BYTES)
    assert not takes(one, write([add, add]), BYTES)
    assert not takes(form, "Let me see.", BYTES)
    assert not takes(form, write([("add", '{"a": "one"}')]), BYTES)
    assert not takes(form, write([("rm", "{}")]), BYTES)


DEFS = {
    "unit": {"enum": ["hot", "cold"]},
    "few": {"type": "integer", "enum": [1, 2]},
    "pair": {"type": "array", "items": {"$ref": "#/$defs/few"}},
}
# What a parameter may be and may not be, by its schema.
VALUES = [
    ({"type": "string", "enum": ["hot", "cold"]}, ["hot", "cold"], ["warm", "ho"]),
    ({"const": "hot"}, ["hot"], ["cold"]),
    ({"enum": [1, 2]}, [1, 2], [3]),
    ({"$ref": "#/$defs/few"}, [1, 2], [3, True]),
    ({"$ref": "#/$defs/unit"}, ["hot"], ["warm"]),
    ({"$ref": "#/$defs/pair"}, [[1, 2], []], [[3], 1]),
    ({"allOf": [{"$ref": "#/$defs/unit"}]}, ["cold"], ["warm"]),
    ({"anyOf": [{"$ref": "#/$defs/unit"}, {"type": "null"}]}, ["cold", None], ["warm"]),
    ({"type": ["string", "null"]}, ["a", "b c"], []),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["a", None], []),
    ({"type": "string"}, ["hot", '"hot"', ""], []),
    ({"type": "boolean"}, [True], ["x"]),
    ({"type": "object"}, [{"a": [1]}], [1]),
    ({}, ["hot"], []),
    ({"enum": ["", "a"]}, ["", "a"], ["b"]),
]


def set_tool(schema):
    parameters = {"type": "object", "properties": {"value": schema}, "required": ["value"], "$defs": DEFS}
    return {"type": "function", "function": {"name": "set", "parameters": parameters}}


@pytest.mark.parametrize(("schema", "right", "wrong"), VALUES)
@pytest.mark.parametrize("format", ["hermes", "qwen3_coder"])
def test_a_value_that_is_demanded_is_one_that_is_read_back(format, schema, right, wrong):
    tools = [set_tool(schema)]
    form = call_grammar(tools, "required", dialect=Dialect(tools=format))
    for value in right:
        text = FORMATS[format].written([("set", json.dumps({"value": value}))])
        assert takes(form, text, BYTES), value
        assert calls_of(told(format, [text], tools)[0]) == [("set", {"value": value})]
    for value in wrong:
        assert not takes(form, FORMATS[format].written([("set", json.dumps({"value": value}))]), BYTES), value


@pytest.mark.parametrize("format", ["hermes", "llama3", "mistral_args", "qwen3_coder"])
def test_so_many_calls_are_demanded_and_no_more(format):
    form, write = call_grammar([NOW], "required", dialect=Dialect(tools=format)), FORMATS[format].written
    assert takes(form, write([("now", "{}")] * 16), BYTES)
    assert not takes(form, write([("now", "{}")] * 17), BYTES)
    one = call_grammar([NOW], "required", is_parallel=False, dialect=Dialect(tools=format))
    assert takes(one, write([("now", "{}")]), BYTES)
    assert not takes(one, write([("now", "{}")] * 2), BYTES)


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"pythonic", "qwen3_coder"}))
def test_arguments_that_are_demanded_are_an_object(format):
    """Also where the schema does not say so."""
    tool = {"type": "function", "function": {"name": "now", "parameters": {"properties": {"a": {"type": "integer"}}}}}
    form, write = call_grammar([tool], "required", dialect=Dialect(tools=format)), FORMATS[format].written
    assert takes(form, write([("now", '{"a": 1}')]), BYTES)
    for no_object in ("[]", "1", '"a"', "null"):
        assert not takes(form, write([("now", no_object)]), BYTES)


def test_a_list_of_python_calls_is_made_as_a_whole_or_told_as_text():
    text = "[add(a=1), rm(b=2), cp(c=3)]"
    for pieces in ([text], list(text)):
        assert told("pythonic", pieces)[0] == [ToolCallRefused(text, "there is no tool 'rm'")]


@pytest.mark.parametrize("begin", ["[add(a=1), now(), ", "["])
def test_a_list_of_python_calls_that_does_not_end_is_held_back_so_long(begin):
    """Whether it has begun to call, or may."""
    text = begin.ljust(100_000, "x")
    parser = Dialect(tools="pythonic").parser(TOOLS)
    assert parser.push(text) == []
    assert parser.push("x") == [TextDelta(text + "x")]
    # What comes then is told at once, whatever it is.
    assert parser.push("b") == [TextDelta("b")]


def test_calls_as_python_cannot_be_demanded():
    with pytest.raises(InputError, match="this model writes calls as pythonic does, which no grammar holds"):
        call_grammar(TOOLS, "required", dialect=Dialect(tools="pythonic"))


TEMPLATES = {
    "{{ tools }}<tool_call>{{ '</think>' }}": Dialect("think", "hermes"),
    "{{ tools }}<tool_call><function=f><parameter=p>": Dialect("", "qwen3_coder"),
    "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>```json": Dialect("", "deepseek_v3"),
    "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜><think>": Dialect("think", "deepseek_v31"),
    "{{ tools }}<|start|>assistant<|channel|>final<|message|>": Dialect("harmony", "harmony"),
    "{{ tools }}[TOOL_CALLS] [{": Dialect("", "mistral"),
    "{{ tools }}[TOOL_CALLS]f[ARGS]{}[THINK]": Dialect("magistral", "mistral_args"),
    "{{ tools }}[func_name1(params_name1=params_value1)]": Dialect("", "pythonic"),
    "{{ tools }}<|python_tag|>": Dialect("", "llama3"),
    "{{ messages }}<|python_tag|>": Dialect("", "hermes"),
    "{{ messages }}": Dialect("", "hermes"),
}


class Templated(ByteTokenizer):
    def __init__(self, template):
        self.chat_template = template


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_tells_the_dialect(template):
    assert Dialect.of(Templated(template)) == TEMPLATES[template]


def test_a_dialect_can_be_given():
    assert Dialect.of(Templated("<think>"), reasoning="none", tools="mistral") == Dialect("", "mistral")
    assert Dialect.of(Templated(None), reasoning="think") == Dialect("think", "hermes")
