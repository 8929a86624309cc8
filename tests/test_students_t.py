"""Student's t, beside scipy's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from anabranch.students_t import t_probability, t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.995])
def test_quantile_equals_scipy(degrees, probability):
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-9)


@given(st.floats(0, 50), st.integers(1, 40))
def test_probability_equals_scipy(t, degrees):
    assert t_probability(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)
