"""The idea: score -> select -> dispatch -> work -> combine. Knows no model."""

from anabranch.routing.balance import (
    Balancer,
    BiasBalancer,
    DeviceLoss,
    ImportanceLoss,
    SwitchLoss,
    ZLoss,
    discard_loads,
    sync_loads,
)
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import UNUSED, Routing, count_destinations
from anabranch.routing.dispatch import (
    DispatchPlan,
    capacity_of,
    combine,
    dispatch,
    limit_capacity,
    pad_rows,
    plan_dispatch,
    unpad_rows,
)
from anabranch.routing.router import Candidates, Router
from anabranch.routing.score import CosineScore, LinearScore, Score
from anabranch.routing.select import ExpertChoice, GroupTopK, Select, Threshold, TopK, TopP

__all__ = [
    "UNUSED",
    "Balancer",
    "BiasBalancer",
    "Candidates",
    "CosineScore",
    "DeviceLoss",
    "DispatchPlan",
    "ExpertChoice",
    "GroupTopK",
    "ImportanceLoss",
    "LinearScore",
    "Router",
    "Routing",
    "RoutingContext",
    "Score",
    "Select",
    "SwitchLoss",
    "Threshold",
    "TopK",
    "TopP",
    "ZLoss",
    "capacity_of",
    "combine",
    "count_destinations",
    "discard_loads",
    "dispatch",
    "limit_capacity",
    "pad_rows",
    "plan_dispatch",
    "sync_loads",
    "unpad_rows",
]
