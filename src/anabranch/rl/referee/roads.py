"""Roads that SUMO's generator makes, read back as lanes of ours; and lights for them, at which roads that cross take turns.

SUMO writes a network as XML: lanes of roads, lanes within junctions, and which connection follows which lane by way of which. A road has
one lane each way, so a lane of ours is a road of theirs, or a way through a junction.
"""
# Shapes: P points of a line

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.files import atomic_write_text
from anabranch.rl.laneworld.geometry import straight
from anabranch.rl.laneworld.lane_graph import (
    CYCLE_S,
    GREEN_S,
    IN_JUNCTION,
    LANE_WIDTH,
    LIGHT,
    YELLOW_S,
    LaneGraph,
    Segment,
)

__all__ = ["SumoRoads", "generate", "program"]

# Metres between junctions, metres a second on roads (40 km/h); wide junctions, in which a car can turn.
_SPACING, _SPEED, _RADIUS = 105, 11.11, 10
_PATIENCE_S = 120


@dataclass(frozen=True)
class _Link:
    """A way through a junction that a light is for."""

    light: str
    place: int
    is_along_x: bool
    is_left: bool


def program(name: str) -> str:
    """The path of a program of SUMO's."""
    import sumo

    return str(FilePath(sumo.SUMO_HOME) / "bin" / name)


def generate(folder: FilePath, *, seed: int, side: int) -> FilePath:
    """Let SUMO make a grid of roads, whose junctions are moved a little and have lights; the file of it, in ``folder``.

    Raises DataError if SUMO cannot be run, with what it says.
    """
    made = folder / "roads.net.xml"
    given = {
        "grid.number": side,
        "grid.length": _SPACING,
        "perturb-x": "norm(0,4)",
        "perturb-y": "norm(0,4)",
        "default.lanenumber": 1,
        "default.lanewidth": LANE_WIDTH,
        "default.speed": _SPEED,
        "default.junctions.radius": _RADIUS,
        "default-junction-type": "traffic_light",
        "no-turnarounds": "true",
        "seed": seed,
        "output-file": made,
    }
    line = [
        program("netgenerate"),
        "--grid",
        *(word for name, value in given.items() for word in (f"--{name}", str(value))),
    ]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"SUMO's netgenerate cannot be run: {error}") from None
    if done.returncode or not made.exists():
        said = " ".join(done.stderr.split()) or f"code {done.returncode}"
        raise DataError(f"SUMO's netgenerate made no roads: {said}")
    return made


class SumoRoads(LaneGraph):
    """A network of SUMO's as lanes of ours.

    Args:
        path: of the XML file.

    Attributes:
        edges: SUMO's name of the road that a segment is; none within junctions.

    Raises DataError for a file that is no such network.
    """

    def __init__(self, path: FilePath) -> None:
        super().__init__()
        try:
            root = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, OSError) as error:
            raise DataError(f"{path} is no network of SUMO's: {error}") from None
        self.edges: list[str | None] = []
        self._links: list[_Link] = []
        self._lanes: dict[str, Any] = {}
        self._roads: dict[str, int] = {}
        for edge in root.findall("edge"):
            for lane in edge.findall("lane"):
                self._lanes[lane.attrib["id"]] = lane
            if edge.get("function") != "internal":
                self._add_road(edge)
        if not self._roads:
            raise DataError(f"{path} has no roads")
        # By the lane within a junction that comes before: the lane within it that follows.
        onward = {
            f"{found.attrib['from']}_{found.attrib['fromLane']}": found.attrib["via"]
            for found in root.findall("connection")
            if found.attrib["from"].startswith(":") and "via" in found.attrib
        }
        for found in root.findall("connection"):
            if not found.attrib["from"].startswith(":"):
                self._add_way(found.attrib, onward)

    def _add_road(self, edge: Any) -> None:
        lane = edge.find("lane")
        speed = float(lane.attrib["speed"])
        number = self.add(Segment(_points([lane]), speed, speed))
        self.edges.append(edge.attrib["id"])
        self.roads.append(number)
        self._roads[edge.attrib["id"]] = number

    def _add_way(self, found: dict[str, str], onward: dict[str, str]) -> None:
        """A connection: the lanes within the junction, one behind the other."""
        via, lanes = found.get("via"), []
        while via is not None:
            lanes.append(self._lanes[via])
            via = onward.get(via)
        come, go = self._roads[found["from"]], self._roads[found["to"]]
        arriving, leaving = self.segments[come], self.segments[go]
        points = (
            np.concatenate([arriving.point_P2[-1:], _points(lanes), leaving.point_P2[:1]])
            if lanes
            else _joint(arriving, leaving)
        )
        speed = min([arriving.limit, *(float(lane.attrib["speed"]) for lane in lanes)])
        number = self.add(Segment(points, speed, speed, edges=IN_JUNCTION, is_junction=True))
        self.edges.append(None)
        arriving.next.append(number)
        self.segments[number].next.append(go)
        if "tl" in found:
            heading = arriving.point_P2[-1] - arriving.point_P2[-2]
            is_along_x = bool(abs(heading[0]) > abs(heading[1]))
            self._links.append(_Link(found["tl"], int(found["linkIndex"]), is_along_x, found["dir"] in "lL"))
            arriving.stop, arriving.offset_s = LIGHT, 0.0 if is_along_x else CYCLE_S / 2

    def lights(self) -> str:
        """Programs of all lights, as a file of SUMO's: LaneWorld's cycle, those along x first. Who turns left waits for who comes."""
        found: dict[str, list[_Link]] = {}
        for link in self._links:
            found.setdefault(link.light, []).append(link)
        lines = ["<additional>"]
        for name, links in sorted(found.items()):
            lines.append(f'<tlLogic id="{name}" type="static" programID="anabranch" offset="0">')
            for along_x in (True, False):
                for seconds, is_green in ((GREEN_S, True), (YELLOW_S, False)):
                    state = ["r"] * (max(link.place for link in links) + 1)
                    for link in links:
                        if link.is_along_x == along_x:
                            state[link.place] = ("g" if link.is_left else "G") if is_green else "y"
                    lines.append(f'<phase duration="{seconds:g}" state="{"".join(state)}"/>')
            lines.append("</tlLogic>")
        return "\n".join([*lines, "</additional>"])

    def write_lights(self, path: FilePath) -> None:
        """Write `lights` to a file."""
        atomic_write_text(path, self.lights())


def _points(lanes: list[Any]) -> np.ndarray:
    """The line of lanes that follow each other, at small distances."""
    pairs = [pair.split(",") for lane in lanes for pair in lane.attrib["shape"].split()]
    corners = [(float(pair[0]), float(pair[1])) for pair in pairs]
    parts = [straight(begin, end)[1:] for begin, end in pairwise(corners) if begin != end]
    return np.concatenate([np.array(corners[:1]), *parts])


def _joint(arriving: Segment, leaving: Segment) -> np.ndarray:
    """Where nothing lies between two roads."""
    begin, end = arriving.point_P2[-1], leaving.point_P2[0]
    return np.stack([begin, end]) if np.hypot(*(end - begin)) > 1e-6 else np.stack([begin, begin + 1e-6])
