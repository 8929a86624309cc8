"""Student's t: against its tables, and the quantiles that studies are judged by."""

import pytest

from anabranch.rl.student import within_95
from anabranch.studies.paired import t_quantile


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (4, 2.7764451), (99, 1.9842169)]
)
def test_intervals_are_students(degrees, expected):
    assert within_95(degrees) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("degrees", [1, 2, 5, 10, 31, 200])
def test_they_are_those_of_studies(degrees):
    assert within_95(degrees) == pytest.approx(t_quantile(0.975, degrees), abs=1e-9)
