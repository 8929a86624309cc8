"""Is the same number of expert calls worth more in sequence than side by side?

"Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models", 2025, arXiv 2506.18945. The paper: 544M parameters,
4 layers, 1000 steps on MetaMathQA, validation loss 1.20 with 8 experts at once -> 1.12 with 4 in each of two passes; an inner residual
1.12, init 1.18, outer 1.21; a gate for all passes about 1.5; nothing where all experts are active.

Scaled down: 4 layers of width 128, 32 experts of width 96, 4 active, 1 shared expert, raw gates, 5.2M parameters (1.05M active), 1.6M
tokens of the Python standard library (bytes). The shared expert runs in every pass, which gives a chain one more call; ``bare`` arms have
none, so their work is equal but for the second router.

Arms, same tokens in the same order for one seed, same optimiser, five minutes of one core each:

    moe          4 experts at once
    chain        2 in each of two passes
    moe-bare     without shared experts; chain-bare: the same
    moe-norm     gates renormalised to sum 1; chain-norm: the same
    tied         a chain whose passes share one router
    outer, init  chains with the residual elsewhere
    once         a chain that normalises once, and keeps the stream
    moe-ref      the paper's block, which drops the stream; chain-ref: the same
    chain24      a chain over 24 experts instead of 32
    dense        4 experts, all active; dense-chain: all active in both passes
    chain-double 4 experts in each of two passes: twice the calls

The rule, fixed before any run. A claim about bits per byte holds if the whole 95% t-interval of the paired difference ours - baseline
lies below 0, does not hold if it lies above, and is not resolved otherwise or with fewer than two seeds. "No gain where all are active"
holds if the size of that mean difference is below a third of the size of chain - moe, and does not hold if the interval lies outside of
it. "As good with three quarters" allows 0.01 bits per byte. The claims about combinations and cost hold if they are so in every seed of at
least five, do not hold if in none (two were enough until after two had run: the rule became stricter). Each claim is judged alone.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from anabranch.config import Field, configclass
from anabranch.experts.chain import Chain
from anabranch.nn.moe import MoE
from anabranch.routing import Router, TopK, record_routing
from anabranch.routing.passes import between_passes
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import Estimate, Verdict, same_sign, verdict_below
from anabranch.studies.picture import draw_arms
from anabranch.studies.size import RunSize
from anabranch.studies.training import train_and_measure
from anabranch.train import RunConfig, Trainer, evaluate

# Processor time of a token in training, over the baseline's.
COST = 1.25
AS_GOOD = 0.01  # bits per byte
PASS_TOKENS = 32_768
MAIN = ("moe", "chain", "moe-bare", "chain-bare", "tied", "outer", "init")
SMOKE = ("moe", "chain", "tied")

COLUMNS = (
    Column("bits_per_byte", "bits/byte", ".4f"),
    Column("flops_per_token", "FLOPs\n/token", ",.0f"),
    Column("max_violation_layer", "MaxVio", ".2f"),
    Column("pass_reuse", "reuse by the\nnext pass", ".1%"),
    Column("pass_chance", "chance", ".1%"),
    Column("combinations_seen", "combinations\nseen", ",.0f"),
    Column("tokens_per_cpu_second", "tokens\n/CPU s", ",.0f"),
)


@configclass
class Size(RunSize):
    """What is the same for all arms."""

    num_layers: int = Field(default=4, ge=1)
    num_experts: int = Field(default=32, ge=8)
    hidden_dim: int = 96
    top_k: int = Field(default=4, ge=2)
    steps: int = Field(default=800, ge=1)


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`, for part of the work or another machine."""
    size = Size().replace(**changes) if full else Size(num_layers=2, steps=60).replace(**changes)
    return Study(
        name="chain",
        title="expert calls in sequence against as many at once",
        settings=size.settings(full),
        arms=list(arms(size).values()),
        default_arms=MAIN if full else SMOKE,
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
    )


def arms(size: Size) -> dict[str, Arm]:
    """All arms, built from one budget."""
    few = size.num_experts * 3 // 4
    dense = {"num_experts": size.top_k}
    made = [
        _arm(size, "moe", f"{size.top_k} experts at once", _plain(size)),
        _arm(size, "chain", f"{size.top_k // 2} in each of two passes", _chain(size)),
        _arm(size, "moe-bare", "at once, no shared expert", _plain(size, shared_experts=0)),
        _arm(size, "chain-bare", "two passes, no shared expert", _chain(size, shared_experts=0)),
        _arm(size, "moe-norm", "at once, gates renormalised", _plain(size, normalize="sum")),
        _arm(size, "chain-norm", "two passes, gates renormalised", _chain(size, normalize="sum")),
        _arm(size, "tied", "two passes, one router", _chain(size, independent_gates=False)),
        _arm(size, "outer", "two passes, outer residual", _chain(size, residual="outer")),
        _arm(size, "init", "two passes, residual from the start", _chain(size, residual="init")),
        _arm(size, "once", "two passes, one norm", _chain(size, norm="once")),
        _arm(size, "moe-ref", "the paper's block, one pass", _chain(size, passes=1, norm="reference")),
        _arm(size, "chain-ref", "the paper's block, two passes", _chain(size, norm="reference")),
        _arm(size, "chain24", f"two passes over {few} experts", _chain(size, num_experts=few)),
        _arm(size, "dense", f"{size.top_k} experts, all active", _plain(size, **dense)),
        _arm(size, "dense-chain", "all active in both passes", _chain(size, top_k=size.top_k, **dense)),
        _arm(size, "chain-double", "as many experts in each of two passes", _chain(size, top_k=size.top_k)),
    ]
    return {arm.name: arm for arm in made}


def _layer(
    size: Size, top_k: int, normalize: Literal["none", "sum", "softmax"] = "none", **changes: Any
) -> dict[str, Any]:
    select = TopK.Config(top_k=top_k, normalize=normalize)
    fields = {"num_experts": size.num_experts, "hidden_dim": size.hidden_dim, "shared_experts": 1}
    return {**fields, "router": Router.Config(select=select), **changes}


def _plain(size: Size, **changes: Any) -> MoE.Config:
    return MoE.Config(**_layer(size, size.top_k, **changes))


def _chain(size: Size, passes: int = 2, top_k: int | None = None, **changes: Any) -> Chain.Config:
    return Chain.Config(iterations=passes, **_layer(size, top_k or size.top_k // passes, **changes))


def _arm(size: Size, name: str, about: str, feed_forward: MoE.Config) -> Arm:
    config = size.run_of(feed_forward)
    return Arm(name, about, config)


def run(config: RunConfig, seed: int, progress: Progress) -> Metrics:
    """Train one arm and measure it and its passes."""
    return train_and_measure(config, seed, progress, also=measure)


def measure(trainer: Trainer) -> Metrics:
    """How passes follow each other, and how many combinations of experts tokens took (means over layers)."""
    windows = trainer.data.validation(
        batch_size=8, num_windows=max(PASS_TOKENS // trainer.config.data.sequence_length, 1)
    )
    with record_routing(trainer.model) as recorder:
        evaluate(trainer.model, windows)
    trace = recorder.trace()
    passes = between_passes(trace)
    if not passes:
        seen = [len(np.unique(np.sort(decisions.index_NK, axis=1), axis=0)) for _, decisions in trace]
        return {"combinations_seen": float(np.mean(seen)), "pass_reuse": None, "pass_chance": None}
    return {
        "combinations_seen": float(np.mean([facts.combinations_seen for facts in passes])),
        "pass_reuse": float(np.mean([facts.reuse for facts in passes])),
        "pass_chance": float(np.mean([facts.chance for facts in passes])),
    }


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""

    def better(ours: str, baseline: str, claim: str, paper: str, limit: float = 0.0) -> Claim:
        return results.claim(
            "bits_per_byte",
            ours=ours,
            baseline=baseline,
            claim=claim,
            paper=paper,
            verdict=lambda difference: verdict_below(difference, limit),
            limit=(lambda mean: mean + limit) if limit else None,
        )

    not_given = "not in the paper"
    claims = [
        better("chain", "moe", "a chain beats as many calls at once", "validation loss 1.20 -> 1.12"),
        better("chain-bare", "moe-bare", "so it does without shared experts, at equal work", not_given),
        better("chain-norm", "moe-norm", "so it does with renormalised gates", not_given),
        better("chain-ref", "moe-ref", "so it does in the paper's block", "1.20 -> 1.12"),
        better("chain", "tied", "a router per pass beats one for all", "about 1.5 -> 1.12"),
        better("chain", "outer", "an inner residual beats an outer one", "1.21 -> 1.12"),
        better("chain", "init", "an inner residual beats one from the start", "1.18 -> 1.12"),
        better("chain", "once", "a norm in every pass beats one", not_given),
        better(
            "chain24",
            "moe",
            "a chain is as good with three quarters of the experts",
            "48 of 64: 17.6% less memory",
            AS_GOOD,
        ),
        better("chain-double", "moe", "twice the calls in a chain beat one pass", "as 12 layers instead of 4"),
        _dense(results),
        _combinations(results),
        _cost(results),
    ]
    return claims


def _dense(results: Results) -> Claim:
    limit = abs(results.compare("bits_per_byte", "chain", "moe").mean) / 3

    def verdict(difference: Estimate) -> Verdict:
        if difference.count < 2:
            return "not resolved"
        if abs(difference.mean) < limit:
            return "holds"
        return "does not hold" if difference.low > limit or difference.high < -limit else "not resolved"

    return results.claim(
        "bits_per_byte",
        ours="dense-chain",
        baseline="dense",
        claim="no gain where all experts are active",
        paper="no gain with 8 of 8 (figure)",
        verdict=verdict,
        limit=lambda dense: (dense - limit, dense + limit),
    )


def _combinations(results: Results) -> Claim:
    ours, baseline = (results.values(arm, "combinations_seen") for arm in ("chain", "moe"))
    verdict = same_sign([ours[seed] - baseline[seed] for seed in ours.keys() & baseline.keys()])
    return results.claim(
        "combinations_seen",
        ours="chain",
        baseline="moe",
        claim="tokens take more combinations of experts",
        paper="823 times as many possible; by its own counting 91.2",
        verdict=lambda difference: verdict,
    )


def _cost(results: Results) -> Claim:
    ours, baseline = (results.values(arm, "tokens_per_cpu_second") for arm in ("chain", "moe"))
    verdict = same_sign([COST - baseline[seed] / ours[seed] for seed in ours.keys() & baseline.keys()])
    return results.claim(
        "tokens_per_cpu_second",
        ours="chain",
        baseline="moe",
        claim=f"a training step takes at most {COST} times as long",
        paper="slower (no number)",
        verdict=lambda difference: verdict,
        limit=lambda speed: speed / COST,
    )


def draw(results: Results, path: Path) -> None:
    """Bits per byte against one pass, with intervals, and the learning curves."""
    draw_arms(results, path, baseline="moe", title="Chain-of-Experts at our scale")
