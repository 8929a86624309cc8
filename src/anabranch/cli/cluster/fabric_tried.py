"""What ``anabranch cluster fabric`` does with each scheme: plans, simulates, writes down."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anabranch.cli.progress import Progress
from anabranch.extras import require
from anabranch.files import atomic_file

if TYPE_CHECKING:
    from anabranch.cluster.fabric import Flows, Plan, Topology

# Pieces up to which rates are shared at every end of one; of more, ends within a thousandth of the busiest link's time are one.
EXACT, COARSE = 20_000, 1e-3
# Packets that interpreted loops move in some seconds.
FEW_PACKETS = 20_000
COUNTED = ("packets", "hops", "dropped", "lost", "marked", "resent", "timeouts", "moved", "out_of_order")
MESSAGE = "anabranch cluster fabric, for so much traffic,"


@dataclass(frozen=True)
class Asked:
    """What is asked of every scheme; ``receiver`` is None where no packets are wanted, ``lost`` are cables that fail untold."""

    scope: Literal["host", "leaf"]
    window: int | None
    seed: int
    receiver: Literal["any-order", "go-back-n"] | None
    lost: Sequence[str]
    quiet: bool
    card: Literal["turns", "fifo"] = "turns"
    ack_bytes: int = 0


def tried(name: str, flows: Flows, topology: Topology, asked: Asked) -> tuple[dict[str, Any], Plan]:
    """A scheme's numbers, and its plan."""
    from anabranch.cluster.fabric import busiest, plan, simulate

    made = plan(flows, topology, name, scope=asked.scope, window=asked.window, seed=asked.seed)
    resolution = 0.0
    if len(made) > EXACT:
        require("numba", by=MESSAGE, of="cluster")
        resolution = COARSE
    run = simulate(made, resolution=resolution)
    row = {
        "scheme": name,
        "pieces": len(made),
        "pieces_per_host": len(made) / max(flows.num_ranks, 1),
        "busiest_s": busiest(made),
        "completion_s": run.completion_s,
        "resolution": resolution,
        "fell_back": made.fell_back,
        "packets": None if asked.receiver is None else _packets(made, asked),
    }
    return row, made


def _packets(made: Plan, asked: Asked) -> dict[str, Any]:
    from anabranch.cluster.fabric import LinkEvent, PacketConfig, simulate_packets

    assert asked.receiver is not None
    config = PacketConfig(receiver=asked.receiver, card=asked.card, ack_bytes=asked.ack_bytes)
    if int((-(-made.size_Q // config.payload)).sum()) > FEW_PACKETS:
        require("numba", by=MESSAGE, of="cluster")
    events = [LinkEvent(cable) for cable in asked.lost]
    with Progress(len(made), "piece", quiet=asked.quiet) as progress:
        found = simulate_packets(
            made,
            config,
            events=events,
            seed=asked.seed,
            progress=lambda done, _: progress.update(done, made.scheme),
        )
    return {"completion_s": found.completion_s, **{name: getattr(found, name) for name in COUNTED}}


def write_plan(made: Plan, path: Path) -> None:
    """Pieces as CSV or, for a name that ends so, as a routing trace in Parquet."""
    if path.suffix == ".parquet":
        from anabranch.cluster.fabric import plan_trace

        plan_trace(made).write(path)
        return
    names, steps = made.topology.names, made.flows.step_F[made.flow_Q].tolist()
    with atomic_file(path, clears=True) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer: Any = csv.writer(file)
        writer.writerow(["step", "src", "dst", "path", "offset", "bytes", "delay_ns", "window"])
        starts = zip(made.delay_ns_Q.tolist(), made.window_Q.tolist(), strict=True)
        for piece, step, start in zip(made, steps, starts, strict=True):
            writer.writerow([step, names[piece.src], names[piece.dst], piece.path, piece.offset, piece.size, *start])
