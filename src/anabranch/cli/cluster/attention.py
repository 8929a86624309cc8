"""``anabranch cluster attention``: what it takes to cut a model's sequences over ranks, scheme by scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from anabranch.cli.cluster.plan import config_of
from anabranch.cli.options import FLAG, AsJson
from anabranch.cli.output import fact, print_json, size, table
from anabranch.cli.plan import read_hardware
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.sizes import parse_bytes

if TYPE_CHECKING:
    from anabranch.cluster.ring import AttentionPlan

# Messages are simulated one by one, and there are as many as the square of the ranks.
_MOST_RANKS, _MOST_TOKENS = 128, 2**31


def attention(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A training run, a saved model, a preset, or a Hugging Face folder."),
    ],
    ranks: Annotated[
        int, typer.Option(metavar="N", min=1, max=_MOST_RANKS, help="Number of ranks that share a sequence.")
    ] = 8,
    sequence_length: Annotated[
        int | None,
        typer.Option(metavar="L", min=1, max=_MOST_TOKENS, help="Tokens of a sequence. Default: the model's longest."),
    ] = None,
    cached: Annotated[
        int,
        typer.Option(metavar="L", min=0, max=_MOST_TOKENS, help="Earlier tokens, whose keys are already on the ranks."),
    ] = 0,
    sequences: Annotated[
        int, typer.Option(metavar="B", min=1, max=_MOST_TOKENS, help="Number of sequences in a batch.")
    ] = 1,
    layout: Annotated[
        Literal["contiguous", "zigzag", "stripe"],
        typer.Option(metavar="NAME", help="How positions are spread over ranks: contiguous, zigzag or stripe."),
    ] = "zigzag",
    backward: Annotated[
        bool, typer.Option("--backward", metavar=FLAG, help="Simulate the backward pass, and choose for training.")
    ] = False,
    network: Annotated[
        Literal["mesh", "ring", "switch", "nodes"],
        typer.Option(
            metavar="NAME",
            help="Links between all pairs (mesh), between neighbours (ring), one port per rank (switch), or a mesh in each node and "
            "one port per node (nodes).",
        ),
    ] = "mesh",
    node_ranks: Annotated[
        int | None,
        typer.Option(
            metavar="P", min=1, help="Ranks of a node. With them TokenRing inside nodes is compared (hybrid)."
        ),
    ] = None,
    between: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes per second out of a node in one direction, for --network nodes."),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Bytes per second of a link in one direction, such as 50GB. Default: the hardware's."
        ),
    ] = None,
    latency_us: Annotated[
        float, typer.Option(metavar="US", min=0, max=1e9, help="Latency of a message, in microseconds.")
    ] = 10.0,
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Hardware of one rank: a100, h100, ...; cpu or cuda measures this machine; or "
            "compute=312T,bandwidth=2T,memory=80G.",
        ),
    ] = "a100",
    efficiency: Annotated[
        float,
        typer.Option(
            metavar="SHARE", min=0.001, max=1, help="Share of the hardware's peak FLOP/s that attention reaches."
        ),
    ] = 0.4,
    as_json: AsJson = False,
) -> None:
    """Compare ways to split attention over ranks: TokenRing, ring, counter-rotating ring, all-gather, Ulysses, hybrid.

    One layer of the model in bfloat16. Nothing runs: messages and operations are counted, and the time is simulated.
    """
    require("lm", by="anabranch cluster attention")
    from anabranch.cluster.ring import Topology, plan_attention
    from anabranch.nn import SelfAttention

    config = config_of(model)
    told = config.attention
    if not isinstance(told, SelfAttention.Config):
        raise ConfigError(f"attention of {model} is {type(told).__qualname__}; only self-attention is cut over ranks")
    length = sequence_length or config.max_positions
    if (length + cached) * sequences > _MOST_TOKENS:
        raise ConfigError(f"{sequences} sequences of {length + cached} tokens are more than {_MOST_TOKENS}")
    device = read_hardware(hardware, "float16")
    speed = device.network_bandwidth if bandwidth is None else parse_bytes(bandwidth, "--bandwidth")
    if not speed:
        raise ConfigError(f"--hardware {device.name} says nothing of its links; say --bandwidth, such as 50GB")
    if (network == "nodes") != (between is not None) or (network == "nodes" and node_ranks is None):
        raise ConfigError("--network nodes needs --node-ranks and --between, and --between goes with no other network")
    if node_ranks is not None and ranks % node_ranks:
        raise ConfigError(f"--node-ranks is {node_ranks}, and --ranks {ranks}; use a divisor of that")
    links = Topology(
        network,
        bandwidth=speed,
        latency_s=latency_us * 1e-6,
        flops=device.compute * efficiency,
        node_size=node_ranks,
        between=None if between is None else parse_bytes(between, "--between"),
    )
    made = plan_attention(
        length,
        ranks,
        told.num_heads,
        told.kv_heads,
        told.width(config.dim),
        batch=sequences,
        causal=True,
        window=told.window,
        layout=layout,
        kv_cached=cached,
        backward=backward,
        topology=links,
    )
    if as_json:
        print_json(
            {"model": model, "hardware": device.name, "ranks": ranks, "sequence_length": length, **made.to_dict()}
        )
        return
    behind = f" behind {cached:,}" if cached else ""
    fact("model", f"{model}   {told.num_heads} query heads over {told.kv_heads} key heads of {told.width(config.dim)}")
    fact("ranks", f"{ranks}, {length:,} tokens{behind}, {layout}; {network} of {size(speed)}/s, each {device.name}")
    print()
    _print(made)


def _print(made: AttentionPlan) -> None:
    rows = [
        [
            cost.scheme,
            f"{cost.time_s * 1e3:,.3f}",
            *([f"{auto_s * 1e3:,.3f}"] if made.backward else []),
            f"{cost.compute_s * 1e3:,.3f}",
            size(cost.size_bytes),
            size(cost.link_bytes),
            size(cost.memory_bytes) if cost.is_allowed else f"{size(cost.memory_bytes)}, too much",
        ]
        for cost, auto_s in zip(made.costs, made.auto_s, strict=True)
    ]
    both = ["with forward\n(ms)"] if made.backward else []
    table(["scheme", "time\n(ms)", *both, "computing\n(ms)", "sent", "by the\nbusiest link", "blocks\nof others"], rows)
    print()
    seconds = {cost.scheme: auto_s for cost, auto_s in zip(made.costs, made.auto_s, strict=True)}
    gain = seconds["ring"] / seconds[made.choice] if seconds[made.choice] else 1.0
    fact("auto", f"{made.choice}: {gain:.2f} x as fast as ring in {made.passes}, by simulation of one layer")
