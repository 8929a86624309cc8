"""``anabranch depth eval``: layers per token, agreement with the whole model and nats per token of a model with routers."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from anabranch.cli.depth.shared import After, Context, Data, Limit, Source, one_of, questions_of, stack_at
from anabranch.cli.options import AsJson, Device, Dtype, Model, Quiet, Seed, finite_number
from anabranch.cli.output import fact, print_json, table
from anabranch.cli.progress import Progress
from anabranch.extras import require

# What tables call the ways of having fewer layers.
NAMES = {"routed": "routers", "random": "random skip", "shortgpt": "ShortGPT", "early_exit": "early exit"}


def evaluate(
    model: Model,
    source: Source = None,
    data: Data = None,
    routers: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Routers of anabranch depth train. Default: none, the whole model."),
    ] = None,
    control: Annotated[
        float,
        typer.Option(
            metavar="P",
            min=-1,
            max=1,
            callback=finite_number,
            help="From fewer to more blocks: -1 skips all, -0.5 follows the routers, 0.5 is the whole model, 1 repeats all.",
        ),
    ] = -0.5,
    decide: Annotated[
        Literal["prompt", "step"],
        typer.Option(help="Whether routers decide once, on the prompt, or again for every token."),
    ] = "prompt",
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also measure random skipping, removed blocks and early exit, with the same number of layers.",
        ),
    ] = False,
    limit: Limit = None,
    context: Context = 64,
    after: After = 16,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model with depth routers on what follows a prompt: the answers to questions, or the next tokens of a text.

    Example: anabranch depth eval SmolLM2-135M --data questions.jsonl --routers routers --baselines
    """
    require("lm", by="anabranch depth eval")
    from anabranch.depth.dr_llm import RouterBank, baselines_at, influence_of, measure, measure_paths, reference_of

    text = one_of(source, data)
    stack, tokenizer = stack_at(model, dtype, device)
    bank = None if routers is None else RouterBank.load(routers, stack)
    questions, name = questions_of(model, stack, tokenizer, text, context=context, after=after, limit=limit)
    with Progress(2 * len(questions), "question", quiet=quiet) as shown:
        reference = reference_of(stack, questions, progress=lambda done, total: shown.update(done))
        options: dict[str, Any] = {
            "reference": reference,
            "progress": lambda done, total: shown.update(len(questions) + done),
        }
        if bank is None:
            whole = tuple(range(stack.num_blocks))
            found = measure_paths(stack, questions, [whole] * len(questions), **options)
        else:
            found = measure(stack, questions, bank, control=control, decide=decide, **options)
        beside = {}
        if baselines:
            shown.doing("baselines")
            influence = influence_of(stack, questions)
            beside = baselines_at(stack, questions, found.layers_per_token, influence, reference=reference, seed=seed)
    if as_json:
        told = {"model": model, "data": name, "routers": None if routers is None else str(routers)}
        told |= {"control": control, "decide": decide, **found.to_dict()}  # type: ignore[dict-item]
        if baselines:
            told["baselines"] = {key: one.to_dict() for key, one in beside.items()}  # type: ignore[assignment]
        print_json(told)
        return
    fact("model", f"{model}   {stack.num_blocks} blocks")
    fact("data", f"{name}   {found.questions} prompts, {found.tokens:,} tokens behind them")
    rows = [("whole model" if bank is None else "routers", found), *((NAMES[key], one) for key, one in beside.items())]
    table(
        ["", "layers/token", "agreement", "accuracy", "nats/token"],
        [
            [
                label,
                f"{one.layers_per_token:.2f}",
                f"{one.agreement:.1%}",
                f"{one.accuracy:.1%}",
                f"{one.nats_per_token:.4f}",
            ]
            for label, one in rows
        ]
        + [
            [
                "whole model",
                f"{stack.num_blocks:.2f}",
                "100.0%",
                f"{found.full_accuracy:.1%}",
                f"{found.full_nats_per_token:.4f}",
            ]
        ]
        * (bank is not None),
    )
