"""What a request says of adapters."""

import math

import pytest

from anabranch.errors import ConfigError, InputError
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.core.mixture import MOST_MIXED, check_mixture, equal
from anabranch.serving.core.request import Request


def of(adapters):
    return Request(id="r", prompt=(1,), adapters=adapters)


def test_every_form_becomes_pairs():
    assert of(None).adapters == of(()).adapters == of({}).adapters == ()
    assert of("a").adapters == (("a", 1.0),)
    assert of({"a": 0.7, "b": -0.3}).adapters == (("a", 0.7), ("b", -0.3))
    assert of([["a", 1], ("b", 2)]).adapters == (("a", 1), ("b", 2))
    for given in ("a", {"a.b_c-1": 1000}, [("a", 0)], None):
        of(given).check_fields()
    assert equal(["a", "b"]) == (("a", 0.5), ("b", 0.5))


@pytest.mark.parametrize(
    ("adapters", "what"),
    [
        (7, "adapters is 7"),
        ([7], "adapters has 7"),
        ([("a", 1, 2)], "pairs of a name and a weight"),
        ({"": 1}, "name of an adapter is ''"),
        ({"a+b": 1}, r"'a\+b'"),
        ({"a/b": 1}, "'a/b'"),
        ({"a\n": 1}, "name of an adapter"),
        ({"a" * 65: 1}, "1 to 64"),
        ({"-a": 1}, "begin with"),
        ({7: 1}, "name of an adapter is 7"),
        ({"a": math.nan}, "weight of adapter 'a' is nan"),
        ({"a": math.inf}, "-1000 to 1000"),
        ({"a": -1000.5}, "-1000 to 1000"),
        ({"a": True}, "must be a number"),
        ({"a": "1"}, "must be a number"),
        ({"a": None}, "must be a number"),
        ([("a", 1), ("a", 1)], "'a' is named twice"),
        ({f"a{number}": 1 for number in range(MOST_MIXED + 1)}, "at most 16"),
    ],
)
def test_what_cannot_be_is_refused(adapters, what):
    with pytest.raises(InputError, match=what):
        of(adapters).check_fields()


def test_as_many_as_may_be():
    check_mixture(equal([f"a{number}" for number in range(MOST_MIXED)]))


def test_what_is_there_from_the_start():
    assert AdaptersConfig(load=("a=x/y", "b=c=d")).folders == [("a", "x/y"), ("b", "c=d")]


@pytest.mark.parametrize(
    ("load", "what"),
    [
        (("a",), r"load\.0 is 'a'; it must be NAME=FOLDER"),
        (("a=x", "b="), r"load\.1 is 'b='"),
        (("=x",), "name of an adapter is ''"),
        (("a+b=x",), r"'a\+b'"),
        (("a=x", "a=y"), "'a' twice"),
        ((7,), r"load\.0 is 7"),
    ],
)
def test_entries_that_are_none(load, what):
    with pytest.raises(ConfigError, match=what):
        AdaptersConfig(load=load)
    with pytest.raises(ConfigError, match="memory"):
        AdaptersConfig(memory="much")
