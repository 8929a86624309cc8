"""``anabranch depth search``: for each question the shortest list of blocks on which the model still answers rightly."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from anabranch.cli.depth.shared import Context, Data, Limit, Source, one_of, questions_of, stack_at
from anabranch.cli.options import AsJson, Device, Dtype, Model, Quiet, Seed, read_assignments, setting
from anabranch.cli.output import fact, print_json, quantity, shell_word, wrote
from anabranch.cli.progress import Progress
from anabranch.extras import require
from anabranch.files import check_apart


def search(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", help="JSON lines file, one question per line; an existing file is continued."
        ),
    ],
    source: Source = None,
    data: Data = None,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How answers are judged: next-token, options, exact, letter, boxed, or your own as module:name. Default: "
            "options if all questions have some, else next-token.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Maximum number of tokens of a generated answer (exact, letter, boxed)."),
    ] = None,
    simulations: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tree-search simulations per question (simulations). Default: 50."),
    ] = None,
    flips: Annotated[
        Literal["auto", "keep", "drop"] | None,
        typer.Option(
            help="Whether to keep paths that turn a wrong answer into a right one: if the null control allows it, always, or "
            "never."
        ),
    ] = None,
    limit: Limit = None,
    context: Context = 64,
    seed: Seed = 0,
    assignments: Annotated[list[str] | None, setting("late=2")] = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Search for the blocks that a model needs for each prompt (Dr.LLM).

    Each question is recorded as soon as it is finished; after an interruption, the same command continues. The model does not change.

    Example: anabranch depth search SmolLM2-135M --data questions.jsonl --out paths.jsonl
    """
    require("lm", by="anabranch depth search")
    from anabranch.config import override
    from anabranch.depth.dr_llm import SearchConfig, find_reward, search_paths
    from anabranch.depth.dr_llm.rewards import name_of
    from anabranch.depth.dr_llm.search import control_file
    from anabranch.lm.folder import files_of

    text = one_of(source, data)
    check_apart([out, control_file(out)], [text, *files_of(model)])
    said = {"simulations": simulations, "flip_labels": flips, "seed": seed}
    settings = {name: value for name, value in said.items() if value is not None} | read_assignments(assignments)
    config = override(SearchConfig(), settings)
    stack, tokenizer = stack_at(model, dtype, device)
    questions, name = questions_of(model, stack, tokenizer, text, context=context, after=1, limit=limit)
    named = reward or ("options" if all(one.options for one in questions) else "next-token")
    judge = find_reward(named, tokenizer, max_tokens=max_tokens)
    with Progress(len(questions), "question", quiet=quiet) as shown:

        def tell(done: int, total: int, what: str) -> None:
            shown.set_total(total)
            shown.update(done, "" if what == "questions" else what)

        report = search_paths(stack, questions, judge, config, out, progress=tell)
    told = {"model": model, "data": name, "reward": name_of(judge), "out": str(out), **report.to_dict()}
    if as_json:
        print_json(told)
        return
    fact("model", f"{model}   {stack.num_blocks} blocks")
    fact(
        "data",
        f"{name}   {len(report.rows)} questions, {told['base_right']} answered by the whole model ({name_of(judge)})",
    )
    if told["mean_saving"] is not None:
        fact(
            "paths",
            f"{told['mean_saving']:.2f} blocks shorter on average; {told['shorter_by_3']:.0%} at least 3 blocks shorter",
        )
    if report.control is not None:
        control = report.control
        fact(
            "control",
            f"of {control.probe} wrong answers a path led to the truth in {control.truth}, to another wrong answer in {control.decoy} "
            f"(p = {control.p_value:.3f}): flips are {'kept' if report.keeps_flips else 'luck, and no labels'}",
        )
    if told["prefix_gain"] is not None:
        fact(
            "cost",
            f"{told['evaluations']:,} paths, {quantity(told['blocks'])} block passes; "
            f"{told['prefix_gain']:.1f} times as many without prefixes",
        )
    wrote(str(out), f"anabranch depth train {shell_word(model)} {shell_word(out)} --out routers")
