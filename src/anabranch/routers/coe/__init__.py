"""Composition of Experts: classify a prompt, look up the expert of its category, keep many experts in little memory.

    router = strategies.make("coe", parameters={"small": 8, "large": 70}, budget_params=80).fit(recorded)

`predictor` is the whole as a way of routing; its parts can be used alone: `CategoryRouter`, `QualityTable`, `solve_map`, `ExpertStore`.
"""

from anabranch.routers.coe.category import CategoryRouter
from anabranch.routers.coe.expert_map import ExpertMap, Limits, frontier_of_budget, frontier_of_trade_off, solve_map
from anabranch.routers.coe.lease import Lease
from anabranch.routers.coe.quality import Judgement, QualityTable
from anabranch.routers.coe.store import ExpertStore
from anabranch.routers.coe.tier import ExpertQueue

__all__ = [
    "CategoryRouter",
    "ExpertMap",
    "ExpertQueue",
    "ExpertStore",
    "Judgement",
    "Lease",
    "Limits",
    "QualityTable",
    "frontier_of_budget",
    "frontier_of_trade_off",
    "solve_map",
]
