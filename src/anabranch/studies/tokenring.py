"""Does TokenRing take less time than a ring where links bound, does the plan find the quickest scheme, and is all of it exact?

"TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional Communication", arXiv 2412.20501: queries go
round one way and blocks of output return the other, so that both directions of a link work; on four A10 GPUs a step is shorter than ring
attention's, whose links are the bottleneck (figures alone, no table). Groups of heads, a choice between schemes, backward passes and
queries over resident keys are not the paper's.

Arms, on four processes of one machine:

    exact        Outputs and gradients of every scheme, layout and mask against one process, float64; ranks are simulated.
    link-bound   E1. 8 heads without groups, 8,192 positions, float32, no mask: TokenRing and the ring in turns, five times.
    group-G      E2. Every scheme in turns with G = 1, 2, 4, 8 query heads for each key head, 4,096 positions; and the plan's choice.
    pass-Q       E3. 512 new positions over 32,768 that lie on the ranks already, under a causal mask.
    train        E4. A small language model of text, 50 steps with every sequence cut over four processes, and by one.

Scaled down to two cores, which the four share. Links are connections of TCP that the kernel paces, one for each directed pair of ranks,
at a speed for which sending a block of keys and values takes twice as long as computing on it did, all ranks at once, just before. They
are no network.

PRIMARY: E1's time. The rule, fixed before any recorded run, each in every seed; with fewer than five nothing is resolved. Exact: outputs
to 1e-12, gradients to 1e-11. E1: TokenRing's time at most .65 of the ring's (by links alone .67 on four ranks: the result of the last hop
has nothing to hide behind; so this is not expected to hold), and it waits less than the ring does. E2: the plan's choice takes at most 1.1
times as long as the quickest of all. E3: at most 5 % of the ring's bytes, which are counted and have no chance in them, and .3 of its time.
E4: losses of one process to 1e-5 at every step.
"""

from pathlib import Path
from typing import Any

from anabranch.files import atomic_file, atomic_write_text
from anabranch.report.style import INK, SERIES, figure, to_png, to_svg
from anabranch.studies.harness import Arm, Claim, Column, Results, Study
from anabranch.studies.paired import SEEDS_NEEDED, Verdict
from anabranch.studies.tokenring_runs import Crossover, Curve, Exact, LinkBound, PassQ, run

GROUPS = (1, 2, 4, 8)
COLUMNS = (
    Column("output", "outputs\noff", ".1e"),
    Column("gradient", "gradients\noff", ".1e"),
    Column("ratio", "time over\nthe ring's", ".3f"),
    Column("waited", "waiting over\nthe ring's", ".3f"),
    Column("behind", "time over\nthe quickest", ".3f"),
    Column("share", "bytes over\nthe ring's", ".4f"),
    Column("off", "losses\noff", ".1e"),
)


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``steps`` are those of E4."""
    steps = changes.pop("steps", 50 if full else 5)
    chosen = arms(full, steps)
    return Study(
        name="tokenring",
        title="attention over ranks: exact, quick where links bound, a plan that finds the quickest, the same learning",
        settings={"size": "full" if full else "smoke", "steps": steps, **changes},
        arms=list(chosen.values()),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
        seeds=(0, 1, 2, 3, 4) if full else (0,),
    )


def arms(full: bool, steps: int) -> dict[str, Arm]:
    """All arms."""
    exact: dict[str, Any] = {} if full else {"length": 13, "groups": (2,)}
    timed: dict[str, Any] = {} if full else {"world": 2, "length": 512, "heads": 8, "width": 16, "rounds": 1}
    passed: dict[str, Any] = {} if full else {**timed, "length": 32, "resident": 512}
    learned: dict[str, Any] = {} if full else {"world": 2, "dim": 16, "layers": 1, "length": 32, "batch": 2}
    made = [
        Arm("exact", "every scheme against one process", Exact(**exact)),
        Arm("link-bound", "E1: where links bound", LinkBound(**timed)),
        *(
            Arm(f"group-{group}", f"E2: {group} query heads a key head", Crossover(group=group, **timed))
            for group in GROUPS
        ),
        Arm("pass-Q", "E3: new positions over resident keys", PassQ(**passed)),
        Arm("train", "E4: losses of one process", Curve(steps=steps, **learned)),
    ]
    return {arm.name: arm for arm in made}


# Judgement


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""
    values, faster = results.values, "a shorter step, no figure"
    return [
        _worst(values("link-bound", "ratio"), 0.65, "PRIMARY: E1: TokenRing takes .65 of the ring's time", faster),
        _worst(values("link-bound", "waited"), 1.0, "E1: TokenRing waits for links no longer than the ring", faster),
        *(
            _worst(
                values(f"group-{group}", "behind"),
                1.1,
                f"E2: the plan's choice is within a tenth of the quickest, groups of {group}",
                "no choice",
            )
            for group in GROUPS
        ),
        _worst(values("pass-Q", "share"), 0.05, "E3: TokenRing sends 5 % of the ring's bytes", "not tried", exact=True),
        _worst(values("pass-Q", "ratio"), 0.3, "E3: TokenRing takes .3 of the ring's time", "not tried"),
        _worst(values("train", "off"), 1e-5, "E4: losses of one process to 1e-5 over all steps", "forward alone"),
        _worst(values("exact", "output"), 1e-12, "outputs of one process to 1e-12", "equal", exact=True),
        _worst(values("exact", "gradient"), 1e-11, "gradients of one process to 1e-11", "forward alone", exact=True),
    ]


def _worst(values: dict[int, float], limit: float, claim: str, paper: str, *, exact: bool = False) -> Claim:
    """At most ``limit`` in every seed; the worst stands in the claim. What is ``exact`` needs no seeds."""
    if not values:
        return Claim.not_run(claim, paper)
    worst = max(values.values())
    verdict: Verdict = "holds" if worst <= limit else "does not hold"
    if not exact and len(values) < SEEDS_NEEDED:
        verdict = "not resolved"
    return Claim.against(limit, claim, paper, worst, verdict, exact=exact, count=len(values))


def draw(results: Results, path: Path) -> None:
    """Times of all schemes over the ring's, by groups of heads: a mark for each run."""
    runs = {group: list(results.runs.get(f"group-{group}", {}).values()) for group in GROUPS}
    if not any(runs.values()):
        return
    schemes = sorted({name for found in runs.values() for metrics in found for name in metrics["seconds"]})
    with figure(6.4, 3.6) as (made, axes):
        for number, scheme in enumerate(schemes):
            marks = [
                (
                    place + 0.12 * (number - (len(schemes) - 1) / 2),
                    metrics["seconds"][scheme] / metrics["seconds"]["ring"],
                )
                for place, group in enumerate(GROUPS)
                for metrics in runs[group]
                if scheme in metrics["seconds"]
            ]
            axes.plot(*zip(*marks, strict=True), "o", color=SERIES[number], markersize=4, label=scheme)
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.set(
            xticks=range(len(GROUPS)),
            xticklabels=[str(group) for group in GROUPS],
            xlabel="query heads for each key head",
            ylabel="time over the ring's",
            title="Four ranks over paced links, no mask",
            ylim=(0, None),
        )
        axes.legend(ncols=2)
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)
