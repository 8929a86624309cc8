"""What a strategy tells a sender in headers changes nothing else of the answer."""

import itertools
import logging
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.strategy_headers import CHARACTERS, LOOKED_AT, MOST, OTHERS, OURS, strategy_headers

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
        "x-reproxy-url",
        "x-reproxy-file",
        "x-archive-files",
        "x-cascade",
        "x-original-url",
        "x-ms-retry-after-ms",
        "x-retry-after",
    ),
)


def test_its_own_go_out_in_small_letters():
    assert strategy_headers("s", {"X-IC-Arm": "m", "x-route-category": 3}) == {"x-ic-arm": "m", "x-route-category": "3"}
    assert strategy_headers("s", {"x-my_score": "1", "x-v1.score": "2"}) == {"x-my_score": "1", "x-v1.score": "2"}


@pytest.mark.parametrize(
    "name",
    [
        "content-length",
        "transfer-encoding",
        "content-type",
        "x-a\r\nset-cookie",
        "x a",
        "",
        5,
        "x-",
        "x-ä",
        "x-" + "a" * 80,
        *sorted(OURS),
        *FOREIGN,
    ],
)
def test_others_are_left_out_and_its_own_stay(name, caplog):
    with caplog.at_level(logging.WARNING):
        assert strategy_headers("s", {name: "5", "x-a": "1"}) == {"x-a": "1"}
    assert "strategy s: 1 headers are left out (" in caplog.text


@pytest.mark.parametrize("name", sorted(OURS | OTHERS))
def test_none_is_taken_with_another_stroke(name):
    """To some servers `_` is as `-`."""
    for at, sign in enumerate(name):
        if sign == "-" and at > 1:
            assert strategy_headers("s", {f"{name[:at]}_{name[at + 1 :]}": "1"}) == {}


@pytest.mark.parametrize(
    "name",
    [
        "x-original-model",
        "x-original-score",
        "x-content-category",
        "x-ms-saved",
        "x-cloud-or-local",
        "x-cache-age",
        "x-cached-at",
        "x-retry-advice",
        "x-frame-count",
        "x-download-size",
        "x-ua-guess",
        "x-ratelimited-models",
        "x-rewrite-of-prompt",
        "x-route-cost",
    ],
)
def test_what_nobody_acts_upon_goes_out(name, caplog):
    assert strategy_headers("s", {name: "1"}) == {name: "1"}
    assert not caplog.text


def test_the_log_names_what_is_left_out(caplog):
    strategy_headers("s", {"X-Reproxy-URL": "http://a", "x-b\n": "1", 5: "1", "x-a": "1", "y" * 999: "1"})
    wanted = f"4 headers are left out ('X-Reproxy-URL', 'x-b\\n', a int, '{'y' * 64}'), and x-a go out"
    assert wanted in caplog.text
    assert "http://a" not in caplog.text


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
    assert "strategy s: 1 headers are left out ('x-more'), and x-scores, x-id go out" in caplog.text


def test_one_that_fits_to_the_character_goes_out_without_a_line(caplog):
    wanted = {"x-a": "a" * (CHARACTERS - 3)}
    with caplog.at_level(logging.WARNING):
        assert strategy_headers("s", wanted) == wanted
        assert strategy_headers("s", {"x-a": wanted["x-a"] + "a"}) == {}
    assert "1 headers are left out ('x-a'), and none go out" in caplog.text


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
