"""How fast are similarities and rankings of G-Rank, against the authors' way of computing them and against plain Python?

No package does this. The peers are: ``notebook``, the per-tick ranking of the authors' notebook transcribed from pandas to numpy
columns, with the paper's formula (the notebook's own differs, see docs/systems/g-rank.md); the notebook itself makes data frames at
every step and is slower by far (its authors give 30 to 1,000 minutes for 10,000 ticks). ``recount``, plain Python that counts a log afresh
for each question. ``sets``, plain Python with a set of clicks per node made beforehand. Results are compared first. Bar: against the
notebook's own times 100 times faster; against these peers none is set.

    python benchmarks/g_rank.py --json benchmarks/results/g_rank.json
"""
# Shapes: R rows of a log, N nodes

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from _harness import arguments, compare, finish, start
from anabranch.graph.rank import NONE, GRank, Network, Peer, Row

TOP = 10


def notebook_similarity(log: dict[str, np.ndarray], i: int, j: int) -> float:
    """One peer, as the notebook does it: every question scans the whole log."""
    mine, theirs = (np.flatnonzero(log["origin"] == node) for node in (i, j))

    def best(rows: np.ndarray) -> np.ndarray:
        terms, counts = np.unique(log["term"][rows], return_counts=True)
        return terms[np.lexsort((terms, -counts))][:TOP]

    common_terms = len(np.intersect1d(best(mine), best(theirs)))
    pair = log["term"] * 100_000 + log["item"]
    common_clicks = len(np.intersect1d(pair[mine], pair[theirs]))
    union = len(np.union1d(log["item"][mine], log["item"][theirs]))
    return (common_terms + common_clicks**2) / union if union else 0.0


def notebook_rank(log: dict[str, np.ndarray], i: int, term: int, F: float) -> dict[int, float]:
    """Similarities of all peers, then the scores of a term."""
    peers = [int(j) for j in np.unique(log["origin"]) if j != i]
    raw = {j: notebook_similarity(log, i, j) for j in peers}
    largest = max(raw.values(), default=0.0) or 1.0
    weight = {j: value / largest + F for j, value in raw.items()} | {i: 1.0 + F}
    score: dict[int, float] = {}
    for j in [i, *peers]:
        rows = np.flatnonzero((log["term"] == term) & (log["origin"] == j))
        items, counts = np.unique(log["item"][rows], return_counts=True)
        for item, count in zip(items.tolist(), counts.tolist(), strict=True):
            score[item] = score.get(item, 0.0) + count * weight[j]
    return score


def recount_rank(rows: list[Row], i: str, term: str, F: float) -> dict[Any, float]:
    """Plain Python, one pass over the rows for each table."""
    clicks: dict[str, set] = defaultdict(set)
    items: dict[str, set] = defaultdict(set)
    terms: dict[str, Counter] = defaultdict(Counter)
    counts: dict[Any, Counter] = defaultdict(Counter)
    for row in rows:
        clicks[row.origin].add((row.term, row.item))
        items[row.origin].add(row.item)
        terms[row.origin][row.term] += 1
        if row.term == term:
            counts[row.item][row.origin] += 1
    best = {j: set(sorted(count, key=lambda t: (-count[t], t))[:TOP]) for j, count in terms.items()}
    raw = {
        j: (len(best[i] & best[j]) + len(clicks[i] & clicks[j]) ** 2) / len(items[i] | items[j])
        for j in clicks
        if j != i
    }
    largest = max(raw.values(), default=0.0) or 1.0
    weight = {j: value / largest + F for j, value in raw.items()} | {i: 1.0 + F}
    return {item: sum(count * weight[j] for j, count in origins.items()) for item, origins in counts.items()}


class Sets:
    """Plain Python over a log in one place: a set of clicks, items and terms per node, made once."""

    def __init__(self, nodes: list[int], terms: list[str], items: list[int]) -> None:
        self.clicks: dict[int, set] = defaultdict(set)
        self.items: dict[int, set] = defaultdict(set)
        self.counts: dict[str, Counter] = defaultdict(Counter)
        counted: dict[int, Counter] = defaultdict(Counter)
        for node, term, item in zip(nodes, terms, items, strict=True):
            self.clicks[node].add((term, item))
            self.items[node].add(item)
            self.counts[term][item, node] += 1
            counted[node][term] += 1
        self.best = {node: set(sorted(count, key=lambda t: (-count[t], t))[:TOP]) for node, count in counted.items()}

    def rank(self, term: str, i: int, F: float) -> dict[int, float]:
        raw = {
            j: (len(self.best[i] & self.best[j]) + len(self.clicks[i] & self.clicks[j]) ** 2)
            / len(self.items[i] | self.items[j])
            for j in self.clicks
            if j != i
        }
        largest = max(raw.values(), default=0.0) or 1.0
        score: dict[int, float] = defaultdict(float)
        for (item, j), count in self.counts[term].items():
            score[item] += count * (1.0 + F if j == i else raw[j] / largest + F)
        return score


def check(ours: dict[Any, float], theirs: dict[Any, float], what: str) -> None:
    if ours.keys() != theirs.keys() or any(
        abs(ours[item] - theirs[item]) > 1e-9 * max(1, theirs[item]) for item in ours
    ):
        raise SystemExit(f"{what}: results differ")


def tick(rounds: int, ticks: int) -> dict[str, Any]:
    """What a tick computes at a node: all similarities and one ranking, of logs as they are after so many ticks of 100 nodes."""
    network = Network(F=0.5, explore=0.0, defences=NONE, seed=0)
    network.run(ticks, ticks)
    node, term = 7, 3
    rows = network.rows_of(node)
    pair = network.cell_pair[network.row_cell[rows]]
    log = {"origin": network.row_origin[rows], "term": pair // network.num_items, "item": pair % network.num_items}
    score_TI, _ = network.scores(node)
    theirs = notebook_rank(log, node, term, 0.5)
    check({item: float(score_TI[term, item]) for item in theirs}, theirs, "tick")
    if set(network.rank(node, term)) < set(theirs):
        raise SystemExit("tick: items are missing")
    return compare(
        f"tick of the simulator: similarities and a ranking, log of {len(rows):,} rows",
        lambda: network.rank(node, term),
        {"notebook": lambda: notebook_rank(log, node, term, 0.5)},
        rounds=rounds,
    ) | {"rows": len(rows), "nodes": 100}


def peer(rounds: int, ticks: int) -> dict[str, Any]:
    """A device: its own click, then a ranking; every similarity changes with an own click."""
    network = Network(F=0.5, explore=0.0, defences=NONE, seed=0)
    network.run(ticks, ticks)
    rows = []
    for row in network.rows_of(7):
        term, item = divmod(int(network.cell_pair[network.row_cell[row]]), network.num_items)
        rows.append(Row(f"n{network.row_origin[row]}", int(network.row_number[row]), network.terms[term], item))
    ours = Peer((), "n7", 0.5, 0.0, defences=NONE)
    ours._take(rows, is_ours=True)
    term = network.terms[3]
    check(dict(ours.rank(term)), recount_rank(rows, "n7", term, 0.5), "peer")
    plain = list(rows)

    def click_and_rank() -> None:
        ours.record(term, 1)
        ours.rank(term)

    def recount() -> None:
        plain.append(Row("n7", len(plain), term, 1))
        recount_rank(plain, "n7", term, 0.5)

    row = compare(
        f"peer: a click and a ranking, log of {len(rows):,} rows", click_and_rank, {"recount": recount}, rounds=rounds
    )
    return row | {"rows": len(rows), "wire_bytes_per_row": ours.stats()["bytes"] / ours.stats()["rows"]}


def one_log(rounds: int, num_nodes: int, num_clicks: int) -> list[dict[str, Any]]:
    """A log in one place: counting it, and a ranking for one node. Popular terms, tastes of 20 groups."""
    generator = np.random.default_rng(0)
    node = generator.integers(num_nodes, size=num_clicks)
    term = np.minimum(generator.zipf(1.3, num_clicks), 2000) - 1
    item = (term * 37 + node % 20 * 5 + generator.integers(5, size=num_clicks)) % 20_000
    text = np.char.add("term ", term.astype(str))
    clicks = (node, text, item)
    lists = node.tolist(), text.tolist(), item.tolist()
    ours, plain = GRank(F=0.5, saturation=None).fit(clicks), Sets(*lists)
    for who, what in ((3, "term 0"), (11, "term 5")):
        check(dict(ours.rank(what, who, k=None)), plain.rank(what, who, 0.5), "one log")
    size = {"clicks": num_clicks, "nodes": num_nodes}
    about = f"{num_clicks:,} clicks of {num_nodes:,} nodes"
    return [
        compare(
            f"one log: a ranking for a node, {about}",
            lambda: ours.rank("term 5", 11),
            {"sets": lambda: plain.rank("term 5", 11, 0.5)},
            rounds=rounds,
        )
        | size,
        compare(
            f"one log: counting, {about}",
            lambda: GRank(saturation=None).fit(clicks),
            {"sets": lambda: Sets(*lists)},
            rounds=min(rounds, 5),
        )
        | size,
    ]


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    options = parser.parse_args()
    start(options)
    rows: list[dict[str, Any]] = []
    if options.only in "tick of the simulator":
        rows += [tick(options.rounds, ticks) for ticks in ((600,) if options.quick else (600, 5000))]
    if options.only in "peer":
        rows.append(peer(options.rounds, 600 if options.quick else 5000))
    if options.only in "one log":
        rows += one_log(options.rounds, *((500, 20_000) if options.quick else (5_000, 1_000_000)))
    finish("g_rank", rows, options, ("numpy",))


if __name__ == "__main__":
    main()
