"""What is tried on a GPU: each check computes on it, compares with what is certain, and gives one figure.

Every check takes the device, so that all but its speed can be tried on a CPU; what is made for GPUs alone has its counterpart there.
"""
# Shapes: B sequences, T tokens, L positions, V vocabulary

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.lm import Decoder
from anabranch.nn import BuildContext, ForwardContext, MoE
from anabranch.routing import Router, TopK


class WrongError(Exception):
    """A result differs from what it should be."""


def matmul(device: str) -> str:
    """Products of square bfloat16 matrices, and copies of the memory: what a figure below may be held against."""
    side = 8192 if _is_gpu(device) else 256
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    expected = a[:4].double() @ b.double()
    _close("the product", (a @ b)[:4], expected, 2e-2)
    seconds = _seconds(lambda: a @ b, device)
    copied = _seconds(lambda: b.copy_(a), device)
    return f"{2 * side**3 / seconds / 1e12:,.1f} TFLOP/s bf16, {2 * a.nbytes / copied / 1e9:,.0f} GB/s"


def moe_layer(device: str) -> str:
    """A mixture-of-experts layer: outputs and gradients of the CPU, then the time of forward and backward in bfloat16."""
    tokens, experts, top_k, dim, hidden = (8192, 64, 8, 1024, 512) if _is_gpu(device) else (32, 8, 2, 32, 16)
    layer = _layer(experts, top_k, dim, hidden)
    x, dy = torch.randn(2, 1, min(tokens, 512), dim)
    expected, found = _forward_backward(layer, x, dy, "cpu"), _forward_backward(layer, x, dy, device)
    for name, ours, theirs in zip(("y", "dx", "dw13", "dw2"), found, expected, strict=True):
        _close(name, ours, theirs, 1e-3)
    layer = layer.to(device, torch.bfloat16)
    x = torch.randn(1, tokens, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    context = _context(x)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x, context).sum().backward()

    seconds = _seconds(step, device)
    flops = 3 * 2 * tokens * top_k * 3 * dim * hidden
    return f"{1e3 * seconds:.2f} ms for {tokens:,} tokens, {flops / seconds / 1e12:,.1f} TFLOP/s"


def train(device: str) -> str:
    """Training steps: the loss falls, the first loss is that of the CPU; tokens a second in bfloat16."""
    from anabranch.data import DataConfig, Files
    from anabranch.train import Constant, RunConfig, TrainConfig, Trainer

    is_gpu = _is_gpu(device)
    batch, length, steps = (32, 512, 30) if is_gpu else (4, 32, 12)
    # Small enough that its checkpoints are written in a moment.
    model = _model(dim=512, layers=8, experts=8) if is_gpu else _model(dim=32, layers=2, experts=4)
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("The river leaves its bed, and one day it is back. " * (20_000 if is_gpu else 2000))

        def run(place: str, steps: int, precision: Any) -> list[dict[str, Any]]:
            config = RunConfig(
                model=model.config,
                data=DataConfig(
                    corpus=Files.Config(paths=(str(text),)), sequence_length=length, validation_fraction=0.1
                ),
                train=TrainConfig(
                    steps=steps,
                    batch_size=batch,
                    learning_rate=1e-3,
                    schedule=Constant.Config(warmup=0),
                    precision=precision,
                    device=place,
                    eval_every=10**6,
                    eval_tokens=length,
                    log_every=1,
                ),
            )
            out = Path(tempfile.mkdtemp(dir=folder)) / "run"
            Trainer(config, out).fit()
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            return [line for line in lines if "loss" in line]

        for place in ("cpu", device):
            first[place] = run(place, 1, "float32")[0]["loss"]
        records = run(device, steps, "bfloat16" if is_gpu else "float32")
    if not math.isclose(first["cpu"], first[device], rel_tol=1e-3):
        raise WrongError(f"the first loss is {first[device]:.5f}, on the CPU {first['cpu']:.5f}")
    begin, end = records[0]["loss"], records[-1]["loss"]
    if not end < begin - 0.2:
        raise WrongError(f"the loss went from {begin:.3f} to {end:.3f} in {steps} steps")
    rates = sorted(record["tokens_per_second"] for record in records if record.get("tokens_per_second"))
    return f"{rates[len(rates) // 2]:,.0f} tokens/s, loss {begin:.2f} to {end:.2f}"


def decode(device: str) -> str:
    """Generation: logits of the CPU, the same with a cache as without, then new tokens a second of a batch."""
    from anabranch.lm import SamplingConfig, generate

    is_gpu = _is_gpu(device)
    model = (_model(dim=512, layers=8, experts=32) if is_gpu else _model(dim=32, layers=2, experts=4)).eval()
    token_BL = torch.randint(257, (4, 24))
    with torch.inference_mode():
        expected = model(token_BL).logits_BLV
        model = model.to(device)
        found = model(token_BL.to(device)).logits_BLV
        _close("logits", found, expected, 1e-3)
        cache = model.new_cache(24)
        pieces = [model(part.to(device), cache=cache).logits_BLV for part in token_BL.split(8, dim=1)]
        _close("logits with a cache", torch.cat(pieces, 1), expected, 1e-3)
    model = model.to(torch.bfloat16) if is_gpu else model
    prompts, new = token_BL.tolist() * (8 if is_gpu else 1), 128 if is_gpu else 8
    config = SamplingConfig(max_tokens=new, temperature=0.0)
    generate(model, prompts, config.replace(max_tokens=2))
    begin = time.perf_counter()
    made = sum(map(len, generate(model, prompts, config)))
    return f"{made / (time.perf_counter() - begin):,.0f} tokens/s, {len(prompts)} sequences"


def expertflow(device: str) -> str:
    """Experts that come when they are wanted, from pinned memory: outputs of the whole model, hits, tokens a second."""
    from anabranch.serving.expertflow import offload

    is_gpu = _is_gpu(device)
    model = (_model(dim=512, layers=8, experts=32) if is_gpu else _model(dim=32, layers=2, experts=4)).eval().to(device)
    token_BL = torch.randint(257, (2, 16), device=device)
    with torch.inference_mode():
        expected = model(token_BL).logits_BLV.clone()
        size = sum(weight.nbytes for name, weight in model.named_parameters() if "experts" in name)
        with offload(model, size // 2) as engine:
            _close("logits", engine.model(token_BL).logits_BLV, expected, 1e-3)
            tokens = torch.randint(257, (64 if is_gpu else 4, 1, 1), device=device)
            _wait(device)
            begin = time.perf_counter()
            for token in tokens:
                engine.model(token)
            _wait(device)
            seconds = time.perf_counter() - begin
            tier, hits = type(engine.mover.tier).__name__, engine.cache.total().hit_rate
    if is_gpu and tier != "CudaTier":
        raise WrongError(f"the experts came from {tier}, not from CudaTier")
    return f"{len(tokens) / seconds:,.0f} tokens/s from half the experts, {hits:.0%} hits ({tier})"


def elasticmoe(device: str) -> str:
    """The memory of elastic serving, by the driver's own calls: bytes where they belong, blocks mapped and moved, reading."""
    from anabranch.serving.elasticmoe.cuda import CudaBackend
    from anabranch.serving.elasticmoe.dlpack import tensor_over
    from anabranch.serving.elasticmoe.mapped import HOST

    is_gpu = _is_gpu(device)
    backend = CudaBackend() if is_gpu else HOST
    count = 64 if is_gpu else 4
    block = 4 * max(backend.page, 1 << 21)
    pages = backend.pages(0, "check", count * block, range(0, count * block, block))
    part = backend.range(0, count, block)
    try:
        with tempfile.TemporaryFile() as file:
            for number in range(count):
                file.write(bytes([number + 1]) * block)
            file.flush()
            begin = time.perf_counter()
            pages.read(0, file.fileno(), 0, count * block)
            read = time.perf_counter() - begin
        begin = time.perf_counter()
        part.remap(pages, range(0, count * block, block))
        mapped = time.perf_counter() - begin
        order = list(reversed(range(count)))
        part.remap(pages, [number * block for number in order])
        seen = tensor_over(part.address, count * block, part.place).view(count, block)
        for slot, number in enumerate(order):
            if not bool((seen[slot] == number + 1).all()):
                raise WrongError(f"slot {slot} does not show block {number}")
        del seen
    finally:
        part.close()
        pages.close()
    return (
        f"{count * block / read / 1e9:.1f} GB/s read, {1e6 * mapped / count:.0f} us to map a block of {block >> 20} MiB"
    )


def nanoflow(device: str) -> str:
    """Nano-batches on a stream for each resource: logits of the whole batch, and both times."""
    from anabranch.serving.core.batch import Chunk
    from anabranch.serving.engine.runner import ModelRunner
    from anabranch.serving.engine.verify import sampled_rows
    from anabranch.serving.nanoflow.execute import Sequential, Streams
    from anabranch.serving.nanoflow.runtime import NanoRunner

    is_gpu = _is_gpu(device)
    model = (_model(dim=1024, layers=8, experts=8) if is_gpu else _model(dim=32, layers=2, experts=4)).eval().to(device)
    sequences, length = (32, 128) if is_gpu else (4, 12)
    blocks = -(-length // 16) + 1
    chunks = [
        Chunk(
            id=str(number),
            tokens=tuple((7 * number + 3 * at) % 257 for at in range(length)),
            start=0,
            blocks=tuple(range(blocks * number, blocks * number + blocks)),
            samples=True,
        )
        for number in range(sequences)
    ]
    tokens = [token for chunk in chunks for token in chunk.tokens]
    options: dict[str, Any] = {"num_blocks": blocks * sequences, "block_tokens": 16}
    whole = ModelRunner(model, **options)
    nano = NanoRunner(model, executor=Streams() if is_gpu else Sequential(), min_tokens=2, tile=1, **options)
    rows = sampled_rows(chunks)
    with torch.inference_mode():
        ours, theirs = (runner._head.plain(runner._hidden(chunks, tokens, rows)) for runner in (nano, whole))
        _close("logits", ours, theirs, 1e-3)
        times = [
            _seconds(lambda runner=runner: runner._head.plain(runner._hidden(chunks, tokens, rows)), device)  # type: ignore[misc]
            for runner in (whole, nano)
        ]
    return f"{1e3 * times[1]:.2f} ms, in one piece {1e3 * times[0]:.2f} ms"


def graphs(device: str) -> str:
    """Sparse products and skip-gram training of graphs: vectors of the CPU."""
    import numpy as np

    from anabranch.graph import FastRP, Graph, GraphVite

    nodes, edges = (200_000, 2_000_000) if _is_gpu(device) else (200, 1000)
    generator = np.random.default_rng(0)
    pairs = generator.integers(nodes, size=(edges, 2))
    graph = Graph.from_edges(pairs[:, 0], pairs[:, 1])
    expected = FastRP(32, seed=1).fit_transform(graph)
    begin = time.perf_counter()
    found = FastRP(32, seed=1, backend="torch", device=device).fit_transform(graph)
    seconds = time.perf_counter() - begin
    _close("vectors", torch.from_numpy(found), torch.from_numpy(expected), 1e-3)
    few = Graph.from_edges(*generator.integers(500, size=(2, 2000)))
    vectors = GraphVite(dim=16, epochs=1, executor="torch", device=device).fit(few).vertex_ND
    if not np.isfinite(vectors).all():
        raise WrongError("GraphVite gave vectors that are not finite")
    return f"FastRP {edges / seconds / 1e6:,.1f} M edges/s"


CHECKS: dict[str, Callable[[str], str]] = {
    check.__name__: check for check in (matmul, moe_layer, train, decode, expertflow, elasticmoe, nanoflow, graphs)
}


def _layer(experts: int, top_k: int, dim: int, hidden: int) -> Any:
    torch.manual_seed(0)
    router = Router.Config(select=TopK.Config(top_k=top_k), balance=())
    return MoE.Config(num_experts=experts, hidden_dim=hidden, router=router).build(BuildContext(dim=dim))


def _model(dim: int, layers: int, experts: int) -> Decoder:
    torch.manual_seed(0)
    router = Router.Config(select=TopK.Config(top_k=2))
    moe = MoE.Config(num_experts=experts, hidden_dim=dim, router=router)
    return Decoder.Config(dim=dim, num_layers=layers, feed_forward=moe).build(seed=0)


def _context(x_BLD: Tensor) -> ForwardContext:
    position_BL = torch.arange(x_BLD.shape[1], device=x_BLD.device).unsqueeze(0)
    return ForwardContext(position_BL=position_BL, rotary=(position_BL, position_BL))  # of no use to a layer


def _forward_backward(layer: Any, x: Tensor, dy: Tensor, device: str) -> list[Tensor]:
    """Output, and gradients of input and experts."""
    layer = copy.deepcopy(layer).to(device)
    x = x.to(device).requires_grad_()
    y = layer(x, _context(x))
    return [y.detach(), *torch.autograd.grad(y, [x, layer.experts.w13, layer.experts.w2], dy.to(device))]


def _close(what: str, found: Tensor, expected: Tensor, allowed: float) -> None:
    """The relative error of the median row: a few tokens near a tie may go to another expert on another device."""
    ours, theirs = (each.detach().double().cpu().reshape(-1, each.shape[-1]) for each in (found, expected))
    if not bool(ours.isfinite().all()):
        raise WrongError(f"{what} is not finite")
    error = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-12)).median().item()
    if not error <= allowed:
        raise WrongError(f"{what} differs by {error:.1e}, more than {allowed:.0e}")


def _seconds(work: Callable[[], Any], device: str) -> float:
    """Median seconds of one call, after three to warm up."""
    times = []
    for turn in range(13 if _is_gpu(device) else 4):
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        if turn >= 3:
            times.append(time.perf_counter() - begin)
    return max(sorted(times)[len(times) // 2], 1e-9)


def _wait(device: str) -> None:
    if _is_gpu(device):
        torch.cuda.synchronize(device)


def _is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"
