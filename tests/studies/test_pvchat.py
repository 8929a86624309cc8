"""The study of PVChat: what its arms are, its rule, and that it runs."""

import math

import pytest

from anabranch.studies.harness import Results
from anabranch.studies.provenance import readers
from anabranch.studies.pvchat import ARMS, WAYS, ArmConfig, Drawings, Size, judge, make, run
from drawn_subjects import write_drawings, write_runs


def test_arms_differ_in_one_thing():
    found = {name: ArmConfig(arm=name) for name in ARMS if name not in WAYS}
    assert {ArmConfig(arm=name).heads().routing for name in WAYS} == {"none", "topk", "relu"}
    assert {name: each.heads().routing for name, each in found.items() if not name.startswith("dead")} == {
        "none": "none",
        "moh": "topk",
        "remoh": "relu",
        "positives": "relu",
        "easy": "relu",
        "hard": "relu",
        "videos": "relu",
    }
    counts = {}
    for name, each in found.items():
        data = each.data(0)
        counts[name] = (data.positives, data.augmented, data.hard_negatives, data.easy_negatives)
    assert counts["positives"] == (80, 0, 0, 0)
    assert counts["easy"] == (40, 0, 0, 40)
    assert counts["hard"] == (40, 0, 20, 20)
    assert {counts[name] for name in ("none", "moh", "remoh", "videos")} == {(20, 20, 20, 20)}
    steps = {name: (each.learning(0).image_steps, each.learning(0).video_steps) for name, each in found.items()}
    assert {sum(both) for both in steps.values()} == {120}
    assert (steps["remoh"], steps["videos"]) == ((40, 80), (0, 120))
    controls = {
        name: (each.control().pressure, each.control().floor) for name, each in found.items() if name.startswith("dead")
    }
    assert controls == {
        "dead-none": ("none", "none"),
        "dead-spr": ("smooth", "none"),
        "dead-released": ("smooth", "released"),
        "dead-ours": ("smooth", "soft"),
    }


def test_the_rule():
    def runs(**values):
        return {seed: {"zero": 0.0, **{name: each[seed] for name, each in values.items()}} for seed in range(5)}

    lower = [0.70, 0.72, 0.69, 0.71, 0.70]
    higher = [value + 0.05 + 0.002 * seed for seed, value in enumerate(lower)]
    found = {
        claim.claim: claim.verdict
        for claim in judge(
            Results(
                {
                    "remoh": runs(balanced=higher),
                    "none": runs(balanced=lower),
                    "moh": runs(balanced=higher[::-1]),
                    "positives": runs(yes_share=[0.99, 0.98, 0.97, 0.99, 1.0], chance=[0.04, 0.03, 0.05, 0.04, 0.045]),
                    "dead-ours": runs(off_target=[0.05, 0.09, 0.02, 0.01, 0.0], activation=[0.5] * 5),
                    "dead-released": runs(off_target=[0.5] * 5, activation=[0.0] * 5),
                    "dead-spr": runs(off_target=[0.5, 0.5, 0.5, 0.5, 0.05], activation=[0.0] * 5),
                }
            )
        )
    }
    assert found["PRIMARY: ReMoH knows more subjects than plain heads"] == "holds"
    assert found["ReMoH is at most half a point behind MoH"] == "not resolved"
    assert found["with positives only more than 90% of the answers are yes"] == "holds"
    assert found["with positives only existence is within 5 points of chance"] == "holds"
    assert found["accuracy rises with look-alikes (within a point)"] == "not run"
    end = "from a dead start the share of heads that are on ends"
    assert found[f"{end} within 0.1 of its target with our HAE"] == "holds"
    assert found[f"{end} further off with HAE as released"] == "holds"
    assert found[f"{end} further off with SPR alone"] == "not resolved"
    assert found["HAE as released ends as SPR alone does, in every seed"] == "holds"


def test_dead_heads_come_to_life_by_our_gradient_alone():
    size = Size(dead_steps=150)
    found = {
        name: run(ArmConfig(arm=name, size=size), 0, lambda text: None) for name in ARMS if name.startswith("dead")
    }
    assert found["dead-none"]["activation"] == 0
    assert found["dead-released"] == found["dead-spr"]
    assert found["dead-released"]["activation"] == 0
    assert found["dead-ours"]["off_target"] <= 0.1


def test_an_arm_runs(tmp_path):
    folder = write_drawings(tmp_path / "d", subjects=4)
    drawings = Drawings(place=str(folder), known=("one",), new=("two",))
    study = make(drawings=drawings, steps=2, clips=8, image_steps=1, video_steps=1, dim=16)
    assert study.seeds == (0, 1)
    arm = next(arm for arm in study.arms if arm.name == "positives")
    found = study.run(arm.config, 0, lambda text: None)
    assert {"balanced", "yes_share", "existence", "appearance", "action", "location", "activation"} <= found.keys()
    assert all(math.isfinite(value) for value in found.values())
    before = drawings.content_digest()
    (folder / "two" / "a" / "0.png").unlink()
    assert drawings.content_digest() != before


def test_the_arms_of_the_twenty_way_task(tmp_path):
    drawings = Drawings(place=str(write_drawings(tmp_path / "d", subjects=4)), known=("one",), new=("two",))
    quick = make().arms[-1].config.runs
    runs = quick.replace(place=str(write_runs(tmp_path / "runs", runs=2)), names=("run01", "run02"))
    study = make(runs=runs, drawings=drawings, steps=2, clips=8, dim=16)
    assert not set(study.default_arms) & set(WAYS)
    read = {arm.name: len(readers(arm.config)) for arm in study.arms}
    assert {name: count for name, count in read.items() if count == 2}.keys() == set(WAYS)
    for arm in study.arms:
        if arm.name in WAYS:
            found = study.run(arm.config, 0, lambda text: None)
            assert found["ways_chance"] == pytest.approx(1 / 3)
            assert 0 <= found["ways"] <= 1
            assert found["ways_by_ink"] == 1
    before = runs.content_digest()
    (tmp_path / "runs/run02/class_labels.txt").write_text("")
    assert runs.content_digest() != before


def test_both_sizes_are_made():
    assert make().seeds == (0, 1)
    assert make(full=True).seeds == (0, 1, 2, 3, 4)
    assert [arm.name for arm in make(full=True).arms] == list(ARMS)
    assert Size().subjects == 10
    assert make(steps=3).settings["steps"] == 3
    assert Drawings().known == ("Greek", "Korean", "Latin")
    with pytest.raises(ValueError, match="subjects is 0"):
        Size(subjects=0)
