"""What a strategy tells a sender in headers changes nothing else of the answer."""

import itertools
import logging
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.strategy_headers import CHARACTERS, LOOKED_AT, MOST, OURS, strategy_headers

# What servers before the gateway, browsers, crawlers and clients act upon.
FOREIGN = (
    *(
        "X-Accel-Redirect",
        "x-accel-expires",
        "x-accel-limit-rate",
        "x-accel-charset",
        "x_accel_redirect",
        "x-accel_redirect",
    ),
    *(
        "X-Sendfile",
        "x-sendfile2",
        "x-sendfile-temporary",
        "x-lighttpd-send-file",
        "x-litespeed-location",
        "x-litespeed-purge",
    ),
    *(
        "x-envoy-overloaded",
        "x-envoy-ratelimited",
        "x-envoy-immediate-health-check-fail",
        "x-forwarded-for",
        "x-real-ip",
    ),
    *(
        "x-ratelimit-remaining-requests",
        "x-rate-limit-limit",
        "x-amzn-requestid",
        "x-appengine-blobkey",
        "x-middleware-rewrite",
    ),
    *(
        "x-robots-tag",
        "x-xss-protection",
        "x-dns-prefetch-control",
        "x-permitted-cross-domain-policies",
        "x-content-security-policy",
    ),
)


def test_its_own_go_out_in_small_letters():
    assert strategy_headers("s", {"X-IC-Arm": "m", "x-route-category": 3}) == {"x-ic-arm": "m", "x-route-category": "3"}
    assert strategy_headers("s", {"x-my_score": "1", "x-v1.score": "2"}) == {"x-my_score": "1", "x-v1.score": "2"}


@pytest.mark.parametrize(
    "name",
    ["content-length", "transfer-encoding", "content-type", "x-a\r\nset-cookie", "x a", "", 5, "x-", "x-ä", "x-" + "a" * 80,
     *sorted(OURS), *FOREIGN],
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


def test_of_one_name_in_large_and_small_letters_the_first_goes_out(caplog):
    with caplog.at_level(logging.WARNING):
        assert strategy_headers("s", {"X-A": "first", "x-a": "last", "x-b": "1"}) == {"x-a": "first", "x-b": "1"}
    assert "1 headers are left out" in caplog.text


class Endless(Mapping):
    """Names and no end of them."""

    def __init__(self, name):
        self.name, self.count = name, 0

    def __getitem__(self, key):
        return 1

    def __len__(self):
        return 1

    def __iter__(self):
        for at in itertools.count():
            self.count = at + 1
            yield f"{self.name}{at}"


@pytest.mark.parametrize("name", ["x-", "content-length-"])
def test_a_mapping_without_end_is_read_to_a_bound(name, caplog):
    endless = Endless(name)
    with caplog.at_level(logging.WARNING):
        found = strategy_headers("s", endless)
    assert len(found) == (MOST if name == "x-" else 0)
    assert endless.count == LOOKED_AT
    assert f"{LOOKED_AT - len(found)} headers are left out" in caplog.text
