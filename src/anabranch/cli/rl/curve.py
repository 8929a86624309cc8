"""The picture of ``anabranch rl eval``: how returns grew with samples, and what a policy came to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter

from anabranch.errors import DataError
from anabranch.files import atomic_file, atomic_write_text
from anabranch.report.style import INK, MUTED, SERIES, figure, horizontal_grid, to_png, to_svg

__all__ = ["draw_curve"]

# Rollouts that a line averages over, of all that there are.
_SMOOTH = 30


def draw_curve(records: Sequence[dict[str, Any]], measures: dict[str, Any], path: Path, title: str) -> None:
    """Write the picture, all or nothing, in the form that the name ends in.

    Args:
        records: metrics of the run.
        measures: of an evaluation, drawn with its 95 % interval at the end.
        path: ``.svg`` or ``.png``.
        title: above it.

    Raises DataError if no episode ended while the run trained.
    """
    points = [
        (record["samples"], record["training_return"])
        for record in records
        if record.get("kind") == "train" and record.get("training_return") is not None
    ]
    if not points:
        raise DataError("no episode ended in a rollout that was logged, so there is no curve; train for longer")
    with figure(7, 3.6) as (made, axes):
        made.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
        samples, returns = zip(*points, strict=True)
        axes.plot(samples, returns, color=MUTED, linewidth=0.8, alpha=0.6, label="episodes of a rollout, tried out")
        axes.plot(samples, _smoothed(returns), color=SERIES[0], label="the same, averaged")
        width = measures.get("return_interval")
        axes.errorbar(
            [samples[-1]],
            [measures["mean_return"]],
            yerr=None if width is None or width != width else [width],
            fmt="o",
            color=SERIES[1],
            capsize=3,
            label=f"{measures['episodes']} episodes, nothing tried out",
        )
        axes.set_xlabel("samples")
        axes.set_ylabel("return of an episode")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        horizontal_grid(axes)
        axes.legend(loc="best")
        if path.suffix == ".svg":
            atomic_write_text(path, to_svg(made))
            return
        drawn = to_png(made)
    with atomic_file(path) as temporary:
        temporary.write_bytes(drawn)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Each averaged with those before it, over a thirtieth of all."""
    width = max(len(values) // _SMOOTH, 1)
    return [sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(end - width, 0) : end])]
