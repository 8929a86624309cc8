"""The picture of an evaluation: cost against quality, with what every router must be held against."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from anabranch.report.style import GRID, INK, MARKERS, MUTED, SERIES, figure
from anabranch.routers.referee.curve import hull
from anabranch.routers.referee.report import Report, Standing

# Strategies with a colour of their own.
SHOWN = len(SERIES)
THOUSAND = 1000


def draw(report: Report, title: str = "") -> Figure:
    """Curves over cost where costs are known, else scores with their intervals; the caller turns it into PNG or SVG."""
    title = title or f"Routers on {report.num_test:,} questions"
    if report.cost_range is None or all(one.curve is None for one in report.strategies):
        return _scores(report, title)
    with figure(9.6, 5.4) as (made, axes):
        shown = sorted((one for one in report.strategies if one.curve), key=lambda one: -(one.aiq or 0.0))[:SHOWN]
        for number, one in enumerate(shown):
            _curve(axes, one, SERIES[number], MARKERS[number % len(MARKERS)])
        _reference(axes, report)
        axes.set(xlabel=f"{report.unit} per thousand queries", ylabel="mean score", title=title)
        axes.margins(x=0.04, y=0.06)
        axes.grid(color=GRID)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return made


def _curve(axes: Axes, one: Standing, colour: str, marker: str) -> None:
    """The hull of a strategy, its settings behind it, and its own setting."""
    assert one.curve is not None
    assert one.cost is not None
    line = hull(one.curve)  # type: ignore[arg-type]
    cost, quality = zip(*one.curve, strict=True)
    axes.plot([THOUSAND * value for value in cost], quality, ".", color=colour, markersize=2.5, alpha=0.45)
    axes.plot(line[:, 0] * THOUSAND, line[:, 1], color=colour)
    low, high = one.interval
    axes.errorbar(
        one.cost * THOUSAND,
        one.score,
        yerr=[[max(one.score - low, 0)], [max(high - one.score, 0)]],
        color=colour,
        marker=marker,
        markersize=6,
        capsize=2,
        elinewidth=0.8,
        linestyle="none",
        label=f"{one.name}  AIQ {one.aiq:.3f}",
    )


def _reference(axes: Axes, report: Report) -> None:
    """Single models and mixing among them, the best single one, random choice, and the oracle."""
    assert report.cost_range is not None
    middle = sum(report.cost_range) / 2
    for name, row in report.singles.items():
        is_left = row["cost"] <= middle
        axes.plot(row["cost"] * THOUSAND, row["score"], "o", color=MUTED, markersize=4)
        axes.annotate(
            name,
            (row["cost"] * THOUSAND, row["score"]),
            (5 if is_left else -5, -9),
            textcoords="offset points",
            ha="left" if is_left else "right",
            color=MUTED,
            fontsize=7,
        )
    if report.mixing is not None:
        cost, quality = zip(*report.mixing["curve"], strict=True)
        axes.plot(
            [value * THOUSAND for value in cost],
            quality,
            color=MUTED,
            linestyle=(0, (2, 2)),
            linewidth=1,
            label="single models, mixed at random",
        )
    best = report.baselines["best_single"]
    axes.axhline(best["score"], color=MUTED, linestyle=(0, (6, 3)), linewidth=1, label=f"best single ({best['model']})")
    random = report.baselines["random"]
    axes.plot(random["cost"] * THOUSAND, random["score"], "x", color=INK, markersize=7, label="random choice")
    oracle = report.baselines["oracle"]
    cost, quality = zip(*oracle.get("curve", [[oracle["cost"], oracle["score"]]]), strict=True)
    axes.plot(
        [value * THOUSAND for value in cost], quality, color=INK, linewidth=1.2, linestyle=(0, (1, 1)), label="oracle"
    )


def _scores(report: Report, title: str) -> Figure:
    ranked = report.ranked()
    with figure(7.6, max(2.6, 1.6 + 0.3 * len(ranked))) as (made, axes):
        for place, one in enumerate(ranked):
            axes.plot(one.interval, [place, place], color=SERIES[0], linewidth=1)
            axes.plot(one.score, place, "D", color=SERIES[0])
        lines: dict[str, tuple[str, Any]] = {
            "random": ("random choice", (0, (1, 2))),
            "best_single": (f"best single ({report.baselines['best_single']['model']})", (0, (6, 3))),
            "oracle": ("oracle", (0, (1, 1))),
        }
        for name, (label, style) in lines.items():
            colour = INK if name == "oracle" else MUTED
            axes.axvline(report.baselines[name]["score"], color=colour, linestyle=style, linewidth=1.2, label=label)
        axes.set_yticks(range(len(ranked)), [one.name for one in ranked])
        axes.set(xlabel="mean score, 95% interval", title=title)
        axes.set_ylim(len(ranked) - 0.5, -0.5)
        axes.grid(axis="x", color=GRID)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return made
