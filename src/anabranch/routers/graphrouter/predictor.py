"""GraphRouter: which model for a query, by predicting effect and cost of the edge between them in a graph of tasks, queries and models.

Feng, Shen and You, "GraphRouter: A Graph-based Router for LLM Selections", ICLR 2025, arXiv 2410.03834.

    from anabranch.routers.graphrouter import GraphRouter

    router = GraphRouter.Config(mode="plus").build().fit(recorded)
    router.decide(query, trade_off=1.0)                         # the worth of a dollar is said here
    router.add_llm("newcomer", "good at code", price, shots)    # no training again
    router.observe(outcome)                                     # one edge more

Modes: ``reference`` (the published code), ``mean`` (messages averaged), ``hetero`` (task nodes, edges both ways): see `network`.
``plus``: gated messages, attention between queries, edges between models, two heads, trained in episodes: see `plus_network`.
Departures: duplicates are never parted by the validation split; costs are scaled by what training saw alone; every model that ties for the
best is labelled so; the task is told from the query's vector unless ``task`` says otherwise. The paper's other choices are the defaults.
"""
# Shapes: N queries, M models, T tasks, D dimensions of a query's vector, V of a description's

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor, one_row
from anabranch.routers.contract.query import Model, Outcome, Query
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.data.splits import groups
from anabranch.routers.embed.embedder import Embedder
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.graphrouter.classic import Classic
from anabranch.routers.graphrouter.costs import Costs
from anabranch.routers.graphrouter.graph import CostScale, Scenario, hold_out
from anabranch.routers.graphrouter.nodes import Tasks, described
from anabranch.routers.graphrouter.observed import Observed
from anabranch.routers.graphrouter.plus import Plus
from anabranch.routers.graphrouter.settings import PlusConfig, Training
from anabranch.routers.money import Price
from anabranch.routers.strategies.training import training_set, vectors_of

# A table of queries needs models; which is no matter.
ANY = ("any",)

# Neighbours and tasks in an explanation.
SHOWN = 5
Mode = Literal["reference", "mean", "hetero", "plus"]


class GraphRouter(Predictor, kind="graph"):
    """See the module.

    Attributes:
        tasks: how the task of a query is told.
        costs: what calls cost.
        engine: what was trained.
        edges_M: observed edges of each model.
    """

    @configclass
    class Config(Predictor.Config):
        """What graph, trained how.

        Attributes:
            mode: see the module.
            scenario: what an edge is labelled by, but for ``plus``, which learns effect and cost apart.
            task: whose word is taken for a query's task: the sender's where it gives a known one ("given"), that of its vector alone
                ("predicted"), or no task at all ("none").
            hidden: half the width of a node; the reference code's 8.
            validation: share of the queries that choose the weights; afterwards their edges are visible like all others.
            training: of the paper's modes.
            plus: of mode ``plus``.
            descriptions: of models, by name; those without one are told apart by their names alone.
            task_descriptions: of tasks, by name; without any, a task is the mean of its queries.
            prices: of models, by name, against which that of a model that joins later is held.
            embedder: reads descriptions; one that needs no fitting.
            text_length: characters of each fitted query kept for explanations; observed ones are never kept.
        """

        mode: Mode = "plus"
        scenario: Scenario = "performance"
        task: Literal["given", "predicted", "none"] = "predicted"
        hidden: int = Field(default=8, ge=1)
        validation: float = Field(default=0.125, ge=0, lt=1)
        training: Training = Training()
        plus: PlusConfig = PlusConfig()
        descriptions: dict[str, str] = Field(default_factory=dict)
        task_descriptions: dict[str, str] = Field(default_factory=dict)
        prices: dict[str, Price] = Field(default_factory=dict)
        embedder: Embedder.Config = Hashed.Config()
        text_length: int = Field(default=80, ge=0)

        def __post_init__(self) -> None:
            if self.mode == "plus" and self.scenario != "performance":
                raise ValueError(
                    f"scenario is {self.scenario!r}; mode 'plus' has none: say trade_off when a query comes"
                )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.engine: Classic | Plus | None = None
        self.tasks = Tasks((), np.zeros((0, 0), np.float32), np.zeros(0, np.float32), 1.0)
        self.costs = Costs(CostScale(np.zeros(1), np.zeros(1)), np.zeros((1, 0)), (math.nan, math.nan))
        self.edges_M = np.zeros(0, np.int64)
        self.description_dim = 0
        self.texts: tuple[str, ...] = ()

    # Learning

    def fit(
        self,
        data: Recorded,
        *,
        seed: int = 0,
        model_vectors: Mapping[str, np.ndarray] | None = None,
        task_vectors: Mapping[str, np.ndarray] | None = None,
    ) -> Self:
        """Train on recorded outcomes.

        Args:
            data: with vectors; scores NaN where a model was not asked, costs in dollars.
            seed: of the validation split, weights, masks and episodes.
            model_vectors: of descriptions of models, by name, where they were embedded elsewhere.
            task_vectors: of descriptions of tasks.

        Raises DataError for data that nothing can be learned from, InputError for vectors of descriptions that do not fit.
        """
        config = self.config
        training_set(data, "graph")
        vector_ND = np.ascontiguousarray(data.vector_ND, np.float32)
        names = [None] * len(data) if config.task == "none" else data.task
        self.tasks, told_NT = Tasks.fit(vector_ND, names)
        task_N = self.tasks.index(names)
        share_NT = self.tasks.one_hot(task_N) if config.task == "given" else told_NT
        group_N = groups(data)
        held_N = hold_out(group_N, task_N, config.validation, seed)
        self.costs, cost_NM = Costs.fit(data, task_N, held_N, len(self.tasks.names))
        self.models, self.edges_M = data.models, np.isfinite(data.score_NM).sum(0)
        length = config.text_length if config.mode == "plus" else 0
        self.texts = tuple(text[:length] for text in data.query) if length else ()
        model_MV, task_TV = self._describe(data.models, vector_ND, task_N, model_vectors or {}, task_vectors or {})
        observed = Observed(
            vector_ND=vector_ND,
            share_NT=share_NT,
            task_N=task_N,
            group_N=group_N,
            held_N=held_N,
            effect_NM=data.score_NM,
            cost_NM=cost_NM,
            task_TV=task_TV,
            model_MV=model_MV,
        )
        if config.mode == "plus":
            self.engine = Plus.fit(config.plus, observed, seed)
        else:
            self.engine = Classic.fit(config.mode, config.scenario, config.hidden, config.training, observed, seed)
        return self

    def _describe(
        self,
        models: tuple[str, ...],
        vector_ND: np.ndarray,
        task_N: np.ndarray,
        model_vectors: Mapping[str, np.ndarray],
        task_vectors: Mapping[str, np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of models and of tasks."""
        config = self.config
        embedder = config.embedder.build() if config.descriptions or config.task_descriptions else None
        model_MV = described(models, config.descriptions, model_vectors, embedder)
        self.description_dim = model_MV.shape[1]
        if config.task_descriptions or task_vectors:
            return model_MV, described(self.tasks.names, config.task_descriptions, task_vectors, embedder)
        return model_MV, np.stack([vector_ND[task_N == task].mean(0) for task in range(len(self.tasks.names))])

    def observe(self, outcome: Outcome) -> None:
        """Add the edge of one outcome, in O(d). Without a vector, of a model that is not known, or with neither quality nor cost, it
        teaches nothing; the modes of the paper need a quality, and take the usual cost where none is told."""
        if (
            outcome.query.vector_D is None
            or outcome.model not in self.models
            or (outcome.quality is None and outcome.cost is None)
        ):
            return
        model = self.models.index(outcome.model)
        vector_ND, share_NT = self._seen(one_row(outcome.query, ANY))
        effect = math.nan if outcome.quality is None else float(outcome.quality)
        cost = math.nan if outcome.cost is None else float(outcome.cost)
        self._learn(vector_ND, share_NT, model, effect, cost)

    def _learn(self, vector_ND: np.ndarray, share_NT: np.ndarray, model: int, effect: float, cost: float) -> None:
        engine, costs = self._fitted(), self.costs
        costs.learn(model, cost, float(costs.usual(share_NT)[0]))
        if isinstance(engine, Plus):
            engine.add_edges(
                vector_ND, share_NT, model, effect, float(costs.scaled(np.array([[cost]]), share_NT)[0, 0])
            )
        elif math.isfinite(effect):
            paid = cost if math.isfinite(cost) else float(costs.by_task(share_NT)[0, model])
            effect_NM, cost_NM = np.full((2, 1, len(self.models)), np.nan)
            effect_NM[0, model] = effect
            cost_NM[0, model] = costs.scaled(np.array([[np.nan_to_num(paid)]]), share_NT)[0, 0]
            engine.add(vector_ND, share_NT, effect_NM, cost_NM)
        self.edges_M[model] += math.isfinite(effect)

    def add_llm(
        self,
        name: str,
        description: str = "",
        price: Price | None = None,
        shots: Recorded | None = None,
        *,
        vector: np.ndarray | None = None,
    ) -> None:
        """Let a model join, without training: from now on it is among ``models``.

        Args:
            name: of the model, not known yet.
            description: what it is good at; places it until there are scores.
            price: of its tokens; against ``prices`` of the config, or by recorded token counts.
            shots: a few of its scores, a column ``name``, with vectors; costs where known. Queries that were fitted tell most, since
                what the other models earned there is known.
            vector: of the description, where it was embedded elsewhere.

        Raises InputError for a name that is known, shots without it or without vectors, and a vector of another length.
        """
        engine = self._fitted()
        if name in self.models:
            raise InputError(f"{name!r} is in the graph already; observe() adds edges to it")
        if shots is not None:
            shots = shots.only([name])
            shots = shots.take(np.flatnonzero(np.isfinite(shots.score_NM[:, 0])))
        seen = None if shots is None or not len(shots) else self._seen(shots)
        vector_V = self._described(name, description, vector)
        self.costs.join(price or Price(), self.config.prices, self.models[: self.costs.num_fitted])
        self.models, self.edges_M = (*self.models, name), np.append(self.edges_M, 0)
        if isinstance(engine, Plus):
            engine.add_model(vector_V)
        else:
            engine.encoding.add_model(vector_V)
        if seen is not None and shots is not None:
            self._shots(shots, *seen)

    def join(self, model: Model, shots: Recorded | None = None) -> None:
        """`add_llm`, as routers of all kinds are asked."""
        self.add_llm(model.name, model.description, model.price, shots)

    def _described(self, name: str, description: str, vector: np.ndarray | None) -> np.ndarray:
        """Vector of a model that joins; by its name alone where no fitted model was described either."""
        reads = description if vector is None and self.config.descriptions else ""
        vectors = {} if vector is None else {name: vector}
        embedder = self.config.embedder.build() if reads else None
        return described([name], {name: reads}, vectors, embedder, self.description_dim)[0]

    def _shots(self, shots: Recorded, vector_SD: np.ndarray, share_ST: np.ndarray) -> None:
        """Place the newest model by its scores."""
        engine, model, costs = self._fitted(), len(self.models) - 1, self.costs
        if shots.cost_NM is not None:
            for cost, usual in zip(shots.cost_NM[:, 0].tolist(), costs.usual(share_ST).tolist(), strict=True):
                costs.learn(model, cost, usual)
        if isinstance(engine, Plus):
            engine.place(model, vector_SD, share_ST, shots.score_NM[:, 0])
        else:
            effect_SM = np.full((len(shots), len(self.models)), np.nan)
            effect_SM[:, model] = shots.score_NM[:, 0]
            paid_SM = np.nan_to_num(costs.by_task(share_ST))
            if shots.cost_NM is not None:
                paid_SM[:, model] = np.where(np.isfinite(shots.cost_NM[:, 0]), shots.cost_NM[:, 0], paid_SM[:, model])
            engine.add(vector_SD, share_ST, effect_SM, costs.scaled(paid_SM, share_ST))
        self.edges_M[model] += len(shots)

    # Deciding

    @property
    def learned_dim(self) -> int | None:
        """See `Predictor`."""
        return len(self.tasks.weight_DT) or None

    def predict(self, data: Recorded) -> Prediction:
        """Quality: expected effect in mode ``plus``, else the chance to be the best for the scenario. Cost in dollars."""
        return self._predict(*self._seen(data))

    def predict_one(self, query: Query) -> Prediction:
        """Of one query, with its task and nearest queries; `explain` says more."""
        return self._predict(*self._seen(one_row(query, ANY)), shows=True)

    def _predict(self, vector_ND: np.ndarray, share_NT: np.ndarray, *, shows: bool = False) -> Prediction:
        engine = self._fitted()
        details: Facts | None = None
        if shows:
            best = int(share_NT[0].argmax())
            details = {"task": {self.tasks.names[best]: round(float(share_NT[0, best]), 3)}}
        if not isinstance(engine, Plus):
            quality_NM = self._closed(engine.predict(vector_ND, share_NT))
            return Prediction(quality_NM=quality_NM, cost_NM=self.costs.by_task(share_NT), details=details)
        said = engine.say(vector_ND, share_NT)
        quality_NM = self._closed(engine.quality(said))
        if details is not None:
            row_J, alpha_J = said.looked.row_QJ[0], said.looked.alpha_QJ[0]
            nearest = np.argsort(-alpha_J, kind="stable")[:SHOWN]
            rows, shares = row_J[nearest].tolist(), (alpha_J[nearest] / max(alpha_J.sum(), 1e-9)).tolist()
            details["neighbours"] = [
                {"row": row, "attention": round(share, 4)} for row, share in zip(rows, shares, strict=True)
            ]
        sure_N = _sure(quality_NM, said.error_QM)
        return Prediction(
            quality_NM=quality_NM,
            cost_NM=self.costs.dollars(said.cost_QM, share_NT),
            confidence_N=sure_N,
            details=details,
        )

    def utilities(self, data: Recorded, trade_off: float = 0.0) -> np.ndarray:
        """What each edge is worth, [N, M]: expected effect - trade_off * scaled cost; in the modes of the paper, the chance to be best.

        Args:
            data: with vectors.
            trade_off: effect given up to go from the dearest to the cheapest call of the task. The paper's scenarios are 0, 1 and 4.

        Raises InputError for a trade-off in a mode of the paper: its scenario settled that in training.
        """
        engine, (vector_ND, share_NT) = self._fitted(), self._seen(data)
        if not isinstance(engine, Plus):
            if trade_off:
                raise InputError(
                    f"mode {self.config.mode!r} was trained for scenario {self.config.scenario!r}; only 'plus' takes a trade_off"
                )
            return self._closed(engine.predict(vector_ND, share_NT))
        said = engine.say(vector_ND, share_NT)
        cost_NM = said.cost_QM
        if self.costs.ratios:
            cost_NM = self.costs.scaled(self.costs.dollars(cost_NM, share_NT), share_NT)
        return self._closed(engine.quality(said)) - trade_off * np.where(np.isfinite(cost_NM), cost_NM, 0.0)

    def decide(self, query: Query, trade_off: float = 0.0) -> str:
        """The model of most utility (`utilities`); the first of those that tie."""
        return self.models[int(np.argmax(self.utilities(one_row(query, ANY), trade_off)[0]))]

    def explain(self, query: Query) -> Facts:
        """The tasks it is taken for, and in mode ``plus`` the nearest queries with the edges that were used: how much better (above 0) or
        worse than the query's difficulty let expect each model did there."""
        vector_ND, share_NT = self._seen(one_row(query, ANY))
        order = np.argsort(-share_NT[0], kind="stable")[:SHOWN]
        facts: Facts = {
            "task": {self.tasks.names[at]: round(float(share_NT[0, at]), 3) for at in order if share_NT[0, at] > 0.005}
        }
        facts["edges"] = {name: int(count) for name, count in zip(self.models, self.edges_M, strict=True)}
        engine = self._fitted()
        if isinstance(engine, Plus):
            facts["neighbours"] = [
                {
                    "row": row,
                    "query": self.texts[row] if row < len(self.texts) else "",
                    "similarity": like,
                    "attention": weight,
                    "edges": {self.models[model]: left for model, left in edges.items()},
                }
                for row, like, weight, edges in engine.nearest(vector_ND, share_NT, SHOWN)
            ]
        return facts

    # Inside

    def _fitted(self) -> "Classic | Plus":
        if self.engine is None:
            raise InputError("graph has not learned yet: fit it on recorded outcomes first")
        return self.engine

    def _seen(self, data: Recorded) -> tuple[np.ndarray, np.ndarray]:
        """Vectors, and how much of each task each query is."""
        self._fitted()
        vector_ND = vectors_of(data, self.tasks.weight_DT.shape[0], "graph")
        share_NT = self.tasks.told(vector_ND)
        if self.config.task == "given" and any(name is not None for name in data.task):
            place_N = self.tasks.index(data.task)
            share_NT = np.where(place_N[:, None] >= 0, self.tasks.one_hot(place_N), share_NT)
        return vector_ND, share_NT

    def _closed(self, quality_NM: np.ndarray) -> np.ndarray:
        """-inf for a fitted model without a single score."""
        silent_M = self.edges_M[: self.costs.num_fitted] == 0
        if silent_M.any():
            quality_NM[:, : self.costs.num_fitted][:, silent_M] = -np.inf
        return quality_NM

    # Saving

    def state(self) -> tuple[Arrays, Facts]:
        """All it learned, but for ``models``."""
        engine = self._fitted()
        arrays, facts = engine.state() if isinstance(engine, Plus) else (engine.state(), {})
        own = {"weight_DT": self.tasks.weight_DT, "bias_T": self.tasks.bias_T, "edges_M": self.edges_M.copy()}
        names = {
            "tasks": list(self.tasks.names),
            "sharpness": self.tasks.sharpness,
            "texts": list(self.texts),
            "description_dim": self.description_dim,
        }
        return {**arrays, **self.costs.state(), **{f"graph.{name}": value for name, value in own.items()}}, {
            **facts,
            **names,
        }

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        weight_DT, bias_T, self.edges_M = (
            np.array(arrays[f"graph.{name}"]) for name in ("weight_DT", "bias_T", "edges_M")
        )
        self.tasks = Tasks(tuple(facts["tasks"]), weight_DT, bias_T, float(facts["sharpness"]))
        self.costs = Costs.of_state(arrays)
        self.texts, self.description_dim = tuple(facts["texts"]), facts["description_dim"]
        if self.config.mode == "plus":
            self.engine = Plus.of_state(self.config.plus, arrays, facts)
        else:
            self.engine = Classic.of_state(self.config.mode, self.config.scenario, arrays)


def _sure(quality_NM: np.ndarray, error_NM: np.ndarray) -> np.ndarray | None:
    """[N]: the chance that the first choice beats the second, by normal errors; 1 where there is no second."""
    if quality_NM.shape[1] < 2:
        return np.ones(len(quality_NM))
    order_N2 = np.argsort(-quality_NM, 1, kind="stable")[:, :2]
    first_N2, error_N2 = np.take_along_axis(quality_NM, order_N2, 1), np.take_along_axis(error_NM, order_N2, 1)
    gap_N = first_N2[:, 0] - first_N2[:, 1]
    away_N = gap_N / np.maximum(np.hypot(error_N2[:, 0], error_N2[:, 1]), 1e-9)
    return np.array(
        [0.5 * math.erfc(-away / math.sqrt(2)) for away in np.nan_to_num(away_N, nan=0.0, posinf=40.0).tolist()]
    )
