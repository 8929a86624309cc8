"""Super-NaturalInstructions as studies use it: 49 English tasks in 32 categories, of the project's data folder.

Wang et al. 2022, "Super-NaturalInstructions", arXiv 2204.07705. Rows were typed out from displayed text: look at what a figure rests on.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.adapters.adapt.rows import Row, read_rows
from anabranch.data.reading import read_bytes
from anabranch.files import parse_json, sha256_of
from anabranch.places import data_file

__all__ = ["FILE", "categories", "definitions", "digest", "rows_for_seed", "rows_of", "some_tasks", "write_task"]

FILE = "qa/superni_tasks.jsonl.gz"
_WHERE = "allenai/natural-instructions"


def digest() -> str:
    """Names the file by its content."""
    return sha256_of(_file())[:16]


def _file() -> Path:
    return data_file(FILE, _WHERE)


@cache
def _all() -> tuple[tuple[dict[str, Any], Row], ...]:
    lines = [line for line in read_bytes(_file()).decode("utf-8").split("\n") if line.strip()]
    return tuple(zip(map(parse_json, lines), read_rows(_file()), strict=True))


def rows_of(task: str, split: str) -> list[Row]:
    """Of one task: those to learn (``train``, with the two examples), or the held-out ones (``test``)."""
    wanted = ("train", "example") if split == "train" else (split,)
    return [row for _, row in _all() if row.task == task and row.split in wanted]


def rows_for_seed(task: str, split: str, count: int, seed: int) -> list[Row]:
    """``count`` rows of one task, others for each seed: the next ones of an order of all, behind whose end another order begins.

    So seeds 0, 1, ... have rows apart until all are had, and then such as another draw puts together; what is paired by seed is of the
    same rows. All rows where there are no more.
    """
    rows, found = rows_of(task, split), list[int]()
    place = seed * count
    while len(found) < min(count, len(rows)):
        turn, at = divmod(place, len(rows))
        order = np.random.default_rng([zlib.crc32(task.encode()), len(rows), turn]).permutation(len(rows))
        found += [int(order[at])] if order[at] not in found else []
        place += 1
    return [rows[number] for number in found]


def categories() -> Mapping[str, tuple[str, ...]]:
    """Tasks by category, all in the order of the file."""
    found: dict[str, list[str]] = {}
    for table, row in _all():
        own = found.setdefault(str(table["category"]), [])
        if row.task not in own:
            own.append(row.task)
    return {name: tuple(tasks) for name, tasks in found.items()}


def definitions() -> Mapping[str, str]:
    """What each task asks for."""
    return {row.task: str(table["definition"]) for table, row in _all()}


def some_tasks(pool: int, others: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tasks of a pool, others of the same categories): the first and the second task of categories that have two, then further firsts."""
    by_category = categories()
    several = [tasks for tasks in by_category.values() if len(tasks) > 1]
    single = [tasks[0] for tasks in by_category.values() if len(tasks) == 1]
    first = [tasks[0] for tasks in several] + single
    return tuple(first[:pool]), tuple(tasks[1] for tasks in several[: min(pool, others)])


def write_task(path: Path, rows: Sequence[Row]) -> Path:
    """A file that `anabranch.adapters.adapt` reads."""
    path.write_text(
        "".join(json.dumps({"task": row.task, "input": row.prompt, "output": row.answer}) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path
