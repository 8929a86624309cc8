"""Is PowerWalk's index better by full paths, and its answer better by decomposition, than the walks it is made of?

Paper: Liu, Li, Lui and Cheng, "PowerWalk: Scalable Personalized PageRank via Random Walks with Vertex-Centric Decomposition", CIKM 2016,
arXiv 1608.06054. Its abstract claims exponential convergence of full paths in the number of walks, and answers that are more accurate
than the index; its tables were not available to us.

Three parts, each arm of which runs by itself; errors are L1 distances to exact vectors, means over nodes drawn evenly:

    fullpath-GRAPH, endpoint-GRAPH   1. Error of fingerprints against the number of walks R.
    decompose-GRAPH                  2. R = 100: error, overlap of the 50 best and CPU time of T = 0 ... 4 rounds (T = 0 is the raw index).
                                     A node counts towards the overlap if its true score is at least that of the true 50th: leaves of
                                     one clique have equal scores.
    batch-GRAPH                      3. CPU time per query, one by one and in one batch, top 50 each.

Graphs: co-authors of DBLP, the same of four fields with weights, proteins (PPI), friends of BlogCatalog with log-normal weights
(sigma = 1), which is dense and well mixed: the worst case for walks.

The rule, fixed before any recorded run. "Full paths need fewer walks": the walks that full paths need for the error that end points
have at their largest R, on a line through logarithms, over that R; holds if at most 0.25 in every seed. "Two rounds": error at T = 2
over the raw error, at most 0.4 in every seed. "Within (1 - alpha)^T": at every T and for each node, the error over (1 - alpha)^T times
the largest raw error (of twenty times as many rows, drawn evenly), at most 1 in every seed. "Batch": one by one over batch, at least
1.5 in every seed. A claim does not hold if it fails in any seed; with fewer than two seeds it is not resolved.
"""
# Shapes: N nodes, S sampled nodes

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.graph import Graph
from anabranch.graph.datasets import load_dataset
from anabranch.graph.powerwalk import PowerWalk
from anabranch.graph.ppr import PageRank
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import Verdict
from anabranch.studies.reading import of_graphs

ALPHA = 0.15
FEWER, BELOW, BATCHED = 0.25, 0.4, 1.5
BEST = 50
GRAPHS = ("dblp", "dblp_weighted", "ppi", "blogcatalog")

# 10,000 diffuse queries take minutes and tell nothing about sharing.
NO_BATCH = ("blogcatalog",)
COLUMNS = (
    Column("l1", "L1 at\nmost walks", ".3f"),
    Column("slope", "slope", ".2f"),
    Column("l1_0", "L1 T=0", ".3f"),
    Column("l1_1", "T=1", ".3f"),
    Column("l1_2", "T=2", ".3f"),
    Column("l1_4", "T=4", ".3f"),
    Column("overlap_2", "top 50\nT=2", ".3f"),
    Column("cpu_ms_2", "CPU ms\nT=2", ".3f"),
    Column("cpu_ms_4", "CPU ms\nT=4", ".3f"),
    Column("build_cpu_s", "build\nCPU s", ".2f"),
    Column("index_mb", "index\nMB", ".1f"),
    Column("batch_ratio", "single\n/ batch", ".2f"),
)


@configclass
class Walks(Config):
    """Part 1: fingerprints of ``num_nodes`` nodes."""

    graph: str
    mode: Literal["fullpath", "endpoint"]
    walks: tuple[int, ...]
    num_nodes: int


@configclass
class Decompose(Config):
    """Part 2: an index of all nodes, ``num_nodes`` queries."""

    graph: str
    walks: int
    rounds: tuple[int, ...]
    num_nodes: int


@configclass
class Batch(Config):
    """Part 3."""

    graph: str
    walks: int
    rounds: int
    num_queries: int


@configclass
class Size(Config):
    """The sizes of all parts."""

    graphs: tuple[str, ...] = GRAPHS
    walks: tuple[int, ...] = (30, 100, 300, 1000, 3000, 10_000)
    num_nodes: int = Field(default=100, ge=1)
    num_queries: int = Field(default=10_000, ge=1)


SMOKE = Size(graphs=("dblp", "ppi"), walks=(30, 100, 300, 1000), num_nodes=20, num_queries=1000)


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    size = (Size() if full else SMOKE).replace(**changes)
    return Study(
        name="powerwalk",
        title="personalised PageRank from an index of walks: full paths, decomposition, batches",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=arms(size),
        run=run,
        judge=partial(judge, graphs=size.graphs),
        columns=COLUMNS,
        draw=draw,
        inputs=of_graphs,
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
    )


def arms(size: Size) -> list[Arm]:
    """All arms of the three parts."""
    made = []
    for graph in size.graphs:
        for mode, about in (("fullpath", "visits of all nodes"), ("endpoint", "ends of walks")):
            config = Walks(graph=graph, mode=mode, walks=size.walks, num_nodes=size.num_nodes)  # type: ignore[arg-type]
            made.append(Arm(f"{mode}-{graph}", f"1: {about}, {graph}", config))
    for graph in size.graphs:
        rounds = Decompose(graph=graph, walks=100, rounds=(0, 1, 2, 3, 4), num_nodes=size.num_nodes)
        made.append(Arm(f"decompose-{graph}", f"2: R = 100, T = 0 to 4, {graph}", rounds))
    for graph in size.graphs:
        if graph not in NO_BATCH:
            batch = Batch(graph=graph, walks=100, rounds=2, num_queries=size.num_queries)
            made.append(Arm(f"batch-{graph}", f"3: {size.num_queries:,} queries, {graph}", batch))
    return made


def run(config: Walks | Decompose | Batch, seed: int, progress: Progress) -> Metrics:
    """One arm of any part."""
    graph = graph_of(config.graph)
    if isinstance(config, Walks):
        return run_walks(graph, config, seed, progress)
    if isinstance(config, Decompose):
        return run_decompose(graph, config, seed, progress)
    return run_batch(graph, config, seed)


def graph_of(name: str) -> Graph:
    """A data set's graph; BlogCatalog with log-normal weights."""
    graph = load_dataset(name).graph
    if name != "blogcatalog":
        return graph
    source, target, _ = graph.edges()
    return Graph.from_edges(
        source, target, np.random.default_rng(0).lognormal(0, 1, len(source)), num_nodes=graph.num_nodes
    )


def sampled(graph: Graph, count: int, seed: int) -> np.ndarray:
    """Different nodes, drawn evenly."""
    return np.random.default_rng(seed).permutation(graph.num_nodes)[:count]


def run_walks(graph: Graph, config: Walks, seed: int, progress: Progress) -> Metrics:
    """``curve`` of (R, mean error), its last error ``l1``, and its ``slope`` in logarithms."""
    nodes = sampled(graph, config.num_nodes, seed)
    exact = PageRank(ALPHA, tol=1e-8)
    truth = [exact.vector(graph, int(node)) for node in nodes]
    curve = []
    for walks in config.walks:
        progress(f"{walks:,} walks")
        index = PowerWalk(ALPHA, walks, config.mode, dtype="f32", seed=seed).build(graph, nodes)
        errors = [
            distance(score_N, index.query(int(node), rounds=0)) for node, score_N in zip(nodes, truth, strict=True)
        ]
        curve.append([walks, float(np.mean(errors))])
    steps, values = np.log(np.array(curve)).T
    slope = float(np.polyfit(steps, values, 1)[0]) if len(curve) > 1 else 0.0
    return {"l1": curve[-1][1], "slope": slope, "error_curve": curve}


def run_decompose(graph: Graph, config: Decompose, seed: int, progress: Progress) -> Metrics:
    """Per T: ``l1_T``, ``overlap_T``, ``cpu_ms_T``; ``over_limit``: the largest error over its limit (1 - alpha)^T worst raw error."""
    PowerWalk(ALPHA, 1).build(graph, [0]).query(0)  # compile
    begin = time.process_time()
    index = PowerWalk(ALPHA, config.walks, seed=seed).build(graph)
    found: Metrics = {"build_cpu_s": time.process_time() - begin, "index_mb": index.nbytes / 2**20}
    nodes = sampled(graph, config.num_nodes, seed)
    exact = PageRank(ALPHA, tol=1e-8)
    truth = [exact.vector(graph, int(node)) for node in nodes]
    worst = index.error_bound(0, sample=20 * config.num_nodes, seed=seed)
    over = []
    for rounds in config.rounds:
        progress(f"{rounds} rounds")
        errors, overlaps, took = [], [], []
        for node, score_N in zip(nodes, truth, strict=True):
            index.query(int(node), BEST, rounds)
            begin = time.process_time()
            for _ in range(3):
                best, _ = index.query(int(node), BEST, rounds)
            took.append((time.process_time() - begin) / 3)
            errors.append(distance(score_N, index.query(int(node), rounds=rounds)))
            overlaps.append(overlap(score_N, best))
        found |= {
            f"l1_{rounds}": float(np.mean(errors)),
            f"overlap_{rounds}": float(np.mean(overlaps)),
            f"cpu_ms_{rounds}": 1e3 * float(np.mean(took)),
        }
        over.append(max(errors) / ((1 - ALPHA) ** rounds * worst))
    return {**found, "over_limit": max(over), "halved": found["l1_2"] / found["l1_0"] if 2 in config.rounds else None}


def run_batch(graph: Graph, config: Batch, seed: int) -> Metrics:
    """CPU milliseconds per query, ``single_ms`` and ``batch_ms``, their ratio ``batch_ratio``, and the largest difference of scores."""
    index = PowerWalk(ALPHA, config.walks, seed=seed).build(graph)
    queries = np.random.default_rng(seed).integers(0, graph.num_nodes, config.num_queries).tolist()
    index.query(queries[0], BEST, config.rounds)
    index.query_batch(queries[:2], BEST, config.rounds)
    times: dict[str, list[float]] = {"single": [], "batch": []}
    # In turns: the machine may be busy.
    for _ in range(3):
        begin = time.process_time()
        single = [index.query(node, BEST, config.rounds) for node in queries]
        times["single"].append(time.process_time() - begin)
        begin = time.process_time()
        batch = index.query_batch(queries, BEST, config.rounds)
        times["batch"].append(time.process_time() - begin)
    difference = max(
        float(np.abs(score - batch.row(number)[1]).max(initial=0)) for number, (_, score) in enumerate(single)
    )
    per_query = {name: 1e3 * float(np.median(of)) / len(queries) for name, of in times.items()}
    return {
        "single_ms": per_query["single"],
        "batch_ms": per_query["batch"],
        "batch_ratio": per_query["single"] / per_query["batch"],
        "difference": difference,
    }


def distance(exact_N: np.ndarray, found: tuple[np.ndarray, np.ndarray]) -> float:
    """L1 distance of sparse scores to a dense vector."""
    ids, scores = found
    error_N = exact_N.copy()
    error_N[ids] -= scores
    return float(np.abs(error_N).sum())


def overlap(exact_N: np.ndarray, best: np.ndarray) -> float:
    """Share of the best that truly belong there: their score is at least that of the last that does, to 1e-9."""
    count = min(BEST, int((exact_N > 1e-12).sum()))
    least = np.partition(exact_N, len(exact_N) - count)[len(exact_N) - count]
    return float((exact_N[best[:count]] >= least - 1e-9).sum()) / count


def judge(results: Results, graphs: Sequence[str] = GRAPHS) -> list[Claim]:
    """The claims about ``graphs``; see the rule in the module's docstring."""
    claims = []
    for graph in graphs:
        claims += [
            _limited(
                _walks_needed(results, graph),
                FEWER,
                f"{graph}: full paths need fewer walks",
                "about alpha = 0.15 times",
            ),
            _limited(
                results.values(f"decompose-{graph}", "halved"),
                BELOW,
                f"{graph}: two rounds take the error below {BELOW} of the index's",
                "more accurate than the index",
            ),
            _limited(
                results.values(f"decompose-{graph}", "over_limit"),
                1.0,
                f"{graph}: the error is within (1 - alpha)^T of the index's worst",
                "not given",
                exact=True,
            ),
        ]
        if graph not in NO_BATCH:
            claim = f"{graph}: a batch is {BATCHED} times quicker than one by one"
            ratios = results.values(f"batch-{graph}", "batch_ratio")
            claims.append(_limited(ratios, BATCHED, claim, "not given", at_least=True))
    return claims


def _walks_needed(results: Results, graph: str) -> dict[int, float]:
    """By seed: walks of full paths for the error of end points at their largest R, over that R."""
    found = {}
    ours, theirs = (results.runs.get(f"{mode}-{graph}", {}) for mode in ("fullpath", "endpoint"))
    for seed in sorted(ours.keys() & theirs.keys()):
        most, error = theirs[seed]["error_curve"][-1]
        steps, values = np.log(np.array(ours[seed]["error_curve"])).T
        slope, height = np.polyfit(steps, values, 1)
        found[seed] = float(np.exp((np.log(error) - height) / slope)) / most
    return found


def _limited(
    values: dict[int, float], limit: float, claim: str, paper: str, *, at_least: bool = False, exact: bool = False
) -> Claim:
    """At most (or at least) ``limit`` in every seed; the worst stands in the claim."""
    if not values:
        return Claim.not_run(claim, paper)
    better: Callable[[float], bool] = (lambda value: value >= limit) if at_least else (lambda value: value <= limit)
    worst = min(values.values()) if at_least else max(values.values())
    verdict: Verdict = "not resolved" if len(values) < 2 else "holds" if better(worst) else "does not hold"
    return Claim.against(limit, claim, paper, worst, verdict, exact=exact, count=len(values))


def draw(results: Results, path: Path) -> None:
    """Error against walks (left) and against the CPU time of a query (right)."""
    from anabranch.files import atomic_file, atomic_write_text
    from anabranch.report.style import MARKERS, SERIES, figure, horizontal_grid, to_png, to_svg

    with figure(10, 4.2, ncols=2) as (made, (left, right)):
        graphs = [graph for graph in (*GRAPHS, "karate") if any(arm.endswith(f"-{graph}") for arm in results.runs)]
        for number, graph in enumerate(graphs):
            colour, marker = SERIES[number], MARKERS[number]
            for mode, line in (("fullpath", "-"), ("endpoint", ":")):
                curves = [run["error_curve"] for run in results.runs.get(f"{mode}-{graph}", {}).values()]
                if curves:
                    walks, errors = np.mean(np.array(curves), axis=0).T
                    left.plot(
                        walks, errors, line, color=colour, marker=marker, markersize=3.5, label=f"{graph}, {mode}"
                    )
            arm = f"decompose-{graph}"
            if results.runs.get(arm):
                points = [
                    (results.mean(arm, f"cpu_ms_{rounds}").mean, results.mean(arm, f"l1_{rounds}").mean)
                    for rounds in range(5)
                    if results.values(arm, f"l1_{rounds}")
                ]
                right.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=graph)
        for axes, label, title in (
            (left, "walks from a node", "L1 error of the index"),
            (right, "CPU milliseconds of a query (T = 0 to 4)", "L1 error of an answer"),
        ):
            axes.set(xscale="log", yscale="log", xlabel=label, title=title)
            horizontal_grid(axes)
            if axes.lines:
                axes.legend()
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)
