"""`IdleWatch`: says so when experts of a model that trains are left idle, which is how routing collapses."""
# Shapes: E destinations

import logging
from collections.abc import Mapping

import numpy as np

from anabranch.routing.measure import idle_fraction

log = logging.getLogger(__name__)

__all__ = ["ENOUGH", "IDLE_SHARE", "LASTING", "LASTING_SHARE", "SEEN", "IdleWatch"]

# A quarter of the experts: what balance leaves idle for a moment is less, what collapsed in the ReXMoE paper (arXiv 2510.17483) is more.
IDLE_SHARE = 0.25
# Steps, or this share of the training if that is more, and logged steps among them. Routers that were drawn at random need some tens of
# steps to spread their load, and a bias that moves by small signs needs some hundreds.
LASTING = 100
LASTING_SHARE = 0.2
SEEN = 3
# Items that an expert gets on average in a step; with fewer, chance alone leaves some idle.
ENOUGH = 20


class IdleWatch:
    """Warns once of each layer, or group of layers with one pool, in which `IDLE_SHARE` of the experts stay idle.

    Idle is an expert with less than a tenth of the mean load in a logged step. It must be so in all logged steps, at least `SEEN`, of a
    stretch of `LASTING` steps, or of `LASTING_SHARE` of the training if that is longer; steps with fewer than `ENOUGH` items for each
    expert say nothing.

    Args:
        steps: of the whole training.
    """

    def __init__(self, steps: int) -> None:
        self._lasting = max(LASTING, LASTING_SHARE * steps)
        self._idle_since: dict[str, list[int]] = {}
        self._is_told: set[str] = set()

    def see(self, step: int, loads: Mapping[str, np.ndarray]) -> None:
        """Look at the loads of a step, ``[E]`` by the name of the layers that hold the experts; see `Counted.loads_while_open`."""
        for name, load_E in loads.items():
            if name in self._is_told or load_E.size < 2 or load_E.mean() < ENOUGH:
                continue
            share = float(idle_fraction(load_E))
            steps = self._idle_since.setdefault(name, [])
            if share < IDLE_SHARE:
                steps.clear()
                continue
            steps.append(step)
            if len(steps) >= SEEN and step - steps[0] >= self._lasting:
                self._is_told.add(name)
                self._tell(name, steps, round(share * load_E.size), load_E.size)

    def _tell(self, name: str, steps: list[int], count: int, size: int) -> None:
        log.warning(
            "%d of %d experts of %s are idle (under a tenth of the mean load, from step %d to %d); the routing may have collapsed: balance "
            "it more, or share experts among fewer layers",
            count,
            size,
            name,
            steps[0],
            steps[-1],
        )
