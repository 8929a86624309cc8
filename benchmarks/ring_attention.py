"""Is TokenRing quicker than a ring where links bound, and does `auto` find the quickest scheme?

Four processes over gloo on the cores that there are, with links whose speed is set (`_paced_links`: emulated, one message at a time on each
directed pair): for each case such that sending keys and values one hop takes twice as long as computing on them. Contestants take
turns; all must agree on the result first. A row's ``ours`` and ``peer`` are milliseconds of the slowest rank.

    link-bound         TokenRing against the ring, no groups of heads, float32. Bar: at most 0.65 of its time
    crossover          what the plan chooses against the quickest of all schemes, by groups of heads. Bar: at most 1.1 of its time
    pass-Q             new positions over resident keys: TokenRing against the ring. Bars: at most 5 % of its bytes, 0.3 of its time

    python benchmarks/ring_attention.py --json benchmarks/results/ring_attention.json
"""
# Shapes: N ranks, n rows of a rank, H query heads, G key heads, D head width

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from _harness import arguments, finish, start
from _paced_links import PacedLink
from _records import of_rounds
from anabranch.cluster.ring import SCHEMES, Layout, Placement, Topology, Traffic, plan_attention
from anabranch.cluster.ring.by_heads import ByHeads
from anabranch.cluster.ring.pieces import Mask
from anabranch.cluster.ring.schedule import Schedule
from anabranch.cluster.ring.team import GroupTeam, Settings, over_ranks

WORLD, WIDTH = 4, 64
TOLERANCE = 2e-6  # largest difference of schemes, float32
# Bytes of the pass-Q bar, a share of the ring's.
BYTES_BAR = 0.05


class Case:
    """One rank's tensors, and what times a scheme on them; all ranks make it alike."""

    def __init__(self, length: int, heads: int, groups: int, *, resident: int = 0) -> None:
        self.length, self.heads, self.groups, self.resident = length, heads, groups, resident
        rank = dist.get_rank()
        queries = Layout("contiguous", WORLD, length, first=resident)
        self.queries: Placement = queries.placement
        self.keys = self.queries
        rows = queries.rows
        if resident:
            self.keys = Layout("contiguous", WORLD, resident).placement.followed_by(self.queries)
        generator = torch.Generator().manual_seed(rank)
        self.parts = [
            torch.randn(1, count, size, WIDTH, generator=generator)
            for count, size in ((heads, rows), (groups, self.keys.rows[rank]), (groups, self.keys.rows[rank]))
        ]

    def run(self, scheme: str, bandwidth: float) -> tuple[float, torch.Tensor, Traffic]:
        """(seconds of the slowest rank, output, what was sent)."""
        traffic = Traffic()
        link = PacedLink(bandwidth, traffic=traffic)
        placed = (self.queries, self.keys, Mask(bool(self.resident)))
        schedule = ByHeads(*placed) if scheme == ByHeads.scheme else Schedule(scheme, *placed)
        settings = Settings(schedule, WIDTH**-0.5, None)
        dist.barrier()
        began = time.perf_counter()
        with torch.no_grad():
            out, _ = over_ranks(GroupTeam(link), settings, self.parts)
        seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds), out, traffic

    def step_s(self) -> float:
        """Seconds to compute on one block, all ranks at once."""
        endless = 1e15
        whole = statistics.median(self.run("ring", endless)[0] for _ in range(3))
        return whole / WORLD

    def bandwidth(self) -> float:
        """At which a hop of keys and values takes twice a step."""
        hop = 2 * max(self.keys.rows) * self.groups * WIDTH * 4
        return hop / (2 * self.step_s())

    def plan(self, bandwidth: float) -> Any:
        """What the plan says of it."""
        work = 4 * WIDTH * self.heads * max(self.queries.rows) * max(self.keys.rows)
        links = Topology(bandwidth=bandwidth, latency_s=1e-4, flops=work / self.step_s())
        told = {"causal": bool(self.resident), "layout": "contiguous", "kv_cached": self.resident, "topology": links}
        return plan_attention(self.length, WORLD, self.heads, self.groups, WIDTH, torch.float32, **told)


def compared(case: Case, name: str, ours: str, peers: list[str], rounds: int, bandwidth: float) -> dict[str, Any]:
    """A row: times by turns, after all agreed."""
    made = {scheme: case.run(scheme, bandwidth) for scheme in sorted({ours, *peers})}
    for scheme, (_, out, _) in made.items():
        difference = float((out - made[ours][1]).abs().max())
        if difference > TOLERANCE:
            raise SystemExit(f"{name}: {scheme} differs from {ours} by {difference}")
    times: dict[str, list[float]] = {scheme: [] for scheme in made}
    for turn in range(rounds):
        for scheme in sorted(made, reverse=bool(turn % 2)):
            times[scheme].append(case.run(scheme, bandwidth)[0])
    best = min(peers, key=lambda scheme: statistics.median(times[scheme]))
    ratios = [theirs / mine for theirs, mine in zip(times[best], times[ours], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    sizes = {}
    for scheme, (_, _, traffic) in made.items():
        size = torch.tensor(traffic.size_bytes, dtype=torch.int64)
        dist.all_reduce(size)
        sizes[scheme] = int(size)
    return {
        "case": name,
        "ours": round(1e3 * statistics.median(times[ours]), 2),
        "peer": round(1e3 * statistics.median(times[best]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "spread": round(high - low, 3),
        "unit": "ms",
        "peer_name": best if len(peers) == 1 else f"quickest of all, {best}",
        "per_round": of_rounds(times[ours], times[best]),
        "scheme": ours,
        "sent_bytes": sizes,
        "link_bytes_per_s": round(bandwidth),
        "links": "emulated: paced transfers over gloo",
    }


def rank_main(rank: int, store: str, options: argparse.Namespace, found: Any) -> None:
    """What one process does; the first hands rows over."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    length = 2048 if options.quick else 8192
    rows = []

    def wants(name: str) -> bool:
        return options.only in name

    if wants(name := f"link-bound, {WORLD} ranks, 8 heads, {length} positions"):
        case = Case(length, 8, 8)
        rows.append(compared(case, name, "token_ring", ["ring"], options.rounds, agreed(case.bandwidth())))
    for group in (1, 2, 4, 8):
        if wants(name := f"crossover, {WORLD} ranks, groups of {group}, {length // 2} positions"):
            case = Case(length // 2, 8, 8 // group)
            bandwidth = agreed(case.bandwidth())
            choice = SCHEMES[int(agreed(SCHEMES.index(case.plan(bandwidth).choice)))]
            rows.append(compared(case, name, choice, list(SCHEMES), options.rounds, bandwidth))
    new, resident = (128, 4096) if options.quick else (512, 32768)
    if wants(name := f"pass-Q, {WORLD} ranks, {new} positions over {resident}"):
        case = Case(new, 8, 8, resident=resident)
        row = compared(case, name, "token_ring", ["ring"], options.rounds, agreed(case.bandwidth()))
        share = row["sent_bytes"]["token_ring"] / row["sent_bytes"]["ring"]
        rows.append(
            {**row, "bytes_share": round(share, 4), "bytes_bar": BYTES_BAR, "is_bytes_bar_met": share <= BYTES_BAR}
        )
    if rank == 0:
        found.put(rows)
    dist.barrier()
    # Threads of links still wait for messages that will not come.
    sys.stdout.flush()
    os._exit(0)


def agreed(value: float) -> float:
    """The first rank's."""
    told = torch.tensor(float(value), dtype=torch.float64)
    dist.broadcast(told, 0)
    return float(told)


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    start(options)
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        found = context.Queue()
        store = str(Path(folder) / "store")
        processes = [context.Process(target=rank_main, args=(rank, store, options, found)) for rank in range(WORLD)]
        for process in processes:
            process.start()
        rows = found.get(timeout=3600)
        for process in processes:
            process.join()
    for row in rows:
        print(
            f"{row['case']:<52} {row['scheme']:<12} {row['ours']:9.2f} ms   "
            f"{row['peer_name']:<28} {row['peer']:9.2f} ms   ratio {row['ratio']:5.2f}",
            file=sys.stderr,
        )
    finish("ring_attention", rows, options, ["torch"])


if __name__ == "__main__":
    main()
