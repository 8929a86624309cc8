"""What every way of routing a query is held to: what it sees, what it answers, what it learns from."""

from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor, Ranked
from anabranch.routers.contract.query import Candidate, Decision, Model, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Played, Strategy

__all__ = [
    "Candidate",
    "Decision",
    "Model",
    "Outcome",
    "Played",
    "Pool",
    "Prediction",
    "Predictor",
    "Query",
    "Ranked",
    "Recorded",
    "Strategy",
]
