"""``anabranch compare``: several designs at one budget, with paired seeds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.options import (
    AsJson,
    Assignments,
    Quiet,
    Texts,
    read_assignments,
    read_seeds,
    read_texts,
    use_granted_cores,
)
from anabranch.cli.output import fact, print_json, quantity, say, size, table, wrote
from anabranch.cli.study import print_left_out
from anabranch.errors import ConfigError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.studies.compare import Row


def compare(
    designs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DESIGN...",
            help='Presets, or TOML files that name their preset (preset = "moe"). The first is the baseline.',
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results; the same command continues there.")],
    group: Annotated[
        str | None,
        typer.Option(
            "--preset", metavar="GROUP", help="A ready-made list of designs: family (all designs that route tokens)."
        ),
    ] = None,
    data: Texts = None,
    seeds: Annotated[str, typer.Option(metavar="S", help="Paired seeds, e.g. 0,1 or 0-4.")] = "0,1,2",
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Optimizer steps of each run.")] = None,
    size_dial: Annotated[
        str | None,
        typer.Option("--size", metavar="SIZE", help="Size of the presets: tiny, small or base. Default: tiny."),
    ] = None,
    assignments: Assignments = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train several designs with the same budget, and show their differences with confidence intervals.

    With the same seed, all designs see the same text in the same order. Differences are paired over seeds, with 95% intervals.

    Example: anabranch compare moe rexmoe-open dense --out runs/compare --steps 300

    Text of your own, instead of the source of Python's standard library: --data my/texts
    """
    require("lm", "plots", by="anabranch compare")
    from anabranch import presets
    from anabranch.cli.runs import build_config, names_preset
    from anabranch.studies.compare import compare as run

    use_granted_cores()
    settings = read_texts(data) | read_assignments(assignments) | ({} if steps is None else {"train.steps": steps})
    configs = {}
    for design in [*(presets.group(group) if group else ()), *(designs or ())]:
        file = Path(design) if design.endswith(".toml") else None
        if file and not names_preset(file):
            raise ConfigError(
                f'{file} names no preset, so what it is compared with is not said; put preset = "moe", or another, at its top'
            )
        name = file.stem if file else design
        if name in configs:
            raise ConfigError(f"design {name!r} is named twice; give the second another file name")
        configs[name] = build_config(None if file else design, file, size_dial, settings)[1]
    rows, outcome = run(
        configs,
        out,
        seeds=read_seeds(seeds),
        progress=(lambda text: None) if quiet else (lambda text: say(f"{time.strftime('%H:%M:%S')}  {text}")),
    )
    if as_json:
        print_json(
            {
                "name": "compare",
                "folder": str(out),
                "baseline": next(iter(configs)),
                "config": dict(outcome.study.settings),
                "rows": [row.to_dict() for row in rows],
                "runs": outcome.to_dict()["runs"],
                "notes": outcome.notes,
            }
        )
        return
    budget = outcome.study.settings
    tokens = budget["steps"] * budget["batch_size"] * budget["sequence_length"]
    fact(
        "budget",
        f"{budget['steps']} steps, {quantity(tokens)} tokens a run, seeds {', '.join(map(str, outcome.results.seeds))}",
    )
    print()
    _print(rows, next(iter(configs)))
    print()
    print_left_out(outcome)
    wrote(
        f"{out}/compare{{.json, .png, .svg}}, {out}/compare-costs{{.png, .svg}} and one file a run in {out}/compare/",
        f"look at {out}/compare.png",
    )


def _print(rows: list[Row], baseline: str) -> None:
    headers = [
        "design",
        "bits/byte",
        f"difference\nto {baseline}",
        "95% interval",
        "parameters",
        "active",
        "FLOPs\n/token",
        "tokens/s",
        "memory",
        "MaxVio",
        "SRP",
    ]
    cells = []
    for row in rows:
        found, difference = row.metrics, row.difference
        known = difference is not None and difference.count
        interval = difference.interval if difference is not None else None
        cells.append(
            [
                row.design,
                f"{row.bits_per_byte.mean:.4f}",
                f"{difference.mean:+.4f}" if difference is not None and known else "",
                f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "",
                quantity(found["parameters"]),
                quantity(found["active_parameters"]),
                quantity(found["flops_per_token"]),
                quantity(found["tokens_per_second"]),
                size(found["peak_memory_bytes"]),
                f"{found['max_violation_layer']:.2f}" if "max_violation_layer" in found else "-",
                f"{found['srp']:.3f}" if "srp" in found else "-",
            ]
        )
    table(headers, cells)
