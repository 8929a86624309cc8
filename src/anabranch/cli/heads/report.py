"""``anabranch heads report``: which heads are on when, and what is spared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.options import AsJson, Device, Dtype, Model, Quiet, load
from anabranch.cli.output import fact, print_json, shell_word, table, wrote
from anabranch.errors import DataError
from anabranch.extras import require
from anabranch.files import check_apart

# Domains that have a column of their own.
_MOST_DOMAINS = 6


def report(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Text to run through the model. Default: the held-out text of the run."),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="About how many tokens of it.")] = 16384,
    sequence_length: Annotated[
        int | None, typer.Option(metavar="L", min=1, help="Tokens the model sees at once. Default: as in training.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write every decision (.parquet), for anabranch report and other tools."
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show which heads of a model are on for how many tokens, by layer and by domain of the text, and how much work that spares.

    Work is counted as it was done: heads that are off for a whole block of tokens are not computed.
    """
    require("lm", by="anabranch heads report")
    import torch

    from anabranch.cli.corpora import Tracked, default_length, domain_names, labelled_windows, run_of, say_defaults
    from anabranch.heads import head_report, routed_heads_of
    from anabranch.lm.folder import files_of
    from anabranch.routing import RoutingTrace, record_routing

    if trace is not None:
        if trace.suffix != ".parquet":
            raise DataError(f"--trace is {str(trace)!r}; its name must end with .parquet")
        check_apart([trace], [*files_of(model), *([data] if data is not None and Path(data).is_file() else [])])
    network, tokenizer = load(model, dtype, device)
    found = routed_heads_of(network)
    gates = {f"{name}.gate.router": heads.gate.router for name, heads in found.items() if heads.gate is not None}
    if not gates:
        raise DataError(f"{model} has no routed heads; anabranch heads train puts some on")
    run = run_of(model)
    length = sequence_length or default_length(run, network.config.max_positions)
    recording = record_routing(network, path=trace, routers=gates)
    with recording as recorder, torch.inference_mode():
        windows, name = labelled_windows(data, run, tokenizer, length, tokens)
        say_defaults(model, name, length, run=run, is_chosen=data is not None and sequence_length is not None)
        for batch in Tracked(windows, quiet):
            recorder.domain = list(domain_names(windows, batch))
            network(batch.token_BL.to(network.embedding.weight.device), last_only=True)
    decided = recorder.trace() if trace is None else RoutingTrace.read(trace)
    layers = head_report(network)
    domains = _by_domain(decided)
    for layer, shares in zip(layers, domains, strict=True):
        layer["by_domain"] = shares
    total = sum(heads.work.possible for heads in found.values())
    saved = 1 - sum(heads.work.needed for heads in found.values()) / total if total else 0.0
    if as_json:
        print_json({"model": model, "data": name, "sequence_length": length, "saved": saved, "layers": layers})
        return
    first = layers[0]
    fact(
        "model",
        f"{model}   {first['heads']} heads in each of {len(layers)} layers, {first['shared']} shared, {first['routing']}",
    )
    fact("data", f"{name}   {first['tokens']:,} tokens in windows of {length}")
    _show(layers)
    fact("work", f"{saved:.1%} of the multiply-adds of attention were spared")
    if trace is not None:
        out = shell_word(trace.with_suffix(""))
        wrote(str(trace), f"anabranch report {shell_word(trace)} --out {out}")


def _by_domain(decided: Any) -> list[dict[str, float]]:
    """Of each layer and domain, the share of routed heads that were on."""
    made = []
    for layer in decided.layers:
        tokens = decided.decisions(layer.layer).domain_N
        shares = {}
        for place, domain in enumerate(decided.domains):
            count = int((tokens == place).sum())
            on = int(decided.load_E(layer.layer, domain).sum())
            shares[domain] = on / (count * layer.num_destinations) if count else 0.0
        made.append(shares)
    return made


def _show(layers: list[dict[str, Any]]) -> None:
    domains = list(layers[0]["by_domain"])[:_MOST_DOMAINS]
    domains = domains if len(domains) > 1 else []
    rows = []
    for layer in layers:
        routed = layer["by_head"][layer["shared"] :]
        rows.append(
            [
                str(layer["layer"]),
                f"{layer['activation']:.1%}",
                " ".join(f"{share:.0%}" for share in routed),
                f"{layer['computed']:.1%}",
                f"{layer['saved']:.1%}",
                *(f"{layer['by_domain'][domain]:.0%}" for domain in domains),
            ]
        )
    table(["layer", "on", "each routed head", "computed", "spared", *domains], rows)
