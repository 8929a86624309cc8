"""``anabranch heads report``: which heads are on when, and what is spared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.options import AsJson, Device, Dtype, Model, Quiet, load
from anabranch.cli.output import fact, print_json, shell_word, table, wrote
from anabranch.errors import ConfigError, DataError
from anabranch.extras import require
from anabranch.files import check_apart

# Domains that have a column of their own.
_MOST_DOMAINS = 6


def report(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Text to run through the model. Default: the held-out text of the run. For Whisper: a folder of speech.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Approximate number of tokens.")] = 16384,
    sequence_length: Annotated[
        int | None, typer.Option(metavar="L", min=1, help="Tokens the model sees at once. Default: as in training.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write every routing decision (.parquet), for anabranch report and other tools."
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show how often each head is on, by layer and by domain of the text, and how much work that saves.

    The work is what was really computed: a head is skipped if it is off for a whole block of tokens.

    For Whisper, it also reports nats per token of the transcripts and the word error rate. Domains are the subfolders of --data.
    """
    require("lm", by="anabranch heads report")
    from anabranch.heads import head_report
    from anabranch.heads.whisper import is_whisper
    from anabranch.lm.folder import files_of

    is_speech = is_whisper(model)
    if trace is not None:
        if trace.suffix != ".parquet":
            raise DataError(f"--trace is {str(trace)!r}; its name must end with .parquet")
        read = [data] if data is not None and (is_speech or Path(data).is_file()) else []
        check_apart([trace], [*([model] if is_speech else files_of(model)), *read])
    if is_speech and (dtype is not None or sequence_length is not None):
        raise ConfigError("--dtype and --sequence-length are for models of text; leave them out for a Whisper")
    seen = (
        _of_speech(model, data, tokens, trace, device, quiet)
        if is_speech
        else _of_text(model, data, tokens, sequence_length, trace, dtype, device, quiet)
    )
    layers = head_report(seen.network)
    for layer, shares in zip(layers, _by_domain(seen.decided), strict=True):
        layer["by_domain"] = shares
    work = [heads.work for heads in seen.found.values()]
    total = sum(each.possible for each in work)
    saved = 1 - sum(each.needed for each in work) / total if total else 0.0
    quality = seen.quality()
    if as_json:
        print_json({"model": model, "data": seen.name, **seen.how, **quality, "saved": saved, "layers": layers})
        return
    first = layers[0]
    fact(
        "model",
        f"{model}   {first['heads']} heads in each of {len(layers)} layers, {first['shared']} shared, {first['routing']}",
    )
    fact("data", f"{seen.name}   {first['tokens']:,} tokens in {seen.unit}")
    _show(layers)
    if quality:
        fact(
            "quality",
            f"{quality['nats_per_token']:.3f} nats/token, next token right {quality['accuracy']:.1%}; {quality['word_error_rate']:.1%} of "
            f"{quality['words']} words wrong in what it writes by itself",
        )
    fact("work", f"{saved:.1%} of the multiply-adds of attention were spared")
    if trace is not None:
        out = shell_word(trace.with_suffix(""))
        wrote(str(trace), f"anabranch report {shell_word(trace)} --out {out}")


@dataclass(frozen=True)
class _Seen:
    """A model with routed heads, and what it decided.

    Attributes:
        network: the model.
        found: its routed heads, by name.
        decided: a `RoutingTrace`.
        name, unit: of the data, in words.
        how: of it, for --json.
        quality: measures, for --json.
    """

    network: Any
    found: dict[str, Any]
    decided: Any
    name: str
    unit: str
    how: dict[str, Any]
    quality: Callable[[], dict[str, Any]] = dict


def _gates_of(model: str, network: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(routed heads by name, their routers by name). Raises DataError where there is none."""
    from anabranch.heads import routed_heads_of

    found = routed_heads_of(network)
    gates = {f"{name}.gate.router": heads.gate.router for name, heads in found.items() if heads.gate is not None}
    if not gates:
        raise DataError(f"{model} has no routed heads; anabranch heads train puts some on")
    return found, gates


def _of_text(
    model: str,
    data: str | None,
    tokens: int,
    sequence_length: int | None,
    trace: Path | None,
    dtype: str | None,
    device: str | None,
    quiet: bool,
) -> _Seen:
    import torch

    from anabranch.cli.corpora import Tracked, default_length, domain_names, labelled_windows, run_of, say_defaults
    from anabranch.routing import RoutingTrace, record_routing

    network, tokenizer = load(model, dtype, device)
    found, gates = _gates_of(model, network)
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
    return _Seen(network, found, decided, name, f"windows of {length}", {"sequence_length": length})


def _of_speech(model: str, data: str | None, tokens: int, trace: Path | None, device: str | None, quiet: bool) -> _Seen:
    from anabranch.cli.heads.speech import heard, written
    from anabranch.cli.progress import Progress
    from anabranch.heads.whisper import measure
    from anabranch.routing import RoutingTrace, record_routing

    network, words, speech = heard(model, data, device, tokens)
    found, gates = _gates_of(model, network)
    recording = record_routing(network, path=trace, routers=gates)
    with recording as recorder, Progress(len(speech), "file", quiet=quiet) as progress:

        def begin(number: int) -> None:
            recorder.domain = [speech.files[number].domain or "all"]
            progress.update(number)

        measured = measure(network, speech, begin=begin)
    decided = recorder.trace() if trace is None else RoutingTrace.read(trace)
    return _Seen(
        network,
        found,
        decided,
        str(data),
        f"{len(speech)} files",
        {"files": len(speech)},
        lambda: measured | written(network, words, speech, quiet),
    )


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
