"""How many pairs tell a difference, by the noncentral arithmetic and by drawing."""

import numpy as np
import pytest

from anabranch.errors import ConfigError
from anabranch.studies.asked import p_value
from anabranch.studies.harness import Arm, Claim, Results, Study, run_study
from anabranch.studies.paired import estimate
from anabranch.studies.power import MOST, POWER, Bracket, pairs_for, planned, smallest_effect


def test_by_hand():
    # n = 16: (2.1314 + 0.8662) / 4 deviations.
    assert smallest_effect(1.0, 16) == pytest.approx(0.7494, abs=2e-4)
    assert pairs_for(1.0, 0.75) == 16
    assert pairs_for(1.0, 0.7494 / 2) > 50
    # Five at least, and no number of seeds where it would take too many.
    assert pairs_for(0.001, 1.0) == 5
    assert pairs_for(1.0, 1e-4) is None
    assert pairs_for(1.0, smallest_effect(1.0, MOST)) == MOST


@pytest.mark.parametrize("count", [5, 8, 20])
def test_so_many_pairs_find_it_in_four_of_five_studies(count):
    effect = smallest_effect(0.02, count)
    draws = np.random.default_rng(0).normal(effect, 0.02, (2000, count))
    found = np.mean([p_value(list(map(float, row))) <= 0.05 for row in draws])
    # The approximation by a shifted t is a little off where pairs are few.
    assert found == pytest.approx(POWER, abs=0.04)


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({"a-slow": [2.2], "a": [2.0], "a-fast": [2.1]}, None),
        ({"a-slow": [1.9], "a": [2.0], "a-fast": [2.1]}, "a-slow"),
        ({"a-slow": [2.2], "a": [2.0], "a-fast": [1.8]}, "a-fast"),
        # Over seeds that all have.
        ({"a-slow": [1.9], "a": [1.8, 9.0], "a-fast": [2.1, 1.0]}, None),
        # Nothing lies on the other side of what ran.
        ({"a": [2.0], "a-fast": [2.1]}, "a"),
        ({"a": [2.0]}, None),
        ({}, None),
    ],
)
def test_a_learning_rate_at_an_end_of_the_grid_is_told(values, best):
    results = Results({arm: {seed: {"x": one} for seed, one in enumerate(of)} for arm, of in values.items()})
    told = Bracket("x", ("a-slow", "a", "a-fast")).told(results)
    assert told is None if best is None else f"that of {best} is the best" in told


def test_the_result_of_a_study_tells_it(tmp_path):
    def run(config, seed, progress):
        return {"x": {"slow": 1.0, "plain": 2.0}[config["kind"]]}

    study = Study(
        name="s",
        title="",
        settings={},
        arms=[Arm(name, "", {"kind": name}) for name in ("slow", "plain")],
        run=run,
        judge=lambda results: [],
        seeds=(0,),
        brackets=[Bracket("x", ("slow", "plain"))],
    )
    assert any("that of slow is the best" in note for note in run_study(study, tmp_path).notes)


def test_a_row_for_each_claim_that_has_a_spread():
    values = [0.01, 0.03, 0.02]
    found = estimate(values)
    made = Claim("a", "-", 1.0, 1.0 + found.mean, found.mean, found.interval, "not resolved", count=3)
    alone = Claim("b", "-", 1.0, 1.02, 0.02, None, "not resolved", count=1)
    exact = Claim("c", "-", 1.0, 1.02, 0.02, [0.01, 0.03], "holds", exact=True)
    (row,) = planned([made, alone, exact, Claim.not_run("d", "-")], repetitions=3, effect=0.01)
    assert (row.claim, row.count) == ("a", 3)
    assert row.deviation == pytest.approx(0.01)
    assert row.needed == pairs_for(0.01, 0.01)
    assert row.smallest == pytest.approx(smallest_effect(0.01, 3))
    with pytest.raises(ConfigError, match=r"the effect is 0; it must be above 0"):
        planned([made], repetitions=3, effect=0)
