"""``anabranch cluster coordinate``: the process that says who is there, and which step is committed, in an elastic training."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.cluster.master import read_secret
from anabranch.cli.option_sets import OptionSet, takes_sets
from anabranch.cli.options import FLAG, AsJson, Quiet
from anabranch.cli.output import fact, print_json, say
from anabranch.errors import AnabranchError, ConfigError
from anabranch.sizes import parse_bytes
from anabranch.sockets import is_local

if TYPE_CHECKING:
    from anabranch.cluster.elastic import Policy

_MOST_RANKS = 1024
# Seconds between looks whether training has ended, and in which ranks leave that were told to stop.
_LOOK_S, _PARTING_S = 0.1, 10.0


@dataclass(frozen=True)
class Moving(OptionSet):
    """How layers move between processes, and what for."""

    chunk: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Bytes that move to another process per step while training continues."),
    ] = "4MiB"
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=0.99,
            help="Layers move if that shortens a step by more than this share. Default: 0.03, or as the processes' config says.",
        ),
    ] = None
    expected_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of steps over which the time of a move has to pay off. Default: 1000.",
        ),
    ] = None
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bytes per second of a link, to estimate the time of a move. Default: links take no time.",
        ),
    ] = None
    max_frequency: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=1,
            max=10,
            help="Highest clock, relative to the normal one, for the slowest stage (parallel.elastic.clock). Default: 1.",
        ),
    ] = None
    power_save: Annotated[
        bool, typer.Option("--power-save", metavar=FLAG, help="Lower the clocks of stages that wait.")
    ] = False
    decoupled: Annotated[
        bool,
        typer.Option(
            "--decoupled",
            metavar=FLAG,
            help="Compute weight gradients separately, when a process would otherwise wait; this takes more memory.",
        ),
    ] = False

    def policy(self) -> Policy | None:
        """None where nothing is said: then it is as the processes' config says. Raises ConfigError."""
        from anabranch.cluster.elastic import Policy
        from anabranch.cluster.elastic.timing import DECOUPLED

        told = {
            "threshold": self.threshold,
            "expected_steps": self.expected_steps,
            "bytes_s": None if self.bandwidth is None else parse_bytes(self.bandwidth, "--bandwidth"),
            "max_frequency": self.max_frequency,
            "power_save": self.power_save or None,
            "schedule_names": (*Policy().schedule_names, DECOUPLED) if self.decoupled else None,
        }
        given = {name: value for name, value in told.items() if value is not None}
        return Policy(**given) if given else None  # type: ignore[arg-type]


MOVING = Moving()


@takes_sets()
def coordinate(
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Address for the processes; 0.0.0.0:48149 can be reached from other machines, port 0 takes a free port.",
        ),
    ] = "127.0.0.1:48149",
    replicas: Annotated[
        int, typer.Option(metavar="D", min=1, max=_MOST_RANKS, help="Processes per stage at the beginning.")
    ] = 2,
    stages: Annotated[int, typer.Option(metavar="P", min=1, max=_MOST_RANKS, help="Number of pipeline stages.")] = 1,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the secret that processes must know. Default: the variable ANABRANCH_CLUSTER_SECRET, else no secret.",
        ),
    ] = None,
    dead_after: Annotated[
        float,
        typer.Option(
            metavar="S", min=1.1, max=3600, help="Seconds without a message after which a process counts as lost."
        ),
    ] = 10.0,
    moving: Moving = MOVING,
    restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=1_000_000,
            help="How often training may restart from its last checkpoint after it stopped and processes were started again.",
        ),
    ] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Coordinate a training whose processes may be lost or join, while the computation stays the same (ElasWave).

    Training begins when D x P processes have connected (anabranch train --set parallel.elastic.coordinator=HOST:PORT). Later processes
    join after a step. The coordinator itself does not compute and sees no weights. It ends with the training; Ctrl-C and SIGTERM stop
    both.

    Example: anabranch cluster coordinate --listen 0.0.0.0:48149 --replicas 2 --stages 2 --secret-file secret
    """
    from anabranch.cluster.elastic import Coordinator
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
    policy = moving.policy()
    stopping = threading.Event()
    with Coordinator(
        replicas=replicas,
        stages=stages,
        secret=secret,
        host=host,
        port=port,
        patience_s=dead_after,
        chunk_bytes=parse_bytes(moving.chunk, "--chunk"),
        restarts=restarts,
        policy=policy,
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
