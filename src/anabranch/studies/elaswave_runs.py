"""The runs of the study of ElasWave (`anabranch.studies.elaswave`): a config and a function for each part."""
# Shapes: B sequences, L positions, D replicas, P stages

import os
import signal
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.cluster.elastic import Coordinator, ElasticTrainer, Grid, Layout, bounds, compare, moves, recut
from anabranch.cluster.ranks import Ranks
from anabranch.config import Config, configclass
from anabranch.data import DataConfig
from anabranch.data.config import Data
from anabranch.errors import PeerError
from anabranch.lm.generate import evaluating
from anabranch.studies.gpipe_runs import Causal, token_loss
from anabranch.studies.harness import Metrics, Progress

Way = Literal["elaswave", "dropping"]
# No wait of a study is longer.
_BOUND_S = 1800.0


@configclass
class Consistent(Config):
    """A small language model learned through losses and joins, beside the same without any."""

    way: Way
    steps: int = 200
    every: int = 10
    losses: int = 3
    joins: int = 2
    replicas: int = 2
    stages: int = 2
    width: int = 128
    blocks: int = 4
    batch: int = 8
    length: int = 64

    def content_digest(self) -> str:
        """Of the text that is learned."""
        return DataConfig(sequence_length=self.length).content_digest()


@configclass
class Lost(Config):
    """Steps after losses, by simulation; nothing runs."""

    grids: tuple[tuple[int, int], ...] = ((8, 12), (12, 8))
    micro_batches: tuple[int, ...] = (16, 32)
    losses: tuple[int, ...] = (1, 2, 3, 4)
    layers: int = 64
    micro_batch: int = 8


@configclass
class Moved(Config):
    """What travels when layers move by one, with slices of each layer and with slices of a stage's whole; counted."""

    draws: int = 200
    replicas: int = 4
    stages: int = 4
    layers: int = 16


@configclass
class Paced(Config):
    """Four processes whose layers sleep: what a step takes beside the prediction, and while layers move."""

    layers: int = 8
    # Of a sample, forward; backward takes twice as long.
    sleep_s: float = 0.004
    batch: int = 12
    # Of each layer; so many of them travel in a step.
    numbers: int = 60_000
    chunk: int = 6_000
    steps: int = 40


def run(config: Any, seed: int, progress: Progress) -> Metrics:
    """One arm, one seed."""
    if isinstance(config, Consistent):
        return run_consistent(config, seed, progress)
    if isinstance(config, Lost):
        return run_lost(config, seed)
    return run_moved(config, seed) if isinstance(config, Moved) else run_paced(config, seed, progress)


# E1


def run_consistent(config: Consistent, seed: int, progress: Progress) -> Metrics:
    """``off``: mean difference of held-out losses from those without losses; ``last_off``: at the end; ``validation``."""
    learn = _learn_elastic if config.way == "elaswave" else _learn_dropping
    found = []
    for disturbed in (False, True):
        progress(f"{config.way}: {'with' if disturbed else 'without'} losses")
        found.append(learn(config, seed, events_of(config, seed) if disturbed else []))
    offs = [abs(a - b) for a, b in zip(*found, strict=True)]
    return {"off": statistics.fmean(offs), "last_off": offs[-1], "validation": found[1][-1], "points": len(offs)}


def events_of(config: Consistent, seed: int) -> list[tuple[int, str]]:
    """(step, "loss" or "join"), in order: losses and joins in turns, at drawn steps that are apart."""
    count = config.losses + config.joins
    kinds = [kind for pair in zip(["loss"] * count, ["join"] * config.joins, strict=False) for kind in pair]
    kinds += ["loss"] * (count - len(kinds))
    generator = np.random.default_rng(seed)
    apart = config.steps // (count + 1)
    return [
        ((n + 1) * apart + int(generator.integers(-(apart // 4), apart // 4 + 1)), kind) for n, kind in enumerate(kinds)
    ]


def layers_of(config: Consistent, vocabulary: int, seed: int) -> list[nn.Module]:
    """Embedding, blocks with dropout, head."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        blocks = [Causal(config.width) for _ in range(config.blocks)]
        head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, vocabulary))
        return [nn.Embedding(vocabulary, config.width), *blocks, head]


def _learn_elastic(config: Consistent, seed: int, events: list[tuple[int, str]]) -> list[float]:
    """Held-out losses, of processes that are killed and come."""
    world = config.replicas * config.stages
    generator = np.random.default_rng(seed + 1)
    pauses = tuple(step for step, kind in events if kind == "join")
    arguments = (config, seed, pauses)
    with (
        Coordinator(replicas=config.replicas, stages=config.stages) as host,
        Ranks(world, elastic_rank, *arguments, host.address, backend=None, timeout_s=_BOUND_S) as ranks,
    ):
        number_of = {rank: rank for rank in range(world)}
        for step, kind in events:
            _until(host, partial(_has_made, step))
            before = set(host.ranks)
            if kind == "join":
                process = ranks.join(elastic_rank, *arguments, host.address)
                _until(host, partial(_has_more_than, before))
                number_of[max(host.ranks)] = process
                ranks.store.set(f"come-{step}", "")
            else:
                victim = int(generator.choice(sorted(before)))
                ranks.kill(number_of[victim])
                _until(host, partial(_is_without, victim))
            _until(host, _is_settled)
        told = ranks.wait()
    points: dict[int, float] = {}
    for one in told:
        points |= one
    return [points[step] for step in sorted(points)]


def _has_made(step: int, host: Coordinator) -> bool:
    return host.version >= step


def _has_more_than(ranks: set[int], host: Coordinator) -> bool:
    return set(host.ranks) > ranks


def _is_without(rank: int, host: Coordinator) -> bool:
    return rank not in host.ranks


def _is_settled(host: Coordinator) -> bool:
    """Whether all who are there are in the layout."""
    return host.layout is not None and set(host.layout.grid.ranks) == set(host.ranks)


def _until(host: Coordinator, holds: Callable[[Coordinator], bool]) -> None:
    """Raise PeerError where training stops before."""
    if not host.wait_for(lambda host: holds(host) or host.stopped is not None, _BOUND_S) or host.stopped is not None:
        raise PeerError(f"the training of the study does not go on: {host.stopped}")


def elastic_rank(
    rank: int, world: int, config: Consistent, seed: int, pauses: tuple[int, ...], address: str
) -> dict[int, float]:
    """One process: held-out losses by step, of those that it came to. At ``pauses`` it waits until the newcomer is there."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    data = DataConfig(sequence_length=config.length).build()
    layers = layers_of(config, data.tokenizer.vocab_size, seed)
    stream = data.train(seed=seed, rank=0, world_size=1)
    points = {}
    with ElasticTrainer(
        layers,
        global_batch=config.batch,
        optimizer_factory=_adam,
        loss=token_loss,
        coordinator=address,
        seed=seed,
        wish=rank,
        gathers=lambda version: version % config.every == 0,
        timeout_s=_BOUND_S,
    ) as trainer:
        for _ in range(trainer.steps):
            stream.next_batch(config.batch)
        while trainer.steps < config.steps:
            if trainer.steps in pauses:
                store.wait([f"come-{trainer.steps}"], timedelta(seconds=_BOUND_S))
            batch = stream.next_batch(config.batch)
            trainer.step((batch.token_BL, batch.target_BL))
            if trainer.has_weights:
                points[trainer.steps] = validation(config, nn.Sequential(*layers), data)
    return points


def _learn_dropping(config: Consistent, seed: int, events: list[tuple[int, str]]) -> list[float]:
    """The same as a replica is dropped with its samples (TorchFT): all replicas in this process, dropout seeded by rank."""
    data = DataConfig(sequence_length=config.length).build()
    model = nn.Sequential(*layers_of(config, data.tokenizer.vocab_size, seed))
    optimizer = _adam(list(model.parameters()))
    stream, share = data.train(seed=seed, rank=0, world_size=1), config.batch // config.replicas
    alive, points = config.replicas, []
    with torch.random.fork_rng([]):
        for step in range(config.steps):
            alive += sum(1 if kind == "join" else -1 for at, kind in events if at == step)
            batch = stream.next_batch(config.batch)
            optimizer.zero_grad()
            for replica in range(alive):
                rows = slice(replica * share, (replica + 1) * share)
                torch.manual_seed((seed * config.steps + step) * config.replicas + replica)
                (token_loss(model(batch.token_BL[rows]), batch.target_BL[rows]) / alive).backward()
            optimizer.step()
            if (step + 1) % config.every == 0:
                points.append(validation(config, model, data))
    return points


def _adam(parameters: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-3, foreach=False)


@torch.no_grad()
def validation(config: Consistent, model: nn.Module, data: Data) -> float:
    """Nats per token of held-out text."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in data.validation(batch_size=config.batch, num_windows=4 * config.batch):
            total += float(token_loss(model(batch.token_BL), batch.target_BL)) * len(batch.token_BL)
            count += len(batch.token_BL)
    return total / count


# E2


def run_lost(config: Lost, seed: int) -> Metrics:
    """``recycle``, ``torchft``: throughput of ours over theirs, the least of all cases, and the mean; ``cases``."""
    generator = np.random.default_rng(seed)
    ratios: dict[str, list[float]] = {"recycle": [], "torchft": []}
    for replicas, stages in config.grids:
        for micro_batches in config.micro_batches:
            for losses in config.losses:
                lost = generator.choice(replicas * stages, losses, replace=False).tolist()
                found = compare(
                    replicas=replicas,
                    stages=stages,
                    layer_costs=[1e-3] * config.layers,
                    micro_batches=micro_batches,
                    micro_batch=config.micro_batch,
                    lost=lost,
                )
                for arm, of in ratios.items():
                    of.append(found.ratio(arm))
    finite = {arm: [one for one in of if np.isfinite(one)] for arm, of in ratios.items()}
    means = {f"{arm}_mean": statistics.fmean(of) if of else None for arm, of in finite.items()}
    return {**{arm: min(of) for arm, of in ratios.items()}, **means, "cases": len(ratios["recycle"])}


# E3


def run_moved(config: Moved, seed: int) -> Metrics:
    """Of one layer that moves: ``whole``: numbers that travel, over the layer's; ``share``: over those that travel with slices of stages,
    the largest of all draws; ``links``: transfers over the replicas.
    """
    generator = np.random.default_rng(seed)
    grid = Grid.full(replicas=config.replicas, stages=config.stages)
    whole, share, links = [], [], []
    for _ in range(config.draws):
        sizes = generator.integers(1_000, 20_000, config.layers).tolist()
        cut = sorted(generator.choice(np.arange(2, config.layers - 1, 2), config.stages - 1, replace=False).tolist())
        place = int(generator.integers(len(cut)))
        before, after = (
            Layout(grid, tuple(at + (by if n == place else 0) for n, at in enumerate(cut)), config.layers)
            for by in (0, 1)
        )
        found = moves(before, after, sizes)
        travels = sum(move.end - move.first for move in found)
        whole.append(travels / sizes[cut[place]])
        share.append(travels / contiguous(before, after, sizes))
        links.append(len(found) / config.replicas)
    return {"whole": max(whole), "share": max(share), "share_mean": statistics.fmean(share), "links": max(links)}


def contiguous(before: Layout, after: Layout, sizes: list[int]) -> int:
    """Numbers that travel where each rank has a run of its stage's numbers, over layers (ZeRO)."""
    places = [0, *accumulate(sizes)]

    def owners(layout: Layout) -> tuple[list[int], list[int]]:
        edges: list[int] = [0]
        ranks: list[int] = []
        for part, stage in zip(layout.parts, layout.grid.stages, strict=True):
            first = places[part.start]
            edges += [first + at for at in bounds(places[part.stop] - first, len(stage))[1:]]
            ranks += stage
        return edges, ranks

    (old, had), (new, has) = owners(before), owners(after)
    return sum(end - first for a, b, first, end in recut(old, new) if had[a] != has[b])


# E4


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(2 * ctx.seconds)
        return gradients[0], None


class SleepingLayer(nn.Module):
    """So long a sample, forward, and twice as long backward; with so many numbers, of which one counts."""

    def __init__(self, seconds: float, numbers: int) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(numbers))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` times 1, later."""
        made: Tensor = _Sleep.apply(x * self.weight[:1], self.seconds * len(x))
        return made


def run_paced(config: Paced, seed: int, progress: Progress) -> Metrics:
    """``predicted_off``: of median steps before and after a loss, the largest difference from the prediction, as a share; ``stall``: the
    median step while layers move over that right before.
    """
    costs = [3 * config.sleep_s] * config.layers
    chunk_bytes = 4 * config.chunk
    with Coordinator(replicas=2, stages=2, layer_costs=costs, chunk_bytes=chunk_bytes) as host:
        with Ranks(4, paced_rank, config, host.address, backend=None, timeout_s=_BOUND_S) as ranks:
            ranks.expect_end(1)
            told = ranks.wait()
        progress(f"layers begin at {host.layout.bounds if host.layout else None}")
    first = told[0]
    by_phase: dict[str, list[float]] = {}
    for phase, seconds in first["steps"]:
        by_phase.setdefault(phase, []).append(seconds)
    # The first step of a layout has waited for others.
    taken = {phase: statistics.median(of[1:] if len(of) > 2 else of) for phase, of in by_phase.items()}
    offs = [abs(taken[phase] / first["predicted"][phase] - 1) for phase in ("whole", "moved") if phase in taken]
    moving = taken["moving"] / taken["lost"] if {"moving", "lost"} <= taken.keys() else None
    return {
        "predicted_off": max(offs),
        "stall": moving,
        "seconds": taken,
        "moving_steps": len(by_phase.get("moving", [])),
    }


def paced_rank(rank: int, world: int, config: Paced, address: str) -> dict[str, Any]:
    """One process: (phase, seconds) of each step, and the predicted seconds of phases. Rank 1 ends after a third of the steps."""
    layers = [SleepingLayer(config.sleep_s, config.numbers) for _ in range(config.layers)]
    predicted: list[float] = []
    steps: list[tuple[str, float]] = []
    with ElasticTrainer(
        layers,
        global_batch=config.batch,
        optimizer_factory=_descent,
        loss=_mean,
        coordinator=address,
        wish=rank,
        micro_batches=4,
        on_epoch_change=lambda told: predicted.append(told["step_s"]),
        draws=False,
    ) as trainer:
        x = torch.zeros(config.batch, 4)
        while trainer.steps < config.steps:
            if rank == 1 and trainer.steps == config.steps // 3:
                os.kill(os.getpid(), signal.SIGKILL)
            began, changes = time.monotonic(), len(predicted)
            trainer.step((x, x))
            taken = time.monotonic() - began
            if len(predicted) == changes:
                is_moving = trainer.status()["is_moving"]
                phase = "moving" if is_moving else ("whole", "lost", "moved")[min(changes - 1, 2)]
                steps.append((phase, taken))
    names: tuple[str, ...] = ("whole", "lost", "moved")
    return {"steps": steps, "predicted": dict(zip(names, predicted, strict=False))}


def _descent(parameters: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def _mean(output: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = (output - target).square().mean()
    return loss
