"""What every study keeps: all its claims stand in its result, whether their arms have run or not."""

import json
from pathlib import Path

import pytest

from anabranch import studies
from anabranch.studies.harness import Results, read_results

RECORDED = Path(__file__).parents[2] / "studies" / "results"
BUILT_IN = sorted(studies.STUDIES)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("full", [True, False])
def test_nothing_that_is_planned_vanishes(name, full):
    planned = studies.find(name)(full=full).judge(Results({}))
    assert planned
    assert {claim.verdict for claim in planned} == {"not run"}
    for claim in planned:
        assert (claim.baseline, claim.ours, claim.difference, claim.interval) == (None,) * 4
    told = [claim.claim for claim in planned]
    assert all(told)
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("name", BUILT_IN)
def test_as_many_claims_are_recorded_as_were_planned(name):
    """Their words may name what was found, such as the baseline that came out best."""
    study = studies.find(name)(full=True)
    recorded = json.loads((RECORDED / f"{name}.json").read_text())["claims"]
    assert len(recorded) == len(study.judge(Results({})))
    judged = study.judge(read_results(study, RECORDED))
    assert [(claim["claim"], claim["verdict"]) for claim in recorded] == [(one.claim, one.verdict) for one in judged]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_claim_is_run_or_not_as_a_whole(name):
    for claim in json.loads((RECORDED / f"{name}.json").read_text())["claims"]:
        has_figures = None not in (claim["baseline"], claim["ours"], claim["difference"])
        assert has_figures == (claim["verdict"] != "not run"), claim["claim"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_difference_is_ours_less_the_baseline_or_says_what_it_is(name):
    for claim in json.loads((RECORDED / f"{name}.json").read_text())["claims"]:
        if claim["verdict"] != "not run" and claim["margin"] is None:
            close = pytest.approx(claim["ours"] - claim["baseline"], rel=1e-3, abs=2e-5 * max(1, abs(claim["ours"])))
            assert claim["difference"] == close, claim["claim"]
