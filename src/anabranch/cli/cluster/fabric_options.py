"""Options of ``anabranch cluster fabric`` that belong together, and which of them go with which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from anabranch.cli.option_sets import OptionSet
from anabranch.cli.options import FLAG
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart

PICTURES, PLANS = (".png", ".svg"), (".csv", ".parquet")


@dataclass(frozen=True)
class Routed(OptionSet):
    """Traffic of a layer of experts, from a routing trace."""

    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead of COLLECTIVE: the traffic of an expert layer's dispatch, from a routing trace (.parquet).",
        ),
    ] = None
    layer: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="With --trace: the layer. Default: the first.")
    ] = None
    row_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="With --trace: size of a token in a message. Default: 14336B.")
    ] = None

    def of_trace(self) -> dict[str, Any]:
        """What is said of a trace, by the names of options; None for what is not."""
        return {"--layer": self.layer, "--row-bytes": self.row_bytes}


@dataclass(frozen=True)
class Packets(OptionSet):
    """What is simulated packet by packet."""

    packets: Annotated[
        bool,
        typer.Option(
            "--packets", metavar=FLAG, help="Also simulate every packet: queues, marks, losses, time-outs, order."
        ),
    ] = False
    receiver: Annotated[
        Literal["any-order", "go-back-n"],
        typer.Option(help="With --packets: whether receivers accept packets in any order, or only the next one."),
    ] = "any-order"
    card: Annotated[
        Literal["turns", "fifo"],
        typer.Option(
            help="With --packets: whether a host's pieces take turns on its network card, or put whole windows into one queue."
        ),
    ] = "turns"
    ack_bytes: Annotated[
        int,
        typer.Option(
            "--ack-bytes",
            metavar="N",
            min=0,
            max=10_000,
            help="With --packets: size of an acknowledgement, which then waits in queues. Default: 0, only latency.",
        ),
    ] = 0
    lost: Annotated[
        list[str] | None,
        typer.Option(
            "--lose",
            metavar="CABLE",
            help="With --packets: a cable that fails without notice to the senders. May be repeated.",
        ),
    ] = None

    def said(self) -> dict[str, Any]:
        """What is said of packets, by the names of options; None for what is not."""
        return {
            "--lose": self.lost,
            "--receiver": None if self.receiver == "any-order" else self.receiver,
            "--card": None if self.card == "turns" else self.card,
            "--ack-bytes": self.ack_bytes or None,
        }


@dataclass(frozen=True)
class Written(OptionSet):
    """Files that are written."""

    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw loads and completion times (.png, .svg).")
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the plan, for a single --scheme: pieces with their paths (.csv), or a routing trace of links (.parquet).",
        ),
    ] = None

    def check(self, schemes: Sequence[str] | None, read: list[Path | None]) -> None:
        """Before the work: names of files, and what draws. Raises ConfigError, and as `check_apart` and `require`."""
        check_apart([self.picture, self.out], read)
        if self.picture is not None:
            if self.picture.suffix not in PICTURES:
                raise ConfigError(f"--picture is {str(self.picture)!r}; its name must end in {' or '.join(PICTURES)}")
            require("plots", by="anabranch cluster fabric --picture")
        if self.out is not None:
            if self.out.suffix not in PLANS:
                raise ConfigError(f"--out is {str(self.out)!r}; its name must end in {' or '.join(PLANS)}")
            if self.out.suffix == ".parquet":
                require("lm", by="anabranch cluster fabric --out FILE.parquet")
            if len(set(schemes or [])) != 1:
                raise ConfigError("--out writes one plan; give one --scheme, such as --scheme ethereal")


def check_together(collective: dict[str, Any], routed: Routed, packets: Packets) -> None:
    """Raise ConfigError for an option that would be read by nobody; ``collective`` is what is said of one, by the names of options."""
    has_trace = routed.trace is not None
    for name, value in (collective if has_trace else routed.of_trace()).items():
        if value is not None:
            raise ConfigError(
                f"{name} is of a collective, and --trace is given; leave one of them out"
                if has_trace
                else f"{name} is of a routing trace; give --trace too, or leave it out"
            )
    for name, value in packets.said().items():
        if value is not None and not packets.packets:
            raise ConfigError(f"{name} is of packets; give --packets too, or leave it out")
