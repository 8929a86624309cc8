"""What a study needs to tell anything: seeds enough, by the spread of the pairs that have run, and rates on both sides of the best one.

    for row in planned(outcome.claims, repetitions=3, effect=0.01):
        print(row.claim, row.deviation, row.needed)

The test is the one that `anabranch.studies.corrected` asks for: two-sided, paired, by Student's t. A deviation of a few pairs is known
roughly only: of three pairs the true one may be six times what was seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anabranch.errors import ConfigError
from anabranch.studies.corrected import LEVEL
from anabranch.studies.paired import SEEDS_NEEDED, t_quantile

if TYPE_CHECKING:
    from anabranch.studies.harness import Claim, Results

# A difference of the size that is asked about is found in so many of such studies.
POWER = 0.8
# Beyond this it is another study that is needed, not more seeds.
MOST = 10_000


@dataclass(frozen=True)
class Planned:
    """What one claim needs.

    Attributes:
        claim: in words.
        count: pairs that its interval rests on.
        deviation: of their differences, in the metric's unit.
        smallest: the smallest effect that so many pairs would find, with probability `POWER`.
        needed: pairs that find an effect of the size asked about; None for more than `MOST`.
    """

    claim: str
    count: int
    deviation: float
    smallest: float
    needed: int | None


def planned(claims: Sequence["Claim"], *, repetitions: int, effect: float) -> list[Planned]:
    """A row for each claim that has an interval; ``repetitions`` of claims that do not say their own.

    Raises ConfigError if the effect is not above 0.
    """
    if not effect > 0:
        raise ConfigError(f"the effect is {effect}; it must be above 0, in the unit of the difference")
    rows = []
    for claim in claims:
        count = repetitions if claim.count is None else claim.count
        if claim.interval is None or claim.exact or count < 2:
            continue
        half = (claim.interval[1] - claim.interval[0]) / 2
        deviation = half * math.sqrt(count) / t_quantile(0.975, count - 1)
        rows.append(
            Planned(claim.claim, count, deviation, smallest_effect(deviation, count), pairs_for(deviation, effect))
        )
    return rows


def smallest_effect(deviation: float, count: int, level: float = LEVEL) -> float:
    """The effect that ``count`` pairs of this deviation find with probability `POWER`, at a two-sided level."""
    reach = t_quantile(1 - level / 2, count - 1) + t_quantile(POWER, count - 1)
    return reach * deviation / math.sqrt(count)


def pairs_for(deviation: float, effect: float, level: float = LEVEL) -> int | None:
    """The fewest pairs, `SEEDS_NEEDED` at least, that find ``effect``; None for more than `MOST`."""
    low, high = SEEDS_NEEDED, MOST
    if smallest_effect(deviation, high, level) > effect:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if smallest_effect(deviation, middle, level) <= effect else (middle + 1, high)
    return low


@dataclass(frozen=True)
class Bracket:
    """Arms that differ in their learning rate alone, in its order; ``metric`` is better where it is lower."""

    metric: str
    arms: tuple[str, ...]

    def told(self, results: "Results") -> str | None:
        """That the best rate is an end of those that were tried, so that a better one may lie beyond; None where it is not."""
        by_arm = {arm: values for arm in self.arms if (values := results.values(arm, self.metric))}
        common = set.intersection(*map(set, by_arm.values())) if len(by_arm) > 1 else set()
        if not common:
            return None
        best = min(by_arm, key=lambda arm: sum(by_arm[arm][seed] for seed in common))
        tried = list(by_arm)
        if best not in (tried[0], tried[-1]):
            return None
        return f"of the learning rates of {', '.join(tried)} that of {best} is the best, an end of the grid: a better one may lie beyond"
