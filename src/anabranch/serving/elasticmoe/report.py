"""`ScaleReport`: what a change of devices took."""

import time
from dataclasses import dataclass, field

__all__ = ["ScaleReport"]


@dataclass
class ScaleReport:
    """What a change of devices took.

    Attributes:
        old, new: devices.
        seconds: from the command to the moment when the new configuration served.
        phases: seconds of each; those of ``prepare`` run beside what serves.
        gap_s: the longest time between the last step of the old and the first moment of the new.
        bytes: by kind: ``p2p``, ``disk``, ``zero_copy``.
        moves: experts that moved; freed: bytes let go of at the end.
        tokens_brought, tokens_again: of running requests, with their keys and values and without.
    """

    old: tuple[int, ...]
    new: tuple[int, ...]
    mode: str
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    gap_s: float = 0.0
    bytes: dict[str, float] = field(default_factory=dict)
    moves: int = 0
    freed: int = 0
    tokens_brought: int = 0
    tokens_again: int = 0
    started: float = field(default_factory=time.perf_counter)
