"""How many answers to draw for one question, batch by batch, and why it is enough.

    n <- first batch, by the prior;  run it;  one verified? the vote decided? the next one not worth its price? a cap? -> stop
    else at most `batch` more, and no more than the curve says

A batch, and not one sample after another, since an engine that reads the prompt once answers several times for little more time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from anabranch.bounds import finite, shown, whole
from anabranch.errors import InputError
from anabranch.test_time.curves import Curve
from anabranch.test_time.stopping import SURE, is_decided

Reason = Literal["saturated", "budget", "deadline", "agreement", "verified"]
Decides = Literal["prior", "posterior", "both"]


@dataclass(frozen=True, kw_only=True)
class BudgetController:
    """Rules for one kind of question. `begin` for each one.

    Attributes:
        curve: what is known beforehand of the model on such questions.
        value: worth of a right answer.
        cost: price of a sample, in the same money; where samples turn out to cost more, that is what further ones are held against.
            0 only with ``least_gain``.
        least_gain: chance of solving the question from which one more sample is worth drawing, whatever it costs.
        decides: ``prior``: the curve's budget before the first call, and no more looks. ``posterior``: after each batch, by what became
            of it. ``both``: after each batch, and never more than the prior's budget.
        batch: samples at a time.
        least: samples in any case, if no cap forbids them.
        max_n: samples at most.
        max_cost: money at most.
        reserve: the most that one sample may cost: no sample is drawn with which ``max_cost`` could be passed. None for its price.
        deadline_s: seconds at most; a batch is not begun where the longest so far would pass it.
        confidence: of a vote, see `is_decided`.

    Raises InputError.
    """

    curve: Curve
    value: float
    cost: float
    decides: Decides = "both"
    batch: int = 4
    least: int = 1
    max_n: int = 64
    max_cost: float = float("inf")
    reserve: float | None = None
    least_gain: float = 0.0
    deadline_s: float = float("inf")
    confidence: float = SURE

    def __post_init__(self) -> None:
        for name, is_needed in (("value", True), ("cost", not finite("least_gain", self.least_gain, 0.0, 1.0))):
            if finite(name, getattr(self, name), 0.0, 1e300) == 0 and is_needed:
                raise InputError(
                    f"{name} is 0; it must be above 0 (what costs nothing never stops to pay: set least_gain)"
                )
        if self.reserve is not None:
            finite("reserve", self.reserve, 0.0, 1e300)
        if self.decides not in ("prior", "posterior", "both"):
            raise InputError(f"decides is {shown(self.decides)}; it must be prior, posterior or both")
        for name in ("batch", "least", "max_n"):
            whole(name, getattr(self, name), 1)
        for name in ("max_cost", "deadline_s"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0")
        finite("confidence", self.confidence, 0.0, 1.0)

    def begin(self) -> "Allowance":
        """For one question."""
        return Allowance(self)


@dataclass
class Allowance:
    """What one question may still have.

    Attributes:
        rules: whose it is.
        drawn: samples so far.
        spent: money so far.
        elapsed_s: seconds so far.
        reason: why it is over; None while it is not.
        gain: chance that one more sample solves the question, as far as known now.
    """

    rules: BudgetController
    drawn: int = 0
    spent: float = 0.0
    elapsed_s: float = 0.0
    reason: Reason | None = None
    _failures: int = 0
    _is_checked: bool = False
    _votes: dict[str, int] = field(default_factory=dict)
    _longest_s: float = 0.0
    _budget: int | None = None

    @property
    def gain(self) -> float:
        """See the class."""
        curve = self.rules.curve
        if self.reason == "verified":
            return 0.0
        # Without a verifier nobody knows that they failed.
        found = curve.hazard(self._failures) if self._is_checked else curve.gain(self.drawn)
        return float(np.min(found))

    @property
    def votes(self) -> Mapping[str, int]:
        """How often each answer came."""
        return self._votes

    @property
    def budget(self) -> int:
        """Samples that the prior allows."""
        if self._budget is None:
            self._budget = self._payable(0, self.rules.max_n, None)
        return self._budget

    def next(self) -> int:
        """Samples to draw now; 0 if no more, and then ``reason`` says why."""
        rules = self.rules
        if self.reason is not None:
            return 0
        if self.drawn >= rules.max_n:
            return self._end("budget")
        wanted = self._wanted()
        if wanted <= 0:
            return self._end("saturated")
        affordable = min(rules.max_n - self.drawn, self._payable_for())
        if affordable <= 0:
            return self._end("budget")
        if self.elapsed_s + self._longest_s >= rules.deadline_s:
            return self._end("deadline")
        return min(wanted, affordable)

    def told(
        self,
        count: int,
        *,
        verified: Sequence[bool | None] | None = None,
        answers: Sequence[str] = (),
        cost: float | None = None,
        seconds: float = 0.0,
    ) -> None:
        """What became of a batch.

        Args:
            count: samples that came.
            verified: of each, whether it was found right, None of one where nobody can tell; None where nobody can tell of any.
            answers: what they come to, equal where they say the same; for the vote.
            cost: that they took; None for the usual price.
            seconds: that they took.
        """
        count = whole("count", count, 0)
        self.drawn += count
        self.spent += self.rules.cost * count if cost is None else finite("cost", cost, 0.0, 1e300)
        self.elapsed_s += seconds
        self._longest_s = max(self._longest_s, seconds)
        for answer in answers:
            self._votes[answer] = self._votes.get(answer, 0) + 1
        known = [one for one in verified or () if one is not None]
        if verified is not None and (known or not verified):
            self._is_checked = True
            if any(known):
                self.reason = "verified"
                return
            self._failures += len(known)
        is_late = self.rules.decides == "prior"
        if answers and not is_late and self.drawn >= self.rules.least:
            if is_decided(list(self._votes.values()), self.rules.confidence):
                self.reason = "agreement"

    def stop(self, reason: Reason) -> None:
        """It is over, for a reason that whoever draws knows of: no more money, no more time."""
        self.reason = self.reason or reason

    @property
    def _price(self) -> float:
        """Of a sample: as it was thought to be, or as they turned out to be where that is more."""
        return max(self.rules.cost, self.spent / self.drawn if self.drawn else 0.0)

    def _payable_for(self) -> int:
        """Samples that there is money for, each at the most that it may cost."""
        rules = self.rules
        price, room = self._price if rules.reserve is None else rules.reserve, rules.max_cost - self.spent
        if not np.isfinite(room) or price == 0:
            return rules.max_n if room >= 0 else 0
        # Of money that is counted in fractions a part in 10^12 is none.
        return max(0, min(rules.max_n, int(room / price + 1e-12)))

    def _wanted(self) -> int:
        """Samples that pay, of the next batch."""
        rules = self.rules
        must = max(0, rules.least - self.drawn)
        if rules.decides == "prior":
            return max(must, min(rules.batch, self.budget - self.drawn))
        batch = rules.batch
        if rules.decides == "both":
            batch = min(batch, self.budget - self.drawn)
        failures = self._failures if self._is_checked else None
        return max(must, self._payable(self.drawn, max(0, batch), failures))

    def _payable(self, drawn: int, most: int, failures: int | None) -> int:
        """How many of the next ``most`` samples bring more than they cost.

        Args:
            drawn: before them.
            most: looked at.
            failures: samples that are known to have failed; None to go by the curve of all questions.
        """
        if most <= 0:
            return 0
        # One look at all of them: gains fall, so the first that does not pay is the end.
        if failures is None:
            gain = self.rules.curve.gains(drawn, most)
        else:
            gain = self.rules.curve.gains(failures, most, failed=True)
        rules = self.rules
        is_worth = gain * rules.value > max(self._price, rules.least_gain * rules.value)
        return most if is_worth.all() else int(is_worth.argmin())

    def _end(self, reason: Reason) -> int:
        self.reason = reason
        return 0
