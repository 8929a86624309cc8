"""``anabranch cluster fabric``: what a collective loads in a network, and how long it takes, by scheme of transport."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.cli.cluster.fabric_inputs import ranks_of, read_algorithm, read_slow, read_topology, read_trace
from anabranch.cli.cluster.fabric_tried import Asked, tried, write_plan
from anabranch.cli.options import FLAG, AsJson, Quiet, Seed
from anabranch.cli.output import fact, print_json, quantity, shell_word, size, table
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart
from anabranch.sizes import parse_bytes

if TYPE_CHECKING:
    from anabranch.cluster.fabric import Flows, Plan

PICTURES, PLANS = (".png", ".svg"), (".csv", ".parquet")
COLLECTIVE, MESSAGE, ROW_BYTES = "all-to-all", "64MB", "14336B"


def fabric(
    collective: Annotated[
        str | None,
        typer.Argument(
            metavar="COLLECTIVE",
            help="all-to-all (the default), all-reduce, all-gather, reduce-scatter or permutation; :ALGORITHM may follow.",
        ),
    ] = None,
    network: Annotated[
        str,
        typer.Option(
            "--network",
            metavar="NET",
            help="leaf-spine:LEAVESxSPINESxHOSTS, fat-tree:K or fat-tree:KxHOSTS (of a leaf), or a .csv of cables: node,node,Gbit/s.",
        ),
    ] = "leaf-spine:8x8x8",
    message: Annotated[
        str | None, typer.Option("--bytes", metavar="SIZE", help="Buffer of a rank, such as 256MB. Default: 64MB.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(metavar="R", min=2, help="How many hosts take part, the first ones. Default: all.")
    ] = None,
    schemes: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme",
            metavar="NAME",
            help="ecmp, split:4, whole, greedy, ethereal, wrap, spray, reps. May be repeated. Default: all eight.",
        ),
    ] = None,
    scope: Annotated[
        Literal["host", "leaf"],
        typer.Option(help="Every sender plans by itself, or each leaf for all of its hosts."),
    ] = "host",
    window: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Pieces that a host has under way at a time, at most. Default: all."),
    ] = None,
    failed: Annotated[
        list[str] | None,
        typer.Option("--fail", metavar="CABLE", help="A failed cable, such as leaf0-spine3. May be repeated."),
    ] = None,
    slow: Annotated[
        list[str] | None,
        typer.Option("--slow", metavar="CABLE=GBPS", help="Another speed of a cable. May be repeated."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="In place of COLLECTIVE: the dispatch of a layer of experts, of a routing trace (.parquet).",
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of --trace: its layer. Default: the first.")
    ] = None,
    row_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of --trace: what a token takes in a message. Default: 14336B.")
    ] = None,
    packets: Annotated[
        bool,
        typer.Option(
            "--packets", metavar=FLAG, help="Also move every packet: queues, marks, losses, time-outs, order."
        ),
    ] = False,
    receiver: Annotated[
        Literal["any-order", "go-back-n"],
        typer.Option(help="Of --packets: whether receivers take packets in any order, or only the next one."),
    ] = "any-order",
    card: Annotated[
        Literal["turns", "fifo"],
        typer.Option(
            help="Of --packets: whether a host's pieces take turns on its card, or put whole windows into one queue."
        ),
    ] = "turns",
    ack_bytes: Annotated[
        int,
        typer.Option(
            "--ack-bytes",
            metavar="N",
            min=0,
            max=10_000,
            help="Of --packets: of an acknowledgement, which then waits in queues. Default: 0, latency alone.",
        ),
    ] = 0,
    lost: Annotated[
        list[str] | None,
        typer.Option(
            "--lose",
            metavar="CABLE",
            help="Of --packets: a cable that fails without a sender being told. May be repeated.",
        ),
    ] = None,
    theorem: Annotated[
        bool,
        typer.Option(
            "--theorem",
            metavar=FLAG,
            help="Check the theorem instead, by exhaustion and with exact fractions: up to 24 flows over 16 paths, and 200 mixes.",
        ),
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw loads and completion times (.png, .svg).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the plan of the one --scheme: pieces with their paths (.csv), or a routing trace of links (.parquet).",
        ),
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare ways to carry a collective over a network: what the busiest link carries, and when the last flow ends.

    Single paths with minimal splitting (Ethereal, arXiv 2407.00550) against hashing, splitting and packet spraying, by a simulator of
    max-min fair rates. Nothing is sent.

    Example: anabranch cluster fabric all-reduce:halving-doubling --network fat-tree:8x16 --picture fabric.svg
    """
    of_traffic = {"COLLECTIVE": collective, "--bytes": message, "--trace": trace, "--ranks": ranks}
    of_result = {
        "--scheme": schemes,
        "--fail": failed,
        "--slow": slow,
        "--packets": packets or None,
        "--picture": picture,
        "--out": out,
    }
    if theorem:
        if said := [name for name, value in {**of_traffic, **of_result}.items() if value is not None]:
            raise ConfigError(f"--theorem has networks and flows of its own; leave out {said[0]}")
        _show_theorem(seed, as_json)
        return
    _check_together(
        trace is not None,
        {"COLLECTIVE": collective, "--bytes": message},
        {"--layer": layer, "--row-bytes": row_bytes},
        {
            "--lose": lost,
            "--receiver": None if receiver == "any-order" else receiver,
            "--card": None if card == "turns" else card,
            "--ack-bytes": ack_bytes or None,
        }
        if not packets
        else {},
    )
    _check_places(picture, out, schemes, [trace, Path(network) if network.endswith(".csv") else None])
    from anabranch.cluster.fabric import SCHEMES, lower_bound

    topology = read_topology(network).with_capacity(read_slow(slow)).with_failed(failed or [])
    count = ranks_of(topology, ranks)
    if trace is not None:
        flows, about = _dispatch(trace, layer, count, row_bytes or ROW_BYTES)
    else:
        flows, about = _collective(collective or COLLECTIVE, count, message or MESSAGE, seed)
    bound = lower_bound(flows, topology)
    for cable in lost or []:
        topology.cable(cable)
    asked = Asked(scope, window, seed, receiver if packets else None, lost or [], quiet, card, ack_bytes)
    found = [tried(name, flows, topology, asked) for name in dict.fromkeys(schemes or SCHEMES)]
    rows = [row for row, _ in found]
    told = {
        "network": {
            "about": topology.about,
            "hosts": topology.num_hosts,
            "links": topology.num_links,
            "failed": topology.failed_cables(),
        },
        "traffic": {
            "about": about,
            "ranks": flows.num_ranks,
            "flows": len(flows),
            "steps": flows.num_steps,
            "bytes": int(flows.size_F.sum()),
        },
        "scope": scope,
        "window": window,
        "seed": seed,
        "lower_bound_s": bound,
        "schemes": rows,
    }
    if picture is not None:
        _draw([made for _, made in found], rows, f"{about}   {topology.about}", picture)
    if out is not None:
        write_plan(found[0][1], out)
    if as_json:
        print_json(told)
        return
    _show(told, picture, out)


def _check_places(picture: Path | None, out: Path | None, schemes: list[str] | None, read: list[Path | None]) -> None:
    """Before the work: names of files, and what draws. Raises ConfigError, and as `check_apart` and `require`."""
    check_apart([picture, out], read)
    if picture is not None:
        if picture.suffix not in PICTURES:
            raise ConfigError(f"--picture is {str(picture)!r}; its name must end in {' or '.join(PICTURES)}")
        require("plots", by="anabranch cluster fabric --picture")
    if out is not None:
        if out.suffix not in PLANS:
            raise ConfigError(f"--out is {str(out)!r}; its name must end in {' or '.join(PLANS)}")
        if out.suffix == ".parquet":
            require("lm", by="anabranch cluster fabric --out FILE.parquet")
        if len(set(schemes or [])) != 1:
            raise ConfigError("--out writes one plan; give one --scheme, such as --scheme ethereal")


def _check_together(
    has_trace: bool, of_collective: dict[str, Any], of_trace: dict[str, Any], of_packets: dict[str, Any]
) -> None:
    """Raise ConfigError for an option that would be read by nobody."""
    for name, value in (of_collective if has_trace else of_trace).items():
        if value is not None:
            raise ConfigError(
                f"{name} is of a collective, and --trace is given; leave one of them out"
                if has_trace
                else f"{name} is of a routing trace; give --trace too, or leave it out"
            )
    for name, value in of_packets.items():
        if value is not None:
            raise ConfigError(f"{name} is of packets; give --packets too, or leave it out")


def _dispatch(trace: Path, layer: int | None, ranks: int, row_bytes: str) -> tuple[Flows, str]:
    from anabranch.cluster.fabric import dispatch_matrix, moe_dispatch

    index_NK, num_experts, name = read_trace(trace, layer)
    count = min(ranks, num_experts)
    flows = moe_dispatch(dispatch_matrix(index_NK, num_experts, count), parse_bytes(row_bytes, "--row-bytes"))
    return flows, f"dispatch of {len(index_NK):,} tokens to {num_experts} experts on {count} ranks, {name}"


def _collective(text: str, ranks: int, message: str, seed: int) -> tuple[Flows, str]:
    from anabranch.cluster.fabric import collective_flows

    kind, algo = read_algorithm(text)
    flows = collective_flows(kind, ranks, parse_bytes(message, "--bytes"), algo, seed=seed)
    return flows, f"{text} of {message} on {ranks} ranks"


def _show(told: dict[str, Any], picture: Path | None, out: Path | None) -> None:
    network, traffic, bound = told["network"], told["traffic"], told["lower_bound_s"]
    broken = f", failed: {', '.join(network['failed'])}" if network["failed"] else ""
    fact("network", f"{network['about']}{broken}")
    fact(
        "traffic",
        f"{traffic['about']}   {quantity(traffic['flows'])} flows in {traffic['steps']} steps, {size(traffic['bytes'])}",
    )
    steps = ", step by step" if traffic["steps"] > 1 else ""
    fact("bound", f"{1e3 * bound:.4g} ms: the busiest link works that long, whatever the paths{steps}")
    best = min(row["completion_s"] for row in told["schemes"])
    headers = ["scheme", "pieces\na host", "busiest\nlink, ms", "over the\nbound", "completion,\nms", "over the\nbest"]
    moves = told["schemes"][0]["packets"] is not None
    if moves:
        headers += ["packets,\nms", "sent\nagain", "time-\nouts", "lost"]
    table(headers, [_cells(row, bound, best) for row in told["schemes"]])
    if any(row["fell_back"] for row in told["schemes"]):
        fact("*", "flows or paths are not equal, so they were planned by wrap")
    _nccl(told["schemes"])
    for path in (picture, out):
        if path is not None:
            fact("wrote", shell_word(path))


def _cells(row: dict[str, Any], bound: float, best: float) -> list[str]:
    cells = [
        row["scheme"] + (" *" if row["fell_back"] else ""),
        f"{row['pieces_per_host']:,.1f}",
        f"{1e3 * row['busiest_s']:.4g}",
        f"{row['busiest_s'] / bound:.3f}" if bound else "-",
        f"{1e3 * row['completion_s']:.4g}",
        f"{row['completion_s'] / best:.3f}" if best else "-",
    ]
    if row["packets"] is not None:
        cells += [f"{1e3 * row['packets']['completion_s']:.4g}"]
        cells += [f"{row['packets'][name]:,}" for name in ("resent", "timeouts", "lost")]
    return cells


def _nccl(rows: list[dict[str, Any]]) -> None:
    """How the best of the schemes that split is had from NCCL, which names no paths."""
    split = [row for row in rows if row["scheme"].startswith("split:")]
    if split:
        name = min(split, key=lambda row: row["completion_s"])["scheme"]
        ways = name.partition(":")[2]
        fact("nccl", f"{name} is NCCL_IB_QPS_PER_CONNECTION={ways} NCCL_IB_SPLIT_DATA_ON_QPS=1, over RDMA")


def _show_theorem(seed: int, as_json: bool) -> None:
    from anabranch.cluster.fabric import check_equivalence

    found = check_equivalence(seed=seed)
    if as_json:
        print_json(
            {
                "holds": found.holds,
                "cases": found.cases,
                "mixes": found.mixes,
                "gap": str(found.gap),
                "pieces_off": found.pieces_off,
                "worst": found.worst,
            }
        )
    else:
        fact("cases", f"{found.cases:,} pairs of flows and paths, {found.mixes:,} random networks with failed cables")
        fact("gap", f"{found.gap} of a flow, between single paths and packet spraying on any link")
        fact("pieces", "as many as the formulas say" if not found.pieces_off else f"others in {found.pieces_off} cases")
        fact("theorem", "holds" if found.holds else f"does not hold: {found.worst}")
    if not found.holds:
        raise typer.Exit(1)


def _draw(plans: list[Plan], rows: list[dict[str, Any]], title: str, path: Path) -> None:
    from anabranch.cli.cluster.fabric_picture import draw_fabric

    draw_fabric(plans, rows, title, path)
