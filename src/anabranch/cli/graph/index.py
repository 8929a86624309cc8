"""``anabranch graph index``: an index of vectors, for nearest-neighbour search."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.graph.cluster import check_engine, edge_files, index_files
from anabranch.cli.graph.options import Workers, check_extra
from anabranch.cli.graph.waiting import Rate
from anabranch.cli.option_sets import OptionSet, takes_sets
from anabranch.cli.options import FLAG, AsJson, Quiet, Seed, read_assignments
from anabranch.cli.output import duration, fact, print_json, quantity, size, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import DataError, InputError
from anabranch.files import check_apart

if TYPE_CHECKING:
    import numpy as np

# Vectors added at once, at least.
STEP = 4096


@dataclass(frozen=True)
class Built(OptionSet):
    """How near two vectors are, and how well the index finds them."""

    metric: Annotated[
        str, typer.Option(metavar="M", help="l2 (squared), cosine, ip (inner product), or hamming: packed bits, uint8.")
    ] = "l2"
    links: Annotated[
        int, typer.Option("--m", metavar="M", help="Links per element, 5 to 48; use more for more dimensions.")
    ] = 16
    ef_construction: Annotated[
        int, typer.Option(metavar="EF", help="Candidates to consider for links; more is better and slower.")
    ] = 200
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Precision of vectors in the search: f32, f16 (half the bytes) or i8 (a quarter). Default: f32, or b1 for "
            "hamming.",
        ),
    ] = None
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="Q",
            help="Search with short codes and re-rank the best by their vectors: pq, or int4 (half a byte per number).",
        ),
    ] = None


@dataclass(frozen=True)
class OnDisk(OptionSet):
    """An index that need not fit into memory, and the codes that do."""

    disk: Annotated[
        bool,
        typer.Option(
            "--disk",
            metavar=FLAG,
            help="Keep vectors and links on disk, and short codes in memory; VECTORS must be .npy or .anb.",
        ),
    ] = False
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --disk: memory limit for building and searching, such as 2GiB. Default: a fifth of what the vectors take.",
        ),
    ] = None
    code_bytes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="For pq and --disk: bytes per code. Default: one for 4 numbers; on disk, fewer if memory requires it.",
        ),
    ] = None


@dataclass(frozen=True)
class Walked(OptionSet):
    """An index of walks instead."""

    walks: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Index a graph instead: N walks from each node, for fast personalised PageRank."
        ),
    ] = None
    alpha: Annotated[
        float, typer.Option(metavar="A", help="With --walks: probability that a walk ends before each step.")
    ] = 0.15
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="With --walks: any other argument of PowerWalk, e.g. --set mode=endpoint, --set keep=100. May be repeated.",
        ),
    ] = None
    engine: Annotated[
        str,
        typer.Option(
            metavar="E", help="With --walks: local, or spark for a graph in Parquet that is too big for one machine."
        ),
    ] = "local"


BUILT, ON_DISK, WALKED = Built(), OnDisk(), Walked()


@takes_sets()
def index(
    vectors: Annotated[
        str,
        typer.Argument(
            metavar="VECTORS", help="Vectors: .npy, .npz, .parquet, .csv, .tsv, .anb; with --walks a graph."
        ),
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="The index, e.g. index.anb; on Spark a folder.")],
    built: Built = BUILT,
    on_disk: OnDisk = ON_DISK,
    names: Annotated[
        str | None,
        typer.Option(
            metavar="GRAPH", help="Name the rows after this graph's nodes. Default: names in the file of vectors."
        ),
    ] = None,
    walked: Walked = WALKED,
    workers: Workers = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Build an index of vectors (HNSW; with --disk one that need not fit into memory), or with --walks an index of a graph (PowerWalk).

    Row i gets id i. Names of rows, if there are any, go into a second file beside the index (FILE.names).

    Example: anabranch graph index vectors.npy --metric cosine --out index.anb
    """
    check_extra()
    check_engine(walked.engine)
    _check_disk(on_disk.disk, on_disk.memory, on_disk.code_bytes, built.dtype, built.quantization, walked.walks)
    if walked.engine == "spark":
        if walked.walks is None:
            raise InputError("--engine spark indexes walks: give --walks; an index of vectors is built on this machine")
        files = edge_files(vectors, out)
        index_files(
            files,
            {"alpha": walked.alpha, "walks": walked.walks, "seed": seed},
            read_assignments(walked.changes),
            out,
            quiet,
            as_json,
        )
        return
    from anabranch.graph.live import replacing
    from anabranch.graph.names import check_names_place, names_path

    check_apart([Path(out), names_path(out)], [vectors, names])
    # From the start: at the end it would be too late to say that a server took changes of what is there.
    with replacing(out):
        if walked.walks is None:
            check_names_place(out)
        if walked.walks is not None:
            given = {"alpha": walked.alpha, "walks": walked.walks, "seed": seed, "workers": workers}
            _index_walks(vectors, Path(out), given, read_assignments(walked.changes), quiet, as_json)
            return
        if walked.changes:
            raise InputError("--set is for --walks; an index of vectors has options of its own")
        if on_disk.disk:
            from anabranch.cli.graph.disk import Wanted, index_on_disk

            wanted = Wanted(
                vectors,
                Path(out),
                on_disk.memory,
                built.metric,
                built.links,
                built.ef_construction,
                on_disk.code_bytes,
                workers,
                seed,
            )
            index_on_disk(wanted, None if names is None else _names(names, quiet), quiet, as_json)
            return
        codes = {"quantization": built.quantization, "code_bytes": on_disk.code_bytes}
        _index_vectors(
            vectors,
            Path(out),
            built.metric,
            built.links,
            built.ef_construction,
            built.dtype,
            codes,
            names,
            workers,
            seed,
            quiet,
            as_json,
        )


def _check_disk(
    disk: bool,
    memory: str | None,
    code_bytes: int | None,
    dtype: str | None,
    quantization: str | None,
    walks: int | None,
) -> None:
    """Raises InputError for options that do not go together."""
    if memory is not None and not disk:
        raise InputError("--memory is only for --disk; without it, the whole index is in memory")
    if code_bytes is not None and not disk and quantization is None:
        raise InputError(
            "--code-bytes is for --disk and --quantization pq; without them vectors are not searched by codes"
        )
    if disk and quantization is not None:
        raise InputError(f"--quantization is {quantization}; with --disk vectors are searched by codes of pq already")
    if quantization is not None and walks is not None:
        raise InputError("--quantization is for vectors; an index of walks has none")
    if disk and walks is not None:
        raise InputError(
            "--disk is for vectors; an index of walks is mapped from its file (anabranch graph serve --mmap)"
        )
    if disk and dtype not in (None, "f32"):
        raise InputError(
            f"--dtype is {dtype}; with --disk vectors are searched by codes (--code-bytes) and measured as f32"
        )


def _index_vectors(
    vectors: str,
    out: Path,
    metric: str,
    links: int,
    ef_construction: int,
    dtype: str | None,
    codes: dict[str, Any],
    names: str | None,
    workers: int | None,
    seed: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """HNSW."""
    import numpy as np

    from anabranch.cli.graph.vectors import read_vectors
    from anabranch.graph import HNSW
    from anabranch.graph.names import Names, remove_names, write_names

    found = read_vectors(vectors, bits=metric == "hamming")
    count, dim = found.array.shape
    dim *= 8 if metric == "hamming" else 1
    called = found.names
    if names is not None:
        called = _names_of(names, count, quiet)
    zero = np.flatnonzero(~found.array.any(1))
    if metric == "cosine" and zero.size:
        raise DataError(
            f"{vectors}, row {zero[0]}: all numbers are 0, which has no cosine ({zero.size:,} such rows); use --metric l2"
        )
    made = HNSW(dim, metric, links, ef_construction, dtype, seed, workers=workers, **codes)
    started = time.perf_counter()
    with Progress(count, "vector", quiet=quiet) as progress:
        rate, step = Rate(progress, "vectors"), max(STEP, count // 50)
        rate(0)
        for first in range(0, count, step):
            made.add(found.array[first : first + step])
            rate(min(first + step, count))
    # Many vectors at one place leave no links to elsewhere.
    if repaired := made.stats()["unreachable"]:
        made.repair()
    seconds = time.perf_counter() - started
    made.save(out)
    if called is not None:
        write_names(out, Names(called))
    else:
        # Of an index that was there before.
        remove_names(out)
    stats = made.stats()
    facts = {
        "vectors": count,
        "dim": dim,
        "metric": metric,
        "dtype": made.dtype,
        "M": made.M,
        "ef_construction": made.ef_construction,
        "named": called is not None,
        "seconds": seconds,
        "levels": stats["levels"],
        "mean_degree": stats["mean_degree"],
        "quantization": made.quantization,
        "code_bytes": stats["code_bytes"],
        "repaired": repaired,
        "unreachable": stats["unreachable"],
        "size_bytes": out.stat().st_size,
        "wrote": str(out),
    }
    if as_json:
        print_json(facts)
        return
    fact("vectors", f"{vectors}   {count:,} x {dim}" + ("   with names" if called is not None else ""))
    fact(
        "index",
        f"{metric}, {made.dtype}, M {made.M}, ef_construction {made.ef_construction}   {len(stats['levels'])} levels, "
        f"{stats['mean_degree'][0]:.1f} links each",
    )
    fact("built", f"in {duration(seconds)}, {quantity(count / max(seconds, 1e-9))} vectors/s")
    if made.quantization is not None:
        coded = f"{made.quantization}, {stats['code_bytes']:,} bytes each beside {4 * dim:,}"
        fact(
            "codes",
            coded if stats["code_bytes"] else "none yet: there are too few vectors, which are searched themselves",
        )
    if repaired:
        fact(
            "note",
            f"{repaired:,} vectors that no list of links led to were linked; of many equal vectors there are more of them",
        )
    wrote(f"{out} ({size(facts['size_bytes'])})", f"anabranch graph search {out} --rows 0 --check")


def _names_of(source: str, count: int, quiet: bool) -> np.ndarray:
    found = _names(source, quiet)
    if len(found) != count:
        raise InputError(f"--names is {source} with {len(found):,} nodes; there are {count:,} vectors")
    return found


def _names(source: str, quiet: bool) -> np.ndarray:
    from anabranch.cli.graph.inputs import open_graph

    graph = open_graph(source, quiet=quiet).graph
    if graph.names is None:
        raise InputError(f"--names is {source}, whose nodes have no names")
    return graph.names


def _index_walks(
    source: str, out: Path, given: dict[str, Any], changes: dict[str, Any], quiet: bool, as_json: bool
) -> None:
    from anabranch.cli.graph.embed import check_names
    from anabranch.cli.graph.inputs import example_node, open_graph
    from anabranch.graph import PowerWalk

    check_names(PowerWalk, changes)
    if own := next((name for name in changes if name in given), None):
        raise InputError(f"cannot set {own}; it has an option of its own")
    made = PowerWalk(**given, **changes)
    graph = open_graph(source, quiet=quiet).graph
    started = time.perf_counter()
    with Progress(graph.num_nodes, "node", quiet=quiet) as progress:
        made.build(graph, out=out, progress=Rate(progress, "nodes"))
    seconds = time.perf_counter() - started
    facts: dict[str, Any] = {
        "graph": source,
        "nodes": graph.num_nodes,
        "walks": made.walks,
        "alpha": made.alpha,
        "set": changes,
        "seconds": seconds,
        "size_bytes": out.stat().st_size,
        "wrote": str(out),
    }
    if as_json:
        print_json(facts)
        return
    fact("graph", f"{source}   {graph.num_nodes:,} nodes, {graph.num_edges:,} edges")
    fact(
        "index",
        f"{made.walks} walks from each node, alpha {made.alpha:g}"
        + "".join(f", {name} {value}" for name, value in changes.items()),
    )
    fact("built", f"in {duration(seconds)}, {quantity(graph.num_nodes / max(seconds, 1e-9))} nodes/s")
    wrote(f"{out} ({size(facts['size_bytes'])})", f"anabranch graph ppr {source} {example_node(graph)} --index {out}")
