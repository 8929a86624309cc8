"""Where quotes and lists are, against what is found letter by letter."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.web.json_places import long_lists, unescaped_quotes

RAW = st.lists(st.sampled_from([b'"', b"\\", b"a", b",", b"[", b"]", b"{", b"}", b"\xc3\xa9"]), max_size=60).map(
    b"".join
)


@given(RAW, st.integers(1, 9))
def test_quotes_are_found_in_blocks_of_any_size(raw, block):
    expected, is_escaped = [], False
    for at, byte in enumerate(raw):
        if byte == ord('"') and not is_escaped:
            expected.append(at)
        is_escaped = byte == ord("\\") and not is_escaped
    assert unescaped_quotes(raw, block).tolist() == expected


ITEMS = st.lists(st.integers() | st.text('a,[]{}"\\') | st.lists(st.integers(), max_size=3), min_size=1, max_size=9)


@given(
    st.dictionaries(
        st.text('b,[]"\\', max_size=4), ITEMS | st.integers() | st.dictionaries(st.text(), ITEMS, max_size=2)
    ),
    st.integers(1, 9),
)
def test_lists_are_cut_into_their_items(body, block):
    raw = json.dumps(body).encode()
    found = []
    for start, end, commas in long_lists(raw, 0, block):
        cuts = [start, *commas.tolist(), end]
        found.append([json.loads(raw[one + 1 : other]) for one, other in itertools.pairwise(cuts)])
    assert found == [value for value in body.values() if isinstance(value, list)]


@given(RAW, st.integers(1, 9))
def test_what_is_no_json_has_lists_anywhere_or_none(raw, block):
    for start, end, commas in long_lists(raw, 0, block):
        assert 0 <= start < end < len(raw)
        assert all(start < comma < end for comma in commas.tolist())


@pytest.mark.parametrize("raw", [b"", b"{", b'{"a": ['])
def test_nothing_is_found_where_nothing_is(raw):
    assert long_lists(raw, 0) == []
