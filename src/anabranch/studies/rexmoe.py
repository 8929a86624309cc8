"""Does reuse of neighbouring layers' experts help, and does progressive scaling (PSR)?

"ReXMoE: Reusing Experts with Minimal Overhead in Mixture-of-Experts", 2025, arXiv 2510.17483. The paper, 2.3B parameters of which 0.3B
active, r = 4, 100B tokens (its ablation table): accuracy 49.15 plain, 49.28 with reuse, 50.23 with reuse and PSR; WikiText
perplexity 21.19, 21.12, 20.73. So what can be expected is 0.005 to 0.03 bits per byte.

Scaled down: 2.8M parameters, bytes of Python source, 1.6M tokens a run instead of 100B. PSR spends its first fifth on a small set of
candidates; the paper has 21B tokens to make up for it, we have not. Read a verdict here as one on this size.

Arms, all with the same experts in number and width, the same tokens in the same order for one seed, the same optimiser:

    vanilla   N = 8 experts a layer, 2 active, gates not renormalised (the paper's)
    reuse2/4  the router sees the experts of r = 2 or 4 layers, all from the start
    psr2/4    the same with PSR: linear, random masks (the paper's method)
    local2/4  the same, the layer's own experts never masked
    mask2     vanilla with PSR's mask on its own experts, the same fraction: does PSR need reuse? (asked by reviewers)
    fine2     vanilla with 2 N experts of half the width and 4 active: same parameters and FLOPs (asked by reviewers)
    upper2    vanilla with 2 N full experts: twice the expert parameters, for scale only
    collapse  r = all layers, where the paper sees collapse

and of vanilla, reuse2 and psr2 also ``-slow`` and ``-fast`` (half and twice the learning rate: is the shared one fair to each?) and
``-norm`` (gates renormalised to sum 1, which is worth more than most designs at this size).

The rule, fixed before any run. Every claim is a paired difference over the seeds that both arms have, with its 95% t-interval. "ours is
better" holds if the whole interval of ours - baseline in bits per byte lies below 0, does not hold if it lies above 0, and is
not resolved otherwise or with fewer than two seeds. "Not worse" in balance holds if the interval of the difference in MaxVio_pool lies
below 0.1, does not hold if it lies above. "Collapse" holds if the idle fraction of r = L lies above that of r = 2 and the warning
fired in every run. Each claim is judged alone: with a dozen claims at 95%, expect every other study to resolve one by chance.
"""

from pathlib import Path
from typing import Any

from anabranch.config import Field, configclass
from anabranch.experts.rexmoe import ProgressiveScaling, ReXMoE
from anabranch.nn.moe import MoE
from anabranch.routing import Router, TopK
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import Estimate, Verdict, verdict_below
from anabranch.studies.picture import draw_arms
from anabranch.studies.power import Bracket
from anabranch.studies.size import RunSize
from anabranch.studies.training import train_and_measure
from anabranch.train import RunConfig

# MaxVio_pool that may be lost.
NOT_WORSE = 0.1
MAIN = ("vanilla", "reuse2", "psr2", "reuse4", "psr4", "mask2", "local2", "fine2")
TUNED = ("vanilla", "reuse2", "psr2")
VARIANTS = {"-norm": "gates renormalised", "-slow": "half the learning rate", "-fast": "twice the learning rate"}
SMOKE = ("vanilla", "reuse2", "psr2", "mask2")

COLUMNS = (
    Column("bits_per_byte", "bits/byte", ".4f"),
    Column("max_violation_layer", "MaxVio\nlayer", ".2f"),
    Column("max_violation_pool", "MaxVio\npool", ".2f"),
    Column("idle_fraction", "idle\nexperts", ".1%"),
    Column("foreign_share", "foreign\nchoices", ".1%"),
    Column("tokens_per_cpu_second", "tokens\n/CPU s", ",.0f"),
)


@configclass
class Size(RunSize):
    """What is the same for all arms."""

    num_layers: int = Field(default=6, ge=4)  # groups of 4 must fit
    num_experts: int = 8
    hidden_dim: int = 128
    top_k: int = 2
    steps: int = Field(default=800, ge=1)
    # The best of 1e-3, 2e-3, 4e-3 for vanilla in 200 steps; with warmup 0.02 all were worse.
    learning_rate: float = 2e-3


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`, for part of the work or another machine."""
    size = Size().replace(**changes) if full else Size(num_layers=4, steps=64).replace(**changes)
    chosen = arms(size)
    return Study(
        name="rexmoe",
        title="reuse of neighbouring experts and progressive scaling against a plain mixture of experts",
        settings=size.settings(full),
        arms=list(chosen.values()),
        default_arms=MAIN if full else SMOKE,
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
        brackets=[Bracket("bits_per_byte", (f"{arm}-slow", arm, f"{arm}-fast")) for arm in TUNED],
    )


def arms(size: Size) -> dict[str, Arm]:
    """All arms, built from one budget."""
    r = size.num_layers
    made = [
        _arm(size, "vanilla", "plain mixture of experts", _plain(size)),
        _arm(size, "reuse2", "reuse 2, no PSR", _reuse(size, 2)),
        _arm(size, "psr2", "reuse 2, PSR random", _reuse(size, 2, _psr())),
        _arm(size, "reuse4", "reuse 4, no PSR", _reuse(size, 4)),
        _arm(size, "psr4", "reuse 4, PSR random", _reuse(size, 4, _psr())),
        _arm(size, "mask2", "plain, PSR mask on its own experts", _reuse(size, 1, _psr(as_reuse=2))),
        _arm(size, "local2", "reuse 2, PSR local first", _reuse(size, 2, _psr(mask="local_first"))),
        _arm(size, "fine2", "plain, 2x experts of half width, 2x active", _plain(size, split=2)),
        _arm(size, "local4", "reuse 4, PSR local first", _reuse(size, 4, _psr(mask="local_first"))),
        _arm(size, "upper2", "plain, 2x full experts", _plain(size, extra=2)),
        _arm(size, "collapse", f"reuse {r} (all layers), no PSR", _reuse(size, r)),
    ]
    variants = [variant for arm in made if arm.name in TUNED for variant in _variants(size, arm)]
    return {arm.name: arm for arm in [*made, *variants]}


def _variants(size: Size, arm: Arm) -> list[Arm]:
    """An arm at other learning rates, and with renormalised gates."""
    feed_forward = arm.config.model.feed_forward
    router = feed_forward.router.replace(select=TopK.Config(top_k=size.top_k, normalize="sum"))
    changed = {
        "-norm": (size, feed_forward.replace(router=router)),
        "-slow": (size.replace(learning_rate=size.learning_rate / 2), feed_forward),
        "-fast": (size.replace(learning_rate=size.learning_rate * 2), feed_forward),
    }
    return [_arm(changed[at][0], arm.name + at, f"{arm.about}, {how}", changed[at][1]) for at, how in VARIANTS.items()]


def _plain(size: Size, split: int = 1, extra: int = 1) -> MoE.Config:
    """The plain layer; each expert split into ``split`` narrower ones, or ``extra`` times as many."""
    return MoE.Config(
        num_experts=size.num_experts * split * extra,
        hidden_dim=size.hidden_dim // split,
        router=Router.Config(select=TopK.Config(top_k=size.top_k * split)),
    )


def _reuse(size: Size, reuse: int, psr: ProgressiveScaling.Config | None = None) -> ReXMoE.Config:
    return ReXMoE.Config(
        num_experts=size.num_experts,
        hidden_dim=size.hidden_dim,
        router=Router.Config(select=TopK.Config(top_k=size.top_k)),
        reuse=reuse,
        psr=psr,
    )


def _psr(**options: Any) -> ProgressiveScaling.Config:
    # The paper's fractions.
    return ProgressiveScaling.Config(start=0.21, end=0.63, **options)


def _arm(size: Size, name: str, about: str, feed_forward: MoE.Config) -> Arm:
    config = size.run_of(feed_forward)
    return Arm(name, about, config)


def run(config: RunConfig, seed: int, progress: Progress) -> Metrics:
    """Train and measure one arm; ``warned`` is 1 if training warned that experts stay idle (`anabranch.train.idle`)."""
    metrics = train_and_measure(config, seed, progress)
    return {**metrics, "warned": float(any(" are idle " in warning for warning in metrics["warnings"]))}


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""

    def better(ours: str, baseline: str, claim: str, paper: str) -> Claim:
        return results.claim(
            "bits_per_byte", ours=ours, baseline=baseline, claim=claim, paper=paper, verdict=verdict_below
        )

    asked, not_given = "asked by reviewers, not in the paper", "not in the paper"
    claims = [
        better("reuse2", "vanilla", "reuse 2 beats vanilla", "accuracy 49.15 -> 49.65 with PSR; without: not given"),
        better("reuse4", "vanilla", "reuse 4 beats vanilla", "perplexity 21.19 -> 21.12, accuracy 49.15 -> 49.28"),
        better("psr2", "vanilla", "reuse 2 with PSR beats vanilla", "accuracy 49.15 -> 49.65"),
        better(
            "psr4", "vanilla", "reuse 4 with PSR beats vanilla", "perplexity 21.19 -> 20.73, accuracy 49.15 -> 50.23"
        ),
        better("psr2", "reuse2", "PSR improves reuse 2", "not given"),
        better("psr4", "reuse4", "PSR improves reuse 4", "perplexity 21.12 -> 20.73, accuracy 49.28 -> 50.23"),
        better("local2", "reuse2", "PSR local first improves reuse 2", not_given),
        better("local4", "reuse4", "PSR local first improves reuse 4", not_given),
        better("mask2", "vanilla", "PSR's mask helps without reuse", asked),
        better("reuse2", "fine2", "reuse 2 beats finer experts at equal size", asked),
        better("upper2", "vanilla", "twice the experts beat vanilla", not_given),
        *(
            better(f"{ours}{variant}", f"vanilla{variant}", f"{what} beats vanilla, {how}", not_given)
            for variant, how in VARIANTS.items()
            for ours, what in (("reuse2", "reuse 2"), ("psr2", "reuse 2 with PSR"))
        ),
        _balance(results, "psr2", "reuse2"),
        _balance(results, "psr4", "reuse4"),
        _collapse(results),
    ]
    return claims


def _balance(results: Results, ours: str, baseline: str) -> Claim:
    return results.claim(
        "max_violation_pool",
        ours=ours,
        baseline=baseline,
        claim=f"PSR keeps MaxVio_pool of {baseline}",
        paper="PSR balances (figure, no number)",
        verdict=lambda difference: verdict_below(difference, NOT_WORSE),
        limit=lambda mean: mean + NOT_WORSE,
    )


def _collapse(results: Results) -> Claim:
    warned = results.values("collapse", "warned")

    def verdict(difference: Estimate) -> Verdict:
        if not all(warned.values()):
            return "does not hold"
        return verdict_below(Estimate(-difference.mean, difference.half_width, difference.count))

    return results.claim(
        "idle_fraction",
        ours="collapse",
        baseline="reuse2",
        claim="reuse over all layers idles experts, and warns",
        paper="collapse at r = 16 and 32 of 32 layers (figure)",
        verdict=verdict,
    )


def draw(results: Results, path: Path) -> None:
    """Bits per byte against vanilla, with intervals, and the learning curves."""
    draw_arms(results, path, baseline="vanilla", title="ReXMoE at our scale", curves=MAIN)
