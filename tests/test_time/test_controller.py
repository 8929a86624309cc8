"""The controller: each reason to stop, caps that nothing passes, and what a batch is."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.test_time import TTSPM, BetaTTSPM, BudgetController

HALF = BetaTTSPM(1.0, 1.0, 1.0)


def drawn(rules, told):
    """Run one question; ``told(count)`` says what becomes of a batch. The batches, and why it ended."""
    allowance, batches = rules.begin(), []
    while count := allowance.next():
        batches.append(count)
        allowance.told(count, **told(count))
        assert len(batches) < 1000
    return batches, allowance


def controller(**fields):
    return BudgetController(**{"curve": HALF, "value": 1.0, "cost": 0.0499, **fields})


def failing(count):
    return {"verified": [False] * count}


def test_failures_make_a_question_hopeless():
    # After n failures 1 / (n + 2): 1/20 for n = 18. Of a batch the later ones count for less: those before may solve it.
    batches, allowance = drawn(controller(decides="posterior", batch=4), failing)
    assert (batches, allowance.reason) == ([4, 4, 4, 3, 2, 1, 1], "saturated")
    assert allowance.gain == pytest.approx(1 / 21)


def test_the_prior_decides_before_the_first_call():
    # 1 / ((n + 1) (n + 2)) is 1/20 at n = 3 and 1/30 at n = 4.
    rules = controller(decides="prior")
    assert rules.begin().budget == 4
    batches, allowance = drawn(rules, lambda count: {"answers": ["a"] * count})
    assert (batches, allowance.reason) == ([4], "saturated")
    # Both: after each batch, and never more than the prior allows.
    assert sum(drawn(controller(decides="both", batch=2), failing)[0]) == 4


def test_a_verified_answer_ends_it():
    batches, allowance = drawn(
        controller(decides="posterior"), lambda count: {"verified": [False] * (count - 1) + [True]}
    )
    assert (batches, allowance.reason, allowance.gain) == ([4], "verified", 0.0)


def test_a_decided_vote_ends_it():
    rules = controller(decides="posterior", cost=1e-4, batch=2)
    batches, allowance = drawn(rules, lambda count: {"answers": ["42"] * count})
    assert (batches, allowance.reason) == ([2, 2], "agreement")
    answers = iter("ababababababababab" * 8)
    rules = controller(decides="posterior", cost=1e-4, batch=2, max_n=12)
    batches, allowance = drawn(rules, lambda count: {"answers": [next(answers) for _ in range(count)]})
    assert (sum(batches), allowance.reason, allowance.votes) == (12, "budget", {"a": 6, "b": 6})


def test_money_and_time_end_it():
    batches, allowance = drawn(controller(decides="posterior", max_cost=0.32), failing)
    assert (batches, allowance.reason) == ([4, 2], "budget")
    # Samples that cost more than they were thought to are what the next ones are held against: 1/6 is less than a fifth.
    rules = controller(decides="posterior", max_cost=0.7)
    batches, allowance = drawn(rules, lambda count: {**failing(count), "cost": 0.2 * count})
    assert (batches, allowance.reason) == ([4], "saturated")
    # And more than 0.15, of which there is no more left.
    batches, allowance = drawn(rules, lambda count: {**failing(count), "cost": 0.15 * count})
    assert (batches, allowance.reason) == ([4], "budget")
    # Three batches of three seconds in ten: a fourth would pass it.
    batches, allowance = drawn(
        controller(decides="posterior", deadline_s=10.0), lambda count: {**failing(count), "seconds": 3.0}
    )
    assert (batches, allowance.reason) == ([4, 4, 4], "deadline")


def test_samples_that_do_not_pay_are_drawn_only_where_they_must_be():
    # One is, so that there is an answer.
    batches, allowance = drawn(controller(cost=0.9), failing)
    assert (batches, allowance.reason) == ([1], "saturated")
    assert drawn(controller(cost=0.9, least=3), failing)[0] == [3]
    assert drawn(controller(cost=0.9, least=3, max_cost=1.0), failing)[0] == [1]


def test_what_costs_nothing_is_drawn_while_it_gains():
    # gain(n) = 1 / ((n + 1) (n + 2)), at least a fiftieth up to n = 5.
    rules = controller(curve=BetaTTSPM(1, 1, 1), cost=0, least_gain=0.02, decides="prior", batch=99)
    assert drawn(rules, failing)[0] == [6]
    # A price above that is what counts.
    assert drawn(replace(rules, cost=0.06), failing)[0] == [3]
    # No money is none of a cap.
    assert drawn(replace(rules, max_cost=0.0), failing)[0] == [6]


def test_the_most_that_samples_may_cost_is_kept_free():
    rules = controller(decides="posterior", cost=0.001, reserve=0.1, max_cost=0.35, batch=9, max_n=9)
    cheap = lambda count: {"answers": ["a", "b", "c", "d"][:count], "cost": 0.01 * count}  # noqa: E731
    # Three at 0.1; 0.03 of it is spent, which leaves three again, and so on.
    assert drawn(rules, cheap)[0] == [3, 3, 2, 1]
    assert drawn(replace(rules, max_cost=0.3), cheap)[0][0] == 3
    assert drawn(replace(rules, max_cost=0.09), cheap)[0] == []


def test_it_can_be_ended_from_outside():
    allowance = controller().begin()
    allowance.stop("deadline")
    allowance.stop("budget")
    assert (allowance.next(), allowance.reason) == (0, "deadline")


@given(
    f_max=st.floats(0.1, 1),
    a=st.floats(0.1, 5),
    b=st.floats(0.1, 20),
    cost=st.floats(1e-4, 0.5),
    batch=st.integers(1, 9),
    most=st.integers(1, 40),
    money=st.floats(0, 3),
    decides=st.sampled_from(["prior", "posterior", "both"]),
    seed=st.integers(0, 2**31),
)
def test_no_cap_is_ever_passed(f_max, a, b, cost, batch, most, money, decides, seed):
    rng = np.random.default_rng(seed)
    rules = controller(
        curve=BetaTTSPM(f_max, a, b), cost=cost, batch=batch, max_n=most, max_cost=money, decides=decides
    )
    batches, allowance = drawn(rules, lambda count: {"verified": (rng.random(count) < 0.05).tolist()})
    assert sum(batches) == allowance.drawn <= most
    assert allowance.spent <= money + 1e-9
    # Samples that cost less than the most they may, or that much.
    rules = replace(rules, reserve=3 * cost)
    _, allowance = drawn(rules, lambda count: {**failing(count), "cost": float((rng.random(count) * 3 * cost).sum())})
    assert allowance.spent <= money + 1e-9
    assert all(count <= batch for count in batches)
    assert allowance.reason in ("saturated", "budget", "verified")
    assert allowance.next() == 0


def test_the_papers_curve_is_one_too():
    # 0.8 * 0.3 * 0.7^n > 0.01 for n up to 8.
    rules = controller(curve=TTSPM(f_max=0.8, p=0.3), cost=0.01, decides="prior", batch=16)
    assert drawn(rules, failing)[0] == [9]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value": 0}, "value is 0"),
        ({"cost": 0}, "cost is 0; it must be above 0"),
        ({"cost": 0, "least_gain": 2}, "least_gain is 2"),
        ({"reserve": -1.0}, "reserve is -1"),
        ({"cost": float("nan")}, "cost"),
        ({"decides": "never"}, "decides is 'never'; it must be prior, posterior or both"),
        ({"batch": 0}, "batch is 0"),
        ({"max_cost": float("nan")}, "max_cost is nan"),
        ({"confidence": 2}, "confidence is 2"),
    ],
)
def test_rules_that_are_none_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        controller(**fields)
