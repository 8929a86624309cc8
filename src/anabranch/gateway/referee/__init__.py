"""The referee: strategies on recorded outcomes, with exact metrics, every baseline, and what differences are worth.

report = evaluate({"knn": strategies.make("knn")}, train=train, test=test)
print(report.to_markdown())
"""

from anabranch.gateway.referee.compare import Interval, bootstrap, holm
from anabranch.gateway.referee.curve import aiq, cost_save, hull, pareto_distance, routerbench_aiq
from anabranch.gateway.referee.evaluate import decision_latency, evaluate, preference
from anabranch.gateway.referee.report import Report, Standing
from anabranch.gateway.referee.two_models import Recovery, recovery, recovery_in_bins

__all__ = [
    "Interval",
    "Recovery",
    "Report",
    "Standing",
    "aiq",
    "bootstrap",
    "cost_save",
    "decision_latency",
    "evaluate",
    "holm",
    "hull",
    "pareto_distance",
    "preference",
    "recovery",
    "recovery_in_bins",
    "routerbench_aiq",
]
