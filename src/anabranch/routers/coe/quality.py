"""What each expert is worth in each category: a table with counts and spreads, and where its numbers come from.

    table_of_scores(...)       exact scores of every expert on recorded questions
    table_of_judgements(...)   win rates against a reference answer, judged pairwise in both orders, ties count half
    table_of_feedback(...)     scores users gave to single answers
    confusion_aware(...)       exact scores by *predicted* category, so that the table knows what the classifier mixes up

Tables of one unit add up (`QualityTable.merged`), cells of few observations are drawn toward the expert's mean (`shrunk`), and an expert
takes a category from its incumbent only where that is no luck (`steady`). The map from categories to experts is made of such a table by
`anabranch.routers.coe.expert_map`. Source: Composition of Experts, arXiv 2412.01868 (win rates Q[c, e]); shrinkage, cross-fitting and
steadiness are ours.
"""
# Shapes: N rows, C categories, E experts

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal, Self

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.both_orders import LOSS, TIE, WIN, of_both_orders
from anabranch.routers.coe.category import CategoryRouter
from anabranch.routers.coe.feedback import Feedback

# Observations that the spread of the whole table counts for in the spread of a cell.
PRIOR = 2.0


@dataclass(frozen=True, kw_only=True)
class QualityTable:
    """Quality of experts by category.

    Attributes:
        categories: names of rows.
        experts: names of columns.
        quality_CE: float64 means; NaN where an expert must not be chosen, as it was never seen there.
        count_CE: float64, observations behind each.
        variance_CE: float64, of one observation; 0 where there are fewer than two.
        share_C: float64, how often each category is asked; sums to 1.
        mean_E: float64, quality of each expert whatever the category; NaN for one never seen.

    Raises InputError for names that are there twice, shapes that do not fit, shares that are negative, unknown or all 0, and infinities.
    """

    categories: tuple[str, ...]
    experts: tuple[str, ...]
    quality_CE: np.ndarray
    count_CE: np.ndarray
    variance_CE: np.ndarray
    share_C: np.ndarray
    mean_E: np.ndarray

    def __post_init__(self) -> None:
        for what, names in (("category", self.categories), ("expert", self.experts)):
            if not names or len(set(names)) < len(names):
                raise InputError(f"a quality table needs at least one {what}, each once; got {list(names)}")
        shape = (len(self.categories), len(self.experts))
        for name in ("quality_CE", "count_CE", "variance_CE"):
            if getattr(self, name).shape != shape:
                raise InputError(f"{name} has shape {list(getattr(self, name).shape)}; it must be {list(shape)}")
        if np.isinf(self.quality_CE).any():
            raise InputError("qualities must be finite, or NaN where an expert must not be chosen")
        object.__setattr__(self, "share_C", shares(self.share_C, self.categories))

    @classmethod
    def of(
        cls,
        quality: Mapping[str, Mapping[str, float]],
        *,
        counts: float = 1.0,
        share: Mapping[str, float] | None = None,
    ) -> Self:
        """From ``{category: {expert: quality}}``; a missing cell is one never to choose.

        Args:
            quality: of each category.
            counts: observations that each cell counts for.
            share: how often each category is asked; equal if left out.

        Raises InputError for a category in ``share`` that is not in ``quality``.
        """
        categories, experts = tuple(quality), tuple(dict.fromkeys(name for row in quality.values() for name in row))
        unknown = [name for name in share or {} if name not in quality]
        if unknown:
            raise InputError(
                f"no category {unknown[0]!r} in the quality table; it has {', '.join(map(str, categories))}"
            )
        quality_CE = np.array([[quality[c].get(e, np.nan) for e in experts] for c in categories], np.float64)
        share_C = np.array([1.0 if share is None else share.get(name, 0.0) for name in categories])
        count_CE = np.where(np.isnan(quality_CE), 0.0, counts)
        return cls(
            categories=categories,
            experts=experts,
            quality_CE=quality_CE,
            count_CE=count_CE,
            variance_CE=np.zeros(quality_CE.shape),
            share_C=share_C,
            mean_E=_means(quality_CE, count_CE),
        )

    def row(self, category: str) -> int:
        """Raises InputError for a category that is not there."""
        return _at(category, self.categories, "category")

    def column(self, expert: str) -> int:
        """Raises InputError for an expert that is not there."""
        return _at(expert, self.experts, "expert")

    def shrunk(self, m: float = 20.0, *, fill: bool = False) -> Self:
        """Cells drawn toward the mean of their expert: (n q + m q_mean) / (n + m).

        Args:
            m: observations that the mean counts for; infinite for the mean alone.
            fill: give rows without any observation the means; without, they stay NaN.
        """
        if not m >= 0:
            raise InputError(f"m is {m}; it must be at least 0")
        known_CE = ~np.isnan(self.quality_CE)
        own_CE = np.where(known_CE, self.quality_CE, 0.0)
        if np.isinf(m):
            quality_CE = np.broadcast_to(self.mean_E, own_CE.shape).copy()
        else:
            weight_CE = self.count_CE + m
            drawn_CE = self.count_CE * own_CE + m * self.mean_E
            quality_CE = np.divide(drawn_CE, weight_CE, out=own_CE.copy(), where=weight_CE > 0)
        empty_C1 = fill & (self.count_CE.sum(axis=1, keepdims=True) == 0)
        return replace(self, quality_CE=np.where(known_CE, quality_CE, np.where(empty_C1, self.mean_E, np.nan)))

    def merged(self, other: "QualityTable") -> "QualityTable":
        """Both tables' observations together; categories and experts of either. Shares are this one's unless it lacks the category."""
        categories = tuple(dict.fromkeys((*self.categories, *other.categories)))
        experts = tuple(dict.fromkeys((*self.experts, *other.experts)))
        mine, theirs = self._moments(categories, experts), other._moments(categories, experts)
        count, total, square = (a + b for a, b in zip(mine, theirs, strict=True))
        share_C = [
            self.share_C[self.row(name)] if name in self.categories else other.share_C[other.row(name)]
            for name in categories
        ]
        return _of_moments(categories, experts, count, total, square, np.array(share_C))

    def with_feedback(self, feedback: Feedback) -> "QualityTable":
        """With scores of single answers; shares stay. Raises InputError for scores of what the table does not have."""
        mine = self._moments(self.categories, self.experts)
        count, total, square = (a + b for a, b in zip(mine, feedback.sums(self.categories, self.experts), strict=True))
        return _of_moments(self.categories, self.experts, count, total, square, self.share_C)

    def _moments(self, categories: tuple[str, ...], experts: tuple[str, ...]) -> tuple[np.ndarray, ...]:
        """Count, sum and sum of squares at the places of larger lists of names."""
        found = np.zeros((3, len(categories), len(experts)))
        at = np.ix_(
            [categories.index(name) for name in self.categories], [experts.index(name) for name in self.experts]
        )
        mean = np.nan_to_num(self.quality_CE)
        values = (
            self.count_CE,
            self.count_CE * mean,
            np.maximum(self.count_CE - 1, 0) * self.variance_CE + self.count_CE * mean**2,
        )
        for place, value in zip(found, values, strict=True):
            place[at] = value
        return tuple(found)

    def with_row(self, category: str, share: float) -> Self:
        """A further category in which every expert is worth its mean; the others' shares shrink to make room."""
        return replace(
            self,
            categories=(*self.categories, category),
            quality_CE=np.vstack([self.quality_CE, self.mean_E]),
            count_CE=np.vstack([self.count_CE, self.count_CE.sum(0)]),
            variance_CE=np.vstack([self.variance_CE, self.variance_CE.mean(0)]),
            share_C=np.append(self.share_C * (1 - share), share),
        )

    def only(self, experts: Sequence[str]) -> Self:
        """These experts, in this order. Raises InputError for one that is not there."""
        at = [self.column(name) for name in experts]
        return replace(
            self,
            experts=tuple(experts),
            quality_CE=self.quality_CE[:, at],
            count_CE=self.count_CE[:, at],
            variance_CE=self.variance_CE[:, at],
            mean_E=self.mean_E[at],
        )

    def gain(self, category: str, expert: str, incumbent: str, confidence: float = 0.9) -> tuple[float, float]:
        """Interval of how much better ``expert`` is than ``incumbent``, from means and spreads of independent observations.

        A cell's spread is its own with `PRIOR` observations of the table's, so that three lucky answers are no certainty. Infinite
        without observations of both.
        """
        row, columns = self.row(category), [self.column(expert), self.column(incumbent)]
        count, quality = self.count_CE[row, columns], self.quality_CE[row, columns]
        if not (count > 0).all():
            return -np.inf, np.inf
        degrees_CE = np.maximum(self.count_CE - 1, 0)
        pooled = (degrees_CE * self.variance_CE).sum() / max(degrees_CE.sum(), 1.0)
        variance = ((count - 1) * self.variance_CE[row, columns] + PRIOR * pooled) / (count - 1 + PRIOR)
        half = NormalDist().inv_cdf(0.5 + confidence / 2) * float(np.sqrt((variance / count).sum()))
        return float(quality[0] - quality[1]) - half, float(quality[0] - quality[1]) + half

    def steady(self, incumbents: Mapping[str, str], drawn: Self, confidence: float = 0.9, margin: float = 1e-6) -> Self:
        """``drawn`` (this table, shrunk), with every expert whose gain over the incumbent may be luck put just below the incumbent.

        A map made of it changes only for gains whose interval lies above 0, and where a budget or a price of parameters asks for it.

        Args:
            incumbents: expert of each category now.
            drawn: qualities to choose by.
            confidence: of the intervals.
            margin: how far below.
        """
        quality_CE = drawn.quality_CE.copy()
        for category, incumbent in incumbents.items():
            if category not in self.categories or incumbent not in self.experts:
                continue
            row, at = self.row(category), self.column(incumbent)
            for column, expert in enumerate(self.experts):
                if column != at and self.gain(category, expert, incumbent, confidence)[0] <= 0:
                    quality_CE[row, column] = np.minimum(quality_CE[row, column], quality_CE[row, at] - margin)
        return replace(drawn, quality_CE=quality_CE)


def table_of_scores(
    category: Sequence[str],
    score_NE: np.ndarray,
    experts: Sequence[str],
    *,
    categories: Sequence[str] | None = None,
    share: Mapping[str, float] | None = None,
) -> QualityTable:
    """Mean score of each expert in each category.

    Args:
        category: of each row.
        score_NE: scores; NaN where an expert was not asked.
        experts: names of columns.
        categories: rows of the table, which may have no data; those seen, sorted, if left out.
        share: how often each category is asked; as often as seen if left out.

    Raises InputError for a category that is not among ``categories``.
    """
    names = tuple(sorted(set(category)) if categories is None else categories)
    row_N = np.array([_at(name, names, "category") for name in category], np.int64)
    score_NE = np.asarray(score_NE, np.float64)
    if score_NE.shape != (len(row_N), len(experts)):
        raise InputError(
            f"score_NE has shape {list(score_NE.shape)}; it must be [{len(row_N)}, {len(experts)}] (rows, experts)"
        )
    known_NE, value_NE = ~np.isnan(score_NE), np.nan_to_num(score_NE)
    moments = np.zeros((3, len(names), len(experts)))
    for moment, part_NE in zip(moments, (known_NE.astype(np.float64), value_NE, value_NE**2), strict=True):
        np.add.at(moment, row_N, part_NE)
    share_C = np.bincount(row_N, minlength=len(names)) if share is None else [share.get(name, 0.0) for name in names]
    count_CE, sum_CE, square_CE = moments
    return _of_moments(names, tuple(experts), count_CE, sum_CE, square_CE, np.asarray(share_C, np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One verdict of a judge on two answers to one question.

    Attributes:
        question: which; both orders of a pair share it.
        category: of the question.
        expert: whose answer is judged.
        won: whether the expert's answer beat the reference's; "tie" if neither did.
        expert_first: the judge saw the expert's answer first.
    """

    question: str
    category: str
    expert: str
    won: Literal["yes", "no", "tie"]
    expert_first: bool


def table_of_judgements(
    judgements: Iterable[Judgement], *, share: Mapping[str, float] | None = None, one_order: bool = False
) -> QualityTable:
    """Win rates against a reference answer, by what each pair comes to in both orders (`both_orders`).

    Args:
        judgements: of a judge.
        share: how often each category is asked; as often as judged if left out.
        one_order: count pairs that were judged in one order only, which are left out by default.

    Raises InputError if the same pair was judged twice in one order, or nothing is left.
    """
    worth = {"yes": WIN, "no": LOSS, "tie": TIE}
    pairs: dict[tuple[str, str, str], dict[bool, float]] = {}
    for item in judgements:
        orders = pairs.setdefault((item.question, item.category, item.expert), {})
        if item.expert_first in orders:
            raise InputError(
                f"question {item.question!r} and expert {item.expert!r} are judged twice in the same order"
            )
        orders[item.expert_first] = worth[item.won]
    worths = {pair: of_both_orders(orders.get(True), orders.get(False)) for pair, orders in pairs.items()}
    if one_order:
        # Of a pair with one order that is all there is.
        worths |= {pair: next(iter(pairs[pair].values())) for pair, score in worths.items() if score is None}
    seen = {pair: score for pair, score in worths.items() if score is not None}
    if not seen:
        raise InputError(
            "no pair was judged in both orders; judge each with the answers swapped, or pass one_order=True"
        )
    return table_of_feedback([(category, expert, score) for (_, category, expert), score in seen.items()], share=share)


def table_of_feedback(
    rows: Iterable[tuple[str, str, float]], *, share: Mapping[str, float] | None = None
) -> QualityTable:
    """From (category, expert, score) of single answers. Shares of categories are counted over answers.

    Raises InputError if there is none, or a score is not finite.
    """
    rows = list(rows)
    if not rows:
        raise InputError("no feedback to make a table of")
    experts = sorted({expert for _, expert, _ in rows})
    score_NE = np.full((len(rows), len(experts)), np.nan)
    for at, (category, expert, score) in enumerate(rows):
        if not np.isfinite(score):
            raise InputError(f"the score of {expert!r} in {category!r} (row {at}) is {score}; it must be finite")
        score_NE[at, experts.index(expert)] = score
    return table_of_scores([category for category, _, _ in rows], score_NE, experts, share=share)


def confusion_aware(
    router: CategoryRouter, score_NE: np.ndarray, experts: Sequence[str], *, folds: int = 5, seed: int = 0
) -> QualityTable:
    """Mean scores by the category that the classifier, fitted without the row's fold, takes each of its examples for.

    Args:
        router: fitted; its examples are the rows.
        score_NE: scores of the experts on them.
        experts: names of columns.
        folds: of the cross-fitting.
        seed: of the folds.
    """
    class_N = router.cross_predict(folds=folds, seed=seed).argmax(1)
    names = [router.categories[at] for at in class_N]
    return table_of_scores(names, score_NE, experts, categories=router.categories)


def shares(value_C: np.ndarray, categories: Sequence[str]) -> np.ndarray:
    """Weights as shares that sum to 1. Raises InputError for what is negative, unknown, or all 0."""
    share_C = np.asarray(value_C, np.float64)
    wrong = ~np.isfinite(share_C) | (share_C < 0)
    if share_C.shape != (len(categories),) or wrong.any():
        where = f"; {categories[int(np.argmax(wrong))]!r} has {share_C[wrong][0]}" if wrong.any() else ""
        raise InputError(f"each of the {len(categories)} categories needs a finite weight of at least 0{where}")
    if not share_C.sum() > 0:
        raise InputError("all weights of categories are 0; at least one must be asked")
    total = float(share_C.sum())
    # What was read back stays as it was, to the bit.
    return share_C if abs(total - 1) < 1e-12 else share_C / total


def _of_moments(
    categories: tuple[str, ...],
    experts: tuple[str, ...],
    count_CE: np.ndarray,
    sum_CE: np.ndarray,
    square_CE: np.ndarray,
    share_C: np.ndarray,
) -> QualityTable:
    quality_CE = np.divide(sum_CE, count_CE, out=np.full(count_CE.shape, np.nan), where=count_CE > 0)
    spread_CE = np.maximum(square_CE - count_CE * np.nan_to_num(quality_CE) ** 2, 0.0)
    return QualityTable(
        categories=categories,
        experts=experts,
        quality_CE=quality_CE,
        count_CE=count_CE,
        share_C=share_C,
        variance_CE=np.divide(spread_CE, count_CE - 1, out=np.zeros(count_CE.shape), where=count_CE > 1),
        mean_E=_means(quality_CE, count_CE),
    )


def _means(quality_CE: np.ndarray, count_CE: np.ndarray) -> np.ndarray:
    count_E = count_CE.sum(0)
    total_E = (count_CE * np.nan_to_num(quality_CE)).sum(0)
    return np.divide(total_E, count_E, out=np.full(count_E.shape, np.nan), where=count_E > 0)


def _at(name: str, names: Sequence[str], what: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        raise InputError(f"no {what} {name!r} in the quality table; it has {', '.join(map(str, names))}") from None
