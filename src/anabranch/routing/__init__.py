"""The idea: score -> select -> dispatch -> work -> combine. Knows no model."""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.routing.balance import (
    Balancer,
    DeviceLoss,
    EntropyLoss,
    ImportanceLoss,
    PoolLoss,
    SwitchLoss,
    ZLoss,
    discard_loads,
    sync_loads,
)
from anabranch.routing.bias import BiasBalancer, export_correction_bias, export_history, import_correction_bias
from anabranch.routing.context import OfPass, RoutingContext
from anabranch.routing.conversion import WeightField
from anabranch.routing.decision import UNUSED, Routing, count_destinations
from anabranch.routing.destinations import Candidates
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
from anabranch.routing.hash_score import HashScore
from anabranch.routing.hybrid import HybridEntropy
from anabranch.routing.layer_overrides import override_routing
from anabranch.routing.override import Override
from anabranch.routing.rate import HeadActivation, RateBalance, ReMoEController, SmoothProximity
from anabranch.routing.record import Recorder, record_routing
from anabranch.routing.relu import Positive, ReluScore
from anabranch.routing.replay import replay_routing
from anabranch.routing.router import Router
from anabranch.routing.score import CosineScore, LinearScore, Score
from anabranch.routing.select import ExpertChoice, GroupTopK, Select, Threshold, TopK, TopP
from anabranch.routing.trace import Decisions, RoutingTrace
from anabranch.routing.trace_builder import TraceBuilder, TraceWriter
from anabranch.routing.trace_schema import TraceLayer
from anabranch.routing.uncertainty import SoftLoss, UncertaintyLoss, uncertainty

__all__ = [
    "UNUSED",
    "Balancer",
    "BiasBalancer",
    "Candidates",
    "CosineScore",
    "Decisions",
    "DeviceLoss",
    "DispatchPlan",
    "EntropyLoss",
    "ExpertChoice",
    "GroupTopK",
    "HashScore",
    "HeadActivation",
    "HybridEntropy",
    "ImportanceLoss",
    "LinearScore",
    "OfPass",
    "Override",
    "PoolLoss",
    "Positive",
    "RateBalance",
    "ReMoEController",
    "Recorder",
    "ReluScore",
    "Router",
    "Routing",
    "RoutingContext",
    "RoutingTrace",
    "Score",
    "Select",
    "SmoothProximity",
    "SoftLoss",
    "SwitchLoss",
    "Threshold",
    "TopK",
    "TopP",
    "TraceBuilder",
    "TraceLayer",
    "TraceWriter",
    "UncertaintyLoss",
    "WeightField",
    "ZLoss",
    "capacity_of",
    "combine",
    "count_destinations",
    "discard_loads",
    "dispatch",
    "export_correction_bias",
    "export_history",
    "import_correction_bias",
    "limit_capacity",
    "override_routing",
    "pad_rows",
    "plan_dispatch",
    "record_routing",
    "replay_routing",
    "sync_loads",
    "uncertainty",
    "unpad_rows",
]
