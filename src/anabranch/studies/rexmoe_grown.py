"""A trained mixture of experts whose layers begin to share their experts: what is gained, and by which schedule?

"ReXMoE: Reusing Experts with Minimal Overhead in Mixture-of-Experts", 2025, arXiv 2510.17483, trains from scratch; from there the study
`anabranch.studies.rexmoe` needs more seeds than it has, since what a seed does is as large as the effect (0.005 to 0.03 bits per byte).
Arms that begin with the same weights and read the same text differ far less by chance. So here one plain model is trained, and every arm
goes on from it. What is found is so of that one plain model: seeds differ in the order of the text and in new router rows alone.

Scaled down: 2.8M parameters, bytes of Python source, 8.2M tokens for the plain model, 2M for each arm, optimizer and schedule anew.
16 experts of half the usual width, 4 active, gates renormalised: with 8 experts and 2 active, closing half of a pool takes all the best
experts from a quarter of the tokens, which is nothing that the paper's 64 and 8 know.

Arms; all but the first two have a pool of reuse r, whose new router rows are those of the layer that owns the expert:

    continue  goes on as it is: the baseline
    mask2     goes on as it is, PSR's mask on its own experts: what closing candidates does without reuse
    open2/4   the pool of r = 2 or 4 layers open from the start
    psr2      the paper's schedule: random masks after the softmax, the whole pool in evaluation
    local2    the layer's own experts never masked, the rest as psr2
    grow2/4   the same before the softmax, and in evaluation what is open then: it begins as the plain model (`from_vanilla`'s default)

and of continue, open2 and grow2 also ``-slow`` and ``-fast`` (half and twice the learning rate).

The rule, fixed before any run. Every claim is a paired difference over the seeds that both arms have, with its 95% t-interval. "Beats"
holds if the whole interval of ours - baseline in bits per byte lies below 0, does not hold if it lies above 0. "As good as" holds if it
lies below .003, does not hold if it lies above. Otherwise, and below five seeds, it is not resolved; all claims are corrected together by
the harness. That a grown model begins as the plain one is exact: the same bits per byte, to 1e-5, before the first step.
"""

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from anabranch.config import Field, configclass
from anabranch.experts.rexmoe import GROWING, ProgressiveScaling, ReXMoE, from_vanilla
from anabranch.lm import Decoder
from anabranch.nn.moe import MoE
from anabranch.routing import Router, TopK
from anabranch.studies.continued import Continued, base_model
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import verdict_below
from anabranch.studies.picture import draw_arms
from anabranch.studies.power import Bracket
from anabranch.studies.size import RunSize
from anabranch.studies.training import CURVE_TOKENS, train_and_measure
from anabranch.train import RunConfig, Trainer, evaluate

# Bits per byte that may be lost, and that a grown model may differ by before its first step.
AS_GOOD, SAME = 0.003, 1e-5
MAIN = ("continue", "mask2", "open2", "open4", "psr2", "local2", "grow2", "grow4")
TUNED = ("continue", "open2", "grow2")
SMOKE = ("continue", "open2", "psr2", "grow2")

COLUMNS = (
    Column("bits_per_byte", "bits/byte", ".4f"),
    Column("first_bits_per_byte", "before\nstep 1", ".4f"),
    Column("max_violation_pool", "MaxVio\npool", ".2f"),
    Column("idle_fraction", "idle\nexperts", ".1%"),
    Column("foreign_share", "foreign\nchoices", ".1%"),
    Column("tokens_per_cpu_second", "tokens\n/CPU s", ",.0f"),
)


@configclass
class Size(RunSize):
    """What is the same for all arms."""

    num_layers: int = Field(default=6, ge=4)  # groups of 4 must fit
    num_experts: int = 16
    hidden_dim: int = 64
    top_k: int = 4
    base_steps: int = Field(default=4000, ge=1)
    steps: int = Field(default=1000, ge=1)
    # Half of what the plain model was trained with.
    learning_rate: float = 1e-3
    base_learning_rate: float = 2e-3
    warmup: float = 0.02


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`, for part of the work or another machine."""
    small = {"num_layers": 4, "base_steps": 64, "steps": 32}
    size = Size().replace(**changes) if full else Size().replace(**{**small, **changes})
    return Study(
        name="rexmoe_grown",
        title="a trained mixture of experts that goes on with experts shared between layers",
        settings=size.settings(full),
        arms=list(arms(size).values()),
        default_arms=MAIN if full else SMOKE,
        seeds=tuple(range(8)) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
        primary="growing by own experts first beats going on as it is",
        brackets=[Bracket("bits_per_byte", (f"{arm}-slow", arm, f"{arm}-fast")) for arm in TUNED],
    )


def arms(size: Size) -> dict[str, Arm]:
    """All arms, of one budget."""
    plain = MoE.Config(
        num_experts=size.num_experts,
        hidden_dim=size.hidden_dim,
        router=Router.Config(select=TopK.Config(top_k=size.top_k, normalize="sum")),
    )
    base = size.replace(steps=size.base_steps, learning_rate=size.base_learning_rate).run_of(plain)
    local = ProgressiveScaling.Config(mask="local_first")
    pools: dict[str, tuple[str, dict[str, Any] | None]] = {
        "continue": ("goes on as it is", None),
        "mask2": ("PSR's mask on its own experts", {"reuse": 1, "psr": ProgressiveScaling.Config(as_reuse=2)}),
        "open2": ("reuse 2, open from the start", {"reuse": 2, "psr": None}),
        "open4": ("reuse 4, open from the start", {"reuse": 4, "psr": None}),
        "psr2": ("reuse 2, the paper's random masks", {"reuse": 2, "psr": ProgressiveScaling.Config()}),
        "local2": ("reuse 2, own experts never masked", {"reuse": 2, "psr": local}),
        "grow2": ("reuse 2, own experts first, before the softmax", {"reuse": 2, "psr": GROWING}),
        "grow4": ("reuse 4, own experts first, before the softmax", {"reuse": 4, "psr": GROWING}),
    }
    made = {}
    for name, (about, pool) in pools.items():
        for at, rate in (("", 1.0), ("-slow", 0.5), ("-fast", 2.0)):
            if at and name not in TUNED:
                continue
            own = size.replace(learning_rate=rate * size.learning_rate)
            # Built from the config of the plain model, as the weights will be.
            wanted = base.model if pool is None else grown(base.model, pool)
            run = own.run_of(plain).replace(model=wanted)
            made[name + at] = Arm(
                name + at, about + f", {rate:g}x the learning rate" * bool(at), Continued(base=base, run=run)
            )
    return made


def grown(config: Decoder.Config, pool: dict[str, Any]) -> Decoder.Config:
    """The model of a pool, by its config."""
    plain = config.feed_forward
    values = {field.name: getattr(plain, field.name) for field in fields(MoE.Config)}
    return config.replace(feed_forward=ReXMoE.Config(**values, **pool))


def run(config: Continued, seed: int, progress: Progress) -> Metrics:
    """Take the plain model (train it if no run has yet), make the arm's model of it, train that on and measure it."""
    # One for all seeds: chance has no part in where arms begin.
    base = base_model("rexmoe_grown", config.base, 0, progress)
    model = converted(base, config.run.model, seed)
    first = {"first_bits_per_byte": measured(model, config.run, seed)}
    return {**first, **train_and_measure(config.run, seed, progress, model=converted(base, config.run.model, seed))}


def converted(base: Decoder, config: Decoder.Config, seed: int) -> Decoder:
    """The model of an arm with the weights of the plain one."""
    layer: Any = config.feed_forward
    if type(layer) is MoE.Config:
        return base
    return from_vanilla(base, reuse=layer.reuse, psr=layer.psr, seed=seed)


def measured(model: Decoder, config: RunConfig, seed: int) -> float:
    """Bits per byte on held-out text before anything is trained, with the candidates that training would begin with."""
    blocks: Any = model.blocks
    schedules = [block.feed_forward.router.candidates for block in blocks]
    for schedule in filter(None, schedules):
        schedule.config = schedule.config.replace(evaluate="current")
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as folder:
        train = config.train.replace(seed=seed, checkpoint_every=None)
        trainer = Trainer(config.replace(train=train), Path(folder) / "run", model=model)
        windows = trainer.data.validation(batch_size=8, num_windows=max(CURVE_TOKENS // config.data.sequence_length, 1))
        return evaluate(trainer.model, windows).bits_per_byte


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""

    def below(ours: str, baseline: str, claim: str, paper: str, margin: float = 0.0) -> Claim:
        return results.claim(
            "bits_per_byte",
            ours=ours,
            baseline=baseline,
            claim=claim,
            paper=paper,
            verdict=lambda difference: verdict_below(difference, margin),
            limit=(lambda mean: mean + margin) if margin else None,
        )

    scratch, not_given = "from scratch: accuracy 49.15 -> 49.65", "not in the paper"
    return [
        below("grow2", "continue", "growing by own experts first beats going on as it is", scratch),
        below("grow4", "continue", "the same with reuse 4", "from scratch: accuracy 49.15 -> 50.23"),
        below(
            "open2", "continue", "a pool that is open from the start beats going on as it is", "from scratch: not given"
        ),
        below("open4", "continue", "the same with reuse 4, open", "from scratch: accuracy 49.15 -> 49.28"),
        below("psr2", "continue", "the paper's schedule beats going on as it is", scratch),
        below(
            "psr2", "continue", f"the paper's schedule is as good as going on as it is (to {AS_GOOD})", scratch, AS_GOOD
        ),
        below("grow2", "open2", "growing by own experts first beats a pool that is open from the start", not_given),
        below("grow2", "psr2", "and the paper's schedule", not_given),
        below("grow2", "local2", "closing before the softmax beats closing after it", not_given),
        below("mask2", "continue", "PSR's mask helps without reuse", "asked by reviewers, not in the paper"),
        *(
            below(f"grow2{at}", f"continue{at}", f"growing beats going on, {how} the learning rate", not_given)
            for at, how in (("-slow", "half"), ("-fast", "twice"))
        ),
        _begins(results),
    ]


def _begins(results: Results) -> Claim:
    claim, paper = (
        "a grown model begins as the plain one (bits per byte)",
        "restricted to local experts it is the plain model",
    )
    ours, theirs = (results.values(arm, "first_bits_per_byte") for arm in ("grow2", "continue"))
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return Claim.not_run(claim, paper)
    worst = max(abs(ours[seed] - theirs[seed]) for seed in common)
    return Claim.against(SAME, claim, paper, worst, "holds" if worst <= SAME else "does not hold", exact=True)


def draw(results: Results, path: Path) -> None:
    """Bits per byte against going on as it is, with intervals, and the learning curves."""
    draw_arms(results, path, baseline="continue", title="A trained mixture, grown", curves=MAIN)
