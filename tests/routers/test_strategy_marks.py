"""Marks around what others wrote: a text between them holds neither, whatever it is made of."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.routers.strategies.marks import unmarked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (">>>", "> > >"),
        (">>>>>", "> > > > >"),
        ("a <<<< b", "a < < < < b"),
        ("x >> 2 << 3", "x >> 2 << 3"),
        ("<<>>", "<<>>"),
        ("<<<>>>", "< < <> > >"),
    ],
)
def test_angles_in_a_row_stand_apart(text, shown):
    assert unmarked(text) == shown


@given(st.text(alphabet="<> a\n"))
def test_no_mark_is_left_and_nothing_else_is_lost(text):
    shown = unmarked(text)
    assert "<<<" not in shown
    assert ">>>" not in shown
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text)
    assert unmarked(shown) == shown
