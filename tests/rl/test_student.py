"""Student's t: against its tables, and the quantiles that studies are judged by."""

import pytest

from anabranch.rl import student
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


def test_many_degrees_take_no_longer_and_go_on_from_few(monkeypatch):
    few = {degrees: within_95(degrees) for degrees in (999, 1000)}
    exact = {}
    monkeypatch.setattr(student, "_FEW", 10_000)
    for degrees in (1001, 1002, 4999, 9999):
        exact[degrees] = student.within_95.__wrapped__(degrees)
    monkeypatch.undo()
    for degrees, expected in exact.items():
        assert within_95(degrees) == pytest.approx(expected, abs=1e-8)
    found = [*few.values(), *(within_95(degrees) for degrees in (1001, 1002, 5000, 99_999, 10**7, 10**12))]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(1.959963985, abs=1e-9)
    # Not one term for each two degrees.
    monkeypatch.setattr(student, "_within", None)
    assert student.within_95.__wrapped__(10**9) == within_95(10**9)
