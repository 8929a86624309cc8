"""Does our HNSW find what hnswlib finds, in logarithmic time, and is that due to the heuristic and the hierarchy?

Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small World graphs", 2016,
arXiv 1603.09320. The paper claims logarithmic search, that the heuristic for choosing neighbours "significantly increases performance at
high recall and in case of highly clustered data" (abstract), and that the hierarchy beats flat NSW at low dimension. It gives figures, no
numbers that could be met at our scale; hnswlib 0.8.0, by the same author, stands beside ours in one run instead.

Arms, all with M = 16; recall is of the 10 nearest against every distance:

    ours, f16, i8, hnswlib   50,000 x 128, 200 Gaussian clusters, ef_construction 100: recall at ef 10 to 160
    digits, digits-hnswlib   1,797 x 64 handwritten digits of scikit-learn, every sixth a query
    scaling-d8, scaling-d32  2,000 to 128,000 Gaussian vectors: distances measured per query at recall 0.95 (between two values of ef)
    diverse, simple          200 tight clusters (spread 0.05), ef 64: the heuristic against the M nearest;
    extended, kept           and the paper's two options of it
    hierarchy, flat          128,000 uniform vectors of 4 dimensions: distances at recall 0.95, with levels and with level 0 alone
    churn, churn-hnswlib     ten rounds in which half of all elements is deleted and as many new ones come (ours: by `remove`, which
                             compacts; hnswlib: by mark_deleted and replace_deleted), then recall
    churn-fresh              the same elements in a new index

The rule, fixed before any recorded run: a claim holds if it is so in every seed of at least two, does not hold if it is so in none, and is
not resolved otherwise. "As good as hnswlib": at every ef recall is at most 0.01 lower. "Logarithmic": distances grow less than 6-fold from
the fewest to the most vectors (64 times as many; brute force grows 64-fold). "The heuristic": recall at least 0.05 above the M nearest.
"The hierarchy": fewer distances than flat. "Churn": recall at most 0.02 below a new index.
"""
# Shapes: N vectors, D dimension, Q queries

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.extras import require
from anabranch.files import atomic_file
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import every_seed

K = 10
EFS = (10, 20, 40, 80, 160)
TARGET = 0.95
AS_GOOD = 0.01
GROWTH = 6.0
GAIN = 0.05
LOSS = 0.02
SWEEP = (10, 12, 15, 19, 24, 30, 38, 48, 60, 76, 96, 120, 152, 192, 240, 304, 400, 600)

COLUMNS = (
    *(Column(f"recall_{ef}", f"recall\nef {ef}", ".4f") for ef in EFS),
    Column("recall", "recall\nef 64", ".4f"),
    Column("growth", "growth of\ndistances", ".2f"),
    Column("distances", "distances\nat 0.95", ",.0f"),
    Column("unreachable", "not\nreachable", ",.0f"),
)


@configclass
class Case(Config):
    """What one arm does: ``part`` names the function, the rest is its data and index."""

    part: str
    engine: str = "ours"
    dtype: str = "f32"
    data: str = "clusters"
    counts: tuple[int, ...] = (50_000,)
    dim: int = 128
    spread: float = 1.0
    num_queries: int = 1000
    ef_construction: int = 100
    heuristic: str = "diverse"
    extend_candidates: bool = False
    keep_pruned: bool = False
    flat: bool = False
    rounds: int = 0


@configclass
class Size(Config):
    """How much of everything."""

    count: int = Field(default=50_000, ge=200)
    dim: int = 128
    scaling: tuple[int, ...] = (2_000, 8_000, 32_000, 128_000)
    tight: int = 20_000
    uniform: int = 128_000
    churned: int = 10_000
    rounds: int = 10
    num_queries: int = 1000


SMOKE = Size(
    count=4_000,
    dim=32,
    scaling=(500, 2_000, 8_000),
    tight=4_000,
    uniform=8_000,
    churned=2_000,
    rounds=4,
    num_queries=200,
)


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    size = (Size() if full else SMOKE).replace(**changes)
    return Study(
        name="hnsw",
        title="HNSW: recall beside hnswlib, growth, heuristic, hierarchy, churn",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=list(arms(size).values()),
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
    )


def arms(size: Size) -> dict[str, Arm]:
    """All arms."""
    common: dict[str, Any] = {"num_queries": size.num_queries}
    parity = {"part": "parity", "counts": (size.count,), "dim": size.dim, **common}
    digits = {"part": "parity", "data": "digits", "counts": (1797,), "dim": 64, **common}
    tight = {"part": "ablation", "counts": (size.tight,), "dim": 16, "spread": 0.05, **common}
    uniform = {"part": "growth", "data": "uniform", "counts": (size.uniform,), "dim": 4, **common}
    churn = {"part": "churn", "counts": (size.churned,), "dim": 32, "rounds": size.rounds, **common}
    scaling = {"part": "growth", "data": "gaussian", "counts": size.scaling, **common}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "ours": ("float32", parity),
        "f16": ("float16, measured again in float32", {**parity, "dtype": "f16"}),
        "i8": ("int8, measured again in float32", {**parity, "dtype": "i8"}),
        "hnswlib": ("hnswlib", {**parity, "engine": "hnswlib"}),
        "digits": ("float32, digits", digits),
        "digits-hnswlib": ("hnswlib, digits", {**digits, "engine": "hnswlib"}),
        "scaling-d8": ("growth, 8 dimensions", {**scaling, "dim": 8}),
        "scaling-d32": ("growth, 32 dimensions", {**scaling, "dim": 32}),
        "diverse": ("heuristic", tight),
        "simple": ("the M nearest", {**tight, "heuristic": "simple"}),
        "extended": ("heuristic, extended candidates", {**tight, "extend_candidates": True}),
        "kept": ("heuristic, pruned ones kept", {**tight, "keep_pruned": True}),
        "hierarchy": ("levels", uniform),
        "flat": ("level 0 alone", {**uniform, "flat": True}),
        "churn": ("ours after churn", churn),
        "churn-hnswlib": ("hnswlib after churn", {**churn, "engine": "hnswlib"}),
        "churn-fresh": ("ours, new", {**churn, "engine": "fresh"}),
    }
    return {name: Arm(name, about, Case(**case)) for name, (about, case) in cases.items()}


# Running


def run(config: Case, seed: int, progress: Progress) -> Metrics:
    """One arm."""
    parts: dict[str, Callable[[Case, int, Progress], Metrics]] = {
        "parity": parity,
        "growth": growth,
        "ablation": ablation,
        "churn": churn,
    }
    return parts[config.part](config, seed, progress)


def parity(config: Case, seed: int, progress: Progress) -> Metrics:
    """Recall at every ef."""
    base_ND, query_QD = vectors(config, config.counts[0], seed)
    truth_QK = nearest(base_ND, query_QD)
    progress(f"building {len(base_ND):,} x {base_ND.shape[1]}")
    search = build(config, base_ND, seed)
    return {f"recall_{ef}": recall(search(query_QD, ef), truth_QK) for ef in EFS}


def growth(config: Case, seed: int, progress: Progress) -> Metrics:
    """Distances per query at recall 0.95 for every number of vectors."""
    found: Metrics = {}
    for count in config.counts:
        base_ND, query_QD = vectors(config, count, seed)
        truth_QK = nearest(base_ND, query_QD)
        progress(f"building {count:,} x {config.dim}")
        index = our_index(config, base_ND, seed)
        found[f"distances_{count}"] = at_recall(index, query_QD, truth_QK)
    first, last = found[f"distances_{config.counts[0]}"], found[f"distances_{config.counts[-1]}"]
    found["distances"] = last
    if len(config.counts) > 1 and first and last:
        found["growth"] = last / first
        found["growth_of_vectors"] = config.counts[-1] / config.counts[0]
    return found


def ablation(config: Case, seed: int, progress: Progress) -> Metrics:
    """Recall at ef 64, and what level 0 does not lead to."""
    base_ND, query_QD = vectors(config, config.counts[0], seed)
    progress(f"building {len(base_ND):,} x {config.dim}")
    index = our_index(config, base_ND, seed)
    ids, _ = index.search(query_QD, K, 64)
    return {
        "recall": recall(ids, nearest(base_ND, query_QD)),
        "unreachable": index.stats()["unreachable"],
        "distances_64": index.stats()["distances"],
    }


def churn(config: Case, seed: int, progress: Progress) -> Metrics:
    """Recall at ef 64 after rounds in which half of the elements is exchanged."""
    count, half = config.counts[0], config.counts[0] // 2
    pool_ND, query_QD = vectors(config, count + config.rounds * half, seed)
    generator = np.random.default_rng([seed, 1])
    id_N = np.arange(count)
    rounds = []
    for number in range(config.rounds):
        gone = generator.permutation(count)[:half]
        new = count + number * half + np.arange(half)
        rounds.append((id_N[gone].copy(), new))
        id_N[gone] = new
    progress(f"{config.rounds} rounds of {half:,}")
    if config.engine == "fresh":
        index = our_index(config, pool_ND[id_N], seed)
        found = id_N[index.search(query_QD, K, 64)[0]]
    elif config.engine == "ours":
        index = our_index(config, pool_ND[:count], seed)
        for old, new in rounds:
            index.remove(old)
            index.add(pool_ND[new], new)
        index.compact()
        found, _ = index.search(query_QD, K, 64)
    else:
        other = hnswlib_index(config, pool_ND[:count], seed, allow_replace_deleted=True)
        for old, new in rounds:
            for label in old.tolist():
                other.mark_deleted(label)
            other.add_items(pool_ND[new], new, num_threads=1, replace_deleted=True)
        other.set_ef(64)
        found = other.knn_query(query_QD, K, num_threads=1)[0].astype(np.int64)
    return {"recall": recall(found, id_N[nearest(pool_ND[id_N], query_QD)])}


def build(config: Case, base_ND: np.ndarray, seed: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """A function from (queries, ef) to ids."""
    if config.engine == "ours":
        index = our_index(config, base_ND, seed)
        return lambda query_QD, ef: index.search(query_QD, K, ef)[0]
    other = hnswlib_index(config, base_ND, seed)

    def search(query_QD: np.ndarray, ef: int) -> np.ndarray:
        other.set_ef(ef)
        return other.knn_query(query_QD, K, num_threads=1)[0].astype(np.int64)

    return search


def our_index(config: Case, base_ND: np.ndarray, seed: int) -> Any:
    """Our index of all vectors."""
    from anabranch.graph.hnsw import HNSW

    index = HNSW(
        base_ND.shape[1],
        ef_construction=config.ef_construction,
        dtype=config.dtype,
        seed=seed,
        heuristic=config.heuristic,
        extend_candidates=config.extend_candidates,
        keep_pruned=config.keep_pruned,
        flat=config.flat,
        workers=1,
    )
    index.add(base_ND)
    return index


def hnswlib_index(config: Case, base_ND: np.ndarray, seed: int, **options: Any) -> Any:
    """hnswlib's index of all vectors."""
    require("hnswlib", by="this arm (leave it out by --arms)")
    import hnswlib

    index = hnswlib.Index(space="l2", dim=base_ND.shape[1])
    index.init_index(
        max_elements=len(base_ND), M=16, ef_construction=config.ef_construction, random_seed=100 + seed, **options
    )
    index.add_items(base_ND, num_threads=1)
    return index


def vectors(config: Case, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Base and queries of one kind, float32 [N, D] and [Q, D]."""
    generator = np.random.default_rng([seed, 0])
    total = count + config.num_queries
    if config.data == "digits":
        from sklearn.datasets import load_digits

        drawn_ND = load_digits().data.astype(np.float32)[generator.permutation(1797)]
        return drawn_ND[300:], drawn_ND[:300]
    if config.data == "uniform":
        drawn_ND = generator.random((total, config.dim), np.float32)
    else:
        drawn_ND = generator.standard_normal((total, config.dim), np.float32)
    if config.data == "clusters":
        centre_CD = generator.standard_normal((200, config.dim), np.float32)
        drawn_ND = config.spread * drawn_ND + centre_CD[generator.integers(0, 200, total)]
    return drawn_ND[config.num_queries :], drawn_ND[: config.num_queries]


def nearest(base_ND: np.ndarray, query_QD: np.ndarray) -> np.ndarray:
    """The truth: rows of the K nearest, [Q, K]."""
    from anabranch.graph.hnsw import brute_force

    return brute_force(base_ND, query_QD, K)[0]


def recall(found_QK: np.ndarray, truth_QK: np.ndarray) -> float:
    """Share of the truth that was found."""
    hits = [len(set(a) & set(b)) for a, b in zip(found_QK.tolist(), truth_QK.tolist(), strict=True)]
    return sum(hits) / truth_QK.size


def at_recall(index: Any, query_QD: np.ndarray, truth_QK: np.ndarray) -> float | None:
    """Distances per query at recall 0.95, between the two values of ef around it; None where no ef reaches it."""
    before: tuple[float, float] | None = None
    for ef in SWEEP:
        ids, _ = index.search(query_QD, K, ef)
        reached, cost = recall(ids, truth_QK), index.stats()["distances"]
        if reached >= TARGET:
            if before is None or reached == before[0]:
                return cost
            share = (TARGET - before[0]) / (reached - before[0])
            return math.exp(math.log(before[1]) + share * (math.log(cost) - math.log(before[1])))
        before = (reached, cost)
    return None


# Judging

NONE = "no number"

# Metric, ours, baseline, sign of a gain, least gain, claim, paper.
DIFFERENCES = (
    ("recall", "diverse", "simple", 1, GAIN, "the heuristic finds more in tight clusters", "abstract, no number"),
    ("recall", "extended", "diverse", 1, -AS_GOOD, "extended candidates lose nothing", NONE),
    ("recall", "kept", "diverse", 1, -AS_GOOD, "keeping pruned ones loses nothing", NONE),
    ("distances", "hierarchy", "flat", -1, 0.0, "levels save distances in 4 dimensions", "figure, no number"),
    ("recall", "churn", "churn-fresh", 1, -LOSS, "churn costs ours at most 0.02", "not in the paper"),
    ("recall", "churn-hnswlib", "churn-fresh", 1, -LOSS, "churn costs hnswlib at most 0.02", "not in the paper"),
)


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    claims = [
        _parity(results, ours, baseline, f"{about} finds as much as hnswlib at every ef")
        for ours, baseline, about in (
            ("ours", "hnswlib", "float32"),
            ("f16", "hnswlib", "float16"),
            ("i8", "hnswlib", "int8"),
            ("digits", "digits-hnswlib", "float32 on digits"),
        )
    ]
    claims += [
        _growth(results, f"scaling-d{dim}", f"distances grow logarithmically, {dim} dimensions") for dim in (8, 32)
    ]
    claims += [_difference(results, *row) for row in DIFFERENCES]
    return claims


def _pairs(results: Results, metric: str, ours: str, baseline: str) -> list[tuple[float, float]]:
    left, right = results.values(ours, metric), results.values(baseline, metric)
    return [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]


def _difference(
    results: Results, metric: str, ours: str, baseline: str, sign: int, least: float, claim: str, paper: str
) -> Claim:
    seen = [sign * (mine - theirs) >= least for mine, theirs in _pairs(results, metric, ours, baseline)]
    verdict = every_seed(seen)
    return results.claim(
        metric,
        ours=ours,
        baseline=baseline,
        claim=claim,
        paper=paper,
        verdict=lambda _: verdict,
        limit=(lambda mean: mean + sign * least) if least else None,
    )


def _parity(results: Results, ours: str, baseline: str, claim: str) -> Claim:
    """The ef at which ours is farthest behind stands in the table."""
    worst: dict[int, list[float]] = {
        ef: [mine - theirs for mine, theirs in _pairs(results, f"recall_{ef}", ours, baseline)] for ef in EFS
    }
    if not all(worst.values()):
        return Claim.not_run(claim, "the same algorithm")
    verdict = every_seed([all(gains[row] >= -AS_GOOD for gains in worst.values()) for row in range(len(worst[EFS[0]]))])
    ef = min(worst, key=lambda ef: min(worst[ef]))
    return results.claim(
        f"recall_{ef}",
        ours=ours,
        baseline=baseline,
        claim=f"{claim} (worst: {ef})",
        paper="the same algorithm",
        verdict=lambda _: verdict,
        limit=lambda mean: mean - AS_GOOD,
    )


def _growth(results: Results, arm: str, claim: str) -> Claim:
    grown, vectors = results.values(arm, "growth"), results.values(arm, "growth_of_vectors")
    if not grown:
        return Claim.not_run(claim, "O(log N)")
    mean, most = results.mean(arm, "growth"), next(iter(vectors.values()))
    interval = mean.interval
    return Claim(
        f"{claim} (below {GROWTH:g}-fold; brute force: {most:g}-fold)",
        "O(log N)",
        most,
        mean.mean,
        mean.mean - most,
        None if interval is None else [end - most for end in interval],
        every_seed([value < GROWTH for value in grown.values()]),
        limit=GROWTH,
    )


def draw(results: Results, path: Path) -> None:
    """Recall against ef of both libraries, and distances against the number of vectors."""
    from anabranch.files import atomic_write_text
    from anabranch.report.style import MARKERS, SERIES, figure, horizontal_grid, to_png, to_svg

    with figure(10, 3.8, ncols=2) as (made, (left, right)):
        made.suptitle("HNSW at our scale", x=0.01, ha="left", fontweight="bold")
        shown: list[str] = [arm for arm in ("ours", "f16", "i8", "hnswlib") if arm in results.runs]
        for number, arm in enumerate(shown):
            heights = [results.mean(arm, f"recall_{ef}").mean for ef in EFS]
            left.plot(EFS, heights, marker=MARKERS[number], color=SERIES[number], label=arm, clip_on=False)
        grown: list[str] = [arm for arm in ("scaling-d8", "scaling-d32") if arm in results.runs]
        for number, arm in enumerate(grown):
            counts = _counts(results, arm)
            heights = [results.mean(arm, f"distances_{count}").mean for count in counts]
            right.plot(counts, heights, marker=MARKERS[number], color=SERIES[number], label=arm)
        if left.lines:
            # There is no more than all of them.
            left.set_ylim(top=1.0)
        for axes, x, y in ((left, "ef", "recall of 10"), (right, "vectors", "distances per query at recall 0.95")):
            axes.set_xscale("log")
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            horizontal_grid(axes)
            if axes.lines:
                axes.legend()
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_suffix(".png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_suffix(".svg"), svg)


def _counts(results: Results, arm: str) -> Sequence[int]:
    names = next(iter(results.runs[arm].values()))
    return sorted(int(name.split("_")[1]) for name in names if name.startswith("distances_") and names[name])
