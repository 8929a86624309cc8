"""``anabranch oracle``: what perfect routing between the big and the small modules of a duo model would gain."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from anabranch.cli.options import AsJson, Device, Dtype, Model, Quiet, Seed, load
from anabranch.cli.output import fact, print_json, table, wrote
from anabranch.errors import ConfigError, DataError
from anabranch.extras import require
from anabranch.files import check_apart

_TABLE, _LABELS, _PICTURE, _UNFINISHED = "oracle.json", "labels.jsonl", "oracle", "unfinished.npz"


def oracle(
    model: Model,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the table, the picture and the labels.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Text to route. Default: the held-out text of the run."),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Approximate number of tokens.")] = 4096,
    sequence_length: Annotated[
        int | None, typer.Option(metavar="L", min=1, help="Tokens the model sees at once. Default: as in training.")
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(metavar="B", min=0, help="Big layers per token in the labels. Default: half of the layers."),
    ] = None,
    mode: Annotated[
        Literal["uniform", "self_consistent", "descent"],
        typer.Option(help="Which route the other tokens take while one token is scored; see the page Duo-LLM."),
    ] = "uniform",
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Find the best route of a Duo-LLM model for each token, for every number of big layers.

    The oracle is compared with the best fixed route, the average route, and an oracle on shuffled targets, where no route can carry
    information. After an interruption, the same command continues.
    """
    require("lm", "plots", by="anabranch oracle")
    import torch

    from anabranch.cli.corpora import default_length, run_of, say_defaults, windows_of
    from anabranch.cli.graph.waiting import waiting
    from anabranch.depth.duo_llm import RouteLabels, analyze, duo_layers, route_loss
    from anabranch.depth.duo_llm import oracle as find
    from anabranch.lm.folder import files_of, run_steps
    from anabranch.report.routes import LINES, draw_oracle, oracle_files

    place = Path(out)
    files = [place / _TABLE, place / _LABELS, *oracle_files(place / _PICTURE)]
    check_apart(files, [*files_of(model), *([data] if data is not None and Path(data).is_file() else [])])
    if run_steps(place):
        raise DataError(f"{out} is the folder of a training run, so no routes are written there; choose another folder")
    network, tokenizer = load(model, dtype, device)
    try:
        num_layers = len(duo_layers(network))
    except ConfigError:
        raise DataError(
            f"{model} has no 'duo' layers, so there are no routes to try; anabranch train duo trains a model that has"
        ) from None
    chosen = num_layers // 2 if budget is None else budget
    if chosen > num_layers:
        raise DataError(f"--budget is {chosen}, but {model} has {num_layers} duo layers; use 0 to {num_layers}")
    run = run_of(model)
    length = sequence_length or default_length(run, network.config.max_positions)
    windows, name = windows_of(data, run, tokenizer, length, tokens)
    say_defaults(model, name, length, run=run, is_chosen=data is not None and sequence_length is not None)
    whole = [
        torch.cat([batch.token_BL, batch.target_BL[:, -1:]], dim=1)
        for batch in windows
        if batch.token_BL.shape[1] == length
    ]
    if not whole:
        raise DataError(f"{name} has no {length} tokens in a row; give more text, or a smaller --sequence-length")
    ids_BL = torch.cat(whole).to(next(network.parameters()).device)
    place.mkdir(parents=True, exist_ok=True)
    unfinished = place / _UNFINISHED
    control = None if mode == "self_consistent" else seed
    with waiting("routing", quiet):
        found = find(
            network, ids_BL, range(num_layers + 1), mode=mode, shuffle_seed=control, seed=seed, resume=unfinished
        )
        small_BL = route_loss(network, ids_BL, "small")
        facts = analyze(found, small_BL, ids_BL=ids_BL, tokenizer=tokenizer, path=place / _TABLE)
    RouteLabels.of(ids_BL.cpu(), found, chosen).write(place / _LABELS)
    draw_oracle(facts, place / _PICTURE)
    unfinished.unlink(missing_ok=True)
    if as_json:
        print_json({"model": model, "data": name, "sequence_length": length, "labels_budget": chosen, **facts})
        return
    fact("model", f"{model}   {num_layers} duo layers")
    fact("text", f"{name}   {ids_BL.shape[0]} sequences of {length} tokens")
    names = [*LINES]
    headers = ["big layers", *(f"{LINES[each]}\nnats/token" for each in names)]
    rows = [[str(row["budget"]), *(f"{row[each]:.4f}" for each in names)] for row in facts["rows"]]
    if "shuffled" in facts:
        headers.append("gain with\nshuffled targets")
        rows = [
            [*row, f"{other['mean'] - other['oracle']:.4f}"] for row, other in zip(rows, facts["shuffled"], strict=True)
        ]
    table(headers, rows)
    report = found.report
    fact("cost", f"{report.routes:,} routes, {report.layer_passes:,} layer passes; the gain is {report.bound}")
    wrote(f"{out}/{{{_TABLE}, {_LABELS}, {_PICTURE}.png, {_PICTURE}.svg}}", f"open {place / _PICTURE}.png")
