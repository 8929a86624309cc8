"""How much would perfect routing between a big and a small module gain, and how much of that gain is real?

"Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models", 2024, arXiv 2410.10846. The paper, 12 layers, 1.4B
parameters, 300B tokens, mostly in figures: an oracle with one big layer beats all twelve big; its perplexity is lowest at 6 big layers
of 12; a trained router is about as good as the best of 100 random routes; a constant budget beats ramps; freezing the big modules and then
training the small ones is much worse than joint training.

Scaled down: 8 layers of width 96 (big 384, small 24), 1.3M parameters, bytes of Python source, 0.6M tokens a model instead of 300B, all
256 routes on 64 held-out sequences of 64 bytes. Curve shapes are the claim, not losses.

Arms, same tokens in the same order for one seed, same optimiser:

    duo          random routing; then oracles, a router, and the controls; trains a twin of another seed beside it
    frozen       the big modules first, then frozen, then the small ones: equal tokens
    dense-big    a plain model with the big module only
    dense-small  the same with the small one

Controls, which the paper lacks. A minimum over many losses is low by selection alone, and log C(L, b) says how many there are. So every
oracle stands beside (a) the same oracle against shuffled targets, (b) the loss of the twin on the routes chosen with the first model:
only what transfers is about the token and could be learned, and (c) the self-consistent oracle, whose routes can be executed.

The rule, fixed before any run. A claim about a difference of losses holds if its whole 95% t-interval over seeds (paired) lies below the
limit stated in the claim, does not hold if it lies above, and is not resolved otherwise or with fewer than two seeds. "Within 3%" is a
limit of 3% of the dense models' mean. "Lowest in the middle" holds if in every seed the best budget is within L / 8 of L / 2, does not
hold if in none. The claim about the router counts only seeds whose measured budget is within 1% of the target.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.depth.duo_llm import (
    BIG,
    DuoFFN,
    OracleResult,
    Routed,
    RouteLabels,
    analyze,
    calibrate_budget,
    gap_closed,
    oracle,
    route_loss,
    train_duo,
    train_router,
    transfer,
)
from anabranch.depth.duo_llm.router import option_shares
from anabranch.lm import Decoder
from anabranch.nn import SwiGLU
from anabranch.presets import language_model
from anabranch.report.routes import LINES, draw_curves, draw_heat, finish, save
from anabranch.report.style import MARKERS, SERIES, figure
from anabranch.studies import training
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import Estimate, Verdict, estimate, paired_difference, verdict_below
from anabranch.train import Event, RunConfig, evaluate

# Added to the seed of the model that routes are transferred to.
TWIN = 1000
SHARE_TOLERANCE = 0.01
# Of the dense model's nats: what all big may take at most.
NEAR_DENSE = 1.03

COLUMNS = (
    Column("nats_big", "nats/byte\nall big", ".4f"),
    Column("nats_small", "nats/byte\nall small", ".4f"),
    Column("oracle_1", "oracle\n1 big", ".4f"),
    Column("oracle_middle", "oracle\nhalf big", ".4f"),
    Column("fixed_middle", "best fixed\nhalf big", ".4f"),
    Column("consistent_middle", "self-cons.\nhalf big", ".4f"),
    Column("router", "router\nhalf big", ".4f"),
    Column("transfer_middle", "routes of\nthe twin", ".4f"),
)


@configclass
class Size(Config):
    """What is the same for all arms."""

    num_layers: int = Field(default=8, ge=2)
    dim: int = 96
    sequence_length: int = 64
    batch_size: int = 24  # sequences a step
    steps: int = Field(default=400, ge=2)
    router_steps: int = Field(default=150, ge=1)
    learning_rate: float = 2e-3
    router_learning_rate: float = 1e-3
    sequences: int = 64  # held out, for the oracles
    # Of the 70 routes with half the layers big: the paper's 100 of 924.
    num_random: int = 8


@configclass
class Contestant(Config):
    """What decides an arm's result: its run, how it is trained, and the sizes of what is measured on a duo model."""

    role: Literal["duo", "frozen", "dense"]
    run: RunConfig
    size: Size


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    smoke = Size(num_layers=4, dim=64, steps=80, router_steps=40, batch_size=16, sequences=16, num_random=2)
    size = (Size() if full else smoke).replace(**changes)
    return Study(
        name="duo_llm",
        title="what perfect routing between a big and a small module gains, and how much of it is selection",
        settings={
            "size": "full" if full else "smoke",
            **to_dict(size),
            "tokens_per_model": size.steps * size.batch_size * size.sequence_length,
        },
        arms=arms(size),
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
    )


def arms(size: Size) -> list[Arm]:
    """All arms, built from one budget."""
    # A sixteenth, as in the paper.
    big, small = 4 * size.dim, size.dim // 4
    duo = DuoFFN.Config(big=big, small=small)

    def arm(name: str, about: str, role: Any, feed_forward: Any) -> Arm:
        made = language_model(
            feed_forward,
            dim=size.dim,
            num_layers=size.num_layers,
            sequence_length=size.sequence_length,
            batch_size=size.batch_size,
            steps=size.steps,
            learning_rate=size.learning_rate,
        )
        settings = made.train.replace(eval_every=None, checkpoint_every=None, device="cpu")
        return Arm(name, about, Contestant(role=role, run=made.replace(train=settings), size=size))

    return [
        arm("duo", "big and small, random routing", "duo", duo),
        arm("frozen", "big first, then frozen, then small", "frozen", duo),
        arm("dense-big", "big only", "dense", SwiGLU.Config(hidden_dim=big)),
        arm("dense-small", "small only", "dense", SwiGLU.Config(hidden_dim=small)),
    ]


def run(config: Contestant, seed: int, progress: Progress) -> Metrics:
    """Train and measure one arm. ``nats_big`` and ``nats_small``: held-out text on the two constant routes."""
    if config.role == "dense":
        metrics = training.train_and_measure(config.run, seed, progress)
        which = "nats_big" if config.run.model.feed_forward.hidden_dim > config.size.dim else "nats_small"  # type: ignore[attr-defined]
        return {**metrics, which: metrics["nats_per_token"]}
    with tempfile.TemporaryDirectory(prefix="anabranch-study-") as name:
        folder = Path(name)
        recipe: Literal["joint", "freeze_big"] = "joint" if config.role == "duo" else "freeze_big"
        model = train_duo(_seeded(config.run, seed), folder / "duo", recipe=recipe, on_event=_teller(progress, "duo"))
        metrics = _constant_routes(model, config)
        if config.role == "duo":
            twin_run = _seeded(config.run, seed + TWIN)
            twin = train_duo(twin_run, folder / "twin", on_event=_teller(progress, "twin"))
            metrics |= _measure(model, twin, config, seed, folder, progress)
    return metrics


def _seeded(config: RunConfig, seed: int) -> RunConfig:
    return config.replace(train=config.train.replace(seed=seed))


def _teller(progress: Progress, what: str) -> Callable[[Event], None]:
    told = time.perf_counter()

    def tell(event: Event) -> None:
        nonlocal told
        if event.kind == "step" and time.perf_counter() - told > training.TOLD_EVERY_S:
            told = time.perf_counter()
            progress(f"{what}: step {event.step} of {event.steps}, loss {event.values['loss']:.3f}")

    return tell


def _constant_routes(model: Decoder, config: Contestant) -> Metrics:
    """On the same windows as the dense arms."""
    data, length = config.run.data.build(), config.run.data.sequence_length
    windows = data.validation(batch_size=8, num_windows=max(training.FINAL_TOKENS // length, 1))
    return {f"nats_{route}": evaluate(Routed(model, route), windows).nats_per_token for route in ("big", "small")}


def _sequences(config: Contestant, split: str) -> Tensor:
    """``[B, L + 1]`` whole windows of a split."""
    data = config.run.data.build()
    batches = data.windows(split, batch_size=8, num_windows=config.size.sequences)
    length = config.size.sequence_length
    ids = [torch.cat([batch.token_BL, batch.target_BL[:, -1:]], dim=1) for batch in batches]
    return torch.cat([ids_BL for ids_BL in ids if ids_BL.shape[1] == length + 1])


def _measure(model: Decoder, twin: Decoder, config: Contestant, seed: int, folder: Path, progress: Progress) -> Metrics:
    """Oracles, controls, analyses and routers on held-out sequences."""
    size, middle = config.size, config.size.num_layers // 2
    budgets = range(size.num_layers + 1)
    ids_BL = _sequences(config, "validation")
    options: dict[str, Any] = {"num_random": size.num_random, "seed": seed}
    progress("oracle")
    best = oracle(model, ids_BL, budgets, shuffle_seed=seed, **options)
    theirs = oracle(twin, ids_BL, budgets, **options)
    moved_G = transfer(best, twin, ids_BL).double().mean((1, 2))
    progress("self-consistent oracle")
    chosen = sorted({1, middle})
    consistent = oracle(model, ids_BL, chosen, mode="self_consistent", **options)
    quarter = size.num_layers // 4
    ramps = [(middle + quarter, middle - quarter), (middle - quarter, middle + quarter)]
    tokenizer = config.run.data.build().tokenizer
    small_BL = route_loss(model, ids_BL, "small")
    table = analyze(best, small_BL, ids_BL=ids_BL, tokenizer=tokenizer, ramps=ramps)
    metrics: Metrics = {
        **_curves(best, theirs, moved_G),
        **{f"consistent_{budget}": float(consistent.oracle_G[row]) for row, budget in enumerate(chosen)},
        "consistent_middle": float(consistent.oracle_G[consistent.row(middle)]),
        "best_budget": int(best.oracle_G.argmin()),
        "choice_correlation": table["choice_correlation"],
        "hopeless_share": table["hopeless_share"],
        "ramp_down": table["ramps"][0]["loss"],
        "ramp_up": table["ramps"][1]["loss"],
        "oracle_seconds": best.report.seconds,
        "oracle_layer_passes": best.report.layer_passes,
        "naive_layer_passes": best.report.naive_layer_passes,
        "heat": table["heat"][str(middle)],
        "difficult": table["difficult"],
        "hopeless": table["hopeless"],
    }
    return metrics | _routers(model, best, config, ids_BL, seed, folder, progress)


def _curves(best: OracleResult, theirs: OracleResult, moved_G: Tensor) -> Metrics:
    """Every curve over budgets, as lists and as the numbers that claims are about."""
    control = best.control
    assert control is not None
    curves = {
        "oracle": best.oracle_G,
        "fixed": best.fixed_G,
        "random": best.random_G,
        "mean": best.mean_G,
        "shuffled": control.oracle_G,
        "shuffled_mean": control.mean_G,
        "transfer": moved_G,
        "twin_mean": theirs.mean_G,
        "twin_fixed": theirs.fixed_G,
    }
    last, middle = best.oracle_G.numel() - 1, (best.oracle_G.numel() - 1) // 2
    metrics: Metrics = {f"{name}_curve": value_G.tolist() for name, value_G in curves.items()}
    metrics |= {f"{name}_middle": float(value_G[middle]) for name, value_G in curves.items()}
    return metrics | {
        "oracle_1": float(best.oracle_G[1]),
        "all_big": float(best.oracle_G[last]),
        "gain": float(best.mean_G[middle] - best.oracle_G[middle]),
        "shuffled_gain": float(control.mean_G[middle] - control.oracle_G[middle]),
    }


def _routers(
    model: Decoder, best: OracleResult, config: Contestant, ids_BL: Tensor, seed: int, folder: Path, progress: Progress
) -> Metrics:
    """Loss and measured share of two trained routers whose share of big is set to one half."""
    size, middle = config.size, config.size.num_layers // 2
    target = middle / size.num_layers
    settings = config.run.train.replace(steps=size.router_steps, learning_rate=size.router_learning_rate, seed=seed)
    run_config = config.run.replace(train=settings)
    seen_BL = _sequences(config, "train")
    labels = RouteLabels.of(seen_BL, oracle(model, seen_BL, middle), middle)
    metrics: Metrics = {}
    for name, supervision in (("router", "budget"), ("router_labels", "oracle")):
        progress(f"{name}: training")
        given = labels if supervision == "oracle" else None
        routed = train_router(model, run_config, folder / name, supervision=supervision, labels=given)  # type: ignore[arg-type]
        # By the share of big alone, which takes no labels.
        calibrate_budget(routed, ids_BL[:, :-1], target)
        metrics[name] = float(route_loss(routed, ids_BL, "router").double().mean())
        metrics[f"{name}_share"] = float(option_shares(routed, ids_BL[:, :-1])[:, BIG].mean())
        oracle_loss, fixed = float(best.oracle_G[middle]), float(best.fixed_G[middle])
        metrics[f"{name}_gap_closed"] = gap_closed(fixed, metrics[name], oracle_loss)
    return {**metrics, "target_share": target}


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""

    def below(ours: str, baseline: str, claim: str, paper: str = "not in the paper") -> Claim:
        """About two numbers of the arm duo."""
        ours_by_seed, baseline_by_seed = results.values("duo", ours), results.values("duo", baseline)
        difference = paired_difference(ours_by_seed, baseline_by_seed)
        means = [estimate(list(values.values())).mean for values in (baseline_by_seed, ours_by_seed)]
        return _claim(claim, paper, means[0], means[1], difference, verdict_below(difference))

    claims = [
        below("oracle_1", "all_big", "the oracle with one big layer beats all big", "holds (figure)"),
        _lowest_in_the_middle(results),
        _at_least(
            results,
            "choice_correlation",
            0.8,
            "the oracle follows log C(L, b): rank correlation at least 0.8",
            "figure",
        ),
        _router(results),
        results.claim(
            "nats_small",
            ours="duo",
            baseline="frozen",
            claim="joint training beats freezing the big modules, all small",
            paper="much better (figure)",
            verdict=verdict_below,
        ),
        _near_dense(results),
        _at_least(
            results,
            "hopeless_share",
            0.25,
            "a quarter of the tokens with the highest loss are not difficult",
            "shown by examples",
        ),
        below("oracle_middle", "ramp_down", "a constant budget beats a falling ramp", "holds (figure)"),
        below("oracle_middle", "ramp_up", "a constant budget beats a rising ramp", "holds (figure)"),
        below("shuffled_gain", "gain", "control: shuffled targets gain less than real ones"),
        below("transfer_middle", "twin_mean_middle", "control: routes of another model beat the mean route"),
        below("transfer_middle", "twin_fixed_middle", "control: routes of another model beat the best fixed route"),
        below("consistent_middle", "fixed_middle", "control: routes that can be executed beat the best fixed route"),
    ]
    return claims


def _claim(
    claim: str,
    paper: str,
    baseline: float,
    ours: float,
    difference: Estimate,
    verdict: Verdict,
    margin: str | None = None,
) -> Claim:
    if not difference.count:
        return Claim.not_run(claim, paper)
    return Claim(claim, paper, baseline, ours, difference.mean, difference.interval, verdict, margin)


def _at_least(results: Results, metric: str, limit: float, claim: str, paper: str) -> Claim:
    values = list(results.values("duo", metric).values())
    if not values:
        return Claim.not_run(claim, paper)
    found, shortfall = estimate(values), estimate([limit - value for value in values])
    return Claim.against(limit, claim, paper, found.mean, verdict_below(shortfall), found.interval)


def _lowest_in_the_middle(results: Results) -> Claim:
    budgets = results.values("duo", "best_budget")
    curves = {seed: results.runs["duo"][seed]["oracle_curve"] for seed in budgets}
    away = [abs(budget - (len(curves[seed]) - 1) / 2) - (len(curves[seed]) - 1) / 8 for seed, budget in budgets.items()]
    verdict: Verdict = "not resolved"
    if len(away) > 1:
        inside = [distance <= 0 for distance in away]
        verdict = "holds" if all(inside) else "not resolved" if any(inside) else "does not hold"
    layers = [(len(curve) - 1) / 2 for curve in curves.values()]
    means = estimate(layers).mean, estimate(list(budgets.values())).mean
    margin = "distance of the best budget from half the layers, over an eighth of them"
    claim, paper, found = "the oracle is best with about half the layers big", "6 of 12", estimate(away)
    if not found.count:
        return Claim.not_run(claim, paper)
    half, best = means
    return Claim(claim, paper, None, best, found.mean, found.interval, verdict, margin, limit=half)


def _router(results: Results) -> Claim:
    shares, targets = results.values("duo", "router_share"), results.values("duo", "target_share")
    kept = {seed for seed in shares if abs(shares[seed] - targets[seed]) <= SHARE_TOLERANCE}
    gaps = [gap for seed, gap in results.values("duo", "router_gap_closed").items() if seed in kept]
    found = estimate(gaps)
    claim = "a trained router closes less than half of the gap between the best fixed route and the oracle"
    paper = "about the best of 100 random routes"
    if not gaps:
        return Claim.not_run(claim, paper)
    return Claim.against(0.5, claim, paper, found.mean, verdict_below(found, 0.5), found.interval)


def _near_dense(results: Results) -> Claim:
    limit = (NEAR_DENSE - 1) * results.mean("dense-big", "nats_big").mean
    return results.claim(
        "nats_big",
        ours="duo",
        baseline="dense-big",
        claim="all big is within 3% of a dense model of that size",
        paper="close (figure)",
        verdict=lambda difference: verdict_below(difference, limit),
        limit=lambda dense: NEAR_DENSE * dense,
    )


def draw(results: Results, path: Path) -> None:
    """Loss over budget; gain over the mean route, real and shuffled; where half big layers are used."""
    runs = [metrics for metrics in results.runs.get("duo", {}).values() if "oracle_curve" in metrics]
    with figure(13, 4.8, ncols=3, width_ratios=(1.2, 1, 1)) as (made, (left, centre, right)):
        if runs:
            _draw(runs, left, centre, right)
        save(made, path)


def _draw(runs: list[Metrics], left: Any, centre: Any, right: Any) -> None:
    curve = {
        name: np.mean([metrics[f"{name}_curve"] for metrics in runs], axis=0)
        for name in ("oracle", "fixed", "random", "mean", "shuffled", "shuffled_mean", "transfer", "twin_mean")
    }
    draw_curves(left, {label: curve[name] for name, label in LINES.items()}, "nats per byte")
    middle = (len(curve["oracle"]) - 1) // 2
    for number, (name, label) in enumerate((("consistent_middle", "self-consistent oracle"), ("router", "router"))):
        value = np.mean([metrics[name] for metrics in runs])
        left.plot(middle, value, MARKERS[4 + number], color=SERIES[4 + number], label=label)
    gains = {
        "real targets": curve["mean"] - curve["oracle"],
        "shuffled targets": curve["shuffled_mean"] - curve["shuffled"],
        "routes of another model": curve["twin_mean"] - curve["transfer"],
    }
    draw_curves(centre, gains, "gain over the mean route")
    for axes in (left, centre):
        finish(axes, len(curve["oracle"]))
    heat_YP = np.mean([metrics["heat"] for metrics in runs], axis=0)
    draw_heat(right, heat_YP, middle)
