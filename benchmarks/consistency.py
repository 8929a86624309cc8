"""How fast are SRP and SCH, against straightforward Python and numpy that follow the definitions?

Results are compared first, on the part that the peer is given. The peers' loops are slow, so they take a small part of the sequences and
their time is scaled up (it is linear in them; ``peer_share`` says which part), and their memory is not compared. Bars: SRP of a trace of
a million tokens 20 times faster than window by window, SCH of 128 x 512 tokens x 16 layers 50 times faster than a cache of each
size by itself. A cleverer peer, one pass for all sizes over a Python list, stands beside it, without a bar.

    python benchmarks/consistency.py --json benchmarks/results/consistency.avx512_bf16.json  # or of what instructions yours are
"""
# Shapes: S sequences, T tokens, K places, E experts

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from _harness import arguments, finish, peak_megabytes, start
from anabranch.routing import consistency
from anabranch.routing.cache_policy import simulate

EXPERTS, PLACES, LENGTH, WINDOW = 64, 8, 512, 16


def drawn(num_sequences: int) -> np.ndarray:
    """Routes with favourites that drift, so that neighbours agree more than chance: index_STK."""
    generator = np.random.default_rng(0)
    favour_SE = generator.standard_normal((num_sequences, EXPERTS), np.float32)
    index_STK = np.empty((num_sequences, LENGTH, PLACES), np.int32)
    for token in range(LENGTH):
        favour_SE = 0.98 * favour_SE + 0.2 * generator.standard_normal(favour_SE.shape, np.float32)
        liking_SE = favour_SE + generator.standard_normal(favour_SE.shape, np.float32)
        index_STK[:, token] = np.argpartition(liking_SE, EXPERTS - PLACES, -1)[:, EXPERTS - PLACES :]
    return index_STK


def plain_srp(index_STK: np.ndarray) -> float:
    """The definition in numpy: the activations of every window, one by one, then every threshold."""
    counts = []
    for index_TK in index_STK:
        chosen_TE = np.zeros((LENGTH, EXPERTS), np.int64)
        np.put_along_axis(chosen_TE, index_TK.astype(np.int64), 1, 1)
        counts.extend(chosen_TE[first : first + WINDOW].sum(0) for first in range(LENGTH - WINDOW + 1))
    count = np.concatenate(counts)
    active, best = count.sum(), 0.0
    for threshold in range(WINDOW + 1):
        on = count >= threshold
        best = max(best, 2 * count[on].sum() / (WINDOW * on.sum() + active))
    return best


def plain_sch(index_STK: np.ndarray) -> np.ndarray:
    """The definition in Python: one pass over a list that is the stack, for all capacities (first accesses miss)."""
    hits = np.zeros(EXPERTS, np.int64)
    for index_TK in index_STK:
        tokens = index_TK.tolist()
        ahead = [0] * EXPERTS
        for token in tokens[:WINDOW]:
            for x in token:
                ahead[x] += 1
        stack: list[int] = []
        last = [-1] * EXPERTS
        time_now = 0
        for at, token in enumerate(tokens):
            for x in token:
                if x in stack:
                    hits[stack.index(x)] += 1
            for x in token:
                end = stack.index(x) if x in stack else len(stack)
                if stack and end > 0:
                    falling = stack[0]
                    for place in range(1, end):
                        other = stack[place]
                        if (ahead[other], last[other]) < (ahead[falling], last[falling]):
                            stack[place], falling = falling, other
                    if end < len(stack):
                        stack[end] = falling
                    else:
                        stack.append(falling)
                    stack[0] = x
                elif not stack:
                    stack.append(x)
                ahead[x] -= 1
                last[x] = time_now
                time_now += 1
            if at + WINDOW < len(tokens):
                for x in tokens[at + WINDOW]:
                    ahead[x] += 1
    return hits.cumsum()


def plain_sch_by_size(index_STK: np.ndarray) -> np.ndarray:
    """The definition in Python: a cache of each size by itself (first accesses miss)."""
    hits = []
    for capacity in range(1, EXPERTS + 1):
        hit = 0
        for index_TK in index_STK:
            tokens = index_TK.tolist()
            ahead, last, time_now = [0] * EXPERTS, [-1] * EXPERTS, 0
            resident: set[int] = set()
            for token in tokens[:WINDOW]:
                for x in token:
                    ahead[x] += 1
            for at, token in enumerate(tokens):
                hit += len(resident.intersection(token))
                for x in token:
                    if x not in resident:
                        if len(resident) == capacity:
                            resident.remove(min(resident, key=lambda y: (ahead[y], last[y])))
                        resident.add(x)
                    ahead[x] -= 1
                    last[x] = time_now
                    time_now += 1
                if at + WINDOW < len(tokens):
                    for x in tokens[at + WINDOW]:
                        ahead[x] += 1
        hits.append(hit)
    return np.array(hits)


def compare(
    case: str, ours: Callable[[], Any], peer: Callable[[], Any], scale: float, name: str, rounds: int
) -> dict[str, Any]:
    """As `_harness.compare`, but the peer does 1 / ``scale`` of the work."""
    memory = peak_megabytes(ours)
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(rounds):
        for key, work, factor in (("peer", peer, scale), ("ours", ours, 1.0)):
            begin = time.perf_counter()
            work()
            times[key].append(factor * (time.perf_counter() - begin))
    ratios = [theirs / mine for theirs, mine in zip(times["peer"], times["ours"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    row = {
        "case": case,
        "ours": round(1e3 * statistics.median(times["ours"]), 4),
        "peer": round(1e3 * statistics.median(times["peer"]), 4),
        "ratio": round(statistics.median(ratios), 3),
        "spread": round(high - low, 3),
        "unit": "ms",
        "peer_name": name,
        "peer_share": 1 / scale,
        "memory_ours_mb": round(memory, 1),
        "memory_peer_mb": 0.0,
    }
    print(
        f"{case:<44} ours {row['ours']:10.1f} ms   {name} {row['peer']:12.1f} ms   ratio {row['ratio']:8.1f}",
        file=sys.stderr,
    )
    return row


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    options = parser.parse_args()
    start(options)
    rounds, rows = min(options.rounds, 5), []
    num_sequences = 256 if options.quick else 2048  # 1,048,576 tokens of one layer; or 128 sequences of 16 layers
    index_STK = drawn(num_sequences)
    length_S = np.full(num_sequences, LENGTH)
    of = consistency.Routes(0, index_STK, length_S, EXPERTS, PLACES, np.full(num_sequences, None))
    part = index_STK[:4]
    few = consistency.Routes(0, part, length_S[:4], EXPERTS, PLACES, np.full(4, None))
    if abs(float(consistency.srp([few], WINDOW, "model").value) - plain_srp(part)) > 1e-12:
        raise SystemExit("SRP differs from its definition")
    if not np.array_equal(
        simulate(part, EXPERTS, "segment", window=WINDOW, cold="miss").hits_SC.sum(0), plain_sch(part)
    ):
        raise SystemExit("SCH differs from its definition")
    one = index_STK[:1]
    if not np.array_equal(plain_sch(one), plain_sch_by_size(one)):
        raise SystemExit("the two peers differ")
    scale = num_sequences / len(part)
    tokens = f"{num_sequences * LENGTH:,} tokens"
    shape = {"sequences": num_sequences, "length": LENGTH, "experts": EXPERTS, "top_k": PLACES, "window": WINDOW}
    cases = [
        (
            f"SRP, {tokens}, 64 experts",
            lambda: consistency.srp([of], WINDOW, "model"),
            lambda: plain_srp(part),
            scale,
            "numpy, window by window",
        ),
        (
            f"SCH, {num_sequences} x {LENGTH} tokens, 64 experts",
            lambda: simulate(index_STK, EXPERTS, "segment", window=WINDOW, cold="miss"),
            lambda: plain_sch_by_size(one),
            float(num_sequences),
            "Python, size by size",
        ),
        (
            f"SCH, {num_sequences} x {LENGTH} tokens, one pass",
            lambda: simulate(index_STK, EXPERTS, "segment", window=WINDOW, cold="miss"),
            lambda: plain_sch(part),
            scale,
            "Python, one pass",
        ),
    ]
    for case, ours, peer, factor, name in cases:
        if options.only in case:
            rows.append({**compare(case, ours, peer, factor, name, rounds), **shape})
    finish("consistency", rows, options, ("numpy", "anabranch"))


if __name__ == "__main__":
    main()
