"""``anabranch graph resume``: train a GraphVite for more epochs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.graph.embed import train_with_progress
from anabranch.cli.graph.models import MODEL, check_saved, open_model
from anabranch.cli.graph.options import GraphSource, Workers
from anabranch.cli.graph.reading import AS_IT_SAYS, Reading
from anabranch.cli.option_sets import takes_sets
from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import duration, fact, print_json, wrote
from anabranch.errors import InputError
from anabranch.files import check_apart


@takes_sets()
def resume(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    source: GraphSource,
    save: Annotated[Path, typer.Option(metavar="FILE", help="File for the new model (.anb).")],
    epochs: Annotated[
        float | None,
        typer.Option(metavar="N", help="More passes over the edges. Default: the rest of an interrupted run."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write vectors: .npy, .npz, .parquet, .csv or .tsv.")
    ] = None,
    reading: Reading = AS_IT_SAYS,
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Continue to train a GraphVite model on its graph.

    More epochs are a new run: the learning rate starts again, walks are new, and vectors continue from their values.

    Example: anabranch graph resume model.anb edges.csv --epochs 500 --save more.anb
    """
    from anabranch.cli.graph.vectors import Vectors, check_written, write_vectors

    check_saved(save)
    if out is not None:
        check_written(out)
    check_apart([save, out], [model, source])
    opened = reading.open(source, quiet)
    found = open_model(model)
    from anabranch.graph import GraphVite

    if not isinstance(found, GraphVite):
        raise InputError(f"{model} is a {type(found).__name__}, which is not trained, so it cannot be continued")
    if workers is not None:
        found.set_params(workers=workers)
    started = time.perf_counter()
    train_with_progress(found, opened.graph, lambda one: one.resume(opened.graph, epochs), epochs, quiet)
    seconds = time.perf_counter() - started
    found.save(save)
    written = [str(save)]
    if out is not None:
        write_vectors(out, Vectors(found.transform(), opened.graph.names))
        written.append(str(out))
    loss = found.history[-1]["loss"] if found.history else None
    facts: dict[str, Any] = {
        "model": model,
        "graph": opened.name,
        "nodes": opened.graph.num_nodes,
        "dim": found.dim,
        "epochs": epochs,
        "loss": loss,
        "seconds": seconds,
        "wrote": written,
    }
    if as_json:
        print_json(facts)
        return
    fact("model", f"{model}   {opened.graph.num_nodes:,} nodes x {found.dim}")
    fact("trained", f"in {duration(seconds)}" + ("" if loss is None else f"   loss {loss:.4f}"))
    wrote(", ".join(written), f"anabranch graph transform {save} --out vectors.npy")
