"""What every verdict has to stand up to: repetitions, the test its interval stands for, and Holm's rule over the study."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.studies import corrected
from anabranch.studies.asked import holm
from anabranch.studies.asked import p_value as p_of_values
from anabranch.studies.harness import Arm, Claim, Results, Study
from anabranch.studies.paired import estimate, verdict_below

SCORES = st.floats(-1, 1).map(lambda value: round(value, 3))


def claim_of(values, verdict="holds", *, limit=None, baseline=1.0, **others):
    """A claim whose differences over seeds are ``values``; ``limit`` is that of the difference."""
    found = estimate(values)
    held = (
        None
        if limit is None
        else tuple(baseline + end for end in limit)
        if isinstance(limit, tuple)
        else baseline + limit
    )
    return Claim(
        "a",
        "-",
        baseline,
        baseline + found.mean,
        found.mean,
        found.interval,
        verdict,
        limit=held,
        count=len(values),
        **others,
    )


def verdicts(claims, repetitions=5):
    return [claim.verdict for claim in corrected.settled(claims, repetitions)]


def test_p_by_hand():
    # Mean 1, deviation sqrt(2 / 3), n = 4: t = 1 / (0.8165 / 2) = 2.4495, of which P(|T| > t) is 0.0917 with three degrees of freedom.
    two_sided = p_of_values([0.0, 1.0, 1.0, 2.0])
    assert two_sided == pytest.approx(0.0917, abs=1e-4)
    assert corrected.p_value(claim_of([0.0, 1.0, 1.0, 2.0]), 4) == pytest.approx(two_sided, rel=1e-9)
    # One of two one-sided tests: no difference would do.
    lenient = claim_of([0.0, 1.0, 1.0, 2.0], limit=-0.5)
    shifted = p_of_values([0.5, 1.5, 1.5, 2.5])
    assert corrected.p_value(lenient, 4) == pytest.approx(shifted / 2, rel=1e-9)
    # Better by a margin is two-sided, and so is as good as that is said not to hold.
    strict = claim_of([0.0, 1.0, 1.0, 2.0], limit=0.5)
    assert corrected.p_value(strict, 4) == pytest.approx(p_of_values([-0.5, 0.5, 0.5, 1.5]), rel=1e-9)
    worse = claim_of([-1.0, -2.0, -1.0, -2.0], "does not hold", limit=-0.5)
    assert corrected.p_value(worse, 4) == pytest.approx(p_of_values([-0.5, -1.5, -0.5, -1.5]), rel=1e-9)
    # Within so much is both one-sided tests, of which the weaker counts.
    both = claim_of([0.0, 0.1, 0.0, 0.1], limit=(-0.5, 0.3))
    assert corrected.p_value(both, 4) == pytest.approx(p_of_values([-0.3, -0.2, -0.3, -0.2]) / 2, rel=1e-9)
    outside = claim_of([0.6, 0.7, 0.6, 0.7], "does not hold", limit=(-0.5, 0.3))
    assert corrected.p_value(outside, 4) == pytest.approx(p_of_values([0.3, 0.4, 0.3, 0.4]), rel=1e-9)


def test_against_a_limit_alone_the_difference_is_from_it():
    found = estimate([0.9, 1.0, 1.1, 1.2, 0.95])
    alone = Claim.against(0.8, "a", "-", found.mean, "holds", found.interval, count=5)
    assert corrected.p_value(alone, 5) == pytest.approx(p_of_values([0.1, 0.2, 0.3, 0.4, 0.15]), rel=1e-9)
    other = Claim("a", "-", 1.5, 1.0, 0.5, [0.3, 0.7], "holds", margin="limit - ours", limit=1.2, count=5)
    assert corrected.p_value(other, 5) < 0.01


def test_what_has_no_interval_or_no_numbers_has_no_p():
    assert corrected.p_value(Claim.not_run("a", "-"), 5) is None
    assert corrected.p_value(Claim.against(1.0, "a", "-", 2.0, "holds"), 5) is None
    assert corrected.p_value(claim_of([1.0, 1.0, 1.0]), 1) is None
    assert corrected.p_value(claim_of([1.0] * 5), 5) == 0.0
    assert corrected.p_value(claim_of([0.0] * 5), 5) == 1.0


def test_a_margin_that_only_the_mean_keeps_is_not_resolved():
    """The rule of Composition of Experts goes by the mean of ten splits."""
    kept, noisy = [-0.001, 0.0, 0.001, 0.0, -0.001], [-0.02, 0.03, -0.01, 0.02, -0.015]
    assert estimate(noisy).mean > -0.005
    assert verdicts([claim_of(kept, limit=-0.005)]) == ["holds"]
    assert verdicts([claim_of(noisy, limit=-0.005)]) == ["not resolved"]


def test_five_at_least_and_what_is_exact_needs_none():
    clear = [1.0, 1.1, 0.9, 1.05]
    assert verdicts([claim_of(clear)]) == ["not resolved"]
    assert verdicts([claim_of([*clear, 1.0])]) == ["holds"]
    assert verdicts([Claim.against(1.0, "a", "-", 2.0, "holds", exact=True)], 1) == ["holds"]
    by_each_run = Claim.against(1.0, "a", "-", 0.5, "holds")
    assert (verdicts([by_each_run], 4), verdicts([by_each_run], 5)) == (["not resolved"], ["holds"])


def test_claims_are_corrected_together():
    # 0.03 alone.
    middling = [0.5, 0.1, 0.4, 0.2, 0.05]
    assert verdicts([claim_of(middling)]) == ["holds"]
    assert verdicts([claim_of(middling)] * 2) == ["not resolved"] * 2
    # A claim that shows nothing is asked as well.
    nothing = claim_of([0.1, -0.1, 0.0, 0.05, -0.05], "not resolved")
    assert verdicts([claim_of(middling), nothing]) == ["not resolved"] * 2
    clear = claim_of([1.0, 1.1, 0.9, 1.0, 1.05])
    assert verdicts([clear, claim_of(middling)]) == ["holds", "holds"]
    # What was not run, has too few, or is exact was not asked.
    few = claim_of([1.0, 1.1, 0.9])
    exact = claim_of([0.0, 1.0, 0.0, 1.0, 0.0], exact=True)
    assert verdicts([claim_of(middling), Claim.not_run("b", "-"), few, exact]) == [
        "holds",
        "not run",
        "not resolved",
        "holds",
    ]


@given(st.lists(st.lists(SCORES, min_size=5, max_size=8), min_size=1, max_size=6))
def test_it_is_the_rule_that_newer_studies_have_and_makes_nothing_of_nothing(lists):
    wanted = holm(dict(enumerate(lists)))
    claims = [claim_of(values, wanted[number]) for number, values in enumerate(lists)]
    # Judged by it already, nothing changes; judged by each interval, it is the same.
    assert verdicts(claims) == list(wanted.values())
    alone = [claim_of(values, verdict_below(estimate([-value for value in values]))) for values in lists]
    assert verdicts(alone) == list(wanted.values())


def test_the_harness_asks_for_it():
    def judge(results):
        return [
            results.claim(
                "x", ours=arm, baseline="plain", claim=arm, paper="-", verdict=lambda found: verdict_below(found)
            )
            for arm in ("a", "b")
        ]

    study = Study(name="s", title="", settings={}, arms=[Arm("a", "", {})], run=lambda *_: {}, judge=judge)
    values = {"plain": [0.0] * 5, "a": [-0.5, -0.1, -0.4, -0.2, -0.05], "b": [0.1, -0.1, 0.0, 0.05, -0.05]}
    results = Results({arm: {seed: {"x": value} for seed, value in enumerate(of)} for arm, of in values.items()})
    assert [claim.verdict for claim in study.judge(results)] == ["holds", "not resolved"]
    assert [claim.verdict for claim in study.judged(results)] == ["not resolved", "not resolved"]
