"""``anabranch graph embed``: vectors of nodes, what they are worth, and a map of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.graph.cluster import check_engine, edge_files, embed_files
from anabranch.cli.graph.inputs import Opened, check_untyped, open_graph, open_typed
from anabranch.cli.graph.models import check_saved
from anabranch.cli.graph.node_tables import read_labels
from anabranch.cli.graph.options import (
    Columns,
    Directed,
    GraphSource,
    Ids,
    Relation,
    Share,
    WeightOf,
    Workers,
    check_extra,
    check_picture,
)
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import AsJson, Quiet, Seed, read_assignments
from anabranch.cli.output import duration, fact, print_json, quantity, table, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import InputError
from anabranch.files import check_apart

if TYPE_CHECKING:
    import numpy as np

    from anabranch.graph import Graph, GraphVite

METHODS = ("fastrp", "graphvite")
OWN_LABELS = "own"

# Nodes on a map, at most.
MAPPED = 5000

# Of them, those with most edges, which a map names.
NAMED = 8


def embed(
    source: GraphSource,
    out: Annotated[
        str,
        typer.Option(metavar="FILE", help="Output file: .npy, .npz, .parquet, .csv or .tsv; on Spark a folder."),
    ],
    method: Annotated[str, typer.Option(metavar="M", help="fastrp (seconds) or graphvite (trained).")] = "fastrp",
    dim: Annotated[int, typer.Option(metavar="D", min=1, help="Dimension of the vectors.")] = 128,
    epochs: Annotated[float | None, typer.Option(metavar="N", help="For graphvite: passes over the edges.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other argument of the method, e.g. --set beta=-0.9. May be repeated.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Labels for the evaluation: a table of node and label, or own for the labels of a data set.",
        ),
    ] = None,
    train: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of labelled nodes to train the classifiers on.")
    ] = 0.1,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save the fitted model (.anb), for transform, predict and resume."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--map", metavar="FILE", help="Draw nodes in two dimensions into this .png or .svg file."),
    ] = None,
    relation: Relation = None,
    weight_of: WeightOf = None,
    share: Share = "edges",
    engine: Annotated[
        str,
        typer.Option(
            metavar="E", help="For fastrp: local, or spark for a graph in Parquet that is too big for one machine."
        ),
    ] = "local",
    directed: Directed = None,
    columns: Columns = None,
    ids: Ids = "auto",
    workers: Workers = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Turn the nodes of a graph into vectors.

    With --labels, the vectors are evaluated as in the papers: logistic regression on a share of the nodes, F1 on the others, 5 shuffles.

    Example: anabranch graph embed blogcatalog --out vectors.npy --labels own --map map.png
    """
    check_extra()
    if method not in METHODS:
        raise InputError(f"--method is {method!r}; use one of {', '.join(METHODS)}")
    check_engine(engine)
    if engine == "spark":
        if method != "fastrp" or epochs is not None or labels is not None or picture is not None or save is not None:
            raise InputError("--engine spark is for --method fastrp, without --epochs, --labels, --map and --save")
        if relation is not None:
            raise InputError("--engine spark reads edges of one kind; leave out --relation")
        check_untyped(weight_of, share)
        files = edge_files(source, out, directed=directed, columns=columns, ids=ids)
        embed_files(files, {"dim": dim, "seed": seed, **read_assignments(changes)}, out, quiet, as_json)
        return
    _embed(
        source,
        Path(out),
        method,
        dim,
        epochs,
        changes,
        labels,
        train,
        save,
        picture,
        relation,
        weight_of,
        share,
        directed,
        columns,
        ids,
        workers,
        seed,
        quiet,
        as_json,
    )


def _embed(
    source: str,
    out: Path,
    method: str,
    dim: int,
    epochs: float | None,
    changes: list[str] | None,
    labels: str | None,
    train: float,
    save: Path | None,
    picture: Path | None,
    relation: str | None,
    weight_of: list[str] | None,
    share: str,
    directed: bool | None,
    columns: str | None,
    ids: str,
    workers: int | None,
    seed: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """On this machine."""
    from anabranch.cli.graph.vectors import Vectors, check_written, write_vectors

    check_written(out)
    check_picture(picture)
    check_saved(save)
    check_apart([out, picture, save], [source, labels])
    if not 0 < train < 1:
        raise InputError(f"--train is {train}; it must be a share between 0 and 1")
    if relation is not None:
        opened = open_typed(source, relation, weight_of, share, directed=directed, columns=columns, quiet=quiet)
    else:
        check_untyped(weight_of, share)
        opened = open_graph(source, directed=directed, columns=columns, ids=ids, quiet=quiet)
    label_NC = labels_of(opened, labels)
    _check_split(label_NC, train)
    started = time.perf_counter()
    given = read_assignments(changes)
    if save is not None and method == "fastrp":
        # Which vectors of new nodes are made of.
        given.setdefault("keep_powers", True)
    estimator, vectors_ND, params = _fit(opened, method, dim, epochs, given, workers, seed, quiet)
    seconds = time.perf_counter() - started
    write_vectors(out, Vectors(vectors_ND, opened.graph.names))
    scores = None if label_NC is None else _test(vectors_ND, label_NC, train, quiet)
    written = [str(out)]
    if save is not None:
        estimator.save(save)
        written.append(str(save))
    if picture is not None:
        _draw(opened, vectors_ND, label_NC, method, seed, picture, quiet)
        written.append(str(picture))
    facts = {
        "graph": opened.name,
        "method": method,
        "nodes": len(vectors_ND),
        "dim": vectors_ND.shape[1],
        "seconds": seconds,
        "params": params,
        "alike": _alike(vectors_ND),
        "classification": scores,
        "wrote": written,
    }
    if as_json:
        print_json(facts)
        return
    _print(opened, facts)
    wrote(", ".join(written), f"anabranch graph index {out} --metric cosine --out index.anb")


def labels_of(opened: Opened, wanted: str | None) -> Any:
    """bool [N, C], or None. For a map, those of a data set are there without being asked for."""
    if wanted == OWN_LABELS:
        if opened.labels is None:
            raise InputError(f"{opened.name} has no labels of its own; give a table of node and label")
        return opened.labels
    return None if wanted is None else read_labels(wanted, opened.graph)


def _check_split(label_NC: Any, train: float) -> None:
    """Before the work. Raises InputError where nothing would be left to learn from, or to test with."""
    if label_NC is not None:
        count = int((label_NC.sum(1) > 0).sum())
        if not 0 < int(train * count) < count:
            raise InputError(
                f"--train is {train}: of {count:,} labelled nodes some must be learned from, others tested"
            )


def _fit(
    opened: Opened,
    method: str,
    dim: int,
    epochs: float | None,
    changes: dict[str, Any],
    workers: int | None,
    seed: int,
    quiet: bool,
) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """The estimator, vectors, and the arguments that are not defaults."""
    from anabranch.graph import FastRP, GraphVite

    if method == "fastrp":
        if epochs is not None:
            raise InputError("--epochs is for graphvite; fastrp is not trained")
        given = {"dim": dim, "seed": seed, "workers": workers, **changes}
        estimator: Any = made_of(FastRP, given)
        with waiting("embedding", quiet):
            return estimator, estimator.fit_transform(opened.graph), given
    given = {"dim": dim, "seed": seed, **({} if epochs is None else {"epochs": epochs}), **changes}
    if workers is not None:
        given.setdefault("workers", workers)
    estimator = made_of(GraphVite, given)
    train_with_progress(estimator, opened.graph, lambda one: one.fit(opened.graph), estimator.epochs, quiet)
    return estimator, estimator.transform(), given


def train_with_progress(
    estimator: GraphVite, graph: Graph, work: Callable[[GraphVite], Any], epochs: float | None, quiet: bool
) -> None:
    """``work`` of a GraphVite for so many epochs (None: how many shows as it goes), while its progress is shown."""
    total = max(1, round((estimator.epochs if epochs is None else epochs) * graph.num_edges))
    with Progress(total, "sample", quiet=quiet) as progress:

        def told(now: Any) -> None:
            text = f"epoch {now.epoch:.0f}  loss {now.loss:.4f}  {quantity(now.samples_per_second)} samples/s"
            progress.set_total(now.total)
            progress.update(min(now.done, now.total), text)

        estimator.callbacks = (told,)
        try:
            work(estimator)
        finally:
            estimator.callbacks = ()


def _alike(vectors_ND: np.ndarray) -> int:
    """Nodes that have the vector which most nodes have, where several have it."""
    import numpy as np

    _, counts = np.unique(
        np.ascontiguousarray(vectors_ND).view(f"V{vectors_ND.dtype.itemsize * vectors_ND.shape[1]}"), return_counts=True
    )
    return int(counts.max(initial=0)) if counts.max(initial=0) > 1 else 0


def made_of(kind: Any, given: dict[str, Any]) -> Any:
    """An estimator of these arguments. Raises InputError naming one that it does not have, and as its constructor."""
    check_names(kind, given)
    return kind(**given)


def check_names(kind: Any, given: dict[str, Any]) -> None:
    """Raises InputError naming the first argument that an estimator does not have, and one much like it."""
    known = kind().get_params()
    for name in given:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise InputError(f"cannot set {name}: {kind.__name__} has no argument {name!r}; {hint}")


def _test(vectors_ND: np.ndarray, label_NC: Any, train: float, quiet: bool) -> dict[str, Any]:
    from anabranch.graph.evaluate import classify_nodes

    with waiting("testing", quiet):
        found = classify_nodes(vectors_ND, label_NC, train_fraction=train)
    return {
        "micro_f1": found.micro,
        "macro_f1": found.macro,
        "micro_f1_of": found.micro_S.tolist(),
        "macro_f1_of": found.macro_S.tolist(),
        "train_fraction": train,
        "train_nodes": found.num_train,
        "test_nodes": found.num_test,
        "labels": label_NC.shape[1],
    }


def _draw(
    opened: Opened, vectors_ND: np.ndarray, label_NC: Any, method: str, seed: int, path: Path, quiet: bool
) -> None:
    import numpy as np

    from anabranch.cli.graph.pictures import draw_map, flat_map

    label_NC = opened.labels if label_NC is None else label_NC
    chosen = np.arange(len(vectors_ND))
    if len(chosen) > MAPPED:
        chosen = np.sort(np.random.default_rng(seed).choice(len(chosen), MAPPED, replace=False))
    with waiting("drawing", quiet):
        xy_N2, how = flat_map(vectors_ND[chosen], seed)
        label_N, names = None, []
        if label_NC is not None:
            rows = label_NC.tocsr()[chosen]
            # Of several labels, the first.
            first = rows.indptr[:-1]
            label_N = np.where(np.diff(rows.indptr) > 0, np.append(rows.indices, -1)[first], -1)
            names = [str(number) for number in range(label_NC.shape[1])]
        few = f"   {len(chosen):,} of {len(vectors_ND):,} nodes" if len(chosen) < len(vectors_ND) else ""
        largest = np.argsort(-opened.graph.degree_N[chosen], kind="stable")[:NAMED]
        told = list(zip(largest.tolist(), map(str, opened.graph.names_of(chosen[largest])), strict=True))
        draw_map(xy_N2, label_N, names, f"{Path(opened.name).name}   {method}, {how}{few}", path, told=told)


def _cure(graph: Graph, method: str) -> str:
    """Why vectors are alike, and what to do about it."""
    if method != "fastrp":
        return "are they without edges?"
    if graph.is_directed:
        return "nodes without an edge out have no other; try --set direction=both"
    return "those of small components are often all 0 before scaling; try --set projection=gaussian"


def _print(opened: Opened, facts: dict[str, Any]) -> None:
    graph = opened.graph
    fact("graph", f"{opened.name}   {graph.num_nodes:,} nodes, {graph.num_edges:,} edges")
    fact("vectors", f"{facts['nodes']:,} x {facts['dim']} by {facts['method']} in {duration(facts['seconds'])}")
    scores = facts["classification"]
    if facts["alike"] > max(1, 0.05 * facts["nodes"]):
        fact("note", f"{facts['alike']:,} nodes have one and the same vector; {_cure(graph, facts['method'])}")
    if scores is None:
        return
    print()
    rows = [
        [name, f"{scores[key]:.4f}", f"{min(scores[f'{key}_of']):.4f}", f"{max(scores[f'{key}_of']):.4f}"]
        for name, key in (("micro F1", "micro_f1"), ("macro F1", "macro_f1"))
    ]
    table([f"of {scores['labels']} labels", "mean", "least", "most"], rows)
    print()
    fact(
        "tested",
        f"on {scores['test_nodes']:,} nodes after {scores['train_nodes']:,}, {len(scores['micro_f1_of'])} shuffles",
    )
