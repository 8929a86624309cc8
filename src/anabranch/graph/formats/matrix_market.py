"""MatrixMarket coordinate files: a header, comments, the sizes, then one entry a line, counted from 1.

Source: Boisvert, Pozo and Remington, "The Matrix Market exchange formats: initial design", NISTIR 5935, 1996.
"""

from dataclasses import replace
from pathlib import Path

from anabranch.errors import DataError
from anabranch.graph.formats.build import EdgeSink, Rules
from anabranch.graph.formats.edge_list import add_fields
from anabranch.graph.formats.layout import Dialect
from anabranch.graph.formats.lines import WHITESPACE, Splitter, blocks, fail
from anabranch.graph.store import Graph


def read_matrix_market(path: Path, rules: Rules, dialect: Dialect) -> Graph:
    """The graph of a coordinate file: entry (u, v) is the weight of u -> v, of a ``pattern`` all count the same.

    ``symmetric`` files hold one triangle and make undirected graphs (with directed=True both directions); ``general`` ones are looked at.
    """
    header: list[str] = []
    sizes: list[int] = []
    sink: EdgeSink | None = None
    splitter: Splitter | None = None
    both_ways = False
    try:
        for text, first_line in blocks(path, rules.block_bytes):
            line = first_line
            start = 0
            raw = text.tobytes() if not sizes else b""
            # The lines before the entries.
            while not sizes and start < len(raw):
                stop = raw.find(b"\n", start)
                stop = len(raw) if stop < 0 else stop
                words = raw[start:stop].decode("utf-8", "replace").split()
                if line == 1:
                    header = _header(path, words)
                elif words and not words[0].startswith("%"):
                    sizes = _sizes(path, line, words)
                start, line = min(stop + 1, len(raw)), line + 1
            if not sizes:
                continue
            if sink is None:
                is_pattern = header[0] == "pattern" or dialect.weight is None
                rules, both_ways = _rules(path, rules, header, sizes)
                sink = EdgeSink(rules, path, not is_pattern)
                splitter = Splitter(path, WHITESPACE, "%", (0, 1) if is_pattern else (0, 1, 2))
                splitter.num_fields = 2 if header[0] == "pattern" else 3
            assert splitter is not None
            fields, problem = splitter.split(text[start:], line)
            add_fields(path, sink, fields, False, 1)
            if problem:
                raise problem
            if sink.seen > sizes[2]:
                fail(
                    path,
                    int(fields.line_R[sizes[2] - sink.seen]),
                    f"more than the {sizes[2]:,} entries that the sizes promise",
                )
        if not header:
            raise DataError(f"{path} is empty")
        if not sizes or sink is None:
            raise DataError(f"{path} ends before its sizes (rows, columns, entries)")
        if sink.seen != sizes[2]:
            raise DataError(
                f"{path} is truncated: it holds {sink.seen:,} of the {sizes[2]:,} entries that its sizes promise"
            )
        graph = sink.finish()
    finally:
        if sink is not None:
            sink.__exit__()
    if graph.weights is not None and header[0] != "pattern" and (graph.weights == 1).all():
        # A matrix of ones, as everywhere.
        graph = graph.with_weights(None)
    return graph.to_directed() if both_ways else graph


def _header(path: Path, words: list[str]) -> list[str]:
    """Field and symmetry. Raises DataError for what is no graph."""
    words = [word.lower() for word in words]
    if len(words) != 5 or words[:2] != ["%%matrixmarket", "matrix"]:
        fail(
            path,
            1,
            f"a MatrixMarket file starts with '%%MatrixMarket matrix coordinate ...', this one with {' '.join(words)[:60]!r}",
        )
    _, _, layout, field, symmetry = words
    if layout != "coordinate":
        fail(path, 1, f"this matrix is written as {layout!r}; a graph needs 'coordinate' (a sparse matrix)")
    if field not in ("real", "integer", "pattern", "double"):
        fail(path, 1, f"entries are {field!r}; weights are 'real', 'integer' or 'pattern'")
    if symmetry not in ("general", "symmetric"):
        fail(path, 1, f"the matrix is {symmetry!r}; a graph's is 'general' or 'symmetric'")
    return [field, symmetry]


def _sizes(path: Path, line: int, words: list[str]) -> list[int]:
    if len(words) != 3 or not all(word.isascii() and word.isdigit() for word in words):
        fail(path, line, f"{' '.join(words)[:60]!r} where the sizes (rows, columns, entries) should stand")
    rows, columns, entries = map(int, words)
    if rows != columns:
        fail(path, line, f"the matrix has {rows} rows and {columns} columns; an adjacency matrix is square")
    return [rows, columns, entries]


def _rules(path: Path, rules: Rules, header: list[str], sizes: list[int]) -> tuple[Rules, bool]:
    """Rules for the entries, and whether the graph is then to be read as directed."""
    if rules.num_nodes is not None and rules.num_nodes != sizes[0]:
        raise DataError(f"{path} has {sizes[0]:,} rows; num_nodes is {rules.num_nodes:,}")
    is_symmetric = header[1] == "symmetric"
    changed = replace(rules, num_nodes=sizes[0], ids="numbers", is_matrix=not is_symmetric)
    return (replace(changed, directed=False), rules.directed is True) if is_symmetric else (changed, False)
