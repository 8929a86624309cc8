"""Composition of Experts: classify the prompt, look up the category's expert. (Jain et al., SambaNova, arXiv 2412.01868)

    r(x) = CE(CR(x))                         CR: category router (`category`), CE: expert of each category (`expert_map`)
    CE maximises quality under a budget of parameters, from a table of qualities (`quality`)

Learning: fit the classifier on the tasks of recorded queries (or on clusters of their vectors), make the quality table by true
category ("plain", the paper's) or by cross-fitted predicted category ("aware", ours), choose kind and shrinkage by cross-validation of
the whole map, solve. Deciding: one small product, one look-up. Models that come or go, or change their size or price, only change the
map; a model that was scored later only adds a column (`add_experts`). Scores that users give are counted, and every so often the map is
made anew, where an incumbent gives way only to a gain that is no luck.

Departures: kind, shrinkage, cross-validation and steadiness are ours; the order after the first choice (the fallback chain) is by the same
table, within the chosen experts if there is a limit on what is hosted.
"""
# Shapes: N queries, M models, D dimensions, C categories (the general one last)

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import InputError
from anabranch.routers.coe.category import Categories, CategoryRouter
from anabranch.routers.coe.choice import MapKind, best_kind, largest_trade_off, table_for
from anabranch.routers.coe.expert_map import (
    ExpertMap,
    Limits,
    Solver,
    frontier_of_budget,
    frontier_of_trade_off,
    solve_map,
)
from anabranch.routers.coe.feedback import Feedback
from anabranch.routers.coe.quality import QualityTable, table_of_scores
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.knobs import knob_of
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Decision, Model, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.kmeans import by_size, kmeans

# Characters of a category's name in a header.
HEADER = 200

# Maps for knobs and pools that were asked for lately.
KEPT_PLANS = 64

# By how much a fallback stays behind the model before it.
STEP = 1e-6

# Name, billions of parameters, price of a model.
Known = tuple[tuple[str, float | None, float], ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A solved map in the form that deciding needs.

    Attributes:
        map: from categories to experts.
        quality_CM: predicted; -inf for models that must not be asked: not there, never seen in the category, or not hosted for a limit.
        penalty_CM: what puts the models of each category in order.
    """

    map: ExpertMap
    quality_CM: np.ndarray
    penalty_CM: np.ndarray


class CompositionOfExperts(Predictor, kind="coe"):
    """Two-step routing under a budget of parameters; see the module.

    Senders may set the knobs ``budget_params``, ``trade_off_params`` and ``min_confidence`` of one query.
    """

    sender_knobs = ("budget_params", "trade_off_params", "min_confidence")
    # Sums of scores do. Which expert holds a category while none is surely better is each process's own.
    adds_up = True

    @configclass
    class Config(Predictor.Config):
        """How to classify and what to allow. Parameters are in billions.

        Attributes:
            head: "logreg" (fast), "knn" (learns new examples at once) or "mlp".
            k: neighbours of "knn".
            C: inverse weight decay of the others.
            categories: "task" of the recorded queries, "clusters" of their vectors, or "auto": tasks where any are recorded.
            num_clusters: of the latter; 0 for the square root of half the queries, at most 64.
            general: name of the category of prompts it is not sure of; a strong all-round model serves it.
            abstain_rate: share of prompts, like those learned from, that go there; `min_confidence` is set so.
            min_confidence: a confidence below which they do, if that is to be fixed; 0 to 1.
            uncertainty: what confidence is, see `CategoryRouter`.
            budget_params: B, of all hosted experts together; None for no limit.
            trade_off_params: lambda, score given up to save a billion active parameters; "auto" for the largest whose cross-validated
                score is not below the best single model's.
            active_params: A, most parameters that work on a query on average; None for no limit.
            max_experts: most experts to host; None for no limit.
            map: "plain", "aware" or "auto" (by cross-validation, shrinkage too).
            shrinkage: m, observations that an expert's mean counts for in each category ("plain" and "auto" choose their own: 0, the best).
            solver: of the map.
            parameters: of models, where the pool does not say.
            prices: of models in dollars per million tokens, to settle ties where the pool does not say.
            folds: of all cross-fitting.
            refresh_every: observed scores after which the map is made anew; 0 for never.
        """

        head: Literal["knn", "logreg", "mlp"] = "logreg"
        k: int = Field(default=32, ge=1)
        C: float = Field(default=1.0, gt=0)
        categories: Literal["auto", "task", "clusters"] = "auto"
        num_clusters: int = Field(default=0, ge=0)
        general: str = "general"
        abstain_rate: float = Field(default=0.0, ge=0, lt=1)
        min_confidence: float | None = Field(default=None, ge=0, le=1)
        uncertainty: Literal["probability", "entropy", "similarity"] = "probability"
        budget_params: float | None = Field(default=None, ge=0)
        trade_off_params: float | Literal["auto"] = 0.0
        active_params: float | None = Field(default=None, ge=0)
        max_experts: int | None = Field(default=None, ge=1)
        map: Literal["auto", "plain", "aware"] = "auto"
        shrinkage: float = Field(default=20.0, ge=0)
        solver: Solver = "auto"
        parameters: dict[str, float] = Field(default_factory=dict)
        prices: dict[str, float] = Field(default_factory=dict)
        folds: int = Field(default=5, ge=2)
        refresh_every: int = Field(default=200, ge=0)

        def __post_init__(self) -> None:
            if not isinstance(self.trade_off_params, str) and not 0 <= self.trade_off_params < np.inf:
                raise ValueError(
                    f"trade_off_params is {self.trade_off_params}; it must be 'auto' or a number of at least 0"
                )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.router = self._new_router(0)
        self.kind_of_map = MapKind(kind="plain", m=0.0)
        self.trade_off = 0.0 if config.trade_off_params == "auto" else float(config.trade_off_params)
        # Observations, not shrunk, without the general category.
        self._table: QualityTable | None = None
        # Scores since the map was made; all that were observed here since the start, and what others have.
        self._fresh, self.own, self.others = Feedback(), Feedback(), Feedback()
        self._incumbents: dict[str, str] = {}
        self._known: Known = ()
        self._plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()

    def _new_router(self, seed: int) -> CategoryRouter:
        config = self.config
        return CategoryRouter(
            head=config.head, k=config.k, general=config.general, C=config.C, uncertainty=config.uncertainty, seed=seed
        )

    # Learning

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Classifier, table, kind of map. Queries need vectors; sizes that are not in the config are asked of the pool later.

        Raises InputError if there are no vectors, or no tasks where they are asked for.
        """
        if data.vector_ND is None:
            raise InputError(
                "coe learns from vectors of the queries; embed them first: data.with_vectors(embedder.embed(...))"
            )
        # An empty text teaches nothing.
        keep = np.flatnonzero(data.vector_ND.any(axis=1))
        data = data.take(keep)
        assert data.vector_ND is not None
        labels = self._labels(data, seed)
        self.models, self._known, self._incumbents = data.models, (), {}
        self._fresh, self.own, self.others = Feedback(), Feedback(), Feedback()
        self._plans.clear()
        folds = self.config.folds if len(data) >= 2 * self.config.folds else 0
        self.router = self._new_router(seed).fit(data.vector_ND, labels, folds=folds)
        if folds:
            self.router.abstain(self.config.abstain_rate, folds=folds)
        if self.config.min_confidence is not None:
            self.router.min_confidence = self.config.min_confidence
        predicted = self._predicted(data, labels, folds, seed)
        true = [predicted[row] if label is None else label for row, label in enumerate(labels)]
        self.kind_of_map = self._choose(data, true, predicted, seed)
        named = predicted if self.kind_of_map.kind == "aware" else true
        self._table = table_of_scores(named, data.score_NM, data.models, categories=self.router.categories)
        return self

    def _labels(self, data: Recorded, seed: int) -> list[str | None]:
        wanted = self.config.categories
        has_tasks = any(task is not None for task in data.task)
        if wanted == "task" and not has_tasks:
            raise InputError("no recorded query has a task; use categories 'clusters', or 'auto'")
        if wanted != "clusters" and has_tasks:
            return list(data.task)
        assert data.vector_ND is not None
        number = self.config.num_clusters or int(np.clip(np.sqrt(len(data) / 2), 1, 64))
        cluster_N = by_size(kmeans(data.vector_ND, number, num_starts=1, seed=seed)[1])
        return [f"cluster-{cluster:02d}" for cluster in cluster_N]

    def _predicted(self, data: Recorded, labels: list[str | None], folds: int, seed: int) -> list[str]:
        """What each row is taken for by a classifier that did not learn from it, as far as there are enough rows."""
        assert data.vector_ND is not None
        names = self.router.categories
        best_N = self.router.distribution(data.vector_ND).argmax(axis=1)
        if folds and len(self.router) == len(data):
            best_N = self.router.cross_predict(folds=folds, seed=seed).argmax(axis=1)
        return [names[at] for at in best_N]

    def _choose(self, data: Recorded, true: list[str], predicted: list[str], seed: int) -> MapKind:
        """Kind, shrinkage and trade-off, by cross-validation where the config leaves them open."""
        config = self.config
        sizes = self._sizes_or_none()
        limits = (
            Limits() if sizes is None else self._limits(0.0 if config.trade_off_params == "auto" else self.trade_off)
        )
        fixed = (
            MapKind(kind=config.map, m=0.0 if config.map == "plain" else config.shrinkage)
            if config.map != "auto"
            else None
        )
        kind = fixed or best_kind(
            data.score_NM,
            data.models,
            true,
            predicted,
            sizes or {},
            limits,
            prices=config.prices,
            shrinkage=config.shrinkage,
            folds=config.folds,
            seed=seed,
        )
        if config.trade_off_params == "auto":
            if sizes is None:
                raise InputError(
                    f"trade_off_params 'auto' needs the size of every model; add {self._unsized()[0]!r} to parameters, in billions"
                )
            self.trade_off = largest_trade_off(
                data.score_NM,
                data.models,
                true,
                predicted,
                sizes,
                limits,
                kind=kind,
                prices=config.prices,
                folds=config.folds,
                seed=seed,
            )
        return kind

    def _unsized(self) -> list[str]:
        return [name for name in self.models if name not in self.config.parameters]

    def _sizes_or_none(self) -> dict[str, float] | None:
        return None if self._unsized() else {name: self.config.parameters[name] for name in self.models}

    def add_experts(self, data: Recorded) -> Self:
        """Add models that were scored later: new columns of the table; the classifier stays as it is.

        Raises InputError for a model that is there already, and queries without vectors.
        """
        known = [name for name in data.models if name in self.models]
        if known or data.vector_ND is None or self._table is None:
            why = f"{known[0]!r} is known already" if known else "it must be fitted, and the queries need vectors"
            raise InputError(f"cannot add experts: {why}")
        names = self.router.categories
        predicted = [names[at] for at in self.router.distribution(data.vector_ND).argmax(axis=1)]
        added = table_of_scores(predicted, data.score_NM, data.models, categories=names, share=self._shares())
        self._table = self._table.merged(added)
        self.models = (*self.models, *data.models)
        self._plans.clear()
        return self

    def join(self, model: Model, shots: Recorded | None = None) -> None:
        """`add_experts`, as routers of all kinds are asked."""
        if shots is None:
            raise InputError(f"coe knows models by their scores; give outcomes of {model.name!r}")
        self.add_experts(shots)

    def _shares(self) -> dict[str, float]:
        assert self._table is not None
        return dict(zip(self._table.categories, self._table.share_C.tolist(), strict=True))

    # Deciding

    def meet(self, pool: Pool) -> None:
        """Sizes and prices of models, and which there are; the map is made anew if they changed."""
        self._known = tuple(
            (model.name, model.parameters, float(model.price.input + model.price.output)) for model in pool.models
        )
        self._refresh_if_due()

    def predict(self, data: Recorded) -> Prediction:
        """All rows at once."""
        if data.vector_ND is None:
            raise InputError("coe needs the vectors of the queries")
        row_N, found = self._classified(data.vector_ND, None)
        plan = self.plan()
        return Prediction(
            quality_NM=plan.quality_CM[row_N],
            penalty_NM=plan.penalty_CM[row_N],
            confidence_N=np.clip(found.confidence_N, 0.0, 1.0),
        )

    def predict_one(self, query: Query) -> Prediction:
        """With category, confidence and expert in the details."""
        assert query.vector_D is not None
        knobs = {name: knob_of(query.knobs, name) for name in self.sender_knobs}
        row_N, found = self._classified(query.vector_D[None], knobs["min_confidence"])
        plan = self.plan(budget_params=knobs["budget_params"], trade_off_params=knobs["trade_off_params"])
        row = int(row_N[0])
        names = (*self.router.categories, self.config.general)
        likely = np.argsort(-found.distribution_NC[0], kind="stable")[:3]
        details = {
            "category": names[row],
            "confidence": round(float(found.confidence_N[0]), 6),
            "expert": plan.map[names[row]],
            "abstained": bool(found.abstained_N[0]),
            "likely": {names[at]: round(float(found.distribution_NC[0, at]), 6) for at in likely},
            "hosted": list(plan.map.chosen),
            "map": self.kind_of_map.kind,
        }
        return Prediction(
            quality_NM=plan.quality_CM[row : row + 1],
            penalty_NM=plan.penalty_CM[row : row + 1],
            confidence_N=np.clip(found.confidence_N, 0.0, 1.0),
            details=details,
        )

    def headers(self, decision: Decision) -> Mapping[str, str]:
        """The category that a prompt was taken for; how sure it is of that has a header of its own."""
        category = decision.details.get("category")
        return {} if category is None else {"x-route-category": str(category)[:HEADER]}

    def explain(self, query: Query) -> Facts:
        """The details of `predict_one`."""
        return self.predict_one(query).details or {}

    def _classified(self, vector_ND: np.ndarray, min_confidence: float | None) -> tuple[np.ndarray, Categories]:
        """Row of the table for each query, and what lies behind it."""
        found = self.router.classify(vector_ND, min_confidence)
        return np.where(found.abstained_N, self._general_row(), found.distribution_NC.argmax(axis=1)), found

    def _general_row(self) -> int:
        """The last one, unless a category of that name was learned."""
        names = self.router.categories
        return names.index(self.config.general) if self.config.general in names else len(names)

    def plan(self, *, budget_params: float | None = None, trade_off_params: float | None = None) -> Plan:
        """The map for the models there are now, remembered until they change.

        Args:
            budget_params: instead of the config's.
            trade_off_params: likewise.

        Raises InputError as `solve_map` does, and if no model of the pool is known.
        """
        key = (self._known, budget_params, trade_off_params)
        found = self._plans.get(key)
        if found is None:
            found = self._planned(budget_params, trade_off_params)
            self._plans[key] = found
            while len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)
        return found

    def frontier(self, by: Literal["budget", "trade_off"] = "budget") -> list[ExpertMap]:
        """The best map for every budget of hosted parameters, or for every price of active ones, within the config's other limits.

        Raises InputError before ``fit``, and for a model whose size nobody says.
        """
        drawn = self._tables()[1]
        parameters, prices, present = self._facts_of_models()
        if unsized := [name for name in present if name not in parameters]:
            raise InputError(
                f"a frontier needs the size of every model, in billions of parameters; {unsized[0]!r} has none"
            )
        drawn, limits = drawn.only(present), self._limits(self.trade_off)
        if by == "budget":
            return frontier_of_budget(
                drawn, parameters, limits=limits.replace(budget=None), prices=prices, solver=self.config.solver
            )
        return frontier_of_trade_off(
            drawn, parameters, limits=limits.replace(trade_off=0.0), prices=prices, solver=self.config.solver
        )

    def _planned(self, budget_params: float | None, trade_off_params: float | None) -> Plan:
        table, drawn = self._tables()
        parameters, prices, present = self._facts_of_models()
        limits = self._limits(self.trade_off if trade_off_params is None else trade_off_params)
        if budget_params is not None:
            limits = limits.replace(budget=budget_params)
        if self._incumbents:
            drawn = table.steady(self._incumbents, drawn)
        drawn = drawn.only(present)
        found = solve_map(drawn, parameters, limits=limits, prices=prices, solver=self.config.solver)
        at = [self.models.index(name) for name in present]
        quality_CM = np.full((len(drawn.categories), len(self.models)), -np.inf)
        quality_CM[:, at] = np.where(np.isnan(drawn.quality_CE), -np.inf, drawn.quality_CE)
        # The others are not hosted.
        if limits.budget is not None or limits.max_experts is not None:
            quality_CM[:, ~np.isin(self.models, found.chosen)] = -np.inf
        size_M = np.array([limits.trade_off * parameters.get(name, 0.0) for name in self.models])
        first_C = [self.models.index(found[name]) for name in drawn.categories]
        return Plan(map=found, quality_CM=quality_CM, penalty_CM=_penalties(quality_CM, size_M, np.array(first_C)))

    def _tables(self) -> tuple[QualityTable, QualityTable]:
        """Observations and, drawn toward the means, what to choose by; both with the general category."""
        if self._table is None:
            raise InputError("coe has not learned yet: fit it on recorded outcomes first")
        if self.config.general in self.router.categories:
            return self._table, table_for(self._table, self.kind_of_map)
        # It needs an expert even if it is hardly ever asked.
        rate = max(self.config.abstain_rate, 1e-6)
        table = self._table.with_row(self.config.general, rate)
        return table, table_for(self._table, self.kind_of_map).with_row(self.config.general, rate)

    def _facts_of_models(self) -> tuple[dict[str, float], dict[str, float], list[str]]:
        """Sizes, prices and names of the models that are known and there."""
        parameters, prices = dict(self.config.parameters), dict(self.config.prices)
        for name, size, price in self._known:
            if size is not None:
                parameters[name] = size
            if price:
                prices[name] = price / 1e9
        there = {name for name, _, _ in self._known}
        present = [name for name in self.models if not there or name in there]
        if not present:
            raise InputError(
                f"coe knows none of the models {', '.join(sorted(there))}; it learned of {', '.join(self.models)}"
            )
        return parameters, prices, present

    def _limits(self, trade_off: float) -> Limits:
        config = self.config
        return Limits(
            budget=config.budget_params,
            trade_off=trade_off,
            max_experts=config.max_experts,
            active=config.active_params,
        )

    # Going on

    def observe(self, outcome: Outcome) -> None:
        """Count a score; after ``refresh_every`` of them, make the map anew, steadily."""
        if outcome.quality is None or outcome.query.vector_D is None or outcome.model not in self.models:
            return
        best = int(self.router.distribution(outcome.query.vector_D[None])[0].argmax())
        for scores in (self._fresh, self.own):
            scores.add(self.router.categories[best], outcome.model, float(outcome.quality))
        self._refresh_if_due()

    def _refresh_if_due(self) -> None:
        if self.config.refresh_every and self._fresh.count >= self.config.refresh_every:
            self.refresh()

    def refresh(self) -> None:
        """Take what was observed into the table and make the map anew; experts keep their categories unless others are surely better."""
        fresh, unknown = self._fresh.split(self.models)
        if not fresh.cells or self._table is None:
            return
        self._incumbents = dict(self.plan().map.choice)
        self._table, self._fresh = self._table.with_feedback(fresh), unknown
        self._plans.clear()

    # Several processes

    def part(self) -> tuple[Arrays, Facts]:
        """See `Strategy`."""
        return self.own.state()

    def hear(self, arrays: Arrays, facts: Facts) -> None:
        """See `Strategy`. It is taken into the table once there is enough, as what is observed here is."""
        heard = Feedback.read(arrays, facts) if facts else Feedback()
        heard.sums(self.router.categories, tuple({expert for _, expert in heard.cells}))
        self._fresh.take(heard)
        self._fresh.take(self.others, -1)
        self.others = heard

    def joined(self, parts: Sequence[tuple[Arrays, Facts]]) -> tuple[Arrays, Facts]:
        """See `Strategy`."""
        made = Feedback()
        for part in parts:
            made.take(Feedback.read(*part))
        return made.state()

    def disown(self, arrays: Arrays, facts: Facts) -> None:
        """See `Strategy`. The table has it until it comes back."""
        part = Feedback.read(arrays, facts)
        if not self.own.holds(part):
            raise InputError("these scores are not among those that were observed here")
        self.own.take(part, -1)
        self._fresh.take(part, -1)

    def state(self) -> tuple[Arrays, Facts]:
        """Classifier, table and what was chosen."""
        assert self._table is not None
        arrays, facts = self.router.state()
        table = self._table
        arrays = {f"router.{name}": value for name, value in arrays.items()} | {
            "quality_CE": table.quality_CE,
            "count_CE": table.count_CE,
            "variance_CE": table.variance_CE,
            "share_C": table.share_C,
            "mean_E": table.mean_E,
        }
        return arrays, {
            "router": facts,
            "kind_of_map": [self.kind_of_map.kind, self.kind_of_map.m],
            "trade_off": self.trade_off,
            "fresh": [[*cell, *sums_3.tolist()] for cell, sums_3 in self._fresh.cells.items()],
            "incumbents": self._incumbents,
        }

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.router = self._new_router(0)
        names = {name.removeprefix("router."): value for name, value in arrays.items() if name.startswith("router.")}
        self.router.load_state(names, facts["router"])
        kind, m = facts["kind_of_map"]
        self.kind_of_map, self.trade_off = MapKind(kind=kind, m=m), facts["trade_off"]
        # Of versions before, one by one.
        self._fresh = Feedback.of((category, model, score) for category, model, score in facts.get("heard", ()))
        for category, model, *sums_3 in facts.get("fresh", ()):
            self._fresh.cells[category, model] = np.array(sums_3)
        self.own, self.others = Feedback(), Feedback()
        self._incumbents, self._known = dict(facts["incumbents"]), ()
        self._plans.clear()
        self._table = QualityTable(
            categories=self.router.categories,
            experts=self.models,
            **{name: arrays[name] for name in ("quality_CE", "count_CE", "variance_CE", "share_C", "mean_E")},
        )


def _penalties(quality_CM: np.ndarray, size_M: np.ndarray, first_C: np.ndarray) -> np.ndarray:
    """What to take off each quality so that the map's expert comes first, then the others by what they are worth net of their size."""
    rows = np.arange(len(quality_CM))
    worth_CM = np.where(np.isfinite(quality_CM), quality_CM - size_M, -np.inf)
    top_C1 = worth_CM[rows, first_C][:, None]
    order_CM = np.argsort(np.argsort(-worth_CM, axis=1, kind="stable"), axis=1)
    wanted_CM = np.minimum(worth_CM, top_C1 - STEP * (1 + order_CM))
    wanted_CM[rows, first_C] = top_C1[:, 0]
    return np.where(np.isfinite(quality_CM), np.where(np.isfinite(quality_CM), quality_CM, 0.0) - wanted_CM, 0.0)
