"""Real processes over gloo: 2 of them, or 4, started once; what they do is in `tests/ring_ranks.py`."""

import time
from contextlib import suppress

import pytest

import ring_ranks
from anabranch.cluster.ring import SCHEMES, plan_attention
from anabranch.testing import Ranks, run_ranks


@pytest.fixture(
    scope="module", params=[(2, 13, 6), pytest.param((4, 37, 50), marks=pytest.mark.slow)], ids=["2 ranks", "4 ranks"]
)
def ran(request):
    """What each rank found."""
    world, length, steps = request.param
    return run_ranks(ring_ranks.everything, world, length, steps, timeout_s=250)


def test_outputs_and_gradients_are_those_of_one_process(ran):
    for rank in ran:
        assert len(rank["attention"]) == 3 * (len(SCHEMES) + 1)
        for case, result in rank["attention"].items():
            assert result["errors"][0] <= 1e-12, case
            assert max(result["errors"][1:]) <= 1e-11, case


def test_bytes_are_those_of_the_plan(ran):
    for kind, causal in ring_ranks.CASES:
        planned = plan_attention(32, len(ran), 4, 2, 8, ring_ranks.torch.float64, batch=2, causal=causal, layout=kind)
        for cost in planned.costs:
            sent = sum(rank["attention"][f"{kind} {causal} {cost.scheme}"]["bytes"] for rank in ran)
            assert sent == cost.size_bytes


def test_what_is_late_does_not_change_a_bit(ran):
    for is_same, difference in (rank["late"] for rank in ran):
        assert is_same
        assert difference < 1e-6


# What all ranks say, as rank 0 and the others were given it; or what the rank that was given it says, where it cannot be worked on.
SAID = {
    "lengths of ranks": "ranks were given different positions of a rank: 4 on rank 0, 6 on rank 1",
    "types": "ranks were given different types: torch.float32 on rank 0, torch.float64 on rank",
    "gradients": "ranks were given different requests for gradients: True on rank 0, False on rank",
    "placements": "ranks were given different placements: ",
    "schemes": "ranks were given different schemes: 'ring' on rank 0, 'token_ring' on rank",
    "causal": "ranks were given different causal: True on rank 0, False on rank",
    "windows": "ranks were given different windows: 2 on rank 0, None on rank",
    "layouts": "ranks were given different layout: 'zigzag' on rank 0, 'stripe' on rank",
    "a layout that is none": "ranks were given different layout: 'zigzag' on rank 0, 'zig' on rank",
    "a length": "ranks were given different length: 7 on rank 0, None on rank",
    "documents": "ranks were given different documents: (0, 3, 8) on rank 0, (0, 4, 8) on rank",
    "long documents": "ranks were given different documents: ...391, 392, 393, 394, 395, 396, 397, 398, 399) on rank 0, ...391,",
    "documents longer than is sent": "ranks were given different documents: ...",
    "scales": "ranks were given different scales: 0.5 on rank 0, 0.25 on rank",
    "types of results": "ranks were given different types of partial results: torch.float32 on rank 0, None on rank",
    "links": "ranks were given different topologies: Topology(kind='ring'",
}
# Given to rank 0 alone.
OWN_OF_FIRST = {
    "a shape": "the shapes are query [4, 2, 8]",
    "no tensor": "queries, keys and values must be tensors, and one of them is of type int",
    "a type of 8 bits": "the types are torch.float8_e4m3fn, torch.float8_e4m3fn and torch.float8_e4m3fn; use one for all, of float64",
    "no placement": "keys are placed by None; give a Placement",
    "no placements": "queries are placed by None; give a Placement",
    "a placement on other ranks": "queries are placed on ",
}
# Given to the others.
OWN = {
    "a function and a scheme": "scheme is 'ring', and token_ring_attention is by token_ring; call context_parallel_attention",
    "a window below 1": "window is -1 and causal True; a window is at least 1",
    "a length that is none": "length is 'a'; use a whole number",
    "documents that cannot be read": "documents is ('a',); give the positions",
    "documents that are no list": "documents is 3; give the positions",
    "a scale that is none": "softmax_scale is 'a'; use a finite number, or None",
    "a scale that is not a number": "softmax_scale is nan; use a finite number",
    "an option that is none": "attention over ranks has no option 'scal'",
    "a scheme that is none": "scheme is 'star'; use auto, token_ring",
    "a type that is none": "out_dtype is 'float32'; use a dtype, or None",
    "links that are none": "topology is 'ring'; use a Topology, or None",
    "a time that is none": "timeout_s is 'soon'; use a finite number above 0, or None",
    "a counter that is none": "traffic is 1; use a Traffic, or None",
}


def test_ranks_that_differ_are_told_so_on_all_ranks(ran):
    """Whatever they differ in, and whoever is given what cannot be: nobody waits for a message, and all can go on."""
    for number, rank in enumerate(ran):
        said = rank["differing"]
        assert said.pop("nothing") == "nothing"
        assert said.keys() == SAID.keys() | OWN.keys() | OWN_OF_FIRST.keys()
        for case, words in SAID.items():
            assert said[case].startswith(f"InputError: {words}"), case
            first, others = said[case].split(f"{words.split(':')[0]}: ")[1].split(" on rank 0, ")
            assert first != others.partition(" on rank")[0], case
        for case, words in (OWN | OWN_OF_FIRST).items():
            is_mine = (number == 0) == (case in OWN_OF_FIRST)
            wrong = 0 if case in OWN_OF_FIRST else 1
            told = words if is_mine else f"rank {wrong} was given what it cannot work on"
            assert said[case].startswith(f"InputError: {told}"), case


def test_measured_links_are_the_same_on_all_ranks(ran):
    topologies = [rank["measured"][0] for rank in ran]
    assert all(topology == topologies[0] for topology in topologies)
    matrix = topologies[0].matrix
    assert [len(row) for row in matrix] == [len(ran)] * len(ran)
    assert all((speed > 0) == (row != to) for row, speeds in enumerate(matrix) for to, speed in enumerate(speeds))
    assert topologies[0].flops > 0
    assert all(rank["measured"][1] in SCHEMES for rank in ran)


@pytest.mark.slow
def test_rings_of_ranks_that_cut_heads_between_them():
    found = run_ranks(ring_ranks.grid, 4)
    for rank in found:
        said = rank.pop("said")
        assert len(rank) == 6
        for case, errors in rank.items():
            assert errors[0] <= 1e-12, case
            assert max(errors[1:]) <= 1e-11, case
        assert said[0].startswith("InputError: ")
        assert said[1].startswith("InputError: 1 query heads over 1 key heads cannot be cut over 2 ranks")
        # Differences along a row or from row to row, and what one rank cannot work on, are told on all.
        assert len(said) == 8
        assert all(line.startswith("InputError: ") for line in said[2:]), said
    assert found[0].keys() == found[3].keys()


def test_a_process_outside_of_the_group_is_told_so(ran):
    assert ran[0]["outside"] == "nothing"
    for rank in ran[1:]:
        assert rank["outside"].startswith("InputError: this process is not in the group")


def test_a_rank_that_does_not_come_is_named():
    """By those that wait for it, while it is away; not when the group gives up, which is after the test."""
    said = run_ranks(ring_ranks.alone, 2)
    assert said[0].startswith("PeerError: rank 1 did not")
    assert said[1] == "was away"


def test_a_rank_whose_process_ends_is_named():
    with Ranks(3, ring_ranks.gone) as ranks:
        # It has no output before it has begun.
        told = ""
        while "nothing" not in told:
            time.sleep(0.02)
            with suppress(FileNotFoundError):
                told = ranks.output(2)
        ranks.kill(2)
        said = ranks.wait()
    # Both waited for it, or one for the other that had given up.
    assert any(line.startswith("PeerError: rank 2 did not") for line in said)
    assert all(line.startswith("PeerError: rank ") for line in said)


@pytest.mark.parametrize("case", ["zigzag token_ring", "stripe ring", "contiguous auto", "replicas"])
def test_a_loss_curve_is_that_of_one_process(ran, case):
    for curves, _ in (rank["training"] for rank in ran):
        # The first of all steps, where there are fewer.
        differences = [abs(one - other) for one, other in zip(curves[case], curves["alone"], strict=False)]
        assert max(differences) <= 1e-5
        assert len(set(curves[case])) == len(curves[case])


def test_weights_stay_equal(ran):
    assert all(rank["training"][1] <= 1e-4 for rank in ran)


def test_logits_are_those_of_one_process(ran):
    assert all(difference <= 1e-5 for rank in ran for difference in rank["logits"].values())


def test_generation_is_that_of_one_process(ran):
    for made in (rank["generation"] for rank in ran):
        assert made["whole"] == made["chunks"] == made["alone"]
        assert made["sampled"][0] == made["sampled"][1]


def test_decoding_sends_partial_results_alone(ran):
    """Of 2 layers, 2 sequences, 4 heads: 4 numbers and the sum of a softmax, to each other rank."""
    for rank in ran:
        assert rank["generation"]["bytes"] == 2 * 2 * 4 * (4 + 1) * 4 * (len(ran) - 1)


def test_each_rank_holds_its_share(ran):
    for rank in ran:
        rows = rank["generation"]["rows"]
        assert max(rows) - min(rows) <= 1
