"""``anabranch depth prune``: which tokens of a prompt each block of a model computes (FTP)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.cli.depth.shared import Context, Data, Limit, Source, one_of, questions_of, stack_at
from anabranch.cli.option_sets import OptionSet, takes_sets
from anabranch.cli.options import (
    AsJson,
    Device,
    Dtype,
    Model,
    Quiet,
    Seed,
    finite_number,
    read_assignments,
    setting,
)
from anabranch.cli.output import fact, print_json, shell_word, wrote
from anabranch.cli.progress import Progress
from anabranch.extras import require
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.depth.ftp import FitConfig, Fitted

# What an unfinished fit has measured lies beside its output.
UNFINISHED = ".unfinished"
# Tokens behind a prompt of a text.
AFTER = 16


@dataclass(frozen=True)
class Fit(OptionSet):
    """What is fitted, to how much of what is asked, and how long it is searched for."""

    sparsity: Annotated[
        float,
        typer.Option(
            metavar="S",
            callback=finite_number,
            help="Average share of a prompt's tokens that blocks skip, below 0.9.",
        ),
    ] = 0.3
    router: Annotated[
        Literal["learned", "static"],
        typer.Option(
            help="What decides: a trained router, or only the positions of tokens, which needs no training after the search."
        ),
    ] = "learned"
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Number of prompts to train the router on (training.steps). Default: 2000."
        ),
    ] = None
    generations: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Generations of each genetic search (schedule.genetic.generations). Default: 20."
        ),
    ] = None
    calibration: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of prompts on which schedules are measured. Default: 40."),
    ] = None
    mode: Annotated[
        Literal["topk", "threshold"],
        typer.Option(help="Compute exactly (1 - s) N tokens, or as many as the router wants."),
    ] = "topk"
    kv: Annotated[
        Literal["drop", "keep"],
        typer.Option(help="Keys and values of skipped tokens: left out, or computed anyway."),
    ] = "drop"
    one_pass: Annotated[
        bool, typer.Option("--one-pass", help="Decide for all blocks at once, after the first block.")
    ] = False

    def config(self, assignments: list[str] | None) -> FitConfig:
        """Raises ConfigError."""
        from anabranch.config import override
        from anabranch.depth.ftp import FitConfig
        from anabranch.depth.ftp.schedule import check_sparsity

        said = {
            "router": self.router,
            "mode": self.mode,
            "kv": self.kv,
            "one_pass": self.one_pass,
            "calibration": self.calibration,
            "training.steps": self.steps,
            "schedule.genetic.generations": self.generations,
        }
        settings = {name: value for name, value in said.items() if value is not None} | read_assignments(assignments)
        config = override(FitConfig(), settings)
        check_sparsity(self.sparsity, config.schedule.s_max)
        return config


FIT = Fit()


@takes_sets()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="File for the skipper.")],
    source: Source = None,
    data: Data = None,
    fit: Fit = FIT,
    limit: Limit = None,
    context: Context = 64,
    seed: Seed = 0,
    assignments: Annotated[list[str] | None, setting("schedule.genetic.population=12")] = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit a token skipper (FTP): search how many tokens each block skips, train a router of 450 parameters, search again with it.

    The model does not change. After an interruption, the same command continues.

    Example: anabranch depth prune SmolLM2-135M --data questions.jsonl --sparsity 0.3 --out skipper.safetensors
    """
    require("lm", by="anabranch depth prune")
    from anabranch.depth.ftp import fit_skipper
    from anabranch.depth.ftp.saving import check_replaces
    from anabranch.depth.genetic import Generation
    from anabranch.lm.folder import files_of

    text = one_of(source, data)
    unfinished = out.with_name(out.name + UNFINISHED)
    check_apart([out, unfinished], [text, *files_of(model)])
    check_replaces(out)
    config = fit.config(assignments)
    stack, tokenizer = stack_at(model, dtype, device)
    questions, name = questions_of(model, stack, tokenizer, text, context=context, after=AFTER, limit=limit)
    items = [(one.prompt, one.answer) for one in questions]
    searches = 1 if config.router == "static" else 1 + config.rounds
    learning = 0 if config.router == "static" else config.rounds * config.training.steps
    total = searches * (config.schedule.genetic.generations + 1) + learning
    with Progress(total, "step", quiet=quiet) as shown:
        done = 0

        def generation(stage: str, one: Generation) -> None:
            nonlocal done
            done += 1
            shown.update(done, f"{stage} {one.number}: {-one.best:.4f} nats, {one.evaluations} schedules")

        def step(number: int, losses: dict[str, float]) -> None:
            nonlocal done
            done += 1
            shown.update(done, f"router {number}: loss {losses['loss']:.4f}, skips {losses['achieved']:.3f}")

        fitted = fit_skipper(
            stack, items, fit.sparsity, config, seed=seed, unfinished=unfinished, on_generation=generation, on_step=step
        )
    fitted.skipper.save(out)
    told: dict[str, Any] = {
        "model": model,
        "data": name,
        "items": len(items),
        "out": str(out),
        "bytes": out.stat().st_size,
        "sparsity": fitted.skipper.sparsity,
        "schedule": list(fitted.skipper.schedule),
        "evaluations": fitted.evaluations,
        "searched": {"loss": fitted.searched.loss, "initial": fitted.searched.initial},
        "tuned": [{"loss": one.loss, "before": one.initial["searched"]} for one in fitted.tuned],
        "router_loss": fitted.history[-1] if fitted.history else None,
    }
    if as_json:
        print_json(told)
        return
    fact("model", f"{model}   {stack.num_blocks} blocks")
    fact("data", f"{name}   {len(items)} prompts, schedules on {min(len(items), config.calibration)} of them")
    _say(fitted, config.objective)
    fact("cost", f"{fitted.evaluations} schedules measured in this run; the file has {out.stat().st_size:,} bytes")
    wrote(str(out), f"anabranch depth prune-eval {shell_word(model)} {shell_word(out)} --data TEST.jsonl")


def _say(fitted: Fitted, objective: str) -> None:
    """What was found."""
    begun = fitted.searched.initial.get("uniform", float("nan"))
    fact("search", f"uniform {begun:.4f}, found {fitted.searched.loss:.4f} nats per token ({objective}), places alone")
    for one in fitted.tuned:
        fact("router", f"{one.initial['searched']:.4f} with it, {one.loss:.4f} after the second search")
    fact("blocks", " ".join(f"{value:.2f}" for value in fitted.skipper.schedule))
