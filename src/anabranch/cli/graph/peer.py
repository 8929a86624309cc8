"""``anabranch graph peer``: one node of G-Rank on the network, which gossips clicks and ranks by them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.graph.inputs import read_items, whole_number
from anabranch.cli.graph.options import Top, check_extra
from anabranch.cli.options import FLAG, AsJson, Quiet
from anabranch.cli.output import fact, print_json, say, table
from anabranch.errors import DataError, InputError
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.graph.rank import GossipServer, Peer

Address = tuple[str, int]


@dataclass
class Heard:
    """What came of asking others."""

    pulls: int = 0
    added: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def peer(
    store: Annotated[
        Path, typer.Argument(metavar="LOG", help="File for its log of clicks (.db); an existing one is continued.")
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the node. Default: that of its key, else of LOG.")
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--peer", metavar="HOST:PORT", help="A peer to ask; others are found through it. May be repeated."
        ),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Address for requests of other peers; port 0 takes a free port. There is no encryption.",
        ),
    ] = "127.0.0.1:0",
    clicks: Annotated[
        list[str] | None,
        typer.Option("--click", metavar="TERM=ITEM", help="Record a click first. May be repeated."),
    ] = None,
    terms: Annotated[
        list[str] | None,
        typer.Option("--search", metavar="TERM", help="Rank items for a term at the end. May be repeated."),
    ] = None,
    items: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Its items: a table of id and perhaps title, artist, tags (.csv, .parquet)."),
    ] = None,
    every: Annotated[
        float, typer.Option(metavar="S", min=0.01, help="Seconds between two requests to other peers.")
    ] = 10.0,
    rounds: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Stop after N rounds of requests. Default: at Ctrl-C."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Sign clicks with this key, and refuse unsigned clicks of others. A missing key file is created.",
        ),
    ] = None,
    isolation: Annotated[
        float, typer.Option(metavar="F", help="Weight of users who have nothing in common, at least 0.")
    ] = 0.0,
    plain: Annotated[
        bool,
        typer.Option("--paper", metavar=FLAG, help="Behave as in the paper: all clicks count, whoever sends them."),
    ] = False,
    top: Top = 10,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a peer: it keeps a log of clicks, exchanges clicks with other peers, and ranks items by them.

    Clicks of users with similar searches and clicks count more. Nothing is trained, and there is no server.

    Example: anabranch graph peer ann.db --click jazz=42 --peer 10.0.0.7:7001 --listen 0.0.0.0:7001
    """
    check_extra()
    check_apart([store, key], [items])
    addresses = [_address("--peer", text) for text in others or ()]
    host, port = _address("--listen", listen, least=0)
    pairs = [_click(text) for text in clicks or ()]
    node = _node(store, name, key, items, isolation, plain)
    try:
        for term, item in pairs:
            node.record(term, _id(node, item))
        heard = Heard()
        asyncio.run(_live(node, host, port, addresses, every, rounds, heard, quiet))
    finally:
        node.close()
    if rounds is not None and addresses and not heard.pulls and heard.failed:
        raise DataError(f"no peer answered: {next(iter(heard.failed.values()))}")
    facts: dict[str, Any] = {
        "node": node.node_id,
        "log": str(store),
        "rows": sum(1 for _ in node.log.all_rows()),
        "peers": len(node.peers()),
        "pulls": heard.pulls,
        "added": heard.added,
        "refused": heard.refused,
        "failed": heard.failed,
        "rankings": {
            term: [{"item": one.item, "score": one.score} for one in node.rank(term, top)] for term in terms or ()
        },
    }
    if as_json:
        print_json(facts)
        return
    fact("log", f"{store}   {facts['rows']:,} clicks, {facts['peers']:,} peers known")
    if heard.pulls or heard.failed:
        fact(
            "heard",
            f"{heard.added:,} new clicks in {heard.pulls:,} answers"
            + (f", {sum(heard.refused.values()):,} refused" if heard.refused else "")
            + (f", {len(heard.failed):,} peers did not answer" if heard.failed else ""),
        )
    if facts["rankings"]:
        print()
        rows = [
            [term if place == 1 else "", str(place), str(one["item"]), f"{one['score']:.4g}"]
            for term, ranked in facts["rankings"].items()
            for place, one in enumerate(ranked, 1)
        ]
        table(["term", "rank", "item", "score"], rows, text_columns=3)
        print()
    fact("next", f"anabranch graph peer {store} --search TERM --rounds 0")


def _address(option: str, text: str, least: int = 1) -> Address:
    host, _, port = text.rpartition(":")
    number = whole_number(port)
    if not host or number is None or not least <= number < 65536:
        raise InputError(f"{option} is {text!r}; write HOST:PORT, a port of {least} to 65535")
    return host.strip("[]"), number


def _click(text: str) -> tuple[str, str]:
    term, equals, item = text.rpartition("=")
    if not equals or not term.strip() or not item:
        raise InputError(f"--click is {text!r}; write TERM=ITEM")
    return term, item


def _id(node: Peer, text: str) -> int | str:
    """An item as the library calls it: by number where it does; without a library, by number where it is one."""
    if text in node.library:
        return text
    number = whole_number(text)
    is_known = number is not None and (number in node.library if node.library else abs(number) < 2**53)
    return number if number is not None and is_known else text


def _node(store: Path, name: str | None, key: Path | None, items: str | None, isolation: float, plain: bool) -> Peer:
    from dataclasses import replace

    from anabranch.graph.rank import NONE, Defences, Peer, SigningKey

    secret = None
    if key is not None:
        if key.exists():
            secret = SigningKey.load(key)
        else:
            secret = SigningKey.generate()
            secret.save(key)
        if name is not None:
            raise InputError("--name cannot be combined with --key, which is the name of the node")
    defences = replace(NONE if plain else Defences(), signed=secret is not None)
    return Peer(
        read_items(items) if items is not None else (),
        None if secret else name or store.stem,
        isolation,
        store=store,
        defences=defences,
        key=secret,
        clock=time.time,
    )


async def _live(
    node: Peer,
    host: str,
    port: int,
    addresses: list[Address],
    every: float,
    rounds: int | None,
    heard: Heard,
    quiet: bool,
) -> None:
    """Answer others and ask them, until so many rounds are done, or a signal comes."""
    from anabranch.graph.rank import GossipServer

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Not on Windows, nor in threads.
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            loop.add_signal_handler(number, stop.set)
    async with GossipServer(node, host, port) as server:
        if not quiet and server.address is not None and rounds != 0:
            say(f"{node.node_id} listens on {server.address[0]}:{server.address[1]}")
        done = 0
        while not stop.is_set() and (rounds is None or done < rounds):
            await _ask(server, addresses, heard)
            done += 1
            if rounds is None or done < rounds:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), every)


async def _ask(server: GossipServer, named: list[Address], heard: Heard) -> None:
    """Pull from the peers that were named and from one that was heard of."""
    others = [address for address in server.addresses.values() if address not in named and address != server.address]
    for address in [*named, *random.sample(others, min(1, len(others)))]:
        place = f"{address[0]}:{address[1]}"
        try:
            merged = await server.pull(address)
        except DataError as error:
            heard.failed[place] = str(error)
            continue
        heard.failed.pop(place, None)
        heard.pulls += 1
        heard.added += merged.added
        for reason, count in merged.refused.items():
            heard.refused[reason] = heard.refused.get(reason, 0) + count
