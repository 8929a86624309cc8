"""`Pairs`: the dual-batch pipeline in a server, whose requests come and go.

The requests that decode in the next two steps are a unit (`anabranch.serving.core.dual_batches`). Before the first of the two, the routes
of all their next tokens, which are known by then, are predicted together, and the Token Scheduler says who is in which step. What was
predicted is kept until its step, so that the cache sees the second step while the first one runs.
"""
# Shapes: T tokens of a step, X tokens of two steps, L routed layers, E experts

from collections.abc import Hashable, Sequence

import numpy as np

from anabranch.serving.expertflow.history import BatchHistory
from anabranch.serving.expertflow.predictors.base import RoutePredictor, Row, new_ids
from anabranch.serving.expertflow.token_scheduler import TokenScheduler, likeliest, reindex

__all__ = ["Pairs"]


class Pairs:
    """Predicts for units, and regroups them.

    Args:
        predictor: of whole routes.
        top_k: experts of a token in each layer.
        history: what each request has read, and its next token.
        scheduler: None leaves requests in the order in which they are.

    Attributes:
        before, after: experts that the steps of all units load by prediction, as they came and regrouped.
    """

    def __init__(
        self,
        predictor: RoutePredictor,
        top_k: Sequence[int],
        history: BatchHistory,
        scheduler: TokenScheduler | None,
    ) -> None:
        self._predictor, self._top_k, self._history, self._scheduler = predictor, top_k, history, scheduler
        self.before = self.after = 0
        # Of requests by id: tokens so far with the next one, and prob_LE of it.
        self._known: dict[Hashable, tuple[int, np.ndarray]] = {}

    def order(self, ids: Sequence[str], size: int) -> list[str]:
        """The ids of a unit, the first step's ``size`` before the others; see `anabranch.serving.core.dual_batches.Order`."""
        rows = [self._history.next_row(id) for id in ids]
        prob_XLE = self.predict(rows)
        if prob_XLE is None:
            return list(ids)
        self._known.update((row.key, (len(row.ids), prob_LE)) for row, prob_LE in zip(rows, prob_XLE, strict=True))
        if self._scheduler is None:
            return list(ids)
        plan = self._scheduler.regroup(likeliest(prob_XLE, self._top_k), size)
        self.before += plan.objective_before
        self.after += plan.objective_after
        return reindex(ids, plan.order_X)

    def predict(self, rows: Sequence[Row]) -> np.ndarray | None:
        """prob_TLE of a step's tokens, of those that are known as they are; a predictor goes on from each token once."""
        known = [self._of(row) for row in rows]
        others = [row for row, prob_LE in zip(rows, known, strict=True) if prob_LE is None]
        if rows and not others:
            return np.stack([prob_LE for prob_LE in known if prob_LE is not None])
        found_TLE = self._predictor.predict(new_ids(others), others)
        if found_TLE is None or len(others) == len(rows):
            return found_TLE
        parts, start = [], 0
        for row, prob_LE in zip(rows, known, strict=True):
            if prob_LE is None:
                parts.append(found_TLE[start : start + row.num_new])
                start += row.num_new
            else:
                parts.append(prob_LE[None])
        return np.concatenate(parts)

    def later(self, rows: Sequence[Row]) -> np.ndarray | None:
        """prob_TLE of the unit's tokens that are not among this step's ``rows``; None if there are none."""
        here = {row.key for row in rows}
        left = [prob_LE for key, (_, prob_LE) in self._known.items() if key not in here]
        return np.stack(left) if left else None

    def ran(self, rows: Sequence[Row]) -> None:
        """The step of these rows begins: what was predicted of them has been used."""
        for row in rows:
            self._known.pop(row.key, None)

    def forget(self, ids: Sequence[str]) -> None:
        """These requests are over."""
        for id in ids:
            self._known.pop(id, None)

    def counters(self) -> dict[str, float]:
        """Experts that the steps of all units load by prediction: as they came, and as they were regrouped."""
        return {"expert_unit_loads_given": float(self.before), "expert_unit_loads_regrouped": float(self.after)}

    def _of(self, row: Row) -> np.ndarray | None:
        length, prob_LE = self._known.get(row.key, (0, None))
        return prob_LE if row.num_new == 1 and length == len(row.ids) else None
