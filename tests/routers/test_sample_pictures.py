"""The picture of curves over samples: what each line, band, point and mark stands for."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from anabranch.routers.referee.sample_pictures import SHOWN, draw
from anabranch.routers.sample_curves import SampleCurve
from anabranch.test_time import TTSPM, BetaTTSPM

RIGHT = np.random.default_rng(0).random((40, 6)) < 0.4


@cache
def fitted_to(kind):
    return BetaTTSPM(kind=kind).fit(RIGHT), TTSPM(kind=kind).fit(RIGHT)


def made(model="small", task=None, kind="parallel", stop=None):
    curve, single = fitted_to(kind)
    return SampleCurve(
        model=model,
        task=task,
        questions=len(RIGHT),
        left_out=0,
        kind=kind,
        is_cut=False,
        observed_N=curve.observed,
        curve=curve,
        single=single,
        interval={},
        eps=0.02,
        stop=int(curve.saturation(0.02)) if stop is None else stop,
        stop_interval=(1, 9),
        single_stop=4,
    )


def parts_of(figure):
    """Of one curve: (fitted line, points, marks where it stops to pay, band)."""
    (axes,) = figure.axes
    fitted, points, *stops = axes.lines
    (band,) = axes.collections
    assert isinstance(band, PolyCollection)
    return fitted, points, stops, band.get_paths()[0].vertices


def test_a_curve_is_its_fit_its_band_what_was_observed_and_where_it_stops():
    one = made()
    fitted, points, (stop,), band = parts_of(draw([one], seed=3))
    n, share = fitted.get_data()
    assert (n[0], n[-1]) == (1, max(12, one.stop))
    assert share == pytest.approx(one.curve.value(n))
    assert points.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    # One sample solves the mean of them, six what any of them solves.
    assert points.get_ydata() == pytest.approx(one.observed_N)
    assert points.get_ydata()[[0, -1]] == pytest.approx([RIGHT.mean(), RIGHT.any(1).mean()])
    assert stop.get_xydata().tolist() == [[one.stop, pytest.approx(one.curve.value(one.stop))]]
    low, high = one.curve.band(n, seed=3)
    for at, below, above in zip(n, low, high, strict=True):
        here = band[band[:, 0] == at][:, 1]
        assert (here.min(), here.max()) == pytest.approx((below, above))


def test_the_legend_names_model_task_and_stop():
    figure = draw([made(stop=5), made("large", "sums", stop=7)])
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["small: stop at 5", "large, sums: stop at 7"]
    assert axes.get_title("left") == "Samples that pay"
    assert axes.get_xlabel() == "samples"
    assert len(axes.collections) == 2


def test_too_few_questions_have_no_band():
    few = BetaTTSPM().fit(RIGHT[:9])
    one = replace(made(), curve=few, observed_N=few.observed, questions=9)
    (axes,) = draw([one, made()]).axes
    assert len(axes.collections) == 1
    assert len(axes.lines) == 6


def test_rounds_are_called_so_and_a_title_stays():
    (axes,) = draw([made(kind="sequential")]).axes
    assert (axes.get_xlabel(), axes.get_title("left")) == ("rounds", "Rounds that pay")
    (axes,) = draw([made()], "Ours").axes
    assert axes.get_title("left") == "Ours"


def test_a_stop_beyond_all_that_is_drawn_has_no_mark():
    fitted, _, stops, _ = parts_of(draw([made(stop=10**6)]))
    assert stops == []
    assert fitted.get_xdata()[-1] < 10**6


def test_of_more_than_have_a_colour_the_first_are_drawn(monkeypatch):
    monkeypatch.setattr(BetaTTSPM, "band", lambda self, n, *, seed: (0 * n, 0 * n + 1))
    (axes,) = draw([made(f"m{number}", stop=4) for number in range(SHOWN + 2)]).axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [f"m{number}: stop at 4" for number in range(SHOWN)]
    colours = {line.get_color() for line in axes.lines}
    assert len(colours) == SHOWN
