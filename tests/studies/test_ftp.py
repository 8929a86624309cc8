"""The study of FTP: that its arms run at the small size, its frozen size, and its rule."""

import pytest

from anabranch.studies.ftp import AGREE, ARMS, OUTSIDE, ArmConfig, inputs, judge, make, run
from anabranch.studies.ftp_bench import Size
from anabranch.studies.harness import Results

TINY = make().arms[0].config.size


def test_every_arm_runs_and_shortgpt_has_the_work():
    assert set(ARMS) - set(make().default_arms) == set(OUTSIDE) == {"llmlingua", "kvpress"}
    names = [name for name in make().default_arms if name not in (*AGREE, "anywhere")]
    found = {name: run(ArmConfig(arm=name, size=TINY), 0, lambda text: None) for name in names}
    assert found["dense"]["gap"] == found["dense"]["saved"] == 0
    assert found["shortgpt"]["saved"] <= found["dynamic_tuned"]["saved"] + 1e-9
    # One of 22 tokens is 0.045, and blocks pass over whole ones.
    assert found["static"]["skipped"] == pytest.approx(0.3, abs=0.05)
    for metrics in found.values():
        assert metrics["half_closeness"] == metrics["closeness"] / 2 == -metrics["gap"] / 2
        assert 0 <= metrics["agreement"] <= 1


def test_what_contexts_read_is_named():
    full = make(full=True)
    read = {arm.name for arm in full.arms if inputs(arm.config) is not None}
    assert read == set(AGREE)
    assert all(inputs(arm.config) is None for arm in make().arms)


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

    def agree(shares, shortgpt):
        return {
            seed: {"agreement": share, "agreement_shortgpt": shortgpt, "zero": 0.0} for seed, share in enumerate(shares)
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
                    "agree_22": agree([0.93, 0.92, 0.94, 0.93, 0.92], 0.8),
                    "agree_40": agree([0.70, 0.71, 0.72, 0.70, 0.71], 0.8),
                    "anywhere": {
                        seed: {"closeness": -gap, "closeness_truncation": -0.3, "closeness_static": -gap}
                        for seed, gap in enumerate([0.10, 0.11, 0.12, 0.10, 0.11])
                    },
                }
            )
        )
    }
    assert found["PRIMARY: FTP's gap is at most half of ShortGPT's at as much work"] == "holds"
    assert found["the static router's gap is at most half of random tokens', uniform schedule"] == "does not hold"
    assert found["the searched schedule costs at most 0.01 more than the uniform one"] == "not resolved"
    assert found["four factors are better than hidden states"] == "not run"
    at = "contexts: at S = {} the next token is the dense one more often than ShortGPT's at as much work"
    assert found["contexts: at S = 0.22 the next token is the dense one in at least 90%"] == "holds"
    assert [found[at.format(s)] for s in ("0.22", "0.30", "0.40")] == ["holds", "not run", "does not hold"]
    anywhere = "facts anywhere: FTP is better {}"
    assert found[anywhere.format("than cutting the prompt where that loses a needed sentence")] == "holds"
    assert found[anywhere.format("there than the static router, uniform schedule")] == "not resolved"
