"""What does a search take while somebody adds vectors, beside hnswlib and usearch, which both allow it?

One index of 20,000 vectors of 128 numbers (M = 16, ef_construction 100). One thread asks for the 10 nearest of one vector after another,
at the ef that reaches recall 0.95 in the index at rest. Beside it another thread adds nothing; an element for every ten searches; one for
every search; one after another, as fast as it can; or 20,000 in one call. Everybody adds by one thread. Contestants take turns in every
round, each in its own turn with an index of its own. Ours is compiled before. A turn ends when its time is over, or where its writer has
added another 20,000; rates are over the time that it lasted, and what is found afterwards is measured again (``recall``, of the index as it
is then). ``failed`` are searches that raised, in all turns: hnswlib's, where it finds fewer than asked for beside a writer.

Bars: p50 and p99 of a search beside a writer at most twice those without (a ratio of at least 0.5 to itself at rest), and at least 1,000
searches a second beside one that adds flat out.

    python benchmarks/hnsw_live.py --json benchmarks/results/hnsw_live.json
"""
# Shapes: N vectors, D dimension

import importlib.util
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from _harness import arguments, finish, start
from _vector_peers import MOST, compile_kernels, least
from anabranch.graph.hnsw import HNSW, brute_force

K, M, EF_CONSTRUCTION, TARGET = 10, 16, 100, 0.95
WAYS = ("at rest", "1 add in 10", "1 add for 1", "flat out", "bulk")


class Index(Protocol):
    """Of a contestant."""

    def add(self, vector_ND: np.ndarray, first: int) -> None:
        """Elements numbered from ``first``."""

    def search(self, vector_D: np.ndarray, ef: int) -> np.ndarray:
        """The ids of the nearest."""


class Ours:
    """By one thread."""

    def __init__(self, dim: int, room: int) -> None:
        self._index = HNSW(dim, M=M, ef_construction=EF_CONSTRUCTION, workers=1)

    def add(self, vector_ND: np.ndarray, first: int) -> None:
        self._index.add(vector_ND)

    def search(self, vector_D: np.ndarray, ef: int) -> np.ndarray:
        return self._index.search(vector_D, K, ef)[0][0]


class Hnswlib:
    """It locks single lists, so adding and searching go on side by side."""

    def __init__(self, dim: int, room: int) -> None:
        import hnswlib

        self._index = hnswlib.Index("l2", dim)
        self._index.init_index(room, M=M, ef_construction=EF_CONSTRUCTION)
        self._index.set_num_threads(1)

    def add(self, vector_ND: np.ndarray, first: int) -> None:
        self._index.add_items(vector_ND, np.arange(first, first + len(vector_ND)), num_threads=1)

    def search(self, vector_D: np.ndarray, ef: int) -> np.ndarray:
        self._index.set_ef(ef)
        return self._index.knn_query(vector_D, K, num_threads=1)[0][0]


class Usearch:
    """It locks single lists, too."""

    def __init__(self, dim: int, room: int) -> None:
        from usearch.index import Index as Made

        self._index = Made(ndim=dim, metric="l2sq", dtype="f32", connectivity=M, expansion_add=EF_CONSTRUCTION)

    def add(self, vector_ND: np.ndarray, first: int) -> None:
        self._index.add(np.arange(first, first + len(vector_ND)), vector_ND, threads=1)

    def search(self, vector_D: np.ndarray, ef: int) -> np.ndarray:
        self._index.expansion_search = ef
        return self._index.search(vector_D, K, threads=1).keys


def contestants() -> dict[str, Callable[[int, int], Index]]:
    found: dict[str, Callable[[int, int], Index]] = {"ours": Ours}
    if importlib.util.find_spec("hnswlib"):
        found["hnswlib"] = Hnswlib
    if importlib.util.find_spec("usearch"):
        found["usearch"] = Usearch
    return found


def drawn(count: int, dim: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centre = np.random.default_rng(99).standard_normal((64, dim))
    return (centre[generator.integers(0, 64, count)] + 0.7 * generator.standard_normal((count, dim))).astype(np.float32)


def reached(index: Index, base_ND: np.ndarray, query_QD: np.ndarray, ef: int) -> float:
    """The recall."""
    truth = brute_force(base_ND, query_QD, K)[0]
    hits = sum(
        len(set(index.search(query, ef).tolist()) & set(row))
        for query, row in zip(query_QD, truth.tolist(), strict=True)
    )
    return hits / truth.size


def least_ef(name: str, index: Index, base_ND: np.ndarray, query_QD: np.ndarray) -> int:
    """The smallest that reaches the recall."""
    ef = least(lambda ef: reached(index, base_ND, query_QD, ef) >= TARGET)
    if ef is None:
        raise RuntimeError(f"{name} does not reach a recall of {TARGET} with an ef of {MOST}")
    return ef


def turn(
    index: Index, way: str, ef: int, query_QD: np.ndarray, base_ND: np.ndarray, more_ND: np.ndarray, seconds: float
) -> dict[str, float]:
    """Searches for so long beside a writer: their latencies, and how many elements came to those of ``base_ND``."""
    done, added, searches, first = threading.Event(), [0], [0], len(base_ND)

    def write() -> None:
        if way == "bulk":
            index.add(more_ND, first)
            added[0] = len(more_ND)
            return
        while not done.is_set() and (way == "at rest" or added[0] < len(more_ND)):
            wanted = {"at rest": 0.0, "1 add in 10": searches[0] / 10, "1 add for 1": searches[0], "flat out": 1e18}[
                way
            ]
            if added[0] < wanted:
                index.add(more_ND[added[0] : added[0] + 1], first + added[0])
                added[0] += 1
            else:
                time.sleep(0.0002)

    writer = threading.Thread(target=write)
    taken: list[float] = []
    failed = 0
    begin = time.perf_counter()
    writer.start()
    # Beside a writer that has nothing more to add, searches are those of an index at rest.
    while (writer.is_alive() and (way == "bulk" or time.perf_counter() < begin + seconds)) or not taken:
        before = time.perf_counter()
        try:
            index.search(query_QD[searches[0] % len(query_QD)], ef)
            taken.append(time.perf_counter() - before)
        except RuntimeError:
            # hnswlib, where it finds fewer than asked for beside a writer.
            failed += 1
        searches[0] += 1
    wall = time.perf_counter() - begin
    done.set()
    writer.join()
    cuts = statistics.quantiles(taken, n=100, method="inclusive") if len(taken) > 1 else taken * 99
    now_ND = np.concatenate([base_ND, more_ND[: added[0]]])
    return {
        "recall": reached(index, now_ND, query_QD, ef),
        "p50_us": 1e6 * cuts[49],
        "p99_us": 1e6 * cuts[98],
        "searches_s": len(taken) / wall,
        "added_s": added[0] / wall,
        "failed": failed,
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn")
    options = parser.parse_args()
    start(options)
    size, dim = (2000, 32) if options.quick else (20_000, 128)
    rounds, seconds = (2, 0.5) if options.quick else (min(options.rounds, 5), options.seconds)
    base_ND, query_QD, more_ND = drawn(size, dim, 1), drawn(500, dim, 2), drawn(size, dim, 3)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    made = contestants()
    compile_kernels()
    ef_of: dict[str, int] = {}
    for number in range(rounds):
        for way in WAYS:
            names = list(made) if number % 2 else list(made)[::-1]
            for name in names:
                index = made[name](dim, 2 * size)
                index.add(base_ND, 0)
                if name not in ef_of:
                    ef_of[name] = least_ef(name, index, base_ND, query_QD)
                found.setdefault((name, way), []).append(
                    turn(index, way, ef_of[name], query_QD, base_ND, more_ND, seconds)
                )
                print(
                    number, way, name, {key: round(value, 3) for key, value in found[name, way][-1].items()}, flush=True
                )
    for row in measured(found):
        print(row)
    packages = ["numpy", "numba", *(name for name in made if name != "ours")]
    finish("hnsw_live", rows(found, made), options, packages)


def measured(found: dict[tuple[str, str], list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians and ranges."""
    rows = []
    for (name, way), turns in found.items():
        row: dict[str, Any] = {"contestant": name, "beside": way}
        for field in turns[0]:
            values = [one[field] for one in turns]
            row |= {
                field: round(statistics.median(values), 3),
                f"{field}_range": [round(min(values), 1), round(max(values), 1)],
            }
        rows.append(row)
    return rows


def rows(found: dict[tuple[str, str], list[dict[str, float]]], made: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours beside each writer against ours at rest, against 1,000 searches a second, and against each peer beside the same writer."""
    rows = []

    def row(
        case: str,
        unit: str,
        ours: list[float],
        peer: list[float],
        name: str,
        *,
        more_is_better: bool = False,
        facts: dict[str, Any] | None = None,
    ) -> None:
        ratios = sorted(a / b if more_is_better else b / a for a, b in zip(ours, peer, strict=True))
        middle = statistics.median(ratios)
        rows.append(
            {
                "case": case,
                "ours": round(statistics.median(ours), 2),
                "peer": round(statistics.median(peer), 2),
                "unit": unit,
                "ratio": round(middle, 3),
                "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
                "peer_name": name,
                **(facts or {}),
            }
        )

    for way in WAYS:
        mine = found["ours", way]
        for field in ("p50_us", "p99_us"):
            values = [one[field] for one in mine]
            if way != "at rest":
                row(
                    f"{field[:3]} of a search, {way}",
                    "us",
                    values,
                    [one[field] for one in found["ours", "at rest"]],
                    "at rest",
                )
            for name in made:
                if name != "ours":
                    theirs = found[name, way]
                    facts = {
                        "recall_ours": round(statistics.median(one["recall"] for one in mine), 4),
                        "recall_peer": round(statistics.median(one["recall"] for one in theirs), 4),
                        "failed_searches_peer": sum(int(one["failed"]) for one in theirs),
                    }
                    row(
                        f"{field[:3]} of a search, {way}",
                        "us",
                        values,
                        [one[field] for one in theirs],
                        name,
                        facts=facts,
                    )
        if way == "flat out":
            speed = [one["searches_s"] for one in mine]
            row(
                "searches beside flat out",
                "1/s",
                speed,
                [1000.0] * len(speed),
                "bar of 1,000 a second",
                more_is_better=True,
            )
        if way in ("flat out", "bulk"):
            for name in made:
                if name != "ours":
                    values = [one["added_s"] for one in mine]
                    row(
                        f"adds, {way}",
                        "1/s",
                        values,
                        [one["added_s"] for one in found[name, way]],
                        name,
                        more_is_better=True,
                    )
    return rows


if __name__ == "__main__":
    main()
