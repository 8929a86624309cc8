"""Pictures of what an oracle over routes finds (Duo-LLM): losses over the budget, gains with their control, where big is used."""
# Shapes: G budgets 0 to Y, Y layers, P parts of a sequence

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.files import atomic_file, atomic_write_text
from anabranch.report.style import MARKERS, SEQUENTIAL, SERIES, figure, horizontal_grid, to_png, to_svg

__all__ = ["LINES", "draw_curves", "draw_heat", "draw_oracle", "finish", "oracle_files", "save"]

Curve = Sequence[float] | np.ndarray
# What an oracle is beside, by its name in `OracleResult`.
LINES = {
    "oracle": "oracle",
    "fixed": "best fixed route",
    "random": "best of random routes",
    "mean": "mean route",
}


def oracle_files(place: str | Path) -> list[Path]:
    """What `draw_oracle` writes: ``place`` with .png and .svg behind it."""
    return [Path(place).with_name(f"{Path(place).name}.{kind}") for kind in ("png", "svg")]


def draw_oracle(table: Mapping[str, Any], place: str | Path, *, unit: str = "nats per token") -> None:
    """The picture of what `anabranch.depth.duo_llm.analyze` gave for all budgets, as PNG and SVG."""
    rows, shuffled = table["rows"], table.get("shuffled")
    curve = {name: np.array([row[name] for row in rows]) for name in LINES}
    gains = {"real targets": curve["mean"] - curve["oracle"]}
    if shuffled is not None:
        gains["shuffled targets"] = np.array([row["mean"] - row["oracle"] for row in shuffled])
    middle = (len(rows) - 1) // 2
    with figure(13, 4.8, ncols=3, width_ratios=(1.2, 1, 1)) as (made, (left, centre, right)):
        draw_curves(left, {label: curve[name] for name, label in LINES.items()}, unit)
        draw_curves(centre, gains, "gain over the mean route")
        draw_heat(right, np.array(table["heat"][str(middle)]), middle)
        finish(left, len(rows))
        finish(centre, len(rows))
        save(made, place)


def draw_curves(axes: Any, curves: Mapping[str, Curve], title: str) -> None:
    """A line over the budgets for each name; one that lies on an earlier one is dashed over it, and said to."""
    drawn: dict[str, np.ndarray] = {}
    for number, (label, curve) in enumerate(curves.items()):
        value_G = np.asarray(curve, float)
        span = np.ptp(np.concatenate([value_G, *drawn.values()])) if drawn else 0.0
        covered = [
            name for name, earlier_G in drawn.items() if np.allclose(value_G, earlier_G, rtol=0, atol=0.005 * span)
        ]
        # The one below is seen through the gaps, and around smaller markers.
        style: dict[str, Any] = {"linestyle": (0, (4, 4)), "markersize": 2.5} if covered else {}
        shown = f"{label} (as {covered[0]})" if covered else label
        axes.plot(value_G, color=SERIES[number], marker=MARKERS[number], label=shown, **style)
        drawn[label] = value_G
    axes.set_title(title)


def finish(axes: Any, num_budgets: int) -> None:
    """What lines over budgets have beside them, once all are drawn."""
    horizontal_grid(axes)
    axes.set_xticks(range(num_budgets))
    axes.set_xlabel("big layers")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def draw_heat(axes: Any, heat_YP: np.ndarray, budget: int) -> None:
    """How many tokens take big, by layer and part of the sequence."""
    axes.imshow(heat_YP, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    for (layer, part), share in np.ndenumerate(heat_YP):
        axes.text(part, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(heat_YP.shape[1]), [str(part + 1) for part in range(heat_YP.shape[1])])
    axes.set_yticks(range(heat_YP.shape[0]))
    axes.set_xlabel("tenth of the sequence")
    axes.set_ylabel("layer")
    axes.set_title(f"% of tokens with big, {budget} big layers")


def save(made: Any, place: str | Path) -> None:
    """A figure as PNG and SVG, see `oracle_files`; each whole or not at all."""
    (as_png, as_svg), png, svg = oracle_files(place), to_png(made), to_svg(made)
    with atomic_file(as_png) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(as_svg, svg)
