"""What to do after an evaluation: who is better than the best single model, who costs less at equal quality, and which to serve.

How it is come by: `judging`.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

ALPHA, MARGIN = 0.05, 0.02
Kind = Literal["strategy", "model"]
BETTER, WORSE, OPEN = "better", "worse", "not resolved"

# Smaller ones are told as that.
_LEAST_P = 1e-12


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What a strategy is worth beside the best single model.

    Attributes:
        name: of the strategy.
        gain: mean difference of quality, with an ``interval`` for all strategies together.
        p: two-sided. p_holm: corrected for all strategies.
        found: ``better``, ``worse`` or ``not resolved``: p_holm is below alpha just where the interval keeps to one side of 0.
        saving: share of the best single model's cost; None where costs are not known.
    """

    name: str
    gain: float
    interval: list[float]
    p: float
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
        needed: questions that would tell a gain of ``effect`` four times in five; None where one is told, or none ever would.
        recommended: None where nothing can be told.
        unfit: strategies that were not compared, and why.
        score_range: the lowest and the highest score there can be, see `range_of`.
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
    needed: int | None = None
    effect: float = 0.0
    score_range: tuple[float, float] = (0.0, 1.0)

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

    @property
    def is_open(self) -> bool:
        """Neither is something shown to be better, or as good and cheaper, nor every strategy to be worse: more answers might tell."""
        return not self.is_resolved and not (self.gains and all(one.found == WORSE for one in self.gains))

    def sentences(self) -> list[str]:
        """Who is better, what equal quality costs, and what is recommended; a sentence each."""
        found = [self.note or self._of_gain()]
        if self.has_costs:
            found.append(self._of_cost())
        found += [f"{name} was not compared: {why}." for name, why in self.unfit.items()]
        low, high = self.score_range
        if (low, high) != (0.0, 1.0):
            found.append(
                f"Scores are taken to lie from {low:g} to {high:g}, as those seen do; qualities within {self.margin:g} count as equal."
            )
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
        more = ""
        # Fewer than there were have ruled such a gain out.
        if self.needed is not None and self.needed > self.questions:
            more = f" About {self.needed:,} questions would tell a gain of {self.effect:.2g}."
        return f"No strategy is shown to be better than {best}: {what}. Closest is {closest.name}, {self._figures(closest)}.{more}"

    def _figures(self, one: Gain) -> str:
        together = f" for all {len(self.gains)} together" if len(self.gains) > 1 else ""
        low, high = one.interval
        cost = "" if one.saving is None else f", at {abs(one.saving):.0%} {'less' if one.saving >= 0 else 'more'} cost"
        p = f"p {one.p_holm:.2g}" if one.p_holm >= _LEAST_P else f"p < {_LEAST_P:g}"
        return f"{one.gain:+.4f} ({low:+.4f} to {high:+.4f}, {1 - self.alpha:.0%}{together}; {p} after Holm){cost}"

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


def undecided(note: str, questions: int, margin: float) -> Verdict:
    """A verdict that says only why there is none."""
    return Verdict(
        best_single="",
        chosen_on="",
        questions=questions,
        gains=[],
        equal_quality=None,
        has_costs=False,
        margin=margin,
        alpha=ALPHA,
        recommended=None,
        unfit={},
        note=note,
    )
