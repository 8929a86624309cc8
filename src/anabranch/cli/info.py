"""``anabranch info``: what a model or a preset costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import AsJson, read_dtype
from anabranch.cli.output import binary_size, fact, print_json, quantity, table
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.lm import Decoder

READ_AT_ONCE = 2048

# Of a parameter: float32 weight, gradient and AdamW's two moments.
TRAINING_BYTES = 16


def info(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model or the name of a preset. Without it, presets are listed."),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            metavar="L", min=1, help="Context length for which attention is counted. Default: as in training."
        ),
    ] = None,
    size_dial: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="Size of a preset: tiny, small or base.")
    ] = "tiny",
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="Type of the weights for which memory is counted.")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Show parameters, active parameters, FLOPs and memory of a model, without loading its weights."""
    require("lm", by="anabranch info")
    if model is None:
        _list_presets(size_dial, as_json)
        return
    config, length = config_of(model, size_dial)
    facts = describe(config, sequence_length or length, dtype)
    if is_stored(model):
        facts |= _stored(model)
    if as_json:
        print_json({"model": model, **facts})
        return
    _print(model, config, facts)


def is_stored(model: str) -> bool:
    """Whether it is a model, and no preset's name."""
    return Path(model).exists()


def _stored(model: str) -> dict[str, Any]:
    from anabranch.lm.checkpoint import stored_form

    architecture, types = stored_form(model)
    return {"architecture": architecture, "stored": types}


def describe(config: Decoder.Config, length: int, dtype: str) -> dict[str, Any]:
    """The facts of a config, JSON-ready."""
    from anabranch.config import to_dict

    width = read_dtype(dtype)
    assert width is not None
    counts = config.count(length)
    attention = config.attention
    streams = 1 if config.streams is None else config.streams.num_streams
    cache = streams * config.num_layers * attention.kv_heads * sum(attention.kept(config.dim)) * width.itemsize
    return {
        "parameters": counts.parameters,
        "active_parameters": counts.active,
        "flops_per_token": counts.flops,
        "sequence_length": length,
        "dtype": dtype,
        "memory": {
            "weights_bytes": counts.parameters * width.itemsize,
            "cache_bytes_per_token": cache,
            "training_bytes": counts.parameters * TRAINING_BYTES,
        },
        "config": to_dict(config),
    }


def config_of(model: str, size_dial: str) -> tuple[Decoder.Config, int]:
    """The config of a model or preset, and the length it is trained at or reads at once."""
    from anabranch import presets
    from anabranch.errors import CheckpointError
    from anabranch.lm import load_config
    from anabranch.lm.checkpoint import check_weights

    if not Path(model).exists():
        if model in presets.names():
            preset = presets.find(model)(size_dial)
            return preset.model, preset.data.sequence_length
        if "/" not in model and "." not in model:
            raise CheckpointError(f"{model!r} is neither a model nor a preset; presets: {', '.join(presets.names())}")
    from anabranch.cli.corpora import run_of

    config = load_config(model)
    check_weights(model)
    run = run_of(model)
    return config, run.data.sequence_length if run else min(config.max_positions, READ_AT_ONCE)


def _print(model: str, config: Decoder.Config, facts: dict[str, Any]) -> None:
    routed = [layer for layer in range(config.num_layers) if config.feed_forward_of(layer).is_routed]
    shape = f"{config.num_layers} layers, width {config.dim}, {config.vocab_size:,} tokens"
    kinds = sorted({config.feed_forward_of(layer).owner.kind or "" for layer in range(config.num_layers)})
    fact("model", f"{model}   {shape}   {' and '.join(kinds)}")
    if "architecture" in facts:
        types = facts["stored"]
        shares = ", ".join(f"{name} {count / sum(types.values()):.0%}" for name, count in types.items())
        fact(
            "stored", f"{facts['architecture']}   " + (next(iter(types)) if len(types) == 1 else shares or "no weights")
        )
    if routed:
        feed_forward = config.feed_forward_of(routed[0])
        experts, places = getattr(feed_forward, "num_experts", None), getattr(feed_forward, "num_choices", None)
        reuse, shared = getattr(feed_forward, "reuse", 1), getattr(feed_forward, "shared_experts", 0)
        extra = f", shared by {reuse} layers each" if reuse > 1 else ""
        extra += f", {shared} always on" if shared else ""
        fact("experts", f"{experts} in each of {len(routed)} layers, {places} active{extra}")
    memory = facts["memory"]
    fact("size", f"{facts['parameters']:,} parameters, {facts['active_parameters']:,} active for a token")
    fact("work", f"{quantity(facts['flops_per_token'])} FLOPs per token forward, at {facts['sequence_length']} tokens")
    fact(
        "memory",
        f"{binary_size(memory['weights_bytes'])} weights ({facts['dtype']}), "
        f"{binary_size(memory['cache_bytes_per_token'])} cache per token, "
        f"{binary_size(memory['training_bytes'])} to train (weights, gradients, AdamW; activations not counted)",
    )


def _list_presets(size_dial: str, as_json: bool) -> None:
    from anabranch import presets

    rows = []
    for name in presets.names():
        run = presets.find(name)(size_dial)
        rows.append((name, run.model.count(run.data.sequence_length), presets.describe(name)))
    if as_json:
        found = {
            name: {"parameters": counts.parameters, "active_parameters": counts.active, "about": about}
            for name, counts, about in rows
        }
        print_json({"size": size_dial, "presets": found})
        return
    table(
        ["preset", "about", "parameters", "active"],
        [[name, about, quantity(counts.parameters), quantity(counts.active)] for name, counts, about in rows],
        text_columns=2,
    )
    print()
    fact("next", f"anabranch train {rows[0][0]} --out runs/{rows[0][0]}")
