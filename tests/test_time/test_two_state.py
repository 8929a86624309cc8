"""Rounds that may lose: the chain by hand, as a matrix power, and without losses the paper's curve."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.test_time import TTSPM, TwoStateTTSPM

shares = st.floats(1e-4, 1.0)


def chain(p, q, first, rounds):
    """Share right after each round, by stepping."""
    right = [0.0, first]
    for _ in range(rounds - 1):
        right.append(right[-1] * (1 - q) + (1 - right[-1]) * p)
    return right


def test_a_case_by_hand():
    # p = 1/2, q = 1/4: pi = 2/3; rounds 1/2, 1/2 * 3/4 + 1/2 * 1/2 = 5/8, 5/8 * 3/4 + 3/8 * 1/2 = 21/32.
    curve = TwoStateTTSPM(0.5, 0.25)
    assert curve.plateau == pytest.approx(2 / 3)
    assert curve.value([0, 1, 2, 3]) == pytest.approx([0, 1 / 2, 5 / 8, 21 / 32])
    # Gains 1/2, 1/8, 1/32.
    assert curve.saturation(0.1) == curve.budget(v=10.0, c=1.0) == 2


@given(p=shares, q=st.floats(0, 1), first=st.floats(0, 1), eps=st.floats(1e-6, 0.5))
def test_it_is_the_chain_step_by_step(p, q, first, eps):
    curve = TwoStateTTSPM(p, q, first)
    wanted = chain(p, q, first, 12)
    assert curve.value(np.arange(13)) == pytest.approx(wanted, abs=1e-12)
    assert curve.gain(np.arange(12)) == pytest.approx(np.diff(wanted), abs=1e-12)
    stop = curve.saturation(eps)
    assert curve.gain(stop) <= eps
    assert stop == 0 or curve.gain(stop - 1) > eps


@given(p=shares)
def test_without_losses_it_is_the_papers(p):
    n = np.arange(30)
    assert TwoStateTTSPM(p).value(n) == pytest.approx(TTSPM("sequential", p=p).value(n), abs=1e-12)
    assert TwoStateTTSPM(p).saturation(0.01) == TTSPM("sequential", p=p).saturation(0.01)


def test_more_rounds_may_take_away():
    curve = TwoStateTTSPM(0.1, 0.3, first=0.6)
    assert curve.gain(1) < 0
    assert curve.saturation(0.01) == 1
    assert curve.value(50) == pytest.approx(curve.plateau)


def test_a_fit_counts_steps():
    # From wrong two steps of four won, from right one of two lost.
    found = TwoStateTTSPM.fit([[0, 1, 1], [0, 0, 1], [1, 0, 0]])
    assert (found.p, found.q, found.first) == pytest.approx((2 / 4, 1 / 2, 1 / 3))
    assert TwoStateTTSPM.fit([[0, 0]]).p == 1e-12
    with pytest.raises(InputError, match="p cannot be told"):
        TwoStateTTSPM.fit([[1, 1]])
    with pytest.raises(InputError, match="one round tells nothing"):
        TwoStateTTSPM.fit([[1], [0]])
    with pytest.raises(InputError, match="q is 2"):
        TwoStateTTSPM(0.5, 2)
