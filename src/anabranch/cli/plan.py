"""``anabranch plan``: what a model can reach on some hardware, and the pipeline that comes near it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.option_sets import OptionSet, takes_sets
from anabranch.cli.options import AsJson, read_assignments
from anabranch.cli.output import fact, print_json, say, size, table
from anabranch.errors import ConfigError
from anabranch.files import check_apart, parse_json

if TYPE_CHECKING:
    from anabranch.serving.planning.cost import Estimate
    from anabranch.serving.planning.hardware import Hardware
    from anabranch.serving.planning.interference import ShareTable
    from anabranch.serving.planning.search import Pipeline
    from anabranch.serving.planning.shape import ModelShape

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}
PROMPT, OUTPUT = 512, 1024
DTYPE = "float16"
POWERS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
FIELDS = {
    "compute": "compute",
    "bandwidth": "memory_bandwidth",
    "memory": "memory_bytes",
    "network": "network_bandwidth",
}


@dataclass(frozen=True)
class Held(OptionSet):
    """How a server would hold the model."""

    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Instead of speed: show how serve --memory SIZE (such as 8GiB) would hold the model. No weights are read.",
        ),
    ] = None
    expert_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="With --memory: the same option of serve (engine.expert_budget).")
    ] = None
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="With --memory: int8, int4, stored or none, the same option of serve (engine.quantize).",
        ),
    ] = None
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="With --memory: the same option of serve, e.g. --set engine.max_seqs=4. May be repeated.",
        ),
    ] = None

    def said(self) -> dict[str, Any]:
        """What is said that goes with a limit of memory alone, by the names of options."""
        return {"--expert-budget": self.expert_budget, "--quantize": self.quantize, "--set": self.assignments}


@dataclass(frozen=True)
class Asked(OptionSet):
    """What an iteration works on."""

    prompt: Annotated[float, typer.Option(metavar="TOKENS", min=1, help="Average number of tokens in a prompt.")] = (
        PROMPT
    )
    output: Annotated[float, typer.Option(metavar="TOKENS", min=1, help="Average number of tokens in an answer.")] = (
        OUTPUT
    )
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            min=1,
            help="Tokens per iteration. Default: the largest power of two for which memory suffices.",
        ),
    ] = None

    def said(self) -> dict[str, bool]:
        """Whether each is another than the usual, by the names of options."""
        return {
            "--prompt": self.prompt != PROMPT,
            "--output": self.output != OUTPUT,
            "--batch": self.batch is not None,
        }


@dataclass(frozen=True)
class Files(OptionSet):
    """Files that are read and written."""

    table_file: Annotated[
        Path | None,
        typer.Option(
            "--shares",
            metavar="FILE",
            help="JSON table of the performance P of an operation that gets a share R. Default: the paper's values; with "
            "--hardware cpu, measured.",
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Pipeline file: read if it is for this model, hardware and lengths, else written."
        ),
    ] = None
    save_hardware: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the profile of the hardware as JSON, for --hardware.")
    ] = None
    gantt: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the pipeline as a picture (SVG).")] = None

    def said(self) -> dict[str, bool]:
        """Whether each is given, by the names of options."""
        return {
            "--shares": self.table_file is not None,
            "--out": self.out is not None,
            "--save-hardware": self.save_hardware is not None,
            "--gantt": self.gantt is not None,
        }


HELD, ASKED, FILES = Held(), Asked(), Files()


@takes_sets()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model, a preset, or a published one (llama-2-70b). Without it, published ones and hardware are listed.",
        ),
    ] = None,
    held: Held = HELD,
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="a100, h100, ...; cpu or cuda measures this machine; a .json profile; or compute=312T,bandwidth=2T,memory=80G.",
        ),
    ] = "cpu",
    devices: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of tensor-parallel devices. Default: as many as make the weights a quarter of their memory.",
        ),
    ] = None,
    asked: Asked = ASKED,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="Type of the weights: float32, bfloat16, float16, int8, int4.")
    ] = DTYPE,
    search: Annotated[
        bool, typer.Option("--search", metavar=" ", help="Search the best pipeline of nano-batches.")
    ] = False,
    budget: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Time limit of the search.")] = 60.0,
    files: Files = FILES,
    as_json: AsJson = False,
) -> None:
    """Estimate how fast a model can be on given hardware, or how it fits into a memory limit (--memory).

    For speed it shows the bottleneck, tokens per second, and the time of each operation, by NanoFlow's formulas (arXiv 2408.12757).
    --search looks for the order and the shares in which operations run at the same time.
    """
    if held.memory is not None:
        others = {
            "--hardware": hardware != "cpu",
            "--devices": devices is not None,
            **asked.said(),
            "--search": search,
            **files.said(),
        }
        given = {
            "engine.expert_budget": held.expert_budget,
            "engine.quantize": held.quantize,
            **_weights(dtype, held.quantize),
        }
        settings = {path: value for path, value in given.items() if value is not None} | read_assignments(
            held.assignments
        )
        _plan_memory(model, held.memory, settings, [name for name, is_given in others.items() if is_given], as_json)
        return
    if said := [name for name, value in held.said().items() if value]:
        raise ConfigError(f"{said[0]} is only used with --memory SIZE; give that too, or leave it out")
    from anabranch.serving.planning.cost import Workload, estimate, fitting_devices, largest_batch

    if model is None:
        _list_known(as_json)
        return
    if dtype not in BYTES:
        raise ConfigError(f"--dtype is {dtype!r}; use one of {', '.join(BYTES)}")
    check_apart([files.out, files.save_hardware, files.gantt], [*_read_of(model), hardware, files.table_file])
    shape = _shape(model, BYTES[dtype])
    device = read_hardware(hardware, dtype, devices or 1)
    count = devices or (fitting_devices(shape, device) if device.network_bandwidth else 1)
    device = device.replace(num_devices=count)
    tokens = asked.batch or largest_batch(shape, device, asked.prompt, asked.output)
    workload = Workload(prompt=asked.prompt, output=asked.output, dense_batch=tokens)
    found = estimate(shape, device, workload)
    if files.save_hardware is not None:
        device.save(files.save_hardware)
    wants_pipeline = search or files.out is not None or files.gantt is not None
    shares = _shares(files.table_file, hardware) if wants_pipeline else None
    pipeline = _pipeline(found, budget, shares, files.out) if shares is not None else None
    if pipeline is not None and files.gantt is not None:
        from anabranch.serving.planning.simulate import save_gantt

        save_gantt(pipeline.timeline(shares), files.gantt)
    if as_json:
        print_json({**describe(found), **({"pipeline": pipeline.to_dict()} if pipeline else {})})
        return
    _print(found)
    if pipeline is not None:
        _print_pipeline(pipeline, found)
    for path in (files.save_hardware, files.out, files.gantt):
        if path is not None:
            fact("wrote", str(path))


def _weights(dtype: str, quantize: str | None) -> dict[str, str]:
    """What ``--dtype`` says of an engine: a type, or bits. Raises ConfigError if ``--quantize`` says others."""
    if dtype == DTYPE:
        return {}
    if dtype not in ("int8", "int4"):
        return {"engine.dtype": dtype}
    if quantize not in (None, dtype):
        raise ConfigError(f"--dtype is {dtype} and --quantize is {quantize}; leave one of them out")
    return {"engine.quantize": dtype}


def _plan_memory(model: str | None, memory: str, settings: dict[str, Any], others: list[str], as_json: bool) -> None:
    """The plan of a server's memory. Raises ConfigError for ``others``, options that say nothing of it, if there are any."""
    from anabranch.cli.memory import show

    if model is None:
        raise ConfigError(f"--memory is {memory}, but no model is given; name the model whose memory is to be planned")
    if others:
        raise ConfigError(
            f"--memory plans what one engine holds, which {others[0]} says nothing of; leave one of them out"
        )
    if code := show({"engine.model": model, "engine.memory": memory, **settings}, as_json):
        raise typer.Exit(code)


def _read_of(model: str) -> list[Path]:
    if not Path(model).is_dir():
        return [Path(model)]
    from anabranch.lm.folder import files_of

    return files_of(model)


def describe(found: Estimate) -> dict[str, Any]:
    """An estimate, JSON-ready."""
    hardware, workload = found.hardware, found.workload
    return {
        "model": {
            "name": found.model.name,
            "parameters": found.model.parameters,
            "active_parameters": found.model.active_parameters,
            "weights_bytes": found.model.weights_bytes,
            "kv_bytes_per_token": found.model.kv_bytes_per_token,
        },
        "hardware": hardware.to_dict(),
        "workload": {"prompt": workload.prompt, "output": workload.output, "dense_batch": workload.dense_batch},
        "t_mem_s": found.t_mem_s,
        "t_compute_s": found.t_compute_s,
        "t_net_s": found.t_net_s,
        "t_r": found.t_r,
        "bound": found.bound,
        "optimal_tokens_s": found.optimal_tokens_s,
        "optimal_tokens_s_per_device": found.optimal_per_device,
        "kv_tokens": found.kv_tokens,
        "fits_batch": found.fits_batch,
        "operations": [
            {
                "name": op.name,
                "resource": op.resource,
                "gflop": op.flops / 1e9,
                "gbyte": op.bytes / 1e9,
                "network_gbyte": op.network_bytes / 1e9,
                "compute_ms": op.compute_s * 1e3,
                "memory_ms": op.memory_s * 1e3,
                "network_ms": op.network_s * 1e3,
                "expected_ms": op.duration_s * 1e3,
            }
            for op in found.operations
        ],
    }


def read_hardware(text: str, dtype: str = "float16", devices: int = 1) -> Hardware:
    """A profile by name, file, measurement (of so many devices) or numbers. Raises ConfigError for anything else."""
    from anabranch.serving.planning.hardware import Hardware, find_hardware

    if text in ("cpu", "cuda"):
        import torch

        from anabranch.serving.planning.measure import measure

        say(f"measuring {text} ...")
        return measure(
            text,
            num_devices=devices,
            dtype=getattr(torch, dtype if dtype in ("float32", "bfloat16", "float16") and text != "cpu" else "float32"),
        )
    if "=" not in text:
        return find_hardware(text)
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        match = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)([kMGTP]?)", number)
        if name not in FIELDS or match is None:
            raise ConfigError(
                f"--hardware has {part.strip()!r}; write {', '.join(FIELDS)} as numbers, e.g. compute=312T"
            )
        values[FIELDS[name]] = float(match[1]) * POWERS[match[2]]
    missing = [name for name in ("compute", "bandwidth", "memory") if FIELDS[name] not in values]
    if missing:
        raise ConfigError(f"--hardware has no {missing[0]}; it needs compute, bandwidth and memory")
    return Hardware(name="device", **values)


def _shape(model: str, weight_bytes: float) -> ModelShape:
    """A model's shape: a published name, else what ``anabranch info`` takes."""
    import dataclasses

    from anabranch.serving.planning.shape import PUBLISHED, find_shape, shape_of

    # Keys, values and activations are not packed below 16 bits.
    cached = max(weight_bytes, 2.0)
    if model in PUBLISHED:
        return dataclasses.replace(
            find_shape(model), weight_bytes=weight_bytes, kv_bytes=cached, activation_bytes=cached
        )
    if not Path(model).exists():
        from anabranch import presets

        if model in presets.names():
            return shape_of(presets.find(model)("tiny").model, model, weight_bytes=weight_bytes, kv_bytes=cached)
        if "/" not in model:
            import difflib

            known = [*PUBLISHED, *presets.names()]
            near = difflib.get_close_matches(model.lower(), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "anabranch plan lists what is known"
            raise ConfigError(f"{model!r} is not a model, a preset or a published name; {hint}")
    from anabranch.lm import load_config

    return shape_of(load_config(model), Path(model).name, weight_bytes=weight_bytes, kv_bytes=cached)


def _shares(path: Path | None, hardware: str) -> ShareTable:
    """A table from a file, of this machine's CPU, or the paper's."""

    from anabranch.errors import DataError
    from anabranch.serving.planning.interference import PAPER_TABLE, ShareTable

    if path is None and hardware == "cpu":
        from anabranch.serving.planning.measure import measure_shares

        say("measuring how operations slow each other ...")
        return measure_shares()
    if path is None:
        return PAPER_TABLE
    try:
        return ShareTable.from_dict(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DataError(f"{path} is not a table of shares: {error}") from None


def _pipeline(found: Estimate, budget: float, shares: ShareTable, out: Path | None) -> Pipeline:
    from anabranch.serving.planning.search import load_pipeline, search

    if out is not None:
        known = load_pipeline(out, found.model, found.hardware, found.workload, shares)
        if known is not None:
            return known
    made = search(found.model, found.hardware, found.workload, table=shares, budget_s=budget)
    if out is not None:
        made.save(out)
    return made


def _print(found: Estimate) -> None:
    model, hardware, workload = found.model, found.hardware, found.workload
    number = f"{hardware.num_devices} x {hardware.name}" if hardware.num_devices > 1 else hardware.name
    sizes = f"{model.parameters / 1e9:.3g} B parameters, {model.active_parameters / 1e9:.3g} B active"
    fact("model", f"{model.name}   {sizes}, {size(model.weights_bytes)}")
    speeds = f"{hardware.best_compute / 1e12:.4g} TFLOP/s, {size(hardware.memory_bandwidth)}/s"
    fact("on", f"{number}   {speeds}, {size(hardware.memory_bytes)} each")
    lengths = f"{workload.prompt:g} tokens in, {workload.output:g} out"
    fact("load", f"{lengths}, {workload.dense_batch} an iteration")
    bounds = (("memory", found.t_mem_s), ("compute", found.t_compute_s), ("network", found.t_net_s))
    parts = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in bounds)
    fact("bound", f"{found.bound}   T_R {found.t_r:.3f}   {parts}")
    fact("optimum", f"{found.optimal_tokens_s:,.0f} tokens/s, {found.optimal_per_device:,.0f} of each device")
    short = "" if found.fits_batch else "; too few for this batch"
    fact("cache", f"{found.kv_tokens:,} tokens fit, {size(model.kv_bytes_per_token)} each{short}")
    print()
    total = [0.0] * 4
    rows = []
    for op in found.operations:
        times = [op.compute_s, op.memory_s, op.network_s, op.duration_s]
        total = [one + other for one, other in zip(total, times, strict=True)]
        work = [f"{op.flops / 1e9:,.1f}", f"{op.bytes / 1e9:,.1f}", f"{op.network_bytes / 1e9:,.1f}"]
        rows.append([op.name, op.resource, *work, *(f"{seconds * 1e3:.2f}" for seconds in times)])
    rows.append(["total", "", "", "", "", *(f"{seconds * 1e3:.2f}" for seconds in total)])
    headers = [
        "operation",
        "bound by",
        "GFLOP",
        "GB",
        "net GB",
        "compute\n(ms)",
        "memory\n(ms)",
        "network\n(ms)",
        "expected\n(ms)",
    ]
    table(headers, rows, text_columns=2)
    if not found.pays:
        print()
        fact(
            "advice",
            f"memory is the bottleneck (T_R, its time over that of computing, is {found.t_r:.2f}), so splitting batches gains "
            "nothing; asynchronous scheduling does",
        )


def _print_pipeline(pipeline: Pipeline, found: Estimate) -> None:
    ops = pipeline.schedule.graph.ops
    shares = pipeline.schedule.shares or (1.0,) * len(ops)
    layers = found.model.num_layers
    print()
    rows = [
        [
            ops[number].name,
            ops[number].resource,
            f"{ops[number].start}-{ops[number].end}",
            f"{shares[number]:.1f}",
            f"{ops[number].duration_s * 1e6:.0f}",
        ]
        for number in pipeline.schedule.order
    ]
    table(["start order", "bound by", "tokens", "share", "alone\n(us)"], rows, text_columns=2)
    print()
    rate = found.workload.dense_batch / (pipeline.period_s * layers)
    fact(
        "pipeline",
        f"  {pipeline.speedup:.3f} x one after the other, {pipeline.sequential_s / pipeline.split_s:.3f} x if only split",
    )
    fact("reaches", f"{rate:,.0f} tokens/s, {rate / found.optimal_tokens_s:.0%} of the optimum (simulated)")


def _list_known(as_json: bool) -> None:
    from anabranch.serving.planning.hardware import PROFILES
    from anabranch.serving.planning.shape import PUBLISHED

    if as_json:
        models = {
            name: {"parameters": shape.parameters, "active_parameters": shape.active_parameters}
            for name, shape in PUBLISHED.items()
        }
        print_json({"models": models, "hardware": {name: device.to_dict() for name, device in PROFILES.items()}})
        return
    rows = [
        [name, f"{shape.parameters / 1e9:.3g} B", f"{shape.active_parameters / 1e9:.3g} B"]
        for name, shape in PUBLISHED.items()
    ]
    table(["model", "parameters", "active"], rows)
    print()
    rows = [
        [
            name,
            f"{device.memory_bytes / 1e9:.0f}",
            f"{device.memory_bandwidth / 1e9:,.0f}",
            f"{device.compute / 1e12:,.0f}",
            f"{device.network_bandwidth / 1e9:.0f}",
        ]
        for name, device in PROFILES.items()
    ]
    table(["hardware", "GB", "GB/s", "TFLOP/s", "link GB/s"], rows)
    print()
    fact("next", "anabranch plan llama-2-70b --hardware a100 --search")
