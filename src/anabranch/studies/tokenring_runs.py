"""The runs of the study of TokenRing (`anabranch.studies.tokenring`): a config and a function for each part."""
# Shapes: N ranks, B sequences, S positions, L of a rank, H query heads, G key heads, D head width

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from anabranch.cluster.ranks import run_ranks
from anabranch.cluster.ring import (
    SCHEMES,
    ContextParallel,
    Layout,
    Placement,
    Topology,
    Traffic,
    average_gradients,
    plan_attention,
    simulated_attention,
)
from anabranch.cluster.ring.by_heads import ByHeads
from anabranch.cluster.ring.link import GroupLink
from anabranch.cluster.ring.pieces import Mask
from anabranch.cluster.ring.schedule import Schedule
from anabranch.cluster.ring.team import GroupTeam, Settings, over_ranks
from anabranch.config import Config, configclass
from anabranch.data import DataConfig
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.studies.harness import Metrics, Progress

__all__ = ["Crossover", "Curve", "Exact", "LinkBound", "PassQ", "run"]

# No part of a run takes longer.
_BOUND_S = 900.0
# The largest difference of schemes that compute the same in float32.
_ALIKE = 5e-6


@configclass
class Exact(Config):
    """Outputs and gradients of every scheme, layout and mask against torch's own attention of one process, in float64."""

    world: int = 4
    length: int = 37
    heads: int = 4
    groups: tuple[int, ...] = (4, 2, 1)
    width: int = 8


@configclass
class LinkBound(Config):
    """TokenRing against the ring where keys and values of a block travel twice as long as the block is computed on."""

    world: int = 4
    length: int = 8192
    heads: int = 8
    width: int = 64
    rounds: int = 5


@configclass
class Crossover(Config):
    """Every scheme, and what the plan says of them, with so many query heads for each key head."""

    group: int
    world: int = 4
    length: int = 4096
    heads: int = 8
    width: int = 64
    rounds: int = 5


@configclass
class PassQ(Config):
    """New positions over keys and values that lie on the ranks already."""

    world: int = 4
    length: int = 512
    resident: int = 32768
    heads: int = 8
    width: int = 64
    rounds: int = 5


@configclass
class Curve(Config):
    """A small language model of text, trained by one process and by ``world`` with a share of every sequence each."""

    world: int = 4
    steps: int = 50
    dim: int = 64
    layers: int = 2
    heads: int = 4
    length: int = 128
    batch: int = 8

    def content_digest(self) -> str:
        """Of the text that is learned."""
        return DataConfig(sequence_length=self.length).content_digest()


Part = Exact | LinkBound | Crossover | PassQ | Curve


def run(config: Part, seed: int, progress: Progress) -> Metrics:
    """One arm, one seed."""
    if isinstance(config, Exact):
        return run_exact(config, seed)
    if isinstance(config, Curve):
        return run_curve(config, seed, progress)
    if isinstance(config, LinkBound):
        return run_link_bound(config, seed, progress)
    return (
        run_crossover(config, seed, progress) if isinstance(config, Crossover) else run_pass_q(config, seed, progress)
    )


# Exactness


def run_exact(config: Exact, seed: int) -> Metrics:
    """``output`` and ``gradient``: the largest absolute differences over all ways; ``ways``: how many those are."""
    generator = torch.Generator().manual_seed(seed)
    output = gradient = 0.0
    ways = 0
    for groups in config.groups:
        shapes = [(config.heads, config.width), (groups, config.width), (groups, config.width)]
        query, key, value = whole = [
            torch.randn(2, config.length, *shape, generator=generator, dtype=torch.float64).requires_grad_()
            for shape in shapes
        ]
        dout = torch.randn(2, config.length, config.heads, config.width, generator=generator, dtype=torch.float64)
        for layout, causal in (("contiguous", False), ("contiguous", True), ("zigzag", True), ("stripe", True)):
            expected = _one_process(query, key, value, causal)
            wanted = torch.autograd.grad(expected, whole, dout)
            for scheme in _possible(config.world, config.heads, groups):
                told: dict[str, Any] = {"layout": layout, "scheme": scheme}
                made = simulated_attention(query, key, value, config.world, causal, **told, seed=seed)
                found = torch.autograd.grad(made, whole, dout)
                output = max(output, _apart(made, expected))
                gradient = max(gradient, *(_apart(one, other) for one, other in zip(found, wanted, strict=True)))
                ways += 1
    return {"output": output, "gradient": gradient, "ways": ways}


def _possible(world: int, heads: int, groups: int) -> list[str]:
    """Schemes that so many heads allow; with nodes of one rank `hybrid` is one of the others."""
    return [scheme for scheme in SCHEMES if scheme != ByHeads.scheme or heads % world == 0 == groups % world]


def _one_process(query_BSHD: Tensor, key_BSGD: Tensor, value_BSGD: Tensor, causal: bool) -> Tensor:
    """By torch's own operator, for which key heads are repeated."""
    shared = query_BSHD.shape[2] // key_BSGD.shape[2]
    key_BHSD, value_BHSD = (part.repeat_interleave(shared, 2).transpose(1, 2) for part in (key_BSGD, value_BSGD))
    made = F.scaled_dot_product_attention(query_BSHD.transpose(1, 2), key_BHSD, value_BHSD, is_causal=causal)
    return made.transpose(1, 2)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


# Time over links of a given speed


class Timed:
    """One rank's tensors, and what times a scheme on them; all ranks make it alike.

    Args:
        rank, world: of how many this is which.
        table: ``length``, ``resident``, ``heads``, ``groups`` and ``width``.
        seed: draws the tensors.
    """

    def __init__(self, rank: int, world: int, table: dict[str, int], seed: int) -> None:
        self.table, self.world = table, world
        asked = Layout("contiguous", world, table["length"], first=table["resident"])
        self.queries: Placement = asked.placement
        self.keys = self.queries
        if table["resident"]:
            self.keys = Layout("contiguous", world, table["resident"]).placement.followed_by(self.queries)
        generator = torch.Generator().manual_seed(seed * world + rank)
        self.parts = [
            torch.randn(1, heads, rows, table["width"], generator=generator)
            for heads, rows in (
                (table["heads"], asked.rows),
                (table["groups"], self.keys.rows[rank]),
                (table["groups"], self.keys.rows[rank]),
            )
        ]

    def once(self, scheme: str) -> tuple[float, Tensor, Traffic]:
        """(seconds of the slowest rank, this rank's output, what it sent)."""
        traffic = Traffic()
        placed = (self.queries, self.keys, Mask(bool(self.table["resident"])))
        schedule = ByHeads(*placed) if scheme == ByHeads.scheme else Schedule(scheme, *placed)
        settings = Settings(schedule, self.table["width"] ** -0.5, None)
        dist.barrier()
        began = time.perf_counter()
        with torch.no_grad():
            team: Any = GroupTeam(GroupLink(traffic=traffic))
            out, _ = over_ranks(team, settings, self.parts)
        seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds), out, traffic


def step_seconds(rank: int, world: int, table: dict[str, int], seed: int) -> float:
    """Seconds to compute on one block, all ranks at once, over links that take no time: loopback without a rate."""
    timed = Timed(rank, world, table, seed)
    return statistics.median(timed.once("ring")[0] for _ in range(4)) / world


def by_turns(
    rank: int, world: int, table: dict[str, int], schemes: list[str], rounds: int, seed: int
) -> dict[str, Any]:
    """By scheme: ``seconds`` of each round, ``bytes`` that this rank sent and ``waited_s`` of a round; all agreed before."""
    timed = Timed(rank, world, table, seed)
    first = {scheme: timed.once(scheme)[1] for scheme in schemes}
    off = max(_apart(first[schemes[0]], out) for out in first.values())
    if off > _ALIKE:
        raise ValueError(f"schemes differ by {off}; they may differ by {_ALIKE}")
    seconds: dict[str, list[float]] = {scheme: [] for scheme in schemes}
    waited: dict[str, list[float]] = {scheme: [] for scheme in schemes}
    size = {}
    for turn in range(rounds):
        for scheme in schemes[:: -1 if turn % 2 else 1]:
            taken, _, traffic = timed.once(scheme)
            seconds[scheme].append(taken)
            waited[scheme].append(traffic.waited_s["travel"] + traffic.waited_s["home"])
            size[scheme] = traffic.size_bytes
    return {
        "seconds": seconds,
        "waited": {name: statistics.median(found) for name, found in waited.items()},
        "size": size,
    }


def _paced(
    config: LinkBound | Crossover | PassQ, groups: int, schemes: list[str] | None, seed: int, progress: Progress
) -> tuple[list[dict[str, Any]], float, float]:
    """(what `by_turns` gave in each rank, bytes a second of a link, seconds of a block); all schemes where None."""
    table = {
        "length": config.length,
        "resident": config.resident if isinstance(config, PassQ) else 0,
        "heads": config.heads,
        "groups": groups,
        "width": config.width,
    }
    schemes = schemes or _possible(config.world, config.heads, groups)
    step_s = max(run_ranks(step_seconds, config.world, table, seed, timeout_s=_BOUND_S))
    rows = -(-(table["length"] + table["resident"]) // config.world)
    bandwidth = 2 * rows * groups * config.width * 4 / (2 * step_s)
    progress(f"{', '.join(schemes)} over links of {bandwidth / 1e6:.1f} MB/s, blocks of {1e3 * step_s:.1f} ms")
    found = run_ranks(
        by_turns,
        config.world,
        table,
        schemes,
        config.rounds,
        seed,
        timeout_s=_BOUND_S,
        mbit=bandwidth * 8 / 1e6,
        links="paced",
    )
    return found, bandwidth, step_s


def _ratio(found: list[dict[str, Any]], ours: str, theirs: str) -> float:
    """Median over rounds, which took turns, of ours over theirs."""
    seconds = found[0]["seconds"]
    return statistics.median(one / other for one, other in zip(seconds[ours], seconds[theirs], strict=True))


def run_link_bound(config: LinkBound, seed: int, progress: Progress) -> Metrics:
    """``ratio``: TokenRing's time over the ring's; ``waited``: the same of the seconds in which the average rank stood waiting."""
    found, bandwidth, step_s = _paced(config, config.heads, ["ring", "token_ring"], seed, progress)
    waited = {name: statistics.fmean(rank["waited"][name] for rank in found) for name in ("ring", "token_ring")}
    return {
        "ratio": _ratio(found, "token_ring", "ring"),
        "waited": waited["token_ring"] / waited["ring"],
        "link_bytes_per_s": bandwidth,
        "block_s": step_s,
        "seconds": {name: statistics.median(times) for name, times in found[0]["seconds"].items()},
    }


def run_crossover(config: Crossover, seed: int, progress: Progress) -> Metrics:
    """``behind``: time of the scheme that the plan chooses over that of the quickest; and the times of all."""
    groups = config.heads // config.group
    found, bandwidth, step_s = _paced(config, groups, None, seed, progress)
    work = 4 * config.width * config.heads * (config.length // config.world) ** 2
    plan = plan_attention(
        config.length,
        config.world,
        config.heads,
        groups,
        config.width,
        torch.float32,
        causal=False,
        layout="contiguous",
        topology=Topology(bandwidth=bandwidth, latency_s=1e-4, flops=work / step_s),
    )
    seconds = {name: statistics.median(times) for name, times in found[0]["seconds"].items()}
    quickest = min(seconds, key=lambda name: seconds[name])
    return {
        "behind": _ratio(found, plan.choice, quickest),
        "over_ring": _ratio(found, "token_ring", "ring"),
        "choice": plan.choice,
        "quickest": quickest,
        "seconds": seconds,
        "link_bytes_per_s": bandwidth,
    }


def run_pass_q(config: PassQ, seed: int, progress: Progress) -> Metrics:
    """``share``: bytes that TokenRing sends over the ring's; ``ratio``: the same of their times."""
    found, bandwidth, _ = _paced(config, config.heads, ["ring", "token_ring"], seed, progress)
    size = {name: sum(rank["size"][name] for rank in found) for name in ("ring", "token_ring")}
    return {
        "share": size["token_ring"] / size["ring"],
        "ratio": _ratio(found, "token_ring", "ring"),
        "link_bytes_per_s": bandwidth,
    }


# Training


def curve(rank: int, world: int, table: dict[str, int], seed: int) -> list[float]:
    """Losses of a training in which every rank has a share of each sequence; of one rank, without anything cut."""
    data = DataConfig(sequence_length=table["length"]).build()
    model: Any = Decoder.Config(
        vocab_size=data.tokenizer.vocab_size,
        dim=table["dim"],
        num_layers=table["layers"],
        attention=SelfAttention.Config(num_heads=table["heads"], num_kv_heads=table["heads"] // 2),
        feed_forward=SwiGLU.Config(hidden_dim=2 * table["dim"]),
    ).build(seed=seed)
    if world > 1:
        model = ContextParallel(model, layout="zigzag", scheme="token_ring")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stream, losses = data.train(seed=seed), []
    for _ in range(table["steps"]):
        batch = stream.next_batch(table["batch"])
        optimizer.zero_grad()
        made = model(batch.token_BL, batch.target_BL)
        made.loss.backward()
        if world > 1:
            average_gradients(model)
        losses.append(float(made.cross_entropy))
        optimizer.step()
    return losses


def run_curve(config: Curve, seed: int, progress: Progress) -> Metrics:
    """``off``: the largest difference of a step's loss from that of one process; ``first`` and ``last`` losses."""
    table = {name: getattr(config, name) for name in ("steps", "dim", "layers", "heads", "length", "batch")}
    found = {}
    for world in (1, config.world):
        progress(f"{world} processes")
        found[world] = run_ranks(curve, world, table, seed, timeout_s=_BOUND_S)[0]
    off = max(abs(one - other) for one, other in zip(found[1], found[config.world], strict=True))
    return {"off": off, "first": found[1][0], "last": found[1][-1]}
