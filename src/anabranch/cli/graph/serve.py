"""``anabranch graph serve``: answer searches and PageRank over HTTP."""

from __future__ import annotations

import ipaddress
import logging
import os
from typing import Annotated, Any

import typer

from anabranch.cli.graph.inputs import is_own
from anabranch.cli.graph.options import Directed, check_extra
from anabranch.cli.options import FLAG, AsJson, Quiet
from anabranch.cli.output import fact, print_json, say
from anabranch.errors import InputError

TOKEN = "ANABRANCH_ADMIN_TOKEN"
WRITE_TOKEN = "ANABRANCH_WRITE_TOKEN"


def serve(
    files: Annotated[
        list[str],
        typer.Argument(metavar="INDEX...", help="An index of vectors (.anb), and/or a graph or PageRank index."),
    ],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 is seen from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes a free one.")] = 8080,
    alpha: Annotated[
        float,
        typer.Option(metavar="A", help="Of PageRank from a graph: probability that a walk ends before each step."),
    ] = 0.15,
    method: Annotated[
        str, typer.Option(metavar="M", help="Of PageRank from a graph: auto, solve, power, push.")
    ] = "auto",
    directed: Directed = None,
    mmap: Annotated[
        bool,
        typer.Option(
            "--mmap", metavar=FLAG, help="Leave files on disk until they are used; replace them by renaming only."
        ),
    ] = False,
    watch: Annotated[
        float | None, typer.Option(metavar="S", help="Look for changed files every S seconds, and serve them.")
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", metavar=FLAG, help="Take no changes of the index of vectors.")
    ] = False,
    dim: Annotated[
        int | None,
        typer.Option(
            metavar="D", min=1, help="Begin an empty index of vectors of D numbers where the file is not there."
        ),
    ] = None,
    metric: Annotated[str, typer.Option(metavar="M", help="Of an index begun so: l2, ip, cosine, hamming.")] = "l2",
    fsync: Annotated[
        str, typer.Option(metavar="WHEN", help="Bring changes to the disk always, never, or every so many seconds.")
    ] = "always",
    snapshot: Annotated[
        int, typer.Option(metavar="BYTES", min=1, help="Write a snapshot once the log of changes is larger.")
    ] = 64 << 20,
    max_vectors: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most vectors that the index may hold. Default: no limit.")
    ] = None,
    max_body: Annotated[int, typer.Option(metavar="BYTES", help="Largest body of a request.")] = 8 << 20,
    max_batch: Annotated[
        int, typer.Option(metavar="N", help="Most queries, or vectors to change, in a request.")
    ] = 1024,
    max_k: Annotated[int, typer.Option(metavar="K", help="Most results of a query.")] = 1000,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Requests at a time. Default: one per core.")
    ] = None,
    waiting: Annotated[int, typer.Option(metavar="N", help="Requests that may wait; more get 429.")] = 64,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds a request may take.")] = 10.0,
    connections: Annotated[
        int, typer.Option(metavar="N", help="Connections open at once; on those beyond only /healthz answers.")
    ] = 1024,
    stall: Annotated[
        float, typer.Option(metavar="S", help="Cut off who is silent, or hardly reads an answer, for S seconds.")
    ] = 10.0,
    drain: Annotated[
        float, typer.Option(metavar="S", help="Seconds to go on after a signal to stop, while /readyz says 503.")
    ] = 0.0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Answer nearest-neighbour and PageRank requests over HTTP, and take changes of the index.

    POST /search, /ppr, /upsert and /delete; GET /v1/info, /openapi.json, /healthz, /readyz and /metrics.

    Changes are in a log in INDEX.live before they are acknowledged; the file itself stays as it is. Where other
    machines can reach the server, only those with the token in ANABRANCH_WRITE_TOKEN change anything.

    SIGHUP, --watch or POST /admin/reload (with the token in ANABRANCH_ADMIN_TOKEN) take new files without a failed request.

    SIGTERM and Ctrl-C stop when the requests under way are answered.

    Example: anabranch graph serve index.anb graph.anb --port 8080
    """  # fmt: skip
    check_extra()
    from anabranch import machine
    from anabranch.graph.serve import Limits, Sources, Writes, run
    from anabranch.web import heap

    if watch is not None and not 0 < watch < float("inf"):
        raise InputError(f"--watch is {watch}; it must be a positive number of seconds")
    if not 0 <= drain < float("inf"):
        raise InputError(f"--drain is {drain}; it must be a number of seconds, 0 or more")
    limits = Limits(
        body_bytes=max_body, batch=max_batch, k=max_k, concurrency=concurrency or machine.usable_cores(), waiting=waiting,
        timeout_s=timeout, connections=connections, stall_s=stall,
    )  # fmt: skip
    if not quiet:
        logging.getLogger("anabranch").setLevel(logging.INFO)
    writes, why = None, "it was started so"
    if not read_only:
        token = os.environ.get(WRITE_TOKEN) or None
        if token is not None or is_loopback(host):
            writes = Writes(fsync=_when(fsync), snapshot_bytes=snapshot, vectors=max_vectors, token=token)
        else:
            why = f"{host} is seen from other machines, and there is no token in {WRITE_TOKEN}"
    if dim is not None:
        _begin(files, dim, metric)
    sources = Sources(files, mmap=mmap, alpha=alpha, method=method, directed=directed, writes=writes, why_read_only=why)

    def ready(url: str, loaded: Any) -> None:
        heap.set_aside()
        if as_json:
            print_json({"url": url, "pid": os.getpid(), **loaded.to_dict()})
        else:
            _print(url, loaded.to_dict())
        if writes is None and not (read_only or quiet):
            say(f"changes are not taken: {why}")
        import sys

        sys.stdout.flush()

    run(
        sources, host=host, port=port, limits=limits, token=os.environ.get(TOKEN) or None, watch_s=watch, drain_s=drain,
        on_ready=ready,
    )  # fmt: skip
    if not quiet:
        say("stopped; every request under way was answered")


def is_loopback(host: str) -> bool:
    """Whether an address is seen from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _when(text: str) -> str | float:
    """What ``--fsync`` says: a word, or seconds."""
    try:
        return float(text)
    except ValueError:
        return text


def _begin(files: list[str], dim: int, metric: str) -> None:
    """Make an empty index of the one file that is not there. Raises InputError where it is not clear which that is."""
    from anabranch.graph import HNSW

    missing = [file for file in files if not os.path.lexists(file)]
    if len(missing) > 1:
        raise InputError(f"--dim begins one index, and {' and '.join(missing)} are not there")
    if missing:
        HNSW(dim, metric).save(missing[0])
        return
    held = [HNSW.load(file, mmap=True) for file in files if _is_index(file)]
    if held and (held[0].dim, held[0].metric) != (dim, metric):
        raise InputError(
            f"--dim {dim} --metric {metric} do not fit: the index holds vectors of {held[0].dim} numbers, {held[0].metric}"
        )


def _is_index(file: str) -> bool:
    from anabranch.graph.array_file import kind_of
    from anabranch.graph.hnsw.storage import KIND

    return is_own(file) and kind_of(file) == KIND


def _print(url: str, found: dict[str, Any]) -> None:
    if found["search"] is not None:
        about = found["search"]
        fact("search", f"{about['file']}   {about['vectors']:,} x {about['dim']}, {about['metric']}, {about['dtype']}")
        if "writes" in about:
            fact(
                "changes",
                f"{about['file']}.live   {about['writes']['number']:,} writes, fsync {about['writes']['fsync']}",
            )
    if found["ppr"] is not None:
        about = found["ppr"]
        fact("ppr", f"{about['file']}   {about['nodes']:,} nodes, alpha {about['alpha']:g}")
    fact("serving", f"{url}   (Ctrl-C stops)")
    path, body = ("search", '{"ids": [0], "k": 5}') if found["search"] is not None else ("ppr", '{"seeds": 0, "k": 5}')
    fact("next", f"curl -s {url}/v1/{path} -d '{body}' -H 'content-type: application/json'")
