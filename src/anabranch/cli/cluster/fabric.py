"""``anabranch cluster fabric``: what a collective loads in a network, and how long it takes, by scheme of transport."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.cli.cluster.fabric_inputs import ranks_of, read_algorithm, read_slow, read_topology, read_trace
from anabranch.cli.options import FLAG, AsJson, Seed
from anabranch.cli.output import fact, print_json, quantity, shell_word, size, table
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import atomic_file, check_apart
from anabranch.sizes import parse_bytes

if TYPE_CHECKING:
    from anabranch.cluster.fabric import Flows, Plan, Topology

PICTURES = (".png", ".svg")
# Pieces up to which rates are shared at every end of one; of more, ends within a thousandth of the busiest link's time are one.
EXACT, COARSE = 20_000, 1e-3


def fabric(
    collective: Annotated[
        str,
        typer.Argument(
            metavar="COLLECTIVE",
            help="all-to-all, all-reduce, all-gather, reduce-scatter or permutation, with :ALGORITHM behind it (all-reduce:ring).",
        ),
    ] = "all-to-all",
    network: Annotated[
        str,
        typer.Option(
            "--network",
            metavar="NET",
            help="leaf-spine:LEAVESxSPINESxHOSTS, fat-tree:K or fat-tree:KxHOSTS (of a leaf), or a .csv of cables: node,node,Gbit/s.",
        ),
    ] = "leaf-spine:8x8x8",
    message: Annotated[str, typer.Option("--bytes", metavar="SIZE", help="Buffer of a rank, such as 64MB.")] = "64MB",
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
        str, typer.Option(metavar="SIZE", help="Of --trace: what a token takes in a message.")
    ] = "14336B",
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
        typer.Option(metavar="FILE", help="Write the plan of the one --scheme (.csv): pieces with their paths."),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compare ways to carry a collective over a network: what the busiest link carries, and when the last flow ends.

    Single paths with minimal splitting (Ethereal, arXiv 2407.00550) against hashing, splitting and packet spraying, by a simulator of
    max-min fair rates. Nothing is sent.

    Example: anabranch cluster fabric all-reduce:halving-doubling --network fat-tree:8x16 --picture fabric.svg
    """
    if theorem:
        _show_theorem(seed, as_json)
        return
    _check_places(picture, out, schemes, [trace, Path(network) if network.endswith(".csv") else None])
    from anabranch.cluster.fabric import SCHEMES, lower_bound

    topology = read_topology(network).with_capacity(read_slow(slow)).with_failed(failed or [])
    count = ranks_of(topology, ranks)
    flows, about = _flows(collective, count, message, trace, layer, row_bytes, seed)
    bound = lower_bound(flows, topology)
    found = [_tried(name, flows, topology, scope, seed) for name in dict.fromkeys(schemes or SCHEMES)]
    rows = [row for row, _ in found]
    told = {
        "network": {"about": topology.about, "hosts": topology.num_hosts, "links": topology.num_links, "failed": topology.failed_cables()},
        "traffic": {
            "about": about, "ranks": flows.num_ranks, "flows": len(flows), "steps": flows.num_steps, "bytes": int(flows.size_F.sum()),
        },
        "scope": scope,
        "seed": seed,
        "lower_bound_s": bound,
        "schemes": rows,
    }  # fmt: skip
    if picture is not None:
        _draw([made for _, made in found], rows, f"{about}   {topology.about}", picture)
    if out is not None:
        _write_plan(found[0][1], out)
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
        if out.suffix != ".csv":
            raise ConfigError(f"--out is {str(out)!r}; its name must end in .csv")
        if len(set(schemes or [])) != 1:
            raise ConfigError("--out writes one plan; give one --scheme, such as --scheme ethereal")


def _flows(
    collective: str, ranks: int, message: str, trace: Path | None, layer: int | None, row_bytes: str, seed: int
) -> tuple[Flows, str]:
    from anabranch.cluster.fabric import collective_flows, dispatch_matrix, moe_dispatch

    if trace is not None:
        index_NK, num_experts, name = read_trace(trace, layer)
        count = min(ranks, num_experts)
        each = parse_bytes(row_bytes, "--row-bytes")
        flows = moe_dispatch(dispatch_matrix(index_NK, num_experts, count), each)
        return flows, f"dispatch of {len(index_NK):,} tokens to {num_experts} experts on {count} ranks, {name}"
    if layer is not None:
        raise ConfigError("--layer is of a routing trace; give --trace too, or leave it out")
    kind, algo = read_algorithm(collective)
    flows = collective_flows(kind, ranks, parse_bytes(message, "--bytes"), algo, seed=seed)
    return flows, f"{collective} of {message} on {ranks} ranks"


def _tried(
    name: str, flows: Flows, topology: Topology, scope: Literal["host", "leaf"], seed: int
) -> tuple[dict[str, Any], Plan]:
    """A scheme's numbers, and its plan."""
    from anabranch.cluster.fabric import busiest, plan, simulate

    made = plan(flows, topology, name, scope=scope, seed=seed)
    resolution = 0.0 if len(made) <= EXACT else COARSE
    run = simulate(made, resolution=resolution)
    row = {
        "scheme": name,
        "pieces": len(made),
        "pieces_per_host": len(made) / max(flows.num_ranks, 1),
        "busiest_s": busiest(made),
        "completion_s": run.completion_s,
        "resolution": resolution,
        "fell_back": made.fell_back,
    }
    return row, made


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
    rows = [
        [
            row["scheme"] + (" *" if row["fell_back"] else ""),
            f"{row['pieces_per_host']:,.1f}",
            f"{1e3 * row['busiest_s']:.4g}",
            f"{row['busiest_s'] / bound:.3f}" if bound else "-",
            f"{1e3 * row['completion_s']:.4g}",
            f"{row['completion_s'] / best:.3f}" if best else "-",
        ]
        for row in told["schemes"]
    ]
    table(
        ["scheme", "pieces\na host", "busiest\nlink, ms", "over the\nbound", "completion,\nms", "over the\nbest"], rows
    )
    if any(row["fell_back"] for row in told["schemes"]):
        fact("*", "flows or paths are not equal, so they were planned by wrap")
    for path in (picture, out):
        if path is not None:
            fact("wrote", shell_word(path))


def _show_theorem(seed: int, as_json: bool) -> None:
    from anabranch.cluster.fabric import check_equivalence

    found = check_equivalence(seed=seed)
    if as_json:
        print_json(
            {"holds": found.holds, "cases": found.cases, "mixes": found.mixes, "gap": str(found.gap),
             "pieces_off": found.pieces_off, "worst": found.worst}
        )  # fmt: skip
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


def _write_plan(made: Plan, path: Path) -> None:
    names, steps = made.topology.names, made.flows.step_F[made.flow_Q].tolist()
    with atomic_file(path, clears=True) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer: Any = csv.writer(file)
        writer.writerow(["step", "src", "dst", "path", "offset", "bytes", "delay_ns"])
        for piece, step, delay in zip(made, steps, made.delay_ns_Q.tolist(), strict=True):
            writer.writerow([step, names[piece.src], names[piece.dst], piece.path, piece.offset, piece.size, delay])
