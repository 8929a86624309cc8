"""What every way of routing a query is held to: what it sees, what it answers, what it learns from."""

from anabranch.routers.contract.ask import Answered, Arm, Ask, Said
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor, Ranked
from anabranch.routers.contract.program import Done, Program, ProgramRequest, Shown, Step
from anabranch.routers.contract.query import Candidate, Decision, Model, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Played, Strategy

__all__ = [
    "Answered",
    "Arm",
    "Ask",
    "Candidate",
    "Decision",
    "Done",
    "Model",
    "Outcome",
    "Played",
    "Pool",
    "Prediction",
    "Predictor",
    "Program",
    "ProgramRequest",
    "Query",
    "Ranked",
    "Recorded",
    "Said",
    "Shown",
    "Step",
    "Strategy",
]
