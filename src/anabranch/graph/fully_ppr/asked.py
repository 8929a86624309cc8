"""`Asked`: what `FullyPPR` was asked for, as far as its engine on Spark looks at it."""

from typing import Any, Protocol

from anabranch.graph.fully_ppr.rounds import Round


class Asked(Protocol):
    """Arguments of `FullyPPR`, which are told there, and the log of its rounds."""

    alpha: float
    plan: Any
    partitions: int | None
    gamma: int | None
    theta: int
    big_moves: int
    sources: Any
    out: Any
    spark: Any
    progress: Any
    cancel: Any
    rounds_: list[Round]
