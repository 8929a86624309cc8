"""Duo-LLM: a big and a small feed-forward module in every layer, to study how much per-token routing could gain.

"Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models", 2024, arXiv 2410.10846. Stage 1 trains both modules
under random routing (`layer`), stage 2 finds each token's best route under a budget by trying them (`oracle`), stage 3 learns a router
under that budget (`router`), and `analysis` asks what the difference means. A laboratory: the oracle needs the labels.
Evidence: ``anabranch study duo_llm``.
"""

from anabranch.depth.duo_llm.analysis import (
    analyze,
    big_by_position,
    difficulty,
    gap_closed,
    hopeless_share,
    ramp_loss,
    rank_correlation,
    route_loss,
    top_tokens,
    transfer,
)
from anabranch.depth.duo_llm.labels import RouteLabels
from anabranch.depth.duo_llm.layer import BIG, OPTIONS, SKIP, SMALL, DuoFFN, DuoRouter, Routed, duo_layers, take
from anabranch.depth.duo_llm.oracle import oracle
from anabranch.depth.duo_llm.parts import BudgetLoss, Mixture, RandomChoice, TemperedScore, class_weights, focal_loss
from anabranch.depth.duo_llm.results import OracleReport, OracleResult
from anabranch.depth.duo_llm.router import (
    calibrate_budget,
    learned_router,
    option_shares,
    train_duo,
    train_router,
    with_router,
)
from anabranch.depth.duo_llm.routes import RouteSpace, Walk
from anabranch.depth.duo_llm.supervised import LabelledRoutes

__all__ = [
    "BIG",
    "OPTIONS",
    "SKIP",
    "SMALL",
    "BudgetLoss",
    "DuoFFN",
    "DuoRouter",
    "LabelledRoutes",
    "Mixture",
    "OracleReport",
    "OracleResult",
    "RandomChoice",
    "RouteLabels",
    "RouteSpace",
    "Routed",
    "TemperedScore",
    "Walk",
    "analyze",
    "big_by_position",
    "calibrate_budget",
    "class_weights",
    "difficulty",
    "duo_layers",
    "focal_loss",
    "gap_closed",
    "hopeless_share",
    "learned_router",
    "option_shares",
    "oracle",
    "ramp_loss",
    "rank_correlation",
    "route_loss",
    "take",
    "top_tokens",
    "train_duo",
    "train_router",
    "transfer",
    "with_router",
]
