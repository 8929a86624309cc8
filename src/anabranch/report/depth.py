"""Pictures of depth routing: which blocks run how often, and agreement with the whole model over layers, beside what needs no routers."""
# Shapes: L blocks

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.report.routes import oracle_files, save
from anabranch.report.style import MARKERS, SERIES, figure, horizontal_grid

__all__ = ["depth_files", "draw_depth"]

# By their names in the table of `anabranch.depth.dr_llm.compare`.
LINES = {"routed": "routers", "shortgpt": "ShortGPT", "random": "random skip", "early_exit": "early exit"}
# Where the knob leaves routers as they were trained.
_PLAIN = -0.5


def depth_files(place: str | Path) -> list[Path]:
    """What `draw_depth` writes: ``place`` with .png and .svg behind it."""
    return oracle_files(place)


def draw_depth(table: Mapping[str, Any], place: str | Path) -> None:
    """The picture of what `anabranch.depth.dr_llm.compare` gave, with ``num_blocks``, as PNG and SVG."""
    rows = table["curve"]
    plain = next(row for row in rows if row["control"] == _PLAIN)
    with figure(13, 4.4, ncols=2, width_ratios=(1.1, 1)) as (made, (left, right)):
        _draw_uses(left, np.array(plain["routed"]["uses"]))
        _draw_curves(right, rows)
        save(made, place)


def _draw_uses(axes: Any, use_L: np.ndarray) -> None:
    """Runs of each block per token; above once and below it in different colours."""
    place_L = np.arange(len(use_L))
    axes.bar(place_L, np.minimum(use_L, 1), color=SERIES[0], label="run")
    axes.bar(place_L, np.maximum(use_L - 1, 0), bottom=1, color=SERIES[1], label="repeated")
    axes.set_ylim(0, 1 if use_L.max() <= 1 else use_L.max() * 1.05)
    axes.set_xlabel("block")
    axes.set_title("runs per token")
    horizontal_grid(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_curves(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    for number, (name, label) in enumerate(LINES.items()):
        points = sorted((row[name]["layers_per_token"], 100 * row[name]["agreement"]) for row in rows)
        axes.plot(*zip(*points, strict=True), color=SERIES[number], marker=MARKERS[number], label=label)
    axes.set_xlabel("layers per token")
    axes.set_title("% of tokens foretold as by the whole model")
    horizontal_grid(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
