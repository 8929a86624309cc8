"""How quick is routing by Composition of Experts, does it score as semantic-router's categories do, how long does the integer program take?

Contestants, one thread each, on LLMRouter's questions with the same MiniLM vectors and split (seed 0; needs ANABRANCH_DATA):

    ours              the whole decision: category, calibrated confidence, ordered candidates with qualities and reasons
    semantic-router   IndexedRouter of aurelio-labs, routes = categories, utterances = the questions learned from, its best-of-5 mean;
                      from an environment of its own (``--peer PYTHON``), awaited on an event loop

Scores: the same plain map from categories to experts on both classifiers' categories; semantic-router also with the sum of 32 neighbours
and with the maximum, each as it is and calibrated by its ``fit()`` as its documentation advises, the best of which counts. Bars: ours
within 0.2 ms of processor time given a vector, no slower than semantic-router with embedding included; score at least its; 40 categories
by 30 experts within 2 s. Rows of one contestant have the bar as ``peer``, in ms.

    python -m venv sr && sr/bin/pip install semantic-router
    python benchmarks/coe.py --peer sr/bin/python --json benchmarks/results/coe.json
"""
# Shapes: N rows, D dimensions, M models

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from _harness import arguments, finish, start
from anabranch.routers import strategies
from anabranch.routers.coe import Limits, QualityTable, solve_map
from anabranch.routers.coe.quality import table_of_scores
from anabranch.routers.embed.minilm import MiniLM
from anabranch.studies.composition_of_experts import outcomes, sizes

BAR_MS, PROGRAM_BAR_S = 0.2, 2.0
ASKED = 400  # decisions of a turn


class Peer:
    """A process of the other environment."""

    def __init__(self, python: str, train: Any, test: Any, folder: str) -> None:
        file = Path(folder) / "data.npz"
        np.savez(file, train_ND=train.vector_ND, train_label_N=np.array(train.task), test_ND=test.vector_ND)
        script = Path(__file__).with_name("_semantic_router.py")
        self.process = subprocess.Popen(
            [python, str(script), str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self.answer()["version"]

    def ask(self, command: str) -> Any:
        print(command, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("semantic-router's process ended; see its message above")
        return json.loads(line)


def row(case: str, ours: list[float], peer: list[float], peer_name: str, **more: Any) -> dict[str, Any]:
    """Milliseconds, medians, ratio and its interquartile range."""
    ratios = [theirs / mine for theirs, mine in zip(peer, ours, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    made = {
        "case": case,
        "ours": round(statistics.median(ours), 4),
        "peer": round(statistics.median(peer), 4),
        "ratio": round(statistics.median(ratios), 3),
        "spread": round(high - low, 3),
        "unit": "ms",
        "peer_name": peer_name,
        **more,
    }
    print(json.dumps(made), file=sys.stderr, flush=True)
    return made


def mean_score(names: list[str], found: Any, test: Any) -> float:
    """Of the expert of each row's category."""
    column_N = [test.models.index(found[name]) for name in names]
    return float(test.score_NM[np.arange(len(test)), column_N].mean())


def routing_rows(options: Any) -> list[dict[str, Any]]:
    """Latency and score."""
    train, test, pool = outcomes("llmrouter", 0)
    plain = solve_map(table_of_scores(train.task, train.score_NM, train.models), sizes(pool))
    queries = list(test.queries())[:ASKED]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        peer = None if options.peer is None else Peer(options.peer, train, test, folder)
        theirs: dict[str, float] = {}
        if peer is not None:
            theirs = {
                name: mean_score(peer.ask(f"predict {name}"), plain, test)
                for way in ("default", "sum32", "max")
                for name in (way, f"{way}+fit")
            }
        for head in ("logreg", "knn"):
            router = strategies.make("coe", head=head, parameters=sizes(pool)).fit(train)
            score = mean_score(list(router.predictor.router.predict(test.vector_ND).category), plain, test)
            scores = {
                "score": round(score, 4),
                "peer_scores": {name: round(value, 4) for name, value in theirs.items()},
            }
            ours, other, spent = [], [], []
            for _ in range(options.rounds):
                began, worked = time.perf_counter(), time.process_time()
                for query in queries:
                    router.route(query, pool)
                ours.append(1e3 * (time.perf_counter() - began) / len(queries))
                spent.append(1e3 * (time.process_time() - worked) / len(queries))
                if peer is not None:
                    other.append(1e3 * peer.ask(f"time {ASKED}"))
            rows.append(row(f"decision given a vector, {head}", spent, [BAR_MS] * len(spent), "the bar"))
            if peer is not None:
                name = f"semantic-router {peer.version}"
                rows.append(
                    row(f"decision given a vector, {head}, against semantic-router", ours, other, name, **scores)
                )
                embed = embedding_ms(test)
                both = [value + embed for value in ours], [value + embed for value in other]
                rows.append(row(f"the same with embedding ({embed:.1f} ms a text)", *both, name, **scores))
    return rows


def embedding_ms(test: Any, texts: int = 20) -> float:
    """Of one text at a time; the median."""
    embedder, times = MiniLM(MiniLM.Config()), []
    for text in test.query[:texts]:
        began = time.perf_counter()
        embedder.embed([text])
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def program_rows(options: Any) -> list[dict[str, Any]]:
    """Processor time of the integer program, for a small, a middling and a large budget; ours is the slowest of ten instances."""
    rows = []
    for share in (0.02, 0.05, 0.2):
        times = []
        for seed in range(3 if options.quick else 10):
            generator = np.random.default_rng(seed)
            quality_CE = generator.random((40, 30))
            table = QualityTable.of({f"c{c}": {f"e{e}": float(quality_CE[c, e]) for e in range(30)} for c in range(40)})
            size = {f"e{e}": float(generator.uniform(1, 100)) for e in range(30)}
            began = time.process_time()
            solve_map(table, size, limits=Limits(budget=share * sum(size.values())), solver="milp")
            times.append(1e3 * (time.process_time() - began))
        case, bars = f"40 categories x 30 experts, budget {share:.0%}", [1e3 * PROGRAM_BAR_S] * len(times)
        rows.append(row(case, times, bars, "the bar", slowest_ms=round(max(times), 1)))
    return rows


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment with semantic-router")
    options = parser.parse_args()
    options.threads = 1
    start(options)
    rows = [*program_rows(options), *routing_rows(options)]
    finish("coe", [item for item in rows if options.only in item["case"]], options, ["anabranch", "numpy", "scipy"])


if __name__ == "__main__":
    main()
