"""What does selecting examples cost a request, at 50,000 examples: is it below 5 ms?

Requests and examples are made: 6 to 20 words of a vocabulary with Zipf's law, grouped into 2,000 topics, so that there are near and far
neighbours. One thread, processor time. A selection holds all of it: embedding (hashed, 512 numbers), search, features, proxy, diversity.

    bar          rows against 5 ms: ``peer`` is 5, a ratio of 1 or above passes
    exact        the same selection with the brute-force index as peer, which finds all that is nearest (recall 1)
    top-k        stage 1 alone as peer, on the same clustered index: embed, search, the 5 most similar (what LangChain's selector does);
                 what the stages after it cost
    memory       MB of the index, and of the pool's text as peer

Recall of the clustered index (16 of sqrt(N) clusters) against the exact one stands in the case's name: of the 5 nearest, of all 50
candidates. Hashed words are the hard case for clusters: most pairs of texts share nothing.

    python benchmarks/ic_cache.py --threads 1 --json benchmarks/results/ic_cache.json
"""
# Shapes: N examples

import itertools
import random
import statistics
import sys
import time
from typing import Any

import numpy as np

from _harness import arguments, compare, finish, start
from anabranch.routers.contract.query import Query
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.ic_cache import Arm, ExamplePool, ICCache
from anabranch.routers.ic_cache.baselines import TopSimilar
from anabranch.routers.ic_cache.cross_encoder import CrossEncoder
from anabranch.routers.ic_cache.features import pairs
from anabranch.routers.ic_cache.proxy import Logistic, Mlp, Proxy, merge
from anabranch.routers.retrieve import Exact, Index

BAR_MS = 5.0
TOPICS, WORDS = 2000, 20_000


def made_texts(count: int, seed: int) -> list[str]:
    """Requests: words of a topic, with others between."""
    draw = random.Random(seed)
    topics = [[draw.randrange(WORDS) for _ in range(12)] for _ in range(TOPICS)]
    common = np.random.default_rng(seed).zipf(1.3, count * 20) % WORDS
    found, at = [], 0
    for _ in range(count):
        topic = draw.choice(topics)
        length = draw.randint(6, 20)
        words = [f"w{draw.choice(topic)}" if draw.random() < 0.6 else f"w{common[at + n]}" for n in range(length)]
        at += length
        found.append(" ".join(words))
    return found


def make_cache(texts: list[str], index: Index.Config, proxy: Proxy.Config) -> ICCache:
    """A cache with all texts in it, and a proxy that has learned something."""
    embedder = Hashed.Config().build().fit(texts[:5000])
    config = ICCache.Config(
        pool=ExamplePool.Config(domains=("",), trust={"large": 1}, max_bytes=2**30), index=index, proxy=proxy
    )
    cache = ICCache(
        config, arms=[Arm(name="small", cost=0.1), Arm(name="large", cost=1.0)], embed=embedder.embed, redact=str
    )
    cache.update_cache(texts, [f"answer to {text}" for text in texts])
    rows = [cache.pool.search(Query(text=text), embedder.embed([text])[0], 8, now_s=0.0) for text in texts[:100]]
    found = [
        pairs(text, examples, similarity, "small") for text, (examples, similarity) in zip(texts, rows, strict=False)
    ]
    learned = merge(found)
    cache.selector.proxy.fit(learned, np.random.default_rng(0).random(len(learned)))
    return cache


def recall(ours: ICCache, exact: ICCache, texts: list[str], k: int) -> float:
    """Share of the exact k candidates that the other index finds."""
    hits = []
    for text in texts:
        vector = ours.vector(Query(text=text))
        found = [cache.pool.search(Query(text=text), vector, k, now_s=0.0)[0] for cache in (ours, exact)]
        ids = [{example.id for example in examples} for examples in found]
        hits.append(len(ids[0] & ids[1]) / len(ids[1]))
    return statistics.fmean(hits)


def against_bar(case: str, work: Any, rounds: int, each: int) -> dict[str, Any]:
    """Milliseconds of one unit against the bar, median over rounds and their interquartile range."""
    times = []
    for _ in range(rounds + 1):
        began = time.process_time()
        for _ in range(each):
            work()
        times.append(1e3 * (time.process_time() - began) / each)
    ratios = [BAR_MS / value for value in times[1:]]  # the first warms up
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    row = {
        "case": case,
        "ours": round(statistics.median(times[1:]), 4),
        "peer": BAR_MS,
        "ratio": round(statistics.median(ratios), 3),
        "spread": round(high - low, 3),
        "unit": "ms",
        "peer_name": "bar of 5 ms",
    }
    print(f"{case:<70} {row['ours']:8.3f} ms   ratio to the bar {row['ratio']:.2f}", file=sys.stderr, flush=True)
    return row


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    start(options)
    rows: list[dict[str, Any]] = []
    for count in (5_000,) if options.quick else (5_000, 50_000):
        rows += measure(count, options)
    finish("ic_cache", rows, options, ["numpy"])


def measure(count: int, options: Any) -> list[dict[str, Any]]:
    """All rows of one size."""
    texts = made_texts(count + 200, seed=0)
    stored, asked = texts[:count], itertools.cycle(texts[count:])
    exact = make_cache(stored, Exact.Config(), Logistic.Config())
    default = ICCache.Config().index
    caches = {
        proxy.owner.kind: make_cache(stored, default, proxy)
        for proxy in (Logistic.Config(), Mlp.Config(epochs=2), CrossEncoder.Config(epochs=1))
    }
    ours = caches["logistic"]
    top = TopSimilar(ours.pool)
    near, all_50 = (recall(ours, exact, texts[count : count + 50], k) for k in (5, 50))
    found = f"recall {near:.2f} of 5, {all_50:.2f} of 50"
    works: dict[str, Any] = {
        f"select, {count:,} examples, {name} ({found})": lambda cache=cache: cache.select(next(asked), "small")
        for name, cache in caches.items()
    }
    works[f"select and route, {count:,} examples, logistic"] = lambda: ours.route(next(asked))
    rows = [against_bar(case, work, options.rounds, 40) for case, work in works.items() if options.only in case]
    peers: dict[str, Any] = {
        "exact index": lambda: exact.select(next(asked), "small"),
        "stage 1 alone": lambda: top.select(Query(text="q"), ours.vector(Query(text=next(asked))), now_s=0.0),
    }
    for name, peer in peers.items():
        case = f"select, {count:,} examples, against {name}"
        if options.only in case:
            work = lambda: ours.select(next(asked), "small")  # noqa: E731
            rows.append(compare(case, work, {name: peer}, rounds=options.rounds, clock=time.process_time))
    index_mb, text_mb = (round(size / 2**20, 1) for size in (ours.pool.index.size_bytes, ours.pool.size_bytes))
    memory = {"ours": index_mb, "peer": text_mb, "ratio": round(text_mb / index_mb, 3), "spread": None, "unit": "MB"}
    return [*rows, {"case": f"memory, {count:,} examples", **memory, "peer_name": "text of the pool"}]


if __name__ == "__main__":
    main()
