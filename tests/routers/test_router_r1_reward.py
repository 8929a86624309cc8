"""What a trajectory of Router-R1 is worth, by hand; the window of costs; and which tokens bear it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.routers.router_r1.masks import Tokens
from anabranch.routers.router_r1.reward import CostWindow, exact_match, normalized, raw_cost, token_f1, total_reward


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The  Cat!", "cat"),
        ("a an the", "a an the"),
        ("A.", "a"),
        ("(the)", "the"),
        (" + ", "+"),
        ("!!!", "!!!"),
        ("(-) a", "a"),
        (" \n", ""),
        ("Theory of a Thing", "theory of thing"),
        ("U.S.A.", "usa"),
        ("  x\n y ", "x y"),
        ("", ""),
        ("don't", "dont"),
        ("1,000", "1000"),
    ],
)
def test_normal_forms(text, form):
    assert normalized(text) == form


def test_exact_match():
    assert exact_match("The Eiffel Tower.", ["eiffel tower", "x"]) == 1
    assert exact_match("Eiffel", ["eiffel tower"]) == 0
    assert (exact_match(None, ["x"]), exact_match("x", [])) == (0, 0)


@pytest.mark.parametrize("judge", [exact_match, token_f1])
@pytest.mark.parametrize("answer", ["", " ", None])
@pytest.mark.parametrize("wanted", [["A"], [""], ["the", "an"], ["+"], ["!!!"], []])
def test_whoever_says_nothing_is_never_right(judge, answer, wanted):
    """An empty answer was exactly right where the right one is an article, as of a question with the options A to D."""
    assert judge(answer, wanted) == 0
    assert judge(answer, [*wanted, "Ann"]) == 0
    assert judge("Ann", [*wanted, "Ann"]) == 1


@pytest.mark.parametrize("judge", [exact_match, token_f1])
@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        ("A", ["a", "A.", "(A)", " a "], ["the", "an", "B", "+", "Ann", "a vitamin"]),
        ("the", ["The", "the."], ["a", "?!", "theory"]),
        ("+", ["+", " + "], ["-", "++", "a", "plus"]),
        ("!!!", ["!!!"], ["!", "?!", "the"]),
        ("(-)", ["(-)"], ["-", "(+)"]),
        ("Vitamin A", ["vitamin", "a vitamin"], ["A", "the"]),
    ],
)
def test_an_answer_of_articles_or_signs_alone_is_compared_as_it_is(judge, wanted, right, wrong):
    """Nothing was left of it to compare with, and so a file with one such question was refused whole."""
    assert [judge(said, [wanted]) for said in right] == [1] * len(right)
    assert [judge(said, [wanted]) for said in wrong] == [0] * len(wrong)


@pytest.mark.parametrize(
    ("answer", "wanted", "value"),
    [
        ("big red dog", ["red dog"], 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("red red", ["red"], 2 * 0.5 * 1 / 1.5),
        ("cat", ["dog", "cat"], 1.0),
        ("cat", ["dog"], 0.0),
        ("yes it is", ["yes"], 0.0),
        ("yes", ["yes it is"], 0.0),
        ("Yes.", ["yes"], 1.0),
        ("noanswer", ["no answer"], 0.0),
        ("the", ["a"], 0.0),
        (None, ["x"], 0.0),
        ("x", [], 0.0),
    ],
)
def test_token_f1(answer, wanted, value):
    assert token_f1(answer, wanted) == pytest.approx(value)


def test_raw_costs():
    calls = [(100, 30, 0.5, 2.0), (10, 5, 0.1, 0.2)]
    assert raw_cost(calls) == pytest.approx(30 * 2.0 + 5 * 0.2)
    assert raw_cost(calls, "all") == pytest.approx(61 + 100 * 0.5 + 10 * 0.1)
    assert raw_cost([]) == 0
    for odd in (math.nan, -1.0, math.inf):
        with pytest.raises(InputError, match="must be numbers of at least 0"):
            raw_cost([(1, 1, 1, odd)])


def test_a_window_of_one_and_of_like_costs_is_even():
    assert CostWindow(1).reward(5.0) == 0.5
    window = CostWindow()
    assert [window.reward(4.0) for _ in range(5)] == [0.5] * 5


def test_a_window_of_two_by_hand():
    """Roots 0 and 10: the percentiles are 0.5 and 9.5, beyond which both lie."""
    window = CostWindow()
    assert window.reward(0.0) == 0.5
    assert window.reward(100.0) == 0.0
    assert (window.told(0.0), window.told(5.0)) == (1.0, pytest.approx(0.5))


def test_a_window_forgets():
    window = CostWindow(2)
    for cost in (1e6, 1.0, 1.0):
        window.reward(cost)
    assert len(window) == 2
    assert window.told(1.0) == 0.5
    again = CostWindow(2)
    again.load_state(window.state())
    assert again.reward(9.0) == window.reward(9.0)
    full = CostWindow(1000)
    for cost in range(3000):
        full.reward(float(cost))
    assert len(full) == 1000


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0, 1e3), st.floats(0, 1e3))
def test_who_costs_more_never_gets_more(costs, one, other):
    window = CostWindow()
    for cost in costs:
        assert 0 <= window.reward(cost) <= 1
    assert window.told(min(one, other)) >= window.told(max(one, other))


@pytest.mark.parametrize("cost", [math.nan, -1.0, math.inf])
def test_what_is_no_cost(cost):
    with pytest.raises(InputError, match="a trajectory cost"):
        CostWindow().reward(cost)


def test_rewards_by_hand():
    assert total_reward(False, 1.0, 1.0, 0.5) == -1
    assert total_reward(True, 0.0, 1.0, 0.9) == 0
    assert total_reward(True, 0.0, 1.0, 0.9, cost_only_if_correct=False) == pytest.approx(0.9)
    assert total_reward(True, 1.0, 0.25, 0.6) == pytest.approx(0.4 + 0.15)


@given(st.floats(0, 1), st.floats(0, 1))
def test_rewards_that_hold_for_every_alpha(alpha, cost):
    assert total_reward(True, 0.0, cost, alpha) == 0
    assert total_reward(True, 1.0, cost, 1.0) == cost
    assert total_reward(False, 1.0, cost, alpha) == -1
    assert total_reward(True, 1.0, cost, 0.0) == 1


def test_what_is_no_reward():
    for odd in ({"outcome": math.nan}, {"cost": 1.5}, {"alpha": -0.1}):
        with pytest.raises(InputError, match=f"{next(iter(odd))} is"):
            total_reward(True, **{"outcome": 1.0, "cost": 1.0, "alpha": 0.5, **odd})


# Which tokens


def response():
    tokens = Tokens()
    tokens.add([5, 6, 7], is_router=True)
    tokens.add([1, 2], is_router=False)
    tokens.add([], is_router=True)
    tokens.add([8], is_router=True)
    tokens.add([3], is_router=False)
    return tokens


def test_masks_by_hand():
    tokens = response()
    assert tokens.ids_T.tolist() == [5, 6, 7, 1, 2, 8, 3]
    assert tokens.info_mask_T.tolist() == [True, True, True, False, False, True, False]
    # What is the router's and what is information are together all of it.
    assert tokens.info_mask_T.sum() + 3 == len(tokens.ids_T)


@given(st.lists(st.tuples(st.lists(st.integers(0, 99), max_size=5), st.booleans()), max_size=8))
def test_masks_hold_together(parts):
    tokens = Tokens()
    for ids, is_router in parts:
        tokens.add(ids, is_router=is_router)
    own = sum(len(ids) for ids, is_router in parts if is_router)
    assert (int(tokens.info_mask_T.sum()), len(tokens.ids_T)) == (own, sum(len(ids) for ids, _ in parts))
