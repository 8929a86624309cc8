"""``anabranch graph ppr``: which nodes matter, to one node, to a few, to everyone, or to each."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.graph.cluster import edge_files, is_edges, rank_files
from anabranch.cli.graph.inputs import (
    Opened,
    check_untyped,
    open_graph,
    open_typed,
    weighted_nodes,
)
from anabranch.cli.graph.node_tables import read_names, read_seeds
from anabranch.cli.graph.options import Columns, Directed, GraphSource, Ids, Relation, Share, Top, WeightOf, Workers
from anabranch.cli.graph.tables import ENDINGS, check_ending, write_table
from anabranch.cli.graph.waiting import Rate, waiting
from anabranch.cli.option_sets import OptionSet, takes_sets
from anabranch.cli.options import FLAG, AsJson, Quiet, Seed, read_assignments
from anabranch.cli.output import duration, fact, print_json, size, table, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import InputError
from anabranch.files import check_apart

if TYPE_CHECKING:
    import numpy as np

OWN = ".anb"


@dataclass(frozen=True)
class How(OptionSet):
    """How rankings are computed."""

    alpha: Annotated[
        float,
        typer.Option(metavar="A", help="Probability that a walk ends before each step; 1 - A is also called damping."),
    ] = 0.15
    method: Annotated[
        str,
        typer.Option(
            metavar="M", help="auto, solve, power, push, monte_carlo; with --all: auto, exact, decompose, walks."
        ),
    ] = "auto"
    engine: Annotated[str, typer.Option(metavar="E", help="With --all: local, spark, or auto.")] = "auto"
    tol: Annotated[
        float | None, typer.Option(metavar="T", help="Allowed L1 error, for methods that guarantee one.")
    ] = None
    walks: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of random walks, for methods that use them.")
    ] = None
    dangling: Annotated[
        str,
        typer.Option(
            metavar="D",
            help="What walks do at nodes without outgoing edges: restart (at a new random seed), source, absorb, uniform.",
        ),
    ] = "restart"
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="With --all, any other argument of FullyPPR, e.g. --set eps=0.5 --set delta=0.001 --set p_f=0.01, --set "
            "estimator=fullpath, --set plan=partitioned, --set partitions=8, --set gamma=10, --set theta=1000; with "
            "--index, rounds, eps or bound. May be repeated.",
        ),
    ] = None


HOW = How()


@takes_sets()
def ppr(
    source: GraphSource,
    nodes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NODE[=WEIGHT]...",
            help="Start nodes, by name or number. Default: any node (plain PageRank).",
        ),
    ] = None,
    seeds: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Table of seeds (.csv, .parquet): columns node and weight.")
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            metavar=FLAG,
            help="Rank from every node (or from each given one), and write the best results of each into --out.",
        ),
    ] = False,
    top: Top = 10,
    how: How = HOW,
    index: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Use an index of walks instead (made by anabranch graph index GRAPH --walks N)."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write a table (.parquet, .csv, .tsv, .jsonl); with --all also .anb, on Spark a folder.",
        ),
    ] = None,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="With --all: memory limit.")] = None,
    relation: Relation = None,
    weight_of: WeightOf = None,
    share: Share = "edges",
    directed: Directed = None,
    columns: Columns = None,
    ids: Ids = "auto",
    workers: Workers = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Rank nodes by personalised PageRank.

    Start from one node, from several with weights, from anywhere, or with --all from every node, on this machine or on Spark.

    After an interruption, the same command with --all continues. With --engine spark, Spark reads edges in Parquet (a file, a folder, a
    URI), and the graph need not fit into one process.

    Example: anabranch graph ppr lesmis Valjean Javert=2
    """
    if every and index is not None:
        raise InputError("--index answers for seeds; --all does not need it")
    if memory is not None and not 0 < memory < 1e9:
        raise InputError(f"--memory is {memory:g}; it must be a number of gigabytes above 0 and below 1e9")
    limit = None if memory is None else int(memory * 1e9)
    options: dict[str, Any] = {
        "alpha": how.alpha,
        "method": how.method,
        "engine": how.engine,
        "dangling": how.dangling,
        "top_k": top,
        "seed": seed,
        "walks": how.walks,
        "workers": workers,
        "memory_limit": limit,
    }
    if every and how.engine == "spark" and is_edges(source):
        if relation is not None:
            raise InputError("--engine spark reads edges of one kind from Parquet; leave out --relation")
        check_untyped(weight_of, share)
        options |= {} if how.tol is None else {"tol": how.tol}
        files = edge_files(source, out, directed=directed, columns=columns, ids=ids)
        rank_files(
            files, {**options, **_known(read_assignments(how.changes))}, _given_names(nodes, seeds), out, quiet, as_json
        )
        return
    place = None if out is None else Path(out)
    parts = place.with_name(f"{place.name}.parts") if place is not None and every else None
    check_apart([place, parts], [source, seeds, index])
    if every:
        _check_all(place, how.engine)
    else:
        check_ending(place)
    if relation is not None:
        opened = open_typed(source, relation, weight_of, share, directed=directed, columns=columns, quiet=quiet)
    else:
        check_untyped(weight_of, share)
        opened = open_graph(source, directed=directed, columns=columns, ids=ids, quiet=quiet)
    given = _seeds(opened, nodes, seeds)
    if every:
        if how.tol is not None:
            options["tol"] = how.tol
        options |= _known(read_assignments(how.changes))
        _rank_all(opened, None if given is None else given[0], options, place, quiet, as_json)
        return
    if how.engine != "auto":
        raise InputError(f"--engine {how.engine} is for --all; one ranking is made on this machine")
    if index is not None:
        if given is None or how.method != "auto":
            raise InputError("--index answers for seeds, by its own method; give a node, and no --method")
        asked = {"rounds": 2, "eps": 1e-6, "bound": False, **read_assignments(how.changes)}
        if unknown := next((name for name in asked if name not in ("rounds", "eps", "bound")), None):
            raise InputError(
                f"cannot set {unknown}; with --index it is rounds, eps or bound (the rest is told when it is built)"
            )
        from anabranch.graph.arguments import check_flag

        asked["bound"] = check_flag("bound", asked["bound"])
        _rank_one(opened, given, {"index": str(index), **asked}, top, place, quiet, as_json)
        return
    if how.changes:
        raise InputError("--set is for --all and --index; one exact ranking has options of its own")
    options = {"alpha": how.alpha, "method": how.method, "dangling": how.dangling, "seed": seed}
    options |= {name: value for name, value in (("tol", how.tol), ("walks", how.walks)) if value is not None}
    _rank_one(opened, given, options, top, place, quiet, as_json)


def _given_names(nodes: list[str] | None, file: Path | None) -> list[str] | None:
    """Ids of sources as they were written; None where none were given."""
    if file is None:
        return nodes or None
    if nodes:
        raise InputError("give seeds as arguments or with --seeds, not both")
    return read_names(str(file))


def _known(changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `FullyPPR` set by name. Raises InputError for one that it does not have, or that comes otherwise."""
    from anabranch.cli.graph.embed import check_names
    from anabranch.graph import FullyPPR

    check_names(FullyPPR, changes)
    elsewhere = {
        "alpha": "--alpha",
        "method": "--method",
        "engine": "--engine",
        "dangling": "--dangling",
        "top_k": "--top",
        "seed": "--seed",
        "walks": "--walks",
        "workers": "--workers",
        "memory_limit": "--memory",
        "tol": "--tol",
        "out": "--out",
        "sources": "nodes as arguments",
    }
    for name in changes:
        if name in elsewhere:
            raise InputError(f"cannot set {name} here; use {elsewhere[name]}")
        if name in ("progress", "cancel", "spark"):
            raise InputError(f"cannot set {name} from a command line")
    return changes


def _seeds(opened: Opened, nodes: list[str] | None, file: Path | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids and weights; None where none were given."""
    if file is None:
        return weighted_nodes(opened.graph, nodes) if nodes else None
    if nodes:
        raise InputError("give seeds as arguments or with --seeds, not both")
    return read_seeds(str(file), opened.graph)


def _rank_one(
    opened: Opened,
    given: tuple[np.ndarray, np.ndarray] | None,
    options: dict[str, Any],
    top: int,
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    graph = opened.graph
    started = time.perf_counter()
    with waiting("ranking", quiet):
        ids, scores, facts = _ranking(opened, given, options, top)
    facts["seconds"] = time.perf_counter() - started
    names = graph.names_of(ids).tolist()
    if out is not None:
        write_table(out, {"node": names, "score": scores})
    if as_json:
        seeds = (
            None
            if given is None
            else [
                {"node": node, "weight": weight}
                for node, weight in zip(graph.names_of(given[0]).tolist(), given[1].tolist(), strict=True)
            ]
        )
        ranking = [{"node": node, "score": float(score)} for node, score in zip(names, scores, strict=True)]
        print_json(
            {
                "graph": opened.name,
                "seeds": seeds,
                **facts,
                "ranking": ranking,
                "wrote": None if out is None else str(out),
            }
        )
        return
    where = "anywhere" if given is None else _listed(graph.names_of(given[0]).tolist(), given[1].tolist())
    fact("graph", f"{opened.name}   {graph.num_nodes:,} nodes, {graph.num_edges:,} edges")
    fact("from", f"{where}   alpha {facts['alpha']:g}, method {facts['method']}")
    if "bound" in facts:
        fact("error", f"at most {facts['bound']:.3g} in L1, after {facts['rounds']} rounds")
    print()
    rows = [
        [str(place), str(name), f"{score:.6f}"]
        for place, (name, score) in enumerate(zip(names, scores, strict=True), 1)
    ]
    table(["rank", "node", "score"], rows, text_columns=2)
    print()
    again = f"anabranch graph ppr {opened.name} --all --out scores.parquet"
    if out is None:
        fact("next", again)
    else:
        wrote(str(out), again)


def _ranking(
    opened: Opened, given: tuple[np.ndarray, np.ndarray] | None, options: dict[str, Any], top: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Ids, scores, and how they were found."""
    import numpy as np

    from anabranch.graph import PageRank, PowerWalk

    if "index" in options:
        walker = PowerWalk.load(options["index"], opened.graph)
        rounds, eps, bound = options["rounds"], options["eps"], options["bound"]
        facts = {
            "index": options["index"],
            "rounds": rounds,
            "eps": eps,
            **({"bound": walker.inspect(given, rounds, eps)["bound"]} if bound else {}),
            "method": "powerwalk",
            "alpha": walker.alpha,
            "walks": walker.walks,
            "dangling": walker.dangling,
        }
        return *walker.query(given, top, rounds, eps), facts
    engine = PageRank(**options)
    facts = {**options, "tol": engine.tol}
    if given is not None:
        return *engine.personalized(opened.graph, given, top), facts
    score_N = engine.scores(opened.graph)
    ids = np.lexsort((np.arange(len(score_N)), -score_N))[:top]
    return ids, score_N[ids], facts


def _listed(names: list[Any], weights: list[float]) -> str:
    shown = [
        f"{name}" if len(set(weights)) == 1 else f"{name}={weight:g}"
        for name, weight in list(zip(names, weights, strict=True))[:8]
    ]
    return ", ".join(shown) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")


def _check_all(out: Path | None, engine: str) -> None:
    if out is None:
        raise InputError("--all writes a row for each node; name a file with --out FILE (.parquet, .csv, .anb)")
    if engine != "spark":
        check_ending(out, (OWN, *ENDINGS))


def _rank_all(
    opened: Opened, sources: np.ndarray | None, options: dict[str, Any], out: Path | None, quiet: bool, as_json: bool
) -> None:
    from anabranch.graph import FullyPPR

    assert out is not None
    count = opened.graph.num_nodes if sources is None else len(sources)
    is_streamed = out.suffix in (OWN, ".parquet", "")
    started = time.perf_counter()
    with Progress(count, "node", quiet=quiet) as progress:
        rate = Rate(progress, "nodes")

        def told(done: int, total: int) -> None:
            progress.set_total(total)
            rate(done)

        estimator = FullyPPR(**options, sources=sources, out=out if is_streamed else None, progress=told)
        result = estimator.fit(opened.graph).result_
    if not is_streamed:
        found = result.to_arrow()
        write_table(out, {name: found[name] for name in found.column_names})
    seconds = time.perf_counter() - started
    facts = {
        "graph": opened.name,
        "sources": result.num_sources,
        "entries": int(result.rows.indptr[-1]),
        "top": options["top_k"],
        "seconds": seconds,
        "how": result.facts,
        "wrote": str(out),
    }
    if as_json:
        print_json(facts)
        return
    shown = [
        f"{name} {value}" for name, value in result.facts.items() if name in ("method", "engine", "walks", "alpha")
    ]
    fact("graph", f"{opened.name}   {opened.graph.num_nodes:,} nodes, {opened.graph.num_edges:,} edges")
    fact("from", f"{facts['sources']:,} nodes   {', '.join(shown)}")
    fact("found", f"{facts['entries']:,} scores in {duration(seconds)}")
    room = f" ({size(out.stat().st_size)})" if out.is_file() else ""
    wrote(f"{out}{room}", f"anabranch graph info {out}" if out.suffix == OWN else f"read {out} with pandas or DuckDB")
