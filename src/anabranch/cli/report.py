"""``anabranch report``: how a model routes, as a page with pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import AsJson, Device, Dtype, ExpertBudget, Memory, Quantize, Quiet, parts
from anabranch.cli.output import fact, print_json, table, wrote
from anabranch.errors import ConfigError, DataError
from anabranch.extras import require
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.cli.weights import Weights
    from anabranch.data import Tokenizer
    from anabranch.lm import Decoder
    from anabranch.routing import RoutingTrace


_TRACE = "trace.parquet"


@dataclass(frozen=True)
class _Kept:
    """What a recording keeps beside choices: scores of all experts, next tokens that the model predicts."""

    scores: bool
    predictions: bool


def report(
    source: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_TRACE", help="A model, or a routing trace (.parquet) of an earlier report."),
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the page, the pictures and the trace.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Text to run through the model. Default: the held-out text of the run."),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Approximate number of tokens.")] = 32768,
    sequence_length: Annotated[
        int | None, typer.Option(metavar="L", min=1, help="Tokens the model sees at once. Default: as in training.")
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            "--window",
            "--m",
            metavar="W",
            min=1,
            help="Also measure local routing consistency at windows of W tokens (repeatable).",
        ),
    ] = None,
    cache: Annotated[
        list[float] | None,
        typer.Option(
            "--cache",
            "--rho",
            metavar="C",
            help="Also measure expert caches of C times the active experts per layer (repeatable). Default: 2.",
        ),
    ] = None,
    balance_audit: Annotated[
        bool,
        typer.Option(
            "--balance-audit", help="Also compare the choices with the best balanced choices for the same scores."
        ),
    ] = False,
    scores: Annotated[
        bool,
        typer.Option("--scores", help="Also keep the scores of all experts in the trace, and report their entropy."),
    ] = False,
    predictions: Annotated[
        bool,
        typer.Option("--predictions", help="Also keep the next token that the model predicts after each one."),
    ] = False,
    memory: Memory = None,
    quantize: Quantize = None,
    expert_budget: ExpertBudget = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show how a model routes: load, entropy, co-activation, specialisation by domain, reuse between layers.

    Writes a self-contained HTML page, a PNG for each picture, and the routing decisions themselves (trace.parquet).
    """
    require("lm", "plots", by="anabranch report")
    from anabranch.cli.corpora import passes_of
    from anabranch.report import explain, summarize, write_report
    from anabranch.report.tables import tables
    from anabranch.report.windows import check_caches
    from anabranch.report.write import check_place, report_files
    from anabranch.routing import RoutingTrace

    is_trace = Path(source).suffix == ".parquet"
    of_models = {"--memory": memory, "--quantize": quantize, "--expert-budget": expert_budget}
    option = next((name for name, value in of_models.items() if value is not None), None)
    if is_trace and option is not None:
        raise ConfigError(f"{option} is for models, and {source} is a trace, for which no model runs; leave it out")
    # Before the model runs, which may take long; the same goes for windows, once the length of its sequences is known.
    check_caches(cache or [])
    own = [*report_files(out), *(() if is_trace else [Path(out) / _TRACE])]
    check_apart(own, [source] if is_trace else _read_of(source, data, own))
    check_place(out, trace=None if is_trace else Path(out) / _TRACE)
    bias: dict[int, Any] = {}
    # Of a trace nobody knows them.
    weights: Weights | None = None
    if Path(source).is_file() and is_trace:
        trace, text = RoutingTrace.read(source), source
    elif is_trace:
        raise DataError(f"no routing trace at {source}")
    elif Path(source).is_file() and Path(source).suffix != ".gguf":
        raise DataError(
            f"{source} is a file that is neither a model (.gguf) nor a routing trace (.parquet); a model may be a folder too"
        )
    else:
        kept = _Kept(scores=scores or balance_audit, predictions=predictions)
        passes = None if memory is None else passes_of(source, sequence_length, all_logits=predictions)
        with parts(source, dtype, device, quantize, expert_budget, memory, passes) as (network, tokenizer, weights):
            trace, text, bias = _record(
                source, network, tokenizer, out, data, tokens, sequence_length, quiet, kept, window or []
            )
    summary = summarize(trace, windows=window or [], caches=cache or [], balance_audit=balance_audit, bias=bias)
    extra = {"model": source, "text": text}
    told = {} if weights is None else {"weights": str(weights)}
    page = write_report(trace, out, title=Path(source).name or source, extra={**extra, **told}, summary=summary)
    if as_json:
        of_weights = {} if weights is None else {"weights": weights.to_dict()}
        print_json({"page": str(page), **extra, **of_weights, **summary.to_dict()})
        return
    fact("model", source)
    for label, sentence in told.items():
        fact(label, sentence)
    fact("text", f"{text}   {summary.items:,} sequences, {summary.rows:,} choices")
    for found in tables(summary):
        shown = found.on_terminal
        rows = list(zip(*(column.cells for column in shown), strict=True))
        table([column.heading for column in shown], rows, text_columns=0)
    for sentence in explain(summary):
        fact("", sentence)
    names = [name for name in (_TRACE, "summary.json") if (Path(out) / name).exists()]
    wrote(f"{out}/{{report.html, *.png, {', '.join(names)}}}", f"open {page} in a browser")


def _read_of(model: str, data: str | None, own: list[Path]) -> list[str | Path]:
    """The files of a model, and those of its text, or of the text it was trained on, that lie where the report writes.

    What a folder of texts holds at the place of the report is left to `check_place`: an earlier report's files are replaced.
    """
    from anabranch.cli.corpora import run_of
    from anabranch.data import corpus_at
    from anabranch.lm.folder import files_of
    from anabranch.places import expanded

    run = run_of(model) if data is None else None
    read: list[str | Path] = [*files_of(model)]
    held = [path for path in own if path.exists()]
    if not held or (data is None and run is None):
        return read
    corpus = corpus_at(data) if data is not None else run.data.corpus if run is not None else None
    named = {expanded(path) for path in getattr(corpus, "paths", ())}
    places = {(found.st_dev, found.st_ino) for found in (path.stat() for path in held)}
    for file in corpus.build().sources() if corpus is not None else ():
        found = file.stat()
        is_listed_there = file not in named and not file.is_symlink() and file.parent.samefile(own[0].parent)
        if (found.st_dev, found.st_ino) in places and not is_listed_there:
            read.append(file)
    return read


def _record(
    source: str,
    network: Decoder,
    tokenizer: Tokenizer,
    out: str,
    data: str | None,
    tokens: int,
    sequence_length: int | None,
    quiet: bool,
    kept: _Kept,
    windows_asked: list[int],
) -> tuple[RoutingTrace, str, dict[int, Any]]:
    """Run text through a model; the trace, which is also written, the name of the text, and the bias of the layers that have one."""
    import torch

    from anabranch.cli.corpora import Tracked, default_length, domain_names, labelled_windows, run_of, say_defaults
    from anabranch.heads import HeadGate
    from anabranch.report.windows import check_windows
    from anabranch.routing import Router, RoutingTrace, record_routing
    from anabranch.routing.discovery import find_routers
    from anabranch.routing.predicted import with_predictions

    config = network.config
    if not any(config.feed_forward_of(layer).is_routed for layer in range(config.num_layers)):
        if any(isinstance(module, HeadGate) for module in network.modules()):
            raise DataError(f"{source} has no routed layers, but routed heads; anabranch heads report is about those")
        raise DataError(f"{source} has no routed layers, so there is no routing to report")
    run = run_of(source)
    length = sequence_length or default_length(run, network.config.max_positions)
    check_windows(windows_asked, length)
    place = network.embedding.weight.device
    path = Path(out) / _TRACE
    windows: Any = None
    predicted: list[tuple[Any, Any]] = []
    # Loops of a layer and heads are no experts, whose loads the report is about.
    of_heads = {module.router for module in network.modules() if isinstance(module, HeadGate)}
    routers = {
        name: module
        for name, module in find_routers(network).items()
        if isinstance(module, Router) and module not in of_heads
    }
    recording = record_routing(network, path=path, scores=kept.scores, routers=routers or None)
    with recording as recorder, torch.inference_mode():
        windows, name = labelled_windows(data, run, tokenizer, length, tokens)
        say_defaults(source, name, length, run=run, is_chosen=data is not None and sequence_length is not None)
        for batch in Tracked(windows, quiet):
            recorder.domain = list(domain_names(windows, batch))
            output = network(batch.token_BL.to(place), last_only=not kept.predictions)
            if kept.predictions:
                predicted.append((batch.token_BL.numpy(), output.logits_BLV.argmax(-1).cpu().numpy()))
    trace = RoutingTrace.read(path)
    if kept.predictions:
        trace = with_predictions(trace, predicted)
        trace.write(path)
    modules = dict(network.named_modules())
    held = {layer.layer: getattr(modules.get(layer.name), "bias_E", None) for layer in trace.layers}
    return trace, name, {layer: bias.float().cpu().numpy() for layer, bias in held.items() if bias is not None}
