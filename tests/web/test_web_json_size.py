"""What a JSON text would make is counted before it is parsed: as a plain walk of its letters counts it, in blocks of any size."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.web.api_error import ApiError
from anabranch.web.json_size import check_json_size


def counted(raw):
    """Values, parts and digits, letter by letter."""
    commas = parts = digits = 0
    is_inside = is_escaped = False
    for letter in raw.decode():
        if is_inside:
            is_inside = letter != '"' or is_escaped
            is_escaped = letter == "\\" and not is_escaped
        elif letter == '"':
            is_inside = True
        else:
            commas += letter == ","
            parts += letter in "[{:"
            digits += letter in "0123456789"
    return commas, parts, digits


def passes(raw, values, parts, block):
    try:
        check_json_size(raw, values, parts, block)
    except ApiError as error:
        refusal = error
    else:
        return True
    assert (refusal.status, refusal.code) == (400, "too_many_values")
    return False


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text('ab",\\[{:é\n'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('ab",\\[{:'), inner),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(value=JSON, block=st.integers(1, 40), ascii=st.booleans())
def test_as_a_walk_of_its_letters_counts_it(value, block, ascii):
    raw = json.dumps(value, ensure_ascii=ascii).encode()
    commas, parts, digits = counted(raw)
    enough = max(commas, -(-digits // 8))
    assert passes(raw, enough, parts, block)
    assert not parts or not passes(raw, enough, parts - 1, block)
    assert not enough or not passes(raw, enough - 1, parts, block)


@pytest.mark.parametrize(
    ("raw", "passes_with"),
    [
        (b"[1,2,3]", (2, 1)),
        (b'{"a":[],"b":{}}', (1, 5)),
        (b'["a,b,c","[[[{:"]', (1, 1)),
        (b'["\\",\\"",1]', (1, 1)),
        (b'["\\\\",1,2]', (2, 1)),
        (b"[123456789,1]", (2, 1)),
    ],
)
def test_a_few_by_hand(raw, passes_with):
    values, parts = passes_with
    assert passes(raw, values, parts, 4)
    assert not passes(raw, values - 1, parts, 4)
    assert not passes(raw, values, parts - 1, 4)


def test_a_long_text_is_one_value_whatever_is_in_it():
    raw = json.dumps({"prompt": 'a,[{:"\\1' * 100_000}).encode()
    assert passes(raw, 1, 2, 1 << 18)
