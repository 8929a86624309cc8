"""``anabranch eval``: how well a model predicts text."""

from typing import Annotated

import typer

from anabranch.cli.options import AsJson, Device, Dtype, Model, Quiet, load
from anabranch.cli.output import fact, print_json, quantity, say, table
from anabranch.extras import require


def evaluate(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Text, Parquet or JSON lines. Default: the held-out text of the run."),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(metavar="L", min=1, help="Tokens the model sees at once. Default: as in training.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop after about so many, spread over the text.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model in nats per token and bits per byte.

    Windows of L tokens follow each other without overlap; every token but the first is predicted once.
    """
    require("lm", by="anabranch eval")
    from anabranch.cli.corpora import Tracked, default_length, run_of, say_defaults, windows_of
    from anabranch.train import evaluate as measure

    network, tokenizer = load(model, dtype, device)
    run = run_of(model)
    length = sequence_length or default_length(run, network.config.max_positions)
    if length > network.config.max_positions:
        say(f"warning: {model} is meant for {network.config.max_positions} positions, windows have {length}")
    windows, name = windows_of(data, run, tokenizer, length, tokens)
    say_defaults(model, name, length, run=run, is_chosen=data is not None and sequence_length is not None)
    result = measure(network, Tracked(windows, quiet))
    if as_json:
        print_json({**result.to_dict(), "model": model, "data": name, "sequence_length": length})
        return
    counts = network.config.count(length)
    fact("model", f"{model}   {quantity(counts.parameters)} parameters, {quantity(counts.active)} active")
    fact("data", f"{name}   windows of {length} tokens")
    rows = [(part, found) for part, found in result.by_domain.items()] + [("all", result)]
    table(
        ["", "bits/byte", "nats/token", "tokens", "bytes"],
        [
            [part, f"{found.bits_per_byte:.4f}", f"{found.nats_per_token:.4f}", f"{found.tokens:,}", f"{found.bytes:,}"]
            for part, found in rows
        ],
    )
