"""GraphRouter: which model for a query, by predicting effect and cost of the edge between them in a graph of tasks, queries and models.

Feng, Shen and You, "GraphRouter: A Graph-based Router for LLM Selections", ICLR 2025, arXiv 2410.03834.

    from anabranch.gateway.graphrouter import GraphRouter

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
from anabranch.gateway.data.guard import groups
from anabranch.gateway.dataset import Recorded
from anabranch.gateway.embed.embedder import Embedder
from anabranch.gateway.embed.hashed import Hashed
from anabranch.gateway.graphrouter.classic import Classic
from anabranch.gateway.graphrouter.graph import CostScale, Scenario, hold_out
from anabranch.gateway.graphrouter.newcomers import Ratio, first_ratio
from anabranch.gateway.graphrouter.nodes import Tasks, described
from anabranch.gateway.graphrouter.plus import Plus, Said
from anabranch.gateway.graphrouter.settings import PlusConfig, Training
from anabranch.gateway.money import Price
from anabranch.gateway.predictor import Prediction, Predictor, one_row
from anabranch.gateway.query import Outcome, Query
from anabranch.gateway.strategies.training import training_set, vectors_of
from anabranch.gateway.strategy import Arrays, Facts

ANY = ("any",)  # a table of queries needs models; which is no matter
SHOWN = 5  # neighbours and tasks in an explanation
Mode = Literal["reference", "mean", "hetero", "plus"]


class GraphRouter(Predictor, kind="graph"):
    """See the module.

    Attributes:
        tasks: how the task of a query is told.
        scale: of costs.
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
        self.scale = CostScale(np.zeros(1), np.zeros(1))
        self.cost_TM = np.zeros((1, 0))
        self.edges_M = np.zeros(0, np.int64)
        self.ratios: dict[str, Ratio] = {}
        self.num_fitted, self.description_dim = 0, 0
        self.tokens = (math.nan, math.nan)
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
        cost_NM = self._costs(data, task_N, held_N)
        self._read_models(data)
        model_MV, task_TV = self._describe(data.models, vector_ND, task_N, model_vectors or {}, task_vectors or {})
        if config.mode == "plus":
            self.engine = Plus.fit(
                config.plus, vector_ND, share_NT, task_N, model_MV, data.score_NM, cost_NM, held_N, group_N, seed
            )
        else:
            self.engine = Classic.fit(
                config.mode, config.scenario, config.hidden, config.training, vector_ND, share_NT, task_TV, model_MV,
                data.score_NM, cost_NM, held_N, seed,
            )  # fmt: skip
        return self

    def _costs(self, data: Recorded, task_N: np.ndarray, held_N: np.ndarray) -> np.ndarray:
        """Scaled costs, by a scale that validation queries have no part in; zeros where no cost is known at all."""
        shape, num_tasks = data.score_NM.shape, len(self.tasks.names)
        cost_NM = np.zeros(shape) if data.cost_NM is None or not np.isfinite(data.cost_NM).any() else data.cost_NM
        self.scale = CostScale.fit(cost_NM[~held_N], task_N[~held_N], num_tasks)
        known = data.cost_NM is not None and np.isfinite(data.cost_NM).any()
        self.cost_TM = np.stack([_column_means(cost_NM[task_N == task]) for task in range(num_tasks)])
        self.cost_TM = (
            np.where(np.isfinite(self.cost_TM), self.cost_TM, _column_means(cost_NM))
            if known
            else np.full_like(self.cost_TM, np.nan)
        )
        return self.scale.scale(cost_NM, task_N)

    def _read_models(self, data: Recorded) -> None:
        """What of the data is kept beside the graph."""
        self.models, self.num_fitted, self.ratios = data.models, len(data.models), {}
        self.edges_M = np.isfinite(data.score_NM).sum(0)
        if data.tokens_NM2 is not None and np.isfinite(data.tokens_NM2).any((0, 1)).all():
            prompt, completion = np.nanmean(data.tokens_NM2, (0, 1)).tolist()
            self.tokens = (prompt, completion)
        length = self.config.text_length
        self.texts = tuple(text[:length] for text in data.query) if length and self.config.mode == "plus" else ()

    def _describe(
        self, models: tuple[str, ...], vector_ND: np.ndarray, task_N: np.ndarray,
        model_vectors: Mapping[str, np.ndarray], task_vectors: Mapping[str, np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
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
        engine, task_N = self._fitted(), self._task_of(share_NT)
        usual = float(self._usual(share_NT)[0])
        ratio = self.ratios.get(self.models[model])
        if ratio is not None and math.isfinite(cost) and usual > 0:
            ratio.learn(cost, usual)
        if isinstance(engine, Plus):
            scaled = float(self.scale.scale(np.array([[cost]]), task_N)[0, 0])
            engine.add_edges(vector_ND, share_NT, model, effect, scaled)
        elif math.isfinite(effect):
            paid = cost if math.isfinite(cost) else float(self._cost_by_task(share_NT)[0, model])
            row_NM = np.full((1, len(self.models)), np.nan)
            effect_NM, cost_NM = row_NM.copy(), row_NM
            effect_NM[0, model], cost_NM[0, model] = (
                effect,
                self.scale.scale(np.array([[np.nan_to_num(paid)]]), task_N)[0, 0],
            )
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
        usual = float(np.nanmean(self.cost_TM)) if np.isfinite(self.cost_TM).any() else 0.0
        fitted = self.models[: self.num_fitted]
        self.ratios[name] = first_ratio(price or Price(), self.config.prices, fitted, self.tokens, usual)
        self.models, self.edges_M = (*self.models, name), np.append(self.edges_M, 0)
        if isinstance(engine, Plus):
            engine.add_model(vector_V)
        else:
            engine.encoding.add_model(vector_V)
        if seen is not None and shots is not None:
            self._shots(shots, *seen)

    def _described(self, name: str, description: str, vector: np.ndarray | None) -> np.ndarray:
        """Vector of a model that joins; by its name alone where no fitted model was described either."""
        reads = description if vector is None and self.config.descriptions else ""
        vectors = {} if vector is None else {name: vector}
        embedder = self.config.embedder.build() if reads else None
        return described([name], {name: reads}, vectors, embedder, self.description_dim)[0]

    def _shots(self, shots: Recorded, vector_SD: np.ndarray, share_ST: np.ndarray) -> None:
        """Place the newest model by its scores."""
        engine, model, usual_S = self._fitted(), len(self.models) - 1, self._usual(share_ST)
        if shots.cost_NM is not None:
            for cost, usual in zip(shots.cost_NM[:, 0].tolist(), usual_S.tolist(), strict=True):
                if math.isfinite(cost) and usual > 0:
                    self.ratios[self.models[model]].learn(cost, usual)
        if isinstance(engine, Plus):
            engine.place(model, vector_SD, share_ST, shots.score_NM[:, 0])
        else:
            effect_SM = np.full((len(shots), len(self.models)), np.nan)
            effect_SM[:, model] = shots.score_NM[:, 0]
            paid_SM = np.nan_to_num(self._cost_by_task(share_ST))
            if shots.cost_NM is not None:
                paid_SM[:, model] = np.where(np.isfinite(shots.cost_NM[:, 0]), shots.cost_NM[:, 0], paid_SM[:, model])
            engine.add(vector_SD, share_ST, effect_SM, self.scale.scale(paid_SM, self._task_of(share_ST)))
        self.edges_M[model] += len(shots)

    # Deciding

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
            return Prediction(quality_NM=quality_NM, cost_NM=self._cost_by_task(share_NT), details=details)
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
            quality_NM=quality_NM, cost_NM=self._dollars(said, share_NT), confidence_N=sure_N, details=details
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
        cost_NM = (
            self.scale.scale(self._dollars(said, share_NT), self._task_of(share_NT)) if self.ratios else said.cost_QM
        )
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
                {"row": row, "query": self.texts[row] if row < len(self.texts) else "", "similarity": like, "attention": weight,
                 "edges": {self.models[model]: left for model, left in edges.items()}}
                for row, like, weight, edges in engine.nearest(vector_ND, share_NT, SHOWN)
            ]  # fmt: skip
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

    def _task_of(self, share_NT: np.ndarray) -> np.ndarray:
        return share_NT.argmax(1)

    def _closed(self, quality_NM: np.ndarray) -> np.ndarray:
        """-inf for a fitted model without a single score."""
        silent_M = self.edges_M[: self.num_fitted] == 0
        if silent_M.any():
            quality_NM[:, : self.num_fitted][:, silent_M] = -np.inf
        return quality_NM

    def _usual(self, share_NT: np.ndarray) -> np.ndarray:
        """[N]: what a call of the fitted models costs on average, dollars."""
        return share_NT.astype(float) @ self.cost_TM.mean(1)

    def _cost_by_task(self, share_NT: np.ndarray) -> np.ndarray:
        """[N, M] dollars: the mean of the task, and for models that joined later their ratio to it."""
        cost_NM, usual_N = share_NT.astype(float) @ self.cost_TM, self._usual(share_NT)
        later = [self.ratios[name].value * usual_N for name in self.models[self.num_fitted :]]
        return np.concatenate([cost_NM, np.stack(later, 1)], 1) if later else cost_NM

    def _dollars(self, said: Said, share_NT: np.ndarray) -> np.ndarray:
        """Of mode ``plus``, [N, M]: the cost head, and for models that joined later their ratio to what the others cost there."""
        if not np.isfinite(self.cost_TM).any():
            return np.full(said.cost_QM.shape, np.nan)
        dollars_NM = self.scale.dollars(said.cost_QM, self._task_of(share_NT))
        usual_N = dollars_NM[:, : self.num_fitted].mean(1)
        for at, name in enumerate(self.models[self.num_fitted :], start=self.num_fitted):
            dollars_NM[:, at] = self.ratios[name].value * usual_N
        return dollars_NM

    # Saving

    def state(self) -> tuple[Arrays, Facts]:
        """All it learned, but for ``models``."""
        engine = self._fitted()
        arrays, facts = engine.state() if isinstance(engine, Plus) else (engine.state(), {})
        own = {
            "tasks.weight_DT": self.tasks.weight_DT, "tasks.bias_T": self.tasks.bias_T, "scale.low_T": self.scale.low_T,
            "scale.span_T": self.scale.span_T, "cost_TM": self.cost_TM, "edges_M": self.edges_M.copy(), "tokens": np.array(self.tokens),
            "ratios": np.array([[ratio.up, ratio.down] for ratio in self.ratios.values()]).reshape(-1, 2),
        }  # fmt: skip
        names = {
            "tasks": list(self.tasks.names), "sharpness": self.tasks.sharpness, "later": list(self.ratios), "texts": list(self.texts),
            "fitted_models": self.num_fitted, "description_dim": self.description_dim,
        }  # fmt: skip
        return {**arrays, **{f"graph.{name}": value for name, value in own.items()}}, {**facts, **names}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        own = {
            name.removeprefix("graph."): np.array(value) for name, value in arrays.items() if name.startswith("graph.")
        }
        self.tasks = Tasks(
            tuple(facts["tasks"]), own["tasks.weight_DT"], own["tasks.bias_T"], float(facts["sharpness"])
        )
        self.scale, self.cost_TM, self.edges_M = (
            CostScale(own["scale.low_T"], own["scale.span_T"]),
            own["cost_TM"],
            own["edges_M"],
        )
        prompt, completion = own["tokens"].tolist()
        self.tokens, self.texts = (prompt, completion), tuple(facts["texts"])
        self.ratios = {name: Ratio(*pair) for name, pair in zip(facts["later"], own["ratios"].tolist(), strict=True)}
        self.num_fitted, self.description_dim = facts["fitted_models"], facts["description_dim"]
        if self.config.mode == "plus":
            self.engine = Plus.of_state(self.config.plus, arrays, facts)
        else:
            self.engine = Classic.of_state(self.config.mode, self.config.scenario, arrays)


def _column_means(value_NM: np.ndarray) -> np.ndarray:
    """NaN where nothing is known."""
    known_NM = np.isfinite(value_NM)
    count_M = known_NM.sum(0)
    return np.where(count_M > 0, np.where(known_NM, value_NM, 0.0).sum(0) / np.maximum(count_M, 1), np.nan)


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
