"""``anabranch heads train`` and ``heads report`` of a Whisper and files of speech."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anabranch.cli.ending import ending, tell_ending
from anabranch.cli.output import duration, fact, print_json, quantity, say, shell_word, visible, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import ConfigError, DataError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.heads.whisper import Speech, Words
    from anabranch.train import Event, TaskRunConfig, Trainer, TrainResult

MODEL = "model"
# Fields that --set may name: those of the trainer, and of the task but for what options and arguments say.
_SETTABLE = ("train.", "task.heads.", "task.validation_fraction")


def is_speech_run(out: Path) -> bool:
    """Whether the run in a folder is one of these."""
    from anabranch.run_folder import task_kind

    return task_kind(out) == "speech"


def new_run(
    model: str,
    speech: str | None,
    out: Path,
    heads: dict[str, Any],
    learn: Literal["all", "gates"] | None,
    settings: dict[str, Any],
    usual: dict[str, Any],
) -> TaskRunConfig:
    """The config of a new run; ``heads`` are fields of `HeadRouting`, ``usual`` of `TrainConfig`. Raises ConfigError, DataError."""
    from anabranch.config import override
    from anabranch.files import check_apart
    from anabranch.heads import HeadRouting
    from anabranch.heads.whisper import SpeechTask
    from anabranch.train import TaskRunConfig, TrainConfig
    from anabranch.train.run import check_free, check_new

    if speech is None:
        raise ConfigError(
            f"{model} is a Whisper; give a folder of speech after it: .wav files, each with a .txt of what is said in it"
        )
    check_apart([out], [model, speech])
    check_free(out)
    check_new(out)
    _check(settings)
    if heads.get("num_shared") is None:
        heads = heads | {"num_shared": _heads_of(model) * 2 // 3}
    task = SpeechTask.Config(
        model=str(Path(model).absolute()),
        speech=str(Path(speech).absolute()),
        heads=HeadRouting(**heads),
        learns=learn or "all",
    )
    return override(TaskRunConfig(task=task, train=TrainConfig(**usual)), settings)


def resumed_run(out: Path, settings: dict[str, Any]) -> TaskRunConfig:
    """That of the run in ``out``, with what is set anew. Raises ConfigError."""
    from anabranch.config import override
    from anabranch.heads.whisper import SpeechTask
    from anabranch.train import read_task_run_config

    _check(settings)
    return override(read_task_run_config(out, SpeechTask), settings)


def _check(settings: dict[str, Any]) -> None:
    wrong = next((name for name in settings if not name.startswith(_SETTABLE)), None)
    if wrong is not None:
        raise ConfigError(
            f"--set {wrong}: of a Whisper, fields of train and task.heads, and task.validation_fraction, can be set"
        )


def _heads_of(model: str) -> int:
    """Of each attention of its decoder."""
    from anabranch.heads.whisper import open_whisper

    return int(open_whisper(model)[0].config.decoder_attention_heads)


def introduce(trainer: Trainer[Any]) -> None:
    """Say what learns on what."""
    task: Any = trainer.task
    config = task.config
    heads, number = config.heads, task.whisper.config.decoder_attention_heads
    wanted = f"target {heads.rate(number):.2f}" if heads.routing == "relu" else f"top {heads.top_k}"
    learns = sum(each.numel() for name, each in task.whisper.named_parameters() if task.learns(name, each))
    fact("from", config.model, to=sys.stderr)
    fact(
        "heads",
        f"{number} in each attention of {', '.join(config.where)}, {heads.num_shared} shared, {heads.routing}, {wanted}   "
        f"{quantity(learns)} parameters learn",
        to=sys.stderr,
    )
    held = 0 if task.held_out is None else len(task.held_out)
    fact(
        "speech",
        f"{config.speech}   {len(task.learned)} files, {held} held out   {trainer.workers.device}",
        to=sys.stderr,
    )
    say_unread(config.speech)


def say_unread(speech: str) -> None:
    """What of a folder of speech is left out, though somebody may have meant it."""
    from anabranch.heads.whisper.sound import told_unread, unread_in

    told = told_unread(unread_in(Path(speech), texts=True))
    if told:
        say(visible(told))


def shown(event: Event) -> str | None:
    """What a progress bar says of an event; None for those of which it says nothing."""
    if event.kind != "step":
        return None
    on = event.values.get("activation")
    told = "" if on is None else f"  {on:.0%} of routed heads on"
    return f"loss {event.values['loss']:.3f}{told}  {event.values['files_per_second']:.1f} files/s"


def conclude(trainer: Trainer[Any], result: TrainResult, out: Path, *, as_json: bool) -> None:
    """Write the model of a run that finished, and say what came of it."""
    from anabranch.heads import head_report
    from anabranch.heads.whisper import save_whisper
    from anabranch.heads.whisper.folder import tokenizer_of

    task: Any = trainer.task
    config = task.config
    rates = [layer["activation"] for layer in head_report(task.whisper) if layer["activation"] is not None]
    told: dict[str, Any] = {
        "folder": str(out),
        "status": result.status,
        "step": result.step,
        "steps": trainer.config.train.steps,
        **ending(result),
        "before": task.before,
        "after": {name: result.measures.get(name) for name in ("nats_per_token", "accuracy", "tokens")}
        if result.measures
        else None,
        "activation_by_layer": rates,
        "seconds": result.seconds,
        "checkpoint": str(result.checkpoint) if result.checkpoint else None,
    }
    if result.status == "finished":
        if trainer.workers.is_sharded:
            raise DataError("weights are in shards; --resume in one process writes the model out")
        save_whisper(out / MODEL, task.whisper, tokenizer_of(config.model))
        told["model"] = str(out / MODEL)
    if as_json:
        print_json(told)
        return
    if told["before"] and told["after"]:
        before, after = told["before"], told["after"]
        fact(
            "quality",
            f"held-out texts: {before['nats_per_token']:.3f} nats/token before, {after['nats_per_token']:.3f} after; next token right "
            f"{before['accuracy']:.1%} and {after['accuracy']:.1%}",
        )
    if rates:
        fact("heads", f"{sum(rates) / len(rates):.0%} of routed heads were on, over all of it")
    fact("work", f"{result.step} of {trainer.config.train.steps} steps in {duration(result.seconds)}")
    tell_ending(result)
    if result.status == "interrupted":
        wrote(f"{result.checkpoint}", f"anabranch heads train --out {shell_word(out)} --resume")
        return
    wrote(told["model"], f"anabranch heads report {shell_word(out)} --data {shell_word(config.speech)}")


def heard(model: str, data: str | None, device: str | None, limit_tokens: int) -> tuple[Any, Any, Speech]:
    """(the Whisper, its words, files of ``data`` whose texts have about so many tokens in all). Raises DataError without ``data``."""
    from anabranch.cli.options import read_device
    from anabranch.heads.whisper import Speech, open_whisper, read_speech

    require("huggingface", by="anabranch heads report")
    if data is None:
        raise DataError(
            f"{model} is a Whisper; name a folder of speech with --data: .wav files, each with a .txt of what is said in it"
        )
    network, words = open_whisper(model)
    chosen, count = [], 0
    found = read_speech(data)
    say_unread(data)
    for each in found:
        chosen.append(each)
        count += len(words.encode(each.text))
        if count >= limit_tokens:
            break
    return network.to(read_device(device)), words, Speech.of(chosen, network, words)


def written(network: Any, words: Words, speech: Speech, quiet: bool) -> dict[str, Any]:
    """``word_error_rate`` of what the model writes by itself, over all ``words``."""
    from anabranch.heads.whisper import transcribe

    wrong = total = 0
    with Progress(len(speech), "file", quiet=quiet) as progress:
        for number, (each, feature_MF) in enumerate(zip(speech.files, speech.feature_NMF, strict=True)):
            progress.update(number, "writing")
            found, count = word_errors(each.text, transcribe(network, words, feature_MF))
            wrong, total = wrong + found, total + count
    return {"word_error_rate": wrong / total if total else 0.0, "words": total}


def word_errors(said: str, written: str) -> tuple[int, int]:
    """(words that must be put in, left out or changed to make ``written`` of ``said``, words of ``said``), without case and punctuation."""
    wanted, found = _spoken(said), _spoken(written)
    row = list(range(len(found) + 1))
    for place, word in enumerate(wanted, 1):
        diagonal, row[0] = row[0], place
        for column, other in enumerate(found, 1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (word != other))
    return row[-1], len(wanted)


def _spoken(text: str) -> list[str]:
    kept = "".join(letter if letter.isalnum() or letter == "'" else " " for letter in text.lower())
    return kept.split()
