"""Real processes over gloo: 2 of them, or 4, started once; every case of the file is in what they run.

Attention, training, generation, and what is said of ranks that differ, fail or do not come.
"""
# Shapes: B sequences, S positions, H query heads, G key heads, D head width

import json
from pathlib import Path

import pytest
import torch

from anabranch.cluster.ring import SCHEMES, plan_attention
from naive_attention import drawn, naive
from ranks import run_ranks

# Decoders: training, logits, generation.
MODELS = """
from torch.nn.parallel import DistributedDataParallel
from anabranch.cluster.ring import ContextParallel, Traffic, average_gradients
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

def decoder(**attention):
    return Decoder.Config(vocab_size=19, dim=16, num_layers=2,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, **attention),
        feed_forward=SwiGLU.Config(hidden_dim=24)).build(seed=3)

def batches(length, steps):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        token = torch.randint(0, 19, (2, length + 1), generator=generator)
        yield token[:, :-1], token[:, 1:]

def curve(model, step):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for token, target in batches(LENGTH, STEPS):
        optimizer.zero_grad()
        losses.append(step(token, target))
        optimizer.step()
    return losses

def alone(model):
    def step(token, target):
        output = model(token, target)
        output.loss.backward()
        return output.loss.item()
    return step

def together(cut):
    def step(token, target):
        output = cut(token, target)
        output.loss.backward()
        if isinstance(cut, ContextParallel):
            average_gradients(cut)
        return output.cross_entropy.item()
    return step

expected = decoder()
found["alone"] = curve(expected, alone(expected))
for layout, scheme in (("zigzag", "token_ring"), ("stripe", "ring"), ("contiguous", "auto")):
    model = decoder()
    found[f"{layout} {scheme}"] = curve(model, together(ContextParallel(model, layout=layout, scheme=scheme)))
model = decoder()
found["replicas"] = curve(model, together(DistributedDataParallel(ContextParallel(model))))
found["weights"] = max(float((one - other).abs().max()) for one, other in zip(model.parameters(), expected.parameters()))

# Windows and sinks, at a length that is no multiple.
for name, attention in (("window", {"window": 5}), ("sinks", {"sinks": True})):
    model = decoder(**attention)
    token, target = next(batches(13, 1))
    logits = ContextParallel(model)(token).logits_BLV
    found[name] = float((logits - model(token).logits_BLV).abs().max())

# Generation: the prompt at once, and in chunks; each rank has its share of the positions.
model = decoder()
token, _ = next(batches(13, 1))
cache, made = model.new_cache(64), []
with torch.no_grad():
    logits = model(token, cache=cache).logits_BLV[:, -1]
    for _ in range(5):
        made.append(logits.argmax(-1))
        logits = model(made[-1][:, None], cache=cache).logits_BLV[:, -1]
right = torch.stack(made, 1).tolist()
cut = ContextParallel(model)
found["generated"] = [cut.generate(token, 5).tolist() == right, cut.generate(token, 5, chunk=5).tolist() == right]
traffic = Traffic()
cut = ContextParallel(model, traffic=traffic)
cache = cut.new_cache()
cut.extend(token, cache)
traffic.sent = None
cut.extend(token[:, :1], cache)
found["decoded bytes"] = traffic.size_bytes
found["rows"] = cache.placement.rows

"""

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
MODELS
# Nobody comes: the last rank makes no call.
if rank < world - 1:
    says(lambda: ring_attention(q, q, q, timeout_s=0.3, check=False))
else:
    time.sleep(1.0)
found["nobody came"] = said[4:]
print(json.dumps(found))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(
    scope="module", params=[(2, 13, 6), pytest.param((4, 37, 12), marks=pytest.mark.slow)], ids=["2 ranks", "4 ranks"]
)
def ran(request, tmp_path_factory):
    """What each rank found."""
    world, length, steps = request.param
    told = f"TESTS, LENGTH, STEPS = {str(Path(__file__).resolve().parents[2])!r}, {length}, {steps}\n"
    script = SCRIPT.replace("\nMODELS\n", MODELS)
    return [json.loads(printed) for printed in run_ranks(told + script, tmp_path_factory.mktemp("ranks"), world)]


def test_outputs_and_gradients_are_those_of_one_process(ran):
    cases = [(case, result) for rank in ran for case, result in rank.items() if isinstance(result, dict)]
    assert len(cases) == 3 * (len(SCHEMES) + 1) * len(ran)
    for case, result in cases:
        assert result["errors"][0] <= 1e-12, case
        assert max(result["errors"][1:]) <= 1e-11, case


def test_bytes_are_those_of_the_plan(ran):
    for kind, causal in (("contiguous", False), ("zigzag", True), ("stripe", True)):
        planned = plan_attention(32, len(ran), 4, 2, 8, torch.float64, batch=2, causal=causal, layout=kind)
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
            "InputError: rank 0 was given what it cannot work on"
            if number
            else "InputError: the shapes are query [4, 2, 8]"
        )


def test_a_rank_that_does_not_come_is_named(ran):
    """By those that wait for it; in time, and not when the group gives up."""
    last = len(ran) - 1
    waiting = [rank["nobody came"][0] for rank in ran[:last]]
    assert any(said.startswith(f"PeerError: rank {last} did not") for said in waiting)
    assert all(said.startswith("PeerError: rank ") for said in waiting)


def test_the_cases_are_not_all_alike():
    """The reference of the script is the one of this file."""
    *leaves, _ = drawn(2, 32, 4, 2, 8)
    assert not torch.equal(naive(*leaves, causal=True), naive(*leaves))
    assert len(SCHEMES) == 4


@pytest.mark.parametrize("case", ["zigzag token_ring", "stripe ring", "contiguous auto", "replicas"])
def test_a_loss_curve_is_that_of_one_process(ran, case):
    for rank in ran:
        differences = [abs(one - other) for one, other in zip(rank[case], rank["alone"], strict=True)]
        assert max(differences) <= 1e-5


def test_weights_stay_equal(ran):
    assert all(rank["weights"] <= 1e-4 for rank in ran)


@pytest.mark.parametrize("case", ["window", "sinks"])
def test_logits_are_those_of_one_process(ran, case):
    assert all(rank[case] <= 1e-5 for rank in ran)


def test_generation_is_that_of_one_process(ran):
    assert all(rank["generated"] == [True, True] for rank in ran)


def test_decoding_sends_partial_results_alone(ran):
    """Of 2 layers, 2 sequences, 4 heads: 4 numbers and the sum of a softmax, to each other rank."""
    for rank in ran:
        assert rank["decoded bytes"] == 2 * 2 * 4 * (4 + 1) * 4 * (len(ran) - 1)


def test_each_rank_holds_its_share(ran):
    assert all(max(rank["rows"]) - min(rank["rows"]) <= 1 for rank in ran)
