"""``anabranch graph transform``: vectors of nodes by a fitted model, also of nodes that it was not fitted on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.graph.inputs import nodes_of
from anabranch.cli.graph.models import MODEL, open_model
from anabranch.cli.graph.node_tables import read_edges
from anabranch.cli.graph.options import check_extra
from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import duration, fact, print_json, wrote
from anabranch.errors import DataError, InputError
from anabranch.files import check_apart

if TYPE_CHECKING:
    import numpy as np


def transform(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Output file: .npy, .npz, .parquet, .csv or .tsv.")],
    nodes: Annotated[
        list[str] | None,
        typer.Argument(metavar="NODE...", help="Nodes of the fitted graph, by name or number. Default: all."),
    ] = None,
    edges: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Edges of new nodes (FastRP): a table of source (new), target (known or new) and perhaps weight.",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Features of new nodes: vectors with names (.parquet, .csv, .npz), if the model was fitted with features.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write vectors of nodes from a fitted model.

    With --edges, compute vectors of new nodes without fitting again.

    Example: anabranch graph transform model.anb --edges new.csv --out new.parquet
    """
    check_extra()
    from anabranch.cli.graph.vectors import Vectors, check_written, write_vectors

    check_written(out)
    check_apart([out], [model, edges, features])
    if nodes and edges is not None:
        raise InputError("give fitted nodes as arguments or new nodes with --edges, not both")
    if features is not None and edges is None:
        raise InputError("--features are those of new nodes; give their --edges")
    found = open_model(model)
    known = found.nodes
    started = time.perf_counter()
    names: np.ndarray | None
    if edges is not None:
        vectors_ND, names = _new(found, edges, features, model)
    elif nodes:
        chosen = nodes_of(known, nodes)
        vectors_ND, names = _known(found, chosen), known.names_of(chosen)
    else:
        vectors_ND, names = _known(found, None), known.names
    seconds = time.perf_counter() - started
    write_vectors(out, Vectors(vectors_ND, names))
    facts: dict[str, Any] = {
        "model": model,
        "method": type(found).__name__.lower(),
        "nodes": len(vectors_ND),
        "dim": vectors_ND.shape[1],
        "new": edges is not None,
        "seconds": seconds,
        "wrote": str(out),
    }
    if as_json:
        print_json(facts)
        return
    fact("model", f"{model}   {type(found).__name__}, {known.num_nodes:,} nodes")
    kind = "new nodes" if facts["new"] else "nodes"
    fact("vectors", f"{facts['nodes']:,} {kind} x {facts['dim']} in {duration(seconds)}")
    wrote(str(out), f"anabranch graph index {out} --metric cosine --out index.anb")


def _known(model: Any, ids: np.ndarray | None) -> np.ndarray:
    from anabranch.graph import FastRP

    if isinstance(model, FastRP):
        return model.embedding_ if ids is None else model.embedding_[ids]
    return model.transform(ids)


def _new(model: Any, edges: str, features: str | None, path: str) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    from anabranch.cli.graph.vectors import read_vectors
    from anabranch.graph import FastRP

    if not isinstance(model, FastRP):
        raise InputError(
            f"{path} is a {type(model).__name__}, which has vectors only of nodes that it was trained on; FastRP has more"
        )
    source, target, weight = read_edges(edges, model.nodes)
    try:
        rows, names = model.edges_of_new(source, target, weight)
    except InputError as error:
        raise DataError(f"{edges}: {error}") from None
    values = None
    if features is not None:
        given = read_vectors(features)
        if given.names is None:
            raise DataError(f"{features} has no names of nodes; add a column node")
        place = {str(name): row for row, name in enumerate(given.names.tolist())}
        missing = next((name for name in names if str(name) not in place), None)
        if missing is not None:
            raise DataError(f"{features} has no features of the new node {missing!r}")
        values = given.array[[place[str(name)] for name in names]]
    called = np.array(names) if all(isinstance(name, int) for name in names) else np.array(names, object)
    return model.transform(rows, features=values, names=names), called
