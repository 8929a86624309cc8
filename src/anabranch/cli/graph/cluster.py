"""``--engine spark``: edges in Parquet to results in Parquet, which this process never holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from anabranch.cli.graph.inputs import columns_of
from anabranch.cli.graph.options import check_extra
from anabranch.cli.graph.waiting import Rate, waiting
from anabranch.cli.output import duration, fact, print_json, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import InputError
from anabranch.files import check_apart

ENGINES = ("local", "spark")


def is_edges(source: str) -> bool:
    """Whether this is what Spark reads itself: Parquet by name, a folder, or a URI."""
    check_extra()
    from anabranch.graph.spark.edges import is_parquet

    return is_parquet(source)


def edge_files(
    source: str, out: str | None, *, directed: bool | None = None, columns: str | None = None, ids: str = "auto"
) -> Any:
    """Edges as they were asked for. Raises InputError for what Spark does not read, or an ``out`` over the edges."""
    from anabranch.graph.fully_ppr import EdgeFiles
    from anabranch.graph.spark.files import is_uri

    if not is_edges(source):
        raise InputError(
            f"--engine spark reads edges in Parquet (.parquet, a folder, a URI), and {source} is none of these"
        )
    if out is None:
        raise InputError("on Spark results go into a folder of Parquet files; say where with --out FOLDER")
    if ids != "auto":
        raise InputError(f"--ids is {ids!r}; on Spark ids are what the Parquet says, integers or text")
    if not is_uri(source) and not is_uri(out):
        check_apart([Path(out), Path(f"{out}.parts")], [source])
    parts = columns_of(columns)
    named = None if not parts else tuple(part for part in parts.values() if part is not None)
    return EdgeFiles(source, directed, named)


def check_engine(engine: str) -> None:
    """Raises InputError for an unknown one."""
    if engine not in ENGINES:
        raise InputError(f"--engine is {engine!r}; use one of {', '.join(ENGINES)}")


def rank_files(
    edges: Any, options: dict[str, Any], sources: list[str] | None, out: str | None, quiet: bool, as_json: bool
) -> None:
    """``anabranch graph ppr EDGES --all --engine spark``."""
    from anabranch.graph import FullyPPR

    started = time.perf_counter()
    with Progress(1, "walk", quiet=quiet) as progress:
        rate = Rate(progress, "walks")

        def told(done: int, total: int) -> None:
            progress.set_total(total)
            rate(done)

        scores: Any = FullyPPR(**options, sources=sources, out=out, progress=told).fit(edges).result_
    seconds = time.perf_counter() - started
    how = scores.facts
    count = how["num_nodes"] if sources is None else len(sources)
    facts = {
        "graph": str(edges.path),
        "sources": count,
        "top": options["top_k"],
        "seconds": seconds,
        "how": how,
        "wrote": scores.path,
    }
    if as_json:
        print_json(facts)
        return
    _show(edges, how)
    fact("from", f"{count:,} nodes   walks {how['walks']}, alpha {how['alpha']:g}, in {duration(seconds)}")
    wrote(scores.path, f"read {scores.path} with Spark, pandas or DuckDB")


def embed_files(edges: Any, options: dict[str, Any], out: str, quiet: bool, as_json: bool) -> None:
    """``anabranch graph embed EDGES --engine spark``; ``options`` are those of `FastRP`."""
    from anabranch.cli.graph.embed import made_of
    from anabranch.graph import FastRP

    started = time.perf_counter()
    with waiting("embedding on Spark", quiet):
        found: Any = made_of(FastRP, {**options, "engine": "spark", "out": out}).fit(edges).embedding_
    seconds = time.perf_counter() - started
    how = found.facts
    facts = {
        "graph": str(edges.path),
        "method": "fastrp",
        "nodes": how["num_nodes"],
        "dim": how["dim"],
        "seconds": seconds,
        "params": how["facts"],
        "wrote": [found.path],
    }
    if as_json:
        print_json(facts)
        return
    _show(edges, how["facts"])
    fact("vectors", f"{how['num_nodes']:,} x {how['dim']} by fastrp in {duration(seconds)}")
    wrote(found.path, f"read {found.path} with Spark, pandas or DuckDB")


def index_files(
    edges: Any, given: dict[str, Any], changes: dict[str, Any], out: str, quiet: bool, as_json: bool
) -> None:
    """``anabranch graph index EDGES --walks N --engine spark``; ``given`` and ``changes`` are arguments of `PowerWalk`."""
    from anabranch.cli.graph.embed import check_names
    from anabranch.graph import PowerWalk

    check_names(PowerWalk, changes)
    if own := next((name for name in changes if name in given), None):
        raise InputError(f"cannot set {own}; it has an option of its own")
    started = time.perf_counter()
    with waiting("walking on Spark", quiet):
        PowerWalk(**given, **{**changes, "engine": "spark"}).build(edges, out=out)
    seconds = time.perf_counter() - started
    facts = {"graph": str(edges.path), **given, "set": changes, "seconds": seconds, "wrote": out}
    if as_json:
        print_json(facts)
        return
    fact("graph", str(edges.path))
    fact("index", f"{given['walks']} walks from each node, alpha {given['alpha']:g}, in {duration(seconds)}")
    wrote(out, f"anabranch graph ppr {edges.path} NODE --index {out}")


def _show(edges: Any, how: dict[str, Any]) -> None:
    fact("graph", f"{edges.path}   {how['num_nodes']:,} nodes, {how['num_stored_edges']:,} stored edges")
