"""How composition of experts learns from recorded outcomes: classifier, table, kind of map; and models that were scored later."""
# Shapes: N queries, M models, D dimensions

from typing import Self

import numpy as np

from anabranch.errors import InputError
from anabranch.kmeans import by_size, kmeans
from anabranch.routers.coe.category import CategoryRouter
from anabranch.routers.coe.choice import MapKind, best_kind, largest_trade_off
from anabranch.routers.coe.expert_map import Limits
from anabranch.routers.coe.feedback import Feedback
from anabranch.routers.coe.going_on import GoingOn
from anabranch.routers.coe.quality import table_of_scores
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model


class Fitting(GoingOn):
    """See the module."""

    def _new_router(self, seed: int) -> CategoryRouter:
        config = self.config
        return CategoryRouter(
            head=config.head, k=config.k, general=config.general, C=config.C, uncertainty=config.uncertainty, seed=seed
        )

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Classifier, table, kind of map. Queries need vectors; sizes that are not in the config are asked of the pool later.

        Raises InputError if there are no vectors, or no tasks where they are asked for.
        """
        if data.vector_ND is None:
            raise InputError(
                "coe learns from vectors of the queries; embed them first: data.with_vectors(unit_vectors(embedder, data.query))"
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
