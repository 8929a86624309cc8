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
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import InputError
from anabranch.routers.coe.category import Categories
from anabranch.routers.coe.choice import MapKind
from anabranch.routers.coe.expert_map import Solver
from anabranch.routers.coe.feedback import Feedback
from anabranch.routers.coe.fitting import Fitting
from anabranch.routers.coe.planning import Known, Plan
from anabranch.routers.coe.quality import QualityTable
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.knobs import knob_of
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Decision, Pool, Query
from anabranch.routers.contract.strategy import Arrays, Facts

# Characters of a category's name in a header.
HEADER = 200


class CompositionOfExperts(Fitting, Predictor, kind="coe"):
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

    # Deciding

    def meet(self, pool: Pool) -> None:
        """Sizes and prices of models, and which there are; the map is made anew if they changed."""
        self._known = tuple(
            (model.name, model.parameters, float(model.price.input + model.price.output)) for model in pool.models
        )
        self._refresh_if_due()

    @property
    def learned_dim(self) -> int | None:
        """See `Predictor`."""
        return self.router.dim

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
        mosts = {"min_confidence": 1.0}
        knobs = {name: knob_of(query.knobs, name, mosts.get(name, float("inf"))) for name in self.sender_knobs}
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

    # On disk

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
