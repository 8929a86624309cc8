"""The study of FTP: what its arms share, that all of them run at the small size, and its rule."""

import pytest

from anabranch.errors import ConfigError
from anabranch.studies.ftp import ARMS, OUTSIDE, ArmConfig, Bench, Size, judge, make, run
from anabranch.studies.harness import Results

TINY = make().arms[0].config.size


def test_arms_of_a_seed_share_rows_and_what_was_searched():
    bench, again = Bench(TINY, 1, lambda text: None), Bench(TINY, 1, lambda text: None)
    assert bench.judged == again.judged != Bench(TINY, 2, lambda text: None).judged
    assert not set(bench.judged) & {*bench.calibration, *bench.learned}
    searched = bench.skipper("static_searched")
    dynamic, tuned, hidden = (bench.skipper(name) for name in ("dynamic_searched", "dynamic_tuned", "hidden"))
    assert searched.schedule == dynamic.schedule == hidden.schedule
    assert tuned.router.state_dict()["first.bias"].equal(dynamic.router.state_dict()["first.bias"])
    assert (dynamic.router.num_parameters, hidden.router.config.inputs) == (450, "hidden")
    for name in ("random", "static", "static_searched", "dynamic_tuned"):
        assert bench.skipper(name).sparsity == pytest.approx(0.3, abs=1e-9)


def test_every_arm_runs_and_shortgpt_has_the_work():
    found = {name: run(ArmConfig(arm=name, size=TINY), 0, lambda text: None) for name in make().default_arms}
    assert set(ARMS) - set(found) == set(OUTSIDE) == {"llmlingua", "kvpress"}
    assert found["dense"]["gap"] == found["dense"]["saved"] == 0
    assert found["shortgpt"]["saved"] <= found["dynamic_tuned"]["saved"] + 1e-9
    # One of 22 tokens is 0.045, and blocks pass over whole ones.
    assert found["static"]["skipped"] == pytest.approx(0.3, abs=0.05)
    for metrics in found.values():
        assert metrics["half_closeness"] == metrics["closeness"] / 2 == -metrics["gap"] / 2
        assert 0 <= metrics["agreement"] <= 1


@pytest.mark.parametrize("arm", OUTSIDE)
def test_outside_arms_read_text(arm):
    with pytest.raises(ConfigError, match=f"the arm {arm} reads text, and the made model's rows are none"):
        run(ArmConfig(arm=arm, size=TINY), 0, lambda text: None)


def test_the_frozen_size():
    size = Size()
    assert (size.sparsity, size.calibration, size.judged) == (0.3, 40, 100)
    genetic = size.schedule.genetic
    assert genetic.population + genetic.generations * (genetic.population - genetic.elitism) <= 500
    assert make(full=True).seeds == (0, 1, 2, 3, 4)


def test_the_rule():
    def runs(gaps, agreement=0.9):
        return {
            seed: {"closeness": -gap, "half_closeness": -gap / 2, "agreement": agreement}
            for seed, gap in enumerate(gaps)
        }

    found = {
        claim.claim: claim.verdict
        for claim in judge(
            Results(
                {
                    "dynamic_tuned": runs([0.10, 0.11, 0.09, 0.10, 0.12]),
                    "shortgpt": runs([0.50, 0.52, 0.47, 0.51, 0.49]),
                    "static": runs([0.10, 0.11, 0.12, 0.10, 0.11]),
                    "random": runs([0.15, 0.16, 0.15, 0.14, 0.16]),
                    "static_searched": runs([0.10, 0.11, 0.12, 0.10]),
                }
            )
        )
    }
    assert found["PRIMARY: FTP's gap is at most half of ShortGPT's at as much work"] == "holds"
    assert found["the static router's gap is at most half of random tokens', uniform schedule"] == "does not hold"
    assert found["the searched schedule costs at most 0.01 more than the uniform one"] == "not resolved"
    assert found["four factors are better than hidden states"] == "not run"
