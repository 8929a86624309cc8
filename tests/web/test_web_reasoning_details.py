"""Details of what a model thought: put together from pieces, sealed, and read back as they were."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.web.reasoning_details import details_in, details_of, is_sealed, joined_details, sealed_blocks

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TEXT = {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0}


@given(st.lists(JSON, min_size=1, max_size=4))
def test_what_is_sealed_is_read_back_as_it_was(details):
    [block] = sealed_blocks(details, "so")
    assert (block["type"], block["thinking"], is_sealed(block["signature"])) == ("thinking", "so", True)
    # Through a client, which keeps what it does not know.
    again = json.loads(json.dumps(block))
    assert details_of([{"type": "text", "text": "x"}, again, again]) == details * 2


def test_a_thought_is_read_from_details_where_it_is_said_nowhere_else():
    details = [
        {**TEXT, "text": "Look "},
        {"type": "reasoning.encrypted", "data": "x"},
        7,
        {"type": "reasoning.summary", "summary": "it up"},
    ]
    [block] = sealed_blocks(details)
    assert block["thinking"] == "Look it up"


def test_text_that_nobody_signed_needs_no_seal():
    assert sealed_blocks([{**TEXT, "text": "a"}, {"type": "reasoning.text", "text": "b", "signature": None}]) == []
    assert sealed_blocks([]) == []
    assert len(sealed_blocks([{**TEXT, "text": "a"}, {**TEXT, "signature": "s"}])) == 1


@pytest.mark.parametrize(
    "blocks",
    [
        None,
        "details",
        [None],
        [{"type": "thinking", "thinking": "a"}],
        [{"type": "thinking", "signature": "EqQBCg"}],
        [{"type": "thinking", "signature": "details.%%%"}],
        [{"type": "thinking", "signature": "details.Wz"}],
        [{"type": "thinking", "signature": "details.e30="}],
        [{"type": "thinking", "signature": "details." + base64.b64encode(b"[" * 100_000).decode()}],
    ],
    ids=lambda blocks: repr(blocks)[:60],
)
def test_what_is_no_seal_of_ours_holds_nothing(blocks):
    assert details_of(blocks) == []


def test_pieces_of_a_stream_become_what_a_whole_answer_says():
    pieces = [
        {**TEXT, "text": "Look "},
        {**TEXT, "index": 1, "text": "Beside: "},
        {**TEXT, "text": "it up."},
        {**TEXT, "index": 1, "text": "why not"},
        {**TEXT, "text": None, "signature": "sig"},
        {"type": "reasoning.summary", "summary": "I ", "index": 2},
        {"type": "reasoning.summary", "summary": "looked", "index": 2},
        {"type": "reasoning.encrypted", "data": "aa", "id": "1", "index": 3},
        {"type": "reasoning.encrypted", "data": "bb", "id": "2", "index": 3},
        "odd",
    ]
    assert joined_details(pieces) == [
        {**TEXT, "text": "Look it up.", "signature": "sig"},
        {**TEXT, "index": 1, "text": "Beside: why not"},
        {"type": "reasoning.summary", "summary": "I looked", "index": 2},
        {"type": "reasoning.encrypted", "data": "aa", "id": "1", "index": 3},
        {"type": "reasoning.encrypted", "data": "bb", "id": "2", "index": 3},
        "odd",
    ]
    # What came is left as it was.
    assert pieces[0] == {**TEXT, "text": "Look "}


def test_without_numbers_pieces_go_on_with_the_one_before():
    one, other = ({"type": "reasoning.text", "text": text} for text in ("a", "b"))
    sealed = {"type": "reasoning.encrypted", "data": "x"}
    assert joined_details([one, other, sealed, one]) == [{"type": "reasoning.text", "text": "ab"}, sealed, one]


@given(st.lists(JSON, max_size=6))
def test_whatever_is_said_in_their_place_is_kept(pieces):
    # Nothing of another type grows.
    assert joined_details(pieces) == pieces


def test_where_there_are_none():
    assert details_in({}) == details_in({"reasoning_details": None}) == details_in({"reasoning_details": "x"}) == []
