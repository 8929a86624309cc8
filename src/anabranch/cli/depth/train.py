"""``anabranch depth train``: routers that learn the paths of a search."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from anabranch.cli.depth.shared import one_of, stack_at
from anabranch.cli.options import AsJson, Device, Dtype, Model, Quiet, Seed, read_assignments, setting
from anabranch.cli.output import fact, print_json, quantity, say, shell_word, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart


def train(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the routers.")],
    source: Annotated[str | None, typer.Argument(metavar="PATHS", help="Same as --paths.")] = None,
    paths: Annotated[
        str | None, typer.Option("--paths", "--data", metavar="FILE", help="Output file of anabranch depth search.")
    ] = None,
    flips: Annotated[
        Literal["auto", "keep", "drop"],
        typer.Option(
            help="Whether to learn from paths that turn a wrong answer into a right one: if the null control allows it, always, "
            "or never."
        ),
    ] = "auto",
    quota: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Maximum number of questions to learn from.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Passes over the questions (epochs). Default: 25.")
    ] = None,
    seed: Seed = 0,
    assignments: Annotated[list[str] | None, setting("epochs=10")] = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a router for each block on the paths that a search found. The model is frozen and runs once on each prompt.

    Example: anabranch depth train SmolLM2-135M paths.jsonl --out routers
    """
    require("lm", by="anabranch depth train")
    from anabranch.config import override
    from anabranch.depth.dr_llm import FitConfig, labels_of, read_paths, train_routers
    from anabranch.depth.dr_llm.fitting import settings_of
    from anabranch.depth.dr_llm.search import control_file, control_of
    from anabranch.lm.folder import files_of

    text = one_of(source, paths, "--paths")
    if text is None:
        raise ConfigError("PATHS is missing; use anabranch depth train MODEL PATHS --out DIR")
    check_apart([out], [text, control_file(text), *files_of(model)])
    said = {"epochs": epochs, "seed": seed}
    settings = {name: value for name, value in said.items() if value is not None} | read_assignments(assignments)
    config = override(FitConfig(), settings)
    rows = read_paths(text)
    control = control_of(text, rows) if flips == "auto" else None
    keeps = flips == "keep" or (control is not None and control.is_real)
    labels = labels_of(rows, flips=keeps, quota=quota)
    stack, _ = stack_at(model, dtype, device)
    with Progress(len(labels), "prompt", quiet=quiet) as shown:

        def tell(done: int, total: int, what: str) -> None:
            shown.set_total(total)
            shown.update(done, "" if what == "prompts" else what)

        bank, report = train_routers(stack, labels, config, progress=tell)
    told = {
        "model": model,
        "paths": text,
        "out": str(out),
        "parameters": bank.num_parameters,
        "flips": labels.num_flips,
        "mean_layers": labels.mean_layers,
        **report.to_dict(),
        "settings": settings_of(config),
    }
    bank.save(out, report=told)
    if as_json:
        print_json(told)
        return
    if min(report.counts) == 0:
        missing = ("skip", "run", "repeat")[report.counts.index(0)]
        say(f"note: no label says {missing}: routers have not learned when to, and where one does it is by chance")
    fact("model", f"{model}   {stack.num_blocks} blocks, {quantity(bank.num_parameters)} parameters of routers")
    skip, run, again = report.counts
    fact(
        "labels",
        f"{report.questions} questions ({labels.num_flips} flips), {labels.mean_layers:.2f} blocks on average; {skip:,} skip, {run:,} run, "
        f"{again:,} repeat",
    )
    for name, found in (("learned", report.learned), ("held", report.held_out)):
        if found is not None:
            fact(name, f"{found.accuracy:.1%} of decisions as labelled, macro-F1 {found.macro_f1:.3f}")
    wrote(f"{out}/", f"anabranch depth eval {shell_word(model)} --routers {shell_word(out)}")
