"""Strategies against recorded outcomes: learn on one part, play the other, and say what each choice was worth.

All are judged on the same questions, those whose outcome is known for every model, and every difference is paired.
"""
# Shapes: N questions, M models, S strategies, P points of a curve, K settings of a knob

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anabranch.errors import AnabranchError, DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Pool
from anabranch.routers.contract.strategy import Embed, Played, Strategy
from anabranch.routers.data.prices import pool_of
from anabranch.routers.data.splits import check_disjoint, groups, pooled
from anabranch.routers.referee import baselines
from anabranch.routers.referee.baselines import Baseline
from anabranch.routers.referee.compare import DRAWS, Interval, bootstrap
from anabranch.routers.referee.contenders import other_models, own_setting, sequences_of
from anabranch.routers.referee.curve import Scale, aiq, cost_save, hull, pareto_distance, routerbench_aiq
from anabranch.routers.referee.judging import decide
from anabranch.routers.referee.report import Report, Standing
from anabranch.routers.referee.two_models import TARGETS, Recovery, recovery, recovery_in_bins
from anabranch.routers.referee.verdict import MARGIN, Gain
from anabranch.routers.score_scale import range_of

Progress = Callable[[str], None]
TIMED = 300  # decisions


@dataclass
class Trial:
    """What one strategy did, over all seeds.

    Attributes:
        played: of each seed.
        curve_P2: mean over seeds of cost and quality, its own setting first; None where costs are not known.
        settings: of its knob, from dear to cheap, with the quality and cost of each question at them, means over seeds.
        recovery: of the two models of a pool of two, by its scores; None otherwise.
    """

    name: str
    strategy: Strategy
    played: list[Played] = field(default_factory=list)
    curve_P2: np.ndarray | None = None
    settings: list[tuple[float, np.ndarray, np.ndarray]] = field(default_factory=list)
    recovery: Recovery | None = None
    binned: Recovery | None = None
    fit_s: float | None = None
    latency_ms: tuple[float, float] | None = None

    @property
    def quality_N(self) -> np.ndarray:
        """Of each question, mean over seeds."""
        return np.mean([one.quality_N for one in self.played], axis=0)

    @property
    def cost_N(self) -> np.ndarray:
        """Dollars of each question, mean over seeds."""
        return np.mean([one.cost_N for one in self.played], axis=0)


def evaluate(
    strategies: Mapping[str, Strategy],
    *,
    train: Recorded | None,
    test: Recorded,
    pool: Pool | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    embed: Embed | None = None,
    cost_range: tuple[float, float] | None = None,
    dollar: float = 0.0,
    draws: int = DRAWS,
    allow_leak: bool = False,
    margin: float = MARGIN,
    best_single: str | None = None,
    progress: Progress = lambda text: None,
) -> Report:
    """Judge strategies.

    Args:
        strategies: by name. With ``train`` each is built anew from its config for every seed; else they are judged as they are.
        train: outcomes to learn from; None for strategies that have learned before.
        test: outcomes to be judged on. Copies of a question count as one, with the means of what is known of them.
        pool: models with prices; None knows only their names.
        seeds: of learning.
        embed: what made the vectors, for strategies that embed texts of their own.
        cost_range: dollars a query between which AIQ is taken; None takes the cheapest to the dearest model on the test.
        dollar: score that a dollar is worth, for regret.
        draws: of the bootstrap.
        allow_leak: let the parts share questions.
        margin: share of the range of scores within which qualities count as equal, for the verdict.
        best_single: the model that did best on what strategies learned from, where that is known without ``train``; without either it is
            chosen on the test, which favours it.
        progress: told what is under way.

    Raises DataError if the parts share questions or no question of the test has all outcomes, InputError if vectors are missing.
    """
    started = time.perf_counter()
    if train is not None:
        if not allow_leak:
            check_disjoint(train, test)
        test = test.only(train.models)
    if len(set(groups(test).tolist())) < len(test):
        test = pooled(test)
    num_rows, test = len(test), _complete(test)
    pool = pool_of(test.models) if pool is None else Pool(_in_order(pool, test.models))
    learned = test if train is None else train
    known = train is None and best_single in test.models
    best = baselines.single(test, str(best_single)) if known else baselines.best_single(learned, test)
    trials, failed, sequences = [], {}, other_models(best, test)
    for name, strategy in strategies.items():
        progress(name)
        try:
            trial = try_out(name, strategy, train, test, pool, seeds, embed)
        except AnabranchError as error:
            failed[name] = str(error)
            continue
        sequences += sequences_of(trial, best)
        # As much as all questions at all settings: what is needed of them is in the sequences.
        trial.settings = []
        trials.append(trial)
    if failed and not trials:
        name, reason = next(iter(failed.items()))
        raise InputError(f"no strategy could be judged; {name}: {reason}")
    low, high = range_of(test.score_NM)
    verdict = decide(
        [own_setting(trial, best) for trial in trials],
        sequences,
        best.facts["model"],
        questions=len(test),
        reach=high - low,
        score_range=(low, high),
        chosen_on="train" if known or train is not None else "test",
        margin=margin * (high - low),
        unfit=failed,
    )
    tested = {one.name: one for one in verdict.gains}
    report = _report(trials, tested, learned, best, test, cost_range, dollar, draws)
    return report.replace(
        verdict=verdict,
        failed=failed,
        seeds=list(seeds) if train is not None else [],
        left_out=num_rows - len(test),
        num_train=None if train is None else len(train),
        seconds=time.perf_counter() - started,
        data={"test": digest(test)} if train is None else {"train": digest(train), "test": digest(test)},
    )


def digest(data: Recorded) -> str:
    """Tells data apart: sha256 of texts, models, scores and costs."""
    hashed = hashlib.sha256(repr((data.query, data.models)).encode("utf-8", "surrogatepass"))
    for values in (data.score_NM, data.cost_NM):
        hashed.update(b"none" if values is None else np.ascontiguousarray(values, np.float64).tobytes())
    return hashed.hexdigest()[:16]


def _complete(test: Recorded) -> Recorded:
    """The rows whose outcomes are all known; costs that are known for no such row are left out."""
    scored_N = np.isfinite(test.score_NM).all(1)
    if not scored_N.any():
        raise DataError(
            f"none of the {len(test)} test questions has a score of every model, so strategies cannot be compared on it"
        )
    if test.cost_NM is None:
        return test if scored_N.all() else test.take(np.flatnonzero(scored_N))
    priced_N = scored_N & np.isfinite(test.cost_NM).all(1)
    if not priced_N.any():
        raise DataError("no test question has the cost of every model; leave costs out, or give a price file")
    return test if priced_N.all() else test.take(np.flatnonzero(priced_N))


def _in_order(pool: Pool, names: tuple[str, ...]) -> tuple:
    known = {model.name: model for model in pool.models}
    missing = [name for name in names if name not in known]
    if missing:
        raise InputError(f"the pool lacks the model {missing[0]!r}; it has {', '.join(known)}")
    return tuple(known[name] for name in names)


def try_out(
    name: str,
    strategy: Strategy,
    train: Recorded | None,
    test: Recorded,
    pool: Pool,
    seeds: Sequence[int],
    embed: Embed | None,
) -> Trial:
    """Learn and play with every seed, as `evaluate` does with each strategy; arguments are as there, outcomes complete.

    Raises InputError if vectors are missing.
    """
    if strategy.needs_vector and test.vector_ND is None:
        raise InputError(f"{name} needs vectors; embed the data first")
    trial = Trial(name, strategy)
    curves: list[list[list[float]]] = []
    spent: list[float] = []
    sum_2KN = np.zeros(())
    for seed in seeds if train is not None else [None]:
        one = strategy
        if train is not None and seed is not None:
            begun = time.process_time()
            one = strategy.config.build()
            one.connect(embed=embed)
            one.fit(train, seed=seed)
            spent.append(time.process_time() - begun)
        trial.strategy = one
        trial.played.append(one.play(test, pool))
        values, along = _along(one, test if train is None else train, test, pool)
        curves.append([_point(one) for one in (trial.played[-1], *along)])
        sum_2KN = sum_2KN + np.array([[one.quality_N for one in along], [one.cost_N for one in along]])
    trial.fit_s = float(np.mean(spent)) if spent else None
    if test.cost_NM is not None:
        trial.curve_P2 = np.mean(curves, axis=0)
        if values:
            trial.settings = list(zip(values, *(sum_2KN / len(curves)), strict=True))
    if len(test.models) == 2:
        trial.recovery, trial.binned = _recovered(trial.strategy, test, pool)
    trial.latency_ms = decision_latency(trial.strategy, test, pool)
    return trial


def _along(one: Strategy, learned: Recorded, test: Recorded, pool: Pool) -> tuple[list[float], list[Played]]:
    """Values of its knob, from dear to cheap, and what comes of them; none where costs are not known."""
    values = list(one.knobs(learned)) if test.cost_NM is not None else []
    if not values:
        return [], []
    many = getattr(one, "play_knobs", None)
    return values, many(test, values) if many else [one.with_knob(value).play(test, pool) for value in values]


def _point(one: Played) -> list[float]:
    """Mean cost and quality."""
    return [float(one.cost_N.mean()), float(one.quality_N.mean())]


def _recovered(one: Strategy, test: Recorded, pool: Pool) -> tuple[Recovery, Recovery] | tuple[None, None]:
    """The path between two models by how much the strategy prefers the better one; None if it orders nothing."""
    weak, strong = np.argsort(test.score_NM.mean(0), kind="stable")
    preference_N = preference(one, test, pool, test.models[strong], test.models[weak])
    if preference_N is None:
        return None, None
    try:
        columns = test.score_NM[:, weak], test.score_NM[:, strong]
        return recovery(preference_N, *columns), recovery_in_bins(preference_N, *columns)
    except InputError:
        # Equally good models leave no gap to recover.
        return None, None


def preference(one: Strategy, data: Recorded, pool: Pool, ours: str, other: str) -> np.ndarray | None:
    """float64 ``[N]``: how much the strategy prefers one model to another; None if it does not score both."""
    predictor = getattr(one, "predictor", None)
    if predictor is not None:
        quality_NM = predictor.predict(data).quality_NM
        return quality_NM[:, predictor.models.index(ours)] - quality_NM[:, predictor.models.index(other)]
    found = []
    for query in data.queries():
        scores = {item.model: item.score for item in one.route(query, pool).candidates}
        if not {ours, other} <= scores.keys():
            return None
        found.append(scores[ours] - scores[other])
    return np.array(found)


def decision_latency(one: Strategy, data: Recorded, pool: Pool, count: int = TIMED) -> tuple[float, float] | None:
    """Milliseconds of `Strategy.route` given a vector, 50th and 99th percentile; None for what decides only offline.

    Each query counts with the quickest of three decisions, so that what else the machine does is left out.
    """
    queries = [query for query, _ in zip(data.queries(), range(count), strict=False)]
    spent_3N = np.empty((3, len(queries)))
    try:
        for spent_N in spent_3N:
            for row, query in enumerate(queries):
                begun = time.perf_counter_ns()
                one.route(query, pool)
                spent_N[row] = time.perf_counter_ns() - begun
    except (InputError, NotImplementedError):
        return None
    p50, p99 = np.percentile(spent_3N.min(0) / 1e6, (50, 99))
    return float(p50), float(p99)


def _report(
    trials: list[Trial],
    tested: Mapping[str, Gain],
    learned: Recorded,
    best: Baseline,
    test: Recorded,
    cost_range: tuple[float, float] | None,
    dollar: float,
    draws: int,
) -> Report:
    singles = {model: baselines.single(test, model) for model in test.models}
    rules = {
        "random": baselines.random_choice(test),
        "best_single": best,
        "best_per_task": baselines.best_per_task(learned, test),
        "oracle": baselines.oracle(test),
    }
    known = {name: rule for name, rule in rules.items() if rule is not None}
    single_P2 = baselines.mixing(test)
    if single_P2 is not None and cost_range is None:
        cost_range = float(single_P2[:, 0].min()), float(single_P2[:, 0].max())
    mixing = None
    if single_P2 is not None and cost_range is not None:
        mixing = {"aiq": aiq(single_P2, *cost_range), "curve": hull(single_P2).tolist()}
    found = Report(
        models=list(test.models),
        num_test=len(test),
        cost_range=cost_range,
        dollar=dollar,
        baselines={name: _baseline_row(rule, single_P2, cost_range) for name, rule in known.items()},
        singles={model: _baseline_row(rule, single_P2, cost_range) for model, rule in singles.items()},
        mixing=mixing,
    )
    if not trials:
        return found
    quality_NS = np.column_stack([trial.quality_N for trial in trials])
    scores = bootstrap(quality_NS, draws=draws)
    gains = bootstrap(quality_NS - best.quality_N[:, None], draws=draws)
    rows = [
        _standing(*row, tested[row[0].name], test, known, dollar).replace(
            **_of_cost(row[0], trials, known, single_P2, cost_range)
        )
        for row in zip(trials, scores, gains, strict=True)
    ]
    return found.replace(strategies=rows)


def with_cheapest(point_P2: np.ndarray, single_P2: np.ndarray) -> np.ndarray:
    """Points and that of the cheapest model: below the cost of a strategy's cheapest setting, a budget is met by mixing with it.

    Without, a strategy that only ever asks the dearest model would count as if it met every budget.
    """
    return np.concatenate([point_P2, single_P2[np.argmin(single_P2[:, 0])][None]])


def _baseline_row(
    rule: Baseline, single_P2: np.ndarray | None, cost_range: tuple[float, float] | None
) -> dict[str, Any]:
    """A baseline for the report."""
    row = {"score": float(rule.quality_N.mean()), "cost": None, "aiq": None, **rule.facts}
    if rule.cost_N is None or rule.curve_P2 is None or single_P2 is None or cost_range is None:
        return row
    if len(rule.curve_P2) > 1:
        row["curve"] = hull(rule.curve_P2).tolist()
    return {**row, "cost": float(rule.cost_N.mean()), "aiq": aiq(with_cheapest(rule.curve_P2, single_P2), *cost_range)}


def _standing(
    trial: Trial,
    score: Interval,
    gain: Interval,
    tested: Gain,
    test: Recorded,
    rules: Mapping[str, Baseline],
    dollar: float,
) -> Standing:
    share_M = np.mean([one.calls_NM.mean(0) for one in trial.played], axis=0)
    recovered: dict[str, Any] = {}
    if trial.recovery is not None and trial.binned is not None:
        cpt = {f"{target:.0%}": trial.recovery.cpt(target) for target in TARGETS}
        recovered = {"apgr": trial.recovery.apgr, "apgr_in_bins": trial.binned.apgr, "cpt": cpt}
    return Standing(
        name=trial.name,
        score=score.mean,
        interval=[score.low, score.high],
        gain=gain.mean,
        gain_interval=[gain.low, gain.high],
        p=tested.p,
        p_holm=tested.p_holm,
        gap=float(rules["oracle"].quality_N.mean()) - score.mean,
        regret=_regret(trial, test, dollar),
        by_seed=[float(one.quality_N.mean()) for one in trial.played],
        calls={model: float(share) for model, share in zip(test.models, share_M, strict=True)},
        fit_s=trial.fit_s,
        memory_bytes=sum(array.nbytes for array in trial.strategy.state()[0].values()),
        latency_ms=None if trial.latency_ms is None else {"p50": trial.latency_ms[0], "p99": trial.latency_ms[1]},
        **recovered,
    )


def _of_cost(
    trial: Trial,
    trials: list[Trial],
    rules: Mapping[str, Baseline],
    single_P2: np.ndarray | None,
    cost_range: tuple[float, float] | None,
) -> dict[str, Any]:
    """The part of a standing that needs costs."""
    best = rules["best_single"].point
    if trial.curve_P2 is None or single_P2 is None or cost_range is None or best is None:
        return {}
    curve_P2 = trial.curve_P2
    every_P2 = np.concatenate([single_P2, *(other.curve_P2 for other in trials if other.curve_P2 is not None)])
    scale = Scale(cost_range, (float(single_P2[:, 1].min()), float(rules["oracle"].quality_N.mean())))
    return {
        "cost": float(trial.cost_N.mean()),
        "curve": np.unique(curve_P2, axis=0).tolist(),
        "aiq": aiq(with_cheapest(curve_P2, single_P2), *cost_range),
        "aiq_routerbench": routerbench_aiq(curve_P2, float(every_P2[:, 0].max())),
        "cost_save": cost_save(curve_P2, best[1], best[0]),
        "pareto_distance": pareto_distance(curve_P2[0].tolist(), hull(every_P2), scale),
    }


def _regret(trial: Trial, test: Recorded, dollar: float) -> float:
    """Mean over questions of the utility given up against the best choice in hindsight; utility is score - ``dollar`` * cost."""
    cost_NM = 0.0 if test.cost_NM is None else test.cost_NM
    cost_N = 0.0 if test.cost_NM is None else trial.cost_N
    return float(np.mean((test.score_NM - dollar * cost_NM).max(1) - (trial.quality_N - dollar * cost_N)))
