"""``anabranch train``: train one model."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from anabranch.cli.ending import KeepBest, Patience, ending, ending_settings, tell_ending, told_of_best
from anabranch.cli.options import (
    AsJson,
    Assignments,
    Quiet,
    Texts,
    only_file,
    read_assignments,
    read_texts,
    use_granted_cores,
)
from anabranch.cli.output import duration, fact, print_json, quantity, sample, say, shell_word, size, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.train_routes import holds_routes, train_routes
from anabranch.errors import ConfigError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.lm import Decoder
    from anabranch.train import Event, RunConfig, Trainer, TrainResult

# Exit codes, as shells give them.
INTERRUPTED = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
SAMPLE_TOKENS = 160
_AUTO = "--resume-auto"
_AUTO_HINT = (
    "--resume auto is for a line that is to start a run or go on with it, such as one that torchrun starts anew"
)


class TrainCommand(TyperCommand):
    """The command, whose flag ``--resume`` may be followed by ``auto``: a queue or torchrun starts the same line again and again."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments."""
        spelled: list[str] = []
        for argument in args:
            if argument == "auto" and spelled[-1:] == ["--resume"]:
                spelled[-1] = _AUTO
            else:
                spelled.append(_AUTO if argument == "--resume=auto" else argument)
        return super().parse_args(ctx, spelled)


def train(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run.")],
    preset: Annotated[
        str | None,
        typer.Argument(
            metavar="PRESET",
            help="demo, dense, moe, rexmoe, ... (anabranch info lists all); tiny, small or base is the demo in that size. "
            "Default: demo.",
        ),
    ] = None,
    data: Texts = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps (train.steps).")] = None,
    patience: Patience = None,
    keep_best: KeepBest = False,
    seed: Annotated[
        int | None, typer.Option(metavar="S", help="Seed of the initial weights and the data order (train.seed).")
    ] = None,
    size_dial: Annotated[
        str | None,
        typer.Option("--size", metavar="SIZE", help="Size of the preset: tiny, small or base. Default: tiny."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Start from the weights of this model, converted to the design of the preset.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="labels.jsonl of anabranch oracle. The routers of the --from model, a duo model, learn these routes; all else "
            "stays frozen.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar="[auto]",
            help="Continue the run in DIR with its own config. auto: continue if there is a run, else start one.",
        ),
    ] = False,
    resume_auto: Annotated[bool, typer.Option(_AUTO, hidden=True, help="What --resume auto means.")] = False,
    assignments: Assignments = None,
    config_files: Annotated[
        list[Path] | None, typer.Option("--config", metavar="FILE", help="TOML file with any fields of the config.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a language model on text.

    By default a small ReXMoE learns from the source of Python's standard library. Ctrl-C saves; --resume continues.

    --from turns a trained model into the design of the preset: a dense model into a mixture of experts or a versatile one, a mixture into
    one with reuse, a chain or recurrent routers, any model into one with parallel streams. With --labels, the routers of a duo model
    learn the routes that an oracle found.

    Text of your own: anabranch train --data my/texts --out runs/mine
    """
    require("lm", by="anabranch train")
    from anabranch.cli.runs import DEFAULT_PRESET, build_config, names_preset, set_fields
    from anabranch.train import Trainer
    from anabranch.train.run import check_free, check_new, holds_run, is_restart
    from anabranch.train.start import keep_tokenizer, resumed_parts, start_run

    use_granted_cores()
    config_file = only_file(config_files)
    settings = read_texts(data) | read_assignments(assignments)
    settings |= {} if steps is None else {"train.steps": steps}
    settings |= {} if seed is None else {"train.seed": seed}
    settings |= ending_settings(patience, keep_best)
    goes_on = resume or (holds_run(out) and (resume_auto or is_restart(out)))
    keeps_config = config_file is None and (resume or size_dial is None)
    if labels is not None or (goes_on and holds_routes(out)):
        learned = train_routes(
            labels,
            source,
            out,
            preset=preset,
            config_file=config_file,
            size_dial=size_dial,
            settings=settings,
            goes_on=goes_on,
            keeps_config=keeps_config,
            quiet=quiet,
            as_json=as_json,
        )
        _exit_if_interrupted(learned)
        return
    if goes_on and keeps_config:
        name, config = _held_config(out, preset, size_dial, settings)
    else:
        name, config = build_config(preset, config_file, size_dial, settings)
        if config_file is not None and preset is None and not names_preset(config_file):
            say(f"note: {config_file} names no preset; what it does not set is that of {DEFAULT_PRESET}")
    wanted = config.model
    given: dict[str, Any] = {}
    if goes_on:
        _check_source(source, config, out)
        given = resumed_parts(config, out)
    elif source is None:
        check_new(out, hint=_AUTO_HINT)
    else:
        check_free(out)
        check_new(out, hint=_AUTO_HINT)
        fields = set_fields(config_file, settings)
        config, given = start_run(config, source, out, fields)
    # Under torchrun one process talks.
    first = int(os.environ.get("RANK", "0")) == 0
    observer = _Observer(config, quiet=quiet or not first)
    with observer.progress:
        trainer = Trainer(config, out, resume=goes_on, on_event=observer, **given)
        if first and config.start is not None and not goes_on:
            keep_tokenizer(config, given["tokenizer"], out)
        if first and not quiet:
            observer.introduce(name, trainer, wanted)
        result = trainer.fit()
    if first:
        _conclude(name, config, trainer, result, out, as_json=as_json)
    _exit_if_interrupted(result)


def _exit_if_interrupted(result: TrainResult) -> None:
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED.get(result.signal or "", 130))


def _held_config(
    out: Path, preset: str | None, size_dial: str | None, settings: dict[str, Any]
) -> tuple[str, RunConfig]:
    """Name and config of the run that is in ``out``, with what is set anew."""
    from anabranch.cli.runs import check_preset
    from anabranch.config import override
    from anabranch.train import read_run_config

    if size_dial is not None:
        raise ConfigError(
            f"--size is {size_dial!r}, but a resumed run keeps the size it was started with; leave it out"
        )
    held = read_run_config(out)
    if preset is not None:
        check_preset(preset, held, out)
    return preset or out.name, override(held, settings)


def _check_source(source: str | None, config: RunConfig, out: Path) -> None:
    """Raise ConfigError if the run in ``out`` started from something else than is named now."""
    held = None if config.start is None else config.start.model
    if source is not None and str(Path(source).absolute()) != held:
        began = "random weights" if held is None else held
        raise ConfigError(f"--from is {source!r}, but the run in {out} started from {began}; leave it out to continue")


class _Observer:
    """Shows a training as it goes on."""

    def __init__(self, config: RunConfig, *, quiet: bool) -> None:
        self.progress = Progress(config.train.steps, "step", quiet=quiet)
        self._losses: list[float] = []

    def introduce(self, name: str, trainer: Trainer[RunConfig], wanted: Decoder.Config) -> None:
        """What is about to be trained, on what; and where the model it starts from is not as ``wanted``."""
        from anabranch.cli.runs import describe_model
        from anabranch.lm.differences import shown
        from anabranch.lm.recipes import kept_fields

        config = trainer.config
        counts = config.model.count(config.data.sequence_length)
        if config.start is not None:
            fact("from", " ".join([config.start.model, *config.start.recipe]), to=sys.stderr)
            kept = kept_fields(wanted, config.model)
            if kept:
                said = (
                    f"{each.path.removeprefix('model.')} {shown(each.held)}, not {shown(each.wanted)}" for each in kept
                )
                fact("kept", f"of the model: {'; '.join(said)}", to=sys.stderr)
        for advice in _advice(config):
            fact("note", advice, to=sys.stderr)
        kept, held = (sum(trainer.data.num_tokens(split).values()) for split in ("train", "validation"))
        fact(
            "model",
            f"{name}   {describe_model(config)}   "
            f"{quantity(counts.parameters)} parameters, {quantity(counts.active)} active",
            to=sys.stderr,
        )
        fact(
            "data",
            f"{config.data.corpus.build().describe()}   "
            f"{quantity(kept)} tokens, {quantity(held)} held out   {trainer.workers.device}, seed {config.train.seed}",
            to=sys.stderr,
        )

    def __call__(self, event: Event) -> None:
        if event.kind == "step":
            self._losses = [*self._losses[-19:], event.values["loss"]]
            loss = sum(self._losses) / len(self._losses)
            rate = quantity(event.values["tokens_per_second"])
            self.progress.update(event.step, f"loss {loss:.3f}  {rate} tokens/s")
        elif event.kind == "evaluation":
            width = len(str(event.steps))
            values = event.values
            self.progress.note(
                f"step {event.step:>{width}}/{event.steps}  held-out text: {values['bits_per_byte']:.3f} bits/byte, "
                f"{values['nats_per_token']:.3f} nats/token{_balance(values)}{told_of_best(values)}"
            )


def _advice(config: RunConfig) -> list[str]:
    """What balancers say of a training of so many steps."""
    router = getattr(config.model.feed_forward, "router", None)
    said = [part.advice(config.train.steps) for part in router.balance] if router is not None else []
    return [
        f"{advice[0]}: consider --set model.feed_forward.router.balance.{place}.{advice[1]}"
        for place, advice in enumerate(said)
        if advice is not None
    ]


def _balance(values: dict[str, Any]) -> str:
    return f", MaxVio {values['max_violation']:.2f}" if "max_violation" in values else ""


def _conclude(
    name: str, config: RunConfig, trainer: Trainer[RunConfig], result: TrainResult, out: Path, *, as_json: bool
) -> None:
    counts = config.model.count(config.data.sequence_length)
    drawn = _try_sample(trainer, result) if result.status == "finished" else _Sample()
    if as_json:
        print_json(
            {
                "folder": str(out),
                "preset": name,
                "status": result.status,
                "step": result.step,
                "steps": config.train.steps,
                **ending(result),
                **(result.evaluation.to_dict() if result.evaluation else {}),
                "routing": result.routing,
                "trained_tokens": result.tokens,
                "seconds": result.seconds,
                "tokens_per_second": result.tokens_per_second,
                "peak_memory_bytes": result.peak_memory_bytes,
                "skipped_steps": result.skipped_steps,
                "parameters": counts.parameters,
                "active_parameters": counts.active,
                "flops_per_token": counts.flops,
                "checkpoint": str(result.checkpoint) if result.checkpoint else None,
                "sample": {"prompt": drawn.prompt, "text": drawn.text},
            }
        )
        return
    fact("model", f"{name}   {quantity(counts.parameters)} parameters, {quantity(counts.active)} active")
    if result.evaluation:
        fact(
            "quality",
            f"{result.bits_per_byte:.3f} bits/byte, {result.nats_per_token:.3f} nats/token on held-out text"
            f"{_balance(result.routing)}",
        )
    fact(
        "work",
        f"{result.step} of {config.train.steps} steps, {quantity(result.tokens)} tokens in {duration(result.seconds)}, "
        f"{quantity(result.tokens_per_second)} tokens/s, {size(result.peak_memory_bytes)} memory",
    )
    tell_ending(result)
    if result.checkpoint is None:
        # Of processes that share a run one writes; this one left before it did, or is on another machine.
        fact("written", "by another process of the run" if result.status == "finished" else "nothing yet")
        return
    if result.status == "interrupted":
        wrote(f"{result.checkpoint}", f"anabranch train --out {shell_word(out)} --resume")
        return
    if drawn.problem is not None:
        wrote(f"{result.written}", f"anabranch eval {shell_word(out)}")
        return
    sample(drawn.prompt + drawn.text)
    wrote(f"{result.written}", f"anabranch generate {shell_word(out)} --prompt {shell_word(drawn.prompt)}")


@dataclass(frozen=True)
class _Sample:
    """What a trained model writes after a prompt, or the ``problem`` why it writes nothing."""

    prompt: str = ""
    text: str = ""
    problem: str | None = None


def _try_sample(trainer: Trainer[RunConfig], result: TrainResult) -> _Sample:
    """A sample for the eye. The run is finished and saved, so whatever goes wrong here is told in a line and is no failure of it."""
    try:
        return _sample(trainer, result)
    except Exception as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        fact("sample", f"none: {problem}", to=sys.stderr)
        return _Sample(problem=problem)


def _sample(trainer: Trainer[RunConfig], result: TrainResult) -> _Sample:
    """Raises AnabranchError where the model cannot generate or there is too little text for a prompt."""
    from anabranch.data import Stdlib
    from anabranch.lm import SamplingConfig, generate, load_model

    tokenizer = trainer.data.tokenizer
    if isinstance(trainer.config.data.corpus, Stdlib.Config):
        ids = tokenizer.encode("def ")
    else:
        ids = next(iter(trainer.data.windows("train", batch_size=1, num_windows=1))).token_BL[0, :16].tolist()
    model = trainer.model
    if trainer.workers.is_sharded:
        # What is left here is a part, which cannot compute without the other processes, and those have gone.
        assert result.written is not None
        model, _ = load_model(result.written, device=trainer.workers.device)
    sampling = SamplingConfig(max_tokens=SAMPLE_TOKENS, temperature=0.7, stop=tokenizer.stop_ids, seed=0)
    (made,) = generate(model, [ids], sampling)
    return _Sample(tokenizer.decode(ids), tokenizer.decode(made))
