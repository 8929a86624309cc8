"""Arrays that the packet simulator's loops work on, and how they are made of a plan.

Times are whole picoseconds: a packet of 9,064 bytes takes 181,280 of them at 400 Gbit/s, and no time is ever rounded in the order of
events. Every random draw comes from one counter, so a run is a function of its plan, its options and its seed.
"""
# Shapes: Q pieces, L links, N nodes, H hosts, W rows of paths, D links of a path, M packets, K packets in flight

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from anabranch.cluster.fabric.fluid import chain
from anabranch.cluster.fabric.kernels import Chain, in_lists
from anabranch.cluster.fabric.planner import Plan, good_paths
from anabranch.cluster.fabric.schemes import SPREAD
from anabranch.cluster.fabric.topology import Topology

PS_PER_S, PS_PER_NS = 1_000_000_000_000, 1_000
CACHED = 8
# Packets that a piece puts into a first-come card before others are looked at.
AT_ONCE = 128

# Places in ``State.clock``.
NOW, ORDER, EVENTS, FREE, LEFT, HOPS, DROPS, LOST, MARKS, TIMEOUTS, RESENT, OUT_OF_ORDER, MOVED, HEARD = range(14)
CLOCKS = 14
# Kinds of events.
ARRIVE, NIC, ACK, TIMER, START, LINK_DOWN, LINK_UP, BURST = range(8)
# What a packet that comes back says.
PLAIN, NACK = 0, 1
# Modes of sending.
PINNED, SPRAYED, RECYCLED = range(3)


class Constants(NamedTuple):
    """What does not change in a run."""

    mode: int
    in_order: bool
    payload: int
    header: int
    ecn_bytes: float
    buffer_bytes: float
    latency_ps: int
    rto_ps: int
    hold_ps: int
    window: float
    gain: float
    takes_turns: bool = True
    ack_bytes: int = 0
    depth: int = 0
    leaves: int = 0
    ways: int = 0


# What is known of each piece, link, host and packet in flight. Records keep together what is used together; a name may not be one
# of numpy's own methods.
_PLACE = "src dst step host_up host_down leaf first_row num_rows path delay"
# How long a packet and its acknowledgement take where nothing waits, over the best path, of a spread piece.
_ROUND = "round_trip"
# Of its packets: next to send, acknowledged, in flight, received in order or at all, what a receiver asked for last.
_SENT = "num_packets last_bytes first_bit following acked flying got nacked"
# 0 not started, 1 sends, 2 over; when it last heard something; when the last byte came.
_LIFE = "active progress finish"
# Acknowledgements and marks since the congestion window was looked at, and how many that takes; recycled paths it holds.
_HEARD = "acks marks span oldest cached"
# The next in its host's line, and whether it stands there.
_LINE = "behind waits"
# Congestion window, packets up to which it doubles, mean share of marks.
_CONTROL = "window slow alpha"
PIECE = np.dtype(
    [(name, np.int64) for part in (_PLACE, _ROUND, _SENT, _LIFE, _HEARD, _LINE) for name in part.split()]
    + [(name, np.float64) for name in _CONTROL.split()]
)
LINK = np.dtype(
    [("rate", np.float64), *((name, np.int64) for name in ("up", "free_at", "sent", "first_port", "end_port"))]
)
HOST = np.dtype([(name, np.int64) for name in ("head", "rear", "busy")])
PACKET = np.dtype([(name, np.int64) for name in ("piece", "number", "row", "hop", "length", "marked", "says", "back")])


class State(NamedTuple):
    """All that changes in a run.

    Attributes:
        clock: int64, counters by the names above.
        random: uint64 [1].
        heap: events, see `anabranch.cluster.fabric.kernels`.
        links, ports: records [L], and the links of each switch that the record's ``first_port`` to ``end_port`` are places of.
        rows: int64, paths one after the other, ``Constants.depth`` numbers each: how many links, then these.
        pieces, hosts, packets: records [Q], [H], [K].
        free_K: places of packets that are free: the first ``clock[FREE]``.
        cache_QC: recycled paths of each piece, one row after the other.
        bits_M: of each packet of each piece, 1 if it was received, and 2 more if it was acknowledged.
        marked_until: int64 [H x leaf x path], picoseconds up to which a sender leaves a path alone.
        chain: who waits for what, a `Chain`.
    """

    clock: Any
    random: Any
    heap: Any
    links: Any
    ports: Any
    rows: Any
    pieces: Any
    hosts: Any
    packets: Any
    free_K: Any
    cache_QC: Any
    bits_M: Any
    marked_until: Any
    chain: Any


def make_state(made: Plan, constants: Constants, seed: int, room: int) -> tuple[State, Constants]:
    """The state at the start, where nothing is sent and ranks are about to enter their first step; and the constants with its sizes."""
    topology, steps = made.topology, chain(made)
    rows, pieces = _pieces(made, constants, steps)
    constants = constants._replace(
        depth=rows.shape[1], leaves=len(topology.names) - topology.num_hosts, ways=int(pieces.num_rows.max(initial=1))
    )
    count, hosts = len(made), np.zeros(topology.num_hosts, HOST).view(np.recarray)
    hosts.head = hosts.rear = -1
    links, ports = _links(topology)
    clock = np.zeros(CLOCKS, np.int64)
    clock[FREE], clock[LEFT] = room, count
    marks = len(hosts) * constants.leaves * constants.ways if constants.mode == PINNED else 1
    state = State(
        clock=clock,
        random=np.array([seed], np.uint64),
        heap=tuple(np.zeros(4 * count + 2 * len(hosts) + 4096, np.int64) for _ in range(3)),
        links=links,
        ports=ports,
        rows=rows.reshape(-1),
        pieces=pieces,
        hosts=hosts,
        packets=np.zeros(room, PACKET).view(np.recarray),
        free_K=np.arange(room, dtype=np.int64),
        cache_QC=np.zeros(CACHED * (count if constants.mode == RECYCLED else 1), np.int64),
        bits_M=np.zeros(1 if constants.in_order else int(pieces.num_packets.sum()), np.uint8),
        marked_until=np.zeros(marks, np.int64),
        chain=steps,
    )
    return state, constants


def _links(topology: Topology) -> tuple[Any, np.ndarray]:
    links = np.zeros(topology.num_links, LINK).view(np.recarray)
    links.rate, links.up = topology.capacity_L, topology.is_up_L
    order = np.argsort(topology.link_from, kind="stable")
    edges = np.searchsorted(topology.link_from[order], np.arange(len(topology.names) + 1))
    links.first_port, links.end_port = edges[topology.link_from], edges[topology.link_from + 1]
    return links, order.astype(np.int64)


def _pieces(made: Plan, constants: Constants, steps: Chain) -> tuple[np.ndarray, Any]:
    """Paths as rows, and the record of each piece."""
    topology, rows = made.topology, _rows(made)
    pieces = np.zeros(len(made), PIECE).view(np.recarray)
    pieces.src, pieces.dst, pieces.step = steps.who_Q.T
    src_Q, dst_Q = steps.who_Q[:, 0], steps.who_Q[:, 1]
    pieces.host_up, pieces.host_down = topology.host_up_H[src_Q], topology.host_down_H[dst_Q]
    pieces.leaf = topology.leaf_H[dst_Q].astype(np.int64) - topology.num_hosts
    pieces.first_row, pieces.num_rows, pieces.path = rows.first_row_Q, rows.num_rows_Q, rows.path_Q
    pieces.delay = made.delay_ns_Q.astype(np.int64) * PS_PER_NS
    pieces.num_packets = -(-made.size_Q // constants.payload)
    pieces.last_bytes = made.size_Q - (pieces.num_packets - 1) * constants.payload
    pieces.first_bit = np.cumsum(pieces.num_packets) - pieces.num_packets
    pieces.nacked = pieces.finish = pieces.behind = -1
    pieces.round_trip = _rounds(made, constants, rows, pieces)
    pieces.window = pieces.slow = constants.window
    pieces.alpha = 1.0
    return rows.row_WD, pieces


def _rounds(made: Plan, constants: Constants, rows: "_Rows", pieces: Any) -> np.ndarray:
    """Picoseconds that the first packet of each spread piece and its acknowledgement take over the best of its paths; 0 of pinned ones."""
    slowness_L = 8.0 * PS_PER_S / made.topology.capacity_L
    count_W, link_WD = rows.row_WD[:, 0], rows.row_WD[:, 1:]
    is_hop = np.arange(link_WD.shape[1]) < count_W[:, None]
    byte_W = np.where(is_hop, slowness_L[link_WD], 0.0).sum(1)
    is_spread = (rows.path_Q < 0) & (rows.num_rows_Q > 0)
    if not is_spread.any():
        return np.zeros(len(made), np.int64)
    # Rows of a pair of leaves stand one after the other.
    begin = np.unique(rows.first_row_Q[rows.num_rows_Q > 0])
    pair_Q = np.minimum(np.searchsorted(begin, rows.first_row_Q), len(begin) - 1)
    byte_Q, count_Q = (np.minimum.reduceat(each_W, begin)[pair_Q] for each_W in (byte_W, count_W))
    byte_Q = byte_Q + slowness_L[pieces.host_up] + slowness_L[pieces.host_down]
    wire_Q = (
        constants.header + constants.ack_bytes + np.where(pieces.num_packets > 1, constants.payload, pieces.last_bytes)
    )
    round_Q = 2 * constants.latency_ps * (count_Q + 2) + wire_Q * byte_Q
    return np.where(is_spread, round_Q, 0).astype(np.int64)


def plain(state: State) -> State:
    """The same state in lists and plain objects, which interpreted loops are ten times as fast on as on arrays."""
    return state._replace(
        clock=state.clock.tolist(),
        heap=in_lists(state.heap),
        chain=in_lists(state.chain),
        bits_M=bytearray(state.bits_M),
        **{name: _objects(getattr(state, name)) for name in ("links", "pieces", "hosts", "packets")},
        **{name: getattr(state, name).tolist() for name in ("ports", "rows", "free_K", "cache_QC", "marked_until")},
    )


@cache
def _record(names: tuple[str, ...]) -> type:
    return type("Record", (), {"__slots__": names})


def _objects(records: np.ndarray) -> list[Any]:
    cls = _record(records.dtype.names or ())
    made = []
    for values in records.tolist():
        one = cls()
        for name, value in zip(cls.__slots__, values, strict=True):  # type: ignore[attr-defined]
            setattr(one, name, value)
        made.append(one)
    return made


def column(records: Any, name: str) -> np.ndarray:
    """A column of records or of a list of plain objects."""
    return np.array([getattr(one, name) for one in records]) if isinstance(records, list) else getattr(records, name)


def grown(state: State) -> State:
    """The same state with room for twice as many events and packets."""
    room, count = len(state.packets), int(state.clock[FREE])
    fresh = np.zeros(room, PACKET).view(np.recarray)
    places = list(range(room, 2 * room))
    state.clock[FREE] += room
    if isinstance(state.packets, list):
        heap = tuple(column + [0] * len(column) for column in state.heap)
        free_K = [*state.free_K[:count], *places, *state.free_K[count:]]
        return state._replace(heap=heap, packets=state.packets + _objects(fresh), free_K=free_K)
    heap = tuple(np.concatenate([column, np.zeros_like(column)]) for column in state.heap)
    packets = np.concatenate([state.packets, fresh]).view(np.recarray)
    return state._replace(
        heap=heap, packets=packets, free_K=np.concatenate([state.free_K[:count], places, state.free_K[count:]])
    )


class _Rows(NamedTuple):
    row_WD: np.ndarray
    first_row_Q: np.ndarray
    num_rows_Q: np.ndarray
    path_Q: np.ndarray


def _rows(made: Plan) -> _Rows:
    """The paths of each pair of leaves as rows one after the other: a spread piece draws among them, a pinned one has one of them.

    Only paths that were good when the plan was made have rows; ``path_Q`` is the place among them, -1 for a spread piece.
    """
    topology, flows = made.topology, made.flows
    leaf_Q = topology.leaf_H[flows.src_F[made.flow_Q]].astype(np.int64)
    to_Q = topology.leaf_H[flows.dst_F[made.flow_Q]].astype(np.int64)
    pairs, pair_Q = np.unique(leaf_Q * len(topology.names) + to_Q, return_inverse=True)
    rows: list[np.ndarray] = []
    first, number, place_of = [], [], []
    for leaf, to in (divmod(int(pair), len(topology.names)) for pair in pairs):
        paths_PD = topology.paths(leaf, to)
        good = good_paths(topology, leaf, to)[0]
        place = np.full(len(paths_PD), -1, np.int64)
        place[good] = np.arange(len(good))
        first.append(len(rows))
        number.append(len(good))
        place_of.append(place)
        rows += list(paths_PD[good])
    row_WD = np.zeros((max(len(rows), 1), 1 + max((len(row) for row in rows), default=0)), np.int64)
    for at, row in enumerate(rows):
        row_WD[at, 0], row_WD[at, 1 : 1 + len(row)] = len(row), row
    path_Q = np.array(
        [
            -1 if path == SPREAD else place_of[pair][path]
            for pair, path in zip(pair_Q.tolist(), made.path_Q.tolist(), strict=True)
        ],
        np.int64,
    )
    return _Rows(row_WD, np.array(first, np.int64)[pair_Q], np.array(number, np.int64)[pair_Q], path_Q)
