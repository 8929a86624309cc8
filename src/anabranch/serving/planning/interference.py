"""How operations slow each other when they share a device.

The share R of a kernel is the part of its stand-alone speed that a matrix product beside it loses; the product itself runs at P = R.
For other kinds a profiled table gives the speed P that a share of R buys; both are concave, which is why overlapping pays: a fifth of
the device gives attention 0.3 of its speed and collectives 0.5. Between known points we interpolate monotonically (PCHIP; Fritsch and
Carlson, SIAM J. Numer. Anal. 17, 1980), since the paper's full tables are not published.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from anabranch.errors import ConfigError
from anabranch.serving.planning.cost import RESOURCES

# The points of the paper's table 3 that we know; compute is P = R by definition.
PAPER_POINTS: dict[str, tuple[tuple[float, float], ...]] = {
    "compute": ((0.0, 0.0), (1.0, 1.0)),
    "memory": ((0.0, 0.0), (0.2, 0.3), (0.9, 0.95), (1.0, 1.0)),
    "network": ((0.0, 0.0), (0.2, 0.5), (0.9, 1.0), (1.0, 1.0)),
}


class Curve:
    """P of R by monotone interpolation through points. Raises ConfigError unless they rise from (0, 0) to (1, 1)."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self.points = tuple((float(share), float(speed)) for share, speed in points)
        shares, speeds = zip(*self.points, strict=True) if self.points else ((), ())
        rises = all(low < high for low, high in itertools.pairwise(shares))
        if len(self.points) < 2 or not rises or list(speeds) != sorted(speeds):
            raise ConfigError(
                f"points of a share table are {list(self.points)}; shares must rise and speeds must not fall"
            )
        if self.points[0] != (0.0, 0.0) or self.points[-1] != (1.0, 1.0):
            raise ConfigError(
                f"a share table goes from {self.points[0]} to {self.points[-1]}; it must go from (0, 0) to (1, 1)"
            )
        self.shares, self.speeds = list(shares), list(speeds)

    @cached_property
    def slopes(self) -> list[float]:
        """At the points: the weighted harmonic mean of the neighbouring secants, so that nothing overshoots."""
        steps = [high - low for low, high in itertools.pairwise(self.shares)]
        secants = [(high - low) / step for low, high, step in zip(self.speeds, self.speeds[1:], steps, strict=False)]
        if len(steps) == 1:
            return [secants[0], secants[0]]
        inner = []
        for left, right, first, second in zip(steps, steps[1:], secants, secants[1:], strict=False):
            if first * second <= 0:
                inner.append(0.0)
            else:
                near, far = 2 * right + left, right + 2 * left
                inner.append((near + far) / (near / first + far / second))
        return [_edge(steps[0], steps[1], secants[0], secants[1]), *inner, _edge(*steps[:-3:-1], *secants[:-3:-1])]

    def __call__(self, share: float) -> float:
        """P at ``share``, which must be 0 to 1."""
        if not 0 <= share <= 1:
            raise ConfigError(f"a share is {share}; it must be 0 to 1")
        place = min(max(bisect.bisect_right(self.shares, share) - 1, 0), len(self.shares) - 2)
        low, high = self.shares[place], self.shares[place + 1]
        step = high - low
        at = (share - low) / step
        near, far = self.speeds[place], self.speeds[place + 1]
        rise, fall = self.slopes[place] * step, self.slopes[place + 1] * step
        found = near + (far - near) * at * at * (3 - 2 * at) + rise * at * (1 - at) ** 2 + fall * at * at * (at - 1)
        # Rounding must not make a flat piece fall.
        return min(max(found, near), far)


def _edge(step: float, next_step: float, secant: float, next_secant: float) -> float:
    """The three-point slope at an end, kept from overshooting."""
    slope = ((2 * step + next_step) * secant - step * next_secant) / (step + next_step)
    if slope * secant <= 0:
        return 0.0
    if secant * next_secant <= 0 and abs(slope) > 3 * abs(secant):
        return 3 * secant
    return slope


@dataclass(frozen=True)
class ShareTable:
    """R -> P of each resource. ``source`` says where the points are from; ``machine`` what was measured, where they were."""

    points: Mapping[str, Sequence[tuple[float, float]]]
    source: str = "paper"
    machine: str | None = None

    def __post_init__(self) -> None:
        missing = [name for name in RESOURCES if name not in self.points]
        if missing:
            raise ConfigError(f"a share table has no points of {missing[0]}; it needs {', '.join(RESOURCES)}")
        for name in RESOURCES:
            self.curves[name]

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """One per resource."""
        return {name: Curve(self.points[name]) for name in RESOURCES}

    def speed(self, resource: str, share: float) -> float:
        """P: the part of its stand-alone speed that an operation reaches."""
        known = self._known
        found = known.get((resource, share))
        if found is None:
            found = known[resource, share] = self.curves[resource](share)
        return found

    @cached_property
    def _known(self) -> dict[tuple[str, float], float]:
        return {}

    @property
    def identity(self) -> dict[str, Any]:
        """What stays the same when it is measured again; all of it where it was not measured."""
        return self.to_dict() if self.machine is None else {"machine": self.machine}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "source": self.source,
            **({} if self.machine is None else {"machine": self.machine}),
            "points": {name: [list(point) for point in self.points[name]] for name in RESOURCES},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ShareTable":
        """Read back what `to_dict` gives. Raises ConfigError if it is malformed."""
        try:
            points = {name: tuple((low, high) for low, high in of) for name, of in values["points"].items()}
            return cls(points, values.get("source", "file"), values.get("machine"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"not a table of shares: {error}") from None


PAPER_TABLE = ShareTable(PAPER_POINTS)


def monotone(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Measured (R, P) made into a table: the upper concave hull from (0, 0) to (1, 1), since dominated ways to run are dropped."""
    known = sorted(
        {(0.0, 0.0), (1.0, 1.0), *((share, min(max(speed, 0.0), 1.0)) for share, speed in points if 0 < share < 1)}
    )
    hull: list[tuple[float, float]] = []
    for point in known:
        while len(hull) >= 2 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_up(first: tuple[float, float], second: tuple[float, float], third: tuple[float, float]) -> bool:
    return (second[0] - first[0]) * (third[1] - first[1]) >= (second[1] - first[1]) * (third[0] - first[0])
