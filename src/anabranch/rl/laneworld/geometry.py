"""Boxes and lines in the plane: exact overlap of turned boxes, curves between two headings, points at equal distances."""
# Shapes: P points of a line. Angles are in radians, counterclockwise from the x axis; lengths in metres.

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["Pose", "arc", "boxes_overlap", "connect", "resampled", "straight"]

# x, y and heading.
Pose = tuple[float, float, float]
# Between points of curves before they are put at equal distances.
_FINE_M = 0.25


def boxes_overlap(first: Any, second: Any) -> np.ndarray:
    """Whether turned boxes have a point in common, touching counts: the separating axis theorem, exact.

    Args:
        first, second: (x, y, heading, length, width) each, arrays that broadcast together. Two boxes are apart if and only if they are
            apart along one of their four axes.
    """
    x1, y1, heading1, length1, width1 = first
    x2, y2, heading2, length2, width2 = second
    dx, dy = x2 - x1, y2 - y1
    cos1, sin1, cos2, sin2 = np.cos(heading1), np.sin(heading1), np.cos(heading2), np.sin(heading2)
    # Of the angle between both.
    cos, sin = np.abs(cos1 * cos2 + sin1 * sin2), np.abs(cos1 * sin2 - sin1 * cos2)
    a1, b1, a2, b2 = length1 / 2, width1 / 2, length2 / 2, width2 / 2
    return (
        (np.abs(dx * cos1 + dy * sin1) <= a1 + a2 * cos + b2 * sin)
        & (np.abs(dy * cos1 - dx * sin1) <= b1 + a2 * sin + b2 * cos)
        & (np.abs(dx * cos2 + dy * sin2) <= a2 + a1 * cos + b1 * sin)
        & (np.abs(dy * cos2 - dx * sin2) <= b2 + a1 * sin + b1 * cos)
    )


def straight(begin: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """Points from one place to another, ``[P, 2]``."""
    length = math.dist(begin, end)
    share_P1 = np.linspace(0.0, 1.0, max(math.ceil(length / _FINE_M), 1) + 1)[:, None]
    return (1 - share_P1) * np.array(begin) + share_P1 * np.array(end)


def arc(centre: tuple[float, float], radius: float, begin: float, end: float) -> np.ndarray:
    """Points of a circle from one angle to another, ``[P, 2]``; clockwise where ``end`` is the smaller one."""
    number = max(math.ceil(abs(end - begin) * radius / _FINE_M), 2) + 1
    angle_P = np.linspace(begin, end, number)
    return np.stack([centre[0] + radius * np.cos(angle_P), centre[1] + radius * np.sin(angle_P)], axis=1)


def connect(begin: Pose, end: Pose) -> np.ndarray:
    """A smooth line from one pose to another, ``[P, 2]``: straight, an arc that touches both headings, straight.

    Where no arc does, because the headings are alike or the lines meet behind one of them, it is a cubic (Hermite) curve.
    """
    (x1, y1, heading1), (x2, y2, heading2) = begin, end
    turn = math.remainder(heading2 - heading1, 2 * math.pi)
    cross = math.sin(turn)
    if abs(cross) > 0.05 and abs(turn) < 0.9 * math.pi:
        dx, dy = x2 - x1, y2 - y1
        # How far both lines are from where they meet: one before it, the other behind.
        ahead = (dx * math.sin(heading2) - dy * math.cos(heading2)) / cross
        behind = (dx * math.sin(heading1) - dy * math.cos(heading1)) / -cross
        reach = min(ahead, behind)
        if reach > 0.5:
            return _filleted(begin, end, ahead, behind, reach, turn)
    return _cubic(begin, end)


def _filleted(begin: Pose, end: Pose, ahead: float, before: float, reach: float, turn: float) -> np.ndarray:
    """Straight for ``ahead - reach``, an arc, straight for ``before - reach``."""
    (x1, y1, heading1), (x2, y2, heading2) = begin, end
    side = math.copysign(1.0, turn)
    radius = reach / math.tan(abs(turn) / 2)
    x, y = x1 + (ahead - reach) * math.cos(heading1), y1 + (ahead - reach) * math.sin(heading1)
    centre = (x - side * radius * math.sin(heading1), y + side * radius * math.cos(heading1))
    round_it = arc(centre, radius, heading1 - side * math.pi / 2, heading1 - side * math.pi / 2 + turn)
    rest = before - reach
    last = (x2 - rest * math.cos(heading2), y2 - rest * math.sin(heading2))
    points = np.concatenate([straight((x1, y1), (x, y)), round_it[1:], straight(last, (x2, y2))[1:]])
    # A straight piece may have no length: its ends are one point.
    return points[np.concatenate([[True], np.hypot(*np.diff(points, axis=0).T) > 1e-6])]


def _cubic(begin: Pose, end: Pose) -> np.ndarray:
    (x1, y1, heading1), (x2, y2, heading2) = begin, end
    length = math.dist((x1, y1), (x2, y2))
    t_P1 = np.linspace(0.0, 1.0, max(math.ceil(length / _FINE_M), 2) + 1)[:, None]
    first, last = np.array([x1, y1]), np.array([x2, y2])
    leave = length * np.array([math.cos(heading1), math.sin(heading1)])
    arrive = length * np.array([math.cos(heading2), math.sin(heading2)])
    square, cube = t_P1**2, t_P1**3
    return (
        (2 * cube - 3 * square + 1) * first
        + (cube - 2 * square + t_P1) * leave
        + (3 * square - 2 * cube) * last
        + (cube - square) * arrive
    )


def resampled(point_P2: np.ndarray, spacing: float = 1.0) -> tuple[np.ndarray, float]:
    """(points at 0, ``spacing``, 2 ``spacing``, ... along a line, the line's length); what is left at the end is left out."""
    step_P = np.hypot(*np.diff(point_P2, axis=0).T)
    keep_P = np.concatenate([[True], step_P > 1e-9])
    point_P2 = point_P2[keep_P]
    along_P = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(point_P2, axis=0).T))])
    place = np.arange(0.0, along_P[-1] + 1e-9, spacing)
    return np.stack([np.interp(place, along_P, point_P2[:, axis]) for axis in (0, 1)], axis=1), float(along_P[-1])
