"""``anabranch graph rewalk``: an index of walks goes along with its graph, without being built again."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.graph.node_tables import read_edges
from anabranch.cli.graph.options import GraphSource, Workers
from anabranch.cli.graph.reading import AS_IT_SAYS, Reading
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.option_sets import takes_sets
from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import duration, fact, print_json, size, wrote
from anabranch.errors import InputError
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.graph import Graph


@takes_sets()
def rewalk(
    index: Annotated[
        str, typer.Argument(metavar="INDEX", help="An index of walks (anabranch graph index GRAPH --walks N).")
    ],
    source: GraphSource,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The new index, e.g. new.anb.")],
    out_graph: Annotated[
        Path, typer.Option(metavar="FILE", help="The new graph (.anb), to which the new index belongs.")
    ],
    add: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Table of new edges (.csv, .parquet): source, target and perhaps weight. Unknown nodes are added.",
        ),
    ] = None,
    remove: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Table of edges to remove: source and target.")
    ] = None,
    reading: Reading = AS_IT_SAYS,
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Add edges to a graph and its index of walks, or remove some.

    Only walks that a change affects are repeated. The result is the same as a newly built index.

    Example: anabranch graph rewalk walks.anb graph.anb --add new.csv --out walks2.anb --out-graph graph2.anb
    """
    check_apart([out, out_graph], [index, source, add, remove])
    if add is None and remove is None:
        raise InputError("nothing changes; name a table of edges with --add FILE or --remove FILE")
    from anabranch.graph import PowerWalk

    opened = reading.open(source, quiet)
    # Tables call nodes by their names, also where those are numbers.
    named = replace(opened.graph, by_name=opened.graph.names is not None)
    found = PowerWalk.load(index, named, workers=workers)
    added, removed = (None if path is None else _edges(path, opened.graph) for path in (add, remove))
    if removed is not None:
        # A table that has weights tells the same edges.
        removed = removed[:2]
    started = time.perf_counter()
    with waiting("walking", quiet):
        walked = found.update(edges_added=added, edges_removed=removed)
    seconds = time.perf_counter() - started
    graph = found.graph
    graph.save(out_graph)
    found.save(out)
    facts: dict[str, Any] = {
        "nodes": graph.num_nodes,
        "new_nodes": graph.num_nodes - opened.graph.num_nodes,
        "edges": graph.num_edges,
        "added": 0 if added is None else len(added[0]),
        "removed": 0 if removed is None else len(removed[0]),
        "walked": len(walked),
        "seconds": seconds,
        "size_bytes": out.stat().st_size,
        "wrote": [str(out), str(out_graph)],
    }
    if as_json:
        print_json(facts)
        return
    fact("graph", f"{source}   {graph.num_nodes:,} nodes ({facts['new_nodes']:,} new), {graph.num_edges:,} edges")
    fact("walked", f"from {len(walked):,} of them in {duration(seconds)}")
    fact("graph", f"wrote {out_graph}")
    wrote(f"{out} ({size(facts['size_bytes'])})", f"anabranch graph ppr {out_graph} NODE --index {out}")


def _edges(path: Path, graph: Graph) -> tuple[list[Any], ...]:
    """Columns of a table: source, target and, where there is one, weight; ends as the graph calls its nodes. Raises DataError."""
    source, target, weight = read_edges(str(path), graph)
    return (source, target) if weight is None else (source, target, weight)
