"""Vectors on disk: how long does a query take, and how much memory, at equal recall, beside DiskANN, faiss and usearch?

200,000 vectors of 128 numbers in clusters, or ``--vectors FILE.npy`` (the last 500 rows are queries). Each contestant builds its index
(M = 16 or 32 links, ef_construction 100, one thread), and gets the least of its knob that reaches recall@10 of 0.90 and of 0.95. Then they
take turns, each turn a process of its own: the system forgets what it has of its files (posix_fadvise, DONTNEED), it opens its index, and
every query is asked alone, by one thread, first so (cold) and then once more (warm). Ours is compiled before, on another index.

Memory is what a process has of its own beyond what it had before it opened the index (RssAnon), mapped pages of files beside it (RssFile),
and what the system's cache has of the files after the turn (mincore). Ours is built and opened within a fifth of the vectors as float32;
the peak of each build is watched from outside (RssAnon, less that of the same process without data).

Contestants: ``diskannpy``; ``usearch`` (view); faiss with inverted lists on disk, of vectors, and of product codes whose best 100 are
measured again by the vectors in their file. A contestant runs by the first Python that has its package: this one, or one of ``--peer``
(diskannpy wants an older numpy than faiss).

Bars: recall of at least 0.9 within a fifth of the whole float index (1 of "the bar"); at least 1.0 times each peer.

    python benchmarks/hnsw_disk.py --peer /diskann/bin/python --peer /faiss/bin/python --json benchmarks/results/hnsw_disk.json
"""
# Shapes: N vectors, D dimension, Q queries

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from _disk_worker import CONTESTANTS, K, M
from _harness import arguments, finish, start
from anabranch.graph.hnsw import brute_force

TARGETS = (0.90, 0.95)
SHARE = 0.2
WORKER = Path(__file__).with_name("_disk_worker.py")


def clusters(count: int, dim: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    centre_CD = draw.standard_normal((200, dim), np.float32)
    total = count + num_queries
    drawn_ND = (
        draw.standard_normal((total, dim), np.float32) * np.float32(0.7) + centre_CD[draw.integers(0, 200, total)]
    )
    return drawn_ND[num_queries:], drawn_ND[:num_queries]


def has(python: str, package: str) -> bool:
    return subprocess.run([python, "-c", f"import {package}"], check=False, stderr=subprocess.DEVNULL).returncode == 0


def run(python: str, told: dict[str, Any], most_s: float) -> tuple[Any, float]:
    """What a worker says, and the most memory of its own that it had, in MB.

    Raises RuntimeError with its last words if it failed, or did not come to its end in time.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([python, WORKER, json.dumps(told)], stdout=out, stderr=err, env=environment)
        peak, started = 0, time.monotonic()
        while process.poll() is None:
            peak = max(peak, _anon_kb(process.pid))
            time.sleep(0.01)
            if time.monotonic() - started > most_s:
                process.kill()
                process.wait()
                raise RuntimeError(f"no answer within {most_s:g} s to {told['do']!r}")
        if process.returncode:
            err.seek(0)
            last = (err.read().strip().splitlines() or [f"it ended with {process.returncode}"])[-1]
            raise RuntimeError(f"{last:.200}")
        out.seek(0)
        return json.loads(out.read().strip().splitlines()[-1]), peak / 1024


def _anon_kb(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        # It ended just now.
        return 0


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--vectors", type=Path, metavar="FILE", help="vectors of one's own, .npy")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="PYTHON", help="that has packages of peers; may be repeated"
    )
    parser.add_argument("--most", type=float, default=1800, metavar="S", help="seconds that a step of a peer may take")
    options = parser.parse_args()
    start(options)
    rounds = min(options.rounds, 2 if options.quick else 7)
    if options.vectors:
        rows = np.load(options.vectors, mmap_mode="r")
        base_ND, query_QD = rows[:-500].astype(np.float32), rows[-500:].astype(np.float32)
    else:
        base_ND, query_QD = clusters(*((5000, 32, 100) if options.quick else (200_000, 128, 500)))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        np.save(folder / "vectors.npy", base_ND)
        np.save(folder / "queries.npy", query_QD)
        np.save(folder / "truth.npy", brute_force(base_ND, query_QD, K)[0])
        memory = int(SHARE * base_ND.nbytes) if not options.quick else 4 << 20
        made, knobs, python_of, failed = prepared(folder, memory, [sys.executable, *options.peer], options.most)
        found: dict[tuple[str, float], list[dict[str, float]]] = {}
        for number in range(rounds):
            for target in TARGETS:
                names = [name for name in made if target in knobs[name]]
                for name in names if number % 2 else names[::-1]:
                    told = asked(folder, name, memory) | {"do": "turn", "knob": knobs[name][target][0]}
                    said, _ = run(python_of[name], told, options.most)
                    found.setdefault((name, target), []).append(said)
                    print(number, target, name, {key: round(value, 3) for key, value in said.items()}, flush=True)
    whole = base_ND.nbytes + len(base_ND) * (8 * M + 4 * M // (M - 1) + 17)
    made_rows = rows_of(found, knobs, made, whole) + [
        {
            "case": "all",
            "ours": None,
            "peer": None,
            "ratio": None,
            "unit": "",
            "peer_name": name,
            "failed": f"{name}: {why}",
        }
        for name, why in failed.items()
    ]
    for row in made_rows:
        print(row)
    finish("hnsw_disk", made_rows, options, ["numpy", "numba"])


def asked(folder: Path, name: str, memory: int) -> dict[str, Any]:
    own = folder / name.replace(" ", "-")
    own.mkdir(exist_ok=True)
    return {
        "name": name,
        "folder": str(own),
        "memory": memory,
        "queries": str(folder / "queries.npy"),
        "truth": str(folder / "truth.npy"),
    }


def prepared(folder: Path, memory: int, pythons: list[str], most_s: float) -> tuple[Any, Any, Any, Any]:
    """Of every contestant: its build (seconds, bytes on disk, most memory), its knobs, and who runs it; and why others are not there."""
    made: dict[str, dict[str, float]] = {}
    knobs: dict[str, dict[float, tuple[int, float]]] = {}
    python_of: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, (package, *_) in CONTESTANTS.items():
        python = next((one for one in pythons if has(one, package)), None)
        if python is None:
            failed[name] = "not installed"
            continue
        try:
            own = asked(folder, name, memory)
            # Kernels that a machine never compiled before are, so that no build holds a compiler.
            run(python, own | {"do": "nothing"}, most_s)
            said, peak = run(python, own | {"do": "build"}, most_s)
            _, nothing = run(python, own | {"do": "nothing"}, most_s)
            knobs[name] = swept(python, own, name, most_s)
            made[name], python_of[name] = {**said, "peak_mb": peak - nothing}, python
            print("built", name, made[name], flush=True)
        except RuntimeError as error:
            if name == "ours":
                raise
            failed[name] = str(error)
    print("not there:", failed, flush=True)
    return made, knobs, python_of, failed


def swept(python: str, own: dict[str, Any], name: str, most_s: float) -> dict[float, tuple[int, float]]:
    """The least knob that reaches each target, with its recall."""
    told = own | {"do": "sweep", "knobs": CONTESTANTS[name][3], "target": max(TARGETS)}
    points, _ = run(python, told, most_s)
    print("recall", name, points, flush=True)
    return {
        target: next((knob, round(recall, 4)) for knob, recall in points if recall >= target)
        for target in TARGETS
        if points[-1][1] >= target
    }


def rows_of(
    found: dict[tuple[str, float], list[dict[str, float]]],
    knobs: dict[str, dict[float, tuple[int, float]]],
    made: dict[str, dict[str, float]],
    whole: int,
) -> list[dict[str, Any]]:
    """Ours against each peer at equal recall, cold and warm; memory and recall against the bar; what builds took."""
    rows: list[dict[str, Any]] = []

    def row(case: str, unit: str, ours: list[float], peer: list[float], name: str, **more: Any) -> None:
        ratios = sorted(b / a for a, b in zip(ours, peer, strict=True))
        rows.append(
            {
                "case": case,
                "ours": round(statistics.median(ours), 4),
                "peer": round(statistics.median(peer), 4),
                "unit": unit,
                "ratio": round(statistics.median(ratios), 3),
                "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
                "peer_name": name,
                **more,
            }
        )

    fifth = SHARE * whole / 2**20
    for target in TARGETS:
        mine = found.get(("ours", target), [])
        if not mine:
            rows.append(
                {
                    "case": f"queries, recall {target:.2f}",
                    "ours": None,
                    "peer": None,
                    "ratio": None,
                    "unit": "ms",
                    "peer_name": "the bar",
                    "failed": "ours: does not reach it",
                }
            )
            continue
        anon = [one["anon_mb"] for one in mine]
        row(f"memory while it is searched, recall {target:.2f}", "MB", anon, [fifth] * len(anon), "the bar")
        for name in made:
            theirs = found.get((name, target), [])
            if name == "ours" or not theirs:
                continue
            more = {
                "knob_ours": knobs["ours"][target],
                "knob_peer": knobs[name][target],
                **{
                    f"{field}_{who}": round(statistics.median(one[field] for one in turns), 1)
                    for field in ("anon_mb", "file_mb", "cached_mb")
                    for who, turns in (("ours", mine), ("peer", theirs))
                },
            }
            for way in ("cold", "warm"):
                times = [[one[f"{way}_ms"] for one in turns] for turns in (mine, theirs)]
                row(f"{way} queries, recall {target:.2f}", "ms", *times, name, **more)
    row("memory while it is built", "MB", [made["ours"]["peak_mb"]], [fifth], "the bar")
    for name, one in made.items():
        if name != "ours":
            for field, unit in (("seconds", "s"), ("peak_mb", "MB"), ("disk_mb", "MB")):
                row(f"build, {field.split('_')[0]}", unit, [made["ours"][field]], [one[field]], name)
    return rows


if __name__ == "__main__":
    main()
