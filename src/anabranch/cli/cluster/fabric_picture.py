"""The picture of ``anabranch cluster fabric``: how evenly links are loaded by each scheme, and when its last flow ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anabranch.files import atomic_file
from anabranch.report.style import INK, MUTED, SERIES, figure, horizontal_grid, to_png, to_svg

if TYPE_CHECKING:
    from anabranch.cluster.fabric import Plan

# Points of a curve; more cannot be told apart.
MOST_POINTS = 400


def draw_fabric(plans: Sequence[Plan], rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Write the picture, all or nothing, in the form that the name ends in.

    Left, the time for which each link between switches works in all steps, the busiest first; right, when the last flow ends, and for how
    long the busiest link works in all steps, cables of hosts among them, before which nothing ends.
    """
    from anabranch.cluster.fabric import loads

    topology = plans[0].topology
    hosts = topology.num_hosts
    inside_L = (topology.link_from >= hosts) & (topology.link_to >= hosts) & topology.is_up_L
    unit, factor = _unit(max(row["completion_s"] for row in rows))
    with figure(11, 4.2, ncols=2, width_ratios=(3, 2)) as (made, (left, right)):
        made.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
        if not inside_L.any():
            left.text(
                0.5, 0.5, "one switch: no links between switches", ha="center", color=MUTED, transform=left.transAxes
            )
        for number, plan in enumerate(plans if inside_L.any() else ()):
            busy = np.sort((8 * loads(plan) / topology.capacity_L)[inside_L])[::-1] * factor
            share = np.linspace(0, 1, len(busy))
            keep = np.unique(np.linspace(0, len(busy) - 1, MOST_POINTS).astype(int))
            again, colour = divmod(number, len(SERIES))
            line = ("-", "--", ":", "-.")[(number + again) % 4]
            left.plot(share[keep], busy[keep], line, color=SERIES[colour], label=plan.scheme)
        left.set(xlabel="share of the links between switches, the busiest first", ylabel=f"time a link works, {unit}")
        left.set_xlim(0, 1)
        left.set_ylim(0)
        horizontal_grid(left)
        if inside_L.any():
            left.legend(ncols=2)
        place = np.arange(len(rows))
        right.barh(
            place,
            [row["completion_s"] * factor for row in rows],
            color=[SERIES[n % len(SERIES)] for n in place],
            height=0.6,
        )
        right.plot([_busiest_s(plan) * factor for plan in plans], place, "|", color=INK, markersize=14)
        right.set_yticks(place, [row["scheme"] for row in rows])
        right.invert_yaxis()
        right.set_xlabel(f"completion, {unit} (line: how long the busiest link works)")
        content = to_svg(made).encode() if path.suffix == ".svg" else to_png(made)
    with atomic_file(path, clears=True) as temporary:
        temporary.write_bytes(content)


def _busiest_s(plan: Plan) -> float:
    """Seconds for which the busiest link works, over all steps."""
    from anabranch.cluster.fabric import loads

    up_L = plan.topology.is_up_L
    return float((8 * loads(plan)[up_L] / plan.topology.capacity_L[up_L]).max(initial=0.0))


def _unit(seconds: float) -> tuple[str, float]:
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
