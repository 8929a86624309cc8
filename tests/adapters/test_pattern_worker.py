"""What the process answers that compares names with patterns, asked directly."""

import json

import pytest

from anabranch.adapters.pattern_worker import LIMITS, answer


def asked(patterns, names):
    return answer(json.dumps({"patterns": patterns, "names": names}).encode())


def test_places_of_the_names_that_each_pattern_fits_whole():
    names = ["layers.1.q", "layers.11.q", "layers.1.q.x"]
    assert asked([r"layers\.\d\.q", ".*", "q"], names) == {"answer": [[0], [0, 1, 2], []]}
    assert asked([], names) == {"answer": []}
    assert asked(["a"], []) == {"answer": [[]]}


@pytest.mark.parametrize(
    "pattern", ["(", "*", "[z-a]", "(?P<a>x)(?P<a>y)", "a{99999999999999999999}", "(" * 5000 + ")" * 5000]
)
def test_what_is_no_expression_is_told_and_not_raised(pattern):
    said = asked(["fine", pattern], ["fine"])["error"]
    assert "is no regular expression" in said
    assert len(said) <= 400


def test_a_second_and_little_memory():
    assert (LIMITS.seconds, LIMITS.memory) == (1.0, 1 << 30)
