"""``anabranch cluster plan``: which layers go to which rank, in what order micro-batches run, and how long a step takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.cli.option_sets import OptionSet, takes_sets
from anabranch.cli.options import AsJson
from anabranch.cli.output import fact, print_json, print_line, size, table
from anabranch.cli.plan import read_hardware
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import atomic_write, check_apart

if TYPE_CHECKING:
    from anabranch.cluster import Plan
    from anabranch.lm import Decoder

# Beyond these a table of slots is no longer looked at, and takes long to make.
_MOST_RANKS, _MOST_MICRO_BATCHES, _MOST_TOKENS = 1024, 4096, 2**31
# Clocks that a terminal has room for.
_MOST_CLOCKS = 60


@dataclass(frozen=True)
class Scheduled(OptionSet):
    """How micro-batches go through the pipeline."""

    schedule: Annotated[
        Literal["gpipe", "1f1b", "interleaved", "zero-bubble"],
        typer.Option(metavar="NAME", help="gpipe, 1f1b, interleaved or zero-bubble."),
    ] = "gpipe"
    micro_batches: Annotated[
        int | None,
        typer.Option(
            metavar="M", min=1, max=_MOST_MICRO_BATCHES, help="Micro-batches per step. Default: 4 times the ranks."
        ),
    ] = None
    visits: Annotated[
        int | None,
        typer.Option(
            metavar="V", min=1, max=64, help="Chunks of layers on each rank, for the interleaved schedule. Default: 2."
        ),
    ] = None
    checkpoint: Annotated[
        Literal["always", "except_last", "never"],
        typer.Option(
            metavar="MODE",
            help="Recompute activations: always, never, or except_last (for all but the last micro-batch).",
        ),
    ] = "except_last"


@dataclass(frozen=True)
class Timed(OptionSet):
    """What a micro-batch is, and what it runs on."""

    sequences: Annotated[int, typer.Option(metavar="N", min=1, max=_MOST_TOKENS, help="Sequences per micro-batch.")] = 1
    sequence_length: Annotated[
        int | None, typer.Option(metavar="L", min=1, help="Tokens of a sequence. Default: the model's longest.")
    ] = None
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Hardware of one rank: a100, h100, ...; cpu or cuda measures this machine; or "
            "compute=312T,bandwidth=2T,memory=80G. Its memory bounds the stages.",
        ),
    ] = "a100"
    efficiency: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0.001, max=1, help="Share of the hardware's peak FLOP/s that layers reach."),
    ] = 0.4

    def length(self, config: Decoder.Config) -> int:
        """Tokens of a sequence. Raises ConfigError where a micro-batch has too many."""
        length = self.sequence_length or config.max_positions
        if self.sequences * length > _MOST_TOKENS:
            raise ConfigError(
                f"{self.sequences} sequences of {length} tokens are more than {_MOST_TOKENS} in a micro-batch"
            )
        return length


SCHEDULED, TIMED = Scheduled(), Timed()


@takes_sets()
def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A training run, a saved model, a preset, or a Hugging Face folder."),
    ],
    ranks: Annotated[
        int, typer.Option(metavar="K", min=1, max=_MOST_RANKS, help="Number of ranks in the pipeline.")
    ] = 8,
    scheduled: Scheduled = SCHEDULED,
    timed: Timed = TIMED,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the step: .svg or .png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Plan the pipeline of a model: the quickest contiguous stages that fit in memory, the schedule, and a simulated step.

    Nothing runs: the time of a step is calculated from the operations of the layers and the speeds of hardware and links. A rank's memory
    has to hold its parameters with gradients and Adam's moments (16 bytes each), and estimated activations.
    """
    require("lm", *(["plots"] if picture is not None else []), by="anabranch cluster plan")
    if picture is not None:
        if picture.suffix.lower() not in (".svg", ".png"):
            raise ConfigError(f"--picture is {str(picture)!r}; its name must end with .svg or .png")
        check_apart([picture], [*_read_of(model), timed.hardware])
    from anabranch.cluster import plan as made_of
    from anabranch.lm.layers import layer_costs, uncut_groups

    config = config_of(model)
    length = timed.length(config)
    import torch

    device = read_hardware(timed.hardware, "float16")
    made = made_of(
        layer_costs(config, tokens=timed.sequences * length, sequence_length=length, dtype=torch.bfloat16),
        ranks=ranks,
        schedule_name=scheduled.schedule,
        micro_batches=scheduled.micro_batches,
        visits=scheduled.visits,
        checkpoint=scheduled.checkpoint,
        flops_s=device.compute * timed.efficiency,
        bytes_s=device.network_bandwidth or None,
        uncut=uncut_groups(config),
        cap_bytes=device.memory_bytes,
    )
    if picture is not None:
        title = f"{model}: {scheduled.schedule}, {ranks} ranks, {made.schedule.num_micro_batches} micro-batches"
        _draw(made, picture, title)
    told = {
        "model": model,
        "hardware": device.name,
        "efficiency": timed.efficiency,
        "peak_flops_s": device.compute,
        "flops_s": device.compute * timed.efficiency,
        "bytes_s": device.network_bandwidth or None,
        "memory_bytes": device.memory_bytes,
        **made.to_dict(),
    }
    if as_json:
        print_json(told)
        return
    _print(told)
    if made.schedule.num_clocks <= _MOST_CLOCKS:
        print()
        print_line(str(made.schedule))
    if picture is not None:
        fact("wrote", str(picture))


def config_of(model: str) -> Decoder.Config:
    """Of a preset, or of what there is at a path."""
    if not Path(model).exists():
        from anabranch import presets

        if model in presets.names():
            return presets.find(model)("tiny").model
    from anabranch.lm import load_config

    return load_config(model)


def _read_of(model: str) -> list[Path]:
    if not Path(model).is_dir():
        return [Path(model)]
    from anabranch.lm.folder import files_of

    return files_of(model)


def _draw(made: Plan, picture: Path, title: str) -> None:
    from anabranch.report.pipeline import pipeline_picture

    bars: list[dict[str, Any]] = made.timeline.to_dict()["bars"]
    is_svg = picture.suffix.lower() == ".svg"
    drawn = pipeline_picture(bars, num_stages=made.schedule.num_stages, title=title, is_svg=is_svg)
    data = drawn.encode() if isinstance(drawn, str) else drawn
    atomic_write(picture, lambda place: _put(place, data))


def _put(place: Path, data: bytes) -> None:
    place.write_bytes(data)


def _spans(rank: dict[str, Any]) -> str:
    """The first and the last layer of each chunk of a rank."""
    names = iter(rank["names"])
    chunks = [[next(names) for _ in range(first, last + 1)] for first, last in rank["layers"]]
    return " and ".join(chunk[0] if len(chunk) == 1 else f"{chunk[0]} to {chunk[-1]}" for chunk in chunks)


# Of the table: what stands above a column, and what it shows of a rank, which is what ``--json`` has of it.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "rank": lambda rank: str(rank["rank"]),
    "layers": _spans,
    "parameters\n(M)": lambda rank: f"{rank['parameters'] / 1e6:,.2f}",
    "with\nAdam": lambda rank: size(rank["state_bytes"]),
    "activa-\ntions": lambda rank: size(rank["activation_bytes"]),
    "forward\n(GFLOP)": lambda rank: f"{rank['flops'] / 1e9:,.2f}",
    "busy\n(ms)": lambda rank: f"{rank['busy_s'] * 1e3:,.3f}",
    "idle": lambda rank: f"{rank['idle']:.1%}",
    "receives\n(a micro-batch)": lambda rank: size(rank["receive_bytes"]),
}


def facts_of(told: dict[str, Any]) -> dict[str, str]:
    """What is said beside the table, all of which ``--json`` has."""
    order, ranks = told["schedule"], told["ranks"]
    visits = f", {order['visits']} visits" if order["visits"] > 1 else ""
    speed = f"{told['hardware']} at {told['efficiency']:.0%} of {told['peak_flops_s'] / 1e12:,.0f} TFLOP/s"
    layers = sum(len(rank["names"]) for rank in ranks)
    idle, alone = f"{told['idle']:.1%} idle", f"one rank {told['one_rank_s'] * 1e3:,.3f} ms"
    return {
        "model": f"{told['model']}   {layers} layers on {len(ranks)} ranks, each {speed}",
        "memory": f"{size(told['memory_bytes'])} of each rank, which bounds the stages",
        "table": f"{order['name']}   {order['micro_batches']} micro-batches{visits}, {order['clocks']} clocks",
        "step": f"{told['step_s'] * 1e3:,.3f} ms simulated, {idle}; {alone}",
        "gain": f"{told['speedup']:.2f} x one rank, of at most {len(ranks)}; at most {order['in_flight']} micro-batches in flight",
    }


def _print(told: dict[str, Any]) -> None:
    facts = facts_of(told)
    for name in ("model", "memory", "table"):
        fact(name, facts[name])
    table([*COLUMNS], [[show(rank) for show in COLUMNS.values()] for rank in told["ranks"]], text_columns=2)
    print()
    for name in ("step", "gain"):
        fact(name, facts[name])
