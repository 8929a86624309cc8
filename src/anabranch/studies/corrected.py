"""What a verdict has to stand up to beside the rule of its study; the same for all studies, and stricter only.

1. Enough repetitions: see `SEEDS_NEEDED`.
2. Holm's rule at 5% over all claims of the study that rest on an interval. The test of a claim is the one that its interval stands for:
   a t-test that the difference is the one that decides, which is the claim's limit less the baseline, or zero.
   "As good as, less a margin" is one of two one-sided tests (TOST), "within so much" both of them: so their p is one-sided.

What is exact, and what rests on no interval, such as a limit that each run keeps or a test over questions that the study corrects itself,
is as the study's rule has it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from anabranch.studies.paired import SEEDS_NEEDED, t_probability, t_quantile

if TYPE_CHECKING:
    from anabranch.studies.harness import Claim

LEVEL = 0.05
# Of an interval over so many there is no telling the distributions apart, and its tails are the wider ones.
_MOST_DEGREES = 200


def settled(claims: Sequence["Claim"], repetitions: int) -> list["Claim"]:
    """``claims``, not resolved where a verdict does not stand up; ``repetitions`` of claims that do not say their own."""
    counts = [repetitions if claim.count is None else claim.count for claim in claims]
    tested = {
        number: p
        for number, (claim, count) in enumerate(zip(claims, counts, strict=True))
        if not claim.exact and count >= SEEDS_NEEDED and (p := p_value(claim, count)) is not None
    }
    rejected = step_down(tested)
    return [
        replace(claim, verdict="not resolved")
        if claim.verdict in ("holds", "does not hold")
        and not claim.exact
        and (count < SEEDS_NEEDED or (number in tested and number not in rejected))
        else claim
        for number, (claim, count) in enumerate(zip(claims, counts, strict=True))
    ]


def step_down(tested: Mapping[int, float]) -> set[int]:
    """Which of these p-values Holm's rule lets stand, by name: the smallest against 5% over their number, the next over one fewer, ..."""
    found: set[int] = set()
    for place, name in enumerate(sorted(tested, key=lambda name: tested[name])):
        if tested[name] > LEVEL / (len(tested) - place):
            break
        found.add(name)
    return found


def p_value(claim: "Claim", count: int) -> float | None:
    """Of the test that a claim's interval over ``count`` repetitions stands for; None for a claim that has no interval, or has not run."""
    if claim.interval is None or claim.ours is None or count < 2:
        return None
    limit, low, high = claim.limit, claim.interval[0], claim.interval[1]
    # Less the baseline, as the difference is; a margin of another kind decides at zero, as ours less a limit does.
    base = 0.0 if claim.baseline is None else claim.baseline
    if isinstance(limit, tuple | list):
        value = claim.ours if claim.difference is None else claim.difference
        ends = [end - (0.0 if claim.difference is None else base) for end in limit]
        # Of the end that is nearer.
        tail = max(_tail(value, low, high, end, count) for end in ends)
        return tail if ends[0] <= value <= ends[1] else min(1.0, 2 * tail)
    assert claim.difference is not None
    decides = 0.0 if limit is None or claim.baseline is None or claim.margin is not None else limit - base
    tail = _tail(claim.difference, low, high, decides, count)
    return tail if _is_lenient(claim, decides) else min(1.0, 2 * tail)


def _tail(value: float, low: float, high: float, decides: float, count: int) -> float:
    """One-sided p of the hypothesis that the value is ``decides``, by the half of the 95% interval that lies towards it."""
    reach, degrees = value - low if value > decides else high - value, min(count - 1, _MOST_DEGREES)
    if reach <= 0:
        return 0.0 if value != decides else 0.5
    return 1 - t_probability(abs(value - decides) / reach * t_quantile(0.975, degrees), degrees)


def _is_lenient(claim: "Claim", decides: float) -> bool:
    """Whether the claim is said to hold, and no difference at all would do: it is one of being as good, less a margin."""
    assert claim.difference is not None
    return claim.verdict == "holds" and (claim.difference - decides) * (0.0 - decides) > 0
