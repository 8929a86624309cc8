"""Real processes over gloo: 2 and 4 of them, each started once; every case of the file is in what they run."""
# Shapes: B sequences, S positions, H query heads, G key heads, D head width

import json

import pytest
import torch
from naive_attention import drawn, naive
from ranks import run_ranks

from anabranch.cluster.ring import SCHEMES, plan_attention

# Each rank makes the whole from one seed, keeps its rows, and prints how far it is from what it gathers.
SCRIPT = """
import json, random
from anabranch.cluster import ring_attention, token_ring_attention
from anabranch.cluster.ring import SCHEMES, Layout, Traffic, context_parallel_attention
from anabranch.errors import AnabranchError
sys.path.insert(0, TESTS)
from naive_attention import drawn, naive

def gathered(layout, part):
    parts = [torch.empty_like(part) for _ in range(world)]
    dist.all_gather(parts, part.contiguous())
    return layout.unshard(parts)

found = {}
for kind, causal in (("contiguous", False), ("zigzag", True), ("stripe", True)):
    layout = Layout(kind, world, 32)
    *whole, dout = drawn(2, 32, 4, 2, 8)
    expected = naive(*whole, causal=causal)
    grads = torch.autograd.grad(expected, whole, dout)
    for scheme in (*SCHEMES, "auto"):
        parts = [layout.shard(part.detach(), rank).requires_grad_() for part in whole]
        traffic = Traffic()
        out = context_parallel_attention(*parts, None, causal, layout=kind, scheme=scheme, traffic=traffic, timeout_s=60)
        forward = int(traffic.sent.bytes_RR.sum())
        own = torch.autograd.grad(out, parts, layout.shard(dout, rank))
        errors = [float((gathered(layout, out) - expected).abs().max())]
        errors += [float((gathered(layout, part) - right).abs().max()) for part, right in zip(own, grads)]
        found[f"{kind} {causal} {scheme}"] = {"errors": errors, "bytes": forward, "waited": sorted(traffic.waited_s)}

# The names of the package itself, and ranks that are late.
torch.manual_seed(rank)
*whole, dout = drawn(1, 24, 2, 2, 8, torch.float32)
layout = Layout("zigzag", world, 24)
bits = []
for turn in range(3):
    time.sleep(0.05 * random.random())
    out = token_ring_attention(*(layout.shard(part.detach(), rank) for part in whole), causal=True, layout="zigzag")
    bits.append(out)
found["same bits"] = all(torch.equal(one, bits[0]) for one in bits)
other = ring_attention(*(layout.shard(part.detach(), rank) for part in whole), causal=True, layout="zigzag")
found["schemes"] = float((other - bits[0]).abs().max())

said = []
def says(call):
    try:
        call()
        said.append("nothing")
    except AnabranchError as error:
        said.append(f"{type(error).__name__}: {error}")
q = torch.zeros(1, 4, 2, 8)
# A rank with another length, another scheme, another mask, and one with what cannot be.
says(lambda: ring_attention(torch.zeros(1, 4 + 2 * rank, 2, 8), q, q))
says(lambda: context_parallel_attention(q, q, q, scheme=SCHEMES[rank % 2]))
says(lambda: ring_attention(q, q, q, causal=rank == 0))
says(lambda: ring_attention(q if rank else q[0], q, q))
found["said"] = said
# Nobody comes: the last rank makes no call.
if rank < world - 1:
    says(lambda: ring_attention(q, q, q, timeout_s=0.3, check=False))
else:
    time.sleep(1.0)
found["alone"] = said[4:]
print(json.dumps(found))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ran(request, tmp_path_factory):
    """What each rank found."""
    from pathlib import Path

    tests = str(Path(__file__).resolve().parents[2])
    folder = tmp_path_factory.mktemp("ranks")
    return [json.loads(printed) for printed in run_ranks(f"TESTS = {tests!r}\n{SCRIPT}", folder, request.param)]


def test_outputs_and_gradients_are_those_of_one_process(ran):
    for rank in ran:
        for case, result in rank.items():
            if isinstance(result, dict):
                assert result["errors"][0] <= 1e-12, case
                assert max(result["errors"][1:]) <= 1e-11, case


def test_bytes_are_those_of_the_plan(ran):
    for kind, causal in (("contiguous", False), ("zigzag", True), ("stripe", True)):
        planned = plan_attention(
            32, len(ran), 4, 2, 8, torch.float64, batch=2, causal=causal, layout=kind
        )
        for cost in planned.costs:
            assert sum(rank[f"{kind} {causal} {cost.scheme}"]["bytes"] for rank in ran) == cost.size_bytes


def test_what_is_late_does_not_change_a_bit(ran):
    assert all(rank["same bits"] for rank in ran)
    assert all(rank["schemes"] < 1e-6 for rank in ran)


def test_ranks_that_differ_are_told_so_on_all_ranks(ran):
    for number, rank in enumerate(ran):
        said = rank["said"]
        assert said[0].startswith("InputError: ranks were given different positions of a rank: [4, 6")
        assert said[1].startswith("InputError: ranks were given different schemes")
        assert said[2].startswith("InputError: ranks were given different causal: [1, 0")
        assert said[3].startswith(
            "InputError: rank 0 was given what it cannot work on" if number else "InputError: the shapes are query [4, 2, 8]"
        )


def test_a_rank_that_does_not_come_is_named(ran):
    """By those that wait for it; in time, and not when the group gives up."""
    last = len(ran) - 1
    waiting = [rank["alone"][0] for rank in ran[:last]]
    assert any(said.startswith(f"PeerError: rank {last} did not") for said in waiting)
    assert all(said.startswith("PeerError: rank ") for said in waiting)


def test_the_cases_are_not_all_alike():
    """The reference of the script is the one of this file."""
    *leaves, _ = drawn(2, 32, 4, 2, 8)
    assert not torch.equal(naive(*leaves, causal=True), naive(*leaves))
    assert len(SCHEMES) == 4
