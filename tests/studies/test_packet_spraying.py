"""The study of packet spraying: its rule on made-up numbers, its arms, and that the quick ones run."""

import shutil
import subprocess

import numpy as np
import pytest

from anabranch.cluster.fabric import Topology, collective_flows, plan
from anabranch.config import from_dict, to_dict
from anabranch.studies import packet_spraying_kernel as kernel
from anabranch.studies.corrected import settled
from anabranch.studies.harness import Results
from anabranch.studies.packet_spraying import (
    SCHEMES,
    SMOKE,
    Size,
    arms,
    draw,
    judge,
    late,
    make,
    networks,
    over_bound,
    run,
    uniform,
)
from claims import run_only

judged = run_only(judge)


def runs(metric, values):
    return {seed: {metric: value} for seed, value in enumerate(values)}


def verdicts(runs):
    return {claim.claim: claim.verdict for claim in judged(Results(runs))}


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [([0.0, 0.0], "holds"), ([0.0, 0.5], "not resolved"), ([0.5, 1.0], "does not hold"), ([0.0], "not resolved")],
)
def test_the_theorem_allows_no_gap_at_all(gaps, verdict):
    assert verdicts({"theorem": runs("gap", gaps)}) == {"1: no link carries other than under spraying": verdict}


def test_the_theorem_is_exact_and_not_counted_among_what_is_tested():
    """A gap of 0 in each of five seeds was not resolved: what never varies does not differ from its limit."""
    five = {seed: {"gap": 0.0, "pieces_off": 0} for seed in range(5)}
    noisy = {seed: {"packets_s": 1.0 + seed / 10} for seed in range(5)}
    found = settled(judge(Results({"theorem": five, "packet-ethereal": noisy, "packet-spray": noisy})), 5)
    for claim in found[:2]:
        assert (claim.exact, claim.verdict, claim.interval) == (True, "holds", None)
    assert not any(claim.exact for claim in found[2:])
    five[4] = {"gap": 0.5, "pieces_off": 1}
    assert [claim.verdict for claim in settled(judge(Results({"theorem": five})), 5)[:2]] == ["not resolved"] * 2


def test_what_is_equal_in_theory_is_a_test_as_well():
    found = make(full=True).judged(Results({}))
    assert {claim.claim for claim in found if claim.exact} == {
        claim.claim for claim in found if claim.paper == "equal in theory"
    }


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([1.0, 2.0], "holds"),
        ([1.0000005, 2.0], "holds"),
        ([1.00001, 2.1], "does not hold"),
        ([0.9, 2.0], "not resolved"),
    ],
)
def test_ethereal_must_end_when_spraying_does(ours, verdict):
    metric = "pods_direct_s"
    found = verdicts({"flow-ethereal": runs(metric, ours), "flow-spray": runs(metric, [1.0, 2.0])})
    assert found == {"2: all-to-all on fat-tree: ethereal ends when spraying does": verdict}


def test_hashing_must_take_nearly_twice_as_long():
    metric = "spine_halving_s"
    for hashed, verdict in (([1.9, 1.8], "holds"), ([1.7, 1.5], "does not hold"), ([1.9, 1.7], "not resolved")):
        found = verdicts({"flow-ethereal": runs(metric, [1.0, 1.0]), "flow-ecmp": runs(metric, hashed)})
        assert found["2: halving-doubling on leaf-spine: 1.8 times as fast as hashing"] == verdict


def test_rings_must_be_alike_under_all_schemes():
    made = {f"flow-{scheme.replace(':', '')}": runs("spine_ring_s", [1.0, 1.0]) for scheme in SCHEMES}
    claim = "2: ring on leaf-spine: all schemes within 1%"
    assert verdicts(made)[claim] == "holds"
    made["flow-ecmp"] = runs("spine_ring_s", [1.02, 1.0])
    assert verdicts(made)[claim] == "not resolved"
    del made["flow-split8"]
    assert claim not in verdicts(made)


@pytest.mark.parametrize(
    ("arm", "share", "claim"),
    [
        ("packet-{}", 1.05, "3: packets, any order: at most 1.05 times spraying's time"),
        ("packet-{}-gbn", 0.8, "3: receivers go back: at most 0.8 times"),
        ("packet-{}-failed", 0.9, "3: a failed cable: at most 0.9 times spraying's time"),
        ("late-{}-10", 1.05, "3: starts up to 10 us apart: at most 1.05 times"),
    ],
)
def test_packets_are_held_against_spraying(arm, share, claim):
    base = {arm.format("spray"): runs("packets_s", [2.0, 4.0])}
    for times, verdict in (((0.999, 0.5), "holds"), ((1.001, 1.5), "does not hold"), ((1.001, 0.5), "not resolved")):
        ours = [2.0 * share * times[0], 4.0 * share * times[1]]
        assert verdicts({**base, arm.format("ethereal"): runs("packets_s", ours)})[claim] == verdict


def test_real_paths_and_dispatch_have_limits():
    made = {
        "kernel": {seed: {"pinned_share": 0.95, "hashed_share": 0.6} for seed in range(2)},
        "dispatch": {seed: {"wrap_over_bound": 1.0005, "hashed_4to1": 1.4, "hashed_1to1": 1.2} for seed in range(2)},
    }
    assert verdicts(made) == {
        "5: pinned flows reach 0.9 of four real paths": "holds",
        "5: the kernel's hash reaches 0.75 or less": "holds",
        "6: dispatch, at 4:1 and 1:1: wrap is within 0.1%": "holds",
        "6: dispatch at 4:1: hashing takes 1.3 times the least": "holds",
        "6: dispatch at 1:1, the paper's network: hashing takes 1.3 times the least": "does not hold",
    }
    exact = {claim.claim for claim in judge(Results(made)) if claim.exact}
    assert {claim for claim in exact if claim.startswith("6")} == {"6: dispatch, at 4:1 and 1:1: wrap is within 0.1%"}
    # A machine without namespaces leaves the claims open.
    made["kernel"] = {seed: {"pinned_share": None, "hashed_share": None, "why": "x"} for seed in range(2)}
    assert not [claim for claim in verdicts(made) if claim.startswith("5")]


def test_the_referee_that_is_missing_is_told():
    found = {claim.claim: claim.verdict for claim in judge(Results({}))}
    assert found["4: completion within 15% of ns-3's"] == "not run"


def test_arms_are_those_of_the_plan():
    study = make(full=True)
    names = [arm.name for arm in study.arms]
    assert len(names) == len(set(names)) == 1 + 8 + 8 + 2 + 6 + 2
    assert study.seeds == (0, 1, 2, 3, 4)
    for arm in study.arms:
        assert from_dict(type(arm.config), to_dict(arm.config)) == arm.config
    spine, pods = networks(arms(Size())["flow-ecmp"].config).values()
    assert (spine.num_hosts, pods.num_hosts) == (256, 512)
    assert arms(Size())["packet-spray"].config.message == 64 * 10**6
    with pytest.raises(ValueError, match="width is 1"):
        make(width=1)


def test_starts_are_as_late_as_asked_all_of_a_host_together():
    flows, topology = collective_flows("all-to-all", 8, 80_000), Topology.leaf_spine(2, 2, 4)
    made = plan(flows, topology)
    assert late(made, 0.0, seed=1) is made
    moved = late(made, 20.0, seed=1)
    apart_Q = moved.delay_ns_Q - made.delay_ns_Q
    for host in range(8):
        assert len(set(apart_Q[flows.src_F[made.flow_Q] == host])) == 1
    assert 0 <= apart_Q.min() < apart_Q.max() <= 20_000
    assert len(np.unique(apart_Q)) == 8


QUICK = ("theorem", "flow-ethereal", "flow-spray", "packet-ethereal", "packet-spray-failed", "late-ethereal-10")


def test_quick_arms_run_and_can_be_drawn(tmp_path):
    made, size = arms(SMOKE), SMOKE.replace(flows=3, paths=3, mixes=2)
    made["theorem"] = arms(size)["theorem"]
    results = Results({name: {0: run(made[name].config, 0, lambda text: None)} for name in QUICK})
    assert results.runs["theorem"][0] == {"gap": 0.0, "pieces_off": 0, "holds": 1.0}
    assert results.runs["packet-spray-failed"][0]["lost"] > 0
    assert len(judge(results)) == len(judge(Results({})))
    draw(results, tmp_path / "packet_spraying")
    draw(Results({}), tmp_path / "empty")
    assert (tmp_path / "packet_spraying.png").stat().st_size > 10_000
    assert (tmp_path / "empty.svg").is_file()


@pytest.mark.slow
def test_dispatch_of_a_trained_model():
    config = arms(SMOKE)["dispatch"].config
    learner = config.learner.replace(train=config.learner.train.replace(steps=4, batch_size=2))
    found = run(config.replace(learner=learner, tokens=4096), 0, lambda text: None)
    assert found["wrap_over_bound"] == pytest.approx(1.0, abs=5e-3)
    assert found["hashed_4to1"] > found["wrap_over_bound"]
    assert found.keys() >= {"hashed_1to1", "uniform_4to1", "uniform_1to1"}


def test_each_layer_has_a_hash_of_its_own_and_wrap_meets_the_bound_for_each():
    """Layers of a seed shared every path, so that their mean was one draw."""
    index_NK = uniform(4096, 2, 32, seed=[0, 0])
    assert sorted(np.unique(index_NK)) == list(range(32))
    assert (index_NK[:, 0] != index_NK[:, 1]).all()
    topology = Topology.leaf_spine(4, 4, 4, cap_up=100, cap_host=400)
    for seed in range(3):
        found = [over_bound(index_NK, 32, 16, topology, seed, layer) for layer in range(4)]
        assert len({hashed for _, hashed in found}) > 1
        assert all(wrap == pytest.approx(1.0, abs=1e-3) for wrap, _ in found)


def test_no_claim_rests_on_the_seeds_of_other_arms():
    """Where others had run five times, the mean of two decided."""
    few = {seed: {"hashed_4to1": 1.5 + seed / 100, "pinned_share": 0.95} for seed in range(2)}
    five = {seed: {"gap": 0.0} for seed in range(5)}
    found = settled(judged(Results({"dispatch": few, "kernel": few, "theorem": five})), 5)
    assert [claim.verdict for claim in found] == ["holds", "not resolved", "not resolved"]


def test_without_the_tools_the_kernel_arm_says_so(monkeypatch):
    monkeypatch.setattr(kernel.shutil, "which", lambda tool: None if tool == "tc" else tool)
    heard = []
    found = kernel.measure(2, 100, 1000, 1, 0, heard.append)
    assert found == {"pinned_share": None, "hashed_share": None, "why": "there is no tc here"}
    assert heard == ["not run: there is no tc here"]


def test_a_kernel_that_refuses_leaves_nothing_behind(monkeypatch):
    asked = []

    def refuse(words, **_):
        asked.append(words[:3])
        return subprocess.CompletedProcess(words, int(words[2] == "add"), "", "Operation not permitted\n")

    monkeypatch.setattr(kernel.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(kernel.subprocess, "run", refuse)
    found = kernel.measure(2, 100, 1000, 1, 0, lambda text: None)
    assert "Operation not permitted" in found["why"]
    assert [words[2] for words in asked] == ["add", "delete", "delete"]


def can_make_namespaces():
    if any(shutil.which(tool) is None for tool in kernel.TOOLS):
        return False
    try:
        with kernel.namespaces(1, 100):
            return True
    except kernel.NoNamespacesError:
        return False


@pytest.mark.slow
def test_flows_over_real_paths():
    """Shares of time are not asserted but that there are some: other work on the machine decides them."""
    if not can_make_namespaces():
        pytest.skip("this kernel, or this user, makes no network namespaces")
    found = kernel.measure(2, 200, 500_000, 2, 0, lambda text: None)
    assert 0 < found["hashed_worst"] <= found["hashed_share"] <= found["hashed_best"]
    assert found["pinned_share"] > 0
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"anabranch-a-{kernel.os.getpid()}" not in left
