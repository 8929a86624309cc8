"""JSON of whatever a client sent: always valid, and the same value when it is read again."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.web.json_text import to_json

TEXT = st.text(st.characters(exclude_categories=()))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("\ud800", b'"\\ud800"'),
        ("é\udfff\\", b'"\xc3\xa9\\udfff\\\\"'),
        ({"\udc80": ["\ud83d\ude00"]}, b'{"\\udc80": ["\\ud83d\\ude00"]}'),
        ([math.nan, math.inf, {"a": -math.inf}, 1.5], b'[null, null, {"a": null}, 1.5]'),
        ((math.nan, "\ud800"), b'[null, "\\ud800"]'),
        ({"a": {1}}, b'{"a": "{1}"}'),
    ],
)
def test_what_json_or_utf8_has_not(value, told):
    assert to_json(value) == told


@given(JSON, st.sampled_from([None, (",", ":")]))
def test_what_is_read_is_what_was_written(value, separators):
    told = to_json(value, separators)
    # Two halves that stand together are one character to whoever reads them.
    assert json.loads(told.decode()) == json.loads(json.dumps(value))
