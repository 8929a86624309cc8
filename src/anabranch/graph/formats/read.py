"""`read_graph`: which format a file is of, and who reads it."""

import os
from pathlib import Path
from typing import Any

from anabranch.bounds import near_name, shown, whole
from anabranch.errors import DataError, InputError
from anabranch.graph.arguments import as_path, check_flag, check_one_of
from anabranch.graph.array_file import MAGIC
from anabranch.graph.csr import DUPLICATES
from anabranch.graph.formats.build import IDS, LEAST_LIMIT, Rules
from anabranch.graph.formats.edge_list import read_edge_list
from anabranch.graph.formats.layout import Dialect
from anabranch.graph.formats.lines import compression, first_bytes
from anabranch.graph.formats.matrices import read_mat, read_npz
from anabranch.graph.formats.matrix_market import read_matrix_market
from anabranch.graph.formats.metis import read_metis
from anabranch.graph.formats.parquet import read_parquet
from anabranch.graph.formats.write import name_of
from anabranch.graph.store import Graph
from anabranch.graph.table_columns import Column

FORMATS = {
    "anb": "our own file, checked and mappable",
    "edges": "an edge a line, split at blanks, tabs, commas ...",
    "csv": "the same; written with commas and a header",
    "parquet": "a table of edges",
    "mtx": "MatrixMarket, coordinate",
    "metis": "METIS, neighbours a line",
    "npz": "a scipy matrix, or arrays of edges",
    "mat": "a MATLAB matrix, up to version 7.2",
}
ENDINGS = {
    ".anb": "anb",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".mtx": "mtx",
    ".mm": "mtx",
    ".metis": "metis",
    ".graph": "metis",
    ".npz": "npz",
    ".mat": "mat",
    ".txt": "edges",
    ".tsv": "edges",
    ".edgelist": "edges",
    ".edges": "edges",
    ".el": "edges",
    ".ncol": "edges",
}
# Of other programs, whose text would be taken for edges.
_FOREIGN = (
    ".gdf",
    ".gml",
    ".graphml",
    ".gexf",
    ".net",
    ".dot",
    ".gv",
    ".dl",
    ".json",
    ".jsonl",
    ".md",
    ".sql",
    ".xml",
    ".html",
)
_MAGICS = {MAGIC: "anb", b"PAR1": "parquet", b"PK\x03\x04": "npz", b"MATLAB 5.0": "mat", b"MATLAB 7.3": "mat"}
_STREAMED = ("edges", "csv", "parquet", "mtx", "metis")


def read_graph(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    directed: bool | None = None,
    source: Column = None,
    target: Column = None,
    weight: Column = "auto",
    header: bool | None = None,
    delimiter: str | None = None,
    comment: str | None = None,
    ids: str = "auto",
    num_nodes: int | None = None,
    variable: str | None = None,
    duplicates: str = "add",
    drop_zero: bool = False,
    allow_negative: bool = False,
    memory_limit: int | None = None,
    spill_folder: str | os.PathLike[str] | None = None,
) -> Graph:
    """The graph in a file.

    Args:
        path: the file; text may be compressed by gzip, bzip2 or xz.
        format: one of `FORMATS`. Default: by the file's first bytes, else by its ending, else an edge list.
        directed: whether (u, v) differs from (v, u). Default: what the file says (our own, MatrixMarket, METIS; a matrix is
            undirected if it is symmetric; a list of edges by Gephi's column Type, Directed or Undirected in all rows), else False. False
            for a matrix demands that it is symmetric.
        source, target: columns of a list of edges, by name or number (from 0). Default: those with well-known names, else the first two.
        weight: the column of weights. "auto": the one called weight, or without a header the third, with a warning logged where there
            are more; None for none.
        header: whether the first row of a text names its columns. Default: looked at (see `docs/systems/graph.md`).
        delimiter: one character or "whitespace". Default: tab, comma, semicolon or bar, whichever is in the first row, else whitespace.
        comment: characters that start a line to be left out. Default: # and %, but where nodes are text and columns have names, a line
            with as many fields, as of hashtags, is a row.
        ids: what ends of edges are. "numbers": ids from 0 up, those that are missing are isolated nodes; "names": numbers or text that
            become `Graph.names` in rising order; "text": names, read as text. "auto": numbers if they are whole numbers that fill
            0 ... N - 1 (or ``num_nodes`` is given), else names; text where the first row has one like 007.
        num_nodes: nodes, where ids are numbers.
        variable: the matrix in an .npz or .mat file.
        duplicates, drop_zero, allow_negative: as in `Graph.from_edges`.
        memory_limit: bytes that reading may hold at once, from 1 MiB; edges are then kept in temporary files, and a graph larger than
            half of it is mapped from one. Names of nodes are in memory all the same. Not for .npz and .mat, which are read whole.
        spill_folder: where those files go. Default: the system's folder.

    Returns:
        The graph, the same to the byte with any ``memory_limit``.

    Raises:
        DataError: the file is missing, unreadable, truncated or malformed, naming the line (of tables the row).
        InputError: an argument that does not fit, such as a column that is not there.
        CapacityError: memory_limit, the disk or this machine's memory does not suffice.
    """
    path = as_path(path)
    rules = _rules(
        directed=directed,
        ids=ids,
        num_nodes=num_nodes,
        duplicates=duplicates,
        drop_zero=drop_zero,
        allow_negative=allow_negative,
        memory_limit=memory_limit,
        spill_folder=spill_folder,
    )
    dialect = _dialect(source, target, weight, header, delimiter, comment)
    if not path.is_file():
        raise DataError(f"{path} is a folder, not a file" if path.is_dir() else f"there is no file {path}")
    kind = _kind(path, format)
    if variable is not None and not isinstance(variable, str):
        raise InputError(f"variable is {shown(variable)}; it must be a name, or None")
    if variable is not None and kind not in ("npz", "mat"):
        raise InputError(
            f"variable={shown(variable)} chooses a matrix of an .npz or .mat file; {path} is read as {kind!r}"
        )
    if memory_limit is not None and kind in ("npz", "mat"):
        raise InputError(f"{path} is read whole; memory_limit is for {', '.join(_STREAMED)}")
    try:
        return _read(path, kind, rules, dialect, variable)
    except OSError as error:
        raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error


def _read(path: Path, kind: str, rules: Rules, dialect: Dialect, variable: str | None) -> Graph:
    if kind == "anb":
        graph = Graph.load(path, mmap=rules.memory_limit is not None and path.stat().st_size > rules.memory_limit // 2)
        if rules.directed is not None and rules.directed != graph.is_directed:
            raise InputError(f"{path} holds {graph}; `to_directed` and `to_undirected` change that")
        return graph
    if kind == "npz":
        return read_npz(path, rules, variable)
    if kind == "mat":
        return read_mat(path, rules, variable)
    reader: Any = {"parquet": read_parquet, "mtx": read_matrix_market, "metis": read_metis}.get(kind, read_edge_list)
    return reader(path, rules, dialect)


def _dialect(source: Column, target: Column, weight: Column, header: Any, delimiter: Any, comment: Any) -> Dialect:
    """Raises InputError for arguments that are none."""
    for name, column in (("source", source), ("target", target), ("weight", weight)):
        if column is not None and not isinstance(column, str):
            whole(name, column, 0)
    for name, text in (("delimiter", delimiter), ("comment", comment)):
        # One that is not ASCII marks no byte.
        if not (isinstance(text, str) and text.isascii()) and text is not None:
            raise InputError(f"{name} is {shown(text)}; it must be text in ASCII")
    header = None if header is None else check_flag("header", header)
    return Dialect(source=source, target=target, weight=weight, header=header, delimiter=delimiter, comment=comment)


def _rules(**values: Any) -> Rules:
    if not isinstance(values["ids"], str) or values["ids"] not in IDS:
        near = near_name(values["ids"], IDS)
        raise InputError(f"ids is {shown(values['ids'])}{near}; it must be one of {', '.join(IDS)}")
    check_one_of("duplicates", values["duplicates"], DUPLICATES)
    for name in ("drop_zero", "allow_negative"):
        values[name] = check_flag(name, values[name])
    if values["directed"] is not None:
        values["directed"] = check_flag("directed", values["directed"])
    for name, least in (("num_nodes", 0), ("memory_limit", LEAST_LIMIT)):
        if values[name] is not None:
            values[name] = whole(name, values[name], least)
    if values["num_nodes"] is not None and values["ids"] in ("names", "text"):
        raise InputError(f"num_nodes goes with ids that are numbers, not with ids={values['ids']!r}")
    if values["spill_folder"] is not None and not as_path(values["spill_folder"], "spill_folder").is_dir():
        raise InputError(f"spill_folder is {shown(os.fspath(values['spill_folder']))}, which is no folder")
    return Rules(**values)


def _kind(path: Path, format: str | None) -> str:
    if format is not None:
        if not isinstance(format, str) or format not in FORMATS:
            near = near_name(format, FORMATS)
            raise InputError(f"the format {shown(format)} is unknown{near}; it must be one of {', '.join(FORMATS)}")
        return format
    start = first_bytes(path, 64)
    known = next((kind for magic, kind in _MAGICS.items() if start.startswith(magic)), None)
    if known is None and start.lower().startswith(b"%%matrixmarket"):
        known = "mtx"
    if known is not None and known != "mtx" and compression(path):
        raise DataError(f"{path} is a compressed {known!r} file; uncompress it first")
    ending = name_of(path).suffix.lower()
    if known is None and ending in _FOREIGN:
        raise DataError(
            f"{path}: files with the ending {ending} are not read; those of {', '.join(FORMATS)} are (say which by `format`), "
            "and graphs that networkx or igraph has read"
        )
    return known or ENDINGS.get(ending, "edges")
