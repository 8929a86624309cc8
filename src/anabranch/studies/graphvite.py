"""Does training in orthogonal blocks give DeepWalk's vectors, whoever trains them, and do the paper's parts help?

"GraphVite: A High-Performance CPU-GPU Hybrid System for Node Embedding", WWW 2019, arXiv 1903.00757. The paper: 51 times the speed of the
best CPU system on a graph of a million nodes, with vectors as good. It used four GPUs; here is one CPU core, and what is compared is
quality at a number of samples, the independence of the result of who computes it, and each part by itself.

Scaled down: BlogCatalog (10,312 nodes, 333,983 edges, 39 labels) with 500 epochs of the reference's 2,000, PPI, and DBLP (51,264 nodes,
128,000 edges, 60 classes), dim 128, the reference's hyper-parameters. Node classification as in DeepWalk's paper, 10% of the nodes
labelled, five shuffles. DeepWalk's F1 there is that of FastRP's notebook (80 walks of 40, window 10, dim 128): micro .3643, macro .2134.

    deepwalk           BlogCatalog, 500 epochs
    ppi                PPI, 500 epochs (no published number of DeepWalk for this protocol; shown only)
    parts-1, -4, -16   BlogCatalog, 200 epochs, in 1, 16 and 256 blocks: negatives from the whole graph, a quarter, a sixteenth
    workers            BlogCatalog, 20 epochs, 1, 2 and 4 threads with 4 and with 16 parts: is every bit the same?
    near, far          DBLP, 300 epochs, augmentation 1, and the automatic 8
    line-in-order, line-shuffled        BlogCatalog, 200 epochs of LINE, without and with the pseudo shuffle
    memory             BlogCatalog, 20 epochs, half of the parameters allowed in memory
    link               BlogCatalog without 1% of its edges, 500 epochs of LINE: do hidden edges score above pairs that are none?

The rule, fixed before any full run. "Within" and "at least" claims hold if they are so in every seed of at least two, do not hold
if in none, and are not resolved otherwise. The gain of augmentation and that of the shuffle hold if the whole 95% t-interval of the
paired difference lies above their limit (0.02 and 0), do not hold if it lies below, and are not resolved otherwise.
"""
# Shapes: N nodes, D dim

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.files import atomic_file, atomic_write_text
from anabranch.graph.datasets import load_dataset
from anabranch.graph.evaluate import classify_nodes, hold_out_edges, link_auc
from anabranch.graph.graphvite import GraphVite
from anabranch.report.style import GRID, INK, SERIES, figure, horizontal_grid, to_png, to_svg
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import Estimate, Verdict, every_seed, verdict_below
from anabranch.studies.reading import of_graphs

# DeepWalk on BlogCatalog, 10% labelled.
MICRO, MACRO = 0.3643, 0.2134
POINT = 0.01  # of F1

# Samples per second of a core.
RATE = 1.5e6

# Of augmentation, on a sparse graph.
GAIN = 0.02

# README of the reference: .8999.
AUC = 0.89
THREADS = (1, 2, 4)

COLUMNS = (
    Column("micro_f1", "micro F1\n@10%", ".4f"),
    Column("macro_f1", "macro F1\n@10%", ".4f"),
    Column("auc", "AUC", ".4f"),
    Column("loss", "loss", ".4f"),
    Column("samples_per_cpu_second", "samples\n/CPU s", ",.0f"),
    Column("cpu_seconds", "CPU s", ".1f"),
    Column("same_bits", "same\nbits", ".0f"),
    Column("peak_share", "peak /\nlimit", ".3f"),
)


@configclass
class Trial(Config):
    """One arm: a graph, how it is embedded, what is measured."""

    dataset: str = "blogcatalog"
    task: str = "classify"
    epochs: float = 200
    model: str = "deepwalk"
    dim: int = 128
    augmentation: int = 0  # 0: automatic
    partitions: int = 4
    shuffle: bool = True
    hidden: float = 0.01  # share of edges


@configclass
class Size(Config):
    """Epochs and graphs of the arms."""

    long: float = Field(default=500, gt=0)
    middle: float = Field(default=200, gt=0)
    short: float = Field(default=20, gt=0)
    sparse: float = Field(default=300, gt=0)
    dim: int = 128
    hidden: float = Field(default=0.01, gt=0, lt=1)
    dense_graph: str = "blogcatalog"
    other_graph: str = "ppi"
    sparse_graph: str = "dblp"


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    small = Size(long=100, middle=30, short=5, sparse=60)
    size = (Size() if full else small).replace(**changes)
    found = arms(size)
    return Study(
        name="graphvite",
        title="node embedding in orthogonal blocks",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=list(found.values()),
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=partial(draw, graphs={name: arm.config.dataset for name, arm in found.items()}),
        inputs=of_graphs,
    )


def arms(size: Size) -> dict[str, Arm]:
    """All arms."""

    def of(name: str, about: str, **options: Any) -> Arm:
        return Arm(name, about, Trial(**{"dataset": size.dense_graph, "dim": size.dim, **options}))

    found = [
        of("deepwalk", "DeepWalk's samples", epochs=size.long),
        of("ppi", "the same on PPI", epochs=size.long, dataset=size.other_graph),
        *(of(f"parts-{p}", f"{p * p} blocks", epochs=size.middle, partitions=p) for p in (1, 4, 16)),
        of("workers", "1, 2 and 4 threads", epochs=size.short, task="workers"),
        of("near", "augmentation 1, sparse graph", epochs=size.sparse, dataset=size.sparse_graph, augmentation=1),
        of("far", "automatic augmentation, sparse graph", epochs=size.sparse, dataset=size.sparse_graph),
        of("line-in-order", "LINE, samples in order", epochs=size.middle, model="line", shuffle=False),
        of("line-shuffled", "LINE, pseudo shuffle", epochs=size.middle, model="line"),
        of("memory", "half of the parameters in memory", epochs=size.short, task="memory"),
        of("link", "hidden edges", epochs=size.long, model="line", task="link", hidden=size.hidden),
    ]
    return {arm.name: arm for arm in found}


def run(config: Trial, seed: int, progress: Progress) -> Metrics:
    """Embed and measure."""
    return {"classify": classify, "workers": compare_workers, "memory": within_memory, "link": find_links}[config.task](
        config, seed, progress
    )


def model_of(config: Trial, seed: int, **options: Any) -> GraphVite:
    """The estimator of an arm. Walks are made in turn with training, so that CPU seconds are those of one core."""
    return GraphVite(
        config.dim,
        **{
            "model": config.model,
            "epochs": config.epochs,
            "augmentation": config.augmentation or "auto",
            "partitions": config.partitions,
            "shuffle_base": "auto" if config.shuffle else 1,
            "samplers": 0,
            "seed": seed,
            **options,
        },
    )


def fit(model: GraphVite, graph: Any, progress: Progress) -> Metrics:
    """Train (kernels compiled before), and what it cost."""
    GraphVite(**{**model.get_params(), "epochs": 1e-9}).fit(graph)  # one walk
    model.set_params(callbacks=[lambda told: progress(f"epoch {told.epoch:.0f}, loss {told.loss:.4f}")])
    began = time.process_time()
    model.fit(graph)
    seconds = time.process_time() - began
    samples = (1 + model.negatives) * model.epochs * graph.num_edges
    return {
        "cpu_seconds": seconds,
        "samples_per_cpu_second": samples / seconds,
        "loss": model.history[-1]["loss"],
        "curve": [[row["epoch"], row["loss"]] for row in model.history],
    }


def classify(config: Trial, seed: int, progress: Progress) -> Metrics:
    """Node classification."""
    data = load_dataset(config.dataset)
    model = model_of(config, seed)
    metrics = fit(model, data.graph, progress)
    scores = classify_nodes(model.transform(), data.labels_NC, train_fraction=0.1)
    return {**metrics, "micro_f1": scores.micro, "macro_f1": scores.macro}


def compare_workers(config: Trial, seed: int, progress: Progress) -> Metrics:
    """Whether all numbers of threads give the same bits, and the wall time of two over that of one."""
    graph = load_dataset(config.dataset).graph
    same, walls = [], {}
    for partitions in (4, 16):
        found = []
        for workers in THREADS:
            model = model_of(config, seed, partitions=partitions, workers=workers)
            began = time.perf_counter()
            model.fit(graph)
            walls[partitions, workers] = time.perf_counter() - began
            found.append((model.vertex_ND.tobytes(), model.context_ND.tobytes()))
        same.append(all(one == found[0] for one in found))
    return {"same_bits": float(all(same)), "speed_of_two": walls[16, 1] / walls[16, 2]}


def within_memory(config: Trial, seed: int, progress: Progress) -> Metrics:
    """Whether training with half of the memory keeps to it, and gives the same."""
    graph = load_dataset(config.dataset).graph
    limit = graph.num_nodes * config.dim * 4
    # By itself, a pool is larger where parts are moved.
    options = {"partitions": 16, "pool_size": 1_000_000}
    within = model_of(config, seed, **options, memory_limit=limit, workers=2).fit(graph)
    whole = model_of(config, seed, **options).fit(graph)
    same = np.array_equal(within.vertex_ND, whole.vertex_ND) and np.array_equal(within.context_ND, whole.context_ND)
    return {"same_bits": float(same), "peak_share": within.peak_part_bytes / limit}


def find_links(config: Trial, seed: int, progress: Progress) -> Metrics:
    """AUC of hidden edges."""
    held = hold_out_edges(load_dataset(config.dataset).graph, config.hidden, seed)
    model = model_of(config, seed)
    metrics = fit(model, held.graph, progress)
    found = link_auc(model.vertex_ND, held.positive_E2, held.negative_E2, target_ND=model.context_ND)
    return {**metrics, "auc": found}


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    found = [
        _least(results, "deepwalk", "micro_f1", MICRO - POINT, "micro F1 within a point of DeepWalk's, .3643", "same"),
        _least(results, "deepwalk", "macro_f1", MACRO - POINT, "macro F1 within a point of DeepWalk's, .2134", "same"),
        _least(
            results, "deepwalk", "samples_per_cpu_second", RATE, "at least 1.5 million samples per CPU second", "4 GPUs"
        ),
        _exact(results, "workers", "same_bits", "1, 2 and 4 workers give the same bits", "nearly exchangeable"),
        _near(results, "parts-4", "negatives of a quarter of the graph cost at most a point of micro F1"),
        _near(results, "parts-16", "negatives of a sixteenth cost at most a point of micro F1"),
        _gain(results, "far", "near", GAIN, "augmentation adds 0.02 of micro F1 on a sparse graph", "figure"),
        _gain(results, "line-shuffled", "line-in-order", 0.0, "the pseudo shuffle helps LINE", "table, with GPUs"),
        _exact(results, "memory", "same_bits", "parts on disk give the same bits", "not in the paper"),
        _most(results, "memory", "peak_share", 1, "parts in memory keep to the limit", "not in the paper"),
        _least(results, "link", "auc", AUC, "hidden edges are found, AUC at least .89", ".8999 (README)"),
    ]
    return found


def _bound(
    results: Results,
    arm: str,
    metric: str,
    limit: float,
    claim: str,
    paper: str,
    holds: Callable[[float], bool],
    *,
    exact: bool = False,
) -> Claim:
    values = list(results.values(arm, metric).values())
    if not values:
        return Claim.not_run(claim, paper)
    mean = results.mean(arm, metric)
    verdict = every_seed([holds(value) for value in values])
    return Claim.against(limit, claim, paper, mean.mean, verdict, mean.interval, exact=exact, count=len(values))


def _least(results: Results, arm: str, metric: str, limit: float, claim: str, paper: str) -> Claim:
    return _bound(results, arm, metric, limit, claim, paper, lambda value: value >= limit)


def _exact(results: Results, arm: str, metric: str, claim: str, paper: str) -> Claim:
    return _bound(results, arm, metric, 1, claim, paper, lambda value: value >= 1, exact=True)


def _most(results: Results, arm: str, metric: str, limit: float, claim: str, paper: str) -> Claim:
    return _bound(results, arm, metric, limit, claim, paper, lambda value: value <= limit)


def _near(results: Results, arm: str, claim: str) -> Claim:
    ours, whole = results.values(arm, "micro_f1"), results.values("parts-1", "micro_f1")
    seeds = sorted(ours.keys() & whole.keys())
    verdict = every_seed([ours[seed] >= whole[seed] - POINT for seed in seeds])
    return results.claim(
        "micro_f1", ours=arm, baseline="parts-1", claim=claim, paper="figure", verdict=lambda _: verdict
    )


def _gain(results: Results, arm: str, baseline: str, limit: float, claim: str, paper: str) -> Claim:
    def verdict(difference: Estimate) -> Verdict:
        return verdict_below(Estimate(-difference.mean, difference.half_width, difference.count), -limit)

    return results.claim(
        "micro_f1",
        ours=arm,
        baseline=baseline,
        claim=claim,
        paper=paper,
        verdict=verdict,
        limit=(lambda mean: mean + limit) if limit else None,
    )


def draw(results: Results, path: Path, *, graphs: Mapping[str, str]) -> None:
    """Left, micro and macro F1 of each arm; right, loss by epoch. ``graphs`` are theirs: figures of different ones do not compare."""
    scored = sorted(
        (arm for arm in results.runs if results.values(arm, "micro_f1")), key=graphs.__getitem__, reverse=True
    )
    with figure(10, max(3.2, 1.4 + 0.34 * len(scored)), ncols=2) as (made, (left, right)):
        made.suptitle("GraphVite at our scale", x=0.01, ha="left", fontweight="bold", color=INK)
        for number, metric in enumerate(("micro_f1", "macro_f1")):
            for row, arm in enumerate(scored):
                values = list(results.values(arm, metric).values())
                left.plot(values, [row] * len(values), "o", color=SERIES[number], label=metric if row == 0 else None)
        left.set_yticks(range(len(scored)), [f"{arm}, {graphs[arm]}" for arm in scored])
        for row in range(1, len(scored)):
            if graphs[scored[row]] != graphs[scored[row - 1]]:
                left.axhline(row - 0.5, color=GRID, linewidth=1)
        left.set_xlim(left=0)
        left.set_xlabel("F1, 10% of the nodes labelled")
        if left.lines:
            left.legend()
        for number, (arm, seeds) in enumerate(results.runs.items()):
            curve = next(iter(seeds.values())).get("curve")
            if curve:
                # Colours come again with another line.
                style = ("-", "--", ":")[number // len(SERIES) % 3]
                label = f"{arm}, {graphs[arm]}"
                right.plot(*zip(*curve, strict=True), style, color=SERIES[number % len(SERIES)], label=label)
        right.set_xlabel("epochs")
        right.set_ylabel("loss")
        horizontal_grid(right)
        if right.lines:
            right.legend(fontsize=7)
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)
