"""The picture of `sample_curves`: what was observed, what was fitted, between which bounds, and where it stops to pay."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from anabranch.report.style import GRID, MARKERS, SERIES, figure
from anabranch.routers.sample_curves import MOST_N, SampleCurve

# Curves with a colour of their own.
SHOWN = len(SERIES)


def draw(found: Sequence[SampleCurve], title: str = "", *, seed: int = 0) -> Figure:
    """Curves over samples; the caller turns it into PNG or SVG. Of more than eight the first are drawn."""
    shown = found[:SHOWN]
    last = max(max(2 * len(one.observed_N), min(one.stop, MOST_N)) for one in shown)
    n_N = np.unique(np.round(np.geomspace(1, last, 80)).astype(int))
    with figure(9.6, 5.0) as (made, axes):
        for number, one in enumerate(shown):
            colour = SERIES[number]
            points = np.arange(1, len(one.observed_N) + 1)
            # Of too few questions it would be all there is.
            if not one.too_few:
                low_N, high_N = one.curve.band(n_N, seed=seed)
                axes.fill_between(n_N, low_N, high_N, color=colour, alpha=0.15, linewidth=0)
            name = one.model if one.task is None else f"{one.model}, {one.task}"
            axes.plot(n_N, one.curve.value(n_N), color=colour, label=f"{name}: stop at {one.stop}")
            axes.plot(points, one.observed_N, MARKERS[number], color=colour, markersize=4)
            if one.stop <= last:
                axes.plot([one.stop], [one.curve.value(one.stop)], "|", color=colour, markersize=22)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
        rounds = shown[0].kind == "sequential"
        axes.set(
            xlabel="rounds" if rounds else "samples",
            ylabel="share of questions solved",
            title=title or ("Rounds that pay" if rounds else "Samples that pay"),
            ylim=(0, 1.02),
        )
        axes.grid(color=GRID)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return made
