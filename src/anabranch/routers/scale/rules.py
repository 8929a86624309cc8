"""Which of the steps that are left are answered by System 2: a threshold, a fraction of the steps, or as many as a budget has room for.

    threshold       d_i > tau                                                                       (paper, eq. 4)
    top_fraction    the f n steps of largest d_i, of equals the earlier ones
    budgeted        max sum_i x_i log(p2_i / p1_i)   s.t.   sum_i x_i c_i <= budget,   c_i = E[tok2_i] - E[tok1_i]

The chain succeeds where every step does, with prod_i p_{m_i}; the logarithm makes the product a sum, so that the last is a knapsack
(`knapsack`). Rules are asked anew before every step, with what is left: where scores are made online, what came of the steps before counts.
"""
# Shapes: N steps that are left

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.routers.scale.knapsack import exact, greedy

# Least chance of success that is reckoned with: the logarithm of 0 has no sum.
LEAST_CHANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Score:
    """How hard a step is.

    Attributes:
        difficulty: d, from 0 to 1.
        p1, p2: chance of success in each system.
        is_fallback: nothing was measured: the step counts as hard.
        knows2: p2 was learned of System 2's answers, and not assumed.
    """

    difficulty: float
    p1: float
    p2: float
    is_fallback: bool = False
    knows2: bool = False

    @property
    def gain(self) -> float:
        """log(p2 / p1)."""
        return math.log(max(self.p2, LEAST_CHANCE) / max(self.p1, LEAST_CHANCE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What is to be decided on.

    Attributes:
        scores: of the steps that are left, in order; the first is the next.
        costs: what System 2 costs more than System 1 for each, in tokens or dollars as the rule wants it.
        is_forced: the last of them is System 2's in any case.
        num_steps: in all, those done among them.
        num_hard: of those done, System 2's.
        spent: of the rule's budget so far.
    """

    scores: Sequence[Score]
    costs: Sequence[float]
    is_forced: bool
    num_steps: int
    num_hard: int = 0
    spent: float = 0.0

    @property
    def num_open(self) -> int:
        """Steps that the rule decides on: all but a forced one."""
        return len(self.scores) - self.is_forced


class Rule(Part, family="mode_rule"):
    """Interface: what is left in, System 2 or not out.

    Attributes:
        needs_all: it wants the scores of all steps that are left, not of the next alone.
        unit: what its budget is in; None where it has none.
    """

    @configclass
    class Config(BaseConfig):
        """Nothing in common."""

    needs_all: ClassVar[bool] = False
    unit: Literal["tokens", "usd"] | None = None

    def __init__(self, config: Any) -> None:
        self.config = config

    def choose(self, left: Left) -> list[bool]:
        """System 2 for each of the steps that are left; of a forced one it says True."""
        return self._choose(left) + [True] * left.is_forced

    def _choose(self, left: Left) -> list[bool]:
        """For the steps that are not forced."""
        raise NotImplementedError


class Threshold(Rule, kind="threshold"):
    """System 2 for what is harder than tau."""

    @configclass
    class Config(Rule.Config):
        """The paper's rule.

        Attributes:
            tau: difficulty above which a step is hard; below 0 all are, at 1 none is.
        """

        tau: float = Field(default=0.5, ge=-1, le=1)  # the reference code's

    def _choose(self, left: Left) -> list[bool]:
        return [one.difficulty > self.config.tau for one in left.scores[: left.num_open]]


class TopFraction(Rule, kind="top_fraction"):
    """System 2 for a share of the steps: the hardest."""

    needs_all = True

    @configclass
    class Config(Rule.Config):
        """The share.

        Attributes:
            fraction: of all steps, a forced one among them, to the next whole number of steps, halves up.
        """

        fraction: float = Field(default=0.5, ge=0, le=1)

    def _choose(self, left: Left) -> list[bool]:
        quota = math.floor(self.config.fraction * left.num_steps + 0.5) - left.num_hard - left.is_forced
        open_scores = left.scores[: left.num_open]
        order = sorted(range(len(open_scores)), key=lambda at: (-open_scores[at].difficulty, at))
        chosen = set(order[: max(0, quota)])
        return [at in chosen for at in range(len(open_scores))]


class Budgeted(Rule, kind="budgeted"):
    """System 2 where it gains most for what it costs more."""

    needs_all = True

    @configclass
    class Config(Rule.Config):
        """The budget.

        Attributes:
            budget: that System 2 may cost more than System 1, for all steps of a problem together.
            unit: ``tokens`` of completion, or ``usd``.
            solver: ``greedy`` by gain per cost, or ``exact``, to a token or a hundred-thousandth of the budget.
        """

        budget: float = Field(default=8192.0, ge=0)
        unit: Literal["tokens", "usd"] = "tokens"
        solver: Literal["greedy", "exact"] = "greedy"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.unit = config.unit

    def _choose(self, left: Left) -> list[bool]:
        room = self.config.budget - left.spent - (max(0.0, left.costs[-1]) if left.is_forced else 0.0)
        gains = [one.gain for one in left.scores[: left.num_open]]
        costs = list(left.costs[: left.num_open])
        if room < 0:
            return [False] * len(gains)
        if self.config.solver == "greedy":
            return [bool(one) for one in greedy(gains, costs, room)]
        # The table counts single tokens, or where there are very many, and of dollars, so much of the budget that it stays small.
        part = max(self.config.budget, 1e-12) / 100_000
        unit = max(1.0, part) if self.unit == "tokens" else part
        return [bool(one) for one in exact(gains, costs, room, unit=unit)]
