"""``anabranch cluster elastic``: what a pipeline does after it lost ranks, and how long its steps take then."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.cluster.plan import config_of
from anabranch.cli.options import FLAG, AsJson
from anabranch.cli.output import fact, print_json, table
from anabranch.cli.plan import read_hardware
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.sizes import parse_bytes

if TYPE_CHECKING:
    from anabranch.cluster.elastic import Compared

_MOST_RANKS, _MOST_MICRO_BATCHES, _MOST_SAMPLES, _MOST_LAYERS = 1024, 1024, 2**20, 4096
_NAMES = {
    "elaswave": "ElasWave",
    "recycle": "ReCycle",
    "torchft": "TorchFT",
    "recycle-decoupled": "ReCycle, decoupled",
    "recycle-staggered": "ReCycle, staggered",
    "elaswave-decoupled": "ElasWave, decoupled",
}


def elastic(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A training run, a saved model, a preset, or a Hugging Face folder. Default: equal layers.",
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(metavar="D", min=1, max=_MOST_RANKS, help="Ranks per stage.")] = 8,
    stages: Annotated[int, typer.Option(metavar="P", min=1, max=_MOST_RANKS, help="Number of stages.")] = 4,
    lose: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE[:COUNT]",
            help="A stage that loses ranks. May be repeated. Default: the middle stage loses one.",
        ),
    ] = None,
    micro_batches: Annotated[
        int, typer.Option(metavar="M", min=1, max=_MOST_MICRO_BATCHES, help="Micro-batches per replica.")
    ] = 16,
    micro_batch: Annotated[
        int, typer.Option(metavar="N", min=1, max=_MOST_SAMPLES, help="Sequences per micro-batch.")
    ] = 4,
    layers: Annotated[
        int | None, typer.Option(metavar="L", min=1, max=_MOST_LAYERS, help="Number of equal layers. Default: 64.")
    ] = None,
    layer_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            min=0,
            max=1e9,
            help="Milliseconds of one equal layer, forward and backward, for one sequence. Default: 1.",
        ),
    ] = None,
    max_frequency: Annotated[
        float, typer.Option(metavar="X", min=1, max=10, help="Highest clock, relative to the normal one. Simulated.")
    ] = 1.0,
    power_save: Annotated[
        bool, typer.Option("--power-save", metavar=FLAG, help="Lower the clocks of stages that wait. Simulated.")
    ] = False,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bytes per second of a link in one direction, such as 50GB. Default: the hardware's; for equal layers, "
            "unlimited.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory of a rank for weights, gradients and optimizer state. Default: no limit."
        ),
    ] = None,
    decoupled: Annotated[
        bool,
        typer.Option(
            "--decoupled",
            metavar=FLAG,
            help="Also compare with weight gradients scheduled separately, and with ReCycle's optimizer step stage by stage.",
        ),
    ] = False,
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Hardware of one rank: a100, h100, ...; cpu or cuda measures this machine; or "
            "compute=312T,bandwidth=2T,memory=80G.",
        ),
    ] = "a100",
    efficiency: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0.001, max=1, help="Share of the hardware's peak FLOP/s that layers reach."),
    ] = 0.4,
    as_json: AsJson = False,
) -> None:
    """Plan how a pipeline goes on after it lost ranks, and compare it with ReCycle and TorchFT, by simulation.

    Samples are shared out again over the remaining ranks, layers move where that pays, and clocks are raised where that is allowed; the
    global batch stays the same. Nothing runs: operations are counted, and each rank is simulated.
    """
    if replicas * stages > _MOST_RANKS:
        raise ConfigError(
            f"--replicas {replicas} and --stages {stages} are {replicas * stages} ranks; at most {_MOST_RANKS}"
        )
    if model is None:
        layer_count = 64 if layers is None else layers
        work: dict[str, Any] = {"layer_costs": [(1.0 if layer_ms is None else layer_ms) * 1e-3] * layer_count}
        name, bytes_s = f"{layer_count} equal layers", None
        if memory is not None:
            raise ConfigError("--memory is of a MODEL: equal layers say nothing of theirs")
    else:
        given = {"--layers": layers, "--layer-ms": layer_ms}
        if wrong := [option for option, value in given.items() if value is not None]:
            raise ConfigError(f"{wrong[0]} is of equal layers; leave it out where there is a MODEL")
        name = model
        work, bytes_s = _counted(model, hardware, efficiency, memory)
    if bandwidth is not None:
        bytes_s = float(parse_bytes(bandwidth, "--bandwidth"))
        if not bytes_s:
            raise ConfigError("--bandwidth is 0; a link carries something")
    from anabranch.cluster.elastic import Policy, compare
    from anabranch.cluster.elastic.simulator import MORE_ARMS

    found = compare(
        replicas=replicas,
        stages=stages,
        micro_batches=micro_batches,
        micro_batch=micro_batch,
        lost=_lost(lose, replicas, stages),
        policy=Policy(max_frequency=max_frequency, power_save=power_save, bytes_s=bytes_s),
        also=MORE_ARMS if decoupled else (),
        **work,
    )
    if as_json:
        sizes = {"replicas": replicas, "stages": stages, "micro_batches": micro_batches, "micro_batch": micro_batch}
        print_json({"model": name, **sizes, **found.to_dict()})
        return
    fact("model", f"{name} on {stages} stages of {replicas} ranks, {micro_batches} micro-batches of {micro_batch}")
    _print(found, stages)


def _counted(model: str, hardware: str, efficiency: float, memory: str | None) -> tuple[dict[str, Any], float | None]:
    """Costs, sizes and sends of a model's layers, and what a link carries."""
    require("lm", by="anabranch cluster elastic MODEL")
    import torch

    from anabranch.cluster.elastic import Memory
    from anabranch.cluster.plans import BACKWARD_WORK
    from anabranch.lm.layers import layer_costs

    config = config_of(model)
    device = read_hardware(hardware, "float16")
    length = config.max_positions
    costs = layer_costs(config, tokens=length, sequence_length=length, dtype=torch.bfloat16)
    bytes_s = device.network_bandwidth or None
    seconds = [cost.flops * (1 + BACKWARD_WORK) / (device.compute * efficiency) for cost in costs]
    work: dict[str, Any] = {"layer_costs": seconds, "size_L": [cost.parameters for cost in costs]}
    if bytes_s is not None:
        work["send_L"] = [cost.output_bytes / bytes_s for cost in costs]
    if memory is not None:
        # Weights and gradients in bfloat16; a copy of the weights and two moments in float32.
        work["memory"] = Memory(
            tuple(4.0 * cost.parameters for cost in costs),
            tuple(12.0 * cost.parameters for cost in costs),
            float(parse_bytes(memory, "--memory")),
        )
    return work, bytes_s


def _lost(lose: list[str] | None, replicas: int, stages: int) -> list[int]:
    counts: dict[int, int] = {}
    for text in lose or [f"{stages // 2}"]:
        stage, _, count = text.partition(":")
        try:
            number, many = int(stage), int(count) if count else 1
        except ValueError:
            raise ConfigError(f"--lose is {text!r}; say a stage, or STAGE:COUNT, such as 3:2") from None
        if not 0 <= number < stages:
            raise ConfigError(f"--lose names stage {number}, and stages are 0 to {stages - 1}")
        if many < 1:
            raise ConfigError(f"--lose {text} loses {many} ranks; use at least 1")
        counts[number] = counts.get(number, 0) + many
        if counts[number] > replicas:
            raise ConfigError(f"--lose takes {counts[number]} ranks of stage {number}, which has {replicas}")
    if sum(counts.values()) >= replicas * stages:
        raise ConfigError("--lose takes every rank; one at least must be left")
    # Of other replicas in each stage, as losses that have nothing to do with each other are.
    return [stage * replicas + (stage + n) % replicas for stage, count in counts.items() for n in range(count)]


def _print(found: Compared, stages: int) -> None:
    made = found.plan
    fact("lost", f"{len(found.lost)} rank{'s' * (len(found.lost) > 1)}: {', '.join(map(str, found.lost))}")
    rows = []
    for number, (ranks, part) in enumerate(zip(made.layout.grid.stages, made.layout.parts, strict=True)):
        samples = [sum(map(len, made.samples_of(rank))) for rank in ranks]
        rows.append(
            [
                str(number),
                str(len(ranks)),
                f"{part.start} to {part.stop - 1}",
                f"{min(samples)} to {max(samples)}" if min(samples) < max(samples) else str(samples[0]),
                f"{made.frequency_P[number]:.2f}",
                f"{max(made.timed.busy[rank] for rank in ranks) * 1e3:,.1f}",
                str(max(made.timed.in_flight(rank) for rank in ranks)),
            ]
        )
    table(["stage", "ranks", "layers", "samples\nof a rank", "clock", "busy\n(ms)", "in\nflight"], rows, text_columns=1)
    print()
    fact("order", f"{made.schedule_name}, {made.timed.idle:.1%} idle; layers {'move' if made.moves_layers else 'stay'}")
    fact("before", f"{found.whole_s * 1e3:,.1f} ms a step")
    for arm, taken in found.step_s.items():
        said = "cannot go on" if math.isinf(taken) else f"{taken * 1e3:,.1f} ms a step"
        ratio = found.ratio(arm)
        more = "" if arm == "elaswave" or math.isinf(taken) else f", ours {ratio:.3f} x the throughput"
        fact(_NAMES[arm], said + more)
    for warning in made.warnings:
        fact("note", warning)
