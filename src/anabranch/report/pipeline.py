"""The picture of a pipeline's step: a row for each stage, a bar for each piece of work, what is left white is the bubble."""

from collections.abc import Mapping, Sequence
from typing import Any

from anabranch.report.style import SERIES, figure, to_png, to_svg

_COLOURS = {"forward": SERIES[0], "backward": SERIES[1], "weight": SERIES[2], "again": SERIES[5]}
# Bars of whose numbers there is room for.
_MOST_NUMBERS = 600


def pipeline_picture(
    bars: Sequence[Mapping[str, Any]],
    *,
    num_stages: int,
    title: str,
    is_svg: bool,
    unit: str = "ms",
    scale: float = 1e3,
) -> str | bytes:
    """The picture as text (SVG) or bytes (PNG).

    Args:
        bars: ``stage``, ``micro_batch``, ``kind``, ``visit``, ``start_s`` and ``end_s`` of each, as `Timeline.to_dict` gives them.
        num_stages: rows.
        title: above the picture.
        is_svg: or PNG.
        unit, scale: of the axis; seconds are multiplied by ``scale``.
    """
    end = max((bar["end_s"] for bar in bars), default=1.0) * scale
    with figure(max(6.0, min(16.0, len(bars) / max(num_stages, 1) * 0.32)), 1.1 + 0.42 * num_stages) as (made, axes):
        for kind, colour in _COLOURS.items():
            chosen = [bar for bar in bars if bar["kind"] == kind]
            if not chosen:
                continue
            axes.barh(
                [bar["stage"] for bar in chosen],
                [(bar["end_s"] - bar["start_s"]) * scale for bar in chosen],
                left=[bar["start_s"] * scale for bar in chosen],
                height=0.82,
                color=colour,
                edgecolor="white",
                linewidth=0.6,
                label=kind,
            )
        if len(bars) <= _MOST_NUMBERS:
            for bar in bars:
                middle = (bar["start_s"] + bar["end_s"]) / 2 * scale
                text = str(bar["micro_batch"]) + "'" * bar["visit"]
                axes.text(middle, bar["stage"], text, ha="center", va="center", fontsize=7, color="white")
        axes.set_title(title)
        axes.set_xlabel(f"time ({unit})")
        axes.set_ylabel("stage")
        axes.set_yticks(range(num_stages))
        axes.set_xlim(0, end)
        axes.set_ylim(num_stages - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return to_svg(made) if is_svg else to_png(made)
