"""The study of ElasWave: its rule, and each part in small."""

import json
from itertools import pairwise

import pytest

from anabranch.cluster.elastic import Grid, Layout
from anabranch.config import from_dict, to_dict
from anabranch.studies import find, names
from anabranch.studies.elaswave import arms, draw, judge, make
from anabranch.studies.elaswave_runs import Consistent, Lost, Moved, contiguous, events_of, run
from anabranch.studies.harness import Results, run_study
from claims import run_only

judge = run_only(judge)


def one(metric, *values):
    return {seed: {metric: value} for seed, value in enumerate(values)}


@pytest.mark.parametrize(
    ("arm", "metric", "good", "bad"),
    [
        ("lost", "recycle", 1.0, 0.999),
        ("lost", "torchft", 1.0, 0.999),
        ("moved", "whole", 1.0, 1.01),
        ("moved", "links", 1.0, 1.25),
        ("moved", "share", 0.99, 1.0),
        ("paced", "predicted_off", 0.1, 0.11),
        ("paced", "stall", 1.1, 1.11),
    ],
)
def test_the_worst_seed_decides(arm, metric, good, bad):
    for values, verdict in (((good, good), "holds"), ((good, bad), "does not hold"), ((good,), "not resolved")):
        (claim,) = judge(Results({arm: one(metric, *values)}))
        assert claim.verdict == verdict
        assert claim.ours == values[-1]


def test_the_primary_claim_is_a_ratio_seed_by_seed():
    baseline = one("off", 0.1, 0.2)
    for ours, verdict, ratio in (((0.0, 0.01), "holds", 0.05), ((0.006, 0.0), "does not hold", 0.06)):
        (claim,) = judge(Results({"learn-elaswave": one("off", *ours), "learn-dropping": baseline}))
        assert (claim.verdict, claim.ours) == (verdict, pytest.approx(ratio))
    still = Results({"learn-elaswave": one("off", 0.0, 0.0), "learn-dropping": one("off", 0.1, 0.0)})
    assert judge(still)[0].verdict == "not resolved"


def test_sizes_and_configs():
    smoke, full = make(), make(full=True)
    assert (smoke.seeds, full.seeds) == ((0,), (0, 1, 2, 3, 4))
    for arm in full.arms:
        assert from_dict(type(arm.config), json.loads(json.dumps(to_dict(arm.config)))) == arm.config
    assert "elaswave" in names()
    assert find("elaswave") is make


def test_losses_and_joins_take_turns_apart():
    for seed in range(20):
        found = events_of(Consistent(way="dropping"), seed)
        assert [kind for _, kind in found] == ["loss", "join", "loss", "join", "loss"]
        steps = [step for step, _ in found]
        assert all(later - earlier >= 10 for earlier, later in pairwise(steps))
        assert 0 < steps[0] < steps[-1] < 200
    assert events_of(Consistent(way="dropping"), 1) != events_of(Consistent(way="dropping"), 2)


def test_slices_of_stages_by_hand():
    # Two ranks a stage. Before: layers 0, 1 | 2, 3 of 4 numbers each: ranks have 0-4, 4-8 | 8-12, 12-16. After: 0 | 1, 2, 3: they have
    # 0-2, 2-4 | 4-10, 10-16. Numbers 2-4 go from rank 0 to 1, 4-8 from 1 to 2, 10-12 from 2 to 3.
    grid = Grid.full(replicas=2, stages=2)
    assert contiguous(Layout(grid, (2,), 4), Layout(grid, (1,), 4), [4, 4, 4, 4]) == 8


def test_counted_and_simulated_parts_in_small():
    found = run(Moved(draws=10), 0, print)
    assert found["whole"] == 1
    assert found["links"] == 1
    assert 0 < found["share"] < 1
    found = run(Lost(grids=((4, 4),), micro_batches=(8,), losses=(1, 2), layers=16), 0, print)
    assert found["cases"] == 2
    assert min(found["recycle"], found["torchft"]) >= 1


def test_a_replica_that_is_dropped_changes_what_is_learned():
    small = Consistent(way="dropping", steps=12, every=4, losses=1, joins=1, width=16, blocks=1, batch=4, length=16)
    found = run(small, 0, lambda text: None)
    assert found["points"] == 3
    assert found["off"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_runs_end_to_end(tmp_path):
    outcome = run_study(make(), tmp_path / "results")
    assert not outcome.missing
    assert set(outcome.results.runs) == set(arms(False, 20))
    assert outcome.results.values("learn-elaswave", "off") == {0: 0.0}
    assert (tmp_path / "results" / "elaswave.png").read_bytes().startswith(b"\x89PNG")
    draw(Results({}), tmp_path / "empty")
