"""What of a pool is worth keeping: 5% of it by the knapsack, at random, or the newest; and a change of topic with and without decay.

An offload counts as successful here if the nearest example's command, handed out as it is, would score at least `SUCCESS` on the request:
what one can tell of thousands of requests without asking a model.
"""

import functools

import numpy as np

from anabranch.routers.contract.query import Query
from anabranch.routers.ic_cache.pool import ExamplePool
from anabranch.routers.ic_cache.upkeep import HOUR_S, Manager
from anabranch.studies.ic_cache_work import Work, make_pool
from anabranch.studies.nl2bash import Pair, first_command, measure

SUCCESS, SHOWN = 0.75, 5


def credit(manager: Manager, work: Work, stream: list[Pair], hours: np.ndarray) -> None:
    """Let requests select examples, and credit those that would have done."""
    vectors = work.embedder.embed([pair.request for pair in stream])
    for pair, vector_D, hour in zip(stream, vectors, hours, strict=True):
        examples, _ = manager.pool.search(Query(text=pair.request), vector_D, SHOWN, now_s=0.0)
        quality = measure(examples[0].response, pair)["score"] or 0.0
        manager.shown(examples[::-1], quality, 0.3, is_cheap=True, now_s=hour * HOUR_S)


def retained(work: Work, share: float, rule: str, seed: int) -> Work:
    """The work with a pool of ``share`` of the bytes, kept by ``rule`` after half of the stored requests have been asked.

    Args:
        work: all of it; half of the stored pairs, drawn by ``seed``, are the pool, the others are what users ask first.
        share: of the pool's bytes.
        rule: "knapsack", "knapsack-all" (every example shown has the credit), "random", "newest" or "all".
        seed: of the halves and of what is random.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(work.stored))
    half = len(order) // 2
    stored, stream = ([work.stored[at] for at in rows] for rows in (order[:half], order[half:]))
    pool = make_pool(stored, work.embedder)
    manager = Manager(Manager.Config(success=SUCCESS, newcomers=0.0, credit_all=rule == "knapsack-all"), pool)
    capacity = share * pool.size_bytes
    if rule.startswith("knapsack"):
        credit(manager, work, stream, np.linspace(0, 8, len(stream)))
        manager.retain(capacity, now_s=8 * HOUR_S)
    elif rule != "all":
        ids = [example.id for example in pool]
        keep_least(pool, random.permutation(ids).tolist() if rule == "random" else ids, capacity)
    kept = [Pair(example.request, example.response) for example in pool]
    return Work(work.held, kept, work.embedder)


def keep_least(pool: ExamplePool, order: list[int], capacity: float) -> None:
    """Remove in this order until what is left fits."""
    for id in order:
        if pool.size_bytes <= capacity:
            return
        pool.remove([id])


def copied(work: Work) -> float:
    """Mean over held-out requests of the best score that any of the five most similar commands would earn as it is."""
    best = []
    for pair, vector_D in zip(work.held, work.vector_ND, strict=True):
        examples, _ = work.similar(pair.request, vector_D, SHOWN)
        best.append(max((measure(example.response, pair)["score"] or 0.0 for example in examples), default=0.0))
    return float(np.mean(best))


def drift(work: Work, decay: float, seed: int, *, newcomers: float, count: int, capacity_kb: float) -> dict[str, float]:
    """Requests about find, then about all else; every answer is offered to a small pool. Quality before and after the change.

    Args:
        work: where requests are drawn from.
        decay: of an offload's value per hour; 1 for none.
        newcomers: share of the room that is kept for the newest.
        seed: of the draws.
        count: requests, half on each topic, over 16 hours.
        capacity_kb: of the pool.

    Returns: ``before`` and ``after``: mean best copied score in the last quarter of each half; ``adapting``: in the first of the second.
    """
    random = np.random.default_rng(seed)
    find = [pair for pair in work.stored if first_command(pair.command) == "find"]
    other = [pair for pair in work.stored if first_command(pair.command) != "find"]
    stream = [pairs[at] for pairs in (find, other) for at in random.choice(len(pairs), count // 2, replace=False)]
    config = ExamplePool.Config(domains=("",), trust={"large": 1}, ttl_s=None, max_bytes=int(capacity_kb * 1024))
    pool = ExamplePool(config, make_pool([], work.embedder).index, redact=str)
    manager = Manager(Manager.Config(success=SUCCESS, decay_per_hour=decay, newcomers=newcomers), pool)
    vectors = work.embedder.embed([pair.request for pair in stream])
    scores = []
    for number, (pair, vector_D) in enumerate(zip(stream, vectors, strict=True)):
        now_s = 16 * HOUR_S * number / count
        query = Query(text=pair.request)
        examples, _ = pool.search(query, vector_D, SHOWN, now_s=now_s)
        quality = [measure(example.response, pair)["score"] or 0.0 for example in examples]
        if examples:
            manager.shown(examples[::-1], quality[0], 0.3, is_cheap=True, now_s=now_s)
        scores.append(max(quality, default=0.0))
        pool.admit(
            query,
            pair.command,
            "large",
            now_s=now_s,
            vector_D=vector_D,
            make_room=functools.partial(manager.make_room, now_s=now_s),
        )
    half, quarter = count // 2, count // 8
    return {
        "before": float(np.mean(scores[half - quarter : half])),
        "adapting": float(np.mean(scores[half : half + quarter])),
        "after": float(np.mean(scores[-quarter:])),
    }
