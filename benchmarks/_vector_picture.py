"""The picture of a record of `benchmarks/hnsw.py`: how many queries a second, at which recall, by data set and by class of what is kept.

python benchmarks/_vector_picture.py benchmarks/results/hnsw.json     # draws hnsw.svg beside it
"""

import json
import sys
from pathlib import Path
from typing import Any

from anabranch.report.style import MARKERS, SERIES, figure, to_svg

LEAST_RECALL = 0.8


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the picture of a record's ``curves``; nothing where it has none."""
    curves = record.get("curves") or []
    sets, kinds = _in_order(curves, "set"), _in_order(curves, "kind")
    if not curves:
        return
    # Ours first, in one colour throughout; a colour comes again only with another marker.
    names = sorted(_in_order(curves, "contestant"), key=lambda name: name != "ours")
    panels = {
        name: [
            [one for one in curves if (one["set"], one["kind"]) == (name, kind)]
            for kind in kinds
            if any((one["set"], one["kind"]) == (name, kind) for one in curves)
        ]
        for name in sets
    }
    columns = max(len(of_set) for of_set in panels.values())
    with figure(3.4 * columns, 2.5 * len(sets) + 0.6, nrows=len(sets), ncols=columns, squeeze=False) as (made, axes):
        for row, (name, of_set) in enumerate(panels.items()):
            for panel, of_panel in zip(axes[row], of_set, strict=False):
                panel.set_title(f"{name}, {of_panel[0]['kind']}")
                panel.set_xlabel("recall of the 10 nearest")
                _panel(panel, of_panel, names)
            for panel in axes[row][len(of_set) :]:
                panel.set_axis_off()
            axes[row][0].set_ylabel("queries a second")
        path.write_text(to_svg(made))


def _panel(panel: Any, curves: list[dict[str, Any]], names: list[str]) -> None:
    """Queries in one call: lines; one at a time: dashes."""
    for curve in curves:
        points = [point for point in curve["points"] if point[0] >= LEAST_RECALL]
        number, is_batch = names.index(curve["contestant"]), curve["way"] == "batch"
        # The first colour is ours.
        colour = SERIES[0] if number == 0 else SERIES[1 + (number - 1) % (len(SERIES) - 1)]
        panel.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            color=colour,
            marker=MARKERS[number % len(MARKERS)] if is_batch else "",
            linestyle="-" if is_batch else ":",
            label=curve["contestant"] if is_batch else None,
        )
    panel.set_yscale("log")
    panel.set_xlim(LEAST_RECALL, 1.0)
    panel.grid(visible=True)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="lower left")


def _in_order(curves: list[dict[str, Any]], field: str) -> list[str]:
    return list(dict.fromkeys(one[field] for one in curves))


if __name__ == "__main__":
    for given in sys.argv[1:]:
        draw(json.loads(Path(given).read_text()), Path(given).with_suffix(".svg"))
