"""Which column of a CSV file is what, told from its name and from whether it holds numbers.

A column whose name says what it holds (``score:NAME``, ``NAME_correct``, ``cost:NAME``, ...) is that, whatever its cells are: one that
is no number is an error of that cell. A bare name is a model's scores if any cell is a number, no column is marked as scores, and the name
is no usual one of something else, such as ``year`` or ``latency_ms``. What is neither is left out, and the reason is kept.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from anabranch.errors import DataError
from anabranch.routers.data.table import PARTS

QUERY = ("query", "prompt", "question", "instruction")
TASK = ("task", "subject", "category", "eval_name")

# Never the name of a model.
IGNORED = re.compile(r"(?i)|unnamed.*|index|(.*_)?id|split|oracle_model_to_route_to")

# Words of a name that say that a bare column of numbers is no model's scores.
_OTHER = frozenset(
    "answer answers cost costs count date day difficulty dollar dollars duration elapsed expected fold gold hour label labels "
    "latency len length level minutes month ms price prices row sec seconds seed solution temperature time timestamp token tokens "
    "truth usd week year".split()
)
# Bare names that are of scores, and of no model; and those of columns that name one in each row.
_GENERIC = frozenset(
    "accuracy correct grade mark outcome outcomes points quality rating ratings result results reward score scores value verdict".split()
)
_NAMING = frozenset("model model_id model_name model_used models llm llm_name".split())
_SCORE = "_score"
_ENDINGS = (
    ("_correct", "score"),
    ("|total_cost", "cost"),
    ("|model_response", "answer"),
    ("_response", "answer"),
)
# Why a column is left out, where that needs no word when nothing could be read.
_PLAIN = ("no numbers", "empty")
Tables = dict[str, dict[str, str]]


def guess(
    header: Sequence[str], rows: Sequence[Sequence[str]], path: Path, hold_numbers: Callable[[Sequence[str]], bool]
) -> tuple[str, str | None, Tables, dict[str, str]]:
    """Which column is what.

    Args:
        header: names of the columns.
        rows: cells.
        path: named in errors.
        hold_numbers: whether the cells of a column hold numbers, be it such as are no scores.

    Returns the column of texts, that of tasks or None, by part the column of each model, and of columns that are left out why. Raises
    DataError if it is not clear.
    """
    lower = {name.lower(): name for name in reversed(header)}
    query = next((lower[name] for name in QUERY if name in lower), None)
    task = next((lower[name] for name in TASK if name in lower), None)
    tables: Tables = {part: {} for part in (*PARTS, "answer")}
    left: dict[str, str] = {}
    marks = {name: mark for name in header if name not in (query, task) and (mark := _mark(name)) is not None}
    has_scores = any(part == "score" for part, _ in marks.values())
    # Of whom there is a cost or an answer, his name is that of a model, whatever words are in it.
    owners = {model for _, model in marks.values()}
    for column, name in enumerate(header):
        if name in (query, task):
            continue
        if name in marks:
            _put(tables, *marks[name], name, path)
        elif (
            why := _why_not(name, [row[column] for row in rows], has_scores, hold_numbers, is_owner=name in owners)
        ) is not None:
            left[name] = why
        else:
            _put(tables, "score", name, name, path)
    naming = next((name for name in header if name.lower() in _NAMING and left.get(name) == "no numbers"), None)
    if query is None or not tables["score"] or (naming is not None and not has_scores and len(tables["score"]) == 1):
        raise _unclear(header, left, naming, path)
    if not has_scores and len(tables["score"]) > 1 and all(name.lower().endswith(_SCORE) for name in tables["score"]):
        # All of them alike: it is not a model that is called so.
        tables["score"] = {name[: -len(_SCORE)] or name: name for name in tables["score"]}
    _check_owners(tables, left, path)
    return query, task, tables, left


def _unclear(header: Sequence[str], left: dict[str, str], naming: str | None, path: Path) -> DataError:
    """Why it cannot be told which column is what."""
    if naming is not None:
        return DataError(
            f"{path}: a row is a query, and each model has a column of scores; here {naming!r} names a model in each row. Make one row of "
            "each query, with a column such as score:small for each model"
        )
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        return DataError(
            f"{path} has one column, {header[0]!r}; cells are split at commas (in .tsv files at tabs), whatever else stands between them"
        )
    why = "".join(f"; {name!r} is left out: {reason}" for name, reason in left.items() if reason not in _PLAIN)
    return DataError(
        f"{path}: cannot tell which columns are what ({', '.join(header)}){why}; say it, such as query=prompt,score:small=small_correct"
    )


def _mark(name: str) -> tuple[str, str] | None:
    """The part that a name says the column holds, and the model; None of a bare name."""
    part, separator, model = name.partition(":")
    if separator and model and part in (*PARTS, "answer"):
        return part, model
    found = next(((kind, name.removesuffix(ending)) for ending, kind in _ENDINGS if name.endswith(ending)), None)
    return found if found and found[1] else None


def _put(tables: Tables, part: str, model: str, name: str, path: Path) -> None:
    other = tables[part].setdefault(model, name)
    if other != name:
        raise DataError(f"{path}: the columns {other!r} and {name!r} both hold {part} of {model!r}; leave one out")


def _why_not(
    name: str, cells: list[str], has_scores: bool, hold_numbers: Callable[[Sequence[str]], bool], *, is_owner: bool
) -> str | None:
    """Why a column with a bare name holds no model's scores; None if it does. ``is_owner``: other columns are of a model of that name."""
    if IGNORED.fullmatch(name):
        return "not of a model, by its name"
    if name.lower() in _GENERIC:
        return "no model's, by its name"
    words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()))
    if words & _OTHER and not is_owner:
        return "not scores, by its name"
    if not hold_numbers(cells):
        return "no numbers" if any(cell.strip() for cell in cells) else "empty"
    return "other columns are marked as scores" if has_scores else None


def _check_owners(tables: Tables, left: dict[str, str], path: Path) -> None:
    """Every part is of a model with scores; answers of another, which a file may hold of whoever wrote the questions, are left out."""
    for part in (*PARTS[1:], "answer"):
        for model, name in list(tables[part].items()):
            if model in tables["score"]:
                continue
            if part != "answer":
                why = f"; the column {model!r} is left out: {left[model]}" if model in left else ""
                raise DataError(
                    f"{path} has a {part} of {model!r} (column {name!r}), which has no column of scores{why}"
                )
            left[name] = f"answers of {model!r}, which has no column of scores"
            del tables[part][model]
