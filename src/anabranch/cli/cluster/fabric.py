"""``anabranch cluster fabric``: what a collective loads in a network, and how long it takes, by scheme of transport."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.cli.cluster.fabric_inputs import ranks_of, read_algorithm, read_slow, read_topology, read_trace
from anabranch.cli.cluster.fabric_options import Packets, Routed, Written, check_together
from anabranch.cli.cluster.fabric_tried import Asked, tried, write_plan
from anabranch.cli.option_sets import takes_sets
from anabranch.cli.options import FLAG, AsJson, Quiet, Seed
from anabranch.cli.output import fact, print_json, quantity, shell_word, size, table
from anabranch.errors import ConfigError
from anabranch.sizes import parse_bytes

if TYPE_CHECKING:
    from anabranch.cluster.fabric import Flows, Plan, Topology

COLLECTIVE, MESSAGE, ROW_BYTES = "all-to-all", "64MB", "14336B"
ROUTED, PACKETS, WRITTEN = Routed(), Packets(), Written()


@takes_sets()
def fabric(
    collective: Annotated[
        str | None,
        typer.Argument(
            metavar="COLLECTIVE",
            help="all-to-all (the default), all-reduce, all-gather, reduce-scatter or permutation, perhaps with :ALGORITHM.",
        ),
    ] = None,
    network: Annotated[
        str,
        typer.Option(
            "--network",
            metavar="NET",
            help="leaf-spine:LEAVESxSPINESxHOSTS, fat-tree:K or fat-tree:KxHOSTS (hosts per leaf), or a .csv of cables: "
            "node,node,Gbit/s.",
        ),
    ] = "leaf-spine:8x8x8",
    message: Annotated[
        str | None,
        typer.Option("--bytes", metavar="SIZE", help="Buffer size of each rank, such as 256MB. Default: 64MB."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(metavar="R", min=2, help="Only the first R hosts take part. Default: all.")
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
        typer.Option(help="Who plans: each sender by itself, or each leaf switch for all its hosts."),
    ] = "host",
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Maximum number of pieces that a host sends at the same time. Default: all."
        ),
    ] = None,
    failed: Annotated[
        list[str] | None,
        typer.Option("--fail", metavar="CABLE", help="A failed cable, such as leaf0-spine3. May be repeated."),
    ] = None,
    slow: Annotated[
        list[str] | None,
        typer.Option("--slow", metavar="CABLE=GBPS", help="Change the speed of a cable. May be repeated."),
    ] = None,
    routed: Routed = ROUTED,
    packets: Packets = PACKETS,
    theorem: Annotated[
        bool,
        typer.Option(
            "--theorem",
            metavar=FLAG,
            help="Instead, check the paper's theorem exhaustively with exact fractions: up to 24 flows over 16 paths, and 200 "
            "mixes.",
        ),
    ] = False,
    written: Written = WRITTEN,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare load-balancing schemes for a collective on a network: load of the busiest link, and completion time.

    Single paths with minimal splitting (Ethereal, arXiv 2407.00550) are compared with hashing, splitting and packet spraying, in a
    simulator with max-min fair rates. Nothing is sent.

    Example: anabranch cluster fabric all-reduce:halving-doubling --network fat-tree:8x16 --picture fabric.svg
    """
    if theorem:
        of_traffic = {"COLLECTIVE": collective, "--bytes": message, "--trace": routed.trace, "--ranks": ranks}
        of_network = {"--scheme": schemes, "--fail": failed, "--slow": slow, "--packets": packets.packets or None}
        of_files = {"--picture": written.picture, "--out": written.out}
        if said := [name for name, value in {**of_traffic, **of_network, **of_files}.items() if value is not None]:
            raise ConfigError(f"--theorem has networks and flows of its own; leave out {said[0]}")
        _show_theorem(seed, as_json)
        return
    check_together({"COLLECTIVE": collective, "--bytes": message}, routed, packets)
    written.check(schemes, [routed.trace, Path(network) if network.endswith(".csv") else None])
    from anabranch.cluster.fabric import SCHEMES, lower_bound

    topology = read_topology(network).with_capacity(read_slow(slow)).with_failed(failed or [])
    count = ranks_of(topology, ranks)
    if routed.trace is not None:
        flows, about = _dispatch(routed.trace, routed.layer, count, routed.row_bytes or ROW_BYTES)
    else:
        flows, about = _collective(collective or COLLECTIVE, count, message or MESSAGE, seed)
    bound = lower_bound(flows, topology)
    for cable in packets.lost or []:
        topology.cable(cable)
    receiver = packets.receiver if packets.packets else None
    asked = Asked(scope, window, seed, receiver, packets.lost or [], quiet, packets.card, packets.ack_bytes)
    found = [tried(name, flows, topology, asked) for name in dict.fromkeys(schemes or SCHEMES)]
    rows = [row for row, _ in found]
    if written.picture is not None:
        _draw([made for _, made in found], rows, f"{about}   {topology.about}", written.picture)
    if written.out is not None:
        write_plan(found[0][1], written.out)
    told = {**_described(topology, flows, about), "scope": scope, "window": window, "seed": seed}
    told |= {"lower_bound_s": bound, "schemes": rows}
    if as_json:
        print_json(told)
        return
    _show(told, written.picture, written.out)


def _described(topology: Topology, flows: Flows, about: str) -> dict[str, Any]:
    """What was planned for; ``about`` is the traffic in words."""
    return {
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
    }


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
    is_sum = traffic["steps"] > 1
    what = "the busiest links of the steps work that long, added up" if is_sum else "the busiest link works that long"
    fact("bound", f"{1e3 * bound:.4g} ms: {what}, whatever the paths")
    best = min(row["completion_s"] for row in told["schemes"])
    busiest = "busiest links,\nstep by step, ms" if is_sum else "busiest\nlink, ms"
    headers = ["scheme", "pieces\na host", busiest, "over the\nbound", "completion,\nms", "over the\nbest"]
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
