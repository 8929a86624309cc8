"""``anabranch graph tune``: weights and beta of FastRP that suit a graph."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.graph.embed import labels_of, made_of
from anabranch.cli.graph.options import GraphSource, Workers
from anabranch.cli.graph.reading import AS_IT_SAYS, Reading
from anabranch.cli.graph.tables import check_ending, write_table
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.option_sets import takes_sets
from anabranch.cli.options import AsJson, Quiet, Seed, read_assignments
from anabranch.cli.output import duration, fact, print_json, table, wrote
from anabranch.errors import InputError
from anabranch.files import check_apart

SHOWN = 5


@takes_sets()
def tune(
    source: GraphSource,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Labels to score by: a table of node and label, or own for the labels of a data set. Default: hidden edges.",
        ),
    ] = None,
    hide: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Without labels: share of the edges that are hidden and must be predicted."),
    ] = 0.1,
    trials: Annotated[int, typer.Option(metavar="N", min=1, help="Number of settings to try.")] = 20,
    dim: Annotated[int, typer.Option(metavar="D", min=1, help="Dimension of the vectors during the search.")] = 64,
    objective: Annotated[str, typer.Option(metavar="F1", help="With labels: macro_f1 or micro_f1.")] = "macro_f1",
    train: Annotated[
        float, typer.Option(metavar="SHARE", help="With labels: share of nodes to train the classifiers on.")
    ] = 0.1,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A fixed argument of FastRP, e.g. --set direction=both."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all trials (.parquet, .csv, .tsv, .jsonl).")
    ] = None,
    reading: Reading = AS_IT_SAYS,
    workers: Workers = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tune the weights and beta of FastRP for a graph, by labels or by hidden edges.

    Do not tune on the labels or edges on which you report final results.

    Example: anabranch graph tune blogcatalog --labels own --trials 12
    """
    check_ending(out)
    check_apart([out], [source, labels])
    opened = reading.open(source, quiet)
    from anabranch.graph import FastRP
    from anabranch.graph.evaluate import hold_out_edges

    given = {"seed": seed, "workers": workers, **read_assignments(changes)}
    model = made_of(FastRP, given)
    label_NC = labels_of(opened, labels)
    if label_NC is None and (objective, train) != ("macro_f1", 0.1):
        raise InputError("--objective and --train are for --labels; hidden edges are scored by AUC")
    started = time.perf_counter()
    with waiting("trying", quiet):
        if label_NC is None:
            held = hold_out_edges(opened.graph, hide, seed)
            found = model.tune(None, edges=held, trials=trials, dim=dim)
        else:
            found = model.tune(
                opened.graph, label_NC, trials=trials, dim=dim, objective=objective, train_fraction=train
            )
    seconds = time.perf_counter() - started
    ranked = sorted(found.trials, key=lambda trial: -trial.score)
    if out is not None:
        write_table(
            out,
            {
                "beta": [trial.beta for trial in found.trials],
                "weights": [list(map(float, trial.weights)) for trial in found.trials],
                "score": [trial.score for trial in found.trials],
            }
            if out.suffix in (".parquet", ".jsonl")
            else {
                "beta": [trial.beta for trial in found.trials],
                "last_weight": [float(trial.weights[-1]) for trial in found.trials],
                "score": [trial.score for trial in found.trials],
            },
        )
    best = ranked[0]
    weights = "[" + ",".join(f"{weight:.4g}" for weight in best.weights) + "]"
    command = f"anabranch graph embed {source} --set beta={best.beta:.4g} --set weights={weights} --out vectors.npy"
    facts: dict[str, Any] = {
        "graph": opened.name,
        "objective": found.objective,
        "seconds": seconds,
        "beta": best.beta,
        "weights": list(best.weights),
        "score": best.score,
        "next": command,
        "wrote": None if out is None else str(out),
        "trials": [{"beta": one.beta, "weights": list(one.weights), "score": one.score} for one in found.trials],
    }
    if as_json:
        print_json(facts)
        return
    fact("graph", f"{opened.name}   {opened.graph.num_nodes:,} nodes, {opened.graph.num_edges:,} edges")
    fact("tried", f"{len(found.trials)} points in {duration(seconds)}, by {found.objective}")
    print()
    rows = [
        [f"{one.beta:.4f}", ", ".join(f"{w:.4g}" for w in one.weights), f"{one.score:.4f}"] for one in ranked[:SHOWN]
    ]
    table(["beta", "weights", found.objective], rows)
    print()
    if out is None:
        fact("next", command)
    else:
        wrote(str(out), command)
