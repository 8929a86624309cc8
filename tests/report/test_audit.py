"""The audit of a trace is the audit of its scores, and looks at the choices that were made."""

import numpy as np
import pytest

from anabranch.errors import DataError
from anabranch.report import audit
from anabranch.report.audit import audit_trace
from anabranch.routing import TraceBuilder, TraceLayer
from anabranch.routing.assignment import balance_audit


def trace_of(index_NK, score_NE, num_destinations, domain=None):
    builder = TraceBuilder(scores=score_NE is not None)
    layer = TraceLayer(layer=0, name="router", num_destinations=num_destinations, top_k=index_NK.shape[1])
    weight_NK = np.full(index_NK.shape, 0.5, np.float32)
    scored = {} if score_NE is None else {"score_NE": score_NE}
    builder.add(layer, index_NK, weight_NK, item_N=np.arange(len(index_NK)), domain=domain, **scored)
    return builder.trace()


def test_by_hand():
    # Both tokens like 0 more; the best balanced assignment gives it to the one that loses more without.
    score_NE = np.array([[0.9, 0.1], [0.8, 0.6]], np.float32)
    (found,) = audit_trace(trace_of(np.array([[0], [0]]), score_NE, 2))
    assert (found.tokens, found.max_violation, found.unbiased_max_violation) == (2, 1.0, 1.0)
    assert (found.achieved, found.optimum, found.achieved_share) == pytest.approx((1.7, 1.5, 1.7 / 1.5))
    assert (found.has_bias, found.correlation) == (False, None)
    (balanced,) = audit_trace(trace_of(np.array([[0], [1]]), score_NE, 2), {0: np.array([0.0, 0.3])})
    assert (balanced.max_violation, balanced.unbiased_max_violation) == (0.0, 1.0)
    assert balanced.achieved == pytest.approx(balanced.optimum)
    assert balanced.duality_gap == pytest.approx(0, abs=1e-6)
    assert balanced.correlation == pytest.approx(1.0)


def test_it_is_the_audit_of_the_scores():
    draw = np.random.default_rng(0)
    score_NE = draw.random((256, 8)).astype(np.float32) + np.linspace(0, 0.4, 8, dtype=np.float32)
    bias_E = draw.normal(size=8) / 10
    index_NK = np.argsort(-(score_NE + bias_E), 1)[:, :2]
    (found,) = audit_trace(trace_of(index_NK, score_NE, 8), {0: bias_E})
    expected = balance_audit(score_NE, 2, bias_E)
    assert found.optimum == expected.optimum
    assert found.max_violation == pytest.approx(expected.max_violation)
    assert found.achieved == pytest.approx(expected.achieved)
    assert found.correlation == expected.correlation
    assert found.duality_gap == expected.duality_gap
    assert (found.dual, found.bound, found.prices) == (expected.dual, expected.bound, expected.price_E.tolist())
    assert found.min_violation == pytest.approx(expected.min_violation)
    assert found.mean_violation == pytest.approx(expected.mean_violation)
    assert found.domain_max_violation == {}


def test_preferences_are_broken_by_what_score_and_bias_did_not_choose():
    """By hand: 0 is the best of all three tokens; the first keeps it, the second leaves it for 1, the third for 2."""
    score_NE = np.array([[0.9, 0.2, 0.1], [0.9, 0.8, 0.1], [0.9, 0.1, 0.8]], np.float32)
    trace = trace_of(np.array([[0], [1], [2]]), score_NE, 3)
    assert audit_trace(trace)[0].preference_violations is None
    for bias_E, broken in (([0.0, 0.2, 0.2], 0), ([0.0, 0.2, -0.1], 1), ([0.0, -0.1, -0.1], 2), ([0.0, 0.0, 0.0], 0)):
        assert audit_trace(trace, {0: np.array(bias_E)})[0].preference_violations == broken
    # The next float32 is not another bias.
    near = np.nextafter(np.float32(0.25), np.float32(0))
    assert audit_trace(trace, {0: np.array([0.25, near, near])})[0].preference_violations == 0


@pytest.mark.parametrize(("scores", "bias_E"), [(1e4, [0.25, 0.249]), (1.0, [1e4, 9999.999])])
def test_what_rounding_of_large_numbers_chose_breaks_no_preference(scores, bias_E):
    """Of 0.25 and 0.249 nothing is left beside 10,000 in float32, nor of scores beside such a bias; a hundredth is another bias."""
    score_NE = np.array([[scores, 0.0, -1.0], [0.0, scores, -1.0]], np.float32)
    trace = trace_of(np.array([[1], [1]]), score_NE, 3)
    assert audit_trace(trace, {0: np.array([*bias_E, 0.0])})[0].preference_violations == 0
    apart = np.array([bias_E[0], bias_E[0] - 0.01, 0.0])
    assert audit_trace(trace, {0: apart})[0].preference_violations == 1


def test_choices_by_score_and_bias_break_no_preference_and_those_by_another_bias_do():
    draw = np.random.default_rng(1)
    score_NE = draw.random((512, 8), np.float32)
    bias_E = draw.normal(size=8).astype(np.float32) / 10
    index_NK = np.argsort(-(score_NE + bias_E), 1)[:, :3]
    trace = trace_of(index_NK, score_NE, 8)
    assert audit_trace(trace, {0: bias_E})[0].preference_violations == 0
    assert audit_trace(trace, {0: -bias_E})[0].preference_violations > 100


def test_of_a_long_trace_tokens_are_taken_from_all_over_it(monkeypatch):
    monkeypatch.setattr(audit, "TOKENS", 3)
    score_NE = np.array([[0.9, 0.1]] * 4 + [[0.1, 0.9]] * 3, np.float32)
    (found,) = audit_trace(trace_of(np.array([[0]] * 4 + [[1]] * 3), score_NE, 2))
    # The first, the middle and the last.
    assert (found.tokens, found.achieved) == (3, pytest.approx(2.7))
    assert found.max_violation == pytest.approx(1 / 3)


def test_domains_are_each_audited_for_balance():
    score_NE = np.array([[0.9, 0.1], [0.8, 0.6], [0.2, 0.3], [0.4, 0.3]], np.float32)
    trace = trace_of(np.array([[0], [0], [1], [0]]), score_NE, 2, domain=["b", "b", "a", "a"])
    (found,) = audit_trace(trace)
    assert found.max_violation == pytest.approx(0.5)  # 3 of 4, where 2 were even
    assert found.domain_max_violation == {"a": 0.0, "b": 1.0}


def test_what_cannot_be_audited_is_refused():
    score_NE = np.ones((2, 3), np.float32)
    with pytest.raises(DataError, match="the trace has no scores"):
        audit_trace(trace_of(np.array([[0], [1]]), None, 3))
    with pytest.raises(DataError, match="layer 0 takes a number of destinations that varies"):
        audit_trace(trace_of(np.array([[0, 1], [1, -1]]), score_NE, 3))
    with pytest.raises(DataError, match="no layer has a choice"):
        audit_trace(trace_of(np.array([[0, 1]]), np.ones((1, 2), np.float32), 2))
