"""When a query is of a task that the pool has: a threshold on the best cosine, from the pool alone.

Each member is left out in turn. Other wordings of its instruction against the whole pool are queries of a task that is there; its
instructions against the pool without it are queries of one that is not.
"""
# Shapes: M members, V wordings of one, W of them and its instruction, P thresholds

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.errors import ConfigError

__all__ = ["Calibration", "calibrate", "thinned"]


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        threshold: the best cosine from which a query counts as one of a member's task: where the two shares of the curve are furthest
            apart, halfway to the next cosine below that was seen.
        auroc: chance that a query of a member's task has a greater best cosine than one of a task that was left out.
        curve: (threshold, share of members' queries at or above it, share of the left out at or above it), thresholds falling.
        top_1: share of members' queries whose best is their own member.
        worded: members with wordings of their own for it; for the others every second word of the instruction is left out.
        members: M.
    """

    threshold: float
    auroc: float
    curve: tuple[tuple[float, float, float], ...]
    top_1: float
    worded: int
    members: int

    def to_dict(self) -> dict[str, object]:
        """For reports."""
        return {**self.__dict__, "curve": [list(point) for point in self.curve]}


def thinned(text: str) -> tuple[str, ...]:
    """The text without every second word, both ways: what stands for other wordings where there are none."""
    words = text.split()
    return tuple(dict.fromkeys(" ".join(words[start::2]) for start in (0, 1) if words[start::2]))


def calibrate(
    asked: Mapping[int, np.ndarray], worded: Mapping[int, np.ndarray], *, own: Sequence[int] = ()
) -> Calibration:
    """Leave each of the M members out in turn.

    Args:
        asked: cosines ``[M]`` of each member's instruction with those of all.
        worded: cosines ``[V, M]`` of other wordings with all instructions, by member.
        own: members whose wordings are their own.

    Raises ConfigError for fewer than two members, or no wordings.
    """
    if len(asked) < 2 or not worded:
        raise ConfigError(
            f"a threshold is found by leaving members out, and {len(asked)} of the pool have an instruction; at least 2 must, or "
            "give the pool a threshold or a weight"
        )
    known, right, unknown = [], [], []
    for member, cosine_VM in worded.items():
        known += cosine_VM.max(1).tolist()
        right += (cosine_VM.argmax(1) == member).tolist()
        all_WM = np.concatenate([asked[member][None], cosine_VM])
        unknown += np.delete(all_WM, member, axis=1).max(1).tolist()
    known_K, unknown_U = np.sort(known), np.sort(unknown)
    values_P = np.unique(np.concatenate([known_K, unknown_U]))[::-1]
    hit_P = 1 - np.searchsorted(known_K, values_P) / len(known_K)
    false_P = 1 - np.searchsorted(unknown_U, values_P) / len(unknown_U)
    best = int((hit_P - false_P).argmax())
    below = values_P[best + 1] if best + 1 < len(values_P) else values_P[best]
    less_K, same_K = (np.searchsorted(unknown_U, known_K, side=side) for side in ("left", "right"))
    auroc = float((less_K + same_K).mean() / (2 * len(unknown_U)))
    curve = tuple(zip(values_P.tolist(), hit_P.tolist(), false_P.tolist(), strict=True))
    threshold = float(values_P[best] + below) / 2
    return Calibration(threshold, auroc, curve, float(np.mean(right)), len(set(own) & set(worded)), len(asked))
