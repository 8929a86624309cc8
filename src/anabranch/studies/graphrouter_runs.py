"""What the arms of the study `graphrouter` do: data and splits, baselines, fits, models that join later, streams."""
# Shapes: N training queries, Q test queries, M models, S shots

import base64
import dataclasses
import time
import zlib
from functools import cache
from typing import Any

import numpy as np

from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Ranked
from anabranch.routers.contract.query import Model, Outcome, Pool, Query
from anabranch.routers.data import SETS, split
from anabranch.routers.embed import embed_cached
from anabranch.routers.embed.minilm import SHA256
from anabranch.routers.graphrouter import GraphRouter
from anabranch.routers.graphrouter.graph import WEIGHTS, CostScale
from anabranch.routers.graphrouter.nodes import Tasks
from anabranch.routers.referee import aiq
from anabranch.studies.outcomes import digest_of

TRADE_OFFS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
SCENARIO_TRADE_OFF = {name: cost / effect for name, (effect, cost) in WEIGHTS.items()}
SHOTS, NEW = (30, 100, 400), 3

# Of k-NN on shots, chosen by leaving one out.
NEIGHBOURS = (1, 3, 5, 10, 20, 40, 80)

# Of a reward as a whole number, and the largest of those.
UNIT, MOST = 10_000, 32_000


@cache
def table(name: str) -> Recorded:
    """All queries, with vectors: LLMRouter's by MiniLM, or topics made up."""
    if name == "made":
        return made()
    data = SETS[name]().data
    return data.with_vectors(embed_cached(minilm(), data.query))


@cache
def read_by(name: str) -> str:
    """Digest of what is read of a set of outcomes."""
    if name == "made":
        return digest_of(made())
    found = SETS[name]()
    return digest_of(found.data, found.pool, embedder=SHA256)


@cache
def minilm() -> Any:
    """The embedder of questions and descriptions."""
    from anabranch.routers.embed.minilm import MiniLM

    return MiniLM.Config().build()


def made(count: int = 700, topics: int = 8, models: int = 6, dim: int = 24) -> Recorded:
    """Topics around which queries lie, models good at some of them, the better ones dearer: small, for a quick look and for tests."""
    rng = np.random.default_rng(7)
    topic_N = np.arange(count) % topics
    vector_ND = rng.normal(size=(topics, dim))[topic_N] + 0.9 * rng.normal(size=(count, dim))
    good_TM = rng.uniform(0.1, 0.7, size=(topics, models)) + np.linspace(0, 0.25, models)
    score_NM = (rng.uniform(size=(count, models)) < good_TM[topic_N]).astype(float)
    cost_NM = np.linspace(1, 4, models) * 1e-4 * rng.uniform(0.7, 1.3, size=(count, 1))
    return Recorded(
        query=tuple(f"query {row} about topic {topic}" for row, topic in enumerate(topic_N)),
        models=tuple(f"m{m}" for m in range(models)),
        score_NM=score_NM,
        cost_NM=cost_NM,
        task=tuple(f"topic {topic}" for topic in topic_N),
        vector_ND=(vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)).astype(np.float32),
    )


@dataclasses.dataclass(frozen=True)
class Parts:
    """A split: 80% to learn from (an eighth of it validates), 20% to judge on, by task, and what choices there earn.

    Attributes:
        train, test: rows.
        row_Q: of the test in the whole table.
        train_cost_NM, cost_QM: costs scaled as training saw them.
    """

    train: Recorded
    test: Recorded
    row_Q: np.ndarray
    train_cost_NM: np.ndarray
    cost_QM: np.ndarray

    def reward(self, scenario: str, *, train: bool = False) -> np.ndarray:
        """Utility of every model at every query."""
        effect, cost = WEIGHTS[scenario]
        scores, costs = (self.train.score_NM, self.train_cost_NM) if train else (self.test.score_NM, self.cost_QM)
        return effect * scores - cost * costs


@cache
def parts(name: str, seed: int) -> Parts:
    """The split of a seed."""
    data = table(name)
    place = {text: row for row, text in enumerate(data.query)}
    train, test = split(data, (0.8, 0.2), seed=seed)
    names = sorted({task or "" for task in data.task})
    task_N, task_Q = (np.array([names.index(task or "") for task in part.task]) for part in (train, test))
    assert train.cost_NM is not None
    assert test.cost_NM is not None
    scale = CostScale.fit(train.cost_NM, task_N, len(names))
    row_Q = np.array([place[text] for text in test.query])
    return Parts(train, test, row_Q, scale.scale(train.cost_NM, task_N), scale.scale(test.cost_NM, task_Q))


# Choices


def baseline(method: str, part: Parts, scenario: str, seed: int) -> np.ndarray:
    """Int64 [Q]: the model that a baseline chooses. Those that learn, learn utilities as if they were scores."""
    reward_NM, test = part.reward(scenario, train=True), part.test
    if method == "oracle":
        return part.reward(scenario).argmax(1)
    if method == "random":
        return np.random.default_rng(seed).integers(0, len(test.models), len(test))
    if method == "single":
        return np.full(len(test), reward_NM.mean(0).argmax())
    if method in ("task", "task-told"):
        tasks = Tasks.fit(part.train.vector_ND, part.train.task)[0]  # type: ignore[arg-type]
        task_N = tasks.index(part.train.task)
        task_Q = tasks.index(test.task) if method == "task" else tasks.told(test.vector_ND).argmax(1)  # type: ignore[arg-type]
        return np.array([reward_NM[task_N == task].mean(0).argmax() for task in range(len(tasks.names))])[task_Q]
    settings: dict[str, dict[str, Any]] = {
        "knn": {"k": 40},
        "kmeans": {"num_clusters": 32, "nearest": 1, "prior": 0.0},
        "ridge": {},
    }
    strategy = strategies.make("cluster" if method == "kmeans" else method, **settings[method])
    strategy.fit(dataclasses.replace(part.train, score_NM=reward_NM), seed=seed)
    assert isinstance(strategy, Ranked)
    return strategy.predictor.predict(test).quality_NM.argmax(1)


def earned(part: Parts, choices: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean reward of the choices of each scenario, and the rewards question by question."""
    found: dict[str, Any] = {"rows": packed(part.row_Q)}
    for scenario, choice_Q in choices.items():
        reward_Q = part.reward(scenario)[np.arange(len(choice_Q)), choice_Q]
        found |= {
            scenario: float(reward_Q.mean()),
            f"{scenario}_each": packed(np.clip(np.round(UNIT * reward_Q), -MOST, MOST)),
        }
    return found


def area(part: Parts, choices: list[np.ndarray]) -> float:
    """Area under the hull of cost and effect of these choices and of the cheapest model, over costs of single models (AIQ)."""
    single_M2 = np.stack([part.cost_QM.mean(0), part.test.score_NM.mean(0)], 1)
    rows = np.arange(len(part.test))
    points = [(part.cost_QM[rows, choice].mean(), part.test.score_NM[rows, choice].mean()) for choice in choices]
    cheapest = single_M2[np.lexsort((-single_M2[:, 1], single_M2[:, 0]))[0]]
    return aiq(np.array([*points, cheapest]), float(single_M2[:, 0].min()), float(single_M2[:, 0].max()))


def run_baseline(method: str, name: str, seed: int) -> dict[str, Any]:
    """A baseline in the three scenarios."""
    part = parts(name, seed)
    choices = {scenario: baseline(method, part, scenario, seed) for scenario in WEIGHTS}
    return earned(part, choices) | {"aiq": area(part, list(choices.values()))}


def run_graph(config: GraphRouter.Config, name: str, seed: int) -> dict[str, Any]:
    """GraphRouter in the three scenarios: one model for all in mode ``plus``, one each in the others.

    ``aiq``: area of the choices of the three scenarios, as of every arm; ``aiq_all``: of all `TRADE_OFFS`, which ``plus`` alone serves.
    """
    part, started = parts(name, seed), time.process_time()
    vectors = model_vectors(name)
    if config.mode == "plus":
        router = config.build().fit(part.train, seed=seed, model_vectors=vectors)
        spent = time.process_time() - started
        choice = {trade_off: router.utilities(part.test, trade_off).argmax(1) for trade_off in TRADE_OFFS}
        chosen = {scenario: choice[trade_off] for scenario, trade_off in SCENARIO_TRADE_OFF.items()}
        areas = {"aiq": area(part, list(chosen.values())), "aiq_all": area(part, list(choice.values()))}
        return earned(part, chosen) | areas | {"fit_cpu_s": spent}
    choices = {}
    for scenario in WEIGHTS:
        router = config.replace(scenario=scenario).build().fit(part.train, seed=seed, model_vectors=vectors)
        choices[scenario] = router.utilities(part.test).argmax(1)
    spent = (time.process_time() - started) / len(WEIGHTS)
    return earned(part, choices) | {"aiq": area(part, list(choices.values())), "fit_cpu_s": spent}


@cache
def model_vectors(name: str) -> dict[str, np.ndarray]:
    """Vectors of descriptions of models; none are made up."""
    if name == "made":
        return {}
    texts = {model.name: model.description for model in SETS[name]().pool.models}
    return dict(zip(texts, embed_cached(minilm(), list(texts.values())), strict=True))


# Models that join later


def run_newcomers(config: GraphRouter.Config, name: str, seed: int) -> dict[str, Any]:
    """Hide three models from training, let them join with a few shots each; Performance First.

    ``old`` and ``full``: without them, and trained with all of their scores. ``ours_S``: joined with S shots; ``trusting_S``: without the
    lower confidence bound; ``knn_S``: k-NN (40) on old models, k-NN on shots for new ones, k by leaving one out; ``uses_S``: share of
    queries that go to a new model.
    """
    part = parts(name, seed)
    rng, models = np.random.default_rng([seed, 3]), part.train.models
    new = sorted(rng.choice(len(models), NEW, replace=False).tolist())
    old = [at for at in range(len(models)) if at not in new]
    names = [models[at] for at in old]
    vectors = model_vectors(name)
    score_QM = part.test.score_NM

    def mean(choice_Q: np.ndarray) -> float:
        return float(score_QM[np.arange(len(choice_Q)), choice_Q].mean())

    router = config.build().fit(part.train.only(names), seed=seed, model_vectors=vectors)
    full = config.build().fit(part.train, seed=seed, model_vectors=vectors)
    found: dict[str, Any] = {
        "new": [models[at] for at in new],
        "old": mean(np.array(old)[router.utilities(part.test).argmax(1)]),
        "full": mean(full.utilities(part.test).argmax(1)),
    }
    order_N = rng.permutation(len(part.train))
    arrays, facts = router.state()
    for shots in SHOTS:
        row_S = order_N[:shots]
        for label, safety in (("ours", config.plus.safety), ("trusting", 0.0)):
            grown = config.replace(plus=config.plus.replace(safety=safety)).build()
            grown.models = tuple(names)
            grown.load_state(arrays, facts)
            started = time.process_time()
            for at in new:
                seen = part.train.take(row_S).only([models[at]])
                grown.add_llm(models[at], shots=seen, vector=vectors.get(models[at]))
            found[f"add_cpu_ms_{shots}"] = 1e3 * (time.process_time() - started) / NEW
            choice_Q = np.array([*old, *new])[grown.utilities(part.test).argmax(1)]
            found[f"{label}_{shots}"] = mean(choice_Q)
            if label == "ours":
                found[f"uses_{shots}"] = float(np.isin(choice_Q, new).mean())
        found[f"knn_{shots}"] = mean(_knn_on_shots(part, old, new, row_S))
    return found


def _knn_on_shots(part: Parts, old: list[int], new: list[int], row_S: np.ndarray) -> np.ndarray:
    """Int64 [Q]."""
    vector_ND, vector_QD = part.train.vector_ND, part.test.vector_ND
    assert vector_ND is not None
    assert vector_QD is not None
    expected_QM = np.full(part.test.score_NM.shape, -np.inf)
    near_QJ = np.argsort(-(vector_QD @ vector_ND.T), 1, kind="stable")[:, :40]
    expected_QM[:, old] = part.train.score_NM[near_QJ][..., old].mean(1)
    shot_SD, score_SM = vector_ND[row_S], part.train.score_NM[row_S]
    like_SS = shot_SD @ shot_SD.T
    np.fill_diagonal(like_SS, -np.inf)
    near_SS, near_QS = (np.argsort(-like, 1, kind="stable") for like in (like_SS, vector_QD @ shot_SD.T))
    for at in new:
        errors = {
            k: ((score_SM[near_SS[:, :k], at].mean(1) - score_SM[:, at]) ** 2).mean()
            for k in NEIGHBOURS
            if k < len(row_S)
        }
        best = min(errors, key=lambda k: errors[k])
        expected_QM[:, at] = score_SM[near_QS[:, :best], at].mean(1)
    return expected_QM.argmax(1)


# Learning from one's own choices


def run_online(
    method: str, config: GraphRouter.Config, alphas: tuple[float, ...], name: str, seed: int, warm: int, rounds: int
) -> dict[str, Any]:
    """Fit on a few queries of which all outcomes are known, then a stream in which only the chosen model's score is told."""
    data = table(name)
    order = np.random.default_rng([seed, 4]).permutation(len(data))
    first, stream = data.take(order[:warm]), data.take(order[warm : warm + rounds])
    if method == "online":
        return {"reward": _stream_graph(config, first, stream, seed), "frozen": _frozen(config, first, stream, seed)}
    found = {}
    pool = Pool(tuple(Model(name=model) for model in data.models))
    for alpha in alphas:
        bandit = strategies.make("linucb", alpha=alpha).fit(first, seed=seed)
        total = 0.0
        for row, query in enumerate(stream.queries()):
            model = bandit.route(query, pool).model
            total += _tell(bandit, query, stream, row, model)
        found[f"alpha_{alpha:g}"] = total / len(stream)
    return {"reward": max(found.values()), **found}


def _stream_graph(config: GraphRouter.Config, first: Recorded, stream: Recorded, seed: int) -> float:
    router = config.build().fit(first, seed=seed)
    total = 0.0
    for row, query in enumerate(stream.queries()):
        model = router.models[int(router.predict_one(query).quality_NM[0].argmax())]
        total += _tell(router, query, stream, row, model)
    return total / len(stream)


def _frozen(config: GraphRouter.Config, first: Recorded, stream: Recorded, seed: int) -> float:
    """The same router, had it not learned on."""
    choice_N = (
        config.replace(plus=config.plus.replace(explore=0.0)).build().fit(first, seed=seed).utilities(stream).argmax(1)
    )
    return float(stream.score_NM[np.arange(len(stream)), choice_N].mean())


def _tell(learner: Any, query: Query, stream: Recorded, row: int, model: str) -> float:
    column = stream.models.index(model)
    quality = float(stream.score_NM[row, column])
    cost = None if stream.cost_NM is None else float(stream.cost_NM[row, column])
    learner.observe(Outcome(query=query, model=model, quality=quality, cost=cost))
    return quality


# Numbers of every question in a small file


def packed(value_Q: np.ndarray) -> str:
    """Whole numbers as text."""
    return base64.b64encode(zlib.compress(value_Q.astype("<i2").tobytes(), 9)).decode()


def unpacked(text: str) -> np.ndarray:
    """Int64, what `packed` took."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i2").astype(np.int64)
