"""How a verdict is come by.

Selection is corrected for, not hidden: everything is judged on the same questions, on none of which the best single model was chosen or a
strategy was fitted, and every figure that is told holds for all that were compared at once, so that it may be told of the winner. (A bandit
goes on learning while it is played, from the answers that it chose, as it would where it is served; the others learn nothing there.)

- **Better.** Each strategy at its own setting against the best single model, paired by question. p-values of gains are corrected by Holm,
  and those of losses too, each at half of ``alpha``; intervals are at level ``alpha`` divided by the number of strategies (Bonferroni),
  and end at 0 where Holm's correction, which is the sharper one, tells on which side the difference lies.
- **Cost at equal quality.** A setting is as good if its quality is at most ``margin`` (2% of the range of scores) below that of the
  best single model, by a one-sided bound. The settings of one knob are gone through from dear to cheap, an order that no outcome of the
  test has a say in, up to the first that is not (a fixed sequence needs no correction); ``alpha`` is divided by the number of such
  sequences. Of those that are left, the one that saves most is told, if its saving is above 0 with an interval for all settings compared.

All p-values and bounds are those of `bounds`, which allow for what so many questions may never have shown: a difference of ``reach``, or an
answer that costs `DEAREST` times what the best single model's answers cost on average (or as much as the dearest seen, if that is more).
"""
# Shapes: N questions, or as many parts as `bounds` holds

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from anabranch.routers.referee.bounds import Binned, below, in_parts
from anabranch.routers.referee.compare import holm
from anabranch.routers.referee.verdict import ALPHA, BETTER, OPEN, WORSE, Choice, EqualQuality, Gain, Kind, Verdict

# Of the mean cost of the best single model.
DEAREST = 20.0

# Of being told, with which sample sizes are reckoned.
POWER = 0.8


@dataclass(frozen=True, kw_only=True, eq=False)
class Contender:
    """A strategy at one setting, or another single model, against the best single model.

    Attributes:
        kind, name: what it is.
        setting: of its knob; None for its own.
        gain_N: quality - that of the best single model.
        cost_N2: its cost and that of the best single model; None where costs are not known.
        doubt: by how much the mean gain may be off either way whatever the number of questions. cost_doubt: likewise the difference of
            the mean costs.
        dearest: dollars that a question may cost at most.
    """

    kind: Kind
    name: str
    setting: float | None = None
    gain_N: np.ndarray
    cost_N2: np.ndarray | None = None
    doubt: float = 0.0
    cost_doubt: float = 0.0
    dearest: float = 0.0

    @property
    def gain(self) -> float:
        """Mean difference of quality."""
        return float(self.gain_N.mean())

    @property
    def saving(self) -> float | None:
        """Share of the best single model's cost that it saves; None where costs are not known."""
        return None if self.cost_N2 is None else 1 - float(self.cost_N2[:, 0].mean() / self.cost_N2[:, 1].mean())

    def lower(self, level: float, reach: float) -> float:
        """What its true gain is below with probability ``level`` at most."""
        return Binned.of(self.gain_N).lower(level, -reach) - self.doubt

    def upper(self, level: float, reach: float) -> float:
        """What its true gain is above with probability ``level`` at most."""
        return self.doubt - Binned.of(-self.gain_N).lower(level, -reach)

    def p_gain(self, reach: float, point: float = 0.0) -> float:
        """One-sided p-value of a true gain of ``point`` or less."""
        return Binned.of(self.gain_N).p(point + self.doubt, -reach)

    def p_loss(self, reach: float) -> float:
        """One-sided p-value of a true gain of 0 or more."""
        return Binned.of(-self.gain_N).p(self.doubt, -reach)

    def p_saving(self, saving: float = 0.0) -> float:
        """One-sided p-value of a true saving of ``saving`` or less; 1 where costs are not known."""
        if self.cost_N2 is None:
            return 1.0
        left_N = (1 - saving) * self.cost_N2[:, 1] - self.cost_N2[:, 0]
        return Binned.of(left_N).p(self.cost_doubt, -self.dearest)

    def saved(self, level: float) -> list[float]:
        """Two-sided interval of its saving."""
        assert self.cost_N2 is not None
        assert self.saving is not None
        cost_N2, saving = self.cost_N2, self.saving
        whole = float(cost_N2[:, 1].mean())
        rest_N = (cost_N2[:, 0] - (1 - saving) * cost_N2[:, 1]) / whole
        half = -NormalDist().inv_cdf(level / 2) * float(rest_N.std()) / math.sqrt(len(rest_N))

        def p_more(less: float) -> float:
            # Of a true saving of -less or more, with less from -1.
            over_N = cost_N2[:, 0] - (1 + less) * cost_N2[:, 1]
            return Binned.of(over_N).p(self.cost_doubt, -max(0.0, 1 + less) * self.dearest)

        # However much is left open, a question cannot be dearer than the dearest.
        lowest = min(saving, 1 - (self.dearest + self.cost_doubt) / whole) - 1
        low = below(self.p_saving, level / 2, lowest, saving, saving - half)
        high = -below(p_more, level / 2, -1.0, -saving, -saving - half) if saving < 1 else 1.0
        return [low, high]


def compared(
    kind: Kind,
    name: str,
    quality_N: np.ndarray,
    cost_N: np.ndarray | None,
    best_quality_N: np.ndarray,
    best_cost_N: np.ndarray | None,
    setting: float | None = None,
    *,
    doubt: float = 0.0,
    cost_doubt: float = 0.0,
    weight: float = 1.0,
) -> Contender:
    """A contender from outcomes of each question, its own and those of the best single model; costs None where they are not known.

    ``weight`` is the most that a question counts, where not all count 1. For the rest see `Contender`.
    """
    cost_N2, dearest = None, 0.0
    if cost_N is not None and best_cost_N is not None and best_cost_N.mean() > 0:
        cost_N2 = np.column_stack([cost_N, best_cost_N])
        dearest = max(DEAREST * weight * float(best_cost_N.mean()), float(cost_N2.max()))
        cost_N2 = in_parts(cost_N2)
    return Contender(
        kind=kind,
        name=name,
        setting=setting,
        gain_N=in_parts(quality_N - best_quality_N),
        cost_N2=cost_N2,
        doubt=doubt,
        cost_doubt=cost_doubt,
        dearest=dearest,
    )


def decide(
    strategies: Sequence[Contender],
    sequences: Sequence[Sequence[Contender]],
    best_single: str,
    *,
    questions: int,
    reach: float,
    chosen_on: str,
    margin: float,
    alpha: float = ALPHA,
    unfit: Mapping[str, str] | None = None,
    most: float | None = None,
    score_range: tuple[float, float] = (0.0, 1.0),
) -> Verdict:
    """The verdict.

    Args:
        strategies: each at its own setting.
        sequences: what may cost less at equal quality, each from dear to cheap: the settings of a knob, one model.
        best_single: its name.
        questions: N.
        reach: the largest difference that one question can make.
        chosen_on: see `Verdict`.
        margin: quality that counts as equal, in units of the score.
        alpha: error of all gains together, and of all costs together.
        unfit: see `Verdict`.
        most: largest true gain that there can be; None for ``reach``.
        score_range: see `Verdict`.
    """
    gains = _gains(strategies, reach, alpha, reach if most is None else most)
    equal = _equal(sequences, reach, margin, alpha)
    needed, effect = None, 0.0
    if gains and gains[0].found == OPEN:
        closest = next(one for one in strategies if one.name == gains[0].name)
        effect = max(closest.gain, margin)
        needed = _needed(closest, effect, len(strategies), questions, reach, alpha)
    return Verdict(
        best_single=best_single,
        chosen_on=chosen_on,
        questions=questions,
        gains=gains,
        equal_quality=equal,
        has_costs=_has_costs(sequences),
        margin=margin,
        alpha=alpha,
        unfit=dict(unfit or {}),
        score_range=score_range,
        needed=needed,
        effect=effect,
        recommended=_choice(gains, equal, sequences, best_single, questions, chosen_on),
    )


def _choice(
    gains: Sequence[Gain],
    equal: EqualQuality | None,
    sequences: Sequence[Sequence[Contender]],
    best_single: str,
    questions: int,
    chosen_on: str,
) -> Choice:
    best = next((one for one in gains if one.found == BETTER), None)
    if best is not None:
        return Choice(kind="strategy", name=best.name, reason=f"it is better than {best_single} ({best.gain:+.4f})")
    if equal is not None:
        reason = f"it costs {equal.saving:.0%} less than {best_single} at equal quality"
        return Choice(kind=equal.kind, name=equal.name, setting=equal.setting, reason=reason)
    where = "what was learned from" if chosen_on == "train" else f"these {questions:,} questions"
    nothing = "nothing is shown to be better" + (" or cheaper at equal quality" if _has_costs(sequences) else "")
    # What looks worse and is recommended all the same wants a word.
    models = [one for sequence in sequences for one in sequence if one.kind == "model" and one.gain > 0]
    ahead = max(models, key=lambda one: one.gain, default=None)
    but = "" if ahead is None else f" (here {ahead.name} did better by {ahead.gain:.4f}, which may be chance)"
    return Choice(kind="model", name=best_single, reason=f"it did best on {where}{but}, and {nothing}")


def _gains(strategies: Sequence[Contender], reach: float, alpha: float, most: float) -> list[Gain]:
    """Largest first."""
    gain_p, loss_p = [one.p_gain(reach) for one in strategies], [one.p_loss(reach) for one in strategies]
    gain_holm, loss_holm = holm(gain_p), holm(loss_p)
    level, found = alpha / (2 * max(1, len(strategies))), []
    for at, one in enumerate(strategies):
        low, high = max(-most, one.lower(level, reach)), min(most, one.upper(level, reach))
        p_holm, what = min(1.0, 2 * min(gain_holm[at], loss_holm[at])), OPEN
        if p_holm < alpha:
            what = BETTER if gain_holm[at] < loss_holm[at] else WORSE
            low, high = (max(low, 0.0), high) if what == BETTER else (low, min(high, 0.0))
        found.append(
            Gain(
                name=one.name,
                gain=one.gain,
                interval=[low, high],
                p=min(1.0, 2 * min(gain_p[at], loss_p[at])),
                p_holm=p_holm,
                found=what,
                saving=one.saving,
            )
        )
    return sorted(found, key=lambda one: (-one.gain, -(one.saving or 0.0)))


def _needed(one: Contender, effect: float, count: int, questions: int, reach: float, alpha: float) -> int | None:
    """Questions, to two digits, after which a gain of ``effect`` is told with `POWER`: by what they scatter, and by what none may show."""
    if effect <= one.doubt or len(one.gain_N) < 2:
        return None
    level, normal = alpha / (2 * count), NormalDist()
    times = (normal.inv_cdf(POWER) - normal.inv_cdf(level)) / (effect - one.doubt)
    scatter = times**2 * float(one.gain_N.var(ddof=1)) / len(one.gain_N) * questions
    unseen = -math.log(level) * (reach + effect) / (effect - one.doubt)
    exact = max(scatter, unseen)
    digits = 10 ** max(0, math.floor(math.log10(exact)) - 1)
    return math.ceil(exact / digits) * digits


def _has_costs(sequences: Sequence[Sequence[Contender]]) -> bool:
    return any(one.saving is not None for sequence in sequences for one in sequence)


def _equal(sequences: Sequence[Sequence[Contender]], reach: float, margin: float, alpha: float) -> EqualQuality | None:
    """The largest saving among the settings that are shown to be as good."""
    each = alpha / max(1, sum(map(len, sequences)))
    level = alpha / max(1, len(sequences))
    found: list[Contender] = []
    for sequence in sequences:
        for one in sequence:
            if one.p_gain(reach, -margin) > level:
                break
            if one.p_saving() < each / 2:
                found.append(one)
    best = max(found, key=lambda one: (one.saving, one.gain), default=None)
    if best is None or best.saving is None:
        return None
    return EqualQuality(
        kind=best.kind,
        name=best.name,
        setting=best.setting,
        saving=best.saving,
        interval=best.saved(each),
        gain=best.gain,
        at_least=best.lower(level, reach),
    )
