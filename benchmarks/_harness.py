"""What the benchmarks share: contestants timed in turns in one process, medians and spreads of ratios, peak memory, JSON.

Other work on a machine slows whoever runs at that moment, so contestants take turns within each round and a round gives one
ratio; the result is the median over rounds and the spread its interquartile range. A ratio above 1 means ours is better.
"""

import argparse
import ctypes
import gc
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from _machine import here, processor
from _records import of_rounds, write_record
from anabranch import native
from anabranch.native import NATIVE
from anabranch.nn.kernels.memory import release

Work = Callable[[], Any]


def arguments(description: str) -> argparse.ArgumentParser:
    """The options every benchmark takes; add others, then pass the parsed result to `start` and `finish`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="few rounds, the smaller cases: does it run at all?")
    parser.add_argument("--rounds", type=int, default=None, help="rounds per case (default 15, with --quick 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument(
        "--add", action="store_true", help="keep what --json's file has of other cases, if of this commit and machine"
    )
    return parser


def start(options: argparse.Namespace) -> None:
    """Apply the options."""
    if options.add:
        # Before hours are spent on rows that could not stand beside those.
        kept_rows(options, here(options.threads))
    torch.set_num_threads(options.threads)
    options.rounds = options.rounds or (3 if options.quick else 15)


def compare(
    case: str,
    ours: Work,
    peers: Mapping[str, Work],
    *,
    rounds: int,
    least_s: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time ``ours`` against the fastest of ``peers``.

    Args:
        case: name of the row.
        ours: one unit of our work.
        peers: one unit of the same work for each contestant.
        rounds: how often each takes its turn.
        least_s: work shorter than this is repeated within a turn until it lasts about as long.
        clock: what is compared; `time.process_time` for the processor's time of contestants of one thread on a busy machine.

    Returns:
        A row: milliseconds of ours and of the best peer, median ratio and its interquartile range, peak memory in MB beyond
        what a unit of work left behind, such as gradients.
    """
    contestants = {"ours": ours, **peers}
    memory = {name: _peak_of_warm(work) for name, work in contestants.items()}
    once = {name: _seconds(work, 1, clock) for name, work in contestants.items()}
    quickest = min(once[name] for name in peers)
    peers = {name: peers[name] for name in peers if once[name] < 3 * quickest}  # the rest cannot win: spare the time
    contestants = {"ours": ours, **peers}
    repeats = {name: max(1, round(least_s / once[name])) for name in contestants}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        order = list(contestants) if turn % 2 else list(contestants)[::-1]
        for name in order:
            times[name].append(_seconds(contestants[name], repeats[name], clock))
    best = min(peers, key=lambda name: statistics.median(times[name]))
    ratios = [theirs / mine for theirs, mine in zip(times[best], times["ours"], strict=True)]
    # One round has no spread.
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    row = {
        "case": case,
        "ours": round(1e3 * statistics.median(times["ours"]), 4),
        "peer": round(1e3 * statistics.median(times[best]), 4),
        "ratio": round(statistics.median(ratios), 3),
        "spread": round(high - low, 3),
        "unit": "ms",
        "peer_name": best,
        "per_round": of_rounds(times["ours"], times[best]),
        "memory_ours_mb": round(memory["ours"], 1),
        "memory_peer_mb": round(memory[best], 1),
    }
    _print(row)
    return row


def _seconds(work: Work, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean seconds of one unit of work."""
    _synchronize()
    begin = clock()
    for _ in range(repeats):
        work()
    _synchronize()
    return max(clock() - begin, 1e-7) / repeats


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_megabytes(work: Work) -> float:
    """Most memory that ``work`` held at once beyond what was held before it; 0 where the system does not say."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        work()
        return 0.0
    _release()
    reset.write_text("5")  # forget the highest resident size so far
    before = _status_kilobytes(status, "VmRSS")
    work()
    return max(0, _status_kilobytes(status, "VmHWM") - before) / 2**10


def _peak_of_warm(work: Work) -> float:
    """`peak_megabytes` of the second unit: the first makes gradients, compiles and fills caches, which a contestant beside it may share."""
    work()
    return peak_megabytes(work)


def _release() -> None:
    """Give back what allocators keep, so that what ``work`` needs shows in the resident size."""
    gc.collect()
    release()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def _status_kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['case']:<52} ours {row['ours']:9.3f} ms   {row['peer_name']:<20} {row['peer']:9.3f} ms   "
        f"ratio {row['ratio']:6.2f} ± {row['spread'] / 2:.2f}   memory {row['memory_ours_mb']:.0f} / {row['memory_peer_mb']:.0f} MB",
        file=sys.stderr,
        flush=True,
    )


def kernels() -> str:
    """The compiled library in use, by the instructions that it was made for; why there is none otherwise."""
    found = native.status()
    if not found.is_ready or found.library is None:
        return found.reason
    made = found.library.isa
    return f"{made} ({processor()[1] or 'unknown instructions'})" if made == NATIVE.name else made


# What must be the same of rows that stand in one record.
SAME = ("commit", "cpu", "isa", "threads", "switches")


def kept_rows(options: argparse.Namespace, now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the record at ``--json``, to which ``--add`` adds: long benchmarks are recorded in parts, whenever a machine is quiet.

    Raises SystemExit if there is no ``--json``, or its record is of another commit or machine.
    """
    if options.json is None:
        raise SystemExit("--add needs --json, the record to add to")
    if not options.json.exists():
        return []
    record = json.loads(options.json.read_text())
    for field in SAME:
        if record.get(field) != now[field]:
            raise SystemExit(
                f"{options.json} has {field} {record.get(field)!r}, this run {now[field]!r}; leave out --add"
            )
    return list(record["rows"])


def version_of(package: str) -> str:
    """Of a package; of one that is not installed but on the path, as Anabranch beside a peer's environment, what it says itself.

    An hour's measuring is not lost for want of it.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return str(getattr(importlib.import_module(package), "__version__", "not known"))


def finish(
    name: str,
    rows: Sequence[dict[str, Any]],
    options: argparse.Namespace,
    packages: Sequence[str],
    peers: Mapping[str, str] | None = None,
    note: str | None = None,
) -> None:
    """Write the result where ``--json`` says; a row of a case is what `compare` returns, and ``note`` is told below the table.

    ``packages`` are those of this process whose versions are told, beside peers', which are found (`_records`); ``peers`` has the versions
    of those that ran in an environment of their own (`version_in`), by package.

    Records in ``benchmarks/results`` that depend on the processor's instructions have them in their name: ``moe_layer.avx512_bf16.json``.
    """
    device = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    now = here(options.threads)
    if options.add:
        measured = {(row["case"], row.get("peer_name")) for row in rows}
        others = [row for row in kept_rows(options, now) if (row["case"], row.get("peer_name")) not in measured]
        rows = [*others, *rows]
    result = {
        "name": name,
        **now,
        **device,
        "kernels": kernels(),
        **({"note": note} if note else {}),
        "rows": rows,
        "versions": {
            "python": platform.python_version(),
            **{package: version_of(package) for package in packages},
            **(peers or {}),
        },
    }
    if options.json:
        write_record(options.json, result)
