"""``anabranch adapters export``: a mixture with fixed weights as one plain LoRA, held against the mixture itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.adapters.merge import read_weights
from anabranch.cli.adapters.placing import check_no_adapter, note_of, noted, passes_of, template_of
from anabranch.cli.options import FLAG, AsJson, Device, Dtype, Quiet, named_folder, read_device, read_dtype
from anabranch.cli.output import fact, print_json, quantity, shell_word, size, wrote
from anabranch.errors import ConfigError, DataError
from anabranch.extras import require
from anabranch.files import check_apart

# Of a task, to see how it uses the experts of a mixture.
_ROWS = 32


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="The base model of the adapters, or a saved model that contains adapters."
        ),
    ],
    out: Annotated[
        str,
        typer.Option("--out", "-o", metavar="DIR", help="The new folder; an existing adapter is not replaced."),
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER...",
            callback=named_folder,
            help="Adapters in peft's format, or one of anabranch adapt. Default: the adapters in the model.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="Factor of each adapter. Default: 1 each."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            min=1,
            help="Approximate by an adapter of this rank. Default: the sum of all ranks, which is exact.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="For an ADAPTER that routes by task (poly, mhr): the task to export. For a mixture (dynmole, lora_mixer): the task of "
            "--data whose rows say how much of each expert is exported.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="For a mixture and --task: rows of tasks as JSON lines; the first 32 of the task are run.",
        ),
    ] = None,
    average: Annotated[
        bool,
        typer.Option(
            "--average",
            metavar=FLAG,
            help="For such an ADAPTER or a mixture: export the average of all skills or experts.",
        ),
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a mixture of adapters as one plain LoRA that peft and other servers can load, and report how its logits differ from the
    mixture's.

    The model runs twice on random tokens: with the original adapters and with the exported one.

    Example: anabranch adapters export SmolLM2-135M french-lora sql-lora --weights 0.5,0.25 --out both
    """
    require("lm", by="anabranch adapters export")
    from anabranch.lm import load_model
    from anabranch.lm.folder import files_of

    folders = adapters or []
    numbers = [1.0] * len(folders) if weights is None else read_weights(weights, len(folders))
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ConfigError(f"{twice} is given twice; give it once, with the sum of its weights")
    if rank is not None and not folders:
        raise ConfigError(f"--rank is {rank}, and there is no ADAPTER whose mixture could be made one of that rank")
    check_apart([out], [*folders, *filter(None, (data,)), *(files_of(model) if Path(model).is_dir() else [model])])
    check_no_adapter(out)
    template = note_of(folders)
    base, tokenizer = load_model(model, dtype=read_dtype(dtype), device=read_device(device))
    from anabranch.adapters import export_mixture, read_peft, save_peft
    from anabranch.adapters.export_routed import export_task
    from anabranch.adapters.own_folder import is_own

    told: dict[str, object] = {"folder": out, "model": model, "adapters": folders, "weights": numbers}
    routed = [folder for folder in folders if is_own(folder)]
    if routed or task is not None or average or data is not None:
        if len(folders) != 1 or not routed or rank is not None or weights is not None:
            raise ConfigError(
                "--task, --data and --average are for one ADAPTER of anabranch adapt that routes, alone and without --weights and --rank"
            )
        rows = None if data is None else _rows_of(base, tokenizer, data, task, folders[0])
        with noted(out, template) as place:
            told |= export_task(place, base, folders[0], task, is_average=average, rows=rows)
        made = read_peft(out)
    elif folders:
        with noted(out, template) as place:
            done = export_mixture(place, base, dict(zip(folders, numbers, strict=True)), rank=rank)
        made = done.made.adapter
        told |= {"error": done.made.error, "difference": done.difference, "greatest_logit": done.greatest}
    else:
        save_peft(out, base)
        made = read_peft(out)
    num_bytes = sum(path.stat().st_size for path in Path(out).iterdir())
    ranks = sorted({pair.rank for pair in made.pairs.values()})
    if as_json:
        print_json(
            {
                **told,
                "layers": len(made.pairs),
                "ranks": ranks,
                "parameters": made.num_parameters,
                "size_bytes": num_bytes,
            }
        )
    elif not quiet:
        of_rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        fact("adapter", f"{len(made.pairs)} layers, {of_rank}, {quantity(made.num_parameters)} parameters")
        if folders:
            fact(
                "logits",
                f"differ from the mixture's by at most {told['difference']:.2g}   (the largest is {told['greatest_logit']:.3g})",
            )
        wrote(f"{out}   {size(num_bytes)}", f"anabranch eval {shell_word(model)} --adapter {shell_word(out)}")


def _rows_of(base: Any, tokenizer: Any, data: str, task: str | None, adapter: str) -> Iterator[tuple[Any, Any]]:
    """Passes over the first rows of a task."""
    from anabranch.adapters.adapt.rows import read_rows

    if not task:
        raise ConfigError("--data has rows of tasks; name the one that is exported with --task")
    rows = [row for row in read_rows(data) if row.task == task][:_ROWS]
    if not rows:
        raise DataError(f"{data} has no row of task {task!r}")
    if tokenizer is None:
        raise DataError("the model has no tokenizer, so rows cannot be read")
    passes = passes_of(base, tokenizer, rows, [task], None, base.config.max_positions, template_of(None, adapter))
    return ((token_BL, mask_BL) for token_BL, mask_BL, _ in passes)
