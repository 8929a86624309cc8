"""Which tokens of a trajectory are the router's own: those it is trained on, and the last of which bears the reward.

Turns are tokenised one by one and never again as a whole: ids are those that were sampled.
"""
# Shapes: T tokens of a response

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from anabranch.errors import InputError


@dataclass(slots=True)
class Tokens:
    """A response, turn by turn.

    Attributes:
        parts: ids, and whether the router wrote them (else the environment).
    """

    parts: list[tuple[tuple[int, ...], bool]] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, is_router: bool) -> None:
        """A turn, or what the environment wrote after it."""
        if ids:
            self.parts.append((tuple(int(one) for one in ids), is_router))

    @property
    def ids_T(self) -> np.ndarray:
        """int64, all of it."""
        return np.array([one for ids, _ in self.parts for one in ids], np.int64)

    @property
    def info_mask_T(self) -> np.ndarray:
        """m_t: True on the router's tokens, False within information."""
        return np.array([is_router for ids, is_router in self.parts for _ in ids], bool)


def reward_T(mask_T: np.ndarray, reward: float) -> np.ndarray:
    """A trajectory's reward on its last token that is the router's, 0 elsewhere. Raises InputError where none is."""
    own = np.flatnonzero(mask_T)
    if not len(own):
        raise InputError("no token of the trajectory is the router's; there is nothing to reward")
    found_T = np.zeros(len(mask_T))
    found_T[own[-1]] = reward
    return found_T


def masked_mean(values: np.ndarray, mask: np.ndarray) -> float:
    """Mean over what the mask holds, whatever stands elsewhere, NaN too. Raises InputError where it holds nothing."""
    if values.shape != mask.shape:
        raise InputError(f"values have shape {list(values.shape)} and the mask {list(mask.shape)}")
    if not mask.any():
        raise InputError("the mask holds nothing")
    return float(values[mask].mean())


def whitened(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 over what the mask holds; 0 elsewhere."""
    mean = masked_mean(values, mask)
    inside = np.where(mask, values, mean)
    deviation = np.sqrt(masked_mean((inside - mean) ** 2, mask))
    return np.where(mask, (inside - mean) / (deviation + 1e-8), 0.0)
