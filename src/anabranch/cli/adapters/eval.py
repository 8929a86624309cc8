"""``anabranch adapters eval``: rows of tasks measured on a model with an adapter, task by task."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from anabranch.cli.adapters.placing import first_of_each, put_adapter, telling_rows, template_of
from anabranch.cli.options import AsJson, Device, Dtype, Quiet, load, named_folder
from anabranch.cli.output import fact, print_json, table, visible
from anabranch.cli.progress import Progress
from anabranch.errors import ConfigError
from anabranch.extras import require


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base model of the adapter.")],
    adapter: Annotated[
        str | None,
        typer.Argument(
            metavar="[ADAPTER]",
            callback=named_folder,
            help="An adapter that peft or anabranch adapt saved, or a pool (a folder of such folders; arrow:POOL or "
            "phatgoose:POOL for one kind of router only). Default: none, the model alone.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="JSON lines with task, input and output. If some are marked as held out, only these are used.",
        ),
    ] = None,
    answers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Also generate an answer to each row, at most N tokens, and report ROUGE-L and exact matches.",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text around a prompt, as in training, or chat for the model's own form of a chat; \\n is a new line. Default: what the "
            "adapter learned, else {prompt}\\n.",
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option(metavar="N", min=1, help="Rows of each task. Default: all.")] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="L", min=2, help="Maximum number of tokens in a row, as in training.")
    ] = 512,
    batch_size: Annotated[int, typer.Option(metavar="B", min=1, help="Rows per batch.")] = 16,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model, with or without an adapter, on rows of tasks: the likelihood of the answers, and the model's own answers.

    Example: anabranch adapters eval SmolLM2-135M runs/mine/adapter --data rows.jsonl --answers 32
    """
    require("lm", by="anabranch adapters eval")
    from anabranch.adapters.adapt import measure_rows, read_rows
    from anabranch.adapters.tasks import goes_by_task, needs_task

    if data is None:
        raise ConfigError("there are no rows to measure; give a file with --data")
    written = template_of(template, adapter)
    found = read_rows(data)
    held_out = [row for row in found if row.is_held_out] or found
    some = held_out if rows is None else first_of_each(held_out, rows)
    base, tokenizer = load(model, dtype, device)
    pool = None if adapter is None else put_adapter(base, tokenizer, adapter)
    if pool is None and goes_by_task(base) and needs_task(base) and not all(row.task for row in some):
        bare = next(row for row in some if not row.task)
        raise ConfigError(f"{adapter} goes by task, and {bare.where} names none; give each row a task")
    with Progress(len(some), "row", quiet=quiet) as progress:
        scores = measure_rows(
            base,
            tokenizer,
            some,
            template=written,
            most_tokens=max_tokens,
            max_new_tokens=answers,
            batch_size=batch_size,
            telling=telling_rows(base, pool),
            on_rows=lambda done, total: progress.update(done, "measured"),
        )
    if as_json:
        told: dict[str, Any] = {"model": model, "adapter": adapter, "data": data, "answers": answers}
        by_task = {name: score.to_dict() for name, score in scores.by_task.items()}
        print_json({**told, **scores.all.to_dict(), "by_task": by_task})
        return
    fact("model", visible(model) if adapter is None else f"{visible(model)}   with {visible(adapter)}")
    fact("rows", f"{visible(data)}   {len(some)} of {len(found)}")
    columns = ["task", "nats/token", *(["ROUGE-L", "exact"] if answers else []), "rows"]
    named = [*((visible(name), score) for name, score in scores.by_task.items()), ("all", scores.all)]
    table(columns, [_line(name, score, answers) for name, score in named])


def _line(name: str, score: Any, answers: int | None) -> list[str]:
    own = [f"{score.rouge_l:.3f}", f"{score.exact:.3f}"] if answers else []
    return [name, f"{score.nats_per_token:.3f}", *own, str(score.rows)]
