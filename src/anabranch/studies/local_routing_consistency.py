"""What makes routing locally consistent, and does the measure of it predict real caches?

"Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models", Liang et al., 2025, arXiv
2505.16056 (v3). The paper's toy models, 1.4B parameters and 20B tokens, SRP at m = 16 and balance (SD of activation rates, percent
points): without balance loss 56.4 and 13.2, baseline 43.6 and 4.0, one shared expert 41.4, twice as wide experts (half as many) 41.6,
ten times the loss 36.4 and 1.8, top 2 27.1. Over its 20 public models SCH and the hits of LRU correlate 0.90 (m = 16); relative to
Belady at rho = 2, LRU reaches 67%, LFU 71%, SCH 91%.

Arms, on the same bytes in the same order for one seed (sources, headers, manuals and documentation of this machine, four domains):

    baseline   E = 16 experts, K = 4 active, Switch loss 0.01
    no-lb      no Switch loss           over-lb   Switch loss 0.1
    shared1/2  1 or 2 shared experts, which take as many places of the K active ones away
    top2       2 active                 wide      8 experts of twice the width, 2 active

The rule, fixed before any run. E1: paired over seeds at m = 16, 95% t-intervals; "more" holds if the whole interval of the difference
lies above 0, does not hold if it lies below. E2: Pearson correlation of SCH (m = 16, rho = 2) with the hits of LRU over all layers of
all arms of a seed, at least 0.8 in every seed; SCH at least 85% of Belady in every run. E3: an expert's variation over domains
correlates with its SRP (baseline), in at least two thirds of seeds more than its vocabulary specialisation does. E4, the advice to
cache twice the active experts, is reported (``knee_ratio``, ``recommended_ratio``), not judged. Routing of small byte models is close
to routing by the byte, so effects of domains will be weaker than in the paper.
"""
# Shapes: E experts, C capacities 1..E

from pathlib import Path
from typing import Any

import numpy as np
import torch

from anabranch.config import Field, configclass
from anabranch.data.corpus import Corpus, Domain, Files, Mixture, Stdlib
from anabranch.data.named import Named
from anabranch.files import atomic_file, atomic_write_text
from anabranch.nn.moe import MoE
from anabranch.report.style import GRID, INK, MARKERS, MUTED, SERIES, figure, to_png, to_svg
from anabranch.routing import Router, RoutingTrace, SwitchLoss, TopK, ZLoss, record_routing
from anabranch.routing import consistency as lrc
from anabranch.routing.measure import vocabulary_specialization
from anabranch.studies.harness import Arm, Claim, Column, Metrics, Progress, Results, Study
from anabranch.studies.paired import Estimate, Verdict, verdict_below
from anabranch.studies.size import RunSize
from anabranch.studies.training import train_and_measure
from anabranch.train import RunConfig, Trainer

WINDOW = 16
RATIO = 2.0

# Held-out sequences that are measured.
NUM_WINDOWS = 256
CORRELATES = 0.8
NEAR_BELADY = 0.85
CACHES = {"lru": "LRU", "lfu": "LFU", "sch_16": "SCH (knows 16 tokens)", "belady": "Belady"}

COLUMNS = (
    Column("srp_16", "SRP\nm = 16", ".3f"),
    Column("size_ratio_16", "rho hat", ".2f"),
    Column("activation_spread", "SD\n(points)", ".1f"),
    Column("sch_16", "SCH\nrho = 2", ".3f"),
    Column("lru", "LRU", ".3f"),
    Column("belady", "Belady", ".3f"),
    Column("recommended_ratio", "cache /\nactive", ".2f"),
    Column("bits_per_byte", "bits/byte", ".4f"),
)


@configclass
class Size(RunSize):
    """What is the same for all arms."""

    num_layers: int = Field(default=4, ge=1)
    num_experts: int = 16
    hidden_dim: int = 128
    top_k: int = 4
    steps: int = Field(default=1000, ge=1)
    warmup: float = 0.1


def make(full: bool = False, **changes: Any) -> Study:
    """The study in one of its two sizes; ``changes`` are fields of `Size`."""
    size = Size().replace(**changes) if full else Size(num_layers=2, steps=64).replace(**changes)
    chosen = arms(size)
    return Study(
        name="local_routing_consistency",
        title="what makes routing locally consistent, and whether the measure of it predicts caches",
        settings=size.settings(full),
        arms=list(chosen.values()),
        default_arms=None if full else ("baseline", "no-lb", "top2"),
        seeds=(0, 1, 2, 3, 4) if full else (0, 1),
        run=run,
        judge=judge,
        columns=COLUMNS,
        draw=draw,
    )


def arms(size: Size) -> dict[str, Arm]:
    """All arms, built from one budget."""
    made = [
        _arm(size, "baseline", f"{size.num_experts} experts, {size.top_k} active", _moe(size)),
        _arm(size, "no-lb", "no balance loss", _moe(size, alpha=0.0)),
        _arm(size, "over-lb", "ten times the balance loss", _moe(size, alpha=0.1)),
        _arm(size, "shared1", "1 shared expert in place of an active one", _moe(size, shared=1)),
        _arm(size, "shared2", "2 shared experts in place of active ones", _moe(size, shared=2)),
        _arm(size, "top2", "half as many active experts", _moe(size, top_k=size.top_k // 2)),
        _arm(size, "wide", "half as many experts, twice as wide", _moe(size, widen=2)),
    ]
    return {arm.name: arm for arm in made}


def _moe(size: Size, *, alpha: float = 0.01, shared: int = 0, top_k: int | None = None, widen: int = 1) -> MoE.Config:
    places = (size.top_k if top_k is None else top_k) // widen - shared
    balance = (*((SwitchLoss.Config(alpha=alpha),) if alpha else ()), ZLoss.Config())
    return MoE.Config(
        num_experts=size.num_experts // widen - shared,
        hidden_dim=size.hidden_dim * widen,
        shared_experts=shared,
        router=Router.Config(select=TopK.Config(top_k=places), balance=balance),
    )


def _arm(size: Size, name: str, about: str, feed_forward: MoE.Config) -> Arm:
    config = size.run_of(feed_forward)
    return Arm(name, about, config.replace(data=config.data.replace(corpus=corpus())))


def corpus() -> Mixture.Config:
    """Four domains in equal parts: Python, C headers, plays and an encyclopedia."""
    domains: dict[str, Corpus.Config] = {
        "python": Stdlib.Config(include_docs=False),
        "headers": Files.Config(paths=("/usr/include",), pattern="*.h", max_bytes=8_000_000),
        "plays": Named.Config(name="tinyshakespeare"),
        "encyclopedia": Named.Config(name="wikipedia_multilingual"),
    }
    return Mixture.Config(domains={name: Domain(corpus=config) for name, config in domains.items()})


def run(config: RunConfig, seed: int, progress: Progress) -> Metrics:
    """Train one arm, then measure its routing on held-out windows of all domains."""
    return train_and_measure(config, seed, progress, also=lambda trainer: measure_consistency(record(trainer)))


def record(trainer: Trainer) -> RoutingTrace:
    """The decisions on held-out text, with the domains of its sequences."""
    windows = trainer.data.validation(batch_size=8, num_windows=NUM_WINDOWS)
    trainer.model.eval()
    with record_routing(trainer.model) as recorder, torch.inference_mode():
        for batch in windows:
            recorder.domain = [windows.domains[place] for place in batch.domain_B.tolist()]
            trainer.model(batch.token_BL, last_only=True)
    return recorder.trace()


def measure_consistency(trace: RoutingTrace) -> Metrics:
    """SRP of the model and hits at rho = 2, with first accesses as misses, for every cache; by layer for correlations; E3 and E4.

    ``srp_M`` and ``size_ratio_M`` for m of 4, 16, 64; ``sch_16``, ``lru``, ``lfu``, ``belady``, ``fixed``: means over layers;
    ``sch_by_layer`` and ``lru_by_layer``; ``domain_correlation`` and ``vocabulary_correlation`` of experts' SRP with their
    specialisation, over all layers.
    """
    layers = list(lrc.routes(trace))
    found: Metrics = {"activation_spread": lrc.activation_spread(layers)}
    for window in (4, WINDOW, 64):
        of_model = lrc.srp(layers, window, "model")
        found[f"srp_{window}"], found[f"size_ratio_{window}"] = float(of_model.value), float(of_model.size_ratio)
    rates = {"sch_16": lrc.sch(layers, WINDOW, cold="miss")}
    rates |= {policy: lrc.hit_rates(layers, policy, cold="miss") for policy in ("lru", "lfu", "belady", "fixed")}
    at = {name: rate.at_ratio(RATIO) for name, rate in rates.items()}
    found |= {name: float(values.mean()) for name, values in at.items()}
    found |= {"sch_by_layer": at["sch_16"].tolist(), "lru_by_layer": at["lru"].tolist()}
    found["sch_of_belady"] = found["sch_16"] / found["belady"] if found["belady"] else None
    sizes = [of.top_k or 1 for of in layers]
    capacities = [
        lrc.recommended_capacity(sch_C, belady_C, size)
        for sch_C, belady_C, size in zip(rates["sch_16"].rates, rates["belady"].rates, sizes, strict=True)
    ]
    found["recommended_ratio"] = float(np.mean(np.array(capacities) / sizes))
    knees = [lrc.knee(rate_C[size - 1 :]) + size - 1 for rate_C, size in zip(rates["sch_16"].rates, sizes, strict=True)]
    found["knee_ratio"] = float(np.mean(np.array(knees) / sizes))
    return {**found, **_specialisation(trace)}


def _specialisation(trace: RoutingTrace) -> Metrics:
    values, domains, words = [], [], []
    for layer, (value_E, variation_E) in lrc.specialization(trace, WINDOW).items():
        decisions = trace.decisions(layer)
        values.append(value_E)
        domains.append(variation_E)
        words.append(vocabulary_specialization(decisions.token_N, decisions.index_NK, len(value_E)))
    value_X, domain_X, word_X = (np.concatenate(parts) for parts in (values, domains, words))
    return {
        "domain_correlation": _correlation(value_X, domain_X),
        "vocabulary_correlation": _correlation(value_X, word_X),
    }


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    known = np.isfinite(first) & np.isfinite(second)
    if known.sum() < 3 or not np.ptp(first[known]) or not np.ptp(second[known]):
        return None
    return float(np.corrcoef(first[known], second[known])[0, 1])


def judge(results: Results) -> list[Claim]:
    """The claims; see the rule in the module's docstring."""

    def above(metric: str, more: str, less: str, claim: str, paper: str) -> Claim:
        def verdict(difference: Estimate) -> Verdict:
            return verdict_below(Estimate(-difference.mean, difference.half_width, difference.count))

        return results.claim(metric, ours=more, baseline=less, claim=claim, paper=paper, verdict=verdict)

    claims = [
        above(
            "srp_16", "no-lb", "baseline", "E1: without balance loss routing is more consistent", "56.4 against 43.6"
        ),
        above("srp_16", "baseline", "over-lb", "E1: with ten times the loss it is less", "36.4 against 43.6"),
        above(
            "activation_spread",
            "no-lb",
            "baseline",
            "E1: without balance loss it is less balanced",
            "SD 13.2 against 4.0",
        ),
        above(
            "activation_spread",
            "baseline",
            "over-lb",
            "E1: with ten times the loss it is more balanced",
            "SD 1.8 against 4.0",
        ),
        above("srp_16", "baseline", "shared1", "E1: a shared expert makes it less consistent", "41.4 against 43.6"),
        above("srp_16", "baseline", "shared2", "E1: so do two", "38.8 against 43.6"),
        above("srp_16", "baseline", "top2", "E1: fewer active experts make it less consistent", "27.1 against 43.6"),
        above("srp_16", "baseline", "wide", "E1: fewer, wider experts make it less consistent", "41.6 against 43.6"),
        _predicts_lru(results),
        _near_belady(results),
        _domain_experts(results),
    ]
    return claims


def _verdict(holds: list[bool], needed: float = 1.0) -> Verdict:
    if len(holds) < 2:
        return "not resolved"
    return "holds" if sum(holds) >= needed * len(holds) else "does not hold"


def _predicts_lru(results: Results) -> Claim:
    found = []
    for seed in results.seeds:
        runs = [seeds[seed] for seeds in results.runs.values() if seed in seeds]
        first, second = (
            np.array([value for run in runs for value in run.get(name, ())])
            for name in ("sch_by_layer", "lru_by_layer")
        )
        value = _correlation(first, second)
        if value is not None:
            found.append(value)
    name, paper = "E2: SCH predicts the hits of LRU (correlation at least 0.8)", "0.90 over 20 models (m = 16)"
    if not found:
        return Claim.not_run(name, paper)
    least = min(found)
    verdict = _verdict([value >= CORRELATES for value in found])
    return Claim.against(CORRELATES, name, paper, least, verdict)


def _near_belady(results: Results) -> Claim:
    values = [value for arm in results.runs for value in results.values(arm, "sch_of_belady").values()]
    name, paper = "E2: SCH is at least 85% of Belady at rho = 2", "91% (toy baseline)"
    if not values:
        return Claim.not_run(name, paper)
    least = min(values)
    verdict = _verdict([value >= NEAR_BELADY for value in values]) if len(results.seeds) > 1 else "not resolved"
    return Claim.against(NEAR_BELADY, name, paper, least, verdict)


def _domain_experts(results: Results) -> Claim:
    domain = results.values("baseline", "domain_correlation")
    words = results.values("baseline", "vocabulary_correlation")
    name, paper = "E3: experts of a domain are the consistent ones, more than those of words", "figure, no number"
    seeds = sorted(domain.keys() & words.keys())
    if not seeds:
        return Claim.not_run(name, paper)
    mean, mean_words = (float(np.mean([values[seed] for seed in seeds])) for values in (domain, words))
    verdict = _verdict([domain[seed] > max(words[seed], 0.0) for seed in seeds], needed=2 / 3)
    return Claim(name, paper, mean_words, mean, mean - mean_words, None, verdict)


def draw(results: Results, path: Path) -> None:
    """Left, SRP of each arm with its seeds; right, what caches of twice the active experts hit."""
    arms = list(results.runs)
    with figure(10, max(3.0, 1.4 + 0.36 * len(arms)), ncols=2, sharey=True) as (made, (left, right)):
        made.suptitle("Local routing consistency at our scale", x=0.01, ha="left", fontweight="bold", color=INK)
        for row, arm in enumerate(arms):
            values = list(results.values(arm, "srp_16").values())
            left.plot(values, [row] * len(values), "o", color=MUTED, markersize=3.5, alpha=0.6)
            left.plot(np.mean(values), row, "D", color=SERIES[0], markersize=5)
            for number, (metric, label) in enumerate(CACHES.items()):
                hits = results.mean(arm, metric).mean
                right.plot(hits, row, MARKERS[number], color=SERIES[number], label=label if row == 0 else None)
        for axes in (left, right):
            axes.set_yticks(range(len(arms)), arms)
            axes.grid(axis="x", color=GRID)
        left.set_ylim(len(arms) - 0.5, -0.5)
        left.set_xlabel("SRP at 16 tokens (right is more consistent)")
        right.set_xlabel("hit rate, cache of twice the active experts")
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(CACHES))
        png, svg = to_png(made), to_svg(made)
    with atomic_file(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(png)
    atomic_write_text(path.with_name(f"{path.name}.svg"), svg)
