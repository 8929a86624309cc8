"""``anabranch cluster bench``: what do the links between these machines bear?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.cli.cluster.master import read_secret
from anabranch.cli.options import AsJson, Quiet, finite_number
from anabranch.cli.output import binary_size, fact, print_json, say, table
from anabranch.errors import CapacityError, ConfigError
from anabranch.extras import require
from anabranch.sizes import parse_bytes

if TYPE_CHECKING:
    from anabranch.cluster.pccl import Communicator
    from anabranch.cluster.pccl.bench import Bench
    from anabranch.cluster.pccl.quantise import Quantiser

_SIZES = ("1MiB", "16MiB", "64MiB")
# Others have the last answer of the master on its way to them when this peer has its own.
_LEAVE_S = 10.0


def bench(
    peers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=2,
            max=256,
            help="Begin when N peers are connected. Without --master and --listen: processes on this machine.",
        ),
    ] = 2,
    master: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Connect to this address, of another machine's --listen or of cluster master."
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Accept other machines at this address of this machine."),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            metavar="HOST",
            help="Address at which other peers reach this one; HOST:PORT for a forwarded port. Default: the address from which "
            "it connects.",
        ),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            help="Size of the buffer (float32), such as 64MiB. May be repeated. Default: 1MiB, 16MiB, 64MiB.",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, max=10_000, help="Rounds for each size, after a warm-up round.")
    ] = 10,
    connections: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=64, help="Connections with each neighbour; a buffer is split over them."),
    ] = 1,
    quantise: Annotated[
        Literal["none", "min_max", "zero_point"],
        typer.Option(metavar="KIND", help="How numbers are sent: none (float32), min_max or zero_point."),
    ] = "none",
    bits: Annotated[int, typer.Option(metavar="B", help="Bits of a quantised number, 8 or 16.")] = 8,
    links: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0.01,
            max=60,
            callback=finite_number,
            help="First measure each link for S seconds, and use the best ring. Default: no measurement.",
        ),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(metavar="S", min=1, max=86_400, callback=finite_number, help="Seconds to wait for all peers."),
    ] = 120.0,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the secret that peers must know. Default: the variable ANABRANCH_CLUSTER_SECRET, else no secret.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the network between machines with all-reduces (PCCL).

    Start it on each machine with the same options; all print the same table. GB/s is the size of the buffer divided by the time of the
    slowest peer. Every sum is checked.

    Example: anabranch cluster bench --listen 10.0.0.1:48148, and on the other machine: anabranch cluster bench --master 10.0.0.1:48148
    """
    require("lm", by="anabranch cluster bench")
    from anabranch.cluster.pccl.bench import bench as measured
    from anabranch.cluster.pccl.bench import bench_here, check_bench
    from anabranch.cluster.pccl.quantise import Quantiser

    if master is not None and listen is not None:
        raise ConfigError(
            "--master and --listen do not go together; one machine listens, and the others name it by --master"
        )
    is_here = master is None and listen is None
    for name, value in (("--advertise", advertise), ("--secret-file", secret_file)):
        if is_here and value is not None:
            raise ConfigError(
                f"{name} is for several machines; say --listen on one of them, and --master on the others"
            )
    counts = [parse_bytes(size, "--size") for size in sizes or _SIZES]
    made: Quantiser | None = None if quantise == "none" else Quantiser(quantise, bits)
    if quantise == "none" and bits != 8:
        raise ConfigError(f"--bits {bits} is of quantised numbers; say --quantise min_max or zero_point too")
    check_bench(peers, counts, rounds, connections, links)
    _check_room(max(counts), peers if is_here else 1)
    values: dict[str, Any] = {
        "sizes": counts,
        "rounds": rounds,
        "connections": connections,
        "quantise": made,
        "links_s": links,
    }
    if is_here:
        found = bench_here(peers, **values)
    else:
        secret = None if secret_file is None else read_secret(secret_file)
        told = {"pool": connections, "advertise": advertise or "", "secret": secret}
        with _joined(master, listen, told, wait_s=wait, is_quiet=quiet) as others:
            found = measured(others, world=peers, **values)
    if as_json:
        print_json(
            {"quantise": quantise, "bits": 32 if made is None else bits, "connections": connections, **found.to_dict()}
        )
    else:
        _print(found, made, connections)


def _check_room(size: int, peers: int) -> None:
    """Raises CapacityError where the buffers of so many processes of this machine have no room: one, its numbers, a copy, and the sum."""
    from anabranch.machine import room_bytes

    room, needed = room_bytes(), 4 * size * peers
    if needed > room:
        raise CapacityError(
            f"{peers} {'process' if peers == 1 else 'processes'} with a buffer of {binary_size(size)} take {binary_size(needed)}, and "
            f"{binary_size(room)} are free; use a smaller --size"
        )


@contextmanager
def _joined(
    master: str | None, listen: str | None, told: dict[str, Any], *, wait_s: float, is_quiet: bool
) -> Iterator[Communicator]:
    """This machine among the others; with ``listen`` what they agree through as well."""
    from anabranch.cluster.pccl import Communicator, Master
    from anabranch.cluster.pccl.addresses import parse_address

    with ExitStack() as stack:
        made: Master | None = None
        if listen is not None:
            if parse_address(listen, 0)[0] in ("", "0.0.0.0", "::") and not told["advertise"]:
                raise ConfigError(
                    f"--listen {listen} does not say how others reach this machine; name its address, or say --advertise HOST too"
                )
            made = stack.enter_context(Master(listen, secret=told["secret"]))
            if not is_quiet:
                say(f"others: anabranch cluster bench --master {made.address}, and the same values")
        address = master if made is None else made.address
        assert address is not None, "one of the two is given"
        # Nobody starts another master, and this may be the first that is here.
        with Communicator(address, **told, wait_s=wait_s, master_wait_s=wait_s, master_returns=False) as peers:
            yield peers
        end = time.monotonic() + _LEAVE_S
        while made is not None and made.state.members and time.monotonic() < end:
            time.sleep(0.02)


def _print(found: Bench, made: Quantiser | None, connections: int) -> None:
    hosts = ", ".join(f"{number} {host}" for number, host in found.peers)
    wire = "float32 on the wire" if made is None else f"{made.bits} bits a number on the wire ({made.kind})"
    fact("peers", f"{len(found.peers)} in a ring: {hosts}   (this is {found.me})")
    fact("links", f"{connections} {'connection' if connections == 1 else 'connections'} with each neighbour, {wire}")
    fact("latency", f"{found.latency_s * 1e3:.3f} ms for one number")
    print()
    rows = [
        [
            binary_size(timing.size_bytes),
            f"{statistics.median(timing.seconds) * 1e3:,.3f}",
            f"{timing.rate():,.3f}",
            f"{timing.rate(0.25):,.3f} to {timing.rate(0.75):,.3f}",
            f"{timing.link_rate:,.3f}",
        ]
        for timing in found.timings
    ]
    table(["all-reduce of", "ms", "GB/s", "half of the\nrounds", "GB/s on\na link"], rows)
    if found.rates is None:
        return
    print()
    numbers = [str(number) for number, _ in found.peers]
    table(
        ["Mbit/s from", *(f"to {number}" for number in numbers)],
        [
            [number, *("" if math.isnan(rate) else f"{rate:,.0f}" for rate in row)]
            for number, row in zip(numbers, found.rates, strict=True)
        ],
    )
