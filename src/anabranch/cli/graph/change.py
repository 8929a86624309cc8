"""``anabranch graph remove`` and ``anabranch graph update``: take elements out of an index, bring some in, or move them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.graph.inputs import element_ids, numbers
from anabranch.cli.graph.options import Workers, check_extra
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import FLAG, AsJson, Quiet
from anabranch.cli.output import fact, print_json, size, wrote
from anabranch.errors import DataError, InputError
from anabranch.files import check_apart

if TYPE_CHECKING:
    import numpy as np

    from anabranch.graph import HNSW
    from anabranch.graph.names import Names

Index = Annotated[str, typer.Argument(metavar="INDEX", help="An index that anabranch graph index made.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the changed index here. Default: replace INDEX.")]


def remove(
    index: Index,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Elements to remove, by name or id.")
    ] = None,
    rows: Annotated[str | None, typer.Option(metavar="I,J", help="The same by id, e.g. 0,7 or 0-9.")] = None,
    compact: Annotated[
        bool, typer.Option("--compact", metavar=FLAG, help="Also remove all deleted elements from the file.")
    ] = False,
    out: Out = None,
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Remove elements from an index.

    They are no longer found. Once a fifth of all elements is deleted, or with --compact, they are also removed from the file.

    Example: anabranch graph remove index.anb --rows 0,7 --compact
    """
    check_extra()
    import numpy as np

    with _opened(index, out, workers, quiet) as (made, called):
        if names and rows is not None:
            raise InputError("give either names of elements or --rows, not both")
        if not names and rows is None and not compact:
            raise InputError(
                "nothing to remove; give names or --rows 0,7 (or --compact, for elements that are already deleted)"
            )
        ids = element_ids(called, names) if names else numbers(rows) if rows is not None else np.empty(0, np.int64)
        before = made.stats()
        with waiting("taking out", quiet):
            made.remove(ids)
            if compact:
                made.compact(workers=workers)
        _save(made, called, index, out)
    after = made.stats()
    facts = {
        "index": index,
        "removed": len(ids),
        "vectors": len(made),
        "deleted": after["deleted"],
        "size_bytes": {"before": before["size_bytes"], "after": after["size_bytes"]},
        "wrote": str(out or index),
    }
    if as_json:
        print_json(facts)
        return
    fact("removed", f"{len(ids):,} of {before['count']:,}   {after['deleted']:,} deleted ones are still in the file")
    wrote(
        f"{out or index} ({size((out or Path(index)).stat().st_size)})",
        f"anabranch graph search {out or index} --check",
    )


def update(
    index: Index,
    vectors: Annotated[
        str,
        typer.Argument(metavar="VECTORS", help="Vectors: .npy, .npz, .parquet, .csv, .tsv, .anb, with names or not."),
    ],
    rows: Annotated[
        str | None, typer.Option(metavar="I,J", help="Their ids, e.g. 0,7 or 0-9. Default: as in the file.")
    ] = None,
    out: Out = None,
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Add vectors to an index, or change existing ones.

    A vector with the name or id of an element replaces that element's vector; all others are added, those without a name or id after the
    largest id.

    Example: anabranch graph update index.anb more.npy
    """
    check_extra()
    from anabranch.cli.graph.vectors import read_vectors

    with _opened(index, out, workers, quiet, vectors) as (made, called):
        found = read_vectors(vectors, bits=made.metric == "hamming")
        if found.array.shape[1] != made.row_size:
            raise InputError(f"{vectors} has vectors of {found.array.shape[1]} numbers, the index of {made.row_size}")
        ids, called = _ids(found.ids, len(found.array), rows, made, called, vectors)
        before = len(made)
        with waiting("bringing in", quiet):
            made.add(found.array, ids, update=True, repair=True, workers=workers)
        _save(made, called, index, out)
    new = len(made) - before
    facts = {
        "index": index,
        "new": new,
        "moved": len(found.array) - new,
        "vectors": len(made),
        "wrote": str(out or index),
        "size_bytes": made.stats()["size_bytes"],
    }
    if as_json:
        print_json(facts)
        return
    fact("updated", f"{new:,} new, {len(found.array) - new:,} moved   {len(made):,} vectors")
    wrote(
        f"{out or index} ({size((out or Path(index)).stat().st_size)})",
        f"anabranch graph search {out or index} --check",
    )


@contextmanager
def _opened(
    index: str, out: Path | None, workers: int | None, quiet: bool, *read: str
) -> Iterator[tuple[HNSW, Names | None]]:
    """The index, with what a server changed, and its names. Until the end nobody else changes what is written over."""
    from anabranch.graph.disk import DiskIndex
    from anabranch.graph.live import open_named, replacing
    from anabranch.graph.names import check_names_place, names_path

    if out is not None:
        check_apart([out, names_path(out)], [index, names_path(index), *read])
    with replacing(out or index):
        check_names_place(out or index)
        with waiting(f"reading {index}", quiet):
            made, called = open_named(index, workers=workers)
        if isinstance(made, DiskIndex):
            raise InputError(
                f"{index} is on disk and cannot be changed; build a new one (anabranch graph index --disk)"
            )
        yield made, called


def _ids(
    titles: np.ndarray | None, count: int, rows: str | None, made: HNSW, called: Names | None, source: str
) -> tuple[np.ndarray | None, Names | None]:
    """Ids of vectors, None for new ones, and the names of the index with those that come."""
    import numpy as np

    from anabranch.graph.names import Names

    if rows is not None:
        ids = numbers(rows)
        if len(ids) != count:
            raise InputError(f"--rows names {len(ids):,} elements, {source} has {count:,} vectors")
        if called is not None and ids.max() >= len(called):
            raise InputError(
                f"--rows names {ids.max()}, and the index has {len(called):,} names; new elements need one"
            )
        return ids, called
    if called is None:
        if titles is not None and titles.dtype.kind not in "iu":
            if not len(made):
                # The first that come say what elements are called.
                return np.arange(count), Names(titles)
            raise InputError(f"{source} calls vectors by names, the index by ids; say which they are with --rows")
        return (None if titles is None else np.asarray(titles, np.int64)), None
    if titles is None:
        raise InputError(f"the elements of the index have names, and the vectors of {source} have none")
    known = {name: number for number, name in enumerate(called.array.tolist())}
    listed = [_like(name, called, source) for name in titles.tolist()]
    new = [name for name in listed if name not in known]
    known |= {name: len(called) + number for number, name in enumerate(new)}
    return np.array([known[name] for name in listed], np.int64), Names(
        [*called.array.tolist(), *new]
    ) if new else called


def _like(name: Any, called: Names, source: str) -> Any:
    """A name as the index has them: numbers, or text."""
    if not called.are_numbers:
        return str(name)
    if not isinstance(name, int):
        raise DataError(f"{source} has a vector called {name!r:.80}; the index calls its elements by numbers")
    return name


def _save(made: HNSW, called: Names | None, index: str, out: Path | None) -> None:
    from anabranch.graph.names import remove_names, write_named, write_names

    if out is None and called is not None:
        write_named(index, called, made.save)
        return
    place = out or Path(index)
    made.save(place)
    if called is not None:
        write_names(place, called)
    else:
        # Of an index that was there before.
        remove_names(place)
