"""Duo-LLM: a big and a small feed-forward module in every layer, to study how much per-token routing could gain.

"Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models", 2024, arXiv 2410.10846. Stage 1 trains both modules
under random routing (`layer`), stage 2 finds each token's best route under a budget by trying them (`oracle`), stage 3 learns a router
under that budget (`router`), and `analysis` asks what the difference means. A laboratory: the oracle needs the labels.
Evidence: ``anabranch study duo_llm``.
"""

from anabranch.depth.duo_llm.layer import BIG, OPTIONS, SKIP, SMALL, DuoFFN, DuoRouter, Routed, duo_layers, take
from anabranch.depth.duo_llm.oracle import oracle
from anabranch.depth.duo_llm.parts import BudgetLoss, Mixture, RandomChoice, TemperedScore
from anabranch.depth.duo_llm.results import OracleReport, OracleResult
from anabranch.depth.duo_llm.routes import RouteSpace, Walk

__all__ = [
    "BIG",
    "OPTIONS",
    "SKIP",
    "SMALL",
    "BudgetLoss",
    "DuoFFN",
    "DuoRouter",
    "Mixture",
    "OracleReport",
    "OracleResult",
    "RandomChoice",
    "RouteSpace",
    "Routed",
    "TemperedScore",
    "Walk",
    "duo_layers",
    "oracle",
    "take",
]
