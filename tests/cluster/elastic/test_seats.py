"""Who may be a rank, under which name, and what votes add up to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.elastic.seats import Seat, counted, named, refusal
from anabranch.cluster.elastic.tree import TreeSum
from anabranch.errors import InputError

SIGNATURE = {
    "sizes": [6, 0, 4],
    "layers": ["A 1", "B 2", "C 3"],
    "global_batch": 8,
    "micro_batches": 0,
    "block": 1,
    "copies": 1,
    "seed": 5,
}
HELLO = {
    "kind": "hello",
    "host": "127.0.0.1",
    "port": 4711,
    "weights": "ab",
    "moments": "",
    "version": 0,
    "mesh": None,
    "signature": SIGNATURE,
}


def hello(**changes):
    own = {**HELLO, **{name: value for name, value in changes.items() if name in HELLO}}
    return {**own, "signature": {**SIGNATURE, **{name: value for name, value in changes.items() if name not in HELLO}}}


def test_one_like_the_others_may_take_part():
    assert refusal(HELLO, None, (2, 2)) is None
    assert refusal(HELLO, SIGNATURE, (2, 2)) is None
    assert refusal(hello(mesh=[2, 2]), SIGNATURE, (2, 2)) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 6}, "its seed is 6, and those here have 5"),
        ({"layers": ["A 1", "X 9", "C 3"]}, "its layers differ at 1: X 9, and those here have B 2"),
        ({"more": 1}, "its more is 1, and those here have None"),
        ({"mesh": [2, 1]}, "it is for 2 replicas of 1 stages, and the coordinator has 2 of 2"),
    ],
)
def test_one_that_differs_is_told_in_what(changes, said):
    assert refusal(hello(**changes), SIGNATURE, (2, 2)) == said


def test_a_setting_that_it_does_not_tell_differs():
    told = {**HELLO, "signature": {name: value for name, value in SIGNATURE.items() if name != "seed"}}
    assert refusal(told, SIGNATURE, (2, 2)) == "its seed is None, and those here have 5"


def test_more_stages_than_layers_are_refused():
    assert "there are 4 stages, and its model has 3 layers" in refusal(HELLO, None, (1, 4))


# By name, what each cannot be.
WRONG = {
    **dict.fromkeys(("host", "weights", "moments"), (None, [], -1, True)),
    **dict.fromkeys(("port", "version", "copies", "micro_batches"), (None, [], -1, "7", True)),
    **dict.fromkeys(("global_batch", "block"), (None, [], 0, "7", True)),
    "sizes": (None, "7", -1, [-1], ["7"], [None], True),
    "mesh": ("7", 3, [], [1, 2, 3]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_hello_of_which_something_is_missing_or_makes_no_sense_is_refused(name):
    for wrong in WRONG[name]:
        told = hello(**{name: wrong})
        assert refusal(told, None, (1, 1)) == f"its hello has no sound {name}"
    side = told if name in HELLO else told["signature"]
    del side[name]
    assert refusal(told, None, (1, 1)) == (None if name == "mesh" else f"its hello has no sound {name}")


ANY = st.recursive(st.none() | st.integers() | st.text("ab", max_size=2), st.lists, max_leaves=3)


@given(st.dictionaries(st.sampled_from([*HELLO, "x"]), ANY))
def test_whatever_a_hello_holds_it_is_a_word_and_no_error(told):
    assert isinstance(refusal(told, None, (1, 1)), str)
    assert refusal({**told, "signature": SIGNATURE | {"x": told}}, SIGNATURE, (1, 1)) is not None


def test_names_are_as_wished_where_they_are_free():
    assert named(2, {0, 1}, 4) == 2
    assert [named(wish, {0, 2}, 4) for wish in (0, None, "3", 9, -1)] == [1] * 5


# Votes


def votes_of(*told, blocks=5):
    return [Seat(n, None, "", 1, {}, 0.0, {"blocks": blocks, **one}) for n, one in enumerate(told)]


def nodes(name, tree):
    return [[name, *node, value.hex()] for node, value in tree.nodes()]


def test_losses_of_ranks_add_up_in_one_order():
    numbers = [0.1, 0.7, 1e-9, 3.0, 0.3]
    whole = TreeSum(5)
    parts = [TreeSum(5), TreeSum(5)]
    for leaf, value in enumerate(numbers):
        whole.add(leaf, value)
        parts[leaf >= 2].add(leaf, value)
    seats = votes_of(*({"loss": nodes("", part)} for part in parts), {"loss": []})
    assert counted(seats) == {"": whole.root().hex()}
    assert all(seat.vote is None for seat in seats)


def test_a_rank_without_samples_adds_nothing():
    one = TreeSum(2)
    one.add(0, 2.5)
    seats = votes_of({"loss": nodes("", one) + nodes("z", one)}, {"loss": [], "absent": [1]}, blocks=2)
    assert counted(seats) == {"": (2.5).hex(), "z": (2.5).hex()}


def test_a_term_of_some_samples_alone_is_told_of():
    one, two = TreeSum(2), TreeSum(2)
    one.add(0, 1.0)
    two.add(1, 2.0)
    seats = votes_of({"loss": nodes("", one) + nodes("z", one)}, {"loss": nodes("", two)}, blocks=2)
    with pytest.raises(InputError, match="the term 'z' is told of some samples alone"):
        counted(seats)
