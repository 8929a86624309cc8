"""The solver equals a linear program, and the theory of loss-free balancing holds as properties of the dual it solves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from anabranch.errors import AnabranchError, ConfigError, DataError
from anabranch.routing.assignment import (
    balance_audit,
    broken_preferences,
    choose,
    dual_value,
    preference_violations,
    price_solve,
)


def scores(seed, num_tokens=64, num_destinations=8, skew=1.0):
    generator = np.random.default_rng(seed)
    logit_TE = generator.normal(size=(num_tokens, num_destinations)) + skew * generator.normal(size=num_destinations)
    return 1 / (1 + np.exp(-logit_TE))


def loads(score_TE, top_k, bias_E):
    return choose(score_TE, top_k, bias_E).sum(0)


def linear_program(score_TE, top_k, capacity_E=None):
    """Objective and x of the relaxed problem, by HiGHS."""
    num_tokens, num_destinations = score_TE.shape
    rows = np.kron(np.eye(num_tokens), np.ones(num_destinations))
    columns = np.kron(np.ones(num_tokens), np.eye(num_destinations))
    share = np.full(num_destinations, top_k * num_tokens / num_destinations) if capacity_E is None else capacity_E
    found = linprog(
        -score_TE.ravel(),
        A_eq=np.vstack([rows, columns]),
        b_eq=np.concatenate([np.full(num_tokens, top_k), share]),
        bounds=(0, 1),
        method="highs-ds",
    )
    return -found.fun, found.x.reshape(score_TE.shape)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_tokens", "num_destinations", "top_k"), [(24, 4, 1), (32, 8, 2), (40, 5, 3), (16, 16, 4)])
def test_equals_the_linear_program_which_is_integral(seed, num_tokens, num_destinations, top_k):
    score_TE = scores(seed, num_tokens, num_destinations)
    optimum, x_TE = linear_program(score_TE, top_k)
    assert np.abs(x_TE - x_TE.round()).max() < 1e-9
    found = price_solve(score_TE, top_k)
    assert found.objective == pytest.approx(optimum, rel=1e-9)
    assert found.bound == pytest.approx(optimum, rel=1e-9)
    assert found.load_E.tolist() == [top_k * num_tokens // num_destinations] * num_destinations
    assert np.array_equal(np.sort(found.index_TK, 1), np.sort(np.nonzero(x_TE > 0.5)[1].reshape(num_tokens, top_k), 1))
    assert score_TE[np.arange(num_tokens)[:, None], found.index_TK].sum() == pytest.approx(found.objective)
    # The prices make it: choosing the largest of score + price is this assignment (no ties here).
    assert loads(score_TE, top_k, found.price_E).tolist() == found.load_E.tolist() or found.gap < 1e-9


def test_one_each_is_the_assignment_problem():
    score_TE = scores(0, 30, 30)
    rows, columns = linear_sum_assignment(-score_TE)
    found = price_solve(score_TE, 1)
    assert found.objective == pytest.approx(score_TE[rows, columns].sum())
    assert found.index_TK[:, 0].tolist() == columns.tolist()


@given(st.integers(0, 2**16), st.integers(2, 20), st.integers(1, 6), st.integers(1, 6), st.booleans())
@settings(max_examples=60)
def test_any_capacities_any_shape_and_ties(seed, num_tokens, num_destinations, top_k, tied):
    top_k = min(top_k, num_destinations)
    generator = np.random.default_rng(seed)
    score_TE = (
        generator.integers(0, 3, (num_tokens, num_destinations)).astype(float)
        if tied
        else scores(seed, num_tokens, num_destinations)
    )
    capacity_E = choose(generator.random(score_TE.shape), top_k).sum(0)
    found = price_solve(score_TE, top_k, 1e-8, capacity_E=capacity_E)
    optimum, _ = linear_program(score_TE, top_k, capacity_E)
    assert found.objective == pytest.approx(optimum, rel=1e-8, abs=1e-8)
    assert found.load_E.tolist() == capacity_E.tolist()
    assert all(len(set(row)) == top_k for row in found.index_TK.tolist())


@pytest.mark.parametrize(("num_tokens", "num_destinations", "top_k"), [(3, 8, 2), (1, 5, 2), (7, 3, 2), (6, 4, 4)])
def test_shares_that_are_not_whole_and_fewer_tokens_than_destinations(num_tokens, num_destinations, top_k):
    score_TE = scores(1, num_tokens, num_destinations)
    found = price_solve(score_TE, top_k)
    share = top_k * num_tokens / num_destinations
    assert set(found.load_E) <= {int(np.floor(share)), int(np.ceil(share))}
    assert found.gap < 1e-9
    audit = balance_audit(score_TE, top_k)
    assert audit.bound >= linear_program(score_TE, top_k)[0] - 1e-9


def test_equal_scores_are_shared_out_evenly():
    found = price_solve(np.ones((512, 8)), 2)
    assert found.load_E.tolist() == [128] * 8
    assert found.objective == 1024


# -- the theory (items of the spec's list): for every bias, every step rule


@given(st.integers(0, 2**16), st.integers(1, 3), st.floats(0, 2))
def test_weak_duality_and_the_subgradient(seed, top_k, spread):
    score_TE = scores(seed, 30, 6)
    generator = np.random.default_rng(seed + 1)
    bias_E, other_E = spread * generator.normal(size=(2, 6))
    share = 30 * top_k / 6
    value = dual_value(score_TE, top_k, bias_E)
    assert value >= price_solve(score_TE, top_k).objective - 1e-9
    slope_E = loads(score_TE, top_k, bias_E) - share
    assert dual_value(score_TE, top_k, other_E) >= value + slope_E @ (other_E - bias_E) - 1e-9
    assert dual_value(score_TE, top_k, bias_E + 0.75) == pytest.approx(value)  # a constant changes nothing


def moved(rule, rate, step, load_E):
    missing_E = load_E.mean() - load_E
    return {
        "sign": rate * np.sign(missing_E),
        "magnitude": rate * missing_E / load_E.mean(),
        "inv_n": rate / step * missing_E / load_E.mean(),
        "inv_sqrt": rate / step**0.5 * missing_E / load_E.mean(),
    }[rule]


@pytest.mark.parametrize("rule", ["sign", "magnitude", "inv_n", "inv_sqrt"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_preference_rule_is_never_broken_and_the_identity_holds(rule, top_k):
    """2 x 4 x 1250 = 10,000 steps: no token leaves a destination for one whose bias rose less; and item 7, to 1e-9.

    D_{n+1} - D_n = <A_{n+1} - L, delta> + what the switched tokens lose, counted at the old bias, which is at most 0.
    """
    score_TE = scores(5, 48, 6)
    share, bias_E = 48 * top_k / 6, np.zeros(6)
    chosen_TE = choose(score_TE, top_k)
    value = dual_value(score_TE, top_k, bias_E)
    for step in range(1, 1251):
        delta_E = moved(rule, 0.05, step, chosen_TE.sum(0))
        after_TE = choose(score_TE, top_k, bias_E + delta_E)
        assert preference_violations(score_TE, top_k, bias_E, bias_E + delta_E) == 0
        switched = ((score_TE + bias_E) * (after_TE.astype(int) - chosen_TE)).sum()
        assert switched <= 1e-12
        after = dual_value(score_TE, top_k, bias_E + delta_E)
        assert after - value == pytest.approx((after_TE.sum(0) - share) @ delta_E + switched, abs=1e-9)
        if rule != "sign" and (chosen_TE.sum(0) - share) @ (after_TE.sum(0) - share) >= 0:
            assert after <= value + 1e-9  # a step that does not overshoot never makes the dual worse
        bias_E, chosen_TE, value = bias_E + delta_E, after_TE, after


def test_a_broken_preference_is_seen():
    score_TE = np.array([[1.0, 0.9], [1.0, 0.0]])
    assert preference_violations(score_TE, 1, [0, 0], [0, 0.2]) == 0  # token 0 follows what rose
    wrong = choose(score_TE, 1, np.array([0, 0.2]))
    assert wrong.tolist() == [[False, True], [True, False]]
    # Not a step of fixed scores: of these biases the first is preferred though the second rose more.
    assert preference_violations(np.array([[0.0, 0.1]]), 1, [0, 0], [0.2, 0.0]) == 0


def test_what_moved_as_much_breaks_no_preference():
    old_TE, new_TE = np.array([[True, False]]), np.array([[False, True]])
    moves = [broken_preferences(old_TE, new_TE, np.array(moved_E)) for moved_E in ([0.1, 0.1], [0.1, 0.2], [0.2, 0.1])]
    assert moves == [0, 0, 1]


@pytest.mark.parametrize(
    ("rule", "rate", "limit"), [("magnitude", 0.03, 0.0), ("inv_sqrt", 0.2, 0.0), ("sign", 1e-3, 0.06)]
)
def test_loads_end_near_balance(rule, rate, limit):
    """Deterministic scores: steps in proportion end in exact balance and an optimal dual, signs in a band of their step's width."""
    score_TE, top_k = scores(0, 512, 8), 2
    bias_E, best = np.zeros(8), price_solve(score_TE, top_k)
    violations = []
    for step in range(1, 2001):
        load_E = loads(score_TE, top_k, bias_E)
        violations.append(load_E.max() / load_E.mean() - 1)
        bias_E = bias_E + moved(rule, rate, step, load_E)
    assert violations[0] > 0.5
    assert max(violations[-20:]) <= limit + 1 / 128
    gap = (dual_value(score_TE, top_k, bias_E) - best.objective) / best.objective
    assert -1e-12 <= gap < (1e-6 if rule != "sign" else 1e-4)


def test_online_regret_of_shrinking_steps_is_lower():
    """Fresh scores each step: the regret of 1/n flattens, that of a constant step grows on."""
    skew_E = np.random.default_rng(0).normal(size=8)
    held_out = 1 / (1 + np.exp(-(np.random.default_rng(1).normal(size=(20_000, 8)) + skew_E)))
    optimum = price_solve(held_out[:8192], 2)
    regret = {}
    for rule, rate in (("inv_n", 0.2), ("magnitude", 0.5)):
        generator, bias_E, regret[rule] = np.random.default_rng(2), np.zeros(8), []
        for step in range(1, 401):
            batch_TE = 1 / (1 + np.exp(-(generator.normal(size=(256, 8)) + skew_E)))
            lost = dual_value(batch_TE, 2, bias_E) - dual_value(batch_TE, 2, optimum.price_E)
            regret[rule].append(lost / 256)
            bias_E = bias_E + moved(rule, rate, step, loads(batch_TE, 2, bias_E))
    late = {rule: sum(values[200:]) for rule, values in regret.items()}
    assert late["inv_n"] < 0.3 * late["magnitude"]


# -- the audit


def test_audit_of_an_unbalanced_and_of_an_optimal_bias():
    score_TE = scores(2, 256, 8)
    plain = balance_audit(score_TE, 2)
    assert plain.achieved > plain.optimum  # unbalanced routing takes more than its share of the best
    assert plain.max_violation == pytest.approx(loads(score_TE, 2, 0.0).max() / 64 - 1)
    away_E = loads(score_TE, 2, 0.0) / 64 - 1
    assert plain.min_violation == pytest.approx(away_E.min())
    assert plain.mean_violation == pytest.approx(abs(away_E).mean())
    assert plain.min_violation < 0 < plain.mean_violation
    assert plain.duality_gap > 0.01
    assert np.isnan(plain.correlation)
    assert plain.preference_violations is None
    best = balance_audit(score_TE, 2, plain.price_E, previous_E=np.zeros(8))
    assert best.duality_gap == pytest.approx(0, abs=1e-9)
    assert best.correlation == pytest.approx(1.0)
    assert best.preference_violations == 0
    assert best.max_violation <= 1 / 64
    assert balance_audit(score_TE, 2, -plain.price_E).correlation == pytest.approx(-1.0)


def test_choosing_all_is_balanced_without_a_price():
    audit = balance_audit(scores(0, 12, 4), 4)
    assert (audit.max_violation, audit.duality_gap) == (0.0, pytest.approx(0.0))
    assert audit.price_E.tolist() == [0.0] * 4


def with_nan(score_TE):
    score_TE[3, 1] = np.nan
    return score_TE


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: price_solve(scores(0), 9), ConfigError, "top_k is 9, but there are 8 destinations; use 1 to 8"),
        (lambda: price_solve(scores(0), 2, 0.0), ConfigError, "tol is 0.0; it must be greater than 0"),
        (lambda: price_solve(np.ones(4), 1), DataError, r"scores are \[tokens, destinations\], not \(4,\)"),
        (
            lambda: balance_audit(with_nan(scores(0)), 2, name="3"),
            DataError,
            "score of layer 3 of token 3, destination 1 is nan",
        ),
        (lambda: balance_audit(scores(0), 2, [0.0]), ConfigError, r"shape \(1,\), but there are 8 destinations"),
        (lambda: price_solve(scores(0, 4, 2), 1, capacity_E=[4, 4]), ConfigError, "0 to 4 .* and 4 in all"),
        (lambda: price_solve(scores(0, 4, 2), 1, capacity_E=[4.0, 0.0]), ConfigError, "a whole number for each of 2"),
        (
            lambda: price_solve(scores(0) * 1e-9 + np.eye(64)[:, :8] * 1e6, 2, 1e-300),
            AnabranchError,
            "certified to a relative gap",
        ),
    ],
)
def test_messages(make, error, message):
    with pytest.raises(error, match=message):
        make()
