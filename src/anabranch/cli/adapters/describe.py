"""``anabranch adapters describe``: what an adapter's task is, beside the adapter, for pools that route by it."""

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.adapters.endpoints import KeyEnv, Writer, WriterModel, writer_of
from anabranch.cli.options import AsJson, named_folder
from anabranch.cli.output import fact, print_json, visible, wrote
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart


def describe(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", callback=named_folder, help="An adapter in peft's format.")
    ],
    instruction: Annotated[
        list[str] | None,
        typer.Option(
            "--instruction",
            metavar="TEXT",
            help="The adapter's task in a sentence or two. If repeated, the others are alternative wordings that calibrate a "
            "pool.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Rows of its task as JSON lines; --writer makes an instruction from the first three."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="With --data: only rows of this task.")] = None,
    writer: Writer = None,
    writer_model: WriterModel = None,
    key_env: KeyEnv = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter's instruction into its folder (glider.json): your own text, or one that a model writes from a few rows. Gates are
    kept.

    Example: anabranch adapters describe pool/sql --instruction "Write SQL that answers a question about a table."
    """
    require("lm", by="anabranch adapters describe")
    from anabranch.adapters.adapt import read_rows
    from anabranch.adapters.glider import describe_expert, prompt_of

    if (instruction is None) == (data is None):
        raise ConfigError("describe the task with --instruction, or give rows of it with --data; only one of them")
    asked = writer_of(writer, writer_model, key_env)
    if data is None:
        for name, value in (("--task", task), ("--writer", writer), ("--key-env", key_env)):
            if value is not None:
                raise ConfigError(f"{name} is for instructions that are written of rows; give --data, or leave it out")
        texts = list(instruction or ())
    else:
        if asked is None:
            raise ConfigError(
                "a model has to write the instruction from the rows; name one with --writer and --writer-model"
            )
        check_apart([Path(adapter) / "glider.json"], [data])
        rows = [row for row in read_rows(data) if task is None or row.task == task]
        if not rows:
            raise ConfigError(f"--task is {task!r}, of which {data} has no rows")
        texts = [asked(prompt_of([(row.prompt, row.answer) for row in rows]))]
    describe_expert(adapter, instruction=texts)
    if as_json:
        print_json({"adapter": adapter, "instructions": texts})
        return
    for number, text in enumerate(texts):
        fact("task" if number == 0 else "wording", " ".join(visible(text).split()))
    wrote(f"{adapter}/glider.json", "anabranch adapters route POOL QUERY")
