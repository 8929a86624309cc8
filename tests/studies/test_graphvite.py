import json

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.studies import find, names
from anabranch.studies.graphvite import MACRO, MICRO, Size, Trial, arms, draw, judge, make
from anabranch.studies.harness import Results, run_study
from claims import run_only

judge = run_only(judge)


def runs(**metrics):
    """Metrics per seed of one arm, given as lists by seed."""
    count = len(next(iter(metrics.values())))
    return {seed: {name: values[seed] for name, values in metrics.items()} for seed in range(count)}


def verdict(results, text):
    (found,) = [claim for claim in judge(results) if text in claim.claim]
    return found.verdict


@pytest.mark.parametrize(
    ("micro", "expected"),
    [
        ([MICRO - 0.009, MICRO + 0.1], "holds"),
        ([MICRO - 0.011, MICRO + 0.1], "not resolved"),
        ([MICRO - 0.011, MICRO - 0.02], "does not hold"),
        ([MICRO], "not resolved"),
    ],
)
def test_f1_is_held_against_deepwalk_in_every_seed(micro, expected):
    results = Results({"deepwalk": runs(micro_f1=micro, macro_f1=[MACRO] * len(micro))})
    assert verdict(results, "micro F1 within a point of DeepWalk") == expected
    assert len(judge(results)) == 2  # what did not run is not judged


@pytest.mark.parametrize(
    ("far", "expected"),
    [
        ([0.33, 0.331, 0.329], "holds"),  # gains .03, .031, .029: half width .0025
        ([0.31, 0.311, 0.309], "does not hold"),  # .01 with the same width
        ([0.33, 0.34, 0.301], "not resolved"),
    ],
)
def test_augmentation_must_gain_two_points(far, expected):
    results = Results({"near": runs(micro_f1=[0.3] * 3), "far": runs(micro_f1=far)})
    assert verdict(results, "augmentation adds 0.02") == expected


def test_the_shuffle_must_gain():
    results = Results(
        {"line-in-order": runs(micro_f1=[0.3, 0.31]), "line-shuffled": runs(micro_f1=[0.29, 0.301])}
    )  # -.01, -.009: half width .0064
    assert verdict(results, "pseudo shuffle helps") == "does not hold"


def test_partitions_are_held_against_one_part():
    results = Results(
        {
            "parts-1": runs(micro_f1=[0.3, 0.3]),
            "parts-4": runs(micro_f1=[0.291, 0.3]),
            "parts-16": runs(micro_f1=[0.3, 0.289]),
        }
    )
    assert verdict(results, "of a quarter") == "holds"
    assert verdict(results, "of a sixteenth") == "not resolved"


@pytest.mark.parametrize(
    ("same", "share", "expected"), [([1, 1], [0.5, 1.0], "holds"), ([0, 0], [1.1, 1.2], "does not hold")]
)
def test_bits_and_memory(same, share, expected):
    results = Results({"workers": runs(same_bits=same), "memory": runs(same_bits=same, peak_share=share)})
    assert {claim.verdict for claim in judge(results)} == {expected}
    assert len(judge(results)) == 3


def test_links_and_speed():
    results = Results({"link": runs(auc=[0.9, 0.89]), "deepwalk": runs(samples_per_cpu_second=[2e6, 1e6])})
    assert verdict(results, "hidden edges") == "holds"
    assert verdict(results, "1.5 million") == "not resolved"


def test_arms_differ_in_what_they_are_named_after():
    made = {name: to_dict(arm.config) for name, arm in arms(Size()).items()}

    def differ(one, other):
        return {name for name in made[one] if made[one][name] != made[other][name]}

    assert differ("parts-1", "parts-16") == {"partitions"}
    assert differ("near", "far") == {"augmentation"}
    assert differ("line-in-order", "line-shuffled") == {"shuffle"}
    assert differ("deepwalk", "ppi") == {"dataset"}


def test_sizes_and_configs():
    smoke, full = make(), make(full=True)
    assert (smoke.seeds, full.seeds) == ((0, 1), (0, 1, 2, 3, 4))
    assert full.settings["long"] == 500
    for arm in full.arms:
        assert from_dict(Trial, json.loads(json.dumps(to_dict(arm.config)))) == arm.config
    assert "graphvite" in names()
    assert find("graphvite") is make


def test_runs_end_to_end(tmp_path):
    study = make(
        long=2,
        middle=2,
        short=1,
        sparse=2,
        dim=8,
        hidden=0.1,
        dense_graph="karate",
        other_graph="karate",
        sparse_graph="karate",
    )
    outcome = run_study(study, tmp_path, seeds=[0])
    assert {claim.verdict for claim in outcome.claims} == {"not resolved"}  # one seed
    found = outcome.results.runs
    assert found["workers"][0]["same_bits"] == 1
    assert found["memory"][0]["same_bits"] == 1
    assert 0 < found["memory"][0]["peak_share"] <= 1
    assert 0 <= found["link"][0]["auc"] <= 1
    assert found["deepwalk"][0]["samples_per_cpu_second"] > 0
    assert (tmp_path / "graphvite.png").read_bytes().startswith(b"\x89PNG")


def test_picture_is_drawn_of_what_has_run(tmp_path):
    draw(Results({"link": runs(auc=[0.9])}), tmp_path / "picture", graphs={"link": "karate"})
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
