"""Pictures of the page as SVG. Widths are percentages and heights pixels, so that text keeps its size on a phone."""

import itertools
import math
from collections.abc import Callable, Sequence
from html import escape

from anabranch.gateway.metrics import BUCKET_S, Moment
from anabranch.gateway.ui.snapshot import Buckets, Point

TIMELINE_PX, HISTOGRAM_PX, PARETO_PX = 120, 110, 300
NO_QUALITY = "No quality is known yet: score answers with <code>POST /v1/feedback</code>, or route by a fitted router."

# Columns of the timeline: a minute each.
SLOTS = 60


def bar(share: float) -> str:
    """A bar as wide as ``share`` of its place."""
    width = 100 * min(max(share, 0.0), 1.0)
    rail = '<rect width="100%" height="100%" class="rail"/>'
    return f'<svg class="bar" aria-hidden="true">{rail}<rect width="{width:.1f}%" height="100%"/></svg>'


def histogram(buckets: Buckets, what: str) -> str:
    """Columns of a histogram, empty ones at both ends left out."""
    full = [at for at, (_, count) in enumerate(buckets) if count]
    if not full:
        return '<p class="none">Nothing measured yet.</p>'
    first, last = max(full[0] - 1, 0), min(full[-1] + 1, len(buckets) - 1)
    shown = buckets[first : last + 1]
    top, width = max(count for _, count in shown), 100 / len(shown)
    parts = []
    for at, (upper, count) in enumerate(shown):
        height = (HISTOGRAM_PX - 34) * count / top
        label = _seconds(upper) if upper != math.inf else "more"
        middle = (at + 0.5) * width
        parts.append(
            f'<rect class="column" x="{at * width + 0.8:.2f}%" width="{width - 1.6:.2f}%" y="{HISTOGRAM_PX - 18 - height:.1f}" '
            f'height="{height:.1f}"><title>{count:,} up to {label}</title></rect>'
            f'<text x="{middle:.2f}%" y="{HISTOGRAM_PX - 4}" class="tick{" second" if at % 2 else ""}">{label}</text>'
        )
        if count:
            parts.append(
                f'<text x="{middle:.2f}%" y="{HISTOGRAM_PX - 22 - height:.1f}" class="tick">{_short(count)}</text>'
            )
    return f'<svg class="chart" height="{HISTOGRAM_PX}" role="img" aria-label="{escape(what)}">{"".join(parts)}</svg>'


def timeline(moments: Sequence[Moment], now_s: float) -> str:
    """The last hour, a column a minute: requests, errors in them, and marks where breakers opened."""
    step = 3600 // SLOTS
    begin = (int(now_s) // step - SLOTS + 1) * step
    requests, errors, opened = [0] * SLOTS, [0] * SLOTS, [set[str]() for _ in range(SLOTS)]
    for moment in moments:
        at = (moment.start - begin) // step
        if 0 <= at < SLOTS:
            requests[at] += moment.requests
            errors[at] += moment.errors
            opened[at] |= set(moment.opened)
    top, base, width = max(*requests, 1), TIMELINE_PX - 18, 100 / SLOTS
    parts = [f'<line x1="0" x2="100%" y1="{base}" y2="{base}" class="axis"/>']
    for at in range(SLOTS):
        ago = SLOTS - 1 - at
        title = f"<title>{ago} min ago: {requests[at]:,} requests, {errors[at]:,} errors</title>"
        for count, kind in ((requests[at], "column"), (errors[at], "error")):
            height = (base - 16) * count / top
            if count:
                parts.append(
                    f'<rect class="{kind}" x="{at * width + 0.15:.2f}%" width="{width - 0.3:.2f}%" y="{base - height:.1f}" '
                    f'height="{height:.1f}">{title}</rect>'
                )
        if opened[at]:
            names = escape(", ".join(sorted(opened[at])))
            parts.append(
                f'<circle class="opened" cx="{(at + 0.5) * width:.2f}%" cy="7" r="4"><title>opened: {names}</title></circle>'
            )
    for share, label, anchor in ((0, "1 h ago", "start"), (50, "30 min", "middle"), (100, "now", "end")):
        parts.append(f'<text x="{share}%" y="{TIMELINE_PX - 4}" class="tick" text-anchor="{anchor}">{label}</text>')
    return (
        f'<svg class="chart" height="{TIMELINE_PX}" role="img" aria-label="requests and errors of the last hour, '
        f'every {BUCKET_S} seconds counted">{"".join(parts)}</svg>'
    )


def pareto(points: Sequence[Point]) -> str:
    """Cost (logarithmic where it spans more than a factor of 10) against quality, with the line nobody is above."""
    if not points:
        return f'<p class="none">{NO_QUALITY}</p>'
    to_x, ticks = _scale([point.cost for point in points])
    low, high = min(point.quality for point in points), max(point.quality for point in points)
    pad = (high - low) * 0.15 or 0.05
    # Shares end at 0 and 1, and so does their axis.
    low = max(low - pad, 0.0) if low >= 0 else low - pad
    high = min(high + pad, 1.0) if high <= 1 else high + pad
    if high - low < 1e-9:
        low, high = (low - pad, high) if high >= 1 else (low, high + pad)
    base = PARETO_PX - 26

    def to_y(quality: float) -> float:
        return 12 + (base - 12) * (high - quality) / (high - low)

    parts = [f'<line x1="9%" x2="98%" y1="{base}" y2="{base}" class="axis"/>']
    parts.extend(
        f'<text x="{to_x(cost):.2f}%" y="{PARETO_PX - 8}" class="tick">${cost * 1000:.2g}</text>' for cost in ticks
    )
    for step in range(5):
        quality = low + (high - low) * step / 4
        y = to_y(quality)
        parts.append(f'<line x1="9%" x2="98%" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="8%" y="{y + 4:.1f}" class="tick" text-anchor="end">{quality:.2f}</text>')
    hull = frontier(points)
    for one, two in itertools.pairwise(hull):
        ends = f'x1="{to_x(one.cost):.2f}%" y1="{to_y(one.quality):.1f}" x2="{to_x(two.cost):.2f}%" y2="{to_y(two.quality):.1f}"'
        parts.append(f'<line class="hull" {ends}/>')
    placed: list[tuple[float, float]] = []
    drawn = sorted(points, key=lambda point: (point.kind == "live", point.cost))
    parts.extend(_mark(point, to_x(point.cost), to_y(point.quality), placed) for point in drawn)
    return (
        f'<svg class="chart" height="{PARETO_PX}" role="img" aria-label="cost against quality">{"".join(parts)}</svg>'
    )


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in both cost and quality, by rising cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.quality)):
        if point.kind != "live" and (not best or point.quality > best[-1].quality):
            best.append(point)
    return best


def _mark(point: Point, x: float, y: float, placed: list[tuple[float, float]]) -> str:
    """A point with its name, above or below it, where no other name is."""
    text_y = next(
        (
            at
            for at in (y - 10, y + 19, y - 24, y + 33)
            if all(abs(x - px) > 14 or abs(at - py) > 12 for px, py in placed)
        ),
        y - 10,
    )
    placed.append((x, text_y))
    anchor = "end" if x > 70 else "start" if x < 20 else "middle"
    about = f"{point.name}: ${point.cost * 1000:.4g} per 1000 requests, quality {point.quality:.3f}" + (
        f", {point.count:,} requests" if point.count else ""
    )
    ring = f'<circle class="ring" cx="{x:.2f}%" cy="{y:.1f}" r="11"/>' if point.kind == "live" else ""
    return (
        f'{ring}<circle class="{escape(point.kind)}" cx="{x:.2f}%" cy="{y:.1f}" r="5.5"><title>{escape(about)}</title></circle>'
        f'<text x="{x:.2f}%" y="{text_y:.1f}" class="name" text-anchor="{anchor}">{escape(point.name)}</text>'
    )


def _scale(costs: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    """Cost to percent, and up to four costs to label."""
    low, high = min(costs), max(costs)
    positive = [cost for cost in costs if cost > 0]
    is_log = low > 0 and high / low > 10
    left, right = (min(positive) / 1.3, high * 1.3) if is_log else (0.0, high * 1.1 or 1.0)

    def to_x(cost: float) -> float:
        share = math.log(cost / left) / math.log(right / left) if is_log else (cost - left) / (right - left)
        return 10 + 87 * share

    if is_log:
        return to_x, [left * (right / left) ** share for share in (0.08, 0.36, 0.64, 0.92)]
    return to_x, [right * share for share in (0.0, 0.3, 0.6, 0.9)]


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:g} ms" if seconds < 1 else f"{seconds:g} s"


def _short(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 10**6 else f"{count / 1e3:.1f}k" if count >= 10**4 else f"{count:,}"
