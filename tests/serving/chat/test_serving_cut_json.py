"""JSON objects that end in the middle."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.serving.chat.cut_json import read_cut_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-9, 9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"a": [1, {"b": "x', {"a": [1, {"b": "x"}]}),
        ("{", {}),
        ('{"a', {}),
        ('{"a"', {}),
        ('{"a":', {}),
        ('{"a": 1', {"a": 1}),
        ('{"a": 1, ', {"a": 1}),
        ('{"a": 1, "b": tr', {"a": 1}),
        ('{"a": "x\\', {"a": "x"}),
        ('{"a": "\\u12', {"a": ""}),
        ('{"a": "\\\\u12', {"a": "\\u12"}),
        ('{"a": "}{[],', {"a": "}{[],"}),
        ('{"a": {"b": [', {"a": {"b": []}}),
        ("", None),
        ("[1", None),
        ("5", None),
        ('"a', None),
        ("hello", None),
        ('{"a": 1]', None),
        ('{"a": 1}}', None),
        ("{]", None),
        ("{{", None),
        ('{"a" 1, 2', None),
        ("{" + " " * 2**20, None),
    ],
)
def test_what_is_there_is_read(text, wanted):
    assert read_cut_object(text) == wanted


@given(OBJECTS, st.booleans(), st.data())
@settings(max_examples=200, deadline=None)
def test_every_beginning_of_an_object_is_read_and_says_no_more_than_it(value, is_ascii, data):
    text = json.dumps(value, ensure_ascii=is_ascii)
    length = data.draw(st.integers(1, len(text) - 1))
    made = read_cut_object(text[:length])
    assert made is not None
    _is_within(made, value)


def _beginnings(number):
    """The numbers that the beginnings of its text are."""
    text = json.dumps(number)
    for end in range(1, len(text) + 1):
        with contextlib.suppress(ValueError):
            yield json.loads(text[:end])


def _is_within(made, value):
    """All that was made is of the value, but for the last text, which may be shorter, and the last number."""
    if isinstance(value, dict):
        assert list(made) == list(value)[: len(made)]
        pairs = [(made[name], value[name]) for name in made]
    elif isinstance(value, list):
        assert len(made) <= len(value)
        pairs = list(zip(made, value, strict=False))
    elif isinstance(value, str):
        # Half a pair of surrogates is one character as JSON writes it.
        assert value.encode("utf-16", "surrogatepass").startswith(made.encode("utf-16", "surrogatepass"))
        return
    else:
        assert made == value or made in _beginnings(value)
        return
    assert [made for made, value in pairs[:-1]] == [value for made, value in pairs[:-1]]
    for pair in pairs[-1:]:
        _is_within(*pair)
