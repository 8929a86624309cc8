"""``anabranch adapters describe``: what an adapter's task is, beside the adapter, for pools that route by it."""

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.adapters.endpoints import KeyEnv, Writer, WriterModel, writer_of
from anabranch.cli.options import AsJson
from anabranch.cli.output import fact, print_json, visible, wrote
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart


def describe(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder of peft's with an adapter.")],
    instruction: Annotated[
        list[str] | None,
        typer.Option(
            "--instruction",
            metavar="TEXT",
            help="What its task is, in a sentence or two. Further ones are other wordings, by which a pool is calibrated.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Rows of its task as JSON lines: --writer makes an instruction of the first three."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="With --data: rows of this task alone.")] = None,
    writer: Writer = None,
    writer_model: WriterModel = None,
    key_env: KeyEnv = None,
    as_json: AsJson = False,
) -> None:
    """Write what an adapter's task is beside it (glider.json), said here, or by a model that is shown a few rows. Gates stay.

    Example: anabranch adapters describe pool/sql --instruction "Write SQL that answers a question about a table."
    """
    require("lm", by="anabranch adapters describe")
    from anabranch.adapters.adapt import read_rows
    from anabranch.adapters.glider import describe_expert, prompt_of

    if (instruction is None) == (data is None):
        raise ConfigError("say what the task is with --instruction, or give rows of it with --data; one of them")
    asked = writer_of(writer, writer_model, key_env)
    if data is None:
        for name, value in (("--task", task), ("--writer", writer), ("--key-env", key_env)):
            if value is not None:
                raise ConfigError(f"{name} is for instructions that are written of rows; give --data, or leave it out")
        texts = list(instruction or ())
    else:
        if asked is None:
            raise ConfigError(
                "rows are shown to a model that writes the instruction; name one with --writer and --writer-model"
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
