"""The pictures of a routing report. Each function draws one `Figure`, or returns None where the trace has nothing to show."""
# Shapes: L layers, E destinations, M domains

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from anabranch.report.style import DIVERGING, INK, MARKERS, MUTED, SEQUENTIAL, SERIES, figure, horizontal_grid
from anabranch.report.summary import SEGMENT, LayerFacts, Summary
from anabranch.routing import measure
from anabranch.routing.passes import MOST_SHOWN
from anabranch.routing.trace import RoutingTrace

WIDTH = 9.0  # inches
MOST_PASSES = 4  # pairs of passes that one picture has
MOST_LAYERS = 4  # whose pairs of experts one picture has
# Inches of a row of so many squares.
_SQUARES = {1: (5.4, 4.6), 2: (WIDTH, 4.6), 3: (WIDTH, 3.6), 4: (WIDTH, 3.0)}
OCTAVES = 2.0  # colours reach from a quarter to four times


def load(trace: RoutingTrace, summary: Summary) -> Figure:
    """Load per layer and expert in multiples of the fair share, and the largest of each layer."""
    if len(summary.layers) == 1:
        return _load_of_one_layer(trace, summary.layers[0])
    load_LE = np.full((len(trace.layers), max(layer.num_destinations for layer in trace.layers)), np.nan)
    for row_E, layer in zip(load_LE, trace.layers, strict=True):
        row_E[: layer.num_destinations] = measure.load_violation(trace.load_E(layer.layer)) + 1
    height = float(np.clip(1.3 + 0.18 * len(load_LE), 2.0, 8.5))
    with figure(WIDTH, height, ncols=2, sharey=True, width_ratios=[5, 1]) as (made, (axes, side)):
        image = _octaves(axes, load_LE)
        _layer_ticks(axes, trace)
        _outline_own_slots(axes, trace)
        shared = "expert (slot in the pool; boxes: owned by the layer)" if summary.pools else "expert"
        axes.set(xlabel=shared, ylabel="layer", title="Load of every expert")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _octave_bar(made, image, [axes, side], "load / fair share", aspect=5 * height)
        largest = [layer.max_violation + 1 for layer in summary.layers]
        side.barh(range(len(largest)), largest, color=SERIES[1], height=0.7)
        side.axvline(1, color=INK, linewidth=1)
        side.set(title="Busiest expert", xlabel="load / fair share", xlim=(0, None))
        side.tick_params(axis="y", length=0)
    return made


def _load_of_one_layer(trace: RoutingTrace, layer: LayerFacts) -> Figure:
    share_E = measure.load_violation(trace.load_E(layer.layer)) + 1
    order_E = np.argsort(-np.nan_to_num(share_E), kind="stable")
    with figure(WIDTH, 3.2) as (made, axes):
        axes.bar(range(len(share_E)), share_E[order_E], color=SERIES[0], width=0.85 if len(share_E) <= 64 else 1.0)
        axes.axhline(1, color=INK, linewidth=1)
        axes.set(
            title=f"Load of every expert, layer {layer.layer}",
            ylabel="load / fair share",
            xlabel="expert, busiest first",
        )
        if len(share_E) <= 32:
            axes.set_xticks(range(len(share_E)), [str(expert) for expert in order_E])
        else:
            axes.set_xlabel("experts, busiest first (rank)")
        horizontal_grid(axes)
    return made


def entropy(summary: Summary) -> Figure | None:
    """How evenly each layer spreads its load over experts, and each item its weight over what it chose."""
    layers = summary.layers
    if len(layers) == 1:
        return None  # two numbers, which the table has
    with figure(WIDTH, 3.0, ncols=2) as (made, (left, right)):
        _line(left, layers, "load_entropy_bits", 0)
        left.plot(
            _numbers(layers),
            [layer.max_entropy_bits for layer in layers],
            color=MUTED,
            linestyle="--",
            label="even load",
        )
        left.set(title="Entropy of the load", ylabel="bits", xlabel="layer", ylim=(0, None))
        _line(right, layers, "weight_entropy_bits", 1)
        most = [np.log2(max(layer.top_k, 1)) for layer in layers]
        right.plot(_numbers(layers), most, color=MUTED, linestyle="--", label="equal weights")
        right.set(title="Entropy of the weights within a decision", ylabel="bits", xlabel="layer", ylim=(0, None))
        for axes in (left, right):
            _finish_lines(axes, layers)
            axes.legend(loc="lower right")
    return made


def coactivation(trace: RoutingTrace) -> Figure | None:
    """Which experts are chosen together more and less often than loads explain; of many layers, in the first, middle and last."""
    able = [layer.layer for layer in trace.layers if layer.top_k > 1 and layer.num_destinations > 1]
    if not able:
        return None
    shown = able if len(able) <= MOST_LAYERS else [able[0], able[len(able) // 2], able[-1]]
    with figure(*_SQUARES[len(shown)], ncols=len(shown), squeeze=False) as (made, (row,)):
        choice = "" if len(shown) == len(able) else f" ({len(shown)} of {len(able)} layers)"
        made.suptitle(f"Experts chosen together{choice}", x=0.01, ha="left", weight="bold", size=10.5)
        for axes, number in zip(row, shown, strict=True):
            num_destinations = trace.layer(number).num_destinations
            index_NK = trace.decisions(number).index_NK
            if num_destinations > MOST_SHOWN:
                index_NK = _among_busiest(index_NK, trace.load_E(number), MOST_SHOWN)
            count_EE = measure.coactivation(index_NK, min(num_destinations, MOST_SHOWN))
            lift_EE = measure.coactivation_lift(count_EE, prior=1.0)
            order_E = _seriate(np.log2(np.nan_to_num(lift_EE, nan=1.0)))
            idle_E = np.diagonal(count_EE) == 0
            lift_EE[idle_E] = lift_EE[:, idle_E] = np.nan
            image = _octaves(axes, lift_EE[np.ix_(order_E, order_E)], aspect="equal")
            axes.set_title(f"layer {number}", weight="normal")
            if num_destinations <= 16:
                size = 7 if num_destinations > 8 else None
                axes.set_xticks(range(num_destinations), order_E.tolist(), size=size)
                axes.set_yticks(range(num_destinations), order_E.tolist(), size=size)
                axes.set_xlabel("expert")
            else:
                busiest = f"{MOST_SHOWN} busiest of " if num_destinations > MOST_SHOWN else ""
                axes.set(xticks=[], yticks=[], xlabel=f"{busiest}{num_destinations} experts, like beside like")
        row[0].set_ylabel("expert")
        _octave_bar(made, image, list(row), "pairs / chance", shrink=0.8)
    return made


def _among_busiest(index_NK: np.ndarray, load_E: np.ndarray, count: int) -> np.ndarray:
    """Choices by the place of a destination among the ``count`` of the highest load; -1 for those that are not."""
    place_E = np.full(len(load_E), -1)
    place_E[np.sort(np.argsort(-load_E, kind="stable")[:count])] = np.arange(count)
    return np.where(index_NK >= 0, place_E[index_NK], -1)


def passes(summary: Summary) -> Figure | None:
    """Which experts follow which from a pass to the next, more and less often than loads explain; of many pairs, four."""
    able = [facts for facts in summary.passes if min(facts.num_first, facts.num_second) > 1 and len(facts.pair_P3)]
    if not able:
        return None
    shown = [able[place] for place in np.unique(np.linspace(0, len(able) - 1, MOST_PASSES).round().astype(int))]
    with figure(*_SQUARES[len(shown)], ncols=len(shown), squeeze=False) as (made, (row,)):
        choice = "" if len(shown) == len(able) else f" ({len(shown)} of {len(able)} pairs of passes)"
        made.suptitle(f"Experts from one pass to the next{choice}", x=0.01, ha="left", weight="bold", size=10.5)
        for axes, facts in zip(row, shown, strict=True):
            first_A, second_B = facts.busiest(MOST_SHOWN)
            lift_AB = facts.lift_between(first_A, second_B)
            chosen_A, chosen_B = (np.isin(asked, facts.pair_P3[:, at]) for at, asked in enumerate((first_A, second_B)))
            lift_AB[~(chosen_A[:, None] & chosen_B)] = np.nan
            image = _octaves(axes, lift_AB, aspect="equal")
            axes.set_title(f"passes {facts.first_layer} to {facts.second_layer}", weight="normal")
            axes.set(xlabel="expert of the next pass")
            if max(facts.num_first, facts.num_second) > MOST_SHOWN:
                # Places are no numbers of experts.
                axes.set(xticks=[], yticks=[], xlabel="busiest experts of the next pass")
                continue
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        row[0].set_ylabel("expert of a pass")
        _octave_bar(made, image, list(row), "pairs / chance", shrink=0.8)
    return made


def specialisation(trace: RoutingTrace, summary: Summary) -> Figure | None:
    """How far each domain is from the average in every layer, and which experts it prefers in the layer where that is most."""
    layers = [layer for layer in summary.layers if layer.domain_distance]
    if not layers:
        return None
    best = summary.most_special
    assert best is not None
    load_ME = measure.domain_load(trace, best.layer)
    even_ME = np.outer(load_ME.sum(1), load_ME.sum(0)) / load_ME.sum()
    lift_ME = (load_ME + 2) / (even_ME + 2)  # two choices more each way draw what rests on few choices towards 1
    group_E = np.where(load_ME.sum(0) > 0, lift_ME.argmax(0), len(load_ME))  # what nobody chose stands last
    order_E = np.lexsort((-lift_ME.max(0), group_E))
    names = summary.domains
    if len(layers) == 1:
        with figure(WIDTH, 1.6 + 0.28 * len(names)) as (made, axes):
            _preferences(made, axes, lift_ME[:, order_E], names, best.layer)
        return made
    with figure(WIDTH, 4.2 + 0.24 * len(names), nrows=2, height_ratios=[2.6, 0.6 + 0.24 * len(names)]) as (
        made,
        (top, bottom),
    ):
        _distances(made, top, layers, names)
        _preferences(made, bottom, lift_ME[:, order_E], names, best.layer)
    return made


def _distances(made: Figure, axes: Axes, layers: list[LayerFacts], names: list[str]) -> None:
    title = "Distance of each domain from the average"
    if len(names) > len(SERIES):  # too many lines to tell apart
        distance_ML = np.array([[layer.domain_distance[name] for layer in layers] for name in names])
        image = axes.imshow(distance_ML, aspect="auto", cmap=SEQUENTIAL, vmin=0)
        axes.set_yticks(range(len(names)), names)
        axes.set(title=title, xlabel="layer")
        step = max(1, len(layers) // 16)
        axes.set_xticks(range(0, len(layers), step), [str(layer.layer) for layer in layers[::step]])
        made.colorbar(image, ax=axes, label="total variation", pad=0.01).outline.set_visible(False)
        return
    for number, name in enumerate(names):
        values = [layer.domain_distance[name] for layer in layers]
        axes.plot(_numbers(layers), values, color=SERIES[number], marker=_marker(number, layers), label=name)
    axes.set(title=title, ylabel="share of choices that differ", xlabel="layer", ylim=(0, None))
    _finish_lines(axes, layers)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)


def _preferences(made: Figure, axes: Axes, lift_ME: np.ndarray, names: list[str], layer: int) -> None:
    image = _octaves(axes, lift_ME)
    axes.set_yticks(range(len(names)), names)
    axes.set(xticks=[], xlabel=f"{lift_ME.shape[1]} experts, grouped by the domain that prefers them most")
    axes.set_title(f"Experts that each domain prefers, layer {layer}")
    _octave_bar(made, image, axes, "share / average")


def reuse(summary: Summary) -> Figure | None:
    """How often choices repeat: from token to token, and from layer to layer where layers share experts."""
    layers = summary.layers
    tokens = any(layer.consecutive_chance < 1 and not np.isnan(layer.consecutive_reuse) for layer in layers)
    pooled = [layer for layer in layers if layer.previous_layer is not None]
    if not tokens and not pooled:
        return None
    if len(layers) == 1:
        return _reuse_of_one_layer(layers[0])
    with figure(WIDTH, 3.2, ncols=2 if tokens and pooled else 1, squeeze=False) as (made, (row,)):
        panels = list(row)
        if tokens:
            axes = panels.pop(0)
            _line(axes, layers, "consecutive_reuse", 0, "same as the token before")
            _line(axes, layers, "consecutive_chance", 0, "by chance", chance=True)
            _line(axes, layers, "segment_reuse", 1, f"seen within {SEGMENT} tokens")
            _line(axes, layers, "segment_chance", 1, "by chance", chance=True)
            axes.set_title("From token to token")
        if pooled:
            axes = panels.pop(0)
            _line(axes, layers, "layer_reuse", 2, "same as the layer before")
            _line(axes, layers, "layer_reuse_chance", 2, "by chance", chance=True)
            _line(axes, layers, "foreign_share", 3, "owned by another layer")
            _line(axes, layers, "foreign_chance", 3, "by chance", chance=True)
            axes.set_title("From layer to layer, in a shared pool")
        for axes in row:
            axes.set(xlabel="layer", ylim=(0, 1))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            _finish_lines(axes, layers)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        row[0].set_ylabel("share of choices")
    return made


def _reuse_of_one_layer(layer: LayerFacts) -> Figure:
    rows = [(f"seen within {SEGMENT} tokens", layer.segment_reuse, layer.segment_chance)]
    rows.append(("same as the token before", layer.consecutive_reuse, layer.consecutive_chance))
    with figure(WIDTH, 1.9) as (made, axes):
        axes.barh([label for label, _, _ in rows], [rate for _, rate, _ in rows], color=SERIES[0], height=0.6)
        for row, (_, _, chance) in enumerate(rows):
            axes.plot([chance, chance], [row - 0.4, row + 0.4], color=INK, label="by chance" if row == 0 else None)
        axes.set(title=f"From token to token, layer {layer.layer}", xlabel="share of choices", xlim=(0, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return made


def _octaves(axes: Axes, values: np.ndarray, aspect: Literal["auto", "equal"] = "auto") -> AxesImage:
    """Ratios in colours: transparent at 1, blue below, orange above, on a logarithmic scale."""
    with np.errstate(divide="ignore"):
        logs = np.log2(values)
    image = axes.imshow(np.maximum(logs, -OCTAVES), cmap=DIVERGING, vmin=-OCTAVES, vmax=OCTAVES, aspect=aspect)
    axes.spines[["top", "right"]].set_visible(True)
    return image


def _octave_bar(
    made: Figure, image: AxesImage, axes: Axes | list[Axes], label: str, shrink: float = 1.0, aspect: float = 18
) -> None:
    bar = made.colorbar(image, ax=axes, label=label, pad=0.01, shrink=shrink, aspect=aspect)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.outline.set_edgecolor(MUTED)


def _layer_ticks(axes: Axes, trace: RoutingTrace) -> None:
    step = max(1, -(-len(trace.layers) // 32))
    axes.set_yticks(range(0, len(trace.layers), step), [str(layer.layer) for layer in trace.layers[::step]])


def _outline_own_slots(axes: Axes, trace: RoutingTrace) -> None:
    for row, layer in enumerate(trace.layers):
        own = trace.own_slots(layer.layer)
        if len(own) < layer.pool_size:
            box = Rectangle(
                (own.start - 0.5, row - 0.5), len(own), 1, fill=False, edgecolor=INK, linewidth=1.0, clip_on=False
            )
            axes.add_patch(box)


def _seriate(similarity_EE: np.ndarray) -> np.ndarray:
    """An order that puts what is alike side by side: the Fiedler vector of the positive similarities. Loners stand last."""
    weight_EE = np.maximum((similarity_EE + similarity_EE.T) / 2, 0)
    np.fill_diagonal(weight_EE, 0)
    degree_E = weight_EE.sum(1) + 1e-9
    laplacian_EE = np.eye(len(degree_E)) - weight_EE / np.sqrt(np.outer(degree_E, degree_E))
    _, vectors = np.linalg.eigh(laplacian_EE)
    return np.lexsort((vectors[:, 1] / np.sqrt(degree_E), degree_E < 1e-6))


def _numbers(layers: list[LayerFacts]) -> list[int]:
    return [layer.layer for layer in layers]


def _line(
    axes: Axes, layers: list[LayerFacts], name: str, series: int, label: str | None = None, chance: bool = False
) -> None:
    values = [getattr(layer, name) for layer in layers]
    if chance:  # a dotted line, and a dash where it has gaps
        marker, style = "_" if np.isnan(values).any() else None, ":"
    else:
        marker, style = _marker(series, layers), "-"
    axes.plot(_numbers(layers), values, color=SERIES[series], label=label, marker=marker, linestyle=style)


def _marker(series: int, layers: list[LayerFacts]) -> str | None:
    return MARKERS[series] if len(layers) <= 24 else None


def _finish_lines(axes: Axes, layers: list[LayerFacts]) -> None:
    horizontal_grid(axes)
    numbers = _numbers(layers)
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
