"""Pictures of a study of trained models: differences with intervals, learning curves, and quality against cost."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.ticker import EngFormatter, NullFormatter

from anabranch.files import atomic_file, atomic_write_text
from anabranch.report.style import GRID, INK, MARKERS, MUTED, SERIES, figure, horizontal_grid, to_png, to_svg
from anabranch.studies.harness import Results


def draw_arms(
    results: Results,
    path: Path,
    *,
    baseline: str,
    title: str,
    metric: str = "bits_per_byte",
    curves: Sequence[str] | None = None,
) -> None:
    """Write ``path``.png and ``path``.svg: on the left ours - ``baseline`` by arm, on the right the ``curves`` (default: of all arms)."""
    arms = [arm for arm in results.runs if results.values(arm, metric)]
    with figure(10, max(3.2, 1.4 + 0.34 * len(arms)), ncols=2, width_ratios=(1, 1)) as (made, (left, right)):
        made.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
        _draw_differences(left, results, arms, baseline, metric)
        _draw_curves(right, results, [arm for arm in arms if curves is None or arm in curves])
        png, svg = to_png(made), to_svg(made)
    _write(path, png, svg)


COSTS = (
    ("flops_per_token", "forward FLOPs per token"),
    ("parameters", "parameters"),
    ("tokens_per_cpu_second", "training tokens per CPU second"),
)


def draw_costs(
    results: Results,
    path: Path,
    *,
    title: str,
    metric: str = "bits_per_byte",
    told: str = "bits per byte (lower is better)",
    costs: Sequence[tuple[str, str]] = COSTS,
    scale: Literal["linear", "log"] = "linear",
) -> None:
    """Write ``path``.png and ``path``.svg: what each arm reaches against what it costs, with 95% intervals over seeds.

    Args:
        results: arms without ``metric`` are left out.
        path: without suffix.
        title: of the picture.
        metric: what is reached, and ``told``, its name.
        costs: a panel for each, as (metric, name).
        scale: of the costs.
    """
    arms = [arm for arm in results.runs if results.values(arm, metric)]
    with figure(11, 4.4, ncols=len(costs), sharey=True) as (made, panels):
        made.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
        for axes, (cost, label) in zip(panels, costs, strict=True):
            for number, arm in enumerate(arms):
                found, price = results.mean(arm, metric), results.mean(arm, cost)
                width = found.half_width if math.isfinite(found.half_width) else 0.0
                colour, marker, _ = _look(number)
                axes.errorbar(
                    price.mean, found.mean, yerr=width, fmt=marker, color=colour, capsize=3, markersize=6, label=arm
                )
            axes.set_xlabel(label)
            axes.set_xscale(scale)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            # Where a scale has one power of ten, matplotlib writes beside it in powers.
            axes.xaxis.set_minor_formatter(NullFormatter())
            horizontal_grid(axes)
        panels[0].set_ylabel(told)
        made.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
        png, svg = to_png(made), to_svg(made)
    _write(path, png, svg)


def _write(path: Path, png: bytes, svg: str) -> None:
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)


def _draw_differences(axes: Any, results: Results, arms: list[str], baseline: str, metric: str) -> None:
    base = results.values(baseline, metric)
    others = [arm for arm in arms if arm != baseline]
    for row, arm in enumerate(others):
        own = results.values(arm, metric)
        for seed in sorted(own.keys() & base.keys()):
            axes.plot(own[seed] - base[seed], row, "o", color=MUTED, markersize=3.5, alpha=0.6, zorder=2)
        difference = results.compare(metric, arm, baseline)
        if not difference.count:
            continue
        width = difference.half_width if math.isfinite(difference.half_width) else 0.0
        axes.errorbar(difference.mean, row, xerr=width, fmt="D", color=SERIES[0], capsize=3, markersize=5, zorder=3)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(others)), others)
    axes.set_ylim(max(len(others), 1) - 0.5, -0.5)
    axes.grid(axis="x", color=GRID)
    axes.set_xlabel(f"bits per byte, difference to {baseline} (left is better)")
    axes.set_title("paired differences, 95% intervals")


def _look(number: int) -> tuple[str, str, str]:
    """Colour, marker and line of an arm; where colours begin anew, markers and lines are others."""
    again, colour = divmod(number, len(SERIES))
    return SERIES[colour], MARKERS[(number + again) % len(MARKERS)], ("-", "--", ":")[again % 3]


def _draw_curves(axes: Any, results: Results, arms: list[str]) -> None:
    lowest, early = [], []
    for number, arm in enumerate(arms):
        curves = [metrics["curve"] for metrics in results.runs[arm].values() if metrics.get("curve")]
        if not curves:
            continue
        points = list(zip(*curves, strict=False))
        steps = [point[0][0] for point in points]
        values = [sum(run[1] for run in point) / len(point) for point in points]
        lowest.append(values[-1])
        early.append(values[min(1, len(values) - 1)])
        colour, marker, line = _look(number)
        axes.plot(steps, values, line, color=colour, marker=marker, markersize=3.5, label=arm)
    if lowest:
        # The first point of all is far above everything.
        bottom, top = min(lowest), max(early)
        margin = max(0.05 * (top - bottom), 0.01)
        axes.set_ylim(bottom - margin, top + margin)
        axes.legend(ncols=2)
    horizontal_grid(axes)
    axes.set_xlabel("steps")
    axes.set_title("bits per byte on held-out text")
