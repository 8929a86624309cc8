"""``anabranch graph info``: what a graph, or one of our files, looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.graph.inputs import Opened, example_node, is_own
from anabranch.cli.graph.options import check_extra, check_picture
from anabranch.cli.graph.reading import AS_IT_SAYS, Reading
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.option_sets import takes_sets
from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import fact, print_json, size, table, wrote
from anabranch.files import check_apart

DATA_SETS = {
    "karate": "34 members of a club and who met whom, 2 labels (needs networkx)",
    "lesmis": "77 characters of a novel, weighted (needs networkx)",
    "cora": "2,708 papers and their citations, directed, 7 labels",
    "ppi": "3,890 proteins that interact, 50 labels",
    "blogcatalog": "10,312 bloggers and their friends, 39 labels",
    "dblp_weighted": "27,199 authors of 4 fields, weighted",
    "dblp": "51,264 authors who wrote together, 60 labels",
}


@takes_sets()
def info(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="GRAPH",
            help="A file of edges, one of our .anb files, or a data set. Without it, data sets are listed.",
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the degrees into this .png or .svg file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the graph in another format, by the file's ending.")
    ] = None,
    reading: Reading = AS_IT_SAYS,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show nodes, edges, degrees, weights and components of a graph.

    For an index of vectors, show its settings. With --out, convert the graph: our own format .anb opens at once.

    Example: anabranch graph info edges.csv --out graph.anb
    """
    check_extra()
    check_picture(picture)
    if source is None:
        _list(as_json)
        return
    kind = _kind(source)
    if kind not in (None, "graph"):
        _show_file(source, kind, as_json)
        return
    check_apart([out, picture], [source])
    opened = reading.open(source, quiet)
    with waiting("looking at it", quiet):
        facts = opened.graph.describe()
    written = []
    if out is not None:
        from anabranch.graph import write_graph

        with waiting(f"writing {out}", quiet):
            write_graph(opened.graph, out)
        written.append(str(out))
    if picture is not None:
        from anabranch.cli.graph.pictures import draw_degrees

        draw_degrees(opened.graph, Path(source).name, picture)
        written.append(str(picture))
    if as_json:
        labels = None if opened.labels is None else opened.labels.shape[1]
        print_json({"graph": source, **facts, "labels": labels, "wrote": written})
        return
    _print(opened, facts)
    if written:
        wrote(", ".join(written), f"anabranch graph ppr {out or source} {example_node(opened.graph)}")
    else:
        fact("next", f"anabranch graph ppr {source} {example_node(opened.graph)}")


def _kind(source: str) -> str | None:
    """What one of our own files holds; None for anything else."""
    from anabranch.graph.array_file import kind_of

    return kind_of(source) if is_own(source) else None


def _print(opened: Opened, facts: dict[str, Any]) -> None:
    kind = f"{'directed' if facts['directed'] else 'undirected'}, {'weighted' if facts['weighted'] else 'unweighted'}"
    fact("graph", f"{opened.name}   {facts['nodes']:,} nodes, {facts['edges']:,} edges   {kind}")
    odd = [
        f"{facts[name]:,} {text}"
        for name, text in (("isolated", "isolated nodes"), ("self_loops", "self-loops"))
        if facts[name]
    ]
    if facts["directed"] and facts["dangling"]:
        odd.append(f"{facts['dangling']:,} without an edge out")
    fact(
        "parts",
        f"{facts['components']:,} components, the largest of {facts['largest_component']:,} nodes"
        + "".join(f", {text}" for text in odd),
    )
    if "weight" in facts:
        weight = facts["weight"]
        fact("weights", f"{weight['min']:.4g} to {weight['max']:.4g}, sum {weight['sum']:.6g}")
    if opened.labels is not None:
        fact("labels", f"{opened.labels.shape[1]} kinds, {opened.labels.nnz:,} given")
    fact("memory", size(facts["bytes"]))
    spreads = [("edges", facts["degree"])]
    if facts["directed"]:
        spreads = [("edges out", facts["degree"]), ("edges in", facts["in_degree"])]
    if facts["nodes"]:
        print()
        names = list(spreads[0][1])
        rows = [[label, *(f"{spread[name]:,.4g}" for name in names)] for label, spread in spreads]
        table(["of a node", *names], rows)
        print()


def _show_file(source: str, kind: str | None, as_json: bool) -> None:
    """What another of our files holds."""
    if kind == "hnsw index":
        from anabranch.graph.live import open_named

        index: Any
        index, names = open_named(source, mmap=True)
        facts: dict[str, Any] = {
            "dim": index.dim,
            "metric": index.metric,
            "dtype": index.dtype,
            "M": index.M,
            "ef_construction": index.ef_construction,
            "named": names is not None,
            **index.stats(),
        }
        for name in ("queries", "hops", "distances"):
            facts.pop(name)
    elif kind == "disk vector index":
        from anabranch.graph.disk import DiskIndex
        from anabranch.graph.names import read_names

        with DiskIndex(source, mmap=True) as held:
            names = read_names(source, held.ids)
            facts = {
                "dim": held.dim,
                "metric": held.metric,
                "dtype": held.dtype,
                "M": held.M,
                "named": names is not None,
                **held.stats(),
            }
        for name in ("queries", "blocks", "codes", "exact"):
            facts.pop(name)
    else:
        from anabranch.graph.array_file import read_arrays

        found = read_arrays(source, str(kind), versions=tuple(range(100)), mmap=True)
        facts = {
            "arrays": {name: f"{array.dtype} {list(array.shape)}" for name, array in found.arrays.items()},
            "size_bytes": sum(array.nbytes for array in found.arrays.values()),
        }
    if as_json:
        print_json({"file": source, "kind": kind, **facts})
        return
    fact("file", f"{source}   {kind}")
    for name, value in facts.items():
        if isinstance(value, dict):
            for inner, text in value.items():
                fact("", f"{inner}   {text}")
        else:
            shown = (
                size(value)
                if name == "size_bytes"
                else ", ".join(map(str, value))
                if isinstance(value, list)
                else str(value)
            )
            fact("", f"{name.replace('_', ' ')}   {shown}")


def _list(as_json: bool) -> None:
    if as_json:
        print_json({"data_sets": DATA_SETS})
        return
    table(["data set", "about"], [[name, about] for name, about in DATA_SETS.items()], text_columns=2)
    print()
    fact("next", "anabranch graph info karate")
