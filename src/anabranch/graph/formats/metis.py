"""METIS graph files: sizes in the first line, then a line of neighbours per node, counted from 1, each edge in both its lines.

Source: Karypis, "METIS: a software package for partitioning unstructured graphs", manual of version 5.1.0, 2013, section 4.1.1.
"""
# Shapes: E edges as found (both directions)

from dataclasses import replace
from pathlib import Path

import numba as nb
import numpy as np

from anabranch.errors import DataError
from anabranch.graph.formats.build import EdgeSink, Rules
from anabranch.graph.formats.layout import Dialect
from anabranch.graph.formats.lines import blocks, fail
from anabranch.graph.store import Graph

_FINE, _NOT_A_NUMBER, _RANGE, _NO_WEIGHT, _WEIGHT, _TOO_MANY_LINES = range(6)


def read_metis(path: Path, rules: Rules, dialect: Dialect) -> Graph:
    """The graph of a METIS file, undirected (with directed=True both directions). Weights and sizes of nodes are left out."""
    if rules.num_nodes is not None:
        raise DataError(f"{path} says itself how many nodes it has; leave out num_nodes")
    sizes: list[int] = []
    has_weights, skip, node = False, 0, 0
    sink: EdgeSink | None = None
    try:
        for text, first_line in blocks(path, rules.block_bytes):
            line, start = first_line, 0
            raw = text.tobytes() if not sizes else b""
            while not sizes and start < len(raw):
                stop = raw.find(b"\n", start)
                stop = len(raw) if stop < 0 else stop
                words = raw[start:stop].decode("utf-8", "replace").split()
                if words and not words[0].startswith("%"):
                    sizes, has_weights, skip = _header(path, line, words)
                start, line = min(stop + 1, len(raw)), line + 1
            if not sizes:
                continue
            if sink is None:
                entries = replace(rules, ids="numbers", is_matrix=True, num_nodes=sizes[0])
                sink = EdgeSink(entries, path, has_weights and dialect.weight is not None)
            part = text[start:]
            source_E, target_E = (np.empty(len(part) // 2 + 1, np.int64) for _ in range(2))
            weight_E = np.empty(len(source_E) if has_weights else 0, np.float32)
            count, node, problem, at, value = parse_neighbours(
                part, node, sizes[0], line, skip, has_weights, source_E, target_E, weight_E
            )
            if problem:
                fail(path, at, _what(problem, value, sizes))
            used = weight_E[:count] if sink.is_weighted else None
            sink.add(source_E[:count], target_E[:count], used)
        if not sizes or sink is None:
            raise DataError(f"{path} holds no graph: the line of sizes (nodes, edges) is missing")
        if node < sizes[0]:
            raise DataError(f"{path} is truncated: it has lines for {node:,} of {sizes[0]:,} nodes")
        graph = _finish(path, sink)
    finally:
        if sink is not None:
            sink.__exit__()
    if graph.num_edges != sizes[1]:
        raise DataError(f"{path} promises {sizes[1]:,} edges in its first line and holds {graph.num_edges:,}")
    return graph.to_directed() if rules.directed else graph


def _finish(path: Path, sink: EdgeSink) -> Graph:
    sink.rules = replace(sink.rules, directed=None)
    graph = sink.finish()
    if graph.is_directed:
        raise DataError(
            f"{path}: some edge stands in the line of one of its nodes only, or with another weight in the other's"
        )
    return graph


def _header(path: Path, line: int, words: list[str]) -> tuple[list[int], bool, int]:
    """Nodes and edges, whether edges have weights, and how many numbers a line has before its neighbours."""
    if not 2 <= len(words) <= 4 or not all(word.isascii() and word.isdigit() for word in words):
        fail(path, line, f"{' '.join(words)[:60]!r} where nodes, edges and (perhaps) a format should stand")
    kind = words[2].zfill(3) if len(words) > 2 else "000"
    if len(kind) != 3 or set(kind) - {"0", "1"}:
        fail(path, line, f"the format {words[2]!r} is unknown; it has up to three digits 0 or 1")
    constraints = int(words[3]) if len(words) > 3 else 1
    return [int(words[0]), int(words[1])], kind[2] == "1", (kind[0] == "1") + (constraints if kind[1] == "1" else 0)


def _what(problem: int, value: int, sizes: list[int]) -> str:
    return {
        _NOT_A_NUMBER: "something that is not a whole number",
        _RANGE: f"the neighbour {value} is out of range; nodes are 1 to {sizes[0]}",
        _NO_WEIGHT: "the last neighbour has no weight (or a node's own numbers are missing)",
        _WEIGHT: f"the weight {value} is not allowed; weights are 1 or more",
        _TOO_MANY_LINES: f"more lines than the {sizes[0]:,} nodes",
    }[problem]


@nb.njit(cache=True, nogil=True)
def parse_neighbours(text, node, num_nodes, first_line, skip, has_weights, source_E, target_E, weight_E):
    """Edges of whole lines. Returns edges, the next node, a problem, its line and the number it is about."""
    size, position, line, count = len(text), 0, first_line, 0
    while position < size:
        stop = position
        while stop < size and text[stop] != 10:
            stop += 1
        at = position
        # A comment is the line of no node.
        if at < stop and text[at] == 37:
            position, line = stop + 1, line + 1
            continue
        if node >= num_nodes:
            while at < stop and (text[at] == 32 or text[at] == 9 or text[at] == 13):
                at += 1
            if at < stop:
                return count, node, _TOO_MANY_LINES, line, 0
            position, line = stop + 1, line + 1
            continue
        seen = 0
        while True:
            while at < stop and (text[at] == 32 or text[at] == 9 or text[at] == 13):
                at += 1
            if at >= stop:
                break
            value, digits = np.int64(0), 0
            while at < stop and 48 <= text[at] <= 57 and digits < 18:
                value = value * 10 + (text[at] - 48)
                digits += 1
                at += 1
            if digits == 0 or (at < stop and text[at] != 32 and text[at] != 9 and text[at] != 13):
                return count, node, _NOT_A_NUMBER, line, 0
            place = seen - skip
            seen += 1
            if place < 0:
                continue
            if has_weights and place % 2 == 1:
                if value < 1:
                    return count, node, _WEIGHT, line, value
                weight_E[count - 1] = value
                continue
            if value < 1 or value > num_nodes:
                return count, node, _RANGE, line, value
            source_E[count], target_E[count] = node, value - 1
            count += 1
        if seen < skip or (has_weights and (seen - skip) % 2 == 1):
            return count, node, _NO_WEIGHT, line, 0
        node += 1
        position, line = stop + 1, line + 1
    return count, node, _FINE, line, 0
