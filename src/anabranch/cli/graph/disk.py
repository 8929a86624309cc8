"""``anabranch graph index --disk``: an index of vectors that stays on disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.cli.graph.files import open_array
from anabranch.cli.graph.inputs import is_own
from anabranch.cli.graph.waiting import Rate
from anabranch.cli.output import duration, fact, print_json, quantity, size, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import DataError, InputError
from anabranch.sizes import parse_bytes

if TYPE_CHECKING:
    import numpy as np

    from anabranch.graph.disk import DiskIndex


@dataclass(frozen=True)
class Wanted:
    """What was asked for on the command line."""

    vectors: str
    out: Path
    memory: str | None
    metric: str
    links: int
    ef_construction: int
    code_bytes: int | None
    workers: int | None
    seed: int


def index_on_disk(wanted: Wanted, names: np.ndarray | None, quiet: bool, as_json: bool) -> None:
    """Make it, of vectors in a .npy file, which is read a piece at a time, or of an index that is there; tell about it.

    ``names`` are those of the rows, if they have some.
    """
    from anabranch.graph.names import Names, read_names, remove_names, write_names

    limit = None if wanted.memory is None else parse_bytes(wanted.memory, "--memory")
    started = time.perf_counter()
    if is_own(wanted.vectors):
        made = _of_index(wanted, limit)
        called = read_names(wanted.vectors, made.ids) if names is None else Names(names)
    else:
        made = _of_vectors(wanted, limit, names, quiet)
        called = None if names is None else Names(names)
    seconds = time.perf_counter() - started
    if called is not None:
        write_names(wanted.out, called)
    else:
        # Of an index that was there before.
        remove_names(wanted.out)
    stats = made.stats()
    facts = {
        "vectors": len(made),
        "dim": made.dim,
        "metric": made.metric,
        "dtype": made.dtype,
        "M": made.M,
        "named": called is not None,
        "seconds": seconds,
        "memory_limit": limit,
        **{
            name: stats[name]
            for name in ("shards", "max_degree", "code_bytes", "block_bytes", "per_block", "memory_bytes")
        },
        "size_bytes": made.size_bytes,
        "wrote": str(wanted.out),
    }
    made.close()
    if as_json:
        print_json(facts)
        return
    fact(
        "vectors",
        f"{wanted.vectors}   {facts['vectors']:,} x {facts['dim']}" + ("   with names" if called is not None else ""),
    )
    fact(
        "index",
        f"on disk, {facts['metric']}, codes of {facts['code_bytes']} bytes, {facts['per_block']} vectors in a block of "
        f"{facts['block_bytes']:,} bytes, at most {facts['max_degree']} links each",
    )
    fact(
        "built",
        f"in {duration(seconds)}, {quantity(facts['vectors'] / max(seconds, 1e-9))} vectors/s"
        + (f", in {facts['shards']} shards" if facts["shards"] > 1 else ""),
    )
    fact(
        "memory",
        f"{size(facts['memory_bytes'])} while it is open"
        + ("" if limit is None else f", of {size(limit)} that it may take"),
    )
    wrote(f"{wanted.out} ({size(facts['size_bytes'])})", f"anabranch graph search {wanted.out} --rows 0 --check")


def _of_vectors(wanted: Wanted, limit: int | None, names: np.ndarray | None, quiet: bool) -> DiskIndex:

    from anabranch.graph.disk import build

    path = Path(wanted.vectors)
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix != ".npy":
        raise InputError(
            f"--disk reads vectors a piece at a time: from .npy, or an index of ours (.anb); {path} is neither"
        )
    vectors = open_array(path)
    if names is not None and len(names) != len(vectors):
        raise InputError(f"--names is of a graph with {len(names):,} nodes; there are {len(vectors):,} vectors")
    with Progress(len(vectors) if vectors.ndim else 0, "vector", quiet=quiet) as progress:
        return build(
            vectors,
            wanted.out,
            metric=wanted.metric,
            memory=limit,
            M=wanted.links,
            ef_construction=wanted.ef_construction,
            code_bytes=wanted.code_bytes,
            seed=wanted.seed,
            workers=wanted.workers,
            progress=Rate(progress, "vectors"),
        )


def _of_index(wanted: Wanted, limit: int | None) -> DiskIndex:
    from anabranch.graph.disk import from_hnsw
    from anabranch.graph.hnsw import HNSW
    from anabranch.graph.live import open_index

    index = open_index(wanted.vectors, mmap=True, workers=wanted.workers)
    if not isinstance(index, HNSW):
        raise InputError(f"{wanted.vectors} is already on disk; build the new index from its vectors")
    return from_hnsw(index, wanted.out, memory=limit, code_bytes=wanted.code_bytes, workers=wanted.workers)
