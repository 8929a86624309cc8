"""Query -> model, without HTTP: strategies that choose a model for a query, learned from recorded outcomes and judged on them.

    from anabranch.routers import load_outcomes, strategies

    data = load_outcomes("outcomes.csv")
    router = strategies.make("knn", k=40).fit(data)

Nothing here imports torch unless a strategy or an embedder that needs it is used; what is named is loaded when it is first used.
"""

from typing import TYPE_CHECKING

from anabranch.extras import lazy

if TYPE_CHECKING:
    from anabranch.routers import strategies
    from anabranch.routers.contract import (
        Answered,
        Arm,
        Ask,
        Candidate,
        Decision,
        Done,
        Model,
        Outcome,
        Pool,
        Prediction,
        Predictor,
        Program,
        ProgramRequest,
        Query,
        Ranked,
        Recorded,
        Said,
        Shown,
        Step,
        Strategy,
    )
    from anabranch.routers.data import load_outcomes
    from anabranch.routers.fitted import FittedRouter

__all__ = [
    "Answered",
    "Arm",
    "Ask",
    "Candidate",
    "Decision",
    "Done",
    "FittedRouter",
    "Model",
    "Outcome",
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
    "load_outcomes",
    "strategies",
]

_CONTRACT = "anabranch.routers.contract"

__getattr__, __dir__ = lazy(
    __name__,
    {
        **dict.fromkeys(sorted(set(__all__) - {"FittedRouter", "load_outcomes", "strategies"}), _CONTRACT),
        "FittedRouter": ".fitted",
        "load_outcomes": ".data",
        "strategies": None,
    },
)
