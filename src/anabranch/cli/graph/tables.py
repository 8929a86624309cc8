"""Results in files: Parquet, CSV or JSON lines, whichever the name ends in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anabranch.errors import InputError

ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl")


def check_ending(path: Path | None, endings: tuple[str, ...] = ENDINGS) -> None:
    """Before the work. Raises InputError for a name that ends otherwise."""
    if path is not None and path.suffix not in endings:
        raise InputError(f"--out is {str(path)!r}; its name must end in {', '.join(endings)}")


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Columns of equal length, all or nothing. Raises InputError for an unknown ending, and as `atomic_file`."""
    check_ending(path)
    import pyarrow as pa
    from pyarrow import csv, parquet

    from anabranch.graph.beside import new_file

    table = pa.table(dict(columns))
    with new_file(path) as temporary:
        if path.suffix == ".parquet":
            parquet.write_table(table, temporary)
        elif path.suffix == ".jsonl":
            with open(temporary, "w", encoding="utf-8") as file:
                for batch in table.to_batches():
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())
        else:
            csv.write_csv(table, temporary, csv.WriteOptions(delimiter="," if path.suffix == ".csv" else "\t"))
