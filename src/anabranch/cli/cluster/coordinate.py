"""``anabranch cluster coordinate``: the process that says who is there, and which step is committed, in an elastic training."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.cluster.master import read_secret
from anabranch.cli.options import FLAG, AsJson, Quiet
from anabranch.cli.output import fact, print_json, say
from anabranch.errors import AnabranchError, ConfigError
from anabranch.sizes import parse_bytes
from anabranch.sockets import is_local

_MOST_RANKS = 1024
# Seconds between looks whether training has ended, and in which ranks leave that were told to stop.
_LOOK_S, _PARTING_S = 0.1, 10.0


def coordinate(
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Where processes call; 0.0.0.0:48149 is seen from other machines, port 0 takes a free one.",
        ),
    ] = "127.0.0.1:48149",
    replicas: Annotated[
        int, typer.Option(metavar="D", min=1, max=_MOST_RANKS, help="Processes of a stage to begin with.")
    ] = 2,
    stages: Annotated[
        int, typer.Option(metavar="P", min=1, max=_MOST_RANKS, help="Stages that the layers are cut into.")
    ] = 1,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What processes must know. Default: the environment's ANABRANCH_CLUSTER_SECRET, or nothing.",
        ),
    ] = None,
    dead_after: Annotated[
        float,
        typer.Option(
            metavar="S", min=1.1, max=3600, help="Seconds after which a process that is not heard of counts as lost."
        ),
    ] = 10.0,
    chunk: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Of what moves to another process in one step while training goes on."),
    ] = "4MiB",
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=0.99,
            help="Layers move where a step is then shorter by more than this share. Default: 0.03, or as processes say.",
        ),
    ] = None,
    expected_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Steps for which a shorter one is expected to last, to weigh against what the move takes. Default: 1000.",
        ),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bytes that a link carries in a second, for what a move takes. Default: links that take no time.",
        ),
    ] = None,
    max_frequency: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=1,
            max=10,
            help="Most a clock is raised over the usual, of a stage that stays the slowest (parallel.elastic.clock). Default: 1.",
        ),
    ] = None,
    power_save: Annotated[
        bool, typer.Option("--power-save", metavar=FLAG, help="Lower clocks of stages that wait.")
    ] = False,
    decoupled: Annotated[
        bool,
        typer.Option(
            "--decoupled",
            metavar=FLAG,
            help="Steps may have gradients of weights as work of their own, for when a process would wait; it takes more memory.",
        ),
    ] = False,
    restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=1_000_000,
            help="Times that training begins anew, from its last checkpoint, where it has stopped and processes are started again.",
        ),
    ] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Keep a training going when processes are lost or come, with the same computation (ElasWave).

    Training begins when D x P processes are there (anabranch train --set parallel.elastic.coordinator=HOST:PORT); one that comes later is
    taken in after a step. It does no work of a step and sees no weights. It ends with the training; Ctrl-C and SIGTERM stop both.

    Example: anabranch cluster coordinate --listen 0.0.0.0:48149 --replicas 2 --stages 2 --secret-file secret
    """
    from anabranch.cluster.elastic import Coordinator, Policy
    from anabranch.cluster.elastic.timing import DECOUPLED
    from anabranch.cluster.pccl.addresses import parse_address
    from anabranch.cluster.pccl.handshake import run_secret

    host, port = parse_address(listen, 48149)
    host = host or "0.0.0.0"
    secret = run_secret(None if secret_file is None else read_secret(secret_file)).decode()
    if not secret and not is_local(host):
        raise ConfigError(
            f"--listen is {listen!r}, which other machines reach, and there is no secret; give --secret-file, or set "
            "ANABRANCH_CLUSTER_SECRET"
        )
    told = {
        "threshold": threshold,
        "expected_steps": expected_steps,
        "bytes_s": None if bandwidth is None else parse_bytes(bandwidth, "--bandwidth"),
        "max_frequency": max_frequency,
        "power_save": power_save or None,
        "schedule_names": (*Policy().schedule_names, DECOUPLED) if decoupled else None,
    }
    given = {name: value for name, value in told.items() if value is not None}
    stopping = threading.Event()
    with Coordinator(
        replicas=replicas,
        stages=stages,
        secret=secret,
        host=host,
        port=port,
        patience_s=dead_after,
        chunk_bytes=parse_bytes(chunk, "--chunk"),
        restarts=restarts,
        policy=Policy(**given) if given else None,  # type: ignore[arg-type]
        log=None if quiet else _tell,
    ) as made:
        # Before anybody is told that it is here.
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, lambda *_: stopping.set())
        whole = replicas * stages
        if as_json:
            sizes = {"replicas": replicas, "stages": stages}
            print_json({"address": made.address, **sizes, "pid": os.getpid(), "has_secret": bool(secret)})
        else:
            fact("coordinator", f"{made.address}   waits for {whole} process{'es' * (whole > 1)}   (Ctrl-C stops)")
        sys.stdout.flush()
        while not stopping.wait(_LOOK_S) and not made.has_ended and made.stopped is None:
            pass
        deadline = time.monotonic() + _PARTING_S
        while made.stopped is not None and not made.has_ended and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        why, version = made.stopped, made.version
    if why is not None:
        raise AnabranchError(f"training stopped at step {version}: {why}")
    if not quiet:
        say("stopped" if stopping.is_set() else f"training has ended at step {version}")


def _tell(what: str, told: dict[str, Any]) -> None:
    """A line of what happens, where it is worth one."""
    match what:
        case "joined":
            say(f"rank {told['rank']} is here")
        case "refused":
            say(f"a process was refused: {told['why']}")
        case "lost":
            say(f"rank {told['rank']} is lost: {told['why']}")
        case "epoch":
            stages = " and ".join(", ".join(map(str, stage)) for stage in told["stages"])
            say(f"from step {told['version']}: ranks {stages}; stages begin at layers {[0, *told['bounds']]}")
            for warning in told["warnings"]:
                say(f"note: {warning}")
        case "stream":
            say(f"layers move or a rank comes in while training goes on, until step {told['end']}")
        case "stuck" | "door":
            say(f"note: {told['why']}")
        case "bad snapshot":
            say(f"rank {told['holder']} has a damaged snapshot of rank {told['owner']}: {told['why']}")
        case "wrote":
            say(f"rank {told['rank']} wrote {told['where']} (step {told['version']})")
        case "anew":
            again = f"{told['left']} time{'s' * (told['left'] != 1)} more"
            say(f"training has stopped: {told['why']}; it begins anew when all are there again ({again})")
        case "left":
            say(f"rank {told['rank']} is done")
