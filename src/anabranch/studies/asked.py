"""Claims that are asked before a study is run, each a difference of two arms beyond a margin, and judged together by Holm's rule."""

import math
from collections.abc import Mapping, Sequence

from anabranch.studies.harness import Claim, Results
from anabranch.studies.paired import SEEDS_NEEDED, Verdict, estimate, t_probability

LEVEL = 0.05

# Metric and arm, metric and arm it is compared with, the margin, the claim in words, and what the paper has.
Asked = tuple[str, str, str, str, float, str, str]


def judged(results: Results, asked: Sequence[Asked]) -> list[Claim]:
    """A claim for each that was asked: whether the first is greater than the second by more than the margin, over the seeds of both."""
    found = [_differences(results, one) for one in asked]
    verdicts = holm({number: values for number, values in enumerate(found) if values})
    return [_claim(results, one, verdicts.get(number, "not run")) for number, one in enumerate(asked)]


def _differences(results: Results, asked: Asked) -> list[float]:
    ours, arm, theirs, other, margin, *_ = asked
    left, right = results.values(arm, ours), results.values(other, theirs)
    return [left[seed] - right[seed] - margin for seed in sorted(left.keys() & right.keys())]


def _claim(results: Results, asked: Asked, verdict: Verdict) -> Claim:
    ours, arm, theirs, other, margin, claim, paper = asked
    left, right = results.values(arm, ours), results.values(other, theirs)
    common = sorted(left.keys() & right.keys())
    if not common:
        return Claim.not_run(claim, paper)
    difference = estimate([left[seed] - right[seed] for seed in common])
    baseline, mean = (sum(values[seed] for seed in common) / len(common) for values in (right, left))
    limit = baseline + margin if margin else None
    return Claim(
        claim, paper, baseline, mean, difference.mean, difference.interval, verdict, limit=limit, count=len(common)
    )


def holm(differences: Mapping[int, list[float]]) -> dict[int, Verdict]:
    """A verdict for each list of paired differences: two-sided t-tests against 0, corrected by Holm's rule over all of them."""
    enough = {name: values for name, values in differences.items() if len(values) >= SEEDS_NEEDED}
    found: dict[int, Verdict] = dict.fromkeys(differences, "not resolved")
    in_order = sorted(enough, key=lambda name: p_value(enough[name]))
    for place, name in enumerate(in_order):
        if p_value(enough[name]) > LEVEL / (len(in_order) - place):
            break
        found[name] = "holds" if sum(enough[name]) > 0 else "does not hold"
    return found


def p_value(values: list[float]) -> float:
    """Of a two-sided t-test that their mean is 0."""
    count, mean = len(values), math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    if error == 0:
        return 0.0 if mean else 1.0
    return 2 * (1 - t_probability(abs(mean) / error, count - 1))
