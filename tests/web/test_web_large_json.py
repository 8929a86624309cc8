"""Large JSON in steps: the same as the json module's, to the byte, and the same mistakes."""

import copy
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.web import large_json
from anabranch.web.api_error import ApiError
from anabranch.web.body import MOST_DEPTH, parse
from anabranch.web.json_text import Rows, to_json
from anabranch.web.large_json import (
    LARGE,
    dump_large,
    is_light,
    json_slices,
    load_large,
    num_bytes,
    parse_large,
    shortened,
    utf8_pieces,
    weight_of,
)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """So that short texts are long, and steps end everywhere."""
    monkeypatch.setattr(large_json, "_LONG", 3)
    monkeypatch.setattr(large_json, "_STEP", 5)
    monkeypatch.setattr(large_json, "_GROUP", 7)
    monkeypatch.setattr(large_json, "SLICE", 130)


TEXT = st.text(max_size=60) | st.sampled_from(
    [
        '\\"' * 20,
        "\\" * 31,
        "\U0001f98a" * 20,
        "a\U0001f98ab" * 10,
        "\ud83d" * 9,
        "\ud83d\ude00" * 5,
        "x" * 50 + "\n" + "y" * 50,
        "\u2028é" * 9,
    ]
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
BODY = st.dictionaries(TEXT, VALUE, max_size=4)


@given(BODY, st.booleans(), st.sampled_from([None, 1]))
def test_what_is_read_is_what_was_written(body, is_ascii, indent):
    raw = json.dumps(body, ensure_ascii=is_ascii, indent=indent).encode("utf-8", "replace")
    assert parse_large(raw) == parse(raw)


@given(BODY)
def test_what_is_written_is_the_same_to_the_byte(body):
    assert dump_large(body) == json.dumps(body, separators=(",", ":")).encode()


ODD = st.sampled_from(
    [
        b"NaN",
        b"[1e999]",
        b'{"a": Infinity, "b": [1, 2, 3, 4, 5]}',
        b'{"a": [1,,2,3,4,5]}',
        b'{"a": [1,2',
        b"\xff",
        b"",
        b"5",
    ]
)


@given(
    st.binary(max_size=40)
    | ODD
    | BODY.map(lambda body: json.dumps(body).encode())
    | BODY.map(lambda body: b"\xef\xbb\xbf" + json.dumps(body).encode())
    | BODY.map(lambda body: json.dumps([body]).encode("utf-16"))
)
def test_any_json_is_read_as_the_json_module_reads_it(raw):
    def read(load):
        try:
            return repr(load(raw))
        except ValueError as error:
            return type(error), str(error)

    assert read(load_large) == read(json.loads)


@given(st.dictionaries(st.text(max_size=3) | st.integers(), VALUE | st.lists(st.floats()), max_size=4))
def test_any_object_is_written_as_the_json_module_writes_it(value):
    assert dump_large(value, allow_nan=True) == json.dumps(value, separators=(",", ":")).encode()


@given(TEXT)
def test_bytes_of_a_text_are_those_of_the_whole(text):
    whole = text.encode("utf-8", "surrogatepass")
    assert (b"".join(utf8_pieces(text)), num_bytes(text)) == (whole, len(whole))


def told(read, raw):
    """What it gives, or how it is refused."""
    try:
        return read(raw)
    except ApiError as error:
        return error.code, str(error)


@given(st.binary(max_size=80) | BODY.map(lambda body: json.dumps(body).encode()), st.data())
def test_mistakes_are_told_as_ever(raw, data):
    if raw:
        at = data.draw(st.integers(0, len(raw) - 1))
        raw = (
            raw[:at]
            + data.draw(st.sampled_from([b"", b'"', b"\\", b"\n", b"\xff", b"{", b"}", b"\x00", b"\\u12"]))
            + raw[at + 1 :]
        )
    assert told(parse_large, raw) == told(parse, raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": "' + b"x" * 40 + b"\n" + b'"}',
        b'{"a": "' + b"x" * 40,
        b'{"a": "' + b"x" * 40 + b'", }',
        b'{"a": "xxxxxxxx\xff"}',
        b'{"a": "xxxxxxxxx\\q"}',
        b'["' + b"x" * 40 + b'"]',
        b'"' + b"x" * 40 + b'"',
        b"[" * 5000 + b'"xxxxxxxx"' + b"]" * 5000,
    ],
)
def test_mistakes_beside_long_texts(raw):
    assert told(parse_large, raw) == told(parse, raw)


def test_what_is_nested_deep_is_read_as_ever():
    raw = b'{"a": ' + b"[" * (MOST_DEPTH + 50) + b'"a long text"' + b"]" * (MOST_DEPTH + 50) + b"}"
    assert parse_large(raw) == parse(raw)


@given(BODY, BODY)
def test_what_stands_for_a_body_is_as_equal_as_the_body(one, other):
    assert shortened(one) == shortened(copy.deepcopy(one))
    assert (shortened(one) == shortened(other)) == (one == other)


def test_what_stands_for_a_text_is_short():
    assert len(json.dumps(shortened({"a": "x" * 10**6}))) < 200


LISTS = st.lists(st.integers() | TEXT | st.lists(st.integers(), max_size=3), max_size=12)


@given(st.dictionaries(st.sampled_from(["messages", "prompt", "a,[", '"']), LISTS | VALUE), st.sampled_from([None, 1]))
def test_long_lists_are_read_some_items_at_a_time(body, indent):
    raw = json.dumps(body, indent=indent).encode()
    assert parse_large(raw) == parse(raw)


@pytest.mark.parametrize(
    "items", [b"1,,2,3", b"1,2,3,", b",1,2,3", b"1,2 3", b"1,]2,[3", b"1,NaN,3", b"1,1e999,3", b"1,2\xff,3"]
)
def test_mistakes_in_long_lists_are_told_as_ever(monkeypatch, items):
    raw = b'{"prompt": [' + items * 9 + b'], "a": 1}'
    for group in range(1, 12):
        monkeypatch.setattr(large_json, "_GROUP", group)
        assert told(parse_large, raw) == told(parse, raw)


def test_of_two_lists_of_one_name_the_last_counts_and_the_first_is_read():
    assert parse_large(b'{"a": [1, 2, 3, 4, 5], "a": [6, 7, 8, 9]}') == {"a": [6, 7, 8, 9]}
    raw = b'{"a": [1, 2, 3, x, 5], "a": [6, 7, 8, 9]}'
    assert told(parse_large, raw) == told(parse, raw)


@pytest.mark.parametrize(
    "text", ['\\"' * 40, "\\" * 41, "中文" * 30, "\U0001f98a" * 30, "\\\U0001f98a" * 20, "\ud83d" * 20]
)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_texts_full_of_escapes_are_read_in_steps(monkeypatch, text, is_ascii):
    """They were read at once, which held up everybody."""
    longest = []
    cut = large_json._cut

    def noted(raw, start, end):
        stop = cut(raw, start, end)
        longest.append(stop - start)
        return stop

    monkeypatch.setattr(large_json, "_cut", noted)
    raw = json.dumps({"a": text}, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    for step in range(1, 30):
        monkeypatch.setattr(large_json, "_STEP", step)
        longest.clear()
        assert told(parse_large, raw) == told(parse, raw)
        assert max(longest) <= step + 12


def test_a_value_weighs_about_what_its_json_has_and_is_weighed_no_further_than_it_must():
    short = {"model": "m", "messages": [{"role": "user", "content": "x" * 9_000}]}
    assert 9_000 < weight_of(short) < len(json.dumps(short)) * 1.1
    endless = []
    endless.append(endless)
    for large in ("x" * LARGE, [0] * LARGE, {"a": [["x" * 99] * 99] * 99}, {"x" * LARGE: 1}):
        assert weight_of({"value": large}) > LARGE
    assert weight_of(endless) > LARGE
    assert weight_of({}) == weight_of(None) < weight_of([None])


def with_rows(value):
    """The same value, its lists made while they are written."""
    if isinstance(value, dict):
        return {name: with_rows(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return Rows(lambda: (with_rows(inner) for inner in value))
    return value


@given(BODY | VALUE, st.booleans())
def test_slices_are_what_is_written_at_once(value, is_lazy):
    told = with_rows(value) if is_lazy else value
    assert b"".join(json_slices(told)) == to_json(told) == to_json(value)


def test_slices_of_what_json_has_not():
    value = {"a": [math.nan, 1.0] * 9, "b": {1: ("\ud800" * 99,) * 3, None: [{1}] * 9}}
    assert b"".join(json_slices(value)) == to_json(value)
    with pytest.raises(ValueError, match="Out of range"):
        dump_large(value)


def test_no_slice_is_long_and_no_more_rows_are_made_than_it_has(monkeypatch):
    """A thousand log probabilities, vectors or ids were made and written in one go, in which an event loop stood still."""
    monkeypatch.undo()
    made = []

    def rows():
        for row in range(1_000):
            made.append(row)
            yield {"token": "x", "top": {str(place): -0.5 for place in range(20)}}

    numbers, vectors, text = list(range(50_000)), [[0.5] * 4_000] * 6, "\u1234" * 200_000
    value = {"choices": [{"rows": Rows(rows), "text": text}], "tokens": numbers, "data": vectors}
    counts, sizes, whole = [], [], b""
    for piece in json_slices(value):
        counts.append(len(made))
        sizes.append(len(piece))
        whole += piece
    # A row has 22 values, and a slice about a thousand of them.
    assert max(later - before for before, later in zip([0, *counts], counts, strict=False)) <= 100
    assert max(sizes) <= 4 * large_json.SLICE
    assert json.loads(whole) == {**value, "choices": [{"rows": list(rows()), "text": text}]}
    assert is_light({"a": [1] * 900})
    assert not is_light({"a": [1] * 1_100})
    assert not is_light([Rows(list)])
