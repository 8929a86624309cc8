"""The packet-level simulator: what queues, marks, losses and order make of a plan.

Store-and-forward switches with shared buffers, ECN marks and DCTCP; receivers that take packets in any order, or in order alone and let the
sender go back (RoCE); time-outs that move a pinned flow to another path for a while; packet spraying and REPS ("Recycled entropy packet
spraying", arXiv 2407.21625: paths of unmarked acknowledgements are used again) for schemes ``spray`` and ``reps``. Acknowledgements
take the latency of the path and no bandwidth.
"""
# Shapes: F flows, Q pieces, L links

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anabranch.bounds import MOST_SEED, finite, whole
from anabranch.cluster.fabric import packet_state as ps
from anabranch.cluster.fabric.kernels import fitting
from anabranch.cluster.fabric.packet_kernels import DONE, FULL, at, begin, patience_ps, run
from anabranch.cluster.fabric.planner import Plan
from anabranch.cluster.fabric.schemes import mix
from anabranch.config import Config, Field, configclass
from anabranch.errors import CapacityError, InputError

Receiver = Literal["any-order", "go-back-n"]
# Events between two looks at whether somebody wants to stop.
TURN = 200_000
MOST_PACKETS = 2**31
# Time-outs of a piece without any acknowledgement, after which nothing is hoped for.
MOST_SILENT = 1000
# Packets in flight that there is room for at first.
ROOM = 1024


@configclass
class PacketConfig(Config):
    """How packets are sent.

    Attributes:
        receiver: "any-order", every packet is taken; "go-back-n", in order alone, as RoCE cards without selective repeat.
        payload: bytes of a packet beside its header (authors' code: 9000).
        header: bytes, all layers together.
        buffer_mb: shared buffer of a switch, 10^6 bytes (authors' code: 64).
        ecn_kb: a packet is marked where more than so many 10^3 bytes wait before it.
        rto_us: microseconds without an acknowledgement after which all that flies counts as lost (authors' code: 1 ms); more where a
            packet and its acknowledgement take more over a path in which nothing waits.
        hold_us: for which a pinned flow's path is left alone then (authors' code: 100 ms).
        window: packets that a piece may have in flight at first. None: as many as fill its path, and one.
        gain: of DCTCP's mean share of marks.
        card: of hosts: "turns", a piece sends one packet and the next piece follows, as cards with a queue for each connection do (RoCE,
            FqCoDel); "fifo", a piece puts all that its window has room for in the card's one queue, as TCP does by default.
        ack_bytes: of an acknowledgement, which then waits in the queues of the links back like any packet, behind what its host sends too;
            0 for acknowledgements that take the latency of the path and no bandwidth.
    """

    receiver: Receiver = "any-order"
    payload: int = Field(default=9000, ge=1, le=1_000_000)
    header: int = Field(default=64, ge=0, le=10_000)
    buffer_mb: float = Field(default=64.0, gt=0, le=1e6)
    ecn_kb: float = Field(default=180.0, ge=0, le=1e9)
    rto_us: float = Field(default=1000.0, gt=0, le=1e9)
    hold_us: float = Field(default=100_000.0, ge=0, le=1e9)
    window: float | None = Field(default=None, ge=1, le=1e6)
    gain: float = Field(default=1 / 16, gt=0, le=1)
    card: Literal["turns", "fifo"] = "turns"
    ack_bytes: int = Field(default=0, ge=0, le=10_000)


@dataclass(frozen=True)
class LinkEvent:
    """A cable fails, or works again, after ``at_us`` microseconds, and no sender is told. Raises InputError for a time that is none."""

    cable: tuple[str, str] | str
    at_us: float = 0.0
    works: bool = False

    def __post_init__(self) -> None:
        finite("at_us", self.at_us, 0.0, 1e12)


@dataclass(frozen=True, eq=False)
class PacketResult:
    """What `simulate_packets` found.

    Attributes:
        finish_F: float64, seconds at which the last byte of each flow is there.
        completion_s: the last of all.
        packets: of all pieces, each counted once.
        hops: packets over links, those sent again included.
        dropped, lost: for want of buffer, and over failed links.
        marked: times a packet was marked.
        resent, timeouts, moved: packets sent again, time-outs, and pieces that got another path by one.
        out_of_order: packets that came before one they should have followed, where receivers mind.
        bytes_L: float64 [L], over each link.
    """

    finish_F: np.ndarray
    completion_s: float
    packets: int
    hops: int
    dropped: int
    lost: int
    marked: int
    resent: int
    timeouts: int
    moved: int
    out_of_order: int
    bytes_L: np.ndarray


def simulate_packets(
    made: Plan,
    config: PacketConfig | None = None,
    *,
    events: Sequence[LinkEvent] = (),
    seed: int = 0,
    most_s: float | None = None,
    progress: Callable[[int, int], None] = lambda done, pieces: None,
) -> PacketResult:
    """Run a plan packet by packet.

    Args:
        made: the plan. Packets of its spread pieces go over paths that are drawn one by one: among the paths that were good when it was
            made, whatever has happened since.
        config: default `PacketConfig()`.
        events: cables that fail, or work again, without anybody being told.
        seed: of the paths drawn.
        most_s: simulated seconds after which to give up.
        progress: told from time to time how many pieces are through, of how many.

    Raises InputError for a cable that is not there or a plan that does not end (nobody heard anything for a thousand time-outs, or
    ``most_s`` have passed), CapacityError beyond 2^31 packets.
    """
    config, seed = PacketConfig() if config is None else config, whole("seed", seed, 0, MOST_SEED)
    most_s = None if most_s is None else finite("most_s", most_s, 0.0, 1e9)
    if float((made.size_Q / config.payload).sum()) > MOST_PACKETS:
        raise CapacityError(
            f"the plan has more than {MOST_PACKETS:,} packets of {config.payload} bytes; raise payload, or send less"
        )
    constants = constants_of(made, config)
    # A generator of shifts stays 0 if it begins there.
    random = int(mix(np.array([seed + 1], np.uint64))[0]) | 1
    state, constants = ps.make_state(made, constants, random, room=ROOM)
    if not len(made):
        return _result(made, state)
    # A packet is an event a hop and two more, of some dozen steps each.
    loop = fitting(run, 100.0 * int(state.pieces.num_packets.sum()))
    if loop is run:
        state = ps.plain(state)
    for event in events:
        for link in made.topology.cable(event.cable):
            at(state, round(event.at_us * 1_000_000), ps.LINK_UP if event.works else ps.LINK_DOWN, link)
    margin = ps.AT_ONCE + 16 + 2 * int(np.diff(state.chain.begin).max())
    state = _with_room(state, margin * made.flows.num_ranks)
    begin(state, made.flows.num_ranks)
    # A cable that is repaired late is waited for.
    last_ps = max((round(event.at_us * 1_000_000) for event in events), default=0)
    state = _finished(loop, state, constants, margin, made, most_s, last_ps, progress)
    return _result(made, state)


def _with_room(state: ps.State, events: int) -> ps.State:
    while len(state.heap[0]) < events + int(state.clock[ps.EVENTS]) + 64:
        state = ps.grown(state)
    return state


def _finished(
    loop: Callable[..., int],
    state: ps.State,
    constants: ps.Constants,
    margin: int,
    made: Plan,
    most_s: float | None,
    last_ps: int,
    progress: Callable[[int, int], None],
) -> ps.State:
    """The state when the last piece is there."""
    turn = max(1, TURN // 10) if loop is run else TURN
    turn = turn if most_s is None else min(turn, 2_000)
    while True:
        status = loop(state, constants, turn, margin)
        left, now_s = int(state.clock[ps.LEFT]), int(state.clock[ps.NOW]) / ps.PS_PER_S
        progress(len(made) - left, len(made))
        if status == DONE and not left:
            return state
        silent_ps = int(state.clock[ps.NOW]) - max(int(state.clock[ps.HEARD]), last_ps)
        is_lost = silent_ps > MOST_SILENT * constants.rto_ps
        if is_lost:
            # Over slow cables a time-out takes as long as an answer does.
            waits = np.flatnonzero(ps.column(state.pieces, "finish") < 0).tolist()
            is_lost = silent_ps > MOST_SILENT * max(patience_ps(state, constants, place) for place in waits)
        if status == DONE or is_lost or (most_s is not None and now_s > most_s):
            piece = list(made)[int((ps.column(state.pieces, "finish") < 0).argmax())]
            raise InputError(
                f"{left:,} of {len(made):,} pieces were not through after {now_s:.6g} s, among them one from host {piece.src} to "
                f"{piece.dst}; does a path to it work?"
            )
        if status == FULL:
            state = ps.grown(state)


def constants_of(made: Plan, config: PacketConfig) -> ps.Constants:
    """What loops need of the options."""
    modes = {"spray": ps.SPRAYED, "reps": ps.RECYCLED}
    return ps.Constants(
        mode=modes.get(made.scheme, ps.PINNED),
        in_order=config.receiver == "go-back-n",
        payload=config.payload,
        header=config.header,
        ecn_bytes=config.ecn_kb * 1e3,
        buffer_bytes=config.buffer_mb * 1e6,
        latency_ps=made.topology.latency_ns * ps.PS_PER_NS,
        rto_ps=max(1, round(config.rto_us * 1_000_000)),
        hold_ps=round(config.hold_us * 1_000_000),
        window=float(full_window(made, config) if config.window is None else config.window),
        gain=config.gain,
        takes_turns=config.card == "turns",
        ack_bytes=config.ack_bytes,
    )


def full_window(made: Plan, config: PacketConfig) -> int:
    """Packets that fill the longest path of the plan at the speed of the fastest host, and one: the bytes that it holds in a round."""
    topology = made.topology
    if not len(made):
        return 1
    leaf_F, to_F = topology.leaf_H[made.flows.src_F], topology.leaf_H[made.flows.dst_F]
    pairs = np.unique(np.stack([leaf_F, to_F], 1), axis=0).tolist()
    hops = 2 + max(topology.paths(leaf, to).shape[1] for leaf, to in pairs)
    speed, wire = float(topology.capacity_L[topology.host_up_H].max()), 8 * (config.payload + config.header)
    slowest = float(topology.capacity_L.min())
    round_s = 2 * hops * topology.latency_ns / 1e9 + hops * wire / slowest
    return int(np.ceil(round_s * speed / wire)) + 1


def _result(made: Plan, state: ps.State) -> PacketResult:
    finish_F = np.zeros(len(made.flows))
    finish_Q = ps.column(state.pieces, "finish") / ps.PS_PER_S
    np.maximum.at(finish_F, made.flow_Q, finish_Q)
    clock = [int(count) for count in state.clock]
    return PacketResult(
        finish_F=finish_F,
        completion_s=float(finish_Q.max(initial=0.0)),
        packets=int(ps.column(state.pieces, "num_packets").sum()),
        hops=clock[ps.HOPS],
        dropped=clock[ps.DROPS],
        lost=clock[ps.LOST],
        marked=clock[ps.MARKS],
        resent=clock[ps.RESENT],
        timeouts=clock[ps.TIMEOUTS],
        moved=clock[ps.MOVED],
        out_of_order=clock[ps.OUT_OF_ORDER],
        bytes_L=ps.column(state.links, "sent").astype(np.float64),
    )
