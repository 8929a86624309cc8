"""`Simulation`: one process of SUMO, in which a car goes where it is put, and which tells what it thinks of that."""

from __future__ import annotations

import contextlib
import io
import math
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.files import atomic_write_text
from anabranch.rl.laneworld.state import CAR, START_M
from anabranch.rl.referee.roads import program

__all__ = ["Other", "Simulation", "Verdict"]

_EGO = "ego"
# Metres around the car within which others are told of.
_NEAR_M = 80.0
# Seconds for which a car waits for room where it is to come in, and for which trips are made.
_WAITS_S, _TRIPS_S = 120.0, 1500.0
# Of its beginning and end: how often and how many seconds apart one tries to reach it, and seconds until it is ended.
_RETRIES, _RETRY_S, _ENDS_S = 600, 0.1, 5.0


@dataclass(frozen=True)
class Verdict:
    """What SUMO says of a step.

    Attributes:
        collided: the car and another ran into each other.
        ran_red: it went over a line whose light was red.
        off_road: it is on no lane of any road.
        arrived: SUMO has taken it off the road, at the end of its route.
    """

    collided: bool = False
    ran_red: bool = False
    off_road: bool = False
    arrived: bool = False


@dataclass(frozen=True)
class Other:
    """A car of SUMO's: middle, heading (radians, from x towards y), metres a second, metres."""

    x: float
    y: float
    heading: float
    speed: float
    length: float
    width: float


class Simulation:
    """See the module.

    Args:
        folder: where it keeps its files.
        roads: of the network, a file.
        lights: their programs, a file.
        edges: names of all roads.
        dt: seconds of a step.
        name: of its files.

    Raises DataError if SUMO cannot be run or ends.
    """

    def __init__(self, folder: Path, *, roads: Path, lights: Path, edges: Sequence[str], dt: float, name: str) -> None:
        self._trips, self._log = folder / f"{name}.rou.xml", folder / f"{name}.log"
        self._roads, self._lights, self._edges, self._dt = roads, lights, list(edges), dt
        self._is_here = False
        self._told: Any = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def time_s(self) -> float:
        """Of the simulation."""
        return float(self._told.simulation.getTime())

    def begin(
        self, route: Sequence[str], *, seed: int, trips_per_second: float, warm_up_s: float, speed: float
    ) -> None:
        """Begin anew with other cars, and with the car at the beginning of a route, as soon as there is room.

        Raises DataError if there is none.
        """
        self._write_trips(seed, trips_per_second)
        with self._in_words():
            self._load(seed)
            told = self._told
            while told.simulation.getTime() < warm_up_s:
                told.simulationStep()
            told.route.add("route", list(route))
            told.vehicle.add(
                _EGO, "route", typeID="car", departPos=f"{START_M + CAR[0] / 2:.3f}", departSpeed=f"{speed:.3f}"
            )
            waited = 0.0
            while _EGO not in told.vehicle.getIDList():
                if waited > _WAITS_S:
                    raise DataError(
                        f"SUMO found no room for a car in {_WAITS_S:g} s; let there be fewer others (trips_per_second {trips_per_second:g})"
                    )
                told.simulationStep()
                waited += self._dt
            # It goes where it is put, however unwise that is.
            told.vehicle.setSpeedMode(_EGO, 0)
            told.vehicle.setLaneChangeMode(_EGO, 0)
            told.vehicle.subscribeContext(_EGO, *_near())
        self._is_here = True

    def step(self, x: float, y: float, heading: float, speed: float) -> Verdict:
        """Put the middle of the car there, and let time pass."""
        if not self._is_here:
            return Verdict(arrived=True)
        told = self._told
        with self._in_words():
            on, link = told.vehicle.getRoadID(_EGO), told.vehicle.getNextTLS(_EGO)[:1]
            half = CAR[0] / 2
            front = x + half * math.cos(heading), y + half * math.sin(heading)
            # SUMO counts degrees from north, clockwise; 2: where it is put, whatever road is there.
            told.vehicle.moveToXY(_EGO, "", -1, *front, (90 - math.degrees(heading)) % 360, 2)
            told.vehicle.setSpeed(_EGO, speed)
            told.simulationStep()
            hit = any(_EGO in (found.collider, found.victim) for found in told.simulation.getCollisions())
            self._is_here = _EGO in told.vehicle.getIDList()
            if not self._is_here:
                return Verdict(collided=hit, arrived=not hit)
            now = told.vehicle.getRoadID(_EGO)
            entered = now.startswith(":") and not on.startswith(":")
            is_red = bool(link) and link[0][3] in "rR"
            return Verdict(hit, entered and is_red, told.vehicle.getLaneID(_EGO) == "")

    def others(self) -> list[Other]:
        """Those near the car."""
        if not self._is_here:
            return []
        import traci.constants as kinds

        found = []
        for name, values in sorted(self._told.vehicle.getContextSubscriptionResults(_EGO).items()):
            if name == _EGO:
                continue
            heading, length = math.radians(90 - values[kinds.VAR_ANGLE]), values[kinds.VAR_LENGTH]
            x, y = values[kinds.VAR_POSITION]
            middle = x - length / 2 * math.cos(heading), y - length / 2 * math.sin(heading)
            found.append(Other(*middle, heading, values[kinds.VAR_SPEED], length, values[kinds.VAR_WIDTH]))
        return found

    def close(self) -> None:
        """End it."""
        if self._told is not None:
            # It may have ended by itself.
            with contextlib.suppress(Exception):
                self._told.close(wait=False)
            self._told = None
        if self._process is not None:
            try:
                self._process.wait(_ENDS_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _load(self, seed: int) -> None:
        import traci

        options = [
            *(
                "--net-file",
                str(self._roads),
                "--route-files",
                str(self._trips),
                "--additional-files",
                str(self._lights),
            ),
            *("--step-length", str(self._dt), "--seed", str(seed % 2**31), "--time-to-teleport", "-1"),
            *("--collision.action", "warn", "--collision.check-junctions", "true", "--collision.mingap-factor", "0"),
            *("--no-step-log", "true", "--no-warnings", "true", "--ignore-route-errors", "true"),
        ]
        if self._told is not None:
            self._told.load(options)
            return
        port = _free_port()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program("sumo"), *options, "--remote-port", str(port)], stdout=subprocess.DEVNULL, stderr=log
            )
        # It says on standard output, where answers go, that it waits.
        with contextlib.redirect_stdout(io.StringIO()):
            self._told = traci.connect(port, numRetries=_RETRIES, proc=self._process, waitBetweenRetries=_RETRY_S)

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        """What the connection raises as DataError, with what SUMO wrote before it ended."""
        import traci

        try:
            yield
        except (traci.exceptions.TraCIException, traci.exceptions.FatalTraCIError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self._process is not None:
                    self._process.wait(_ENDS_S if isinstance(error, traci.exceptions.FatalTraCIError) else 0)
            has_ended = self._process is not None and self._process.poll() is not None
            wrote = self._log.read_text(errors="replace") if has_ended and self._log.exists() else ""
            said = " ".join((wrote or str(error)).split()) or type(error).__name__
            raise DataError(f"SUMO {'has ended' if has_ended else 'says'}: {said}") from None

    def _write_trips(self, seed: int, per_second: float) -> None:
        rng = np.random.default_rng(seed)
        lines = ["<routes>", f'<vType id="car" length="{CAR[0]}" width="{CAR[1]}"/>']
        for number, depart in enumerate(np.sort(rng.uniform(0, _TRIPS_S, round(_TRIPS_S * per_second)))):
            begin, end = rng.choice(self._edges, 2, replace=False)
            lines.append(f'<trip id="car{number}" type="car" depart="{depart:.1f}" from="{begin}" to="{end}"/>')
        atomic_write_text(self._trips, "\n".join([*lines, "</routes>"]))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _near() -> tuple[int, float, list[int]]:
    """What is asked about the others in every step."""
    import traci.constants as kinds

    asked = [kinds.VAR_POSITION, kinds.VAR_ANGLE, kinds.VAR_SPEED, kinds.VAR_LENGTH, kinds.VAR_WIDTH]
    return kinds.CMD_GET_VEHICLE_VARIABLE, _NEAR_M, asked
