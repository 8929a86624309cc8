"""``anabranch graph serve``: answer searches and PageRank over HTTP."""

from __future__ import annotations

import ipaddress
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.graph.inputs import is_own
from anabranch.cli.graph.options import Directed, check_extra
from anabranch.cli.option_sets import OptionSet, takes_sets
from anabranch.cli.options import FLAG, AsJson, Quiet
from anabranch.cli.output import fact, print_json, say
from anabranch.errors import InputError

if TYPE_CHECKING:
    from anabranch.graph.serve import Limits, Writes

TOKEN = "ANABRANCH_ADMIN_TOKEN"
WRITE_TOKEN = "ANABRANCH_WRITE_TOKEN"


@dataclass(frozen=True)
class Changed(OptionSet):
    """What of the index of vectors may change, and how changes are kept."""

    read_only: Annotated[
        bool, typer.Option("--read-only", metavar=FLAG, help="Refuse changes of the index of vectors.")
    ] = False
    dim: Annotated[
        int | None,
        typer.Option(
            metavar="D",
            min=1,
            help="If the index file does not exist, start an empty index of vectors with D dimensions.",
        ),
    ] = None
    metric: Annotated[str, typer.Option(metavar="M", help="With --dim: l2, ip, cosine, hamming.")] = "l2"
    fsync: Annotated[
        str, typer.Option(metavar="WHEN", help="Flush changes to disk always, never, or every so many seconds.")
    ] = "always"
    snapshot: Annotated[
        int, typer.Option(metavar="BYTES", min=1, help="Write a snapshot once the log of changes is larger than this.")
    ] = 64 << 20
    max_vectors: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Maximum number of vectors in the index. Default: no limit.")
    ] = None

    def writes(self, host: str) -> tuple[Writes | None, str]:
        """None, and why, where changes are not taken."""
        from anabranch.graph.serve import Writes

        why = "it was started so"
        if self.read_only:
            return None, why
        token = os.environ.get(WRITE_TOKEN) or None
        if token is None and not is_loopback(host):
            return None, f"{host} is seen from other machines, and there is no token in {WRITE_TOKEN}"
        return Writes(fsync=_when(self.fsync), snapshot_bytes=self.snapshot, vectors=self.max_vectors, token=token), why


@dataclass(frozen=True)
class Bounds(OptionSet):
    """How much a request may be, and how many there may be."""

    max_body: Annotated[int, typer.Option(metavar="BYTES", help="Maximum size of a request body.")] = 8 << 20
    max_batch: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of queries, or of vectors to change, in a request.")
    ] = 1024
    max_k: Annotated[int, typer.Option(metavar="K", help="Maximum number of results of a query.")] = 1000
    concurrency: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of requests processed at the same time. Default: one per core."),
    ] = None
    waiting: Annotated[
        int, typer.Option(metavar="N", help="Number of requests that may wait; further ones get 429.")
    ] = 64
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds a request may take.")] = 10.0
    connections: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of open connections; beyond it, only /healthz answers.")
    ] = 1024
    stall: Annotated[
        float, typer.Option(metavar="S", help="Close connections that send or read hardly anything for S seconds.")
    ] = 10.0

    def limits(self) -> Limits:
        """As the server takes them. Raises InputError."""
        from anabranch import machine
        from anabranch.graph.serve import Limits

        return Limits(
            body_bytes=self.max_body,
            batch=self.max_batch,
            k=self.max_k,
            concurrency=self.concurrency or machine.usable_cores(),
            waiting=self.waiting,
            timeout_s=self.timeout,
            connections=self.connections,
            stall_s=self.stall,
        )


CHANGED, BOUNDS = Changed(), Bounds()


@takes_sets()
def serve(
    files: Annotated[
        list[str],
        typer.Argument(metavar="INDEX...", help="An index of vectors (.anb), and/or a graph or PageRank index."),
    ],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 can be reached from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes a free port.")] = 8080,
    alpha: Annotated[
        float,
        typer.Option(metavar="A", help="For PageRank from a graph: probability that a walk ends before each step."),
    ] = 0.15,
    method: Annotated[
        str, typer.Option(metavar="M", help="For PageRank from a graph: auto, solve, power, push.")
    ] = "auto",
    directed: Directed = None,
    mmap: Annotated[
        bool,
        typer.Option(
            "--mmap",
            metavar=FLAG,
            help="Map files into memory instead of reading them; replace such files only by renaming.",
        ),
    ] = False,
    watch: Annotated[
        float | None, typer.Option(metavar="S", help="Look for changed files every S seconds, and load them.")
    ] = None,
    changed: Changed = CHANGED,
    bounds: Bounds = BOUNDS,
    drain: Annotated[
        float, typer.Option(metavar="S", help="Seconds to keep serving after a signal to stop, while /readyz says 503.")
    ] = 0.0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Answer nearest-neighbour and PageRank requests over HTTP, and accept changes of the index.

    POST /search, /ppr, /upsert and /delete; GET /v1/info, /openapi.json, /healthz, /readyz and /metrics.

    Changes are written to a log in INDEX.live before they are acknowledged; the index file itself stays as it is. If other machines can
    reach the server, changes need the token in ANABRANCH_WRITE_TOKEN.

    SIGHUP, --watch or POST /admin/reload (with the token in ANABRANCH_ADMIN_TOKEN) load new files without a failed request.

    SIGTERM and Ctrl-C stop the server once the running requests are answered.

    Example: anabranch graph serve index.anb graph.anb --port 8080
    """
    check_extra()
    from anabranch.graph.serve import Sources, run
    from anabranch.web import heap

    if watch is not None and not 0 < watch < float("inf"):
        raise InputError(f"--watch is {watch}; it must be a positive number of seconds")
    if not 0 <= drain < float("inf"):
        raise InputError(f"--drain is {drain}; it must be a number of seconds, 0 or more")
    limits = bounds.limits()
    if not quiet:
        logging.getLogger("anabranch").setLevel(logging.INFO)
    writes, why = changed.writes(host)
    if changed.dim is not None:
        _begin(files, changed.dim, changed.metric)
    sources = Sources(files, mmap=mmap, alpha=alpha, method=method, directed=directed, writes=writes, why_read_only=why)

    def ready(url: str, loaded: Any) -> None:
        heap.set_aside()
        if as_json:
            print_json({"url": url, "pid": os.getpid(), **loaded.to_dict()})
        else:
            _print(url, loaded.to_dict())
        if writes is None and not (changed.read_only or quiet):
            say(f"changes are not taken: {why}")
        import sys

        sys.stdout.flush()

    run(
        sources,
        host=host,
        port=port,
        limits=limits,
        token=os.environ.get(TOKEN) or None,
        watch_s=watch,
        drain_s=drain,
        on_ready=ready,
    )
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
