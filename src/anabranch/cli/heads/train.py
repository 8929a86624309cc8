"""``anabranch heads train``: a model goes on with routed heads."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.cli.ending import ending, tell_ending, told_of_best
from anabranch.cli.heads.speech import conclude, introduce, is_speech_run, new_run, resumed_run, shown
from anabranch.cli.options import AsJson, Quiet, Seed, read_assignments, setting
from anabranch.cli.output import duration, fact, print_json, quantity, shell_word, size, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.train import INTERRUPTED
from anabranch.errors import ConfigError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.train import Event, RunConfig, TaskRunConfig, Trainer, TrainResult

# What a model that is there already goes on with unless somebody says otherwise.
_TRAIN: dict[str, Any] = {
    "steps": 200,
    "batch_size": 8,
    "learning_rate": 3e-4,
    "eval_every": None,
    "checkpoint_every": 50,
}
# Names of what weighs heads.
GATES = ".gate."


def train(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run.")],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A training run, a saved model, a Hugging Face folder or a .gguf file; or a Whisper folder.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            help="Text to learn from. Default: the source of Python's standard library. For Whisper: a folder of speech.",
        ),
    ] = None,
    shared: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Number of heads that are always on. Default: two thirds, as in PVChat."),
    ] = None,
    routing: Annotated[
        Literal["relu", "topk"] | None,
        typer.Option(
            help="relu (ReMoH): as many heads as a token needs; topk (MoH): always the same number. Default: relu."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="Routed heads per token, with topk; with relu, it sets the default of --target. Default: 2.",
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Target share of routed heads that are on, with relu. Default: --top-k of them."
        ),
    ] = None,
    init: Annotated[
        Literal["preserve", "released"] | None,
        typer.Option(help="Start with an unchanged model (preserve), or as the papers' code does. Default: preserve."),
    ] = None,
    learn: Annotated[
        Literal["all", "gates"] | None,
        typer.Option(help="What is trained: the whole model, or only the head routers. Default: all."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Optimizer steps (train.steps). Default: 200.")
    ] = None,
    seed: Annotated[
        Seed | None, typer.Option(metavar="S", help="Seed of the data order (train.seed). Default: 0.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", metavar=" ", help="Continue the run in DIR with its config.")
    ] = False,
    assignments: Annotated[list[str] | None, setting("train.learning_rate=0.001")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a model in which each token uses only some of the attention heads.

    At first the model is unchanged; training then turns off heads that are not needed, down to the target share. Any field of a run can
    be set: --set train.learning_rate=1e-4, --set data.sequence_length=512.

    In a Whisper model (a folder of transformers or CTranslate2), the decoder's cross-attention is routed. TEXT is then a folder of .wav
    files, each with its transcript in a .txt file of the same name; its subfolders are the domains of heads report. The trained model is
    DIR/model.

    Example: anabranch heads train SmolLM2-135M my/texts --shared 6 --target 0.5 --out runs/heads
    """
    require("lm", by="anabranch heads train")
    from anabranch.heads.whisper import is_whisper
    from anabranch.train import Trainer
    from anabranch.train.run import check_free, check_new
    from anabranch.train.start import keep_tokenizer, resumed_parts, start_run

    settings = read_assignments(assignments)
    settings |= {} if steps is None else {"train.steps": steps}
    settings |= {} if seed is None else {"train.seed": seed}
    heads = {"num_shared": shared, "routing": routing, "top_k": top_k, "target": target, "init": init}
    said = {name: value for name, value in heads.items() if value is not None}
    given: dict[str, Any]
    if is_speech_run(out) if resume else model is not None and is_whisper(model):
        if resume:
            _check_resumed(out, {"MODEL": model, "TEXT": data, "--learn": learn, **_options(said)})
            run = resumed_run(out, settings)
        else:
            assert model is not None
            run = new_run(model, data, out, said, learn, settings, _TRAIN)
        _train_speech(run, out, resume=resume, quiet=quiet, as_json=as_json)
        return
    if resume:
        config = _resumed(out, {"MODEL": model, "TEXT": data, "--learn": learn, **_options(said)}, settings)
        given = resumed_parts(config, out)
    else:
        if model is None:
            raise ConfigError("MODEL is not given; name the model that gets routed heads, or go on with --resume")
        check_free(out)
        check_new(out)
        config = _config(model, data, said, settings)
        config, given = start_run(config, model, out)
        assert config.start is not None
        config = config.replace(start=config.start.replace(learns=GATES if learn == "gates" else None))
    first = int(os.environ.get("RANK", "0")) == 0
    progress = Progress(config.train.steps, "step", quiet=quiet or not first)
    with progress:
        trainer = Trainer(config, out, resume=resume, on_event=lambda event: _show(event, progress), **given)
        if first and not resume:
            keep_tokenizer(config, given["tokenizer"], out)
        if first and not quiet:
            _introduce(trainer)
        result = trainer.fit()
    if first:
        _conclude(trainer, result, out, as_json=as_json)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED.get(result.signal or "", 130))


def _train_speech(run: TaskRunConfig, out: Path, *, resume: bool, quiet: bool, as_json: bool) -> None:
    """Of a Whisper."""
    require("huggingface", by="anabranch heads train WHISPER")
    from anabranch.train import Trainer

    with Progress(run.train.steps, "step", quiet=quiet) as progress:

        def show(event: Event) -> None:
            told = shown(event)
            if told is not None:
                progress.update(event.step, told)

        trainer = Trainer(run, out, resume=resume, on_event=show)
        if not quiet:
            introduce(trainer)
        result = trainer.fit()
    if trainer.workers.rank == 0:
        conclude(trainer, result, out, as_json=as_json)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED.get(result.signal or "", 130))


def _options(said: dict[str, Any]) -> dict[str, Any]:
    """Fields of `HeadRouting` as options."""
    names = {"num_shared": "--shared", "top_k": "--top-k"}
    return {names.get(name, f"--{name}"): value for name, value in said.items()}


def _config(model: str, data: str | None, said: dict[str, Any], settings: dict[str, Any]) -> RunConfig:
    """That of a new run; its model is as ``model`` with routed heads."""
    from anabranch.config import override
    from anabranch.data import DataConfig, corpus_at
    from anabranch.heads import HeadRouting, RoutedAttention
    from anabranch.heads.put_on import decoder_config
    from anabranch.lm import load_config
    from anabranch.train import RunConfig, TrainConfig

    held = load_config(model)
    if isinstance(held.attention, RoutedAttention.Config):
        raise ConfigError(
            f"{model} has routed heads already; a run of them goes on, with more steps: anabranch heads train --out RUN --resume --steps N"
        )
    num_heads = getattr(held.attention, "num_heads", None)
    if said.get("num_shared") is None:
        # Of 12 heads PVChat routes 4.
        said = said | {"num_shared": (num_heads or 1) * 2 // 3}
    made = decoder_config(held, HeadRouting(**said))
    length = min(256, held.max_positions)
    corpus = DataConfig(sequence_length=length)
    if data is not None:
        corpus = corpus.replace(corpus=corpus_at(data))
    wrong = next(
        (name for name in settings if not name.startswith(("train.", "data.", "parallel.", "model.attention.heads."))),
        None,
    )
    if wrong is not None:
        raise ConfigError(
            f"--set {wrong}: the model is MODEL with routed heads; fields of train, data, parallel and model.attention.heads can be set"
        )
    config = override(RunConfig(model=made, data=corpus, train=TrainConfig(**_TRAIN)), settings)
    if config.model.local_attention is not None:
        heads: Any = config.model.attention
        local: Any = config.model.local_attention
        config = config.replace(model=config.model.replace(local_attention=local.replace(heads=heads.heads)))
    return config


def _check_resumed(out: Path, said: dict[str, Any]) -> None:
    """Raise ConfigError for what a run that goes on is not asked again."""
    given = next((name for name, value in said.items() if value is not None), None)
    if given is not None:
        raise ConfigError(
            f"{given} is given with --resume, which goes on with the run in {out} as it began; leave it out"
        )


def _resumed(out: Path, said: dict[str, Any], settings: dict[str, Any]) -> RunConfig:
    """That of the run in ``out``, with what is set anew."""
    from anabranch.config import override
    from anabranch.heads import RoutedAttention
    from anabranch.train import read_run_config

    _check_resumed(out, said)
    config = read_run_config(out)
    if not isinstance(config.model.attention, RoutedAttention.Config):
        raise ConfigError(f"the run in {out} has no routed heads; go on with it by anabranch train --resume")
    return override(config, settings)


def _introduce(trainer: Trainer[RunConfig]) -> None:
    config = trainer.config
    attention: Any = config.model.attention
    heads = attention.heads
    wanted = f"target {heads.rate(attention.num_heads):.2f}" if heads.routing == "relu" else f"top {heads.top_k}"
    learns = sum(each.numel() for each in trainer.model.parameters() if each.requires_grad)
    if config.start is not None:
        fact("from", config.start.model, to=sys.stderr)
    fact(
        "heads",
        f"{attention.num_heads} in each of {config.model.num_layers} layers, {heads.num_shared} shared, {heads.routing}, {wanted}   "
        f"{quantity(learns)} parameters learn",
        to=sys.stderr,
    )
    kept, held = (sum(trainer.data.num_tokens(split).values()) for split in ("train", "validation"))
    fact(
        "data",
        f"{config.data.corpus.build().describe()}   {quantity(kept)} tokens, {quantity(held)} held out   {trainer.workers.device}",
        to=sys.stderr,
    )


def _show(event: Event, progress: Progress) -> None:
    if event.kind == "step":
        on = event.values.get("activation")
        told = "" if on is None else f"  {on:.0%} of routed heads on"
        progress.update(
            event.step, f"loss {event.values['loss']:.3f}{told}  {quantity(event.values['tokens_per_second'])} tokens/s"
        )
    elif event.kind == "evaluation":
        width = len(str(event.steps))
        progress.note(
            f"step {event.step:>{width}}/{event.steps}  held-out text: {event.values['nats_per_token']:.3f} nats/token"
            f"{told_of_best(event.values)}"
        )


def _conclude(trainer: Trainer[RunConfig], result: TrainResult, out: Path, *, as_json: bool) -> None:
    from anabranch.heads import head_report

    # Of the evaluation and of training; what is measured well is told by `heads report`.
    layers = [] if trainer.workers.is_sharded else head_report(trainer.model)
    rates = [layer["activation"] for layer in layers if layer["activation"] is not None]
    config = trainer.config
    if as_json:
        print_json(
            {
                "folder": str(out),
                "status": result.status,
                "step": result.step,
                "steps": config.train.steps,
                **ending(result),
                **(result.evaluation.to_dict() if result.evaluation else {}),
                "activation_by_layer": rates,
                "trained_tokens": result.tokens,
                "seconds": result.seconds,
                "tokens_per_second": result.tokens_per_second,
                "peak_memory_bytes": result.peak_memory_bytes,
                "skipped_steps": result.skipped_steps,
                "checkpoint": str(result.checkpoint) if result.checkpoint else None,
            }
        )
        return
    if result.evaluation:
        fact(
            "quality", f"{result.bits_per_byte:.3f} bits/byte, {result.nats_per_token:.3f} nats/token on held-out text"
        )
    if rates:
        fact("heads", f"{sum(rates) / len(rates):.0%} of routed heads were on, over all of it")
    fact(
        "work",
        f"{result.step} of {config.train.steps} steps, {quantity(result.tokens)} tokens in {duration(result.seconds)}, "
        f"{size(result.peak_memory_bytes)} memory",
    )
    tell_ending(result)
    if result.status == "interrupted":
        wrote(f"{result.checkpoint}", f"anabranch heads train --out {shell_word(out)} --resume")
        return
    wrote(f"{result.written}", f"anabranch heads report {shell_word(out)}")
