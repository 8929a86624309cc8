"""What to do after an evaluation: who is better than the best single model, who costs less at equal quality, and which to serve.

Selection is corrected for, not hidden: everything is judged on the same questions, none of which the strategies or the choice of the best
single model learned from, and every figure that is told holds for all that were compared at once, so that it may be told of the winner.

- **Better.** Each strategy at its own setting against the best single model, paired by question. It is better where its p-value is below
  ``alpha`` after Holm's correction and its interval, at level ``alpha`` divided by the number of strategies (Bonferroni), lies above 0.
- **Cost at equal quality.** A setting is as good if its quality is at most ``margin`` (2% of the range of scores) below that of the
  best single model, by a one-sided bound. The settings of one knob are gone through from dear to cheap, an order that no outcome of the
  test has a say in, up to the first that is not (a fixed sequence needs no correction); ``alpha`` is divided by the number of such
  sequences. Of those that are left, the one that saves most is told, if its saving is above 0 with an interval for all settings compared.

A bound is the normal one of a paired mean, or, where it is wider, what a difference in the share of questions that n of them may never
show (1 - level^(1/n)) could change at worst: five questions that all agree settle nothing.
"""
# Shapes: N questions

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any, Literal, Self

import numpy as np

ALPHA, MARGIN = 0.05, 0.02
Kind = Literal["strategy", "model"]
BETTER, WORSE, OPEN = "better", "worse", "not resolved"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A strategy at one setting, or another single model, against the best single model; means over questions.

    Attributes:
        kind, name: what it is.
        setting: of its knob; None for its own.
        gain, gain_se: quality - that of the best single model, and its standard error.
        saving, saving_se: share of the best single model's cost that it saves; None where costs are not known.
    """

    kind: Kind
    name: str
    setting: float | None = None
    gain: float
    gain_se: float
    saving: float | None = None
    saving_se: float | None = None


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What a strategy is worth beside the best single model.

    Attributes:
        name: of the strategy.
        gain: mean difference of quality, with an ``interval`` for all strategies together.
        p_holm: two-sided, corrected for all strategies.
        found: ``better``, ``worse`` or ``not resolved``.
        saving: share of the best single model's cost; None where costs are not known.
    """

    name: str
    gain: float
    interval: list[float]
    p_holm: float
    found: str
    saving: float | None = None


@dataclass(frozen=True, kw_only=True)
class EqualQuality:
    """The most that can be saved at a quality that is shown to be no more than the margin below the best single model's.

    Attributes:
        kind, name, setting: see `Contender`.
        saving: share of the best single model's cost, with an ``interval`` for all settings together.
        gain: mean difference of quality, and ``at_least``, its one-sided bound.
    """

    kind: Kind
    name: str
    setting: float | None
    saving: float
    interval: list[float]
    gain: float
    at_least: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to serve.

    Attributes:
        kind: ``strategy`` or ``model``.
        name: of it.
        setting: of the strategy's knob; None for its own.
        reason: a sentence.
    """

    kind: Kind
    name: str
    setting: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an evaluation comes to.

    Attributes:
        best_single: the best single model, and on what it was chosen: ``train`` or ``test`` (which favours it).
        questions: judged on.
        gains: of each strategy, largest first.
        equal_quality: None where nothing is shown to be as good and cheaper.
        has_costs: costs are known.
        margin: quality that counts as equal, in units of the score. alpha: of all that is claimed.
        recommended: None where nothing can be told.
        unfit: strategies that were not compared, and why.
        note: why there is nothing to tell; "" where there is.
        next: the command to type next; set by who knows where things lie.
    """

    best_single: str
    chosen_on: str
    questions: int
    gains: list[Gain]
    equal_quality: EqualQuality | None
    has_costs: bool
    margin: float
    alpha: float
    recommended: Choice | None
    unfit: dict[str, str]
    note: str = ""
    next: str = ""

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, with the sentences."""
        return {**asdict(self), "resolved": self.is_resolved, "sentences": self.sentences()}

    @property
    def is_resolved(self) -> bool:
        """Something is shown to be better than the best single model, or as good and cheaper."""
        return self.equal_quality is not None or any(one.found == BETTER for one in self.gains)

    def sentences(self) -> list[str]:
        """Who is better, what equal quality costs, and what is recommended; a sentence each."""
        found = [self.note or self._of_gain()]
        if self.has_costs:
            found.append(self._of_cost())
        found += [f"{name} was not compared: {why}." for name, why in self.unfit.items()]
        chosen = self.recommended
        found.append(
            "No recommendation." if chosen is None else f"Recommended: {shown(chosen)}, since {chosen.reason}."
        )
        return found

    def _of_gain(self) -> str:
        best = f"{self.best_single}, the best single model"
        if self.chosen_on == "test":
            best += " (chosen on the same questions, which favours it)"
        if not self.gains:
            return f"No strategy could be compared with {best}."
        better = [one for one in self.gains if one.found == BETTER]
        if better:
            more = (
                f"; so {'is' if len(better) == 2 else 'are'} {', '.join(one.name for one in better[1:])}"
                if better[1:]
                else ""
            )
            return f"{better[0].name} is better than {best}: {self._figures(better[0])}{more}."
        closest = self.gains[0]
        what = (
            "every strategy is worse"
            if all(one.found == WORSE for one in self.gains)
            else f"not resolved on {self.questions:,} questions"
        )
        return f"No strategy is shown to be better than {best}: {what}. Closest is {closest.name}, {self._figures(closest)}."

    def _figures(self, one: Gain) -> str:
        together = f" for all {len(self.gains)} together" if len(self.gains) > 1 else ""
        low, high = one.interval
        cost = "" if one.saving is None else f", at {abs(one.saving):.0%} {'less' if one.saving >= 0 else 'more'} cost"
        return f"{one.gain:+.4f} ({low:+.4f} to {high:+.4f}, {1 - self.alpha:.0%}{together}; p {one.p_holm:.2g} after Holm){cost}"

    def _of_cost(self) -> str:
        equal = self.equal_quality
        if equal is None:
            nothing = f"nothing cheaper is shown to be at most {self.margin:.3g} below {self.best_single}"
            return f"Cost at equal quality is not resolved: {nothing}."
        low, high = equal.interval
        return (
            f"Cost at equal quality: {shown(equal)} saves {equal.saving:.0%} ({low:.0%} to {high:.0%}) of what {self.best_single} costs, "
            f"with a difference in quality of {equal.gain:+.4f}, at least {equal.at_least:+.4f} (down to {-self.margin:+.3g} is equal)."
        )


def shown(one: Choice | EqualQuality) -> str:
    """A choice in words."""
    if one.kind == "model":
        return f"always {one.name}"
    return one.name if one.setting is None else f"{one.name} with its knob at {one.setting:.4g}"


def compared(
    kind: Kind, name: str, quality_N: np.ndarray, cost_N: np.ndarray | None, best_quality_N: np.ndarray, best_cost_N: np.ndarray | None,
    setting: float | None = None,
) -> Contender:  # fmt: skip
    """A contender from outcomes of each question, its own and those of the best single model; costs None where they are not known."""
    gain, gain_se = _mean(quality_N - best_quality_N)
    saving = saving_se = None
    if cost_N is not None and best_cost_N is not None and best_cost_N.mean() > 0:
        whole = float(best_cost_N.mean())
        saving = 1 - float(cost_N.mean()) / whole
        # Of a ratio, to the first order.
        saving_se = _mean((cost_N - (1 - saving) * best_cost_N) / whole)[1]
    return Contender(
        kind=kind, name=name, setting=setting, gain=gain, gain_se=gain_se, saving=saving, saving_se=saving_se
    )


def decide(
    strategies: Sequence[Contender], sequences: Sequence[Sequence[Contender]], best_single: str, p_holm: Mapping[str, float], *,
    questions: int, reach: float, chosen_on: str, margin: float, alpha: float = ALPHA, unfit: Mapping[str, str] | None = None,
) -> Verdict:  # fmt: skip
    """The verdict.

    Args:
        strategies: each at its own setting.
        sequences: what may cost less at equal quality, each from dear to cheap: the settings of a knob, one model.
        best_single: its name.
        p_holm: of each strategy's gain, two-sided and corrected, by its name.
        questions: N.
        reach: the largest difference that one question can make.
        chosen_on: see `Verdict`.
        margin: quality that counts as equal, in units of the score.
        alpha: error of all gains together, and of all costs together.
        unfit: see `Verdict`.
    """
    gains = sorted(
        (_gain(one, p_holm[one.name], len(strategies), questions, reach, alpha) for one in strategies),
        key=lambda one: (-one.gain, -(one.saving or 0.0)),
    )
    equal = _equal(sequences, questions, reach, margin, alpha)
    best = next((one for one in gains if one.found == BETTER), None)
    if best is not None:
        chosen = Choice(kind="strategy", name=best.name, reason=f"it is better than {best_single} ({best.gain:+.4f})")
    elif equal is not None:
        reason = f"it costs {equal.saving:.0%} less than {best_single} at equal quality"
        chosen = Choice(kind=equal.kind, name=equal.name, setting=equal.setting, reason=reason)
    else:
        reason = "nothing is shown to be better" + (" or cheaper at equal quality" if _has_costs(sequences) else "")
        chosen = Choice(kind="model", name=best_single, reason=reason)
    return Verdict(
        best_single=best_single, chosen_on=chosen_on, questions=questions, gains=gains, equal_quality=equal,
        has_costs=_has_costs(sequences), margin=margin, alpha=alpha, recommended=chosen, unfit=dict(unfit or {}),
    )  # fmt: skip


def undecided(note: str, questions: int, margin: float) -> Verdict:
    """A verdict that says only why there is none."""
    return Verdict(
        best_single="", chosen_on="", questions=questions, gains=[], equal_quality=None, has_costs=False, margin=margin, alpha=ALPHA,
        recommended=None, unfit={}, note=note,
    )  # fmt: skip


def reach_of(score_NM: np.ndarray) -> float:
    """The largest difference that a question can make: 1 of scores from 0 to 1, else the range of those seen."""
    low, high = float(np.nanmin(score_NM)), float(np.nanmax(score_NM))
    return 1.0 if low >= 0 and high <= 1 else high - low


def lower(mean: float, se: float, level: float, num: int, reach: float) -> float:
    """A bound that the true mean difference is below with probability ``level``, as the module says; values lie within +- ``reach``."""
    unseen = 1 - level ** (1 / num)
    return mean - max(NormalDist().inv_cdf(1 - level) * se, unseen * (mean + reach))


def _interval(mean: float, se: float, level: float, num: int, reach: float) -> list[float]:
    """Two-sided."""
    return [lower(mean, se, level / 2, num, reach), -lower(-mean, se, level / 2, num, reach)]


def _gain(one: Contender, p_holm: float, count: int, num: int, reach: float, alpha: float) -> Gain:
    low, high = _interval(one.gain, one.gain_se, alpha / count, num, reach)
    found = OPEN
    if p_holm < alpha:
        found = BETTER if low > 0 else WORSE if high < 0 else OPEN
    return Gain(name=one.name, gain=one.gain, interval=[low, high], p_holm=p_holm, found=found, saving=one.saving)


def _has_costs(sequences: Sequence[Sequence[Contender]]) -> bool:
    return any(one.saving is not None for sequence in sequences for one in sequence)


def _equal(
    sequences: Sequence[Sequence[Contender]], num: int, reach: float, margin: float, alpha: float
) -> EqualQuality | None:
    """The largest saving among the settings that are shown to be as good."""
    count = sum(map(len, sequences))
    found: list[EqualQuality] = []
    for sequence in sequences:
        level = alpha / len(sequences)
        for one in sequence:
            at_least = lower(one.gain, one.gain_se, level, num, reach)
            if at_least < -margin:
                break
            if one.saving is None or one.saving_se is None:
                continue
            half = NormalDist().inv_cdf(1 - alpha / (2 * count)) * one.saving_se
            if one.saving - half > 0:
                found.append(
                    EqualQuality(
                        kind=one.kind, name=one.name, setting=one.setting, saving=one.saving, gain=one.gain, at_least=at_least,
                        interval=[one.saving - half, one.saving + half],
                    )
                )  # fmt: skip
    return max(found, key=lambda one: (one.saving, one.gain), default=None)


def _mean(value_N: np.ndarray) -> tuple[float, float]:
    """With its standard error; of a single value that is 0, which the bound for what was never seen makes up for."""
    num = len(value_N)
    return float(value_N.mean()), float(value_N.std(ddof=1) / np.sqrt(num)) if num > 1 else 0.0
