import json

import pytest

from anabranch.config import from_dict, to_dict
from anabranch.studies import find, names
from anabranch.studies.g_rank import SMOKE, Size, Swarm, World, arms, build, draw, judge, make, rises, run
from anabranch.studies.harness import Results, run_study
from claims import run_only

judge = run_only(judge)


def runs(metric, values, **others):
    return {seed: {metric: value, **others} for seed, value in enumerate(values)}


def verdicts(runs):
    return {claim.claim: claim.verdict for claim in judge(Results(runs))}


@pytest.mark.parametrize(
    ("falls", "verdict"),
    [([0.95, 0.99], "holds"), ([0.95, 0.8], "not resolved"), ([0.5, 0.8], "does not hold"), ([0.99], "not resolved")],
)
def test_convergence_is_judged_in_every_seed(falls, verdict):
    assert verdicts({"base-F1": runs("fall", falls)})["1: plain distance falls by 90%, F = 1"] == verdict


def test_after_an_attack_the_worst_counts():
    values = [{"worst_plain": 0.2, "worst": 0.7, "coverage_end": 1.0}] * 2
    found = verdicts({"sybil-F1": dict(enumerate(values))})
    assert found["2: sybil-F1: plain distance stays below 60% of the start"] == "holds"
    assert found["2: sybil-F1: so does the ranked one"] == "does not hold"
    assert found["2: sybil-F1: all know the top item"] == "holds"
    assert not any("epic" in claim for claim in found)  # it did not run


def test_push_and_isolation_are_paired():
    pull = {
        seed: {
            "messages_to_cover": 900 + seed,
            "distance_quarter": 9.0 - seed,
            "rise_early": 2.0 + seed,
            "rise": 20.0 + seed,
        }
        for seed in range(3)
    }
    push = {
        seed: {"messages_to_cover": 700 + seed, "distance_quarter": 3.0 - seed, "rise_early": 9.0 + seed}
        for seed in range(3)
    }
    alone = {seed: {"rise": 5.0 + seed + 0.1 * seed} for seed in range(3)}
    found = verdicts({"sybil-F1": pull, "push-F1": push, "sybil-F0": alone})
    assert found["3: push covers 90% with fewer messages"] == "holds"
    assert found["3: push is polluted faster"] == "holds"
    assert found["3: push is nearer after a quarter of the ticks"] == "holds"
    assert found["4: with F = 0 the rise is smaller"] == "holds"
    turned = verdicts({"sybil-F1": push | {}, "push-F1": pull})
    assert turned["3: push covers 90% with fewer messages"] == "does not hold"
    assert turned["3: push is polluted faster"] == "does not hold"


@pytest.mark.parametrize(
    ("rise", "verdict"), [([9, 4], "holds"), ([11, 6], "does not hold"), ([9, 6], "not resolved"), ([-3, -1], "holds")]
)
def test_a_defence_must_halve_the_rise(rise, verdict):
    found = verdicts({"forged-F1": runs("rise", [20, 10]), "defended-F1": runs("rise", rise)})
    assert found["5: cap and signatures halve the rise of forged rows"] == verdict


def test_a_defence_against_nothing_is_not_judged():
    found = verdicts({"sybil-F0": runs("rise", [-5, -6]), "common-F0": runs("rise", [-5, -6])})
    assert found["5: at least 10 common clicks do, F = 0"] == "not resolved"


@pytest.mark.parametrize(("ndcg", "verdict"), [([0.9, 0.91, 0.92], "holds"), ([0.65, 0.66, 0.661], "does not hold")])
def test_tastes_must_win_by_a_tenth(ndcg, verdict):
    ours = {seed: {"ndcg": value, "ndcg_global": 0.6 + 0.01 * seed} for seed, value in enumerate(ndcg)}
    found = verdicts({"tastes-F0": ours, "tastes-F1": runs("ndcg", [0.6, 0.61, 0.62])})
    assert found["6: with F = 0 own tastes rank higher by 0.1"] == verdict
    assert found["6: and than global popularity ranks them, by 0.1"] == verdict


def test_rises_by_hand():
    history = [
        {"tick": tick, "attacked_distance": value}
        for tick, value in [(0, 90), (50, 10), (100, 30), (150, 20), (200, 10)]
    ]
    assert rises(history, 50, 50) == {"attacked_before": 10, "rise": 10.0, "rise_most": 20, "rise_early": 20.0}


def test_arms_differ_in_what_they_say():
    made = {name: arm.config for name, arm in arms(Size()).items()}
    base = to_dict(made["base-F1"])
    for name, changed in {
        "base-F0": {"F"},
        "sybil-F1": {"attack", "attackers", "queries"},
        "defended-F1": {"attack", "attackers", "queries", "forge", "signed", "saturation"},
        "tastes-F1": {"groups"},
        "offline-F1": {"offline"},
    }.items():
        config = to_dict(made[name])
        assert {field for field in config if config[field] != base[field]} == changed, name
    network = build(made["epic-F1"].replace(num_nodes=10, attackers=30), 0)
    assert network.num_nodes == 40
    assert (network.attack.join_at, network.attack.attack_at) == (2500, 5000)
    assert build(made["push-F1"].replace(num_nodes=10), 0).defences.pull_only is False
    assert made["loopback"] == Swarm(num_peers=20, clicks=10)


def test_sizes_and_names():
    assert find("g_rank") is make
    assert "g_rank" in names()
    assert make().settings["num_nodes"] == SMOKE.num_nodes
    full = make(full=True)
    assert (full.settings["num_nodes"], full.settings["ticks"], full.seeds) == (100, 10_000, (0, 1, 2, 3, 4))
    for arm in full.arms:
        assert from_dict(type(arm.config), json.loads(json.dumps(to_dict(arm.config)))) == arm.config


def test_runs_end_to_end(tmp_path):
    study = make(num_nodes=12, ticks=160, processes=2)
    chosen = ["base-F1", "sybil-F1", "sybil-F0", "defended-F1", "tastes-F0", "offline-F1"]
    outcome = run_study(study, tmp_path, arms=chosen, seeds=[0, 1])
    assert (tmp_path / "g_rank.json").is_file()
    found = outcome.results.runs
    assert found["base-F1"][0]["distance_end"] < found["base-F1"][0]["distance_start"]
    assert [tick for tick, _, _ in found["base-F1"][0]["curve"]] == [0, 40, 80, 120, 160]
    assert "rise" in found["sybil-F1"][0]
    assert 0 < found["tastes-F0"][0]["ndcg"] <= 1
    assert abs(found["offline-F1"][0]["offline_change"]) < 0.5
    assert any(claim.claim.startswith("7") for claim in outcome.claims)
    draw(outcome.results, tmp_path / "picture")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "picture.svg").read_text()


@pytest.mark.slow
def test_the_loopback_arm_runs():
    found = run(Swarm(num_peers=3, clicks=2), 0, lambda text: None)
    assert found["agreed"] == 1.0
    assert found["rows"] == 6


def test_a_world_is_checked():
    with pytest.raises(ValueError, match="gossip is 'flood'"):
        build(World(F=0.0, num_nodes=10, ticks=40, gossip="flood"), 0)
