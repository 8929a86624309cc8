"""How long does a search of real vectors take at recall 0.95, many queries in one call and one in each, beside who is known to be fast?

hnswlib, faiss, usearch, Glass (pip pyglass-portable) and Intel's SVS (pip scalable-vs), as far as they are installed, in three classes of
what is kept of a vector (`_vector_peers`), on vectors of several kinds (`_vector_sets`). All by one thread, in processor time, in turns.
Everybody gets, of some settings of the graph, the one that is fastest on a quarter of the vectors, then the least effort that reaches the
recall of the 10 nearest. Rows have bytes per vector of the saved index, and how long it took to build. Recall against speed is drawn
beside the record, from all efforts. Then searches with a filter (a share of ids), beside hnswlib's function and faiss' bitmap; packed bits,
where found is what is as near as the tenth nearest; two threads, by the clock; the first call in a process; bytes beside their formula.
All else is measured once kernels are compiled.

Bars: one query at a time and many, at least 1.0 times each peer of the class, filters too; two threads at least 1.7 times one; the first
call within 15 s with nothing compiled and 1.5 s else. Vectors of one's own: ``--vectors FILE.npy`` (rows; the last 1,000 are queries).

    python benchmarks/hnsw.py --threads 1 --json benchmarks/results/hnsw.json

All of it takes some 25 minutes. Sets are made once, into ``--sets`` (runs/vectors), from what `_vector_sets` says.
"""
# Shapes: N vectors, D dimension, Q queries

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from _harness import arguments, finish, start
from _records import write_record
from _vector_bits import bits_of, builds, score_of
from _vector_filters import filtering
from _vector_peers import KINDS, MOST, SETTINGS, Built, Contestant, K, Ours, compile_kernels, contestants, least
from _vector_picture import draw
from _vector_sets import QUERIES, of_set, sets
from anabranch.graph.hnsw import HNSW, brute_force

TARGETS = (0.95, 0.9, 0.8)
EFFORTS = (10, 16, 25, 40, 63, 100, 160, 250, 400)
ENOUGH = 0.998
SHARES = (0.5, 0.1)

# The set on which codes of less than a byte run too: learning them takes longer than all else.
OF_CODES = "SIFT"

# Packages by the name that they are imported by.
PACKAGES = {
    "hnswlib": "hnswlib",
    "faiss": "faiss-cpu",
    "usearch": "usearch",
    "glass": "pyglass-portable",
    "svs": "scalable-vs",
}


def recall(found_QK: np.ndarray, truth_QK: np.ndarray) -> float:
    hits = [len(set(a) & set(b)) for a, b in zip(found_QK.tolist(), truth_QK.tolist(), strict=True)]
    return sum(hits) / truth_QK.size


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of a call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def singly(index: Built, query_QD: np.ndarray) -> None:
    """One query in each call."""
    for query_D in query_QD:
        index.one(query_D)


# Settings and efforts


def least_effort(index: Built, query_QD: np.ndarray, truth_QK: np.ndarray, target: float) -> int | None:
    """The smallest that reaches a recall; None where it is out of reach."""

    def reaches(effort: int) -> bool:
        index.aim(effort)
        return recall(index.batch(query_QD), truth_QK) >= target

    return least(reaches)


def best_setting(one: Contestant, base_ND: np.ndarray, query_QD: np.ndarray) -> str:
    """The one with which a search of a part of the vectors is fastest at the recall."""
    part_ND = base_ND[: len(base_ND) // 4]
    truth_QK = brute_force(part_ND, query_QD, K)[0]
    taken = {}
    for name in one.settings():
        index = one.build(part_ND, SETTINGS[name])
        effort = least_effort(index, query_QD, truth_QK, TARGETS[0])
        if effort is None:
            taken[name] = float("inf")
            continue
        index.aim(effort)
        taken[name] = min(seconds(lambda index=index: index.batch(query_QD)) for _ in range(3))  # type: ignore[misc]
    return min(taken, key=lambda name: taken[name])


# Rows


def row(
    case: str, mine: float, peer: float, unit: str, name: str, ratios: list[float] | None = None, **facts: Any
) -> dict[str, Any]:
    """``ratios``: of each round, the peer's time by ours; without them the ratio is that of the two figures."""
    ratio, spread = peer / mine, 0.0
    if ratios is not None:
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        spread = high - low
    print(
        f"{case:<58} ours {mine:11.2f} {unit}   {name:<18} {peer:11.2f} {unit}   ratio {ratio:5.2f}",
        file=sys.stderr,
        flush=True,
    )
    return {
        "case": case,
        "ours": round(mine, 4),
        "peer": round(peer, 4),
        "ratio": round(ratio, 3),
        "spread": round(spread, 3),
        "unit": unit,
        "peer_name": name,
        **facts,
    }


def in_turns(works: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Everyone takes a turn in each round, after one that does not count; seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in list(works)[:: 1 if number % 2 else -1]:
            begin = clock()
            works[name]()
            if number:
                times[name].append(clock() - begin)
    return times


def race(
    case: str, works: dict[str, Callable[[], Any]], count: int, options: Any, facts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row per peer: microseconds of one of ``count`` queries. ``facts`` of everybody are told as ``..._ours`` and ``..._peer``."""
    times = in_turns(works, options.rounds, time.process_time)
    mine, rows = times.pop("ours"), []
    for name, theirs in times.items():
        told = {f"{key}_ours": value for key, value in facts["ours"].items()}
        told |= {f"{key}_peer": value for key, value in facts[name].items()}
        ratios = [peer / own for peer, own in zip(theirs, mine, strict=True)]
        each = [1e6 * statistics.median(taken) / count for taken in (mine, theirs)]
        rows.append(row(case, *each, "us", name, ratios, **told))
    return rows


def curve(index: Built, query_QD: np.ndarray, truth_QK: np.ndarray, options: Any) -> dict[str, list[list[float]]]:
    """Recall, queries a second and effort of every effort until nearly all is found, in both ways."""
    found: dict[str, list[list[float]]] = {"batch": [], "one at a time": []}
    few_QD = query_QD[: len(query_QD) // 4]
    for effort in EFFORTS[:4] if options.quick else EFFORTS:
        index.aim(effort)
        reached = recall(index.batch(query_QD), truth_QK)
        for way, work, count in (
            ("batch", lambda: index.batch(query_QD), len(query_QD)),
            ("one at a time", lambda: singly(index, few_QD), len(few_QD)),
        ):
            taken = min(seconds(work) for _ in range(2))
            found[way].append([round(reached, 4), round(count / max(taken, 1e-9)), effort])
        if reached >= ENOUGH:
            break
    return found


def measure(
    name: str, base_ND: np.ndarray, query_QD: np.ndarray, people: list[Contestant], options: Any
) -> tuple[list[Any], list[Any]]:
    """Rows and curves of one set."""
    truth_QK = brute_force(base_ND, query_QD, K)[0]
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for kind in KINDS if name == OF_CODES else KINDS[:3]:
        built: dict[str, Built] = {}
        facts: dict[str, dict[str, Any]] = {}
        for one in (one for one in people if one.kind == kind):
            setting = best_setting(one, base_ND, query_QD)
            begin = time.process_time()
            index = built[one.name] = one.build(base_ND, SETTINGS[setting])
            taken = time.process_time() - begin
            index.settle()
            size = index.saved_bytes() / len(base_ND)
            facts[one.name] = {"setting": setting, "build_s": round(taken, 2), "bytes": round(size, 1)}
            for way, points in curve(index, query_QD, truth_QK, options).items():
                curves.append({"set": name, "kind": kind, "contestant": one.name, "way": way, "points": points})
        case = f"{name} {len(base_ND):,} x {base_ND.shape[1]}, {kind}"
        if len(built) > 1:
            rows += at_equal_recall(case, built, facts, query_QD, truth_QK, options)
        if kind == "float32" and "hnswlib" in facts:
            rows.append(build_row(case, facts["ours"], facts["hnswlib"]))
    return rows, curves


def build_row(case: str, ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """How long each took to build what it was fastest with, once."""
    made = row(f"{case}, build", ours["build_s"], peer["build_s"], "s", "hnswlib")
    return made | {"setting_ours": ours["setting"], "setting_peer": peer["setting"]}


def at_equal_recall(
    case: str,
    built: dict[str, Built],
    facts: dict[str, dict[str, Any]],
    query_QD: np.ndarray,
    truth_QK: np.ndarray,
    options: Any,
) -> list[dict[str, Any]]:
    """Rows of one class: at the highest target that ours reaches, those who do not being told."""
    for target in TARGETS:
        efforts = {name: least_effort(index, query_QD, truth_QK, target) for name, index in built.items()}
        if efforts["ours"] is not None:
            break
    failed = [name for name, effort in efforts.items() if effort is None]
    rows = [
        {
            "case": f"{case}, {way}",
            "ours": None,
            "peer": None,
            "ratio": None,
            "spread": None,
            "unit": "us",
            "peer_name": name,
            "failed": f"{name}: recall {target if efforts['ours'] else TARGETS[-1]} is out of reach",
        }
        for name in failed
        for way in ("batch", "one at a time")
    ]
    if efforts["ours"] is None:
        return rows
    for name, effort in efforts.items():
        if effort is not None:
            built[name].aim(effort)
            reached = recall(built[name].batch(query_QD), truth_QK)
            facts[name] |= {"ef": effort, "recall": round(reached, 4)}
    able = {name: index for name, index in built.items() if name not in failed}
    few_QD = query_QD[: len(query_QD) // 2]
    batch = {name: lambda index=index: index.batch(query_QD) for name, index in able.items()}
    each = {name: lambda index=index: singly(index, few_QD) for name, index in able.items()}
    rows += race(f"{case}, batch", batch, len(query_QD), options, facts)  # type: ignore[arg-type]
    return rows + race(f"{case}, one at a time", each, len(few_QD), options, facts)  # type: ignore[arg-type]


# Filters


def filtered(base_ND: np.ndarray, query_QD: np.ndarray, options: Any) -> list[dict[str, Any]]:
    """One query at a time, of a share of the ids that is drawn: our prepared filter, hnswlib's function, faiss' bitmap."""
    setting = next(iter(SETTINGS.values()))
    rows, few_QD = [], query_QD[: len(query_QD) // 2]
    mine = Ours(base_ND, setting).index
    peers = filtering(base_ND, setting)
    for share in SHARES:
        allowed_N = np.random.default_rng(1).random(len(base_ND)) < share
        ids = np.flatnonzero(allowed_N)
        truth_QK = brute_force(base_ND[ids], few_QD, K, ids=ids)[0]
        prepared = mine.prepare_filter(allowed_N)
        searches: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
            "ours": lambda query_D, ef, prepared=prepared: mine.search(query_D, K, ef, prepared)[0],  # type: ignore[misc]
            **{name: made(allowed_N) for name, made in peers.items()},
        }
        facts, works = {}, {}
        for name, search in searches.items():

            def reached(
                ef: int, search: Callable[[np.ndarray, int], np.ndarray] = search, truth_QK: np.ndarray = truth_QK
            ) -> float:
                found_QK = np.concatenate([np.reshape(search(query_D, ef), (1, K)) for query_D in few_QD])
                return recall(found_QK.astype(np.int64), truth_QK)

            ef = least(lambda ef, reached=reached: reached(ef) >= TARGETS[0])  # type: ignore[misc]
            if ef is None:
                raise RuntimeError(f"{name} does not reach a recall of {TARGETS[0]} among {share:.0%} of the ids")
            facts[name] = {"ef": ef, "recall": round(reached(ef), 4)}
            works[name] = lambda search=search, ef=ef: [search(query_D, ef) for query_D in few_QD]
        rows += race(f"filter, {share:.0%} of {len(base_ND):,} ids, one at a time", works, len(few_QD), options, facts)
    return rows


# Bits


def packed_bits(base_ND: np.ndarray, query_QD: np.ndarray, options: Any) -> list[dict[str, Any]]:
    """Many queries in a call, and builds."""
    base_NB, query_QB = bits_of(base_ND), bits_of(query_QD)
    score, case = score_of(base_NB, query_QB), f"bits {len(base_NB):,} x {8 * base_NB.shape[1]}"
    works, facts = {}, {}
    made = builds()
    for name, build in made.items():
        search = build(base_NB)
        ef = least(lambda ef, search=search: score(search(query_QB, ef)) >= TARGETS[0]) or MOST  # type: ignore[misc]
        facts[name] = {"ef": ef, "recall": round(score(search(query_QB, ef)), 4)}
        works[name] = lambda search=search, ef=ef: search(query_QB, ef)  # type: ignore[misc]
    rows = race(f"{case}, batch", works, len(query_QB), options, facts)
    again = {name: lambda build=build: build(base_NB) for name, build in made.items()}  # type: ignore[misc]
    return rows + race(f"{case}, build", again, len(base_NB), options, {name: {} for name in made})


# Threads, the first call, memory


def two_threads(base_ND: np.ndarray, query_QD: np.ndarray, options: Any) -> list[dict[str, Any]]:
    """By the clock, so on a quiet machine."""

    def made(threads: int) -> HNSW:
        index = HNSW(base_ND.shape[1], M=16, ef_construction=100, workers=threads)
        index.add(base_ND)
        return index

    one, two = made(1), made(2)
    rows = []
    for case, works, rounds in (
        ("two threads, build", {"ours": lambda: made(2), "one thread": lambda: made(1)}, min(options.rounds, 3)),
        (
            "two threads, queries",
            {"ours": lambda: two.search(query_QD, K, 40), "one thread": lambda: one.search(query_QD, K, 40)},
            min(options.rounds, 5),
        ),
    ):
        times = in_turns(works, rounds, time.perf_counter)
        ratios = [peer / own for peer, own in zip(times["one thread"], times["ours"], strict=True)]
        figures = [1e3 * statistics.median(times[name]) for name in ("ours", "one thread")]
        rows.append(row(case, *figures, "ms", "one thread", ratios))
    return rows


FIRST = """
import time
import numpy as np
from anabranch.graph.hnsw import HNSW
begin = time.process_time()
index = HNSW(16, workers=1)
index.add(np.eye(16))
index.search(np.eye(16), 3)
print(time.process_time() - begin)
"""


def first_call() -> list[dict[str, Any]]:
    """Compiling, and reading what was compiled, in processes of their own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        seconds = [
            float(
                subprocess.run([sys.executable, "-c", FIRST], env=environment, capture_output=True, check=True).stdout
            )
            for _ in range(2)
        ]
    return [
        row("first add and search, empty cache", seconds[0], 15.0, "s", "bar"),
        row("first add and search, from the cache", seconds[1], 1.5, "s", "bar"),
    ]


def memory(base_ND: np.ndarray) -> list[dict[str, Any]]:
    """Bytes per element against row + 8 M + 4 M / (M - 1) + 18 (links above level 0; id, level, place, two marks) + 8 (what its
    distances are measured by)."""
    rows, M = [], 16
    for dtype, size in (("f32", 4), ("f16", 2), ("i8", 1)):
        index = HNSW(base_ND.shape[1], M=M, ef_construction=20, dtype=dtype, rerank=False)
        index.add(base_ND)
        row_bytes = -(-base_ND.shape[1] * size // 64) * 64
        formula = row_bytes + 8 * M + 4 * M / (M - 1) + 18 + 8
        rows.append(
            row(f"bytes per element, {dtype}", index.stats()["size_bytes"] / len(base_ND), formula, "bytes", "formula")
        )
    for quantization, size in (("pq", base_ND.shape[1] // 4), ("int4", base_ND.shape[1] / 2 + 8)):
        index = HNSW(base_ND.shape[1], M=M, ef_construction=20, quantization=quantization)
        index.add(base_ND)
        rows.append(row(f"bytes of a code, {quantization}", index.stats()["code_bytes"], size, "bytes", "formula"))
    return rows


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument(
        "--vectors", type=Path, metavar="FILE", help="vectors of one's own, .npy, the last 1,000 of them queries"
    )
    parser.add_argument(
        "--sets", type=Path, metavar="FOLDER", default=Path("runs/vectors"), help="where sets are kept (runs/vectors)"
    )
    parser.add_argument(
        "--debian", type=Path, metavar="FOLDER", default=Path("/"), help="where Debian packages are unpacked (/)"
    )
    options = parser.parse_args()
    given = options.rounds
    start(options)
    options.rounds = given or (2 if options.quick else 7)
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    if options.only in "first add and search":
        rows += first_call()
    compile_kernels()
    people = contestants()
    for name, base_ND, query_QD in cases(options):
        begin = time.perf_counter()
        if any(options.only in f"{name}, {kind}" for kind in KINDS):
            more, drawn = measure(name, base_ND, query_QD, people, options)
            rows, curves = rows + more, curves + drawn
        if name == "clusters":
            rows += filtered(base_ND, query_QD, options) if options.only in "filter" else []
            rows += packed_bits(base_ND, query_QD, options) if options.only in "bits" else []
            rows += two_threads(base_ND, query_QD, options) if options.only in "two threads" else []
            rows += memory(base_ND) if options.only in "bytes per element" else []
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    peers = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module)]
    finish("hnsw", rows, options, ("numpy", "numba", "anabranch", *peers))
    if options.json:
        record = {**json.loads(options.json.read_text()), "curves": curves}
        write_record(options.json, record)
        draw(record, options.json.with_suffix(".svg"))


def cases(options: Any) -> Any:
    """Name, vectors and queries of each set."""
    has_fashion = False
    for one in sets():
        # Of the two kinds of pictures the larger set, unless the other is asked for.
        if one.name == "MNIST" and has_fashion and options.only != one.name:
            continue
        if one.name != "clusters" and not any(options.only in f"{one.name}, {kind}" for kind in KINDS):
            continue
        most, queries = (2000, 100) if options.quick else (one.most, QUERIES // 2)
        made = of_set(one, options.sets, options.debian, most, queries)
        if made is not None:
            has_fashion |= one.name == "Fashion-MNIST"
            yield one.name, *made
    if options.vectors:
        own_ND = np.load(options.vectors).astype(np.float32)
        yield options.vectors.stem, own_ND[:-QUERIES], own_ND[-QUERIES:]


if __name__ == "__main__":
    main()
