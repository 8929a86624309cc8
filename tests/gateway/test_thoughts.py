"""Seals of thoughts: whose they are, so that none goes to a model that did not make it."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.providers.thoughts import is_claudes, of_call, of_google, of_picture, sealed, unsigned


def thinking(thought, signature=None):
    block = {"type": "thinking", "thinking": thought}
    return block if signature is None else {**block, "signature": signature}


WHATS = st.sampled_from(["h", "t"]) | st.text().map(of_call) | st.text().map(of_picture)
SIGNATURES = st.binary().map(lambda raw: base64.b64encode(raw).decode())


@given(st.text(), WHATS, SIGNATURES)
def test_a_seal_is_read_back_with_what_it_is_of(thought, what, signature):
    block = thinking(thought, sealed(what, signature))
    assert of_google([block]) == [(thought, what, signature)]
    assert not is_claudes(block)
    assert unsigned([block]) == ""


@given(SIGNATURES.filter(bool))
def test_a_signature_of_anthropics_is_none_of_googles(signature):
    block = thinking("so", signature)
    assert of_google([block]) == []
    assert is_claudes(block)


def test_thoughts_of_nobody_are_those_without_a_signature_in_their_order():
    blocks = [thinking("a"), thinking("b", "sig"), thinking("c", ""), {"type": "redacted_thinking", "data": "x"}]
    assert unsigned(blocks) == "ac"
    assert unsigned([{"type": "thinking", "thinking": None}]) == ""
    assert unsigned(None) == ""
    assert unsigned([]) == ""


def test_redacted_thoughts_are_anthropics_and_other_blocks_nobodys():
    assert is_claudes({"type": "redacted_thinking", "data": "x"})
    assert not is_claudes(thinking("a"))
    assert not is_claudes({"type": "text", "text": "a", "signature": "sig"})


@pytest.mark.parametrize("signature", ["google.x.abc", "google.h", "google..abc", "Google.h.abc", "google.t.a.b", 7])
def test_what_only_looks_like_a_seal_is_none(signature):
    assert of_google([thinking("a", signature)]) == []


def test_an_id_with_dots_or_lines_is_whole():
    what = of_call("call.1\n2")
    assert of_google([thinking("", sealed(what, "c2ln"))]) == [("", "ccall.1\n2", "c2ln")]


def test_pictures_are_told_apart_by_all_of_their_address():
    # A lone surrogate is no fault.
    urls = ["data:image/png;base64,AA", "data:image/png;base64,AB", "https://x/\ud800"]
    marks = [of_picture(url) for url in urls]
    assert len(set(marks)) == 3
    assert all(mark.startswith("i") and len(mark) == 33 for mark in marks)
    assert of_picture(urls[0]) == marks[0]
