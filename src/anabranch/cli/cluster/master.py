"""``anabranch cluster master``: the process that peers of a run agree through."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import fact, print_json, say
from anabranch.errors import DataError, InputError
from anabranch.files import check_apart
from anabranch.sockets import is_local

if TYPE_CHECKING:
    from anabranch.cluster.pccl import Master

_LONGEST_SECRET = 4096


def master(
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Address for the peers; 0.0.0.0:48148 can be reached from other machines, port 0 takes a free port.",
        ),
    ] = "127.0.0.1:48148",
    journal: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Record all decisions here, so that a restarted master continues the run.",
        ),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the secret that peers must know. Default: the variable ANABRANCH_CLUSTER_SECRET, else no secret.",
        ),
    ] = None,
    dead_after: Annotated[
        float,
        typer.Option(metavar="S", min=0.1, max=3600, help="Seconds without a message after which a peer is dropped."),
    ] = 5.0,
    connect_within: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=0.1,
            max=3600,
            help="Seconds that peers have to connect to their neighbours; raise it for slow networks or many peers.",
        ),
    ] = 10.0,
    most_peers: Annotated[int, typer.Option(metavar="N", min=1, max=1024, help="Maximum number of peers.")] = 256,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run the master of a PCCL group: peers find each other, agree on each step, and continue when one is lost.

    The master sees no tensors: data goes directly between peers. Ctrl-C and SIGTERM stop it; peers wait half a minute for a new master
    with the same --journal.

    Example: anabranch cluster master --listen 0.0.0.0:48148 --journal run.journal
    """
    check_apart([journal], [secret_file])
    from anabranch.cluster.pccl import Master

    secret = None if secret_file is None else read_secret(secret_file)
    made = Master(
        listen,
        secret=secret,
        journal=journal,
        heartbeat_s=dead_after / 5,
        dead_s=dead_after,
        connect_s=connect_within,
        most_peers=most_peers,
    )
    if not quiet:
        logging.getLogger("anabranch.cluster.pccl").setLevel(logging.INFO)
    _say_ready(
        made, as_json=as_json, is_open=not made.has_secret and not is_local(made.address.rpartition(":")[0].strip("[]"))
    )

    def stop(*_: Any) -> None:
        made.end()

    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, stop)
    made.run()
    if not quiet:
        say("stopped")


def _say_ready(made: Master, *, as_json: bool, is_open: bool) -> None:
    if as_json:
        print_json({"address": made.address, "run": made.state.run, "pid": os.getpid(), "has_secret": made.has_secret})
    else:
        fact("master", f"{made.address}   run {made.state.run[:8]}   (Ctrl-C stops)")
    if is_open:
        say("no secret: whoever reaches this port takes part; see --secret-file")
    sys.stdout.flush()


def read_secret(path: Path) -> str:
    """The first line of a file. Raises DataError where it cannot be read, InputError where it says nothing or too much."""
    try:
        text = path.read_bytes()[: _LONGEST_SECRET + 1].decode()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text") from None
    line = text.splitlines()[0].strip() if text.strip() else ""
    if not line or len(text) > _LONGEST_SECRET:
        raise InputError(f"{path} holds no secret: one line of at most {_LONGEST_SECRET} bytes")
    return line
