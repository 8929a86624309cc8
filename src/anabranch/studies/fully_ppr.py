"""Is PageRank from every node at once cheap enough to be had, and does each device of the cluster plan pay?

"Distributed Algorithms for Fully Personalized PageRank on Large Graphs", Lin, WWW 2019, arXiv 1903.11749. The paper: several orders of
magnitude faster than what was there, on graphs of billions of edges; its tables are not known to us. Our numbers come from graphs of
4,000 to 51,000 nodes and one core, and say nothing about billions.

Four parts, each arm of which runs by itself:

    all-GRAPH      A. All sources, top 50, by an index of 100 walks and two rounds of decomposition, against a loop over sources with
                   igraph (PRPACK, exact), on a sample of sources scaled to all; processor time. Accuracy against exact scores.
    law-GRAPH      B. L1 error of ends and of visits against the number of walks; the share of pairs that break the eps-delta bound.
    weights-GRAPH  C. Top 20 of walks by weight and of walks that ignore weights (log-normal), against exact weighted scores.
    devices        D. The partitioned plan in this process, counted, not timed: rounds with and without pipelines and big moves, largest
                   record with and without alias trees on a graph with a hub, and throughput over gamma where a round has a fixed cost of
                   5 walks a source, and a row that does not fit into memory costs as much as 10.

The rule, fixed before any recorded run: a claim holds if it is so in every seed, and does not hold otherwise; with fewer than two seeds it
is not resolved. A: at least 20 times less processor time than igraph (on DBLP also 100 times) with a top-50 overlap of at least 0.87. B:
slope of log error over log walks within 0.07 of -1/2; the bound broken by fewer than p_f of the pairs; visits need at most 0.25 of the
walks of ends. C: overlap higher by at least 0.2. D: pipelines at most 1/3 of the rounds and within 31 rounds of the formula (the longest
walk is a Gumbel variable of scale 1 / -ln(1 - alpha) = 6.2 rounds: five of them), trees at most 1/10 of the bytes, moves of 2 steps at
most 0.65 of the rounds on the graph without the hub, and the gamma that is chosen within 10% of the best throughput of 1, 4, 16, 64.
"""
# Shapes: N nodes, M edges, S sources

import math
import operator
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.config import Config, configclass, to_dict
from anabranch.extras import require
from anabranch.files import atomic_file, atomic_write_text
from anabranch.graph import Graph
from anabranch.graph.datasets import load_dataset
from anabranch.graph.fully_ppr import FullyPPR, fully_ppr
from anabranch.graph.fully_ppr.devices import (
    ROW_BYTES,
    big_moves,
    make_records,
    num_walks,
    rounds_formula,
)
from anabranch.graph.fully_ppr.rounds import Rules, Schedule, run_rounds
from anabranch.graph.ppr import PageRank
from anabranch.report.style import INK, MARKERS, SERIES, figure, horizontal_grid, to_png, to_svg
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import every_seed
from anabranch.studies.reading import of_graphs

ALPHA = 0.15
TIMES, MANY_TIMES, OVERLAP = 20.0, 100.0, 0.87
SLOPE, SLOPE_OFF = -0.5, 0.07

# Of the walks of ends.
VISITS = 0.25
BETTER = 0.2  # overlap
PIPELINED, GUMBEL, TREE, MOVES, NEAR_BEST = 1 / 3, 5 / -math.log1p(-ALPHA), 0.1, 0.65, 0.9
GAMMAS = (1, 4, 16, 64)

# Fixed cost of a round, in walks a source; cost of a row that does not fit, in walks.
OVERHEAD, SPILL = 5.0, 10.0

COLUMNS = (
    Column("times", "times less\nCPU", ".0f"),
    Column("cpu_ours", "CPU s\nall sources", ".1f"),
    Column("overlap", "top-50\noverlap", ".3f"),
    Column("l1", "L1 error", ".3f"),
    Column("slope", "slope\n(ends)", ".3f"),
    Column("visits_share", "walks of visits\n/ ends", ".2f"),
    Column("broken", "bound\nbroken", ".1%"),
    Column("gain", "overlap by\nweights", ".3f"),
    Column("pipelined_share", "rounds with\npipelines", ".2f"),
    Column("tree_share", "record with\ntrees", ".3f"),
    Column("moves_share", "rounds with\nmoves", ".2f"),
    Column("gamma_share", "throughput\n/ best", ".2f"),
)


@configclass
class All(Config):
    """Part A."""

    graph: str
    rounds: int = 2
    index_walks: int = 100
    peer_sources: int = 40
    sample: int = 200


@configclass
class Law(Config):
    """Part B."""

    graph: str
    walks: tuple[int, ...] = (1_000, 3_000, 10_000, 30_000, 100_000)
    sample: int = 50
    eps: float = 0.5
    delta: float = 0.005
    p_f: float = 0.1


@configclass
class Weights(Config):
    """Part C."""

    graph: str
    walks: int = 10_000
    sample: int = 200


@configclass
class Devices(Config):
    """Part D: a power law of ``nodes`` with a hub of ``hub`` neighbours."""

    nodes: int = 20_000
    hub: int = 10_000
    walks: int = 64
    gamma: int = 4
    theta: int = 256  # entries of a record
    # Memory for so many walks of each source in steady state.
    memory_gamma: int = 20


@configclass
class Size(Config):
    """What differs between the sizes: graphs of the parts, and the size of part D. ``power-N`` is a generated power law of N nodes."""

    all_graphs: tuple[str, ...] = ("dblp", "ppi", "blogcatalog")
    law_graph: str = "ppi"
    weights_graph: str = "blogcatalog"
    walks: tuple[int, ...] = (1_000, 3_000, 10_000, 30_000, 100_000)
    sample: int = 200
    nodes: int = 20_000


SMOKE = Size(
    all_graphs=("power-4000",),
    law_graph="power-300",
    weights_graph="power-2000",
    walks=(1_000, 3_000, 10_000, 30_000),
    sample=50,
    nodes=2_000,
)


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`. The full one needs ``ANABRANCH_DATA``."""
    size = (Size() if full else SMOKE).replace(**changes)
    return Study(
        name="fully_ppr",
        title="PageRank from every node: cost and accuracy, and what each device of the cluster plan saves",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=list(arms(size).values()),
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=partial(judge, planned=tuple(arms(size))),
        columns=COLUMNS,
        draw=draw,
        inputs=of_graphs,
    )


def arms(size: Size) -> dict[str, Arm]:
    """All arms of the four parts."""
    made = [
        Arm(f"all-{name}", f"A: all sources of {name}", All(graph=name, sample=size.sample)) for name in size.all_graphs
    ]
    law, weights = size.law_graph, size.weights_graph
    made.append(Arm(f"law-{law}", f"B: error over walks on {law}", Law(graph=law, walks=size.walks)))
    made.append(Arm(f"weights-{weights}", f"C: weights of {weights}", Weights(graph=weights, sample=size.sample)))
    devices = Devices(nodes=size.nodes, hub=size.nodes // 2, theta=size.nodes // 80)
    made.append(Arm("devices", f"D: rounds of {size.nodes:,} nodes and a hub", devices))
    return {arm.name: arm for arm in made}


def run(config: All | Law | Weights | Devices, seed: int, progress: Progress) -> Metrics:
    """One arm of any part."""
    if isinstance(config, All):
        return run_all(config, seed, progress)
    if isinstance(config, Law):
        return run_law(config, seed, progress)
    if isinstance(config, Weights):
        return run_weights(config, seed, progress)
    return run_devices(config, seed, progress)


# Graphs and measures


def power_law(nodes: int, seed: int, degree: int = 2) -> Graph:
    """New nodes choose ``degree`` earlier ones, the earliest most often."""
    rng = np.random.default_rng(seed)
    source = np.repeat(np.arange(1, nodes), degree)
    target = (source * rng.random(len(source)) ** 2).astype(np.int64)
    return Graph.from_edges(source, target, num_nodes=nodes)


def graph_of(name: str, seed: int) -> Graph:
    """A generated graph ("power-4000") or one of `anabranch.graph.datasets`."""
    if name.startswith("power-"):
        return power_law(int(name.removeprefix("power-")), seed)
    return load_dataset(name).graph


def with_weights(graph: Graph, seed: int) -> Graph:
    """The graph with log-normal weights (sigma 1), the same in both directions of an edge."""
    source, target, _ = graph.edges()
    weight = np.random.default_rng(seed).lognormal(0, 1, len(source))
    return Graph.from_edges(source, target, weight, graph.is_directed, graph.num_nodes)


def sample_of(graph: Graph, count: int, seed: int) -> np.ndarray:
    """Nodes that have edges."""
    nodes = np.flatnonzero(graph.degree_N)
    return np.sort(np.random.default_rng(seed).permutation(nodes)[:count])


def exact_rows(graph: Graph, source_S: np.ndarray) -> np.ndarray:
    """[S, N], to an L1 error of 1e-8."""
    model = PageRank(ALPHA, tol=1e-8)
    return np.array([model.vector(graph, int(node)) for node in source_S])


def overlap(ids: np.ndarray, exact_N: np.ndarray, k: int) -> float:
    """Share of the ``k`` best (of all that can be reached, if fewer) that ``ids`` has, any of those that tie for the last place."""
    positive = int((exact_N > 1e-12).sum())
    count = min(k, positive)
    least = np.partition(exact_N, len(exact_N) - count)[len(exact_N) - count]
    return float((exact_N[ids[:count]] >= least * (1 - 1e-6)).sum()) / count


def l1_error(ids: np.ndarray, scores: np.ndarray, exact_N: np.ndarray) -> float:
    """Of a row that is not cut."""
    found_N = np.zeros(len(exact_N))
    found_N[ids] = scores
    return float(np.abs(found_N - exact_N).sum())


# A


def run_all(config: All, seed: int, progress: Progress) -> Metrics:
    """``times`` less processor time than igraph for all sources, and ``overlap`` and ``l1`` on a sample."""
    graph = graph_of(config.graph, seed)
    options: dict[str, Any] = {
        "alpha": ALPHA,
        "method": "decompose",
        "rounds": config.rounds,
        "index_walks": config.index_walks,
        "seed": seed,
        "workers": 1,
    }
    source_S = sample_of(graph, config.sample, seed)
    # Compiled code is loaded before the clock starts.
    fully_ppr(graph, sources=source_S[:2], **options)
    begin = time.process_time()
    found = fully_ppr(graph, top_k=50, **options)
    ours = time.process_time() - begin
    progress(f"ours: {ours:.1f} CPU s")
    peer = graph.num_nodes * igraph_seconds(graph, sample_of(graph, config.peer_sources, seed + 1))
    progress(f"igraph: {peer:.0f} CPU s")
    exact_SN = exact_rows(graph, source_S)
    whole = fully_ppr(graph, top_k=None, sources=source_S, **options)
    errors = [l1_error(*whole.top(int(node)), exact_N) for node, exact_N in zip(source_S, exact_SN, strict=True)]
    shared = [overlap(found.top(int(node))[0], exact_N, 50) for node, exact_N in zip(source_S, exact_SN, strict=True)]
    return {
        "cpu_ours": ours,
        "cpu_peer": peer,
        "times": peer / ours,
        "l1": float(np.mean(errors)),
        "overlap": float(np.mean(shared)),
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
    }


def igraph_seconds(graph: Graph, source_S: np.ndarray) -> float:
    """Processor seconds of igraph per source. Raises BackendError where it is not installed."""
    require("igraph", by="part A")
    import igraph

    source, target, weight = graph.edges()
    peer = igraph.Graph(graph.num_nodes, np.stack([source, target], 1).tolist(), directed=graph.is_directed)
    weights = None if weight is None else weight.tolist()
    peer.personalized_pagerank(damping=1 - ALPHA, reset_vertices=int(source_S[0]), weights=weights)
    begin = time.process_time()
    for node in source_S:
        peer.personalized_pagerank(damping=1 - ALPHA, reset_vertices=int(node), weights=weights)
    return (time.process_time() - begin) / len(source_S)


# B


def run_law(config: Law, seed: int, progress: Progress) -> Metrics:
    """``slope`` and ``slope_visits`` of log L1 over log walks, ``visits_share`` of the walks at equal error, ``broken`` bounds."""
    graph = graph_of(config.graph, seed)
    source_S = sample_of(graph, config.sample, seed)
    exact_SN = exact_rows(graph, source_S)
    options: dict[str, Any] = {"alpha": ALPHA, "method": "walks", "sources": source_S, "seed": seed, "top_k": None}
    curves: dict[str, list[float]] = {"endpoint": [], "fullpath": []}
    for walks in config.walks:
        progress(f"{walks:,} walks")
        for estimator, curve in curves.items():
            found = fully_ppr(graph, walks=walks, estimator=estimator, **options)
            curve.append(float(np.abs(found.to_scipy().toarray() - exact_SN).sum(1).mean()))
    log_walks = np.log(config.walks)
    fits = {name: np.polyfit(log_walks, np.log(curve), 1) for name, curve in curves.items()}
    # At the error of ends with the most walks: how many do visits need, by their fitted line?
    needed = (np.log(curves["endpoint"][-1]) - fits["fullpath"][1]) / fits["fullpath"][0]
    bounded = fully_ppr(graph, eps=config.eps, delta=config.delta, p_f=config.p_f, **options)
    large = exact_SN >= config.delta
    missed = np.abs(bounded.to_scipy().toarray() - exact_SN) > config.eps * exact_SN
    return {
        "slope": float(fits["endpoint"][0]),
        "slope_visits": float(fits["fullpath"][0]),
        "visits_share": float(np.exp(needed) / config.walks[-1]),
        "broken": float(missed[large].mean()),
        "p_f": config.p_f,
        "bound_walks": num_walks(config.eps, config.delta, config.p_f),
        "curve_walks": list(config.walks),
        "curve_endpoint": curves["endpoint"],
        "curve_fullpath": curves["fullpath"],
    }


# C


def run_weights(config: Weights, seed: int, progress: Progress) -> Metrics:
    """``gain`` in overlap of the top 20 with exact weighted scores, of walks by weight over walks that ignore weights."""
    graph = with_weights(graph_of(config.graph, seed), seed)
    plain = Graph(graph.indptr, graph.indices, None, graph.is_directed)
    source_S = sample_of(graph, config.sample, seed)
    exact_SN = exact_rows(graph, source_S)
    shared = {}
    for name, walked in (("weighted", graph), ("plain", plain)):
        model = FullyPPR(
            ALPHA, config.walks, method="walks", estimator="fullpath", sources=source_S, top_k=20, seed=seed
        )
        found = model.fit(walked)
        tops = [found.top(int(node))[0] for node in source_S]
        shared[name] = float(np.mean([overlap(ids, exact_N, 20) for ids, exact_N in zip(tops, exact_SN, strict=True)]))
        progress(f"{name}: {shared[name]:.3f}")
    return {
        "overlap_weighted": shared["weighted"],
        "overlap_plain": shared["plain"],
        "gain": shared["weighted"] - shared["plain"],
    }


# D


def run_devices(config: Devices, seed: int, progress: Progress) -> Metrics:
    """Shares of rounds, bytes and throughput with each device, of those without it."""
    sparse = power_law(config.nodes, seed)
    source, target, _ = sparse.edges()
    others = np.random.default_rng(seed).permutation(config.nodes)[: config.hub]
    graph = Graph.from_edges(
        np.append(source, np.zeros(config.hub, int)), np.append(target, others), num_nodes=config.nodes
    )
    plain, tree = make_records(graph), make_records(graph, theta=config.theta)
    moved = {steps: make_records(sparse, moves=big_moves(sparse, ALPHA, steps)) for steps in (2, 3)}
    rules = Rules(seed, ALPHA, 0, False, config.nodes)

    def rounds(records: Any, gamma: int, **options: Any) -> Schedule:
        schedule = Schedule.make(config.nodes, config.walks, ALPHA, np.inf, gamma, **options)
        run_rounds(records, np.arange(config.nodes), schedule, rules)
        progress(f"gamma {gamma}: {schedule.number} rounds")
        return schedule

    pipelined = rounds(plain, config.gamma)
    apart = rounds(plain, config.gamma, pipelined=False)
    with_moves = {steps: rounds(records, config.walks) for steps, records in moved.items()}
    at_once = rounds(make_records(sparse), config.walks)
    formula = rounds_formula(config.nodes, config.walks, config.gamma, ALPHA)
    return {
        "rounds_pipelined": pipelined.number,
        "rounds_apart": apart.number,
        "rounds_formula": formula,
        "formula_off": pipelined.number - formula,
        "pipelined_share": pipelined.number / apart.number,
        "record_bytes": plain.largest_bytes,
        "record_bytes_tree": tree.largest_bytes,
        "tree_share": tree.largest_bytes / plain.largest_bytes,
        "moves_share": with_moves[2].number / at_once.number,
        "moves_share_3": with_moves[3].number / at_once.number,
        "rounds_at_once": at_once.number,
        **_gamma(config, plain, rules, progress),
    }


def _gamma(config: Devices, records: Any, rules: Rules, progress: Progress) -> Metrics:
    """Throughput (walks moved over cost) of fixed gammas and of the rule's, under one memory."""
    memory = config.memory_gamma * config.nodes / ALPHA * ROW_BYTES
    overhead = OVERHEAD * config.nodes
    found = {}
    for gamma in (*GAMMAS, None):
        schedule = Schedule.make(config.nodes, config.walks, ALPHA, memory, gamma, overhead=overhead)
        run_rounds(records, np.arange(config.nodes), schedule, rules)
        found[gamma] = throughput(schedule, memory, overhead)
        progress(f"gamma {gamma or 'chosen'}: throughput {found[gamma]:.2f}")
    best = max(value for gamma, value in found.items() if gamma is not None)
    return {
        "gamma_share": found[None] / best,
        "curve_gamma": list(GAMMAS),
        "curve_throughput": [found[gamma] for gamma in GAMMAS],
        "throughput_chosen": found[None],
    }


def throughput(schedule: Schedule, memory: float, overhead: float) -> float:
    """Walks moved per unit of cost: a round costs ``overhead``, its walks, and `SPILL` for each row beyond the memory."""
    moved = sum(entry.walks for entry in schedule.log)
    spilled = sum(max(entry.rows - memory / ROW_BYTES, 0) for entry in schedule.log)
    return moved / (schedule.number * overhead + moved + SPILL * spilled)


# Judging


def judge(results: Results, planned: Collection[str] | None = None) -> list[Claim]:
    """The claims about the arms that are ``planned`` (None: those that have run); see the rule in the module's docstring."""
    claims = []
    for arm in results.runs if planned is None else planned:
        name = arm.partition("-")[2]
        if arm.startswith("all-"):
            claims += _all_claims(results, arm, name)
        elif arm.startswith("law-"):
            p_f = results.mean(arm, "p_f").mean
            claims += [
                _claim(
                    results,
                    arm,
                    "slope",
                    SLOPE,
                    lambda v: abs(v - SLOPE) <= SLOPE_OFF,
                    f"{name}: the error of ends falls as walks^-1/2",
                    "theory",
                ),
                _claim(
                    results,
                    arm,
                    "broken",
                    p_f,
                    partial(operator.gt, p_f),
                    f"{name}: fewer than p_f of the pairs break the eps-delta bound",
                    "theory",
                ),
                _claim(
                    results,
                    arm,
                    "visits_share",
                    VISITS,
                    lambda v: v <= VISITS,
                    f"{name}: visits need at most {VISITS} of the walks of ends",
                    "about alpha",
                ),
            ]
        elif arm.startswith("weights-"):
            claims.append(
                _claim(
                    results,
                    arm,
                    "gain",
                    BETTER,
                    lambda v: v >= BETTER,
                    f"{name}: walks by weight find the weighted top 20",
                    "not given",
                )
            )
        elif arm == "devices":
            claims += _device_claims(results)
    return claims


def _all_claims(results: Results, arm: str, name: str) -> list[Claim]:
    def accurate(bar: float) -> Callable[[float, float], bool]:
        return lambda times, shared: times >= bar and shared >= OVERLAP

    bars = (TIMES, MANY_TIMES) if name == "dblp" else (TIMES,)
    shared = results.values(arm, "overlap")
    claims = []
    for bar in bars:
        seen = [accurate(bar)(times, shared[seed]) for seed, times in results.values(arm, "times").items()]
        claims.append(
            _judged(
                results,
                arm,
                "times",
                bar,
                seen,
                f"{name}: {bar:.0f} times less processor time than a loop over sources, at a top-50 overlap of {OVERLAP}",
                "several orders of magnitude",
            )
        )
    return claims


def _device_claims(results: Results) -> list[Claim]:
    rules: list[tuple[str, float, Callable[[float], bool], str]] = [
        ("pipelined_share", PIPELINED, lambda v: v <= PIPELINED, "pipelines save two rounds of three"),
        ("formula_off", 0.0, lambda v: abs(v) <= GUMBEL, "rounds are those of the formula"),
        ("tree_share", TREE, lambda v: v <= TREE, "alias trees bound the largest record"),
        ("moves_share", MOVES, lambda v: v <= MOVES, "moves of two steps save a third of the rounds"),
        ("gamma_share", NEAR_BEST, lambda v: v >= NEAR_BEST, "the gamma that is chosen is near the best"),
    ]
    return [_claim(results, "devices", metric, bar, so, claim, "no number") for metric, bar, so, claim in rules]


def _claim(
    results: Results, arm: str, metric: str, bar: float, so: Callable[[float], bool], claim: str, paper: str
) -> Claim:
    return _judged(
        results, arm, metric, bar, [so(value) for value in results.values(arm, metric).values()], claim, paper
    )


def _judged(results: Results, arm: str, metric: str, bar: float, seen: list[bool], claim: str, paper: str) -> Claim:
    """A claim against its bar; holds if so in every seed of at least two, does not hold otherwise."""
    if not seen:
        return Claim.not_run(claim, paper)
    verdict = every_seed(seen)
    if len(seen) >= 2 and not all(seen):
        verdict = "does not hold"
    mean = results.mean(arm, metric)
    return Claim.against(bar, claim, paper, mean.mean, verdict, mean.interval, count=mean.count)


def draw(results: Results, path: Path) -> None:
    """Error over walks, and throughput over gamma; nothing where neither has run."""
    law = next((runs for arm, runs in results.runs.items() if arm.startswith("law-")), {})
    devices = results.runs.get("devices", {})
    if not law and not devices:
        return
    with figure(10, 3.6, ncols=2) as (made, (left, right)):
        made.suptitle("PageRank from every node", x=0.01, ha="left", fontweight="bold", color=INK)
        for place, (metric, label) in enumerate((("curve_endpoint", "ends"), ("curve_fullpath", "visits"))):
            for number, run in enumerate(law.values()):
                left.plot(
                    run["curve_walks"],
                    run[metric],
                    color=SERIES[place],
                    marker=MARKERS[place],
                    markersize=4,
                    label=None if number else label,
                )
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_xlabel("walks per source")
        left.set_title("L1 error")
        for number, run in enumerate(devices.values()):
            right.plot(
                run["curve_gamma"],
                run["curve_throughput"],
                color=SERIES[0],
                marker="o",
                markersize=4,
                label=None if number else "fixed gamma",
            )
            right.axhline(run["throughput_chosen"], color=SERIES[1], linewidth=1, label=None if number else "chosen")
        right.set_xscale("log", base=2)
        if devices:
            # From nothing, so that heights compare.
            right.set_ylim(bottom=0)
        right.set_xlabel("gamma, walks a pipeline")
        right.set_title("throughput, walks moved per unit of cost")
        for axes, there in ((left, law), (right, devices)):
            horizontal_grid(axes)
            if there:
                axes.legend()
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)
