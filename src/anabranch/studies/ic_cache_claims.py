"""The claims of the study of IC-Cache. The rule stands in the docstring of `anabranch.studies.ic_cache`."""
# Shapes: R requests

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from anabranch.studies.harness import Claim, Results
from anabranch.studies.paired import Estimate, Verdict, every_seed, paired_difference, verdict_below

OVER, UNDER, BOUNDED, SUSTAINED, FASTER = 1.3, 0.5, 10.0, 5.0, 1.4

# The largest correlation of similarity with use that the paper found.
WEAK = 0.22


def claims(results: Results, policies: Collection[str], loads: Sequence[float]) -> list[Claim]:
    """All claims; those whose arms have not run say so."""
    made = [*_of_answers(results), *_correlations(results), *_load(results, policies, loads), *_pool(results)]
    return made


def _of_answers(results: Results) -> list[Claim]:
    low, high = 0.5, 0.7

    def between(similarity: float) -> bool:
        return low <= similarity < high

    return [
        _answers(
            results,
            "f1",
            "similar5",
            "none",
            "selected examples at least double token F1",
            "37.4 -> 54.5% right",
            times=2.0,
        ),
        _answers(
            results, "f1", "similar5", "random5", "selected beat random examples (F1)", "54.5 against 24.8% right"
        ),
        _answers(
            results, "score", "similar5", "random5", "selected beat random examples (score)", "54.5 against 24.8% right"
        ),
        _answers(results, "f1", "none", "random5", "random examples hurt (F1)", "37.4 -> 24.8% right"),
        _answers(
            results,
            "recall",
            "utility5",
            "nearest",
            "more of the arguments than the nearest answer",
            "quality 50 -> 18% wins",
        ),
        _answers(
            results,
            "recall",
            "utility5",
            "nearest",
            f"by 10 points where the nearest is at {low} to {high}",
            "no number",
            above=0.1,
            keep=between,
        ),
        _answers(
            results, "score", "utility5", "nearest", "better than the nearest answer (score)", "quality 50 -> 18% wins"
        ),
        _answers(results, "f1", "utility5", "nearest", "better than the nearest answer (F1)", "not claimed"),
        _answers(
            results, "score", "utility5-far", "nearest-far", "the same without near-duplicates (score)", "no number"
        ),
        _answers(
            results,
            "recall",
            "similar5-other",
            "nearest-other",
            "by 10 points where neighbours have other names",
            "no number",
            above=0.1,
        ),
        _answers(
            results,
            "exact",
            "similar5-flip",
            "nearest-flip",
            "right to the letter where the nearest asks the opposite",
            "no number",
        ),
        _share(results, "nearest-flip", "the nearest answer is the opposite for most of the made requests", above=0.5),
        _share(results, "similar5-flip", "with 5 similar examples at most 20% are", above=None),
        _share(results, "utility5-flip", "with 5 useful examples at most 20% are", above=None),
        _answers(
            results,
            "score",
            "utility5",
            "similar5",
            "predicted use selects better than similarity",
            "-0.22 -> -0.10 (OpenOrca)",
        ),
        _answers(results, "score", "utility5-far", "similar5-far", "the same without near-duplicates", "no number"),
    ]


def _each(results: Results, arm: str, metric: str, shard: int) -> list[Any]:
    return results.runs.get(arm, {}).get(shard, {}).get(f"{metric}_each", [])


def _paired(
    results: Results, metric: str, ours: str, baseline: str, keep: Callable[[float], bool] | None
) -> np.ndarray:
    """Ours and the baseline's value of each request that both have, [R, 2]."""
    rows = []
    for shard in results.seeds:
        similarity = _each(results, "nearest", "similarity", shard) if keep else []
        first, second = _each(results, ours, metric, shard), _each(results, baseline, metric, shard)
        if keep and len(similarity) != len(first):
            continue
        for place, (mine, theirs) in enumerate(zip(first, second, strict=False)):
            if mine is not None and theirs is not None and (keep is None or keep(similarity[place])):
                rows.append((mine, theirs))
    return np.array(rows, np.float64).reshape(-1, 2)


def bootstrap(value_R: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95% interval of a mean, by resampling; the same for the same values."""
    random = np.random.default_rng(0)
    means = value_R[random.integers(len(value_R), size=(draws, len(value_R)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def _verdict(low: float, high: float) -> Verdict:
    return "holds" if low > 0 else "does not hold" if high < 0 else "not resolved"


def _answers(
    results: Results,
    metric: str,
    ours: str,
    baseline: str,
    claim: str,
    paper: str,
    *,
    above: float = 0.0,
    times: float = 1.0,
    keep: Callable[[float], bool] | None = None,
) -> Claim:
    """Ours > ``times`` the baseline + ``above``, over requests; of those whose nearest similarity ``keep`` takes."""
    pair_R2 = _paired(results, metric, ours, baseline, keep)
    if len(pair_R2) < 2:
        return Claim.not_run(claim, paper)
    mean = pair_R2.mean(0)
    low, high = bootstrap(pair_R2[:, 0] - times * pair_R2[:, 1] - above)
    interval = list(bootstrap(pair_R2[:, 0] - pair_R2[:, 1]))
    mine, theirs = map(float, mean)
    limit = None if (times, above) == (1.0, 0.0) else times * theirs + above
    verdict, count = _verdict(low, high), len(pair_R2)
    return Claim(claim, paper, theirs, mine, mine - theirs, interval, verdict, limit=limit, count=count)


def _share(results: Results, arm: str, claim: str, *, above: float | None) -> Claim:
    """The share of opposite answers is above half, or at most a fifth."""
    values = [value for shard in results.seeds for value in _each(results, arm, "wrong_way", shard)]
    if len(values) < 2:
        return Claim.not_run(claim, "open issue 694 of GPTCache")
    limit = 0.2 if above is None else above
    low, high = bootstrap(np.array(values, np.float64))
    verdict = _verdict(limit - high, limit - low) if above is None else _verdict(low - limit, high - limit)
    mean = float(np.mean(values))
    return Claim.against(limit, claim, "open issue 694 of GPTCache", mean, verdict, [low, high], count=len(values))


def _correlations(results: Results) -> list[Claim]:
    found = results.mean("labels", "similarity_correlation")
    claim, paper = f"similarity tells little of use (correlation at most {WEAK})", "0.04 to 0.22"
    made = [Claim.not_run(claim, paper)]
    if found.count:
        made = [Claim.against(WEAK, claim, paper, found.mean, verdict_below(found, WEAK), found.interval)]
    for kind, name in (("logistic", "logistic"), ("mlp", "MLP"), ("cross_encoder", "cross-encoder")):
        ours, theirs = (results.values("proxy", f"{which}_correlation") for which in (kind, "similarity"))
        claim, paper = f"the {name} proxy tells more of use than similarity (correlation)", "better, no number"
        made.append(_means(claim, paper, ours, theirs) if ours else Claim.not_run(claim, paper))
    return made


def _means(claim: str, paper: str, ours: dict[int, float], theirs: dict[int, float]) -> Claim:
    """Ours is larger, paired over seeds."""
    difference = paired_difference(ours, theirs)
    baseline, mean = (float(np.mean(list(values.values()))) for values in (theirs, ours))
    return Claim(
        claim,
        paper,
        baseline,
        mean,
        difference.mean,
        difference.interval,
        above_zero(difference),
        count=difference.count,
    )


def above_zero(difference: Estimate) -> Verdict:
    """Holds if the interval lies above 0."""
    return verdict_below(Estimate(-difference.mean, difference.half_width, difference.count))


class _Loads:
    """What the policies came to at each load, by seed."""

    def __init__(self, results: Results, policies: Collection[str], loads: Sequence[float]) -> None:
        self.runs = {name: runs for name in policies if (runs := results.runs.get(f"load-{name}"))}
        self.loads = loads
        is_complete = {"ours", "ours-no-load", "large"} <= self.runs.keys()
        self.seeds = sorted(set.intersection(*(set(runs) for runs in self.runs.values()))) if is_complete else []

    def at(self, name: str, metric: str, rho: float, seed: int) -> float:
        return float(self.runs[name][seed][f"{metric}@{rho:g}"])

    def is_dominated(self, rho: float, seed: int) -> bool:
        """Whether a policy that is no bandit has at least the quality at no more latency, and one of them clearly better."""
        quality, p99 = (self.at("ours", metric, rho, seed) for metric in ("quality", "p99"))
        for name in self.runs:
            q, p = (self.at(name, metric, rho, seed) for metric in ("quality", "p99"))
            is_clear = q > quality + 0.005 or p < 0.95 * p99
            if not name.startswith("ours") and q >= quality and p <= p99 and is_clear:
                return True
        return False

    def sustained(self, name: str, lost: float, seed: int) -> float:
        """The largest load at which P99 is fine and quality is at most ``lost`` below that of the large arm; 0 if there is none."""
        fine = [
            rho
            for rho in self.loads
            if self.at(name, "p99", rho, seed) <= SUSTAINED
            and self.at(name, "quality", rho, seed) >= self.at("large", "quality", rho, seed) - lost
        ]
        return max(fine, default=0.0)

    def claim(
        self,
        claim: str,
        paper: str,
        metric: str,
        rho: float,
        baseline: str,
        seen: Callable[[int], bool],
        limit: Callable[[float], float],
    ) -> Claim:
        """Ours against a baseline at one load; holds if ``seen`` in every seed. ``limit`` makes the claim's of the baseline's mean."""
        ours, theirs = ([self.at(name, metric, rho, seed) for seed in self.seeds] for name in ("ours", baseline))
        return self.judged(claim, paper, theirs, ours, [seen(seed) for seed in self.seeds], limit)

    def judged(
        self,
        claim: str,
        paper: str,
        theirs: Sequence[float],
        ours: Sequence[float],
        seen: Sequence[bool],
        limit: Callable[[float], float],
    ) -> Claim:
        """By seed; holds if ``seen`` in every one."""
        if not self.seeds:
            return Claim.not_run(claim, paper)
        baseline, mean = float(np.mean(theirs)), float(np.mean(ours))
        return Claim(
            claim,
            paper,
            baseline,
            mean,
            mean - baseline,
            None,
            every_seed(seen),
            limit=limit(baseline),
            count=len(seen),
        )


def _load(results: Results, policies: Collection[str], loads: Sequence[float]) -> list[Claim]:
    found = _Loads(results, policies, loads)
    at, seeds = found.at, found.seeds
    dominated = [[found.is_dominated(rho, seed) for rho in loads] for seed in seeds]
    made = [
        _never("no other policy dominates at any load (share of loads)", "Pareto front (figure)", dominated),
        found.claim(
            f"P99 at {OVER} of large capacity is at most {BOUNDED:g} large service times",
            "-69 to -71% P99",
            "p99",
            OVER,
            "large",
            lambda seed: at("ours", "p99", OVER, seed) <= BOUNDED,
            lambda _: BOUNDED,
        ),
        found.claim(
            f"minding the load halves P99 at {OVER} of capacity",
            "no number",
            "p99",
            OVER,
            "ours-no-load",
            lambda seed: at("ours", "p99", OVER, seed) < 0.5 * at("ours-no-load", "p99", OVER, seed),
            lambda open_: 0.5 * open_,
        ),
        found.claim(
            f"quality within a point of always-large at {UNDER} of capacity",
            "no bias there",
            "quality",
            UNDER,
            "large",
            lambda seed: at("ours", "quality", UNDER, seed) >= at("large", "quality", UNDER, seed) - 0.01,
            lambda large: large - 0.01,
        ),
    ]
    for lost, label in ((0.01, "equal quality (to a point)"), (0.1, "a quality at most 10 points lower")):
        ours = [found.sustained("ours", lost, seed) for seed in seeds]
        theirs = [found.sustained("large", lost, seed) for seed in seeds]
        seen = [mine >= FASTER * their for mine, their in zip(ours, theirs, strict=True)]
        name = f"{FASTER} times the sustained load of always-large at {label}"
        made.append(found.judged(name, "1.4 to 5.9 times", theirs, ours, seen, lambda large: FASTER * large))
    return made


def _never(claim: str, paper: str, seen: Sequence[Sequence[bool]]) -> Claim:
    """``seen`` of each seed and load: holds if nowhere; the share of loads stands in the claim."""
    if not seen:
        return Claim.not_run(claim, paper)
    share = float(np.mean([np.mean(row) for row in seen]))
    return Claim.against(0.0, claim, paper, share, every_seed([not any(row) for row in seen]))


def _pool(results: Results) -> list[Claim]:
    def better(metric: str, ours: str, baseline: str, claim: str, paper: str) -> Claim:
        return results.claim(metric, ours=ours, baseline=baseline, claim=claim, paper=paper, verdict=above_zero)

    return [
        better(
            "copied",
            "keep-knapsack",
            "keep-random",
            "5% kept by the knapsack serve better than 5% at random",
            "figure 19",
        ),
        better(
            "copied",
            "keep-knapsack-all",
            "keep-random",
            "the same where every example shown has the credit",
            "figure 19",
        ),
        better("copied", "keep-knapsack", "keep-newest", "better than the newest 5%", "no number"),
        better("after", "drift-decay", "drift-none", "decay helps after a change of topic", "no number"),
        better(
            "after",
            "drift-decay",
            "drift-paper",
            "room for newcomers helps after a change of topic",
            "not in the paper",
        ),
        better("before", "drift-none", "drift-decay", "decay costs before it", "no number"),
    ]
