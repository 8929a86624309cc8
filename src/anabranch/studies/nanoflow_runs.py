"""The runs of the study of NanoFlow (`anabranch.studies.nanoflow`): a config and a function for each part."""

import gzip
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from anabranch import machine
from anabranch.config import Config, configclass
from anabranch.lm import Decoder
from anabranch.nn import SwiGLU
from anabranch.nn.attention import SelfAttention
from anabranch.places import data_file
from anabranch.serving.core.batch import Batch, Chunk, Sampled
from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.engine.llm import LLM
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.nanoflow.execute import Sequential, Threads
from anabranch.serving.nanoflow.runtime import NanoRunner
from anabranch.serving.planning.cost import Workload, estimate
from anabranch.serving.planning.graph import LayerGraph, Operation
from anabranch.serving.planning.hardware import find_hardware
from anabranch.serving.planning.interference import PAPER_POINTS, PAPER_TABLE, ShareTable
from anabranch.serving.planning.search import search
from anabranch.serving.planning.shape import find_shape
from anabranch.serving.planning.simulate import Schedule
from anabranch.studies.harness import Metrics, Progress
from anabranch.studies.reading import TRACE


@configclass
class Search(Config):
    """E1: one model on the paper's devices."""

    model: str
    devices: int
    dense_batch: int
    evaluations: int


@configclass
class Model(Config):
    """Shape of what is timed."""

    num_layers: int = 30
    dim: int = 576
    hidden_dim: int = 1536
    num_heads: int = 9
    num_kv_heads: int = 3
    vocab_size: int = 49152

    def decoder(self) -> Decoder:
        """Random weights."""
        attention = SelfAttention.Config(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        return Decoder.Config(
            vocab_size=self.vocab_size,
            dim=self.dim,
            num_layers=self.num_layers,
            attention=attention,
            feed_forward=SwiGLU.Config(hidden_dim=self.hidden_dim),
            tie_embeddings=True,
        ).build(seed=0)


@configclass
class Async(Config):
    """E2."""

    model: Model
    num_requests: int
    max_prompt: int
    max_output: int
    rounds: int


@configclass
class Overlap(Config):
    """E3: ``what`` beside products of ``rows`` rows."""

    what: Literal["attention", "disk", "dequant"]
    size_mb: int
    rows: int
    rounds: int


@configclass
class Nano(Config):
    """E4: steps of so many decodes and prompt tokens."""

    model: Model
    num_decodes: int
    context: int
    num_prefills: int
    rounds: int


def run(config: Search | Async | Overlap | Nano, seed: int, progress: Progress) -> Metrics:
    """One arm of any part."""
    if isinstance(config, Search):
        return run_search(config, seed, progress)
    if isinstance(config, Async):
        return run_async(config, seed, progress)
    return run_overlap(config, seed) if isinstance(config, Overlap) else run_nano(config, seed)


# E1


def table_of(seed: int) -> ShareTable:
    """The paper's points; with a seed above 0 the inner ones moved by up to 5%."""
    if seed == 0:
        return PAPER_TABLE
    draw = np.random.default_rng(seed)
    points = {
        name: tuple(
            (share, speed if speed in (0.0, 1.0) else min(speed * float(draw.uniform(0.95, 1.05)), 1.0))
            for share, speed in of
        )
        for name, of in PAPER_POINTS.items()
    }
    return ShareTable(points, source=f"paper, moved by seed {seed}")


def run_search(config: Search, seed: int, progress: Progress) -> Metrics:
    """Ratios to one after the other, each of a search of its own; the share of the optimum that is reached."""
    model, hardware = find_shape(config.model), find_hardware("a100", config.devices)
    workload = Workload(prompt=512, output=1024, dense_batch=config.dense_batch)
    kinds: dict[str, tuple[str, ...]] = {
        "full": ("memory", "network"),
        "no_network": ("memory",),
        "no_memory": ("network",),
    }
    if config.devices == 1:
        kinds = {"full": ("memory",)}
    found: Metrics = {}
    for name, overlap in kinds.items():
        progress(name)
        pipeline = search(
            model,
            hardware,
            workload,
            table=table_of(seed),
            evaluations=config.evaluations,
            budget_s=3600,
            overlap=overlap,
        )
        found[name] = pipeline.speedup
        if name == "full":
            found["split_only"] = pipeline.sequential_s / pipeline.split_s
            rate = config.dense_batch / (pipeline.period_s * model.num_layers)
            found["tokens_s"] = rate / config.devices
            found["of_optimum"] = rate / estimate(model, hardware, workload).optimal_tokens_s
            found["is_complete"] = pipeline.is_complete
            found["pipeline"] = {
                name: value for name, value in pipeline.to_dict().items() if name in ("form", "cuts", "order", "shares")
            }
    return found


# E2


class Gaps:
    """A step hook: seconds between the ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def before_step(self, batch: Batch, tokens: Sequence[int]) -> None:
        """Nothing."""

    def after_step(self, batch: Batch, sampled: Sequence[Sampled]) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def close(self) -> None:
        """Nothing."""

    def p99_ms(self) -> float:
        """The 99th percentile."""
        return 1e3 * float(np.percentile(np.diff(self.ends), 99)) if len(self.ends) > 1 else 0.0


def lengths(count: int, max_prompt: int, max_output: int, seed: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of requests that follow each other in the trace, cut to the limits."""
    with gzip.open(data_file(TRACE), "rt") as file:
        rows = [line.rstrip("\n").split(",") for line in file][1:]
    start = int(np.random.default_rng(seed).integers(0, len(rows) - count))
    return [
        (min(int(prompt), max_prompt), max(min(int(output), max_output), 1))
        for _, prompt, output in rows[start : start + count]
    ]


def run_async(config: Async, seed: int, progress: Progress) -> Metrics:
    """``ratio`` of tokens/s (medians over rounds that take turns), tokens/s and P99 gap of both; whether all tokens were equal."""
    model = config.model.decoder().eval()
    asked = lengths(config.num_requests, config.max_prompt, config.max_output, seed)
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(0, config.model.vocab_size, prompt).tolist() for prompt, _ in asked]
    sampling = [Sampling(max_tokens=output, temperature=0, ignore_eos=True) for _, output in asked]
    blocks = sum((prompt + output) // 16 + 2 for prompt, output in asked)
    rates: dict[str, list[float]] = {"sync": [], "async": []}
    gaps: dict[str, list[float]] = {"sync": [], "async": []}
    streams = []
    # The first warms up.
    for number in range(config.rounds + 1):
        for scheduling in rates:
            progress(f"round {number} of {config.rounds}, {scheduling}")
            hook = Gaps()
            llm = LLM(
                model,
                scheduling=scheduling,
                num_blocks=blocks,
                max_seqs=config.num_requests,
                prefix_cache=False,
                hooks=(hook,),
            )
            begin = time.perf_counter()
            answers = llm.generate(prompts, sampling)
            seconds = time.perf_counter() - begin
            streams.append([answer.tokens for answer in answers])
            if number:
                rates[scheduling].append(sum(len(answer.tokens) for answer in answers) / seconds)
                gaps[scheduling].append(hook.p99_ms())
    middle = {name: float(np.median(values)) for name, values in rates.items()}
    p99 = {name: float(np.median(values)) for name, values in gaps.items()}
    return {
        "ratio": middle["async"] / middle["sync"],
        "tokens_s": middle["async"],
        "tokens_s_sync": middle["sync"],
        "p99_gap_ms": p99["async"],
        "p99_gap_ms_sync": p99["sync"],
        "p99_gap_ratio": p99["async"] / p99["sync"] if p99["sync"] else None,
        "equal": all(stream == streams[0] for stream in streams),
    }


# E3


def run_overlap(config: Overlap, seed: int) -> Metrics:
    """``ratio``: time of one after the other, each on all cores, over that side by side; medians over rounds that take turns."""
    cores = machine.affinity()
    with tempfile.TemporaryDirectory(prefix="anabranch-overlap-") as folder, torch.inference_mode(), threads(cores):
        other = _OTHERS[config.what](config.size_mb << 20, Path(folder), seed)
        product = _products(config.rows, seed)
        other_s = _shortest(other, 2)
        repeats = max(round(other_s / max(_shortest(product, 3), 1e-6)), 1)

        def products() -> None:
            for _ in range(repeats):
                product()

        # A read waits for the disk and needs no core of its own; the others get one of them.
        given = cores if config.what == "disk" else max(cores - 1, 1)
        executor = Threads({"compute": given, "memory": 1})
        schedule = _side_by_side()
        apart, together = [], []
        for _ in range(config.rounds):
            begin = time.perf_counter()
            other()
            products()
            apart.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            executor.run(schedule, lambda layer, op: products() if op.op == "products" else other(), 1)
            together.append(time.perf_counter() - begin)
    middle = float(np.median(apart)), float(np.median(together))
    return {
        "ratio": middle[0] / middle[1],
        "apart_s": middle[0],
        "together_s": middle[1],
        "cores": cores,
        "repeats": repeats,
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads inside an operation, then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _side_by_side() -> Schedule:
    made = (Operation("products", "compute", 0, 1, (), float), Operation("other", "memory", 0, 1, (), float))
    return Schedule(LayerGraph(made, 1, (), ()).split(), (1, 0))


def _products(rows: int, seed: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(rows, 576, generator=generator)
    up_NK, down_KN = torch.randn(3072, 576, generator=generator), torch.randn(576, 1536, generator=generator)

    def work() -> Any:
        gate, up = F.linear(x_MK, up_NK).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down_KN)

    return work


def _attention(size: int, folder: Path, seed: int) -> Callable[[], Any]:
    batch, heads, width = 16, 3, 64
    length = max(size // (2 * batch * heads * width * 4), 16)
    query = torch.randn(batch, heads, 1, width)
    key, value = torch.randn(batch, heads, length, width), torch.randn(batch, heads, length, width)
    return lambda: F.scaled_dot_product_attention(query, key, value)


def _disk(size: int, folder: Path, seed: int) -> Callable[[], Any]:
    """Read a file that the system was asked to forget; where it cannot forget, a read is a copy and the record says so by its speed."""
    path = folder / "expert"
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    buffer = bytearray(size)

    def work() -> Any:
        os.posix_fadvise(handle, 0, size, os.POSIX_FADV_DONTNEED)
        done = 0
        view = memoryview(buffer)
        while done < size:
            done += os.preadv(handle, [view[done : done + (8 << 20)]], done)

    return work


def _dequant(size: int, folder: Path, seed: int) -> Callable[[], Any]:
    packed = torch.randint(-127, 128, (max(size // 4 // 1024, 1), 1024), dtype=torch.int8)
    scale = torch.rand(len(packed), 1)
    full = torch.empty(packed.shape)

    def work() -> Any:
        full.copy_(packed)
        return full.mul_(scale)

    return work


_OTHERS: dict[str, Callable[[int, Path, int], Callable[[], Any]]] = {
    "attention": _attention,
    "disk": _disk,
    "dequant": _dequant,
}


def _shortest(work: Callable[[], Any], times: int) -> float:
    best = float("inf")
    work()
    for _ in range(times):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


# E4


def run_nano(config: Nano, seed: int) -> Metrics:
    """``ratio``: time of a whole step over that of the same step in halves, one after the other; medians over rounds that take turns."""
    model = config.model.decoder().eval()
    per = (config.context + 1) // 16 + 1
    prompt_blocks = config.num_prefills // 16 + 1
    blocks = config.num_decodes * per + prompt_blocks
    draw = np.random.default_rng(seed)

    def chunk(number: int, first: int, count: int, start: int, length: int) -> Chunk:
        tokens = tuple(draw.integers(0, config.model.vocab_size, length).tolist())
        return Chunk(
            id=str(number), tokens=tokens, start=start, blocks=tuple(range(first, first + count)), samples=True
        )

    chunks = [chunk(number, number * per, per, config.context, 1) for number in range(config.num_decodes)]
    if config.num_prefills:
        chunks.append(chunk(len(chunks), config.num_decodes * per, prompt_blocks, 0, config.num_prefills))
    greedy = Sampling(temperature=0)
    first = Batch(
        step=0,
        chunks=tuple(chunks),
        new=tuple(Request(id=each.id, prompt=each.tokens, sampling=greedy) for each in chunks),
    )
    runners: list[ModelRunner] = [
        ModelRunner(model, num_blocks=blocks),
        NanoRunner(model, num_blocks=blocks, executor=Sequential(), min_tokens=2, tile=16),
    ]
    for runner in runners:
        runner.pool.key.normal_()
        runner.pool.value.normal_()
    runners[1].pool.key.copy_(runners[0].pool.key)
    runners[1].pool.value.copy_(runners[0].pool.value)
    took: tuple[list[float], list[float]] = ([], [])
    tokens: list[list[int]] = []
    for number in range(config.rounds + 1):
        for runner, times in zip(runners, took, strict=True):
            batch = replace(first, step=number, new=() if number else first.new)
            begin = time.perf_counter()
            sampled = runner.run(batch)
            if number:
                times.append(time.perf_counter() - begin)
            tokens.append([result.token for result in sampled])
    whole, halves = (float(np.median(times)) for times in took)
    same = float(np.mean(np.array(tokens[0]) == np.array(tokens[1])))
    return {
        "ratio": whole / halves,
        "tokens_s": first.num_tokens / halves,
        "whole_s": whole,
        "halves_s": halves,
        "same_tokens": same,
    }
