"""From a plan to an answer: deployments, breakers, retries, hedges, streams."""

from anabranch.gateway.dispatch.breaker import BreakerRules
from anabranch.gateway.dispatch.deployments import Deployment, DispatchRules, Group
from anabranch.gateway.dispatch.dispatcher import Dispatcher
from anabranch.gateway.dispatch.plan import Attempt, Plan, Report
from anabranch.gateway.dispatch.stream import Stream

__all__ = [
    "Attempt",
    "BreakerRules",
    "Deployment",
    "DispatchRules",
    "Dispatcher",
    "Group",
    "Plan",
    "Report",
    "Stream",
]
