"""The study of GLIDER: its tasks and wordings, its rule, and that its quick form is whole."""

import math

import pytest

from anabranch.adapters.glider import Matcher
from anabranch.studies.adapter_bench import FEW, LEARNED, STEPS
from anabranch.studies.glider import ARMS, WAYS, judge, make, run
from anabranch.studies.glider_bench import pool_pairs, told
from anabranch.studies.harness import Results


def test_no_task_of_the_pool_is_another_turned_round():
    pairs = pool_pairs(12)
    assert len(set(pairs)) == 12
    assert set(pairs) <= set(LEARNED)
    assert not {(second, first) for first, second in pairs} & set(pairs)
    assert not set(pairs) & set(FEW)


@pytest.mark.parametrize("kind", ["bench", "paraphrased"])
def test_no_two_wordings_are_alike(kind):
    texts = [told(kind, pair, wording) for pair in (*LEARNED, *FEW) for wording in range(3)]
    assert len(set(texts)) == len(texts)
    for step in STEPS:
        assert len({told(kind, (step, "sort"), wording) for wording in range(3)}) == 3


@pytest.mark.parametrize(("kind", "right"), [("bench", 10), ("paraphrased", 1)])
def test_the_matcher_finds_as_many_as_the_study_says(kind, right):
    matcher = Matcher()
    for number, pair in enumerate(pool_pairs(12)):
        matcher.add(str(number), [told(kind, pair, 0), told(kind, pair, 1)])
    matcher.fit()
    found = [matcher.retrieve("", instruction=told(kind, pair, 2))[0].name for pair in pool_pairs(12)]
    assert sum(name == str(number) for number, name in enumerate(found)) == right


def runs(values, **others):
    return {
        seed: {"held_in_glider": value, "zero": 0.0, **{key: each[seed] for key, each in others.items()}}
        for seed, value in enumerate(values)
    }


def test_the_rule():
    glider, other = [0.90, 0.92, 0.91, 0.93, 0.90], [0.80, 0.83, 0.80, 0.84, 0.81]
    near = [value - 0.002 * (seed % 2) for seed, value in enumerate(other)]
    bench = runs(
        glider, held_in_phatgoose=other, most_oracle=[0.95] * 5, held_out_glider=near, held_out_phatgoose=other
    )
    found = {claim.claim: claim for claim in judge(Results({"bench": bench}))}
    assert found["PRIMARY: bench: above PHATGOOSE on tasks of the pool"].verdict == "holds"
    assert found["bench: at least 95% of the oracle on tasks of the pool"].verdict == "does not hold"
    lost = found["bench: at most half a point below PHATGOOSE on other tasks"]
    assert (lost.verdict, lost.limit) == ("holds", pytest.approx(sum(other) / 5 - 0.005))
    assert found["SuperNI: 80% of the way from the mean of all to the oracle"].verdict == "not run"


def test_both_sizes_are_made():
    assert make().seeds == (0, 1)
    assert make().default_arms == ("bench", "paraphrased")
    assert make(full=True).seeds == (0, 1, 2, 3, 4)
    assert [arm.name for arm in make(full=True).arms] == list(ARMS)


@pytest.mark.slow
def test_the_quick_form_measures_every_way_and_trains_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    study = make()
    told_to: list[str] = []
    both = {arm: run(study.arms[number].config, 0, told_to.append) for number, arm in enumerate(study.default_arms)}
    assert sum(text.startswith("adapter ") for text in told_to) == 3
    for found in both.values():
        for label in ("held_in", "held_out"):
            for way in ("merged", *WAYS):
                assert 0 <= found[f"{label}_{way}"] <= 1
        assert 0 <= found["found"] <= 1
        assert all(math.isfinite(value) for value in found.values())
    # The same adapters: what does not read instructions is the same.
    for way in ("oracle", "merged", "arrow", "phatgoose"):
        assert both["bench"][f"held_in_{way}"] == both["paraphrased"][f"held_in_{way}"]
    claims = judge(Results({arm: {0: found} for arm, found in both.items()}))
    assert {claim.verdict for claim in claims} == {"not resolved", "not run"}
