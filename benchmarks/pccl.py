"""What does an all-reduce that outlives its peers cost beside gloo's, which does not, and beside PCCL's own library?

    all-reduce   float32 numbers summed over 2 and 4 processes of this machine, in turns. bars: at least 0.5 of gloo's speed and 1.3 times
                 pypccl's from 16 MiB on (2 times where two processes sum 64 MiB)
    ceiling      two processes that send each other as many bytes at once and do nothing with them. bar: 0.6
    recovery     of three processes one is killed (SIGKILL): seconds until the other two have finished a sum of two. bar: at most pypccl's

Every contestant's ranks are processes of their own, started once per case; a turn's time is that of its slowest rank. pypccl needs Python
3.12 and an environment of its own; on a machine without CUDA its library needs a libcuda.so.1 that only answers errors:

    python3.12 -m venv pccl && pccl/bin/pip install pypccl numpy
    L=pccl/lib/python3.12/site-packages/pccl/libpccl.so
    nm -D $L | awk '$1=="U" && $2 ~ /^cu/ {print "int " $2 "() { return 100; }"}' > stub.c
    gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o stub/libcuda.so.1 stub.c
    LD_LIBRARY_PATH=stub python benchmarks/pccl.py --peer pccl/bin/python --json benchmarks/results/pccl.json
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from _harness import arguments, finish, start
from _machine import version_in
from _records import of_rounds
from anabranch.cluster.pccl import Master

WORKER = Path(__file__).with_name("_pccl_worker.py")
SIZES_MIB = (1, 16, 64, 256)
WORLDS = (2, 4)
# Longest that a rank may take for anything.
PATIENCE_S = 120


class Ranks:
    """All ranks of one contestant."""

    def __init__(self, kind: str, world: int, python: str, address: str) -> None:
        self.kind = kind
        self.processes = [
            subprocess.Popen(
                # Not with this folder in its path, where pypccl's name is this file's.
                [python, "-P", str(WORKER), kind, str(rank), str(world), address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        for process in self.processes:
            while (line := process.stdout.readline()) and line != "ready\n":  # type: ignore[union-attr]
                pass
            if not line:
                raise SystemExit(f"a rank of {kind} ended before it was ready")

    def say(self, line: str) -> None:
        for process in self.processes:
            process.stdin.write(line + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]

    def reduce(self, count: int) -> float:
        """Seconds of the slowest."""
        self.say(f"reduce {count}")
        return max(float(self.answer(process)) for process in self.processes)

    def answer(self, process: Any) -> str:
        while (line := process.stdout.readline()) and not line[0].isdigit():
            pass
        if not line:
            raise SystemExit(f"a rank of {self.kind} ended")
        return str(line)

    def recovery(self) -> float:
        """Seconds from the death of the last rank to the first sum of the others."""
        self.say("loop")
        first, *_, last = self.processes
        end = time.monotonic() + PATIENCE_S
        count = 0
        while count < 50:
            count += first.stdout.readline().startswith("done")  # type: ignore[union-attr]
        killed = time.time()
        last.send_signal(signal.SIGKILL)
        while time.monotonic() < end:
            words = first.stdout.readline().split()  # type: ignore[union-attr]
            if words[:1] == ["done"] and int(words[2]) == len(self.processes) - 1:
                return float(words[1]) - killed
        raise SystemExit(f"{self.kind} did not recover in {PATIENCE_S} s")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()  # type: ignore[union-attr]
            process.stdout.close()  # type: ignore[union-attr]


@contextmanager
def contestants(kinds: dict[str, str], world: int):
    """The ranks of each kind, and a master for ours."""
    with ExitStack() as stack:
        master = stack.enter_context(Master("127.0.0.1:0", secret=""))
        made = {}
        for kind, python in kinds.items():
            made[kind] = Ranks(kind, world, python, master.address if kind == "ours" else f"127.0.0.1:{free_port()}")
            stack.callback(made[kind].close)
        yield made


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def rows_of(case: str, taken: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row of ours against each other contestant, round by round."""
    rows = []
    for peer in [name for name in taken if name != "ours"]:
        ratios = [theirs / ours for ours, theirs in zip(taken["ours"], taken[peer], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "case": case if peer != "raw" else case.replace("all-reduce", "ceiling"),
                "ours": round(1e3 * statistics.median(taken["ours"]), 3),
                "peer": round(1e3 * statistics.median(taken[peer]), 3),
                "ratio": round(statistics.median(ratios), 3),
                "spread": round(high - low, 3),
                "unit": "ms",
                "peer_name": {"raw": "send and receive"}.get(peer, peer),
                "per_round": of_rounds(taken["ours"], taken[peer]),
            }
        )
        print({name: value for name, value in rows[-1].items() if name != "per_round"}, flush=True)
    return rows


def all_reduces(world: int, options: Any, kinds: dict[str, str]) -> list[dict[str, Any]]:
    rows = []
    sizes = SIZES_MIB[:2] if options.quick else SIZES_MIB
    with contestants(kinds | ({"raw": sys.executable} if world == 2 else {}), world) as made:
        for size in sizes:
            case = f"all-reduce, {world} processes, {size} MiB"
            if options.only not in case:
                continue
            taken: dict[str, list[float]] = {name: [] for name in made}
            for turn in range(options.rounds + 1):
                for name in list(made) if turn % 2 else list(made)[::-1]:
                    taken[name].append(made[name].reduce(size << 18))
            rows += rows_of(case, {name: values[1:] for name, values in taken.items()})
    return rows


def recoveries(options: Any, kinds: dict[str, str]) -> list[dict[str, Any]]:
    case = "recovery, one of three killed"
    taken: dict[str, list[float]] = {name: [] for name in kinds if name != "gloo"}
    if options.only not in case or len(taken) < 2:
        return []
    for _ in range(min(options.rounds, 5)):
        for name in taken:
            with contestants({name: kinds[name]}, 3) as made:
                taken[name].append(made[name].recovery())
    return rows_of(case, taken)


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--peer", metavar="PYTHON", help="the interpreter of an environment with pypccl")
    options = parser.parse_args()
    start(options)
    kinds = {"ours": sys.executable, "gloo": sys.executable} | ({"pypccl": options.peer} if options.peer else {})
    if not options.peer:
        print("without --peer there are no rows of pypccl", flush=True)
    rows: list[dict[str, Any]] = []
    for world in WORLDS[: 1 if options.quick else None]:
        rows += all_reduces(world, options, kinds)
    rows += recoveries(options, kinds)
    peers = {"pypccl": version_in(options.peer, "pypccl")} if options.peer else {}
    finish("pccl", rows, options, ["torch"], peers)


if __name__ == "__main__":
    main()
