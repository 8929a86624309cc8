"""Recorded outcomes as CSV, with a mapping that says which column is what.

    Columns.parse("query=prompt,task=subject,score:small=small_correct,score:large=large_correct")

Without a mapping the header is read as people write it: a column ``query``, ``prompt`` or ``question``; ``task``, ``subject``,
``category`` or ``eval_name``; and of each model a column of scores ``NAME``, ``score:NAME`` or ``NAME_correct`` (numbers, or true and
false), with ``cost:NAME`` or ``NAME|total_cost`` and ``answer:NAME``, ``NAME_response`` or ``NAME|model_response`` where they are there.
So RouteLLM's files of two models and RouterBench's table load as they are. Which columns were read, and which were left out and why, is
kept (`Reading`); a cell that is no number, in a column that is to hold numbers, is an error that names file, line and column.
"""

import csv
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError, DataError
from anabranch.routers.contract.dataset import Reading, Recorded
from anabranch.routers.contract.query import Model
from anabranch.routers.data.header import guess
from anabranch.routers.data.table import PARTS, Row, gather, number
from anabranch.text_lines import read_lines

_TRUTH = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
_UNKNOWN = ("", "nan", "none", "null", "na")

# As numbers are written in such files, and as some write them otherwise: what is meant as one must not take a model away without a word.
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?inf(?:inity)?", re.ASCII)
_MEANT = re.compile(r"[+-]?(?:[\d_]+[.,]?[\d_]*|[.,]\d+)(?:e[+-]?\d+)?\s*%?")

# Likewise, but found among words as well: a column is of numbers where most of its cells are such.
_ODD = re.compile(r"[+-]?0[xbo][0-9a-f]+|\d+\s*/\s*\d+")
_HINT = ". If the column holds something else, say which columns count, such as query=prompt,score:small=small_correct (--columns)"


class _CellError(DataError):
    """A cell that is to hold a number and does not."""


@configclass
class Columns(Config):
    """Which column is what. Each table goes from a model's name to a column.

    Attributes:
        query: the column of texts.
        task: of tasks; None if there is none.
        score, cost, latency, answer: of what each model's answer was worth, cost (dollars), took (seconds), said.
        prompt, completion: of token counts.
    """

    query: str
    score: dict[str, str]
    task: str | None = None
    cost: dict[str, str] = Field(default_factory=dict)
    prompt: dict[str, str] = Field(default_factory=dict)
    completion: dict[str, str] = Field(default_factory=dict)
    latency: dict[str, str] = Field(default_factory=dict)
    answer: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Columns":
        """From ``query=COLUMN,task=COLUMN,score:MODEL=COLUMN,...``. Raises ConfigError for anything else."""
        fields: dict[str, object] = {}
        tables: dict[str, dict[str, str]] = {part: {} for part in (*PARTS, "answer")}
        for item in filter(None, (part.strip() for part in text.split(","))):
            left, separator, column = (part.strip() for part in item.rpartition("="))
            part, _, model = left.partition(":")
            if separator and left in ("query", "task"):
                fields[left] = column
            elif separator and part in tables and model:
                tables[part][model] = column
            else:
                raise ConfigError(
                    f"columns have {item!r}; write query=COLUMN, task=COLUMN and score:MODEL=COLUMN "
                    f"(or {', '.join(f'{name}:' for name in tables if name != 'score')}), with commas between"
                )
        if "query" not in fields or not tables["score"]:
            raise ConfigError("columns must name at least query=COLUMN and one score:MODEL=COLUMN")
        return cls(**fields, **tables)  # type: ignore[arg-type]

    @classmethod
    def guess(cls, header: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> "Columns":
        """From the names in the header, and from which columns hold numbers. Raises DataError if that is not clear."""
        query, task, tables, _ = guess(header, rows, path, _hold_numbers)
        return cls(query=query, task=task, **tables)


def load_csv(
    path: str | Path, columns: Columns | None = None, *, prices: Mapping[str, Model] | None = None
) -> Recorded:
    """Outcomes from a CSV file (.tsv is split at tabs), plain or gzipped.

    Args:
        path: of the file; its first line names the columns.
        columns: which is what; None guesses from their names.
        prices: models with prices, for costs where the rows hold none.

    Raises DataError that names file and line.
    """
    path = Path(path)
    header, lines, rows = _read(path)
    is_guessed = columns is None
    if columns is None:
        query, task, tables, left = guess(header, rows, path, _hold_numbers)
        columns = Columns(query=query, task=task, **tables)
    else:
        left = dict.fromkeys((name for name in header if name not in _named(columns)), "not named by the mapping")
    place = {name: column for column, name in enumerate(header)}
    missing = [name for name in _named(columns) if name not in place]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(header)}")
    made = []
    for line, cells in zip(lines, rows, strict=True):
        try:
            made.append(replace(_row(cells, columns, place), line=line))
        except DataError as error:
            hint = _HINT if is_guessed and isinstance(error, _CellError) else ""
            raise DataError(f"{path}, line {line}: {error}{hint}") from None
    parts = {part: dict(getattr(columns, part)) for part in (*PARTS, "answer")}
    reading = Reading(query=columns.query, task=columns.task, columns=parts, left_out=left)
    return replace(gather(made, path, prices), reading=reading)


def _named(columns: Columns) -> list[str]:
    """All columns that are read."""
    named = [columns.query, *filter(None, [columns.task])]
    return named + [name for part in (*PARTS, "answer") for name in getattr(columns, part).values()]


def _read(path: Path, *, is_spaced: bool = False) -> tuple[list[str], list[int], list[list[str]]]:
    """Header, line numbers and cells of the rows, blank lines left out.

    Args:
        path: of the file.
        is_spaced: spaces behind a comma belong to no cell. Seen by the header.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    tab = "\t" if ".tsv" in path.name.lower() else ","
    reader = csv.reader((text for _, text in read_lines(path)), delimiter=tab, strict=True, skipinitialspace=is_spaced)
    lines, rows = [], []
    try:
        header = next(reader, None)
        if header is not None and not is_spaced and any(name.startswith(" ") for name in header[1:]):
            return _read(path, is_spaced=True)
        header = None if header is None else [name.strip() for name in header]
        for cells in reader:
            if not cells:
                continue
            if header is not None and len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells; the header has {len(header)} columns"
                )
            lines.append(reader.line_num)
            rows.append(cells)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    if not header or not rows:
        raise DataError(f"{path} holds no rows; it needs a line that names the columns, and one for each query")
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has the column {twice!r} twice")
    return header, lines, rows


def _hold_numbers(cells: Sequence[str]) -> bool:
    """Also of infinities, percentages and the like, which are no scores: a column that holds one is meant to hold numbers."""
    texts = [cell.strip().lower() for cell in cells]
    if any(text in _TRUTH or _NUMBER.fullmatch(text) or _MEANT.fullmatch(text) for text in texts):
        return True
    said = [text for text in texts if text not in _UNKNOWN]
    return 2 * sum(_ODD.fullmatch(text) is not None for text in said) > len(said)


def _value(cell: str, what: str) -> float | None:
    text = cell.strip().lower()
    if text in _UNKNOWN:
        return None
    if text in _TRUTH:
        return _TRUTH[text]
    if not _NUMBER.fullmatch(text):
        raise _CellError(
            f"{what} is {cell!r}; it must be a number such as 0.5, true or false, or empty if it is not known"
        )
    return number(float(text), what)


def _row(cells: list[str], columns: Columns, place: dict[str, int]) -> Row:
    query = cells[place[columns.query]]
    if not query.strip():
        raise DataError(f"the column {columns.query!r} is empty; a query must be a text")
    task = (cells[place[columns.task]] or None) if columns.task else None
    values: dict[str, dict[str, float | None]] = {}
    for part in PARTS:
        values[part] = {
            model: _value(cells[place[name]], f"{part} of {model!r} (column {name!r})")
            for model, name in getattr(columns, part).items()
        }
        negative = next((model for model, value in values[part].items() if value is not None and value < 0), None)
        if part != "score" and negative is not None:
            raise DataError(f"{part} of {negative!r} is {values[part][negative]:g}; it must be at least 0")
    if all(value is None for value in values["score"].values()):
        raise DataError("no model has a score")
    return Row(query, task, values, {model: cells[place[name]] for model, name in columns.answer.items()})
