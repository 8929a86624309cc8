"""The pictures of what a report says of caches of experts, each a `Figure`, or None where there is nothing to show."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from anabranch.report.caching import CACHES, MAIN, CacheFacts
from anabranch.report.style import INK, MARKERS, MUTED, SERIES, figure, horizontal_grid
from anabranch.report.summary import Summary
from anabranch.report.tables import POLICIES
from anabranch.report.windows import WindowFacts

WIDTH = 9.0  # inches
MOST_CACHES = 3  # of those that were asked for, that one picture has


def caches(summary: Summary) -> Figure | None:
    """SRP of each layer, and what caches of each size hit."""
    facts = summary.caches
    if facts is None:
        return None
    with figure(WIDTH, 3.4, ncols=2) as (made, (left, right)):
        numbers = list(facts.srp_by_layer)
        left.bar(range(len(numbers)), list(facts.srp_by_layer.values()), color=SERIES[0], width=0.7)
        left.axhline(facts.always_on, color=INK, linewidth=1, label="all experts always on")
        step = max(1, -(-len(numbers) // 16))
        left.set_xticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
        left.set(title=f"Consistency over {MAIN} tokens (SRP)", ylabel="F1", xlabel="layer")
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
        _hits_by_size(right, facts)
        for axes in (left, right):
            _shares(axes)
    return made


def _hits_by_size(axes: Axes, facts: CacheFacts) -> None:
    """Points where there are sizes; a cache between two holds what the smaller one does."""
    marked = len(facts.ratios) <= 24
    for series, (policy, label) in enumerate(CACHES.items()):
        marker = MARKERS[series] if marked else None
        axes.plot(
            facts.ratios, facts.hits[policy], color=SERIES[series], label=label, drawstyle="steps-post", marker=marker
        )
    if not facts.is_everything:
        axes.axvline(facts.recommended_ratio, color=MUTED, linestyle="--", linewidth=1, label="recommended size")
    shared = " of a pool" if facts.shared else ""
    axes.set(title="Hits of an expert cache", ylabel="share of accesses", xlabel=f"cache size / active experts{shared}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2)


def windows(summary: Summary) -> Figure | None:
    """SRP at the windows that were asked for, and the hits of each policy there, of the first sizes of a cache that were."""
    found = sorted(summary.windows, key=lambda facts: facts.window)
    if not found:
        return None
    sizes = found[0].caches
    shown = sizes[:MOST_CACHES]
    with figure(WIDTH, 3.6, ncols=1 + len(shown)) as (made, (left, *rest)):
        place = range(len(found))
        left.bar(place, [facts.srp for facts in found], color=SERIES[0], width=0.6)
        for at, facts in enumerate(found):
            if facts.srp_interval is not None:
                left.plot([at, at], facts.srp_interval, color=INK, linewidth=1.2)
        left.set(title="SRP", ylabel="F1")
        for at, axes in enumerate(rest):
            _hits_by_window(axes, found, at)
        made.legend(*rest[0].get_legend_handles_labels(), loc="outside lower right", ncols=len(POLICIES))
        if len(shown) < len(sizes):
            made.suptitle(f"The first {len(shown)} of {len(sizes)} caches", x=0.01, ha="left", size=9, color=MUTED)
        for axes in (left, *rest):
            axes.set_xticks(place, [str(facts.window) for facts in found])
            axes.set(xlabel="window (tokens)", xlim=(-0.6, len(found) - 0.4))
            _shares(axes)
    return made


def _hits_by_window(axes: Axes, found: list[WindowFacts], at: int) -> None:
    for series, (policy, label) in enumerate(POLICIES.items()):
        hits = [facts.hits[policy][at] for facts in found]
        # What lies at one height stands side by side.
        place = np.arange(len(found)) + 0.08 * (series - (len(POLICIES) - 1) / 2)
        axes.plot(
            place, hits, color=SERIES[series], marker=MARKERS[series], linestyle="none", label=label.replace("\n", " ")
        )
    axes.set_title(f"Hits, cache of {found[0].caches[at]:g}\N{MULTIPLICATION SIGN}")


def _shares(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    # A point at 1 is drawn whole.
    for line in axes.lines:
        line.set_clip_on(False)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    horizontal_grid(axes)
