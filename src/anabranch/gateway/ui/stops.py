"""How many answers pay, as a picture: the curve of a model that `best_of` went by last, and where it stops.

Drawn from the decisions that the page shows anyway, so nothing of it is kept for the picture.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from anabranch.bounds import is_whole
from anabranch.errors import InputError
from anabranch.gateway.ui.snapshot import Seen
from anabranch.test_time import BetaTTSPM

HEIGHT_PX, MOST_CURVES, MOST_POINTS = 190, 4, 64


@dataclass(frozen=True)
class Stop:
    """What a decision went by.

    Attributes:
        name: strategy and model.
        curve: share of questions solved with so many answers.
        stop: answers that pay.
        questions: that it was learned from.
    """

    name: str
    curve: BetaTTSPM
    stop: int
    questions: int


def stops_of(recent: Sequence[Seen]) -> list[Stop]:
    """The latest of each strategy and model; what is no such curve is passed over."""
    found: dict[str, Stop] = {}
    for seen in recent:
        candidate = seen.candidates[0].get("model") if seen.candidates else None
        name = f"{seen.strategy}, {candidate}"
        if name not in found and len(found) < MOST_CURVES and (stop := _read(name, seen.details)) is not None:
            found[name] = stop
    return list(found.values())


def _read(name: str, details: Mapping[str, Any]) -> Stop | None:
    curve, stop, questions = (details.get(field) for field in ("curve", "budget", "questions"))
    if not isinstance(curve, Mapping) or not (is_whole(stop) and is_whole(questions)):
        return None
    try:
        made = BetaTTSPM(curve.get("f_max"), curve.get("a"), curve.get("b"))
    except InputError:
        return None
    return Stop(name, made, int(stop), int(questions)) if made.is_fitted and 0 <= stop <= MOST_POINTS else None  # type: ignore[arg-type, operator]


def stops_card(stops: Sequence[Stop]) -> str:
    """All of them, one beside the other."""
    return f'<div class="several">{"".join(_picture(one) for one in stops)}</div>'


def _picture(one: Stop) -> str:
    end = max(8, min(MOST_POINTS, 2 * one.stop))
    base = HEIGHT_PX - 26
    shares = [float(share) for share in one.curve.value(range(end + 1))]

    def to_x(n: float) -> float:
        return 9 + 88 * n / end

    def to_y(share: float) -> float:
        return 12 + (base - 12) * (1 - share)

    parts = [f'<line x1="9%" x2="98%" y1="{base}" y2="{base}" class="axis"/>']
    for step in range(5):
        y = to_y(step / 4)
        parts.append(f'<line x1="9%" x2="98%" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="8%" y="{y + 4:.1f}" class="tick" text-anchor="end">{step * 25}%</text>')
    ticks = sorted({0, end // 2, end})
    parts += [f'<text x="{to_x(n):.2f}%" y="{HEIGHT_PX - 8}" class="tick">{n}</text>' for n in ticks]
    for (n, low), (_, high) in itertools.pairwise(enumerate(shares)):
        ends = f'x1="{to_x(n):.2f}%" y1="{to_y(low):.1f}" x2="{to_x(n + 1):.2f}%" y2="{to_y(high):.1f}"'
        parts.append(f'<line class="hull" {ends}/>')
    x, y = to_x(one.stop), to_y(shares[one.stop])
    about = f"{one.stop} answers pay; about {shares[one.stop]:.0%} of questions are solved so"
    parts.append(f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{y:.1f}" y2="{base}" class="grid"/>')
    parts.append(f'<circle class="live" cx="{x:.2f}%" cy="{y:.1f}" r="5.5"><title>{escape(about)}</title></circle>')
    learned = f"{one.questions:,} questions seen" if one.questions else "nothing seen yet"
    picture = f'<svg class="chart" height="{HEIGHT_PX}" role="img" aria-label="{escape(f"{one.name}: {about}")}">{"".join(parts)}</svg>'
    return f"<div><h3>{escape(one.name)}</h3>{picture}<p>{escape(about)}; {learned}.</p></div>"
