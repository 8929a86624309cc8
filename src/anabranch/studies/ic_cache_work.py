"""What the study of IC-Cache measures on: the split of NL2Bash, a pool of its answers, outcomes of single examples, and prompts."""
# Shapes: N requests, D dimensions

import functools
import random
from collections.abc import Callable, Sequence

import numpy as np

from anabranch.routers.contract.query import Query
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.ic_cache.example import Example
from anabranch.routers.ic_cache.features import Pairs, pairs
from anabranch.routers.ic_cache.pool import ExamplePool
from anabranch.routers.ic_cache.proxy import merge
from anabranch.routers.retrieve import Exact
from anabranch.studies.nl2bash import Pair, clean, load_pairs, measure, split
from anabranch.studies.small_model import Messages, Reply, SmallModel

SYSTEM = {
    "role": "system",
    "content": "You translate a request into one shell command. Answer with the command alone.",
}

# The reference command stands for the answer of a strong model.
SMALL, LARGE = "smollm2-135m", "reference"
HELD_OUT = 400
SHARDS = 8
LABELS_PER_SHARD = 250

# Where the candidates of a training request come from.
RANKS = ((0, 1), (0, 10), (1, 5), (5, 15), (15, 50))

# Cosine from which a pool entry counts as a near-duplicate.
NEAR = 0.8


class Work:
    """Held-out requests, and a pool of all others with their reference commands.

    Args:
        held: requests to answer.
        stored: requests with answers.
        embedder: of both; fitted on ``stored`` if None.
    """

    def __init__(self, held: list[Pair], stored: list[Pair], embedder: Hashed | None = None) -> None:
        self.held, self.stored = held, stored
        self.embedder = embedder or Hashed.Config().build().fit([pair.request for pair in stored])
        self.pool = make_pool(stored, self.embedder)
        self.vector_ND = self.embedder.embed([pair.request for pair in held])

    def similar(self, request: str, vector_D: np.ndarray, k: int) -> tuple[list[Example], np.ndarray]:
        """The k most similar examples."""
        return self.pool.search(Query(text=request), vector_D, k, now_s=0.0)

    def best_similarity(self) -> np.ndarray:
        """Of each held-out request to the pool."""
        return np.array(
            [
                self.similar(pair.request, vector, 1)[1][0]
                for pair, vector in zip(self.held, self.vector_ND, strict=True)
            ]
        )

    def without_near(self) -> "Work":
        """The same with every pool entry removed that is nearer than `NEAR` to a held-out request."""
        stored_ND = self.embedder.embed([pair.request for pair in self.stored])
        near_N = (stored_ND @ self.vector_ND.T).max(1) > NEAR
        kept = [pair for pair, is_near in zip(self.stored, near_N, strict=True) if not is_near]
        return Work(self.held, kept, self.embedder)


def make_pool(stored: Sequence[Pair], embedder: Hashed) -> ExamplePool:
    """All of them, in order, as examples; public text, so nothing is redacted."""
    config = ExamplePool.Config(domains=("",), trust={LARGE: 1}, ttl_s=None)
    pool = ExamplePool(config, Exact.Config().build(embedder.dim), redact=str)
    vector_ND = embedder.embed([pair.request for pair in stored])
    for pair, vector_D in zip(stored, vector_ND, strict=True):
        pool.admit(Query(text=pair.request), pair.command, LARGE, now_s=0.0, vector_D=vector_D)
    return pool


@functools.cache
def nl2bash_work() -> Work:
    """The split that all arms share."""
    return Work(*split(load_pairs(), HELD_OUT))


def prompt(request: str, examples: Sequence[Example]) -> Messages:
    """System message, examples as turns, the request."""
    turns = [
        {"role": role, "content": text}
        for example in examples
        for role, text in (("user", example.request), ("assistant", example.response))
    ]
    return [SYSTEM, *turns, {"role": "user", "content": request}]


def shard_of(count: int, shard: int, shards: int = SHARDS) -> list[int]:
    """Rows of a shard: every so-manieth."""
    return list(range(shard, count, shards))


def label_candidates(work: Work, shard: int) -> list[tuple[Pair, Example, Pairs]]:
    """Training requests out of the pool, each with candidates from near and far; a request never sees itself."""
    draw = random.Random(1000 + shard)
    found = []
    for pair in draw.sample(work.stored, LABELS_PER_SHARD // len(RANKS)):
        examples, similarity_K = work.similar(pair.request, work.embedder.embed([pair.request])[0], 51)
        own = [at for at, example in enumerate(examples) if example.request != pair.request]
        examples, similarity_K = [examples[at] for at in own], similarity_K[own]
        rows = pairs(pair.request, examples, similarity_K, SMALL)
        for low, high in RANKS:
            at = draw.randrange(low, min(high, len(examples)))
            found.append((pair, examples[at], Pairs(rows.feature_KF[at : at + 1], [rows.texts[at]])))
    return found


def labels(model: SmallModel, shard: int, progress: Callable[[str], None]) -> tuple[Pairs, np.ndarray, list[Reply]]:
    """Outcomes of single examples: what the proxy sees, how good the answer was, and the replies."""
    rows = label_candidates(nl2bash_work(), shard)
    replies = model.answer([prompt(pair.request, [example]) for pair, example, _ in rows], progress)
    scores = [measure(clean(reply.text), pair)["score"] for (pair, _, _), reply in zip(rows, replies, strict=True)]
    return merge([row for _, _, row in rows]), np.array(scores, np.float64), replies
