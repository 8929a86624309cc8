"""How balanced a model's choices are beside the best balanced assignment of the same scores (ALF-LB, arXiv 2512.03915)."""
# Shapes: T tokens, E destinations, K per token

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from anabranch.errors import DataError
from anabranch.routing.assignment import balance_audit, broken_preferences, choose
from anabranch.routing.measure import domain_load, load_violation, max_violation
from anabranch.routing.trace import RoutingTrace

TOKENS = 8192  # of a layer, spread over the trace


@dataclass(frozen=True, kw_only=True)
class LayerAudit:
    """The audit of one layer.

    Attributes:
        layer: its number. ``tokens``: how many were audited.
        achieved: score of the recorded choices. ``optimum``: of the best balanced assignment of the same scores; ``bound``: its dual, which
            no balanced assignment exceeds. ``achieved_share``: achieved over optimum.
        max_violation: MaxVio of the recorded choices; ``min_violation``: of the least loaded; ``mean_violation``: mean absolute value.
        unbiased_max_violation: of the K best scores of each token, without a bias.
        domain_max_violation: MaxVio of the recorded choices of each domain, of all tokens; None for one without. Empty without domains.
        dual: of the router's bias, and ``duality_gap``, 0 for an optimal bias; of no bias where ``has_bias`` is False.
        prices: optimal ones, by destination, mean 0; what a bias should be.
        correlation: of the bias with optimal prices; None without a bias, or a constant one.
        has_bias: whether the router's bias is known. One that multiplies scores is not in this sense: prices are added.
        preference_violations: tokens that drop one of their K best scores for a destination of a lower bias; None without a bias. By the
            theory there is none where score + bias makes the choice, so others were made by something else: groups, closed destinations,
            an override, or a bias that was not this one.
    """

    layer: int
    tokens: int
    achieved: float
    optimum: float
    bound: float
    achieved_share: float
    max_violation: float
    min_violation: float
    mean_violation: float
    unbiased_max_violation: float
    domain_max_violation: dict[str, float | None]
    dual: float
    duality_gap: float
    prices: list[float]
    correlation: float | None
    has_bias: bool
    preference_violations: int | None = None


def audit_trace(trace: RoutingTrace, bias: Mapping[int, np.ndarray] | None = None) -> list[LayerAudit]:
    """Audit every layer of a trace that has a choice and fixed K.

    Args:
        trace: with scores (``record_routing(model, scores=True)``).
        bias: float ``[E]`` of the layers whose router adds one to select; a trace does not hold it.

    Raises DataError for a trace without scores or with a score that is no number, for layers whose tokens take varying numbers of
    destinations, and where no layer has a choice.
    """
    layers = [layer for layer in trace.layers if layer.top_k < layer.num_destinations]
    if not layers:
        raise DataError("no layer has a choice between destinations, so there is no balance to audit")
    return [_audit(trace, layer.layer, (bias or {}).get(layer.layer)) for layer in layers]


def _audit(trace: RoutingTrace, layer: int, bias_E: np.ndarray | None) -> LayerAudit:
    decisions = trace.decisions(layer)
    if decisions.score_NE is None:
        raise DataError("the trace has no scores, and an audit needs those of all destinations; record it with scores")
    count = len(decisions.index_NK)
    pick_T = np.unique(np.linspace(0, count - 1, min(TOKENS, count)).astype(int))
    index_TK, score_TE = decisions.index_NK[pick_T], decisions.score_NE[pick_T]
    if (index_TK < 0).any():
        raise DataError(
            f"layer {layer} takes a number of destinations that varies from token to token; the audit is of a fixed number"
        )
    top_k, num_destinations = index_TK.shape[1], score_TE.shape[1]
    found = balance_audit(score_TE, top_k, bias_E, name=str(layer))
    plain = found if bias_E is None else balance_audit(score_TE, top_k, name=str(layer))
    load_E = np.bincount(index_TK.reshape(-1), minlength=num_destinations)
    violation_E = load_violation(load_E)
    by_domain = max_violation(domain_load(trace, layer)) if trace.domains else np.zeros(0)
    achieved = float(np.take_along_axis(score_TE.astype(np.float64), index_TK, 1).sum())
    return LayerAudit(
        layer=layer,
        tokens=len(pick_T),
        achieved=achieved,
        achieved_share=achieved / found.optimum,
        optimum=found.optimum,
        bound=found.bound,
        max_violation=float(violation_E.max()),
        min_violation=float(violation_E.min()),
        mean_violation=float(np.abs(violation_E).mean()),
        unbiased_max_violation=plain.max_violation,
        domain_max_violation={
            name: None if np.isnan(value) else float(value)
            for name, value in zip(trace.domains, by_domain, strict=True)
        },
        dual=found.dual,
        duality_gap=found.duality_gap,
        prices=found.price_E.tolist(),
        correlation=None if np.isnan(found.correlation) else found.correlation,
        has_bias=bias_E is not None,
        preference_violations=None if bias_E is None else _violations(score_TE, index_TK, bias_E),
    )


def _violations(score_TE: np.ndarray, index_TK: np.ndarray, bias_E: np.ndarray) -> int:
    """Of choices as recorded, beside those without a bias."""
    chosen_TE = np.zeros(score_TE.shape, bool)
    np.put_along_axis(chosen_TE, index_TK, True, axis=1)
    # Two biases as near to each other as score + bias is rounded may go either way.
    slack = 4 * float(np.finfo(np.float32).eps) * max(1.0, np.abs(score_TE).max(), np.abs(bias_E).max())
    return broken_preferences(choose(score_TE, index_TK.shape[1]), chosen_TE, bias_E, slack)
