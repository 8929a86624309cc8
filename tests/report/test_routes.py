"""Pictures of routes: no line is hidden by another."""

import numpy as np

from anabranch.report.routes import draw_curves
from anabranch.report.style import figure


def labels(curves):
    with figure(4, 3) as (_, axes):
        draw_curves(axes, curves, "nats per token")
        return [(line.get_label(), line.is_dashed()) for line in axes.lines]


def test_a_line_that_lies_on_another_is_dashed_and_said_to():
    low, high = np.array([3.0, 2.0, 3.0]), np.array([3.0, 2.5, 3.0])
    assert labels({"oracle": low, "fixed": high, "random": low.tolist()}) == [
        ("oracle", False),
        ("fixed", False),
        ("random (as oracle)", True),
    ]
    assert labels({"one": low, "flat": np.full(3, 2.0), "again": np.full(3, 2.0)})[2] == ("again (as flat)", True)
