"""Small LaneWorlds to test with, who drives in them well, and cars that stand where a test wants them."""

import numpy as np

from anabranch.rl import LaneWorld
from anabranch.rl.laneworld import Settings
from anabranch.rl.laneworld.lane_graph import LIGHT, STOP_SIGN, light_state
from anabranch.rl.laneworld.state import CAR
from anabranch.rl.rewards import RouteReward

SMALL = {"maps": 1, "routes": 6, "traffic": 6, "walkers": 2, "longest_m": 400.0}
PLAIN = RouteReward(outside=False, speed=False, ttc=False, comfort=False, centre=False)


def world(num=4, seed=0, first=0, **settings):
    made = LaneWorld.Config(world=Settings(**(SMALL | settings))).build().make(num, seed=seed, first=first)
    made.reset()
    return made


def alone(num=4, **settings):
    return world(num, traffic=0, walkers=0, **settings)


def drives(world, pace=6.0):
    """Along the route by pure pursuit, halting where it must: who knows the world well needs no more."""
    state, library, route = world.state, world.library, world.scene.route_W
    x, y, heading, speed = state.pose_W4.T
    ahead = library.at(route, state.s_W + np.maximum(4.0, 0.7 * speed))
    dx, dy = ahead[:, 0] - x, ahead[:, 1] - y
    across = dy * np.cos(heading) - dx * np.sin(heading)
    wheel = np.arctan(2.8 * 2 * across / (dx**2 + dy**2))
    which, line = library.next_stop(route, state.front_m_W)
    kind = library.stop_kind_QJ[route, which]
    light, _ = light_state(world.clock_W, library.stop_offset_QJ[route, which])
    holds = ((kind == LIGHT) & (light > 0)) | ((kind == STOP_SIGN) & (state.halted_W != which + 1))
    # As fast as still lets it stop at 2 m/s^2.
    wanted = np.where(holds, np.minimum(pace, np.sqrt(4 * np.maximum(line - 1.0, 0))), pace)
    pedal = np.clip(wanted - speed, -1, 1)
    return np.stack([np.clip(wheel / np.radians(35), -1, 1), pedal], axis=1)


def until_all_end(made, act):
    """Return and outcome of the first episode of each world."""
    total, found = np.zeros(made.num_envs), [None] * made.num_envs
    for _ in range(4000):
        _, reward, over, cut, infos = made.step(act(made))
        going = [one is None for one in found]
        total[going] += reward[going]
        for row in np.flatnonzero((over | cut) & going):
            found[row] = {name: values[row] for name, values in infos["outcome"].items()} | {"cut": cut[row]}
        if all(found):
            return total, found
    raise AssertionError("an episode does not end")


def put(made, row, along, across):
    """A car of traffic at a place beside the ego car, in the same direction: on the ego's own route, moved."""
    state = made.state
    state.alive_WK[row] = False
    state.path_WK[row, 0], state.path_s_WK[row, 0] = made.scene.route_W[row], state.s_W[row] + along
    state.speed_WK[row, 0] = 0.0
    state.alive_WK[row, 0] = True
    heading = made.library.at(made.scene.route_W[row : row + 1], state.s_W[row : row + 1])[0, 2]
    state.pose_W4[row, 0] += across * np.sin(heading)
    state.pose_W4[row, 1] -= across * np.cos(heading)


def before_line(made, kind, metres):
    """Put every car so many metres before the first line of a kind on its route; worlds without one are left out."""
    library, state = made.library, made.state
    rows = []
    for row, route in enumerate(made.scene.route_W):
        lines = np.flatnonzero(library.stop_kind_QJ[route] == kind)
        if not len(lines):
            continue
        rows.append(row)
        front = library.stop_s_QJ[route, lines[0]] - metres
        s = front - CAR[0] / 2
        x, y, heading = library.at(np.array([route]), np.array([s]))[0, :3]
        state.pose_W4[row] = x, y, heading, 5.0
        state.s_W[row] = state.done_m_W[row] = s
        state.front_m_W[row], state.halted_W[row] = front, 0
        state.heading_WH[row] = heading
    assert rows
    return rows
