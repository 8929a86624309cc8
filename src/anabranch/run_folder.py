"""What kind of training run a folder holds, told without the libraries that trained it.

`anabranch.train.config` reads the whole config.
"""

from pathlib import Path
from typing import Any

from anabranch.errors import CheckpointError, DataError
from anabranch.files import read_json

__all__ = ["CONFIG_FILE", "SCHEMA", "read_run_table", "task_kind"]

SCHEMA = 1
CONFIG_FILE = "config.json"


def read_run_table(out: str | Path) -> dict[str, Any]:
    """The config of the run in ``out`` as a table, without its schema.

    Raises DataError if ``out`` holds no run, CheckpointError if its config is damaged or of a newer version.
    """
    path = Path(out) / CONFIG_FILE
    if not path.is_file():
        raise DataError(f"no training run in {out} (looked for {CONFIG_FILE})")
    table = read_json(path)
    schema = table.pop("schema", None)
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise CheckpointError(f"schema in {path} is {schema!r}; this version reads 1 to {SCHEMA}")
    return table


def task_kind(out: str | Path) -> str | None:
    """The registered name of the task whose run is in ``out``; None for a language model's, a task without a name, and no run."""
    if not (Path(out) / CONFIG_FILE).is_file():
        return None
    task = read_run_table(out).get("task")
    kind = task.get("kind") if isinstance(task, dict) else None
    return kind if isinstance(kind, str) else None
