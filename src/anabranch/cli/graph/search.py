"""``anabranch graph search``: nearest neighbours, and how many of the true ones an index finds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.graph.inputs import element_ids, numbers
from anabranch.cli.graph.options import Top, Workers, check_extra, check_picture
from anabranch.cli.graph.tables import check_ending, write_table
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import FLAG, AsJson, Quiet, Seed
from anabranch.cli.output import duration, fact, print_json, quantity, table, wrote
from anabranch.errors import InputError
from anabranch.files import check_apart

if TYPE_CHECKING:
    import numpy as np

    from anabranch.graph import HNSW
    from anabranch.graph.disk import DiskIndex
    from anabranch.graph.hnsw import Within
    from anabranch.graph.names import Names

# Queries in the table on a terminal.
SHOWN = 5
CURVE = (8, 16, 32, 64, 128, 256, 512)


def search(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="An index that anabranch graph index made.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Search for the neighbours of these elements, by name or id."),
    ] = None,
    queries: Annotated[
        str | None, typer.Option(metavar="FILE", help="Search for these vectors (.npy, .npz, .parquet, .csv, .tsv).")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="I,J", help="Search for the neighbours of these ids, e.g. 0,7 or 0-9.")
    ] = None,
    top: Top = 10,
    ef: Annotated[
        int,
        typer.Option(
            metavar="EF", min=1, help="Size of the candidate list, at least K; larger values find more and take longer."
        ),
    ] = 64,
    radius: Annotated[
        float | None,
        typer.Option(metavar="R", help="Find all within this distance (squared for l2), instead of the K nearest."),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", metavar=FLAG, help="With --radius: measure every distance, so that none is missed."),
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(metavar="I,J", help="Only find these elements: ids, e.g. 0,7 or 0-9, or names, e.g. ann,bob."),
    ] = None,
    without: Annotated[str | None, typer.Option(metavar="I,J", help="Find all but these elements.")] = None,
    check: Annotated[
        bool, typer.Option("--check", metavar=FLAG, help="Also measure all distances, and report the recall.")
    ] = False,
    curve: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw recall and speed over ef into this .png or .svg file.")
    ] = None,
    sample: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="With --check and --curve without queries: number of random elements."),
    ] = 1000,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all results as a table (.parquet, .csv, .tsv, .jsonl).")
    ] = None,
    workers: Workers = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Find nearest neighbours in an index.

    An element is never among its own results. With --check or --curve and no queries, random elements are used.

    Example: anabranch graph search index.anb --rows 0,7 --check
    """
    check_extra()
    check_ending(out)
    check_picture(curve)
    check_apart([out, curve], [index, queries])
    if exact and radius is None:
        raise InputError("--exact is only for --radius; for the nearest, --check measures all distances")
    if radius is not None and curve is not None:
        raise InputError("--curve is only for the K nearest; leave out --radius")
    from anabranch.graph.live import open_named

    made, called = open_named(index, workers=workers)
    wanted = _wanted(made, called, names, queries, rows, sample if check or curve else None, seed)
    wanted.allow(made, called, only, without)
    started = time.perf_counter()
    with waiting("searching", quiet):
        if radius is None:
            ids, distances = wanted.find(made, top, ef)
        else:
            ids, distances = wanted.within(made, radius, ef, exact)
    facts: dict[str, Any] = {
        "index": index,
        "vectors": len(made),
        "dim": made.dim,
        "metric": made.metric,
        "queries": len(wanted.vectors),
        "k": top if radius is None else None,
        "radius": radius,
        "ef": max(ef, top) if radius is None else ef,
        "seconds": time.perf_counter() - started,
    }
    written = []
    if check or curve is not None:
        with waiting("measuring all distances", quiet):
            truth = _exact(made, wanted, top) if radius is None else wanted.within(made, radius, ef, True)[0]
        facts["recall"] = _recall(made, wanted, ids, truth)
    if curve is not None:
        facts["curve"] = _curve(made, wanted, truth, top, quiet)
        written.append(str(curve))
        _draw(made, facts, index, curve)
    if out is not None:
        _write(out, wanted, called, ids, distances)
        written.append(str(out))
    if as_json:
        print_json(
            {
                **facts,
                "results": None if wanted.is_sample else _results(wanted, called, ids, distances),
                "wrote": written,
            }
        )
        return
    _print(made, wanted, called, ids, distances, facts)
    after = f"anabranch graph serve {index}"
    if written:
        wrote(", ".join(written), after)
    else:
        fact("next", after)


class _Wanted:
    """What is searched for: vectors, and which elements they are, where they are some."""

    def __init__(self, vectors: np.ndarray, own: np.ndarray | None, titles: list[Any], is_sample: bool = False) -> None:
        self.vectors, self.own, self.titles, self.is_sample = vectors, own, titles, is_sample
        # Ids of what may be found; None for all.
        self.allowed: np.ndarray | None = None
        self.filter: Any = None

    def allow(self, index: HNSW | DiskIndex, called: Names | None, only: str | None, without: str | None) -> None:
        """Let only some elements be found. Raises InputError for what are no ids, or no names, or if both are given."""
        if only is None and without is None:
            return
        if only is not None and without is not None:
            raise InputError("give only one of --only and --without")
        import numpy as np

        ids = index.ids
        text, option = only or without or "", "--only" if only is not None else "--without"
        named = called is not None and not called.are_numbers
        chosen = np.isin(ids, element_ids(called, text.split(",")) if named else numbers(text, option))
        self.allowed = ids[chosen if only is not None else ~chosen]
        self.filter = index.prepare_filter(self.allowed)

    def find(
        self, index: HNSW | DiskIndex, k: int, ef: int, workers: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and distances [Q, k], or as many as there are elements, -1 and infinity behind the last."""
        k = min(k, len(index))
        if self.own is None:
            return index.search(self.vectors, k, ef, self.filter, workers=workers)
        return _without(self.own, *index.search(self.vectors, k + 1, ef, self.filter, workers=workers))

    def within(self, index: HNSW | DiskIndex, radius: float, ef: int, exact: bool) -> tuple[np.ndarray, np.ndarray]:
        """All within a radius, as `find`; as many columns as the most that a query has. Raises InputError for an index on disk."""
        from anabranch.graph import HNSW

        if not isinstance(index, HNSW):
            raise InputError("--radius is for an index in memory; one on disk finds the K nearest")
        return _all_but(self.own, index.range_search(self.vectors, radius, ef, self.filter, exact=exact))


def _all_but(own: np.ndarray | None, found: Within) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as ids and distances [Q, K], -1 and infinity behind the last; without the query's own element."""
    import numpy as np

    row_Z = np.repeat(np.arange(len(found.indptr) - 1), np.diff(found.indptr))
    kept = np.ones(len(row_Z), bool) if own is None else found.ids != own[row_Z]
    row_Z, id_Z, distance_Z = row_Z[kept], found.ids[kept], found.distances[kept]
    number_Q = np.bincount(row_Z, minlength=len(found.indptr) - 1)
    place_Z = np.arange(len(row_Z)) - np.repeat(np.cumsum(number_Q) - number_Q, number_Q)
    shape = (len(number_Q), int(number_Q.max(initial=0)))
    ids, distances = np.full(shape, -1), np.full(shape, np.inf, np.float32)
    ids[row_Z, place_Z], distances[row_Z, place_Z] = id_Z, distance_Z
    return ids, distances


def _without(own: np.ndarray, ids: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row less one: the query's own element, or the last if it is not there."""
    import numpy as np

    is_own = ids == own[:, None]
    last = np.where(is_own.any(1), is_own.argmax(1), ids.shape[1] - 1)
    kept = np.arange(ids.shape[1])[None] != last[:, None]
    shape = (len(ids), ids.shape[1] - 1)
    return ids[kept].reshape(shape), distances[kept].reshape(shape)


def _wanted(
    index: HNSW | DiskIndex,
    called: Names | None,
    names: list[str] | None,
    queries: str | None,
    rows: str | None,
    sample: int | None,
    seed: int,
) -> _Wanted:
    import numpy as np

    given = [what for what in (names or None, queries, rows) if what is not None]
    if len(given) > 1:
        raise InputError("give only one of names, --queries and --rows")
    if not len(index):
        raise InputError("the index is empty, so nothing can be found in it")
    if queries is not None:
        from anabranch.cli.graph.vectors import read_vectors

        found = read_vectors(queries, bits=index.metric == "hamming")
        titles = list(range(len(found.array))) if found.names is None else found.names.tolist()
        if found.array.shape[1] != index.row_size:
            raise InputError(f"{queries} has vectors of {found.array.shape[1]} numbers, the index of {index.row_size}")
        return _Wanted(found.array, None, titles)
    if names:
        ids = element_ids(called, names)
        gone = [name for name, is_there in zip(names, index.contains(ids).tolist(), strict=True) if not is_there]
        if called is not None and gone:
            raise InputError(f"{gone[0]!r} was deleted from the index")
    elif rows is not None:
        ids = numbers(rows)
    elif sample is not None:
        held = index.ids
        ids = np.sort(np.random.default_rng(seed).choice(held, min(sample, len(held)), replace=False))
        return _Wanted(index.vectors(ids), ids, ids.tolist(), is_sample=True)
    else:
        raise InputError(
            "nothing to search for; give names, --queries FILE or --rows 0,7 (or --check to measure recall)"
        )
    return _Wanted(index.vectors(ids), ids, ids.tolist() if called is None else called.of(ids))


def _exact(index: HNSW | DiskIndex, wanted: _Wanted, k: int) -> np.ndarray:
    """Ids [Q, k] of the true neighbours: all distances are measured."""
    from anabranch.graph.disk import DiskIndex
    from anabranch.graph.hnsw import brute_force

    ids = index.ids if wanted.allowed is None else wanted.allowed
    more = k + (wanted.own is not None)
    if isinstance(index, DiskIndex):
        # Block by block: memory need not hold its vectors.
        found, distances = index.exact(wanted.vectors, more, wanted.filter)
    else:
        found, distances = brute_force(index.vectors(ids), wanted.vectors, more, index.metric, ids=ids)
    return found if wanted.own is None else _without(wanted.own, found, distances)[0]


def _recall(index: HNSW | DiskIndex, wanted: _Wanted, ids: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true neighbours that were found. What is as near as the farthest of them counts as one of them."""
    right = 0
    if not (truth >= 0).any():
        # Nothing could be missed.
        return 1.0
    for query, row, true in zip(wanted.vectors, ids, truth, strict=True):
        row, true = row[row >= 0], true[true >= 0]
        if len(row) and len(true):
            limit = _distances(index, query, true).max()
            right += int((_distances(index, query, row) <= limit + 1e-6 * abs(limit) + 1e-12).sum())
    return min(right / int((truth >= 0).sum()), 1.0)


def _distances(index: HNSW | DiskIndex, query: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Of one query to elements, in 64 bits."""
    import numpy as np

    if index.metric == "hamming":
        return np.unpackbits(index.vectors(ids) ^ query, axis=1).sum(1, dtype=np.float64)
    held, query = index.vectors(ids).astype(np.float64), query.astype(np.float64)
    if index.metric == "l2":
        return ((held - query) ** 2).sum(1)
    return 1 - held @ (query / np.linalg.norm(query) if index.metric == "cosine" else query)


def _curve(index: HNSW | DiskIndex, wanted: _Wanted, truth: np.ndarray, k: int, quiet: bool) -> list[dict[str, Any]]:
    points = []
    for ef in sorted({max(ef, k + 1) for ef in CURVE}):
        with waiting(f"ef {ef}", quiet):
            best = float("inf")
            for _ in range(2):
                started = time.process_time()
                ids, _distances = wanted.find(index, k, ef, workers=1)
                best = min(best, time.process_time() - started)
        stats = index.stats()
        points.append(
            {
                "ef": ef,
                "k": k,
                "recall": _recall(index, wanted, ids, truth),
                "queries_per_second": len(ids) / max(best, 1e-9),
                **{name: cost for name, cost in stats.items() if name in ("distances", "hops", "blocks", "codes")},
            }
        )
    return points


def _draw(index: HNSW | DiskIndex, facts: dict[str, Any], name: str, path: Path) -> None:
    from anabranch.cli.graph.pictures import draw_recall

    title = f"{Path(name).name}   {len(index):,} x {index.dim}, {index.metric}, {index.dtype}, M {index.M}"
    draw_recall(facts["curve"], title, path)


def _write(out: Path, wanted: _Wanted, called: Names | None, ids: np.ndarray, distances: np.ndarray) -> None:
    import numpy as np

    kept = ids >= 0
    row, place = np.nonzero(kept)
    columns = {
        "query": [wanted.titles[number] for number in row.tolist()],
        "rank": place + 1,
        "id": ids[kept],
        "distance": distances[kept],
    }
    write_table(out, columns if called is None else {**columns, "name": called.of(ids[kept])})


def _results(wanted: _Wanted, called: Names | None, ids: np.ndarray, distances: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for title, id_K, distance_K in zip(wanted.titles, ids, distances, strict=True):
        kept = id_K >= 0
        result = {"query": title, "ids": id_K[kept].tolist(), "distances": distance_K[kept].tolist()}
        found.append(result if called is None else {**result, "names": called.of(id_K[kept])})
    return found


def _print(
    index: HNSW | DiskIndex,
    wanted: _Wanted,
    called: Names | None,
    ids: np.ndarray,
    distances: np.ndarray,
    facts: dict[str, Any],
) -> None:
    fact("index", f"{facts['index']}   {len(index):,} x {index.dim}, {index.metric}, {index.dtype}, M {index.M}")
    what = "elements drawn" if wanted.is_sample else "queries"
    wide = f"k {facts['k']}" if facts["radius"] is None else f"radius {facts['radius']:g}"
    # No rate: the first search also waits for kernels and pages to be loaded. --curve measures it.
    took = f"{1e3 * facts['seconds']:.3g} ms" if facts["seconds"] < 1 else duration(facts["seconds"])
    fact("search", f"{facts['queries']:,} {what}, {wide}, ef {facts['ef']}   in {took}, the first of this process")
    if facts["radius"] is not None:
        fact("within", f"{int((ids >= 0).sum()):,} in all, {ids.shape[1]:,} of one query at most")
    if "recall" in facts:
        fact("recall", f"{facts['recall']:.4f}")
    if "curve" in facts:
        print()
        cost = "blocks" if "blocks" in facts["curve"][0] else "distances"
        rows = [
            [str(p["ef"]), f"{p['recall']:.4f}", quantity(p["queries_per_second"]), quantity(p[cost])]
            for p in facts["curve"]
        ]
        table(["ef", "recall", "queries\n(1/s, one thread)", f"{cost}\n(per query)"], rows, text_columns=0)
    if not wanted.is_sample:
        print()
        rows = []
        for row, title in enumerate(wanted.titles[:SHOWN]):
            kept = ids[row] >= 0
            labels = ids[row][kept].tolist() if called is None else called.of(ids[row][kept])
            for place, (label, distance) in enumerate(zip(labels, distances[row][kept], strict=True)):
                rows.append([str(title) if not place else "", str(label), f"{distance:.6g}"])
        table(["query", "neighbour", "distance"], rows, text_columns=2)
        if len(wanted.titles) > SHOWN:
            fact("", f"and {len(wanted.titles) - SHOWN:,} more queries; --out FILE has all")
    print()
