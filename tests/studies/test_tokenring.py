import json

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.studies import find, names
from anabranch.studies.harness import Results, run_study
from anabranch.studies.tokenring import GROUPS, arms, draw, judge, make
from anabranch.studies.tokenring_runs import Crossover, Curve, Exact, LinkBound, PassQ, run
from claims import run_only

judge = run_only(judge)


def seeds(metric, *values):
    return {seed: {metric: value} for seed, value in enumerate(values)}


@pytest.mark.parametrize(
    ("arm", "metric", "good", "bad"),
    [
        ("link-bound", "ratio", 0.65, 0.66),
        ("link-bound", "waited", 1.0, 1.01),
        ("group-8", "behind", 1.1, 1.11),
        ("pass-Q", "ratio", 0.3, 0.31),
        ("train", "off", 1e-5, 1.1e-5),
    ],
)
def test_the_worst_seed_decides_and_five_are_needed(arm, metric, good, bad):
    for values, verdict in (
        ((good,) * 5, "holds"),
        ((good, good, bad, good, good), "does not hold"),
        ((good,) * 4, "not resolved"),
    ):
        (claim,) = judge(Results({arm: seeds(metric, *values)}))
        assert (claim.verdict, claim.ours) == (verdict, max(values))


@pytest.mark.parametrize(
    ("arm", "metric", "limit"), [("pass-Q", "share", 0.05), ("exact", "output", 1e-12), ("exact", "gradient", 1e-11)]
)
def test_what_is_counted_or_exact_needs_no_seeds(arm, metric, limit):
    for value, verdict in ((limit, "holds"), (1.01 * limit, "does not hold")):
        (claim,) = judge(Results({arm: seeds(metric, value)}))
        assert (claim.verdict, claim.exact) == (verdict, True)


def test_sizes_and_configs():
    smoke, full = make(), make(full=True)
    assert (smoke.seeds, full.seeds) == ((0,), (0, 1, 2, 3, 4))
    assert [arm.name for arm in full.arms] == [
        "exact",
        "link-bound",
        *(f"group-{g}" for g in GROUPS),
        "pass-Q",
        "train",
    ]
    for arm in full.arms:
        assert from_dict(type(arm.config), json.loads(json.dumps(to_dict(arm.config)))) == arm.config
    assert "tokenring" in names()
    assert find("tokenring") is make


def test_every_way_is_that_of_one_process():
    found = run(Exact(length=11, groups=(4, 2)), 0, lambda text: None)
    # Four layouts and masks; heads are cut over ranks where four key heads are there.
    assert found["ways"] == 4 * (5 + 4)
    assert found["output"] < 1e-12
    assert found["gradient"] < 1e-11


TIMED = {"world": 2, "length": 64, "heads": 4, "width": 8, "rounds": 1}


def test_what_is_timed_is_told():
    told = []
    found = run(LinkBound(**TIMED), 0, told.append)
    assert found["ratio"] == pytest.approx(found["seconds"]["token_ring"] / found["seconds"]["ring"])
    assert found["link_bytes_per_s"] * 2 * found["block_s"] == pytest.approx(2 * 32 * 4 * 8 * 4)
    assert told[0].startswith("ring, token_ring over links of ")


def test_the_plans_choice_is_held_against_the_quickest():
    found = run(Crossover(group=2, **TIMED), 0, lambda text: None)
    assert set(found["seconds"]) == {"ring", "ring2", "token_ring", "all_gather", "ulysses"}
    assert found["quickest"] == min(found["seconds"], key=found["seconds"].get)
    assert found["behind"] == pytest.approx(found["seconds"][found["choice"]] / found["seconds"][found["quickest"]])
    assert found["behind"] >= 1


@pytest.mark.parametrize(("new", "resident"), [(8, 512), (64, 64)])
def test_new_positions_send_less_than_what_is_resident(new, resident):
    found = run(PassQ(**{**TIMED, "length": new}, resident=resident), 0, lambda text: None)
    # Of both ranks: queries and their results with lse go to the other; of the new keys only those of the first, by the mask.
    ours, ring = new * 4 * (2 * 8 + 1), 2 * (new / 2 + resident) * 4 * 8
    assert found["share"] == pytest.approx(ours / ring)


def test_a_cut_training_is_that_of_one_process():
    found = run(Curve(world=2, steps=3, dim=16, layers=1, heads=2, length=16, batch=2), 0, lambda text: None)
    assert 0 <= found["off"] < 1e-5
    assert found["last"] < found["first"]


@pytest.mark.slow
def test_runs_end_to_end(tmp_path):
    outcome = run_study(make(steps=2), tmp_path / "results")
    assert not outcome.missing
    assert set(outcome.results.runs) == set(arms(False, 2))
    assert (tmp_path / "results" / "tokenring.png").read_bytes().startswith(b"\x89PNG")
    draw(Results({}), tmp_path / "empty")
    assert not (tmp_path / "empty.png").exists()
