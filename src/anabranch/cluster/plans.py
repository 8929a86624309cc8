"""`plan`: which layers of a model go to which rank, in what order micro-batches run, and how long a step takes then.

    made = plan([LayerCost("block 0", flops=2e9, parameters=1e6), ...], ranks=8, micro_batches=32, flops_s=1e14)
    made.timeline.step_s, made.timeline.idle

Nothing runs: layers are what they say they cost, and the step is simulated. A plan is for one micro-batch size; activations and sends are
those of that many items.
"""
# Shapes: L layers, C chunks, K ranks

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from anabranch.cluster.partitions import Objective, Partition, check_balance, partition
from anabranch.cluster.schedules import BACKWARD, FORWARD, WEIGHT, Schedule, schedule
from anabranch.cluster.simulation import Durations, Timeline, is_recomputed, simulate
from anabranch.errors import InputError

__all__ = ["BACKWARD_WORK", "LayerCost", "Plan", "plan"]

# Floating-point operations of a backward over those of its forward: a matrix product has two of the same size.
BACKWARD_WORK = 2.0


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer costs for one micro-batch.

    Attributes:
        name: for people.
        flops: of the forward.
        parameters: how many.
        output_bytes: of what goes on to the next layer.
        saved_bytes: of what the forward keeps for the backward, its input included.
    """

    name: str
    flops: float
    parameters: int = 0
    output_bytes: float = 0.0
    saved_bytes: float = 0.0


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
    """

    layers: tuple[LayerCost, ...]
    partition: Partition
    timeline: Timeline
    checkpoint: str
    one_rank_s: float
    activation_bytes_K: tuple[float, ...]

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "ranks": [
                {
                    "rank": rank,
                    "layers": [[part.start, part.stop - 1] for part in self.chunks_of(rank)],
                    "names": [self.layers[number].name for part in self.chunks_of(rank) for number in part],
                    "flops": sum(self.layers[number].flops for part in self.chunks_of(rank) for number in part),
                    "parameters": sum(
                        self.layers[number].parameters for part in self.chunks_of(rank) for number in part
                    ),
                    "activation_bytes": self.activation_bytes_K[rank] if self.knows_activations else None,
                    "busy_s": self.timeline.busy_K[rank],
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
    objective: Objective = "minimax",
    cap_bytes: float | None = None,
    bytes_per_parameter: float = 16.0,
) -> Plan:
    """The best contiguous partition of the layers, and the schedule's step with it.

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
        objective: of the partition.
        cap_bytes: memory of a rank for its parameters; None for no limit.
        bytes_per_parameter: with gradient and optimizer state (16: float32 under Adam).

    Raises InputError for what `partition`, `schedule` and `simulate` refuse, and a speed that is not above 0.
    """
    for name, speed in (("flops_s", flops_s), ("bytes_s", 1.0 if bytes_s is None else bytes_s)):
        if not speed > 0:
            raise InputError(f"{name} is {speed}; it must be above 0")
    if checkpoint not in ("always", "except_last", "never"):
        raise InputError(f"checkpoint is {checkpoint!r}; use always, except_last or never")
    if not layers:
        raise InputError("there are no layers to plan for")
    table = schedule(
        schedule_name, stages=ranks, micro_batches=4 * ranks if micro_batches is None else micro_batches, visits=visits
    )
    second_L = [layer.flops / flops_s for layer in layers]
    send_L = [0.0 if bytes_s is None else layer.output_bytes / bytes_s for layer in layers]
    if balance is not None:
        cut = check_balance(balance, len(layers))
        if len(balance) != table.num_chunks:
            raise InputError(f"balance has {len(balance)} entries, and the schedule has {table.num_chunks} chunks")
    else:
        if table.num_chunks > len(layers):
            raise InputError(
                f"{len(layers)} layers cannot be {table.num_chunks} chunks ({ranks} ranks, {table.num_visits} each); "
                f"use at most {len(layers)}"
            )
        cut = partition(
            second_L,
            table.num_chunks,
            boundary_L=send_L,
            memory_L=[layer.parameters * bytes_per_parameter for layer in layers],
            # A rank with several chunks holds them all.
            cap=float("inf") if cap_bytes is None else cap_bytes / table.num_visits,
            uncut=uncut,
            objective=objective,
        )
    forward_C = tuple(sum(second_L[number] for number in part) for part in cut.parts)
    durations = Durations(
        forward_C=forward_C,
        backward_C=tuple(BACKWARD_WORK * taken for taken in forward_C),
        send_C=tuple(send_L[part[-1]] for part in cut.parts),
        latency_s=latency_s,
        recomputes=checkpoint,
    )
    timeline = simulate(table, durations)
    alone = sum(second_L) * (1 + BACKWARD_WORK) * table.num_micro_batches
    held = tuple(_activation_bytes(layers, cut, table, checkpoint, rank) for rank in range(ranks))
    return Plan(tuple(layers), cut, timeline, checkpoint, alone, held)


def _activation_bytes(
    layers: Sequence[LayerCost], cut: Partition, table: Schedule, checkpoint: str, rank: int
) -> float:
    """The most bytes that a rank holds between forward and backward, over its slots in their order."""
    last = WEIGHT if table.has_weight_slots else BACKWARD
    held, most = 0.0, 0.0
    for slot in table.of_stage(rank):
        part = cut.parts[table.chunk_of(slot)]
        whole = sum(layers[number].saved_bytes for number in part)
        entry = layers[part.start - 1].output_bytes if part.start else 0.0
        again = is_recomputed(checkpoint, slot.micro_batch, table.num_micro_batches)
        kept = entry if again else whole
        if slot.kind == FORWARD:
            held += kept
            most = max(most, held)
        elif slot.kind == BACKWARD:
            # What was recomputed stands beside the inputs of the others.
            most = max(most, held - kept + whole)
        if slot.kind == last:
            held -= kept
    return most
