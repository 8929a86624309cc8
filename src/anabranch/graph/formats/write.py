"""Writing graphs: `write_graph` in every format that `read_graph` reads, all or nothing, a part of the edges at a time."""
# Shapes: E edges of a part

import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.beside import new_file
from anabranch.graph.formats.layout import is_number
from anabranch.graph.formats.objects import edge_columns, note_of
from anabranch.graph.formats.parquet import NOTE
from anabranch.graph.store import Graph

PART = 1 << 18  # edges


def write_csv(graph: Graph, path: Path) -> None:
    """A table with a header; text is in quotes. Nodes without edges are not in it: read it back with ``num_nodes``."""
    _refuse_lost_names(graph, path)
    _write_rows(graph, path, b",", "needed", header=True)


def write_edge_list(graph: Graph, path: Path) -> None:
    """Rows of two ids and perhaps a weight, split at tabs, behind a comment that holds the number of nodes and the direction."""
    _refuse_lost_names(graph, path)
    is_text = graph.names is not None and graph.names.dtype.kind not in "iu"
    if is_text and graph.names is not None:
        for name in graph.names.tolist():
            _check_name(path, name)
    _write_rows(graph, path, b"\t", "needed" if is_text and _need_quotes(graph) else "none", header=False)


def _check_name(path: Path, name: object) -> None:
    """Raises InputError for a name that a line of text cannot hold."""
    if isinstance(name, str) and ("\n" in name or "\r" in name or "\0" in name):
        what = "zero byte" if "\0" in name else "line break"
        raise InputError(f"{path}: the name {name!r} holds a {what}; write .parquet or .anb")


def _need_quotes(graph: Graph) -> bool:
    """Whether some name would be read as something else without quotes."""
    assert graph.names is not None
    return any(
        not name
        or name != name.strip()
        or name[0] in "#%\ufeff"
        or any(mark in name for mark in '\t,;|" ')
        or is_number(name)
        for name in map(str, graph.names.tolist())
    )


def _write_rows(graph: Graph, path: Path, delimiter: bytes, quoting: str, *, header: bool) -> None:
    import pyarrow as pa
    from pyarrow import csv

    options = csv.WriteOptions(
        include_header=header, delimiter=delimiter.decode(), quoting_style=quoting, quoting_header="none"
    )
    if header and graph.names is not None and graph.names.dtype.kind == "O":
        for name in graph.names.tolist():
            _check_name(path, name)
    with new_file(path) as temporary, _opened(temporary, path) as file:
        if not header:
            kind = "directed" if graph.is_directed else "undirected"
            by_name = "" if graph.names is None else " by name"
            file.write(f"# anabranch graph: {graph.num_nodes} nodes{by_name}, {kind}\n".encode())
        schema = pa.table(edge_columns(graph, *_none(graph), True)).schema
        with csv.CSVWriter(file, schema, write_options=options) as writer:
            for part in parts(graph):
                writer.write_table(pa.table(edge_columns(graph, *part, True), schema))


def write_parquet(graph: Graph, path: Path) -> None:
    """A table with the number of nodes and the direction in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _refuse_lost_names(graph, path)
    schema = pa.table(edge_columns(graph, *_none(graph), True)).schema.with_metadata({NOTE: note_of(graph)})
    with new_file(path) as temporary, pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
        for part in parts(graph):
            writer.write_table(pa.table(edge_columns(graph, *part, True), schema))


def write_matrix_market(graph: Graph, path: Path) -> None:
    """A coordinate file, ``symmetric`` (the lower triangle) where undirected, ``pattern`` without weights. Names are not in it."""
    _refuse_names(graph, path)
    field = "pattern" if graph.weights is None else "real"
    symmetry = "general" if graph.is_directed else "symmetric"
    with new_file(path) as temporary, _opened(temporary, path) as file:
        file.write(f"%%MatrixMarket matrix coordinate {field} {symmetry}\n".encode())
        file.write(f"{graph.num_nodes} {graph.num_nodes} {graph.num_edges}\n".encode())
        for source_E, target_E, weight_E in parts(graph):
            # Rows are not before columns.
            low, high = (source_E, target_E) if graph.is_directed else (target_E, source_E)
            file.write(_lines(low + 1, high + 1, weight_E))


def write_metis(graph: Graph, path: Path) -> None:
    """Neighbours of each node. For undirected graphs without self-loops whose weights are whole numbers; names are not in it."""
    _refuse_names(graph, path)
    if graph.is_directed:
        raise InputError(f"{path}: METIS files hold undirected graphs; `to_undirected` makes one")
    if graph.num_self_loops:
        raise InputError(f"{path}: METIS files hold no self-loops; this graph has {graph.num_self_loops:,}")
    if graph.weights is not None and ((graph.weights != np.rint(graph.weights)) | (graph.weights > 2**24)).any():
        raise InputError(
            f"{path}: METIS files hold whole weights (up to 2**24, so that they are exact); this graph has others"
        )
    with new_file(path) as temporary, _opened(temporary, path) as file:
        file.write(f"{graph.num_nodes} {graph.num_edges}{'' if graph.weights is None else ' 001'}\n".encode())
        for node in range(graph.num_nodes):
            places = slice(graph.indptr[node], graph.indptr[node + 1])
            numbers = (graph.indices[places] + 1).tolist()
            if graph.weights is not None:
                weights = graph.weights[places].astype(np.int64).tolist()
                numbers = [number for pair in zip(numbers, weights, strict=True) for number in pair]
            file.write((" ".join(map(str, numbers)) + "\n").encode())


def write_npz(graph: Graph, path: Path) -> None:
    """What `scipy.sparse.load_npz` reads. Names are not in it."""
    from scipy.sparse import save_npz

    _refuse_names(graph, path)
    with new_file(path) as temporary, open(temporary, "wb") as file:
        save_npz(file, graph.to_scipy(), compressed=False)


def write_mat(graph: Graph, path: Path) -> None:
    """A MATLAB 5 file with the matrix ``network``. Names are not in it."""
    from scipy.io import savemat

    _refuse_names(graph, path)
    with new_file(path) as temporary, open(temporary, "wb") as file:
        savemat(file, {"network": graph.to_scipy(np.float64).tocsc()}, do_compression=True)


def parts(graph: Graph) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """`Graph.edges` in parts of whole rows, about `PART` edges each."""
    first = 0
    while first < graph.num_nodes:
        last = int(np.searchsorted(graph.indptr, graph.indptr[first] + PART, side="right")) - 1
        last = min(graph.num_nodes, max(last, first + 1))
        places = slice(graph.indptr[first], graph.indptr[last])
        source_E = np.repeat(np.arange(first, last, dtype=graph.indices.dtype), np.diff(graph.indptr[first : last + 1]))
        target_E = graph.indices[places]
        weight_E = None if graph.weights is None else graph.weights[places]
        if not graph.is_directed:
            kept = source_E <= target_E
            source_E, target_E = source_E[kept], target_E[kept]
            weight_E = None if weight_E is None else weight_E[kept]
        if len(source_E):
            yield source_E, target_E, weight_E
        first = last


def _none(graph: Graph) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """No edges, of the right types."""
    return graph.indices[:0], graph.indices[:0], None if graph.weights is None else graph.weights[:0]


def _lines(first: np.ndarray, second: np.ndarray, weight: np.ndarray | None) -> bytes:
    # The shortest that reads back.
    columns = [first.tolist(), second.tolist()] + ([] if weight is None else [map(str, weight)])
    return "".join(" ".join(map(str, row)) + "\n" for row in zip(*columns, strict=True)).encode()


@contextmanager
def _opened(temporary: Path, path: Path) -> Iterator[IO[bytes]]:
    """The file to write, through gzip where the name ends so."""
    with open(temporary, "wb") as file:
        if path.suffix != ".gz":
            yield file
            return
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as packed:
            yield packed  # type: ignore[misc]


def _refuse_names(graph: Graph, path: Path) -> None:
    if graph.names is not None:
        raise InputError(
            f"{path}: this format cannot hold the names of nodes; write .anb, .parquet, .csv or an edge list"
        )


def _refuse_lost_names(graph: Graph, path: Path) -> None:
    """A list of edges cannot say what a node without edges is called."""
    if graph.names is None:
        return
    seen = graph.degree_N > 0
    seen = seen.copy()
    seen[graph.indices] = True
    if not seen.all():
        name = graph.names[int(np.flatnonzero(~seen)[0])]
        raise InputError(
            f"{path}: {int((~seen).sum()):,} nodes without edges have names (first {name!r}), which a list of edges cannot hold; "
            "write .anb, or leave them out with subgraph"
        )


WRITERS: dict[str, Callable[[Graph, Path], None]] = {
    "anb": lambda graph, path: graph.save(path),
    "csv": write_csv,
    "edges": write_edge_list,
    "parquet": write_parquet,
    "mtx": write_matrix_market,
    "metis": write_metis,
    "npz": write_npz,
    "mat": write_mat,
}


def name_of(path: str | os.PathLike[str]) -> Path:
    """The path without the ending of its compression."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".gz", ".bz2", ".xz") else path
