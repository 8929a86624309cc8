"""Does NanoFlow's search find what the paper measured, and what do asynchronous scheduling and overlap give on two cores?

"NanoFlow: Towards Optimal Large Language Model Serving Throughput", Zhu et al., arXiv 2408.12757v2 (OSDI 2025). On 8 A100 (LLaMA-2-70B,
1024 tokens in, 512 out, tokens/s of a GPU): one operation after the other 1,092, nano-batches alone 958 (-13%), all 1,291 (1.18 x);
overlap of the network alone 1.07 x, of network and memory 1.17 x; 68.5% of the optimum, LLaMA-3-8B on one GPU 78.5%.

Arms; what is timed takes turns inside one run, so a busy moment meets both sides:

    search-MODEL       E1. Search in the simulator under the profile of the A100 and the paper's R -> P points; seeds above 0 move the inner
                       points by up to 5%, which is how much the paper saw them vary over shapes.
    async              E2. Engine, 32 requests at once, lengths of a public trace: asynchronous against synchronous scheduling.
    overlap-attention  E3. Decode attention over more keys and values than the caches hold, beside products of a feed-forward, a core each.
    overlap-disk       E3. An expert read from disk, beside products.
    overlap-dequant    E3. An expert turned from 8 bits to float32, beside products.
    nano-only          E4. Steps cut in halves and run one after the other.

Models have the shape of SmolLM2-135M and random weights: times do not depend on them. The trace is Azure's of 2023 (conversations), cut to
what two cores do in minutes.

The rule, fixed before any recorded run. E1: the ratio of the search to one after the other within 1.10 to 1.25 for LLaMA-2-70B and above
1.03 for LLaMA-3-8B; splitting alone below 1; without overlap of the network, and without that of memory, at least 0.02 lower. E2: at least
1.05. E3: disk at least 1.2; attention and dequantising above 1. E4: below 1. Each in every seed; with fewer than two seeds nothing is
resolved. Shares of the optimum are reported, not judged.
"""

from pathlib import Path
from typing import Any

import numpy as np

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.files import atomic_file, atomic_write_text
from anabranch.report.style import INK, MUTED, SERIES, figure, to_png, to_svg
from anabranch.studies.harness import Arm, Claim, Column, Results, Study
from anabranch.studies.nanoflow_runs import Async, Model, Nano, Overlap, Search, run
from anabranch.studies.paired import Verdict
from anabranch.studies.reading import of_trace

LARGE, SMALL = "search-llama-2-70b", "search-llama-3-8b"
COLUMNS = (
    Column("full", "ours /\nsequential", ".3f"),
    Column("split_only", "split\nonly", ".3f"),
    Column("no_network", "without\nnetwork", ".3f"),
    Column("no_memory", "without\nmemory", ".3f"),
    Column("of_optimum", "of the\noptimum", ".3f"),
    Column("ratio", "timed\nratio", ".3f"),
    Column("tokens_s", "tokens/s", ".1f"),
    Column("p99_gap_ratio", "P99 gap\nratio", ".2f"),
)


@configclass
class Size(Config):
    """The sizes of all parts."""

    model: Model = Model()
    evaluations: int = Field(default=20_000, ge=1)
    num_requests: int = Field(default=32, ge=1)
    max_prompt: int = 256
    max_output: int = 96
    stream_mb: int = Field(default=512, ge=1)
    rows: int = Field(default=512, ge=1)
    num_decodes: int = 128
    context: int = 256
    num_prefills: int = 384
    rounds: int = Field(default=5, ge=1)


TINY = Model(num_layers=3, dim=96, hidden_dim=256, num_heads=4, num_kv_heads=2, vocab_size=512)
SMOKE = Size(model=TINY, evaluations=1500, num_requests=16, max_prompt=64, max_output=24, stream_mb=64, rounds=3)


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    size = (Size() if full else SMOKE).replace(**changes)
    chosen = arms(size)
    return Study(
        name="nanoflow",
        title="nano-batches: search in the simulator, asynchronous scheduling, overlap on two cores",
        settings={"size": "full" if full else "smoke", **to_dict(size)},
        arms=list(chosen.values()),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
        inputs=lambda config: of_trace() if isinstance(config, Async) else None,
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
    )


def arms(size: Size) -> dict[str, Arm]:
    """All arms."""
    made = [
        Arm(
            LARGE,
            "E1: LLaMA-2-70B on 8 A100, simulated",
            Search(model="llama-2-70b", devices=8, dense_batch=2048, evaluations=size.evaluations),
        ),
        Arm(
            SMALL,
            "E1: LLaMA-3-8B on one A100, simulated",
            Search(model="llama-3-8b", devices=1, dense_batch=1024, evaluations=size.evaluations),
        ),
        Arm(
            "async",
            f"E2: {size.num_requests} requests, asynchronous over synchronous",
            Async(
                model=size.model,
                num_requests=size.num_requests,
                max_prompt=size.max_prompt,
                max_output=size.max_output,
                rounds=size.rounds,
            ),
        ),
        *(
            Arm(
                f"overlap-{what}",
                f"E3: {what} beside products, over one after the other",
                Overlap(what=what, size_mb=size.stream_mb, rows=size.rows, rounds=size.rounds),
            )
            for what in ("attention", "disk", "dequant")
        ),
        Arm(
            "nano-only",
            "E4: steps in halves, one after the other, over whole steps",
            Nano(
                model=size.model,
                num_decodes=size.num_decodes,
                context=size.context,
                num_prefills=size.num_prefills,
                rounds=size.rounds,
            ),
        ),
    ]
    return {arm.name: arm for arm in made}


# Judgement


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    full, without = (
        results.values(LARGE, "full"),
        {name: results.values(LARGE, name) for name in ("no_network", "no_memory")},
    )
    claims = [
        _within(full, 1.10, 1.25, "E1: LLaMA-2-70B, ours over one after the other within 1.10 to 1.25", "1.18"),
        _limited(results.values(LARGE, "split_only"), 1.0, "E1: splitting alone is slower", "0.87", is_most=True),
        _limited(
            _lower(full, without["no_network"]),
            0.02,
            "E1: without overlap of the network the ratio is lower by 0.02",
            "about 7%",
        ),
        _limited(
            _lower(full, without["no_memory"]), 0.02, "E1: without overlap of memory it is lower by 0.02", "about 10%"
        ),
        _limited(results.values(SMALL, "full"), 1.03, "E1: LLaMA-3-8B on one device gains 1.03", "not given"),
        _limited(
            results.values("async", "ratio"), 1.05, "E2: asynchronous scheduling gains 1.05", "< 1% of tokens wasted"
        ),
        _limited(
            results.values("overlap-disk", "ratio"),
            1.2,
            "E3: reading an expert from disk beside products gains 1.2",
            "not given",
        ),
        _limited(
            results.values("overlap-attention", "ratio"),
            1.0,
            "E3: attention beside products gains",
            "1.10 (memory, A100)",
        ),
        _limited(
            results.values("overlap-dequant", "ratio"), 1.0, "E3: dequantising beside products gains", "not given"
        ),
        _limited(results.values("nano-only", "ratio"), 1.0, "E4: nano-batches alone are slower", "0.87", is_most=True),
    ]
    return claims


def _lower(values: dict[int, float], others: dict[int, float]) -> dict[int, float]:
    return {seed: values[seed] - others[seed] for seed in values.keys() & others.keys()}


def _limited(values: dict[int, float], limit: float, claim: str, paper: str, *, is_most: bool = False) -> Claim:
    """At least (or, with ``is_most``, less than) ``limit`` in every seed; the worst stands in the claim."""
    if not values:
        return Claim.not_run(claim, paper)
    worst = max(values.values()) if is_most else min(values.values())
    holds = worst < limit if is_most else worst >= limit
    verdict: Verdict = "not resolved" if len(values) < 2 else "holds" if holds else "does not hold"
    return Claim.against(limit, claim, paper, worst, verdict, count=len(values))


def _within(values: dict[int, float], low: float, high: float, claim: str, paper: str) -> Claim:
    """Between the two in every seed; the one farthest from their middle stands in the claim."""
    if not values:
        return Claim.not_run(claim, paper)
    worst = max(values.values(), key=lambda value: abs(value - (low + high) / 2))
    verdict: Verdict = "not resolved" if len(values) < 2 else "holds" if low <= worst <= high else "does not hold"
    return Claim.against((low, high), claim, paper, worst, verdict, count=len(values))


def draw(results: Results, path: Path) -> None:
    """Ratios of all arms to one after the other; the paper's numbers as lines."""
    rows = [
        (f"{arm.removeprefix('search-')}: {label}", results.values(arm, metric), paper)
        for arm, metric, label, paper in (
            (LARGE, "full", "all", 1.18),
            (LARGE, "no_memory", "network", 1.07),
            (LARGE, "no_network", "memory", None),
            (LARGE, "split_only", "split only", 0.87),
            (SMALL, "full", "all", None),
            ("async", "ratio", "over synchronous", None),
            ("overlap-attention", "ratio", "side by side", None),
            ("overlap-disk", "ratio", "side by side", None),
            ("overlap-dequant", "ratio", "side by side", None),
            ("nano-only", "ratio", "halves", None),
        )
    ]
    rows = [row for row in rows if row[1]]
    with figure(8, max(2.4, 1.2 + 0.34 * len(rows))) as (made, axes):
        for at, (_, values, paper) in enumerate(rows):
            axes.plot(list(values.values()), [at] * len(values), "o", color=MUTED, markersize=3.5, alpha=0.6)
            axes.plot(
                float(np.mean(list(values.values()))),
                at,
                "D",
                color=SERIES[0],
                markersize=5,
                label="ours" if at == 0 else None,
            )
            if paper is not None:
                axes.plot(paper, at, "|", color=SERIES[1], markersize=13, label="paper, A100" if at == 0 else None)
        axes.axvline(1.0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axes.invert_yaxis()
        axes.set(xlabel="throughput over one after the other", title="What overlap gives")
        if axes.lines and rows:
            axes.legend()
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)
