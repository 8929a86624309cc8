"""What each of several processes does in the tests of attention over ranks; `tests/cluster/ring/test_processes.py` asks for it."""
# Shapes: B sequences, S positions, H query heads, G key heads, D head width

import random
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from anabranch.cluster import ring_attention, token_ring_attention
from anabranch.cluster.ring import (
    SCHEMES,
    ContextParallel,
    Layout,
    Topology,
    Traffic,
    average_gradients,
    context_parallel_attention,
    measure_topology,
    placed_attention,
    plan_attention,
    simulated_attention,
)
from anabranch.errors import AnabranchError
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import SelfAttention, SwiGLU
from naive_attention import drawn, naive

CASES = (("contiguous", False), ("zigzag", True), ("stripe", True))


def gathered(layout: Layout, part: Tensor) -> Tensor:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(layout.world)]
    dist.all_gather(parts, part.contiguous())
    return layout.unshard(parts)


def attention(rank: int, world: int) -> dict[str, dict[str, Any]]:
    """By case: largest errors of outputs and gradients against one process, and bytes sent."""
    found = {}
    for kind, causal in CASES:
        layout = Layout(kind, world, 32)
        *whole, dout = drawn(2, 32, 4, 2, 8)
        expected = naive(*whole, causal=causal)
        grads = torch.autograd.grad(expected, whole, dout)
        for scheme in (*SCHEMES, "auto"):
            parts = [layout.shard(part.detach(), rank).requires_grad_() for part in whole]
            traffic = Traffic()
            told = {"layout": kind, "scheme": scheme, "traffic": traffic, "timeout_s": 60}
            out = context_parallel_attention(*parts, None, causal, **told)
            size = traffic.size_bytes
            own = torch.autograd.grad(out, parts, layout.shard(dout, rank))
            pairs = zip((out, *own), (expected, *grads), strict=True)
            errors = [float((gathered(layout, part) - right).abs().max()) for part, right in pairs]
            found[f"{kind} {causal} {scheme}"] = {"errors": errors, "bytes": size}
    return found


def late(rank: int, world: int) -> tuple[bool, float]:
    """Whether ranks that are late as they like give the same bits, and how far the two schemes are apart."""
    *whole, _ = drawn(1, 24, 2, 2, 8, torch.float32)
    layout = Layout("zigzag", world, 24)
    parts = [layout.shard(part.detach(), rank) for part in whole]
    draw, bits = random.Random(rank), []
    for _ in range(3):
        time.sleep(0.05 * draw.random())
        bits.append(token_ring_attention(*parts, causal=True, layout="zigzag"))
    other = ring_attention(*parts, causal=True, layout="zigzag")
    return all(torch.equal(one, bits[0]) for one in bits), float((other - bits[0]).abs().max())


def says(call: Any) -> str:
    try:
        call()
    except AnabranchError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# By name: what rank 0 and what the others are given beside the tensors. None of them may begin to wait for messages of attention.
DIFFERING = {
    "schemes": ({"scheme": "ring"}, {"scheme": "token_ring"}),
    "causal": ({"causal": True}, {"causal": False}),
    "windows": ({"causal": True, "window": 2}, {"causal": True}),
    "layouts": ({"layout": "zigzag"}, {"layout": "stripe"}),
    "a window below 1": ({"causal": True}, {"causal": True, "window": -1}),
    "a layout that is none": ({"layout": "zigzag"}, {"layout": "zig"}),
    "a length": ({"length": 7}, {}),
    "a length that is none": ({"length": 7}, {"length": "a"}),
    "documents": ({"documents": (0, 3, 8)}, {"documents": (0, 4, 8)}),
    "long documents": ({"documents": range(400)}, {"documents": (*range(399), 400)}),
    "documents longer than is sent": ({"documents": range(40_000)}, {"documents": (*range(39_999), 40_000)}),
    "documents that cannot be read": ({}, {"documents": ("a",)}),
    "documents that are no list": ({}, {"documents": 3}),
    "scales": ({"softmax_scale": 0.5}, {"softmax_scale": 0.25}),
    "a scale that is none": ({"softmax_scale": 0.5}, {"softmax_scale": "a"}),
    "a scale that is not a number": ({"softmax_scale": 0.5}, {"softmax_scale": float("nan")}),
    "an option that is none": ({}, {"scal": 1.0}),
    "a scheme that is none": ({}, {"scheme": "star"}),
    "types of results": ({"out_dtype": torch.float32}, {}),
    "a type that is none": ({}, {"out_dtype": "float32"}),
    "links": ({"topology": Topology("ring")}, {"topology": Topology()}),
    "links that are none": ({}, {"topology": "ring"}),
    "a time that is none": ({}, {"timeout_s": "soon"}),
    "a counter that is none": ({}, {"traffic": 1}),
}


def differing(rank: int, world: int) -> dict[str, str]:
    """What is said where ranks are given different things, and where one is given what cannot be."""
    q = torch.zeros(1, 4, 2, 8)
    asks = q.clone().requires_grad_()
    eighths = [q.to(torch.float8_e4m3fn)] * 3
    placed = Layout("zigzag", world, 4 * world).placement
    other = Layout("stripe", world, 4 * world).placement
    more = Layout("zigzag", world + 1, 4 * world + 4).placement
    return {
        "lengths of ranks": says(lambda: ring_attention(torch.zeros(1, 4 + 2 * rank, 2, 8), q, q)),
        "a shape": says(lambda: ring_attention(q if rank else q[0], q, q)),
        "no tensor": says(lambda: ring_attention(q if rank else 3, q, q)),
        "a type of 8 bits": says(lambda: ring_attention(*([q] * 3 if rank else eighths))),
        "placements": says(lambda: placed_attention(q, q, q, other if rank else placed, placed)),
        "no placement": says(lambda: placed_attention(q, q, q, placed, placed if rank else None)),
        "no placements": says(lambda: placed_attention(q, q, q, *((placed, placed) if rank else (None, None)))),
        "a placement on other ranks": says(lambda: placed_attention(q, q, q, placed if rank else more, placed)),
        "types": says(lambda: ring_attention(*[q.double() if rank else q] * 3)),
        "gradients": says(lambda: context_parallel_attention(q if rank else asks, q, q)),
        "a function and a scheme": says(lambda: token_ring_attention(q, q, q, **({"scheme": "ring"} if rank else {}))),
        **{
            name: says(lambda told=told: context_parallel_attention(q, q, q, **told[min(rank, 1)]))
            for name, told in DIFFERING.items()
        },
        # They understand each other afterwards.
        "nothing": says(lambda: ring_attention(q, q, q)),
    }


def measured(rank: int, world: int) -> tuple[Any, str]:
    """What links and ranks were measured to be, and what `auto` takes for it."""
    topology = measure_topology(size_bytes=1 << 16, repeats=1)
    q = torch.zeros(1, 8, 4, 8)
    context_parallel_attention(q, q, q, topology=topology)
    return topology, plan_attention(8 * world, world, 4, 4, 8, torch.float32, topology=topology).choice


def outside(rank: int, world: int) -> str:
    """What is said where a process is not in the group."""
    group = dist.new_group([0])
    q = torch.zeros(1, 4, 2, 8)
    return says(lambda: ring_attention(q, q, q, group))


def grid(rank: int, world: int) -> dict[str, Any]:
    """Two rings of two ranks that cut heads between them: errors against one process, and what is said of a rank with another shape."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ring", "heads"))
    found: dict[str, Any] = {}
    for kind, causal, heads, groups in (("zigzag", True, 4, 4), ("contiguous", False, 4, 1), ("stripe", True, 4, 2)):
        layout = Layout(kind, world, 27, (0, 11, 27))
        *whole, dout = drawn(2, 27, heads, groups, 8)
        expected = naive(*whole, causal=causal, documents=(0, 11, 27))
        grads = torch.autograd.grad(expected, whole, dout)
        for scheme in ("token_ring", "auto"):
            parts = [layout.shard(part.detach(), rank).requires_grad_() for part in whole]
            told = {"layout": kind, "scheme": scheme, "length": 27, "documents": (0, 11, 27)}
            out = context_parallel_attention(*parts, mesh, causal, **told)
            own = torch.autograd.grad(out, parts, layout.shard(dout, rank))
            pairs = zip((out, *own), (expected, *grads), strict=True)
            found[f"{kind} {scheme}"] = [float((gathered(layout, part) - right).abs().max()) for part, right in pairs]
    q = torch.zeros(1, 4, 4, 8)
    odd = q[..., :4] if rank == 1 else q
    found["said"] = [
        says(lambda: ring_attention(odd, odd, odd, mesh)),
        says(lambda: ring_attention(q[:, :, :1], q[:, :, :1], q[:, :, :1], mesh)),
    ]
    # The last rank alone is given another thing, or what cannot be.
    others: tuple[dict[str, Any], ...] = (
        {"causal": True},
        {"documents": ("a",)},
        {"scal": 1.0},
        {"layout": "zig"},
        {"length": 7},
    )
    for told in others:
        found["said"].append(
            says(lambda told=told: context_parallel_attention(q, q, q, mesh, **(told if rank == 3 else {})))
        )
    longer = torch.zeros(1, 6, 4, 8) if rank == 3 else q
    found["said"].append(says(lambda: ring_attention(longer, longer, longer, mesh)))
    return found


def alone(rank: int, world: int) -> str:
    """What is said where the last rank does not come."""
    q = torch.zeros(1, 4, 2, 8)
    store = dist.distributed_c10d._get_default_store()
    if rank == world - 1:
        store.wait(["said"])
        return "was away"
    said = says(lambda: ring_attention(q, q, q, timeout_s=0.2, check=False))
    store.set("said", "it")
    return said


def gone(rank: int, world: int) -> str:
    """What is said where the last rank's process ends in the midst of it: the test kills it."""
    q = torch.zeros(1, 4, 2, 8)
    said = says(lambda: ring_attention(q, q, q))
    print(said, flush=True)
    if rank == world - 1:
        time.sleep(60)
    return says(lambda: ring_attention(q, q, q))


def decoder(**attention: Any) -> Decoder:
    return Decoder.Config(
        vocab_size=19,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, **attention),
        feed_forward=SwiGLU.Config(hidden_dim=24),
    ).build(seed=3)


def batches(length: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    found = [torch.randint(0, 19, (2, length + 1), generator=generator) for _ in range(steps)]
    return [(token[:, :-1], token[:, 1:]) for token in found]


def curve(model: torch.nn.Module, length: int, steps: int) -> list[float]:
    """Losses of a training; of `ContextParallel` the mean over ranks."""
    # At ten times the rate what is rounded otherwise grows to 1e-4 in 50 steps, and in float64 to nothing.
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for token, target in batches(length, steps):
        optimizer.zero_grad()
        output = model(token, target)
        output.loss.backward()
        if isinstance(model, ContextParallel):
            average_gradients(model)
        losses.append(float(output.cross_entropy))
        optimizer.step()
    return losses


def training(rank: int, world: int, length: int, steps: int) -> tuple[dict[str, list[float]], float]:
    """Loss curves, the first over all steps and others over a few, and how far weights are from those of one process in the end."""
    expected, model = decoder(), decoder()
    found = {"alone": curve(expected, length, steps)}
    found["replicas"] = curve(DistributedDataParallel(ContextParallel(model, scheme="token_ring")), length, steps)
    for layout, scheme in (("zigzag", "token_ring"), ("stripe", "ring"), ("contiguous", "auto")):
        cut = ContextParallel(decoder(), layout=layout, scheme=scheme)
        found[f"{layout} {scheme}"] = curve(cut, length, min(steps, 10))
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return found, max(float((one - other).detach().abs().max()) for one, other in pairs)


def logits(rank: int, world: int) -> dict[str, float]:
    """How far logits are from those of one process, at a length that is no multiple."""
    found = {}
    token, _ = batches(13, 1)[0]
    for name, attention in (("window", {"window": 5}), ("sinks", {"sinks": True}), ("own rotary", {"scale": 0.3})):
        model = decoder(**attention)
        difference = ContextParallel(model)(token).logits_BLV - model(token).logits_BLV
        found[name] = float(difference.detach().abs().max())
    return found


def generation(rank: int, world: int) -> dict[str, Any]:
    """Tokens of one process and over a cut cache, the prompt at once and in chunks; what a decoded token sends; who holds what."""
    model = decoder()
    token, _ = batches(13, 1)[0]
    cache, made = model.new_cache(64), []
    with torch.no_grad():
        scores = model(token, cache=cache).logits_BLV[:, -1]
        for _ in range(5):
            made.append(scores.argmax(-1))
            scores = model(made[-1][:, None], cache=cache).logits_BLV[:, -1]
    traffic = Traffic()
    cut = ContextParallel(model, traffic=traffic)
    found: dict[str, Any] = {"alone": torch.stack(made, 1).tolist()}
    found["whole"] = cut.generate(token, 5).tolist()
    found["chunks"] = cut.generate(token, 5, chunk=5).tolist()
    config = SamplingConfig(max_tokens=5, temperature=1.0)
    found["sampled"] = [generate(one, token.tolist(), config) for one in (model, cut)]
    store = cut.new_cache()
    cut.extend(token, store)
    traffic.sent = None
    cut.extend(token[:, :1], store)
    return {**found, "bytes": traffic.size_bytes, "rows": store.placement.rows}


def everything(rank: int, world: int, length: int, steps: int) -> dict[str, Any]:
    """All of it but `alone`, in processes that are started once."""
    return {
        "attention": attention(rank, world),
        "late": late(rank, world),
        "differing": differing(rank, world),
        "outside": outside(rank, world),
        "measured": measured(rank, world),
        "training": training(rank, world, length, steps),
        "logits": logits(rank, world),
        "generation": generation(rank, world),
    }


def nodes(rank: int, world: int) -> tuple[list[float], bool]:
    """TokenRing inside two nodes: largest errors against one process, and whether bytes are those of simulated ranks."""
    layout = Layout("zigzag", world, 32)
    *whole, dout = drawn(2, 32, 4, 2, 8)
    expected = naive(*whole, causal=True)
    grads = torch.autograd.grad(expected, whole, dout)
    parts = [layout.shard(part.detach(), rank).requires_grad_() for part in whole]
    told: dict[str, Any] = {"layout": "zigzag", "scheme": "hybrid", "topology": Topology(node_size=world // 2)}
    traffic, simulated = Traffic(), Traffic()
    out = context_parallel_attention(*parts, None, True, traffic=traffic, timeout_s=60, **told)
    own = torch.autograd.grad(out, parts, layout.shard(dout, rank))
    errors = [
        float((gathered(layout, part) - right).abs().max())
        for part, right in zip((out, *own), (expected, *grads), strict=True)
    ]
    made = simulated_attention(*whole, world, True, traffic=simulated, **told)
    torch.autograd.grad(made, whole, dout)
    assert traffic.sent is not None
    assert simulated.sent is not None
    return errors, bool((traffic.sent.bytes_RR[rank] == simulated.sent.bytes_RR[rank]).all())
