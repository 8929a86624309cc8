"""``anabranch eval``: how well a model predicts text."""

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer

from anabranch.bounds import shown
from anabranch.cli.option_sets import takes_sets
from anabranch.cli.options import (
    AsJson,
    Device,
    Dtype,
    ExpertBudget,
    Memory,
    Model,
    Quantize,
    Quiet,
    Streams,
    named_folder,
    parts,
)
from anabranch.cli.output import fact, print_json, quantity, say, table
from anabranch.cli.rewired import Turned, is_plain
from anabranch.cli.rewired_eval import check_first, compare, first_of, show
from anabranch.errors import ConfigError
from anabranch.extras import require

_AS_THEY_ARE = Turned()

# Tokens that --cached gives the model at a time: some one by one would do as well, and take as long as generating them.
PIECE = 64


@takes_sets(turned="each token is foretold with what was fitted to those before it")
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
        int | None, typer.Option(metavar="N", min=1, help="Use only about N tokens, spread over the text.")
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCKS",
            help="Blocks to run, in this order, each at most twice, e.g. 0,1,2,2,3. Default: every block once.",
        ),
    ] = None,
    cached: Annotated[
        bool, typer.Option("--cached", help="Feed the text in pieces with a key-value cache, as in generation.")
    ] = False,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            callback=named_folder,
            help="Use the model with this adapter, a folder that peft or anabranch adapt saved.",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="The task of the text, for an adapter that routes by task.")
    ] = None,
    streams: Streams = None,
    turned: Turned = _AS_THEY_ARE,
    rewire_after: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens of a window that are read before --rewire begins. Default: its interval, or half of the window.",
        ),
    ] = None,
    memory: Memory = None,
    quantize: Quantize = None,
    expert_budget: ExpertBudget = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model in nats per token and bits per byte.

    The text is cut into windows of L tokens without overlap; every token but the first is predicted once.

    With --rewire (a mixture of experts) what is measured is what follows the first N tokens of each window: by the model as it is, and by
    routers that are fitted to what was read so far, again and again. See the page Rewiring.
    """
    require("lm", by="anabranch eval")
    beside = {"--path": path, "--cached": cached, "--adapter": adapter, "--task": task, "--streams": streams}
    rewiring = turned.config({**beside, "--memory": memory})
    check_first(rewire_after, rewiring)
    bits: Any = "none" if is_plain(rewiring, quantize, expert_budget) else quantize
    from anabranch.adapters import load_peft
    from anabranch.adapters.own_folder import is_own, read_own
    from anabranch.cli.corpora import Tracked, default_length, passes_of, run_of, say_defaults, windows_of
    from anabranch.depth.decisions import check_depth_path
    from anabranch.lm.on_path import OnPath
    from anabranch.train import evaluate as measure

    passes = None if memory is None else passes_of(model, sequence_length, all_logits=True)
    with parts(model, dtype, device, bits, expert_budget, memory, passes) as (network, tokenizer, weights):
        if adapter is not None:
            put = read_own if is_own(adapter) else load_peft
            put(adapter, network)
        told = _task_of(network, task)
        used = network.streams_of(streams)[0]
        run = run_of(model)
        length = sequence_length or default_length(run, network.config.max_positions)
        if length > network.config.max_positions:
            say(f"warning: {model} is meant for {network.config.max_positions} positions, windows have {length}")
        first = 0 if rewiring is None else first_of(length, rewire_after, rewiring)
        windows, name = windows_of(data, run, tokenizer, length, tokens)
        say_defaults(model, name, length, run=run, is_chosen=data is not None and sequence_length is not None)
        # The rule of depth routing, as everywhere: no block is come to a third time.
        blocks: Any = None if path is None else check_depth_path(read_path(path), len(network.blocks))
        measured = OnPath(network, blocks, chunk=PIECE if cached else None, num_streams=streams)
        compared: dict[str, Any] | None = None
        if rewiring is not None:
            compared = compare(network, rewiring, Tracked(windows, quiet), first)
        else:
            with told:
                result = measure(measured, Tracked(windows, quiet))
    if compared is not None and as_json:
        how = {"model": model, "data": name, "sequence_length": length, "weights": weights.to_dict()}
        print_json({**how, "rewiring": compared})
        return
    if as_json:
        how = {
            "path": None if measured.path is None else list(measured.path),
            "cached": cached,
            "streams": used,
            "weights": weights.to_dict(),
        }
        how |= {} if adapter is None else {"adapter": adapter}
        how |= {} if task is None else {"task": task}
        print_json({**result.to_dict(), "model": model, "data": name, "sequence_length": length, **how})
        return
    counts = network.config.count(length)
    fact("model", f"{model}   {quantity(counts.parameters)} parameters, {quantity(counts.active)} active")
    fact("weights", str(weights))
    if adapter is not None:
        fact("adapter", adapter if task is None else f"{adapter}   task {task}")
    if measured.path is not None:
        fact("path", ", ".join(map(str, measured.path)))
    if streams is not None:
        fact("streams", str(used))
    if cached:
        fact("cached", f"pieces of {PIECE} tokens, with a key-value cache")
    fact("data", f"{name}   windows of {length} tokens")
    if compared is not None:
        show(compared)
        return
    rows = [(part, found) for part, found in result.by_domain.items()] + [("all", result)]
    table(
        ["", "bits/byte", "nats/token", "tokens", "bytes"],
        [
            [part, f"{found.bits_per_byte:.4f}", f"{found.nats_per_token:.4f}", f"{found.tokens:,}", f"{found.bytes:,}"]
            for part, found in rows
        ],
    )


def _task_of(network: Any, task: str | None) -> AbstractContextManager[None]:
    """The block in which the text is of ``task``. Raises ConfigError where a task is needed and not given, or the other way round."""
    from anabranch.adapters.tasks import numbers_of, on_tasks, task_names

    routes = any(getattr(module, "routes_by_task", False) for module in network.modules())
    if routes and task is None:
        names = task_names(network)
        raise ConfigError(f"the model routes by task; name the text's with --task, one of {shown(list(names))}")
    if task is not None and not routes:
        raise ConfigError(f"--task is {task!r}, and the model does not route by task; leave it out")
    if task is None:
        return nullcontext()
    # Before anything is said of the measurement.
    numbers_of([task], task_names(network))
    return on_tasks(network, task)


def read_path(text: str) -> list[int]:
    """Block numbers with commas between them, at least one. Raises ConfigError for anything else."""
    # `int` reads more than numbers as people write them: 1_0, and the digits of other scripts.
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*", text):
        raise ConfigError(f"--path is {shown(text)}; write block numbers with commas between them, e.g. 0,1,2,2,3")
    return [int(part) for part in text.split(",")]
