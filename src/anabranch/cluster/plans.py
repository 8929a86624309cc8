"""`plan`: which layers of a model go to which rank, in what order micro-batches run, and how long a step takes then.

    made = plan([LayerCost("block 0", flops=2e9, parameters=1e6), ...], ranks=8, micro_batches=32, flops_s=1e14)
    made.timeline.step_s, made.timeline.idle

Nothing runs: layers are what they say they cost, and the step is simulated. A plan is for one micro-batch size; activations and sends are
those of that many items. Which layers go where is chosen by that simulation: of all partitions the one whose step is shortest, or, where
they are too many to simulate, the best that moves of boundaries lead to.
"""
# Shapes: L layers, C chunks, K ranks

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from anabranch.cluster.boundaries import Bounds, descent, quickest
from anabranch.cluster.partitions import Objective, Partition, check_balance, partition, partition_at, partition_ends
from anabranch.cluster.rooms import Rooms, copied
from anabranch.cluster.schedules import Schedule, schedule
from anabranch.cluster.simulation import Durations, Timeline, is_recomputed, simulate
from anabranch.errors import InputError

__all__ = ["BACKWARD_WORK", "LayerCost", "Plan", "plan"]

# Floating-point operations of a backward over those of its forward: a matrix product has two of the same size.
BACKWARD_WORK = 2.0
# Slots and messages of the partitions that are compared, of which many need no simulation: a second or two where all do, and more where
# one step alone has more.
_MOST_SIMULATED = 100_000
# Ranks whose memory alone is looked up where no other stages have room: a few seconds.
_MOST_MEASURED = 50_000
# Partitions that are looked at from each start before any is simulated.
_MOST_LOOKED_AT = 100_000


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer costs for one micro-batch.

    Attributes:
        name: for people.
        flops: of the forward.
        parameters: how many.
        output_bytes: of what goes on to the next layer.
        saved_bytes: of what the forward keeps for the backward, its input included.
        tied_to: index of an earlier layer all of whose parameters this one uses too (an embedding that is the head). They do not count
            among its own; a rank that has this layer and not that one has a copy of them, with gradients and optimizer state. None: none.
    """

    name: str
    flops: float
    parameters: int = 0
    output_bytes: float = 0.0
    saved_bytes: float = 0.0
    tied_to: int | None = None


@dataclass(frozen=True)
class Plan:
    """A model on ranks.

    Attributes:
        layers: as given.
        partition: of the layers into chunks; chunk c is on rank c mod K.
        timeline: of one step, with its schedule.
        checkpoint: for which micro-batches activations are recomputed.
        one_rank_s: what one rank alone would take, without recomputation.
        activation_bytes_K: the most that each rank holds for backward passes: what is saved, or inputs and one chunk's recomputation.
        state_bytes_K: of the parameters of each rank, copies of tied ones included, with gradients and optimizer state.
    """

    layers: tuple[LayerCost, ...]
    partition: Partition
    timeline: Timeline
    checkpoint: str
    one_rank_s: float
    activation_bytes_K: tuple[float, ...]
    state_bytes_K: tuple[float, ...]

    @property
    def schedule(self) -> Schedule:
        """The table."""
        return self.timeline.schedule

    @property
    def speedup(self) -> float:
        """How much faster a step is than on one rank."""
        return self.one_rank_s / self.timeline.step_s if self.timeline.step_s else 1.0

    @property
    def knows_activations(self) -> bool:
        """Whether layers said what they keep."""
        return any(layer.saved_bytes for layer in self.layers)

    def chunks_of(self, rank: int) -> list[range]:
        """The layers of a rank, a range for each visit."""
        return [part for number, part in enumerate(self.partition.parts) if number % self.schedule.num_stages == rank]

    def parameters_of(self, rank: int) -> int:
        """How many a rank has, copies of tied ones included."""
        parts = self.chunks_of(rank)
        own = {number for part in parts for number in part}
        return sum(self.layers[number].parameters for number in own | copied(parts, _ties_of(self.layers)))

    def idle_of(self, rank: int) -> float:
        """Share of the step that a rank does not work."""
        return 1 - self.timeline.busy_K[rank] / self.timeline.step_s if self.timeline.step_s else 0.0

    def receive_bytes(self, rank: int) -> float:
        """What a rank gets from others in the forward of one micro-batch, of all its chunks."""
        return sum(self.layers[part.start - 1].output_bytes for part in self.chunks_of(rank) if part.start)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "ranks": [
                {
                    "rank": rank,
                    "layers": [[part.start, part.stop - 1] for part in self.chunks_of(rank)],
                    "names": [self.layers[number].name for part in self.chunks_of(rank) for number in part],
                    "flops": sum(self.layers[number].flops for part in self.chunks_of(rank) for number in part),
                    "parameters": self.parameters_of(rank),
                    "state_bytes": self.state_bytes_K[rank],
                    "activation_bytes": self.activation_bytes_K[rank] if self.knows_activations else None,
                    "busy_s": self.timeline.busy_K[rank],
                    "idle": self.idle_of(rank),
                    "receive_bytes": self.receive_bytes(rank),
                }
                for rank in range(self.schedule.num_stages)
            ],
            "checkpoint": self.checkpoint,
            "one_rank_s": self.one_rank_s,
            "step_s": self.timeline.step_s,
            "speedup": self.speedup,
            "idle": self.timeline.idle,
            "schedule": self.schedule.to_dict(),
        }


def plan(
    layers: Sequence[LayerCost],
    *,
    ranks: int,
    schedule_name: str = "gpipe",
    micro_batches: int | None = None,
    visits: int | None = None,
    checkpoint: Literal["always", "except_last", "never"] = "except_last",
    flops_s: float,
    bytes_s: float | None = None,
    latency_s: float = 0.0,
    balance: Sequence[int] | None = None,
    uncut: Sequence[range] = (),
    objective: Objective | Literal["step"] = "step",
    cap_bytes: float | None = None,
    bytes_per_parameter: float = 16.0,
) -> Plan:
    """The contiguous partition of the layers whose step is shortest, and the schedule's step with it.

    Args:
        layers: of the model, in order, each for one micro-batch.
        ranks: K.
        schedule_name: one of `anabranch.cluster.SCHEDULES`.
        micro_batches: M. Default: 4 K, from where on the paper finds the bubble negligible.
        visits: chunks of each rank, see `schedule`.
        checkpoint: for which micro-batches the forward is done again, see `GPipe`.
        flops_s: what a rank computes a second.
        bytes_s: what a link carries a second; None for links that cost nothing.
        latency_s: of each message.
        balance: layers of each chunk, instead of the best partition.
        uncut: layers that stay on one rank, see `partition`.
        objective: what is best: the shortest step by simulation (``step``), or one of `partition`'s, of the forward with one send. The
            shortest is that of all partitions where these are few, else of those that moving boundaries leads to, as far as a hundred
            thousand simulated slots and messages go.
        cap_bytes: memory of a rank for its parameters and for activations, as far as layers say what they keep; of all chunks that it has.
            None for no limit.
        bytes_per_parameter: with gradient and optimizer state (16: float32 under Adam).

    Raises InputError for what `partition`, `schedule` and `simulate` refuse, a speed that is not above 0, and where no partition keeps to
    ``cap_bytes``: where a rank has one chunk or partitions are few, none at all, else none that moves of boundaries lead to.
    """
    for name, speed in (("flops_s", flops_s), ("bytes_s", 1.0 if bytes_s is None else bytes_s)):
        if not speed > 0:
            raise InputError(f"{name} is {speed}; it must be above 0")
    if checkpoint not in ("always", "except_last", "never"):
        raise InputError(f"checkpoint is {checkpoint!r}; use always, except_last or never")
    if objective not in ("step", "minimax", "variance"):
        raise InputError(f"objective is {objective!r}; use step, minimax or variance")
    if not layers:
        raise InputError("there are no layers to plan for")
    for user, source in _ties_of(layers):
        if not 0 <= source < user:
            raise InputError(
                f"tied_to of layer {user} is {source}; name one of the {user} layers before it by its index, or None"
            )
    table = schedule(
        schedule_name, stages=ranks, micro_batches=4 * ranks if micro_batches is None else micro_batches, visits=visits
    )
    if balance is not None and len(balance) != table.num_chunks:
        raise InputError(f"balance has {len(balance)} entries, and the schedule has {table.num_chunks} chunks")
    if balance is None and table.num_chunks > len(layers):
        raise InputError(
            f"{len(layers)} layers cannot be {table.num_chunks} chunks ({ranks} ranks, {table.num_visits} each); "
            f"use at most {len(layers)}"
        )
    cutting = _Cutting(
        layers=tuple(layers),
        table=table,
        checkpoint=checkpoint,
        second_L=tuple(layer.flops / flops_s for layer in layers),
        send_L=tuple(0.0 if bytes_s is None else layer.output_bytes / bytes_s for layer in layers),
        latency_s=latency_s,
        rooms=Rooms(
            table=table,
            checkpoint=checkpoint,
            state_L=tuple(layer.parameters * bytes_per_parameter for layer in layers),
            saved_L=tuple(layer.saved_bytes for layer in layers),
            output_L=tuple(layer.output_bytes for layer in layers),
            tied_L=tuple(layer.tied_to for layer in layers),
        ),
        cap_bytes=math.inf if cap_bytes is None else cap_bytes,
    )
    cutting.check_sum()
    if balance is not None:
        cut = check_balance(balance, len(layers))
    elif objective == "step":
        cut = cutting.quickest(uncut)
    else:
        cut = cutting.ruled(objective, uncut)
    cutting.check_room(cut)
    return Plan(
        tuple(layers),
        cut,
        cutting.timeline(cut),
        checkpoint,
        sum(cutting.second_L) * (1 + BACKWARD_WORK) * table.num_micro_batches,
        tuple(cutting.rooms.activation_bytes(cut, rank) for rank in range(ranks)),
        tuple(cutting.rooms.state_bytes(cut, rank) for rank in range(ranks)),
    )


@dataclass(frozen=True, kw_only=True)
class _Cutting:
    """All but the partition."""

    layers: tuple[LayerCost, ...]
    table: Schedule
    checkpoint: str
    second_L: tuple[float, ...]
    send_L: tuple[float, ...]
    latency_s: float
    rooms: Rooms
    cap_bytes: float

    def timeline(self, cut: Partition) -> Timeline:
        """A step with that partition."""
        forward_C = tuple(sum(self.second_L[number] for number in part) for part in cut.parts)
        durations = Durations(
            forward_C=forward_C,
            backward_C=tuple(BACKWARD_WORK * taken for taken in forward_C),
            send_C=tuple(self.send_L[part[-1]] for part in cut.parts),
            latency_s=self.latency_s,
            recomputes=self.checkpoint,
        )
        return simulate(self.table, durations)

    def least(self, bounds_NC: np.ndarray) -> np.ndarray:
        """Of many partitions ``[N, 3]``, no more than `cost` has: what ranks lack of memory, a step at least, and squares.

        A rank waits for its first forward, works, and from its last backward on others have theirs.
        """
        table, micro_batches = self.table, self.table.num_micro_batches
        again = sum(is_recomputed(self.checkpoint, number, micro_batches) for number in range(micro_batches))
        # Gradients of weights may come last; without slots of their own they are in all backwards.
        behind = 0.0 if table.has_weight_slots else BACKWARD_WORK
        whole = np.full((len(bounds_NC), 1), len(self.layers))
        ends = np.concatenate((np.zeros_like(whole), bounds_NC, whole), axis=1)
        costs = np.diff(self._seconds[ends], axis=1)
        sends = np.array(self.send_L)[ends[:, 1:] - 1] + self.latency_s
        least, around = np.zeros(len(ends)), np.zeros(len(ends))
        for rank in range(table.num_stages):
            own = costs[:, rank :: table.num_stages].sum(1)
            least = np.maximum(least, around + own * (micro_batches * (1 + BACKWARD_WORK) + again))
            around += costs[:, rank] * (1 + behind) + sends[:, rank] * (2 if behind else 1)
        lacking = np.zeros(len(ends))
        if self.cap_bytes < math.inf:
            lacking = np.maximum(0.0, self.rooms.taken_NK(ends) * (1 - 1e-12) - self.cap_bytes).sum(1)
        # Sums in another order differ by rounding.
        return np.stack((lacking, least, (costs**2).sum(1)), axis=1) * (1 - 1e-9)

    @cached_property
    def _seconds(self) -> np.ndarray:
        return np.concatenate(([0.0], np.cumsum(self.second_L)))

    def by(
        self, objective: Objective, uncut: Sequence[range], *, send_share: float = 1.0, cap_share: float = 1.0
    ) -> Partition:
        """The best partition of forwards, with a share of one send, as `partition` finds it."""
        return partition(
            self.second_L,
            self.table.num_chunks,
            boundary_L=[send_share * taken for taken in self.send_L],
            memory_L=self.rooms.state_L,
            # Of a rank with several chunks each is bounded by what all may have; whether they fit together is looked at behind this.
            cap=self.cap_bytes * cap_share,
            fits=self.fits if self.is_exact else None,
            uncut=uncut,
            objective=objective,
        )

    def ruled(self, objective: Objective, uncut: Sequence[range]) -> Partition:
        """The best partition of forwards with one send that has room, as far as chunks of one rank can be bounded each for itself."""
        if self.is_exact:
            # What is refused is told of the nearest.
            self.nearest(uncut)
        cut = self.by(objective, uncut)
        if self.excess_bytes(cut):
            # Then no chunk may take more than its share of what its rank has.
            try:
                cut = self.by(objective, uncut, cap_share=1 / self.table.num_visits)
            except InputError:
                # One must, and another chunk of its rank takes less.
                return self.nearest(uncut)
        return self.nearest(uncut) if self.excess_bytes(cut) else cut

    @property
    def is_exact(self) -> bool:
        """Whether memory is bounded, and that of a rank depends on one chunk alone, so that what fits is found exactly."""
        return self.table.num_visits == 1 and self.cap_bytes < math.inf

    def fits(self, rank: int, first: int) -> np.ndarray:
        """For each end of a rank's only chunk, which begins at layer ``first``: whether there is room for it."""
        return self.rooms.taken_from(rank, first) <= self.cap_bytes

    def nearest(self, uncut: Sequence[range]) -> Partition:
        """Stages whose fullest rank takes least: the least there is with one chunk of each rank, else what moves of boundaries lead to.

        Raises InputError where each rank has one chunk, and these stages have no room: then none have.
        """
        # Names the layer or the group whose parameters alone are too much.
        start = partition(
            self.rooms.state_L,
            self.table.num_chunks,
            memory_L=self.rooms.state_L,
            cap=self.cap_bytes,
            uncut=uncut,
        )
        ends = partition_ends(len(self.layers), uncut)
        if self.is_exact:
            found = self.rooms.least_full(ends)
            self.check_room(found)
            return found
        if self.cap_bytes == math.inf:
            return start

        most = _MOST_MEASURED // self.table.num_stages

        def cost(bounds: Bounds) -> list[float]:
            # The fullest counts, of equally full ones the next: otherwise boundaries elsewhere would not move.
            return sorted(self.rooms.taken_NK(np.array([(0, *bounds, len(self.layers))]))[0].tolist(), reverse=True)

        return partition_at(quickest(self.table.num_chunks, ends, cost, [start.bounds], most), self.second_L)

    def quickest(self, uncut: Sequence[range]) -> Partition:
        """The partition of the shortest step among those that memory has room for."""
        ends = partition_ends(len(self.layers), uncut)

        def cost(bounds: Bounds) -> tuple[float, float, float]:
            cut = partition_at(bounds, self.second_L)
            excess = self.excess_bytes(cut)
            # What has no room is not simulated. Sums in another order are no shorter steps: of equal ones the more even partition is taken.
            step_s = math.inf if excess else float(f"{self.timeline(cut).step_s:.12g}")
            return excess, step_s, sum(taken**2 for taken in cut.costs)

        # A slot is its work and about as many messages.
        most = max(1, _MOST_SIMULATED // (2 * len(self.table.slots)))
        found = quickest(self.table.num_chunks, ends, cost, self.starts(uncut, ends), most, self.least)
        return partition_at(found, self.second_L)

    def starts(self, uncut: Sequence[range], ends: Sequence[int]) -> list[Bounds]:
        """Where the search begins: at what rules find, all that `ruled` gives among it, and at what moves make of that."""
        # With the smallest memory, in case none of the others has room.
        found = [self.nearest(uncut)] if self.is_exact else []
        # With several visits chunks may have all of a rank's memory, though together they lack it then, or a share of it each.
        is_shared = self.table.num_visits > 1 and self.cap_bytes < math.inf
        shares = [1.0, 1 / self.table.num_visits] if is_shared else [1.0]
        for cap_share in shares:
            # With the sends of a forward, without any, by squares.
            try:
                found += [
                    self.by("minimax", uncut, cap_share=cap_share),
                    self.by("minimax", uncut, send_share=0.0, cap_share=cap_share),
                    self.by("variance", uncut, cap_share=cap_share),
                ]
            except InputError:
                if cap_share == 1:
                    raise
        if any(map(self.excess_bytes, found)):
            found.append(self.nearest(uncut))
        starts = [cut.bounds for cut in found]
        for start in sorted(set(starts)):
            # Without simulation: the first with room that moves lead to, and the last.
            path = descent(start, ends, self.least, _MOST_LOOKED_AT)
            lacks = self.least(np.array(path, int))[:, 0] > 0
            starts += [path[int(lacks.argmin())], path[-1]]
        return starts

    def check_sum(self) -> None:
        """Raise InputError where all ranks together lack memory for parameters."""
        if (whole := sum(self.rooms.state_L)) > self.cap_bytes * self.table.num_stages:
            raise InputError(
                f"parameters with what belongs to them take {_size(whole)}, and {self.table.num_stages} ranks of {_size(self.cap_bytes)} "
                "do not hold them; use more ranks, or ranks with more memory"
            )

    def excess_bytes(self, cut: Partition) -> float:
        """What ranks lack of memory, all together."""
        if self.cap_bytes == math.inf:
            return 0.0
        return sum(max(0.0, self.rooms.taken(cut, rank) - self.cap_bytes) for rank in range(self.table.num_stages))

    def check_room(self, cut: Partition) -> None:
        """Raise InputError where a rank lacks memory."""
        if not self.excess_bytes(cut):
            return
        most, rank = max((self.rooms.taken(cut, rank), rank) for rank in range(self.table.num_stages))
        raise InputError(
            f"no stages were found that fit: in the nearest, of {', '.join(map(str, cut.balance))} layers, rank {rank} takes {_size(most)} "
            f"({_size(self.rooms.state_bytes(cut, rank))} of parameters with what belongs to them, "
            f"{_size(self.rooms.activation_bytes(cut, rank))} of activations), and a rank holds {_size(self.cap_bytes)}; use more ranks, "
            "smaller micro-batches, recomputation, or ranks with more memory"
        )


def _ties_of(layers: Sequence[LayerCost]) -> list[tuple[int, int]]:
    """(a layer, the one whose parameters it uses too)."""
    return [(number, layer.tied_to) for number, layer in enumerate(layers) if layer.tied_to is not None]


def _size(taken: float) -> str:
    """Bytes for a message."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if taken >= 10**power:
            return f"{taken / 10**power:.3g} {unit}" if taken < 1000 * 10**power else f"{taken / 10**power:,.0f} {unit}"
    return f"{taken:.0f} bytes"
