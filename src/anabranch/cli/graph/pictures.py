"""Pictures of graphs, embeddings and searches, as PNG or SVG, in the style of our reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anabranch.graph.beside import new_file
from anabranch.report.style import GRID, INK, MARKERS, MUTED, SERIES, figure, to_png, to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from anabranch.graph import Graph

# Of a point, that a map keeps near.
NEIGHBOURS = 30

# Characters of a node's name in a map.
LONGEST_NAME = 24

# Classes with a colour of their own; more are drawn in grey.
LABELLED = len(SERIES)


def save(made: Figure, path: Path) -> None:
    """Write a picture, all or nothing, in the form that the name ends in."""
    content = to_svg(made).encode() if path.suffix == ".svg" else to_png(made)
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def draw_degrees(graph: Graph, name: str, path: Path) -> None:
    """Share of nodes with at least so many edges, both axes logarithmic; in and out apart where edges have a direction."""
    out_N = graph.degree_N
    kinds = [("edges", out_N)]
    if graph.is_directed:
        kinds = [("edges out", out_N), ("edges in", np.bincount(graph.indices, minlength=graph.num_nodes))]
    with figure(6.4, 4.2) as (made, axes):
        for number, (label, degree_N) in enumerate(kinds):
            value, count = np.unique(degree_N[degree_N > 0], return_counts=True)
            if not len(value):
                continue
            share = count[::-1].cumsum()[::-1] / graph.num_nodes
            axes.plot(
                value, share, MARKERS[number], color=SERIES[number], markersize=3.2, markeredgewidth=0, label=label
            )
        # In and out alike.
        mean = float(out_N.mean()) if graph.num_nodes else 0.0
        if mean > 0:
            axes.axvline(mean, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"mean {mean:.2f}",
                (mean, 1),
                (4, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                color=MUTED,
                fontsize=8.5,
            )
        axes.set(xscale="log", yscale="log", xlabel="edges of a node, at least", ylabel="share of nodes")
        # There is no more than all of them.
        axes.set_ylim(top=1.0)
        axes.set_title(f"Degrees of {name}   {graph.num_nodes:,} nodes, {graph.num_edges:,} edges", pad=20)
        axes.grid(color=GRID)
        _plain_ticks(axes)
        if len(kinds) > 1:
            axes.legend(loc="upper right")
    save(made, path)


def draw_recall(points: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Recall against queries a second; one point for each ef."""
    with figure(6.4, 4.2) as (made, axes):
        recall = [point["recall"] for point in points]
        rate = [point["queries_per_second"] for point in points]
        axes.plot(recall, rate, "-o", color=SERIES[0], clip_on=False)
        axes.margins(x=0.12, y=0.12)
        # There is no more than all of them, and no less than none.
        low, high = axes.get_xlim()
        low, high = max(low, 0.0), min(high, 1.0)
        axes.set_xlim(low, high)
        for point in points:
            at = (point["recall"], point["queries_per_second"])
            is_at_edge = point["recall"] > high - 0.1 * (high - low)
            place = {"xytext": (-7, -6), "ha": "right"} if is_at_edge else {"xytext": (6, 5)}
            axes.annotate(f"ef {point['ef']}", at, textcoords="offset points", color=MUTED, fontsize=8.5, **place)
        axes.set(yscale="log", xlabel=f"recall@{points[0]['k']}", ylabel="queries a second, one thread")
        axes.set_title(title)
        axes.grid(color=GRID)
        _plain_ticks(axes, x=False)
    save(made, path)


def draw_map(
    xy_N2: np.ndarray,
    label_N: np.ndarray | None,
    names: Sequence[str],
    title: str,
    path: Path,
    *,
    told: Sequence[tuple[int, str]] = (),
) -> None:
    """Nodes as points, coloured by label.

    Args:
        xy_N2: where they are.
        label_N: of each; -1 where it has none.
        names: of labels.
        title, path: of the picture.
        told: nodes that are named in it, by their numbers, and their names.
    """
    with figure(6.8, 6.0) as (made, axes):
        size = float(np.clip(16000 / max(len(xy_N2), 1), 4, 36))
        # A few far away must not make the rest small.
        low, high = np.quantile(xy_N2, (0.005, 0.995), axis=0)
        xy_N2 = np.clip(xy_N2, low - 0.1 * (high - low), high + 0.1 * (high - low))
        label_N = np.full(len(xy_N2), -1) if label_N is None else label_N
        many = np.argsort(-np.bincount(label_N[label_N >= 0], minlength=len(names)), kind="stable")
        shown = sorted(many[: min(LABELLED, len(names))].tolist())
        rest = ~np.isin(label_N, shown)
        if rest.any():
            others = (
                {"color": SERIES[0], "label": None} if not len(names) else {"color": GRID, "label": "other or none"}
            )
            axes.scatter(*xy_N2[rest].T, s=size, linewidths=0, alpha=0.8, **others)
        for number, label in enumerate(shown):
            chosen = label_N == label
            axes.scatter(*xy_N2[chosen].T, s=size, linewidths=0, alpha=0.85, color=SERIES[number], label=names[label])
        _name_points(axes, xy_N2, told, size)
        axes.set(xticks=[], yticks=[], title=title)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_aspect("equal", adjustable="datalim")
        if len(names):
            legend = axes.legend(
                loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.3, title="label", alignment="left"
            )
            legend.get_title().set_color(INK)
            for handle in legend.legend_handles:
                handle.set_sizes([30])
    save(made, path)


def _name_points(axes: Any, xy_N2: np.ndarray, told: Sequence[tuple[int, str]], size: float) -> None:
    """Names beside points, which are ringed; one that would lie on another, of a larger node, is left out."""
    span = xy_N2.max(0) - xy_N2.min(0) if len(xy_N2) else np.ones(2)
    taken: list[np.ndarray] = []
    for node, name in told:
        at = xy_N2[node]
        if any((np.abs(at - other) < span * (0.16, 0.035)).all() for other in taken):
            continue
        taken.append(at)
        axes.scatter(*at, s=2.5 * size, facecolors="none", edgecolors=INK, linewidths=0.9)
        short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        axes.annotate(short, at, (5, 4), textcoords="offset points", color=INK, fontsize=8.5, fontweight="bold")


def flat_map(vectors_ND: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """Two numbers for each vector, and how they were found: t-SNE where scikit-learn is installed, else principal components."""
    centred = vectors_ND - vectors_ND.mean(0)
    _, _, axes = np.linalg.svd(centred.T @ centred)
    if len(vectors_ND) > 3 * NEIGHBOURS:
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            return centred @ axes[:2].T, "principal components"
        start = centred @ axes[:2].T
        start = start / max(float(start[:, 0].std()), 1e-12) * 1e-4
        # Distances of the largest components are nearly those of all.
        small = centred @ axes[: min(50, len(axes))].T
        made = TSNE(init=start.astype(np.float32), perplexity=NEIGHBOURS, random_state=seed % 2**32, n_jobs=1)
        return made.fit_transform(small), "t-SNE"
    return centred @ axes[:2].T, "principal components"


def _plain_ticks(axes: Any, *, x: bool = True) -> None:
    """Logarithmic axes with 1, 2, 5, 10 ... written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def plain(value: float, _: Any) -> str:
        return f"{value:,.0f}" if value >= 1 else f"{value:.12f}".rstrip("0")

    for axis in (axes.xaxis, axes.yaxis) if x else (axes.yaxis,):
        low, high = axis.get_view_interval()
        decades = np.log10(max(high, 1e-300) / max(low, 1e-300))
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_formatter(NullFormatter())
