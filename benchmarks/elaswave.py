"""How soon does training go on after a rank is lost, what does an edit of its links cost, and how long is a step then?

    recovery     of three processes that learn one is killed (SIGKILL): from then to the next step that the others commit. bar: at most half
                 of torchft's time, with the same model and samples; its lighthouse looks every 100 ms, waits 100 ms for who joins, and
                 counts a replica as dead after 1 s
    edit         N processes: one leaves the links of all and comes back, against building all groups of gloo anew (of replicas, of stages,
                 and of all) with one all-reduce in each; the slowest rank's time. bar: at most 0.3 of it
    a step       after drawn losses, by simulation of every rank at 96 ranks, against ReCycle and TorchFT; the worst of the draws. bar: at
                 least as fast

torchft needs an environment of its own with the same torch (pip install torchft):

    python benchmarks/elaswave.py --peer torchft/bin/python --json benchmarks/results/elaswave.json
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from _harness import arguments, finish, start
from _machine import version_in
from _records import of_rounds
from anabranch.cluster.elastic import Coordinator, compare
from anabranch.cluster.elastic.links import LinkPool
from anabranch.cluster.ranks import run_ranks

WORKER = Path(__file__).with_name("_elaswave_worker.py")
LIGHTHOUSE = """
import sys
from torchft.coordination import LighthouseServer
made = LighthouseServer(bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=100, quorum_tick_ms=100, heartbeat_timeout_ms=1000)
print(made.address(), flush=True)
sys.stdin.readline()
"""
WORLD = 3
EDIT_WORLDS = (4, 8, 16, 32)
GRIDS, MICRO_BATCHES, LOSSES, DRAWS = ((8, 12), (12, 8)), (16, 32), (1, 2, 3, 4), 5
# Longest that a rank may take for anything.
PATIENCE_S = 120


# Recovery


def recovery(kind: str, python: str) -> float:
    """Seconds from the death of the last rank to the first commit of the others without it."""
    with ExitStack() as stack:
        if kind == "ours":
            address = stack.enter_context(Coordinator(replicas=WORLD, stages=1)).address
        else:
            house = subprocess.Popen(
                [python, "-c", LIGHTHOUSE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            stack.callback(ended, house)
            address = house.stdout.readline().strip().replace("[::]", "127.0.0.1")  # type: ignore[union-attr]
        ranks = []
        for rank in range(WORLD):
            process = subprocess.Popen(
                [python, "-P", str(WORKER), kind, str(rank), str(WORLD), address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            stack.callback(ended, process)
            ranks.append(process)
        for process in ranks:
            until(kind, process, lambda words: words == ["ready"])
        for process in ranks:
            process.stdin.write("begin\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        count = 0

        def whole(words: list[str]) -> bool:
            nonlocal count
            count += words[:1] == ["done"] and int(words[2]) == WORLD
            return count == 20

        until(kind, ranks[0], whole)
        killed = time.time()
        ranks[-1].send_signal(signal.SIGKILL)
        words = until(kind, ranks[0], lambda words: words[:1] == ["done"] and int(words[2]) == WORLD - 1)
        return float(words[1]) - killed


def until(kind: str, process: Any, holds: Any) -> list[str]:
    """The first line, in words, of which it holds."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and (line := process.stdout.readline()):
        if holds(words := line.split()):
            return list(words)
    raise SystemExit(f"a rank of {kind} ended, or took longer than {PATIENCE_S} s")


def ended(process: Any) -> None:
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def recoveries(options: Any) -> list[dict[str, Any]]:
    case = f"recovery, one of {WORLD} killed"
    if options.only not in case or not options.peer:
        return []
    taken: dict[str, list[float]] = {"ours": [], "torchft": []}
    for _ in range(min(options.rounds, 10)):
        taken["ours"].append(recovery("ours", sys.executable))
        taken["torchft"].append(recovery("torchft", options.peer))
    return [row(case, taken["ours"], taken["torchft"], "torchft")]


# Edits


def edits(rank: int, world: int, rounds: int) -> list[tuple[float, float]]:
    """(seconds of an edit that drops the last rank and one that takes it in again, seconds of building groups anew), in turns."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    pool = LinkPool(
        "127.0.0.1",
        b"",
        on_snapshot=lambda *told: None,
        interrupted=lambda: False,
        suspect=lambda rank: None,
        timeout_s=PATIENCE_S,
    )
    pool.rank = rank
    store.set(f"port-{rank}", str(pool.port))
    members = {other: ("127.0.0.1", int(store.get(f"port-{other}"))) for other in range(world)}
    last = world - 1
    fewer = {other: at for other, at in members.items() if (other == last) == (rank == last)}
    pool.edit(1, members)
    found, epoch = [], 1
    for number in range(rounds):
        meet(store, f"edit-{number}", world)
        began = time.perf_counter()
        pool.edit(epoch + 1, fewer)
        edited = time.perf_counter() - began
        # What the coordinator's word is in training.
        meet(store, f"dropped-{number}", world)
        began = time.perf_counter()
        pool.edit(epoch + 2, members)
        # Until frames go both ways, as the other's first all-reduce.
        for other in members:
            if other != rank:
                pool.send(other, "ping", [torch.zeros(1)])
        for other in members:
            if other != rank:
                pool.receive(other, "ping")
        edited += time.perf_counter() - began
        epoch += 2
        meet(store, f"rebuild-{number}", world)
        began = time.perf_counter()
        rebuild(store, number, rank, world)
        found.append((edited, time.perf_counter() - began))
    pool.close()
    return found


def rebuild(store: Any, number: int, rank: int, world: int) -> None:
    """Groups of all, of replicas and of stages, used once."""
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"group-{number}", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    half = world // 2
    rows = [list(range(half)), list(range(half, world))]
    columns = [[place, place + half] for place in range(half)]
    groups = [dist.group.WORLD]
    for members in (*rows, *columns):
        group = dist.new_group(members)
        if rank in members:
            groups.append(group)
    for group in groups:
        dist.all_reduce(torch.zeros(1), group=group)
    dist.destroy_process_group()


def meet(store: Any, name: str, world: int) -> None:
    """Until all ranks are here."""
    if store.add(name, 1) == world:
        store.set(f"{name}-all", "")
    store.wait([f"{name}-all"])


def edited(options: Any) -> list[dict[str, Any]]:
    rows = []
    for world in EDIT_WORLDS[: 1 if options.quick else None]:
        case = f"edit, {world} ranks, one leaves and comes back"
        if options.only in case:
            # The first is warm-up.
            told = run_ranks(edits, world, options.rounds + 1, backend=None, timeout_s=600)
            slowest = [[max(one[turn][n] for one in told) for turn in range(1, options.rounds + 1)] for n in range(2)]
            rows.append(row(case, *slowest, "gloo groups"))
    return rows


# Steps


def simulated(options: Any) -> list[dict[str, Any]]:
    rows = []
    for replicas, stages in GRIDS[: 1 if options.quick else None]:
        for micro_batches in MICRO_BATCHES[: 1 if options.quick else None]:
            for losses in LOSSES[: 2 if options.quick else None]:
                case = f"a step after {losses} of {replicas} x {stages} ranks lost, {micro_batches} micro-batches"
                if options.only not in case:
                    continue
                generator = np.random.default_rng(losses)
                found = [
                    compare(
                        replicas=replicas,
                        stages=stages,
                        layer_costs=[1e-3] * 64,
                        micro_batches=micro_batches,
                        micro_batch=8,
                        lost=generator.choice(replicas * stages, losses, replace=False).tolist(),
                    )
                    for _ in range(1 if options.quick else DRAWS)
                ]
                for arm, name in (("recycle", "ReCycle"), ("torchft", "TorchFT")):
                    worst = min(found, key=lambda one: one.ratio(arm))
                    rows.append(row(case, [worst.step_s["elaswave"]], [worst.step_s[arm]], name))
    return rows


def row(case: str, ours: list[float], theirs: list[float], peer: str) -> dict[str, Any]:
    """Of times in turns."""
    ours, theirs = [float(one) for one in ours], [float(one) for one in theirs]
    ratios = [other / mine for mine, other in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    found = {
        "case": case,
        "ours": round(1e3 * statistics.median(ours), 3),
        "peer": round(1e3 * statistics.median(theirs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "spread": round(high - low, 3),
        "unit": "ms",
        "peer_name": peer,
        "per_round": of_rounds(ours, theirs),
    }
    print({name: value for name, value in found.items() if name != "per_round"}, flush=True)
    return found


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--peer", metavar="PYTHON", help="the interpreter of an environment with torchft")
    options = parser.parse_args()
    start(options)
    if not options.peer:
        print("without --peer there are no rows of recovery", flush=True)
    rows = [*simulated(options), *edited(options), *recoveries(options)]
    peers = {"torchft": version_in(options.peer, "torchft")} if options.peer else {}
    finish("elaswave", rows, options, ["torch"], peers)


if __name__ == "__main__":
    main()
