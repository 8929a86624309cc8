"""Fitted embeddings in files, and tables of edges that are asked of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.cli.graph.files import is_index
from anabranch.cli.graph.inputs import are_numbers, is_row_of_edges, nodes_of, read_table
from anabranch.errors import DataError, InputError

if TYPE_CHECKING:
    import numpy as np

    from anabranch.graph import FastRP, Graph, GraphVite

MODEL = "A fitted model (anabranch graph embed GRAPH --save MODEL.anb)."


def open_model(path: str) -> FastRP | GraphVite:
    """A saved `FastRP` or `GraphVite`. Raises DataError for a file that is missing, damaged or something else."""
    from anabranch.cli.graph.inputs import is_own
    from anabranch.graph import FastRP, GraphVite
    from anabranch.graph.array_file import kind_of

    if not Path(path).is_file():
        raise DataError(f"there is no file {path}")
    kind = kind_of(path) if is_own(path) else None
    if kind == "fastrp":
        return FastRP.load(path)
    if kind == "graphvite" or (kind is None and Path(path).suffix == ".npz"):
        return GraphVite.load(path)
    what = f"holds a {kind}" if kind else "is no file of ours"
    raise DataError(f"{path} {what}; a fitted model is written by anabranch graph embed GRAPH --save MODEL.anb")


def check_saved(path: Path | None) -> None:
    """Before the work. Raises InputError for a name that a model is not saved under."""
    if path is not None and path.suffix != ".anb":
        raise InputError(f"--save is {str(path)!r}; its name must end in .anb")


def read_edges(path: str, nodes: Graph) -> tuple[list[Any], list[Any], list[Any] | None]:
    """Columns source, target and (None where there is none) weight of a table.

    They are found by the names that `read_graph` knows, else they are the first two, and where no line names them the third; a first one
    without a name is a data frame's index, and is passed over.

    Args:
        path: of the table; its first line is an edge or names of columns, see `is_row_of_edges`.
        nodes: a graph that knows nodes of them.

    Raises DataError naming the row of an empty cell, or of a weight that is not a number.
    """
    table = read_table(path, is_row_of_edges(nodes, path), as_text=not are_numbers(nodes))
    if len(table) < 2:
        raise DataError(
            f"{path} has {len(table)} column(s); edges are a table of source and target, and perhaps weight"
        )
    ends, weight = _columns(list(table))
    for name in (*ends, *([] if weight is None else [weight])):
        empty = next((row for row, cell in enumerate(table[name]) if cell in (None, "")), None)
        if empty is not None:
            raise DataError(f"{path}, row {empty}: an empty cell")
    if not table[ends[0]]:
        raise DataError(f"{path} has no rows")
    weights = None if weight is None else [_weight(path, row, cell) for row, cell in enumerate(table[weight])]
    return table[ends[0]], table[ends[1]], weights


def _columns(names: list[str]) -> tuple[list[str], str | None]:
    """Those of ends, and of weights."""
    from anabranch.graph.formats.edge_list import SOURCES, TARGETS, WEIGHTS

    if is_index(names[0]) and len(names) > 2:
        names = names[1:]
    called = {name.lower(): name for name in reversed(names)}
    known = [next((called[word] for word in words if word in called), None) for words in (SOURCES, TARGETS, WEIGHTS)]
    rest = iter([name for name in names if name not in known])
    source, target = (name if name is not None else next(rest) for name in known[:2])
    # A line of names says it; without one it is the third.
    is_bare = names == [f"f{number}" for number in range(len(names))]
    return [source, target], known[2] if known[2] is not None else next(rest, None) if is_bare else None


def _weight(path: str, row: int, cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise DataError(f"{path}, row {row}: the weight {cell!r:.40} is not a number") from None


def pairs_of(nodes: Graph, path: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Ids [E, 2] of pairs of known nodes in a table, and what they are called there. Raises DataError."""
    import numpy as np

    source, target, _ = read_edges(path, nodes)
    called = [[str(cell) for cell in part] for part in (source, target)]
    try:
        ids = [nodes_of(nodes, part) for part in called]
    except InputError as error:
        raise DataError(f"{path}: {error}") from None
    return np.column_stack(ids), called[0], called[1]


def said_as(nodes: Graph, cells: list[Any]) -> list[Any]:
    """Cells of a table as the nodes of a graph are called: text where those are, else whole numbers. Raises InputError."""
    if nodes.names is not None and nodes.names.dtype.kind not in "iu":
        return [str(cell) for cell in cells]
    # Data frames write whole numbers as 5.0 where a cell of the column was empty once.
    cells = [int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in cells]
    wrong = next((cell for cell in cells if isinstance(cell, bool) or not isinstance(cell, int)), None)
    if wrong is not None:
        raise InputError(f"nodes are called by numbers here; {wrong!r:.40} is none")
    return cells
