"""Which kind of quality table to make the map of, how far to draw it toward the means, and how much to give for fewer parameters.

All by cross-validation of the whole map: tables from the other folds, choices by what a row is taken for, scores of this fold.
"""
# Shapes: N rows, M models, C categories

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anabranch.routers.coe.category import stratified_folds
from anabranch.routers.coe.expert_map import ExpertMap, Limits, frontier_of_trade_off, solve_map
from anabranch.routers.coe.quality import QualityTable, table_of_scores

Sizes = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class MapKind:
    """What a map is made of.

    Attributes:
        kind: "plain" counts a score for the query's true category, "aware" for the one it is taken for.
        m: observations that an expert's mean counts for in each category; infinite leaves only the means, hence one expert.
    """

    kind: Literal["plain", "aware"]
    m: float


def table_for(table: QualityTable, kind: MapKind) -> QualityTable:
    """What to choose by; a category nothing is known of has the experts' means."""
    return table.shrunk(kind.m, fill=True)


def kinds_to_try(shrinkage: float) -> list[MapKind]:
    """Both kinds with several shrinkages, and the means alone."""
    drawn = sorted({0.0, shrinkage / 4, shrinkage, 4 * shrinkage})
    tried = [MapKind(kind=kind, m=m) for m in drawn for kind in ("plain", "aware")]
    return [*tried, MapKind(kind="plain", m=np.inf)]


def best_kind(
    score_NM: np.ndarray,
    models: Sequence[str],
    true: Sequence[str],
    predicted: Sequence[str],
    sizes: Sizes,
    limits: Limits,
    *,
    prices: Sizes,
    shrinkage: float,
    folds: int,
    seed: int,
) -> MapKind:
    """The kind with the best cross-validated objective; among equals the first of `kinds_to_try`.

    Args:
        score_NM: NaN where unknown.
        models: names of columns.
        true: category of each row.
        predicted: what each row was taken for by a classifier that did not learn from it.
        sizes: billions of parameters; may be empty if no limit is about them.
        limits: of the map.
        prices: for ties.
        shrinkage: m of the middle.
        folds, seed: of the validation.
    """
    if len(score_NM) < 2 * folds:
        return MapKind(kind="plain", m=shrinkage)
    kinds = kinds_to_try(shrinkage)
    rows = _Rows(score_NM, models, true, predicted, sizes, prices, folds, seed)
    value_K = []
    for kind in kinds:
        score, active = rows.validated(kind, [limits])[0]
        value_K.append(score - limits.trade_off * active)
    return kinds[int(np.argmax(np.array(value_K) >= max(value_K) - 1e-12))]


def largest_trade_off(
    score_NM: np.ndarray,
    models: Sequence[str],
    true: Sequence[str],
    predicted: Sequence[str],
    sizes: Sizes,
    limits: Limits,
    *,
    kind: MapKind,
    prices: Sizes,
    folds: int,
    seed: int,
) -> float:
    """The largest lambda whose cross-validated score is not below that of the best single model within the limits; 0 if none is.

    Args: as of `best_kind`.
    """
    named = predicted if kind.kind == "aware" else true
    whole = table_for(table_of_scores(named, score_NM, models), kind)
    found = frontier_of_trade_off(whole, sizes, limits=limits, prices=prices)
    values = [one.limits.trade_off for one in found]
    tried = [limits.replace(trade_off=value) for value in values]
    alone = MapKind(kind="plain", m=np.inf)
    rows = _Rows(score_NM, models, true, predicted, sizes, prices, folds, seed)
    single = rows.validated(alone, [limits])[0][0]
    scored = rows.validated(kind, tried)
    return max((value for value, (score, _) in zip(values, scored, strict=True) if score >= single), default=0.0)


@dataclass(frozen=True)
class _Rows:
    """What maps are validated on: see `best_kind`."""

    score_NM: np.ndarray
    models: Sequence[str]
    true: Sequence[str]
    predicted: Sequence[str]
    sizes: Sizes
    prices: Sizes
    folds: int
    seed: int

    def validated(self, kind: MapKind, limits: Sequence[Limits]) -> list[tuple[float, float]]:
        """Mean score and active parameters, by each of several limits."""
        score_NM, models, sizes = self.score_NM, self.models, self.sizes
        names = sorted({*self.true, *self.predicted})
        at = {name: number for number, name in enumerate(names)}
        true_N = np.array([at[name] for name in self.true])
        predicted_N = np.array([at[name] for name in self.predicted])
        named = np.array(names)[predicted_N if kind.kind == "aware" else true_N]
        fold_N = stratified_folds(true_N, self.folds, self.seed)
        choice_LN = np.zeros((len(limits), len(true_N)), np.int64)
        for fold in range(self.folds):
            rest, own = fold_N != fold, fold_N == fold
            table = table_for(table_of_scores(named[rest].tolist(), score_NM[rest], models, categories=names), kind)
            for number, limit in enumerate(limits):
                expert_C = _experts(solve_map(table, sizes, limits=limit, prices=self.prices), names, models)
                choice_LN[number, own] = expert_C[predicted_N[own]]
        size_M = np.array([sizes.get(name, 0.0) for name in models])
        rows = np.arange(len(true_N))
        return [(float(np.nanmean(score_NM[rows, choice_N])), float(size_M[choice_N].mean())) for choice_N in choice_LN]


def _experts(found: ExpertMap, names: Sequence[str], models: Sequence[str]) -> np.ndarray:
    return np.array([list(models).index(found[name]) for name in names])
