import json

import numpy as np
import pytest

from anabranch.config import from_dict, to_dict
from anabranch.graph import Graph
from anabranch.graph.fully_ppr.rounds import Round, Schedule
from anabranch.studies import find, names
from anabranch.studies.fully_ppr import (
    ROW_BYTES,
    SPILL,
    All,
    Devices,
    Law,
    Weights,
    judge,
    l1_error,
    make,
    overlap,
    power_law,
    run_devices,
    run_law,
    run_weights,
    throughput,
    with_weights,
)
from anabranch.studies.harness import Results, run_study
from claims import run_only

judge = run_only(judge)


def verdicts(runs):
    return {claim.claim: claim.verdict for claim in judge(Results(runs))}


def seeds(metric, values, **others):
    return {seed: {metric: value, **others} for seed, value in enumerate(values)}


# Measures, by hand


def test_overlap_by_hand():
    exact = np.array([0.4, 0.3, 0.1, 0.1, 0.1, 0.0])
    assert overlap(np.array([0, 1, 4]), exact, 3) == 1  # any of those that tie for the third place
    assert overlap(np.array([0, 5, 4]), exact, 3) == pytest.approx(2 / 3)
    assert overlap(np.array([4, 1, 0, 2, 3, 5]), exact, 50) == 1  # five can be reached
    assert overlap(np.array([0]), exact, 2) == 0.5
    assert l1_error(np.array([0, 5]), np.array([0.5, 0.1]), exact) == pytest.approx(0.8)


def test_throughput_by_hand():
    schedule = Schedule(10, 4, 2)
    schedule.log = [Round(0, 2, 2, 20, 10, 15), Round(1, 2, 2, 30, 18, 0)]
    # 50 walks moved; two rounds at 7 and 3 rows of the second beyond a memory of 15
    assert throughput(schedule, 15 * ROW_BYTES, 7) == pytest.approx(50 / (14 + 50 + 3 * SPILL))


def test_graphs_are_what_they_are_called():
    graph = power_law(500, 3)
    assert graph.num_nodes == 500
    assert 900 < graph.num_edges < 1000  # two a node, few of them twice
    assert graph.degree_N[:10].mean() > 5 * graph.degree_N.mean()
    weighted = with_weights(graph, 1)
    assert np.array_equal(weighted.indices, graph.indices)
    dense = weighted.to_scipy().toarray()
    assert np.array_equal(dense, dense.T)
    assert np.log(weighted.weights).std() == pytest.approx(1, abs=0.1)


# Judging


@pytest.mark.parametrize(
    ("times", "shared", "many", "few"),
    [
        ([150, 120], 0.9, "holds", "holds"),
        ([150, 90], 0.9, "does not hold", "holds"),
        ([15, 19], 0.9, "does not hold", "does not hold"),
        ([150, 120], 0.8, "does not hold", "does not hold"),
        ([150], 0.9, "not resolved", "not resolved"),
    ],
)
def test_speed_counts_only_at_the_overlap(times, shared, many, few):
    found = verdicts(
        {"all-dblp": seeds("times", times, overlap=shared), "all-ppi": seeds("times", times, overlap=shared)}
    )
    text = "times less processor time than a loop over sources, at a top-50 overlap of 0.87"
    assert found == {f"dblp: 20 {text}": few, f"dblp: 100 {text}": many, f"ppi: 20 {text}": few}


def test_the_law_of_errors_is_judged_in_every_seed():
    run = {"broken": 0.01, "p_f": 0.1, "visits_share": 0.2}
    good = verdicts({"law-ppi": seeds("slope", [-0.52, -0.46], **run)})
    assert set(good.values()) == {"holds"}
    bad = verdicts({"law-ppi": seeds("slope", [-0.52, -0.42], **{**run, "broken": 0.1, "visits_share": 0.26})})
    assert set(bad.values()) == {"does not hold"}


def test_weights_and_devices_are_judged_by_their_bars():
    device = {"formula_off": 3.0, "tree_share": 0.05, "moves_share": 0.6, "gamma_share": 0.95}
    found = verdicts(
        {"weights-ppi": seeds("gain", [0.3, 0.2]), "devices": seeds("pipelined_share", [0.1, 0.3], **device)}
    )
    assert set(found.values()) == {"holds"}
    assert len(found) == 6
    off = {"formula_off": -32.0, "tree_share": 0.2, "moves_share": 0.7, "gamma_share": 0.8}
    found = verdicts({"weights-ppi": seeds("gain", [0.3, 0.1]), "devices": seeds("pipelined_share", [0.1, 0.4], **off)})
    assert set(found.values()) == {"does not hold"}


# Running


def test_the_parts_measure_what_they_say():
    law = run_law(Law(graph="power-60", walks=(1000, 4000, 16_000), sample=20, delta=0.02), 0, lambda text: None)
    assert law["slope"] == pytest.approx(-0.5, abs=0.1)
    assert law["visits_share"] < 0.5
    assert law["broken"] < 0.1
    assert law["curve_endpoint"][0] > law["curve_fullpath"][0] > law["curve_fullpath"][-1]
    weights = run_weights(Weights(graph="power-300", walks=3000, sample=20), 0, lambda text: None)
    assert weights["gain"] > 0.1
    config = Devices(nodes=400, hub=200, theta=16, walks=16, memory_gamma=6)
    devices = run_devices(config, 0, lambda text: None)
    assert devices["rounds_pipelined"] < devices["rounds_apart"] / 2
    assert devices["tree_share"] < 0.2
    assert devices["moves_share_3"] <= devices["moves_share"] < 0.8
    assert devices["gamma_share"] > 0.8
    assert len(devices["curve_throughput"]) == len(devices["curve_gamma"])


def test_sizes_and_names():
    assert find("fully_ppr") is make
    assert "fully_ppr" in names()
    full = make(full=True)
    assert {"all-dblp", "all-blogcatalog", "law-ppi", "weights-blogcatalog", "devices"} <= {
        arm.name for arm in full.arms
    }
    for arm in (*make().arms, *full.arms):
        assert from_dict(type(arm.config), json.loads(json.dumps(to_dict(arm.config)))) == arm.config
    assert isinstance(full.arms[0].config, All)


def test_runs_end_to_end(tmp_path):
    pytest.importorskip("igraph", reason="part A compares with igraph")
    study = make(
        all_graphs=("power-300",),
        law_graph="power-60",
        weights_graph="power-200",
        walks=(500, 2000),
        sample=10,
        nodes=300,
    )
    outcome = run_study(study, tmp_path, seeds=(0, 1))
    assert not outcome.missing
    assert len(outcome.claims) == 10
    assert (tmp_path / "fully_ppr.png").exists()
    assert (tmp_path / "fully_ppr.svg").exists()
    assert outcome.results.mean("all-power-300", "overlap").mean > 0.8
    assert isinstance(power_law(10, 0), Graph)
