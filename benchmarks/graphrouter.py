"""How fast does GraphRouter decide, learn on, and take in a model, and does it train on graphs of 100,000 queries?

Contestants of one decision, given the query's vector, on one and the same graph (LLMRouter's sizes: 4,432 queries, 9 models, 384 numbers
a vector, both modes of ours):

    llmrouter-lib    `route_single` of the package llmrouter-lib as it is, in its own environment (``--peer PYTHON``; it pulls in
                     torch-geometric): it reads its weights from disk, fits its scaler again, builds the graph anew and runs the whole of
                     it for each query. Its Longformer is replaced by the ready vector, so that only deciding is timed.
    rebuilt          the same work written anew on our own network, where the package is not at hand

Rows give milliseconds; ratio is peer / ours. Bars: 100 times llmrouter-lib; a decision among 50 models with 100,000 stored edges in
0.3 ms, those edges of 2,000 queries known fully and of 100,000 observed once each; a model joins with 100 shots in 50 ms; 100,000
queries x 30 models: an epoch (one step of the optimiser over all queries) in 60 s, and less than 2 GiB. Rows of bars have the bar as peer.

    python benchmarks/graphrouter.py --peer PEERS/llmrouter/bin/python --json benchmarks/results/graphrouter.json
"""
# Shapes: N queries, M models, D dimensions

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _harness import arguments, finish, start
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Outcome, Query
from anabranch.routers.graphrouter import GraphRouter
from anabranch.routers.graphrouter.network import Block, Network, Nodes
from anabranch.routers.graphrouter.settings import Episodes, PlusConfig, Training
from anabranch.routers.money import Price

QUERIES, MODELS, DIM = 4432, 9, 384
BAR_DECISION_MS, BAR_JOIN_MS, BAR_EPOCH_S, BAR_GIB, BAR_PEER = 0.3, 50.0, 60.0, 2.0, 100.0
PEER = """
    import json, pickle, sys, time
    import numpy as np, torch
    torch.set_num_threads(1)
    from llmrouter.models.graphrouter import router as module
    from llmrouter.models.graphrouter.graph_nn import FormData, GNNPredictor
    data = np.load(sys.argv[1])
    rounds, folder = int(sys.argv[2]), sys.argv[3]
    made = module.GraphRouter.__new__(module.GraphRouter)
    torch.nn.Module.__init__(made)
    made.device = "cpu"
    made.num_llms = data["score"].shape[1]
    made.model_names = [f"m{m}" for m in range(made.num_llms)]
    from sklearn.preprocessing import MinMaxScaler
    made.query_embedding_list = MinMaxScaler().fit_transform(data["vector"])
    made.performance_list = data["score"].flatten()
    made.llm_embedding = np.random.default_rng(0).normal(size=(made.num_llms, data["vector"].shape[1]))
    made.form_data = FormData("cpu")
    config = {"llm_num": made.num_llms, "model_path": folder + "/gnn.pt"}
    made.gnn_predictor = GNNPredictor(data["vector"].shape[1], data["vector"].shape[1], 64, 1, config, "cpu")
    torch.save(made.gnn_predictor.model.state_dict(), folder + "/gnn.pt")
    made._get_model_path = lambda key: folder + "/gnn.pt"
    ready = torch.from_numpy(data["query"])
    module.get_longformer_embedding = lambda text: ready
    made.route_single({"query": "warm up"})
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        answer = made.route_single({"query": "any"})
        times.append(time.process_time() - begin)
    assert answer["model_name"] in made.model_names
    from importlib.metadata import version
    print(json.dumps({"times": times, "versions": {name: version(name) for name in ("llmrouter-lib", "torch-geometric", "torch")}}))
"""


def made(queries: int, models: int, dim: int = DIM, seed: int = 0, topics: int = 14) -> Recorded:
    """Queries around topics, models good at some of them."""
    rng = np.random.default_rng(seed)
    topic = np.arange(queries) % topics
    centre = rng.normal(size=(topics, dim)).astype(np.float32)
    vector = centre[topic] + 1.5 * rng.standard_normal((queries, dim), dtype=np.float32)
    good = rng.uniform(0.1, 0.9, size=(topics, models))
    score = (rng.uniform(size=(queries, models)) < good[topic]).astype(float)
    cost = np.linspace(1, 5, models) * 1e-4 * rng.uniform(0.8, 1.2, size=(queries, 1))
    return Recorded(
        query=tuple(f"query {row}" for row in range(queries)),
        models=tuple(f"m{m}" for m in range(models)),
        score_NM=score,
        cost_NM=cost,
        task=tuple(f"task {t}" for t in topic),
        vector_ND=vector / np.linalg.norm(vector, axis=1, keepdims=True),
    )


def quick(mode: str = "plus", **plus: Any) -> GraphRouter.Config:
    """A router whose training is short: what is timed does not depend on it."""
    settings = PlusConfig(episodes=Episodes(steps=2), **plus)
    return GraphRouter.Config(mode=mode, training=Training(steps=2, draws=1), plus=settings)  # type: ignore[arg-type]


def queries_of(data: Recorded, count: int) -> list[Query]:
    """Queries beside those that were fitted."""
    rng = np.random.default_rng(1)
    assert data.vector_ND is not None
    found = data.vector_ND[:count] + 0.02 * rng.standard_normal((count, data.vector_ND.shape[1]), dtype=np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return [Query(text=f"new {row}", vector_D=vector, task=data.task[row]) for row, vector in enumerate(found)]


def timed(work: Callable[[int], Any], count: int) -> list[float]:
    """Milliseconds of the processor of each call, after a warm-up."""
    for number in range(min(20, count)):
        work(number)
    times = []
    for number in range(count):
        begin = time.process_time()
        work(number)
        times.append(1e3 * (time.process_time() - begin))
    return times


def bar_row(case: str, times: list[float], bar: float, **more: Any) -> dict[str, Any]:
    """Median against a bar."""
    middle = statistics.median(times)
    row = {
        "case": case,
        "ours": round(middle, 4),
        "peer": bar,
        "ratio": round(bar / middle, 3),
        "unit": "ms",
        "peer_name": "bar",
        "p99": round(float(np.quantile(times, 0.99)), 4),
        **more,
    }
    print(f"{case:<64} {middle:10.4f} ms   p99 {row['p99']:9.4f}   bar {bar:g}", file=sys.stderr, flush=True)
    return row


def against_peer(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One decision, ours against theirs."""
    data = made(QUERIES, MODELS)
    rounds = 3 if options.quick else 15
    if options.peer:
        name, theirs, versions = "llmrouter-lib", *package(options.peer, data, rounds)
    else:
        name, theirs, versions = "rebuilt", rebuilt(data, rounds), {}
    rows = []
    for mode in ("reference", "plus"):
        router = quick(mode).build().fit(data)
        asked = queries_of(data, 400)
        mine = timed(lambda number, router=router, asked=asked: router.decide(asked[number]), 400)
        ratio = statistics.median(theirs) / statistics.median(mine)
        row = {
            "case": f"one decision, {QUERIES:,} queries x {MODELS} models, {mode}",
            "ours": round(statistics.median(mine), 4),
            "peer": round(statistics.median(theirs), 2),
            "ratio": round(ratio, 1),
            "unit": "ms",
            "peer_name": name,
            "bar": BAR_PEER,
            "peer_versions": versions,
        }
        print(
            f"{row['case']:<64} {row['ours']:10.4f} ms   {name} {row['peer']:.1f} ms   ratio {row['ratio']:.0f}",
            file=sys.stderr,
            flush=True,
        )
        rows.append(row)
    return rows


def package(python: str, data: Recorded, rounds: int) -> tuple[list[float], dict[str, str]]:
    """Milliseconds of the package's own `route_single`."""
    assert data.vector_ND is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.npz"
        np.savez(path, vector=data.vector_ND, score=data.score_NM, query=data.vector_ND[0])
        command = [python, "-c", textwrap.dedent(PEER), str(path), str(rounds), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [1e3 * value for value in found["times"]], found["versions"]


def rebuilt(data: Recorded, rounds: int) -> list[float]:
    """The same work on our network: weights from disk, scaler fitted with the query, lists of edges, tensors, a whole pass."""
    assert data.vector_ND is not None
    vectors, scores = data.vector_ND, data.score_NM
    models = np.random.default_rng(0).normal(size=(MODELS, DIM)).astype(np.float32)
    network = Network(DIM, 1, DIM, 32, mean=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gnn.pt"
        torch.save(network.state_dict(), path)

        def decide(_: int) -> int:
            network.load_state_dict(torch.load(path))
            joined = np.vstack([vectors, vectors[:1]])
            low, high = joined.min(0), joined.max(0)
            scaled = (joined - low) / np.maximum(high - low, 1e-9)
            org = [q for q in range(len(joined)) for _ in range(MODELS)]
            des = list(range(MODELS)) * len(joined)
            edge = torch.zeros(len(org), 3)
            edge[: scores.size] = torch.from_numpy(np.repeat(scores.reshape(-1, 1), 3, 1)).float()
            index = torch.tensor([org, des])
            visible = torch.ones(len(joined), MODELS)
            visible[-1] = 0
            block = torch.zeros(len(joined), MODELS, 3).index_put((index[0], index[1]), edge)
            nodes = Nodes(
                torch.tensor(scaled).float(), torch.ones(len(joined), 1), torch.ones(1, 1), torch.tensor(models)
            )
            with torch.no_grad():
                return int(network(nodes, Block(block, visible))[-1].argmax())

        return timed(decide, rounds)


def latency(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Deciding, observing and joining with 50 models and 100,000 stored edges."""
    rows, count = [], 200 if options.quick else 2000
    full = made(2000, 50)
    router = quick(exact_below=1).build().fit(full)
    asked = queries_of(full, count % 2000 or 2000)
    rows.append(
        bar_row(
            "decide, 50 models, 2,000 queries known fully",
            timed(lambda n: router.decide(asked[n]), len(asked)),
            BAR_DECISION_MS,
        )
    )
    rows.append(
        bar_row("predict_one, the same", timed(lambda n: router.predict_one(asked[n]), len(asked)), BAR_DECISION_MS)
    )
    rows += joining(router, full)
    first, many = made(1000, 50), made(10_000 if options.quick else 100_000, 50, seed=2)
    router = quick(exact_below=1).build().fit(first)
    observe_all(router, many)
    asked = queries_of(many, 1000)
    case = f"decide, 50 models, {len(many):,} queries observed once"
    rows.append(bar_row(case, timed(lambda n: router.decide(asked[n]), len(asked)), BAR_DECISION_MS))
    outcomes = [
        Outcome(query=query, model=many.models[n % 50], quality=1.0, cost=1e-4) for n, query in enumerate(asked)
    ]
    rows.append(
        bar_row("observe, the same", timed(lambda n: router.observe(outcomes[n]), len(asked)), BAR_DECISION_MS * 10)
    )
    rows += joining(router, first)
    return rows


def observe_all(router: GraphRouter, data: Recorded) -> None:
    """One edge of each query, all at once: what `observe` does one by one."""
    assert data.vector_ND is not None
    memory = router.engine.memory  # type: ignore[union-attr]
    value = np.full((2, len(data), len(data.models)), np.nan)
    rows, column = np.arange(len(data)), np.arange(len(data)) % len(data.models)
    value[0, rows, column], value[1, rows, column] = data.score_NM[rows, column], 0.5
    memory.add(data.vector_ND, router.tasks.told(data.vector_ND), value, np.zeros((2, len(data))))


def joining(router: GraphRouter, data: Recorded) -> list[dict[str, Any]]:
    """`add_llm` with 100 shots at stored queries and without any."""
    edges = f"{len(router.engine.memory.fitted) + len(router.engine.memory.observed):,} queries"  # type: ignore[union-attr]
    shots = data.take(np.random.default_rng(3).permutation(len(data))[:100]).only(["m0"])
    price = Price.of_dollars(0.2, 0.4)

    def join(number: int) -> None:
        name = f"new {edges} {number} {len(router.models)}"
        named = Recorded(
            query=shots.query,
            models=(name,),
            score_NM=shots.score_NM,
            cost_NM=shots.cost_NM,
            task=shots.task,
            vector_ND=shots.vector_ND,
        )
        router.add_llm(name, price=price, shots=named)

    return [bar_row(f"add_llm, 100 shots, 50 models, {edges}", timed(join, 5), BAR_JOIN_MS)]


def scale(options: argparse.Namespace) -> list[dict[str, Any]]:
    """An epoch and the memory of a large graph, each mode in a process of its own."""
    rows = []
    for mode in ("mean", "hetero", "plus"):
        size = ("20000", "30") if options.quick else ("100000", "30")
        done = subprocess.run(
            [sys.executable, __file__, "--scale-of", mode, *size], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        case = f"epoch, {int(size[0]):,} queries x {size[1]} models, {mode}"
        rows.append(bar_row(case, [1e3 * found["epoch_s"]], 1e3 * BAR_EPOCH_S, fit_cpu_s=found["fit_s"]))
        rows.append(
            {
                "case": f"peak memory of fitting, {int(size[0]):,} x {size[1]}, {mode}",
                "ours": found["peak_gib"],
                "peer": BAR_GIB,
                "ratio": round(BAR_GIB / found["peak_gib"], 2),
                "unit": "GiB",
                "peer_name": "bar",
            }
        )
        print(
            f"{rows[-1]['case']:<64} {found['peak_gib']:.2f} GiB, whole fit {found['fit_s']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return rows


def scale_of(mode: str, queries: int, models: int) -> None:
    """One fit of one step, and one of none: the difference is a step over all queries (an epoch)."""
    torch.set_num_threads(1)
    data = made(queries, models)
    spent = []
    for steps in (0, 1):
        settings = PlusConfig(
            episodes=Episodes(steps=steps, most_queries=queries), exact_below=10**9 if steps else 2000
        )
        config = GraphRouter.Config(mode=mode, training=Training(steps=steps), plus=settings)  # type: ignore[arg-type]
        if mode == "plus":
            spent.append(plus_epoch(config, data, steps))
            continue
        begin = time.process_time()
        config.build().fit(data)
        spent.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        json.dumps(
            {
                "epoch_s": spent[1] - (0 if mode == "plus" else spent[0]),
                "fit_s": round(spent[0], 1),
                "peak_gib": round(peak, 3),
            }
        )
    )


def plus_epoch(config: GraphRouter.Config, data: Recorded, steps: int) -> float:
    """Seconds of a whole fit without steps, or of the episodes that go once through all queries (each of 8,192)."""
    begin = time.process_time()
    if steps == 0:
        config.build().fit(data)
        return time.process_time() - begin
    from anabranch.routers.graphrouter import plus_network

    spent = 0.0
    whole = plus_network.fit_plus

    def clocked(*args: Any, **fields: Any) -> Any:
        nonlocal spent
        begin = time.process_time()
        found = whole(*args, **fields)
        spent += time.process_time() - begin
        return found

    plus_network.fit_plus = clocked
    episodes = -(-len(data) // 8192)
    plus = config.plus.replace(episodes=Episodes(steps=episodes, check_every=10**6), exact_below=2000)
    config.replace(plus=plus, validation=0.0).build().fit(data)
    plus_network.fit_plus = whole
    return spent


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--peer", metavar="PYTHON", help="the interpreter of an environment with llmrouter-lib")
    parser.add_argument("--scale-of", nargs=3, metavar=("MODE", "QUERIES", "MODELS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.scale_of:
        scale_of(options.scale_of[0], int(options.scale_of[1]), int(options.scale_of[2]))
        raise SystemExit
    options.threads = 1
    start(options)
    parts: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
        "peer": against_peer,
        "latency": latency,
        "scale": scale,
    }
    found = [row for name, part in parts.items() if options.only in name for row in part(options)]
    finish("graphrouter", found, options, ["torch", "numpy", "numba"])
