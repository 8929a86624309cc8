"""Graphs in and out: files of every usual kind, objects of other libraries, tables.

    graph = read_graph("edges.csv.gz", directed=True)
    write_graph(graph, "graph.parquet")
    graph = from_networkx(g); table = to_table(graph)

The rules of `Graph` hold for all of them. What is special to a format stands in its module: `edge_list` (also CSV), `parquet`,
`matrix_market`, `metis`, `matrices` (``.npz``, ``.mat``), `objects`; `coerce` tells which of them is given, `out` goes the other way;
`build` holds the build in bounded memory.
"""

from anabranch.graph.formats.objects import from_igraph, from_networkx, from_pyg, from_table, from_torch
from anabranch.graph.formats.out import to_igraph, to_networkx, to_table, write_graph
from anabranch.graph.formats.read import FORMATS, read_graph

__all__ = [
    "FORMATS",
    "from_igraph",
    "from_networkx",
    "from_pyg",
    "from_table",
    "from_torch",
    "read_graph",
    "to_igraph",
    "to_networkx",
    "to_table",
    "write_graph",
]
