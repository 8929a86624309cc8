"""The flow-level simulator: bytes are a fluid, every piece has its max-min fair rate, and rates are shared anew whenever a piece ends.

Transport protocols that share links fairly come near these rates when pieces are long; latency, queues and losses are for
`anabranch.cluster.fabric.packets`. A spread piece puts the same share of its rate on each of its paths.
"""
# Shapes: F flows, Q pieces, L links, A active pieces, R ranks, S steps

from dataclasses import dataclass

import numpy as np

from anabranch.bounds import finite
from anabranch.cluster.fabric.kernels import Chain, drain, fill, fitting, in_lists, pieces_of, scratch
from anabranch.cluster.fabric.planner import Plan, Routes, routes
from anabranch.errors import InputError

MOST_RANK_STEPS = 2**28


@dataclass(frozen=True, eq=False)
class FluidResult:
    """What `simulate` found.

    Attributes:
        finish_Q: float64, seconds at which each piece ends.
        finish_F: of each flow, the last of its pieces.
        completion_s: the last of all, when the collective is over.
        shares: how often rates were shared.
    """

    finish_Q: np.ndarray
    finish_F: np.ndarray
    completion_s: float
    shares: int


def max_min_rates(found: Routes, capacity_L: np.ndarray, active_A: np.ndarray | None = None) -> np.ndarray:
    """float64 [Q], the max-min fair rate of each piece, 0 of those that are not active; in the unit of ``capacity_L``.

    No rate can be raised without lowering one that is not larger. Raises InputError for an active piece without links.
    """
    num_pieces = len(found.start) - 1
    active = np.arange(num_pieces) if active_A is None else np.asarray(active_A, np.int64)
    if len(active) and (np.diff(found.start)[active] < 1).any():
        raise InputError("a piece has no links: nothing bounds its rate")
    loop, rate_Q = fitting(fill, len(found.link_E)), np.zeros(num_pieces)
    room = scratch(len(capacity_L), len(found.link_E))
    given = (*_arrays(found), np.ascontiguousarray(capacity_L, np.float64), active, len(active), rate_Q, room)
    if loop is fill:
        given = in_lists(given)
    loop(*given)
    return np.asarray(given[-2])


def simulate(made: Plan, *, resolution: float = 0.0) -> FluidResult:
    """Run a plan. A rank starts a step when all that it sends and receives in earlier ones is over.

    Args:
        made: of any number of steps.
        resolution: as a share of the busiest link's time: ends so near to each other are taken together, which spares time where
            thousands of unequal pieces end one by one. Completion is late by no more than that for each time it is done; 0 is exact.

    Raises InputError if a piece can never end.
    """
    resolution = finite("resolution", resolution, 0.0, 1.0)
    found = routes(made)
    capacity_L = np.where(made.topology.is_up_L, made.topology.capacity_L, 0).astype(np.float64)
    window = 0.0
    if resolution:
        work_L = np.bincount(
            found.link_E, np.repeat(8.0 * made.size_Q, np.diff(found.start)) * found.weight_E, len(capacity_L)
        )
        window = resolution * float((work_L / made.topology.capacity_L).max(initial=0.0))
    # Rates are shared some dozen times, and every time all links are looked at.
    loop = fitting(drain, 20 * len(found.link_E))
    given = (
        *_arrays(found),
        capacity_L,
        pieces_of(8.0 * made.size_Q),
        chain(made),
        window,
        scratch(len(capacity_L), len(found.link_E)),
    )
    if loop is drain:
        given = in_lists(given)
    shares = loop(*given)
    finish_Q = np.asarray(given[4].finish_Q)
    if len(made) and finish_Q.min() < 0:
        piece = next(piece for piece, end in zip(made, finish_Q.tolist(), strict=True) if end < 0)
        raise InputError(
            f"a piece from host {piece.src} to {piece.dst} never ends: its path {piece.path} has a failed link"
        )
    finish_F = np.zeros(len(made.flows))
    np.maximum.at(finish_F, made.flow_Q, finish_Q)
    return FluidResult(finish_Q, finish_F, float(finish_Q.max(initial=0.0)), int(shares))


def chain(made: Plan) -> Chain:
    """Who waits for what in a plan, before anything is sent."""
    flows = made.flows
    src_Q, dst_Q, step_Q = (column[made.flow_Q].astype(np.int64) for column in (flows.src_F, flows.dst_F, flows.step_F))
    num_ranks, num_steps = flows.num_ranks, flows.num_steps
    size = num_ranks * num_steps
    if size > MOST_RANK_STEPS:
        raise InputError(f"{num_ranks:,} ranks of {num_steps:,} steps are too many to simulate")
    own_Q = src_Q * num_steps + step_Q
    pending = np.bincount(own_Q, minlength=size) + np.bincount(dst_Q * num_steps + step_Q, minlength=size)
    order_Q = np.lexsort((made.window_Q, own_Q))
    changes_Q = (np.diff(own_Q[order_Q]) != 0) | (np.diff(made.window_Q[order_Q]) != 0)
    return Chain(
        who_Q=np.stack([src_Q, dst_Q, step_Q], 1),
        pending=pending.reshape(num_ranks, num_steps).astype(np.int64),
        begin=np.concatenate([[0], np.cumsum(np.bincount(own_Q, minlength=size))]).astype(np.int64),
        order_Q=order_Q,
        last_O=np.append(changes_Q, np.ones(min(len(made), 1), bool)),
        cur_R=np.full(num_ranks, -1, np.int64),
        next_R=np.zeros(num_ranks, np.int64),
        out_R=np.zeros(num_ranks, np.int64),
        started=np.zeros(len(made), np.int64),
    )


def _arrays(found: Routes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In the types that kernels are compiled for, so that they are compiled once."""
    kinds = (np.int64, np.int64, np.float64)
    start, link_E, weight_E = (np.ascontiguousarray(column, kind) for column, kind in zip(found, kinds, strict=True))
    return start, link_E, weight_E
