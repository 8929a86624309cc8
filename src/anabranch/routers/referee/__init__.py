"""The referee: strategies on recorded outcomes, with exact metrics, every baseline, and what differences are worth.

report = evaluate({"knn": strategies.make("knn")}, train=train, test=test)
print(report.to_markdown())
"""

from anabranch.routers.referee.compare import Interval, bootstrap, holm
from anabranch.routers.referee.curve import aiq, cost_save, hull, pareto_distance, routerbench_aiq
from anabranch.routers.referee.evaluate import Trial, decision_latency, evaluate, preference, try_out, with_cheapest
from anabranch.routers.referee.off_policy import Replay, Replayed, replay
from anabranch.routers.referee.report import Report, Standing
from anabranch.routers.referee.two_models import Recovery, recovery, recovery_in_bins
from anabranch.routers.referee.verdict import Verdict

__all__ = [
    "Interval",
    "Recovery",
    "Replay",
    "Replayed",
    "Report",
    "Standing",
    "Trial",
    "Verdict",
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
    "replay",
    "routerbench_aiq",
    "try_out",
    "with_cheapest",
]
