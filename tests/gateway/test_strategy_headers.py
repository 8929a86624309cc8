"""What a strategy tells a sender in headers changes nothing else of the answer."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.strategy_headers import CHARACTERS, MOST, OURS, strategy_headers


def test_its_own_go_out_in_small_letters():
    assert strategy_headers("s", {"X-IC-Arm": "m", "x-route-category": 3}) == {"x-ic-arm": "m", "x-route-category": "3"}
    assert strategy_headers("s", {"x-my_score": "1", "x-v1.score": "2"}) == {"x-my_score": "1", "x-v1.score": "2"}


@pytest.mark.parametrize(
    "name",
    ["content-length", "transfer-encoding", "content-type", "x-a\r\nset-cookie", "x a", "", 5, "x-", "x-ä", "x-" + "a" * 80, *sorted(OURS)],
)  # fmt: skip
def test_others_are_left_out_and_its_own_stay(name, caplog):
    with caplog.at_level(logging.WARNING):
        assert strategy_headers("s", {name: "5", "x-a": "1"}) == {"x-a": "1"}
    assert "strategy s: 1 headers are left out" in caplog.text


@given(st.dictionaries(st.text() | st.integers(), st.text(), max_size=40))
def test_whatever_it_gives_is_bounded(given_headers):
    found = strategy_headers("s", {**given_headers, "x-big": "a" * 200_000, **{f"x-{at}": "" for at in range(100)}})
    assert len(found) <= MOST
    assert all(name.startswith("x-") and name not in OURS for name in found)
    assert sum(len(name) + len(value) for name, value in found.items()) <= CHARACTERS


def test_a_header_goes_out_whole_or_not_at_all_with_a_line(caplog):
    wanted = {"x-scores": "a" * 2000, "x-more": "b" * 2000, "x-id": "c" * 900}
    with caplog.at_level(logging.WARNING):
        assert strategy_headers("s", wanted) == {"x-scores": "a" * 2000, "x-id": "c" * 900}
    assert "strategy s: 1 headers are left out, and x-scores, x-id go out" in caplog.text


def test_one_that_fits_to_the_character_goes_out_without_a_line(caplog):
    wanted = {"x-a": "a" * (CHARACTERS - 3)}
    with caplog.at_level(logging.WARNING):
        assert strategy_headers("s", wanted) == wanted
        assert strategy_headers("s", {"x-a": wanted["x-a"] + "a"}) == {}
    assert "1 headers are left out, and none go out" in caplog.text
