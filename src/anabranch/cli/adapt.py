"""``anabranch adapt``: a frozen model learns tasks by an adapter."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.cli.ending import KeepBest, Patience, ending, ending_settings, tell_ending, told_of_best
from anabranch.cli.options import (
    AsJson,
    Quiet,
    check_settings,
    named_folder,
    only_file,
    read_assignments,
    read_toml,
    setting,
)
from anabranch.cli.output import duration, fact, finite, print_json, quantity, shell_word, size, table, visible, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.train import INTERRUPTED
from anabranch.errors import ConfigError, DataError
from anabranch.extras import require
from anabranch.files import check_apart

if TYPE_CHECKING:
    from anabranch.adapters.adapt import AdaptTask
    from anabranch.train import Event, TaskRunConfig, Trainer, TrainResult

REPORT = "report.json"
# What an adaptation trains with unless somebody says otherwise: rows are few and the adapter starts at nothing.
_TRAIN: dict[str, Any] = {
    "steps": 200,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "eval_every": None,
    "eval_tokens": 16384,
    "checkpoint_every": 50,
}


def adapt(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run; the adapter is DIR/adapter.")
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The base model: a training run, a saved model, a Hugging Face folder or a .gguf file.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA", help="JSON lines (also .gz) with task, input and output. See docs/adapters-guide.md."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="lora, poly, mhr, dynmole, lora_mixer, gate, or any method that anabranch adapters list --backend own shows "
            "(dora, ia3, full, ...; not lt-sft, which needs a whole training first), or with the extra peft --backend peft "
            "(vera, pissa, oft, ...). Default: lora.",
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="LAYERS",
            help="Linear layers to adapt: a word (q, down), a pattern (blocks.3.*), or all. May be repeated. "
            "Default: attention for lora, poly, mhr, lora_mixer and gate; gate, up and down for dynmole; down for adapter-fusion; "
            "for others what their card says, often q and v.",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", min=1, help="Rank of the adapter (method.rank).")] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Optimizer steps (train.steps). Default: 200.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="B", min=1, help="Rows per step (train.batch_size). Default: 16.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(metavar="RATE", min=0, help="Peak learning rate (train.learning_rate). Default: 0.001."),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Steps between evaluations (train.eval_every). Default: none between the first step and the last.",
        ),
    ] = None,
    patience: Patience = None,
    keep_best: KeepBest = False,
    quantize: Annotated[
        Literal["nf4"] | None,
        typer.Option(
            help="Keep the base model's matrices in 4 bits while the adapter is trained (QLoRA): nf4 (task.quantize).",
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval-data",
            metavar="FILE",
            help="Held-out rows for evaluation. Default: the rows of DATA whose field split says so, else a tenth of them.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="ADAPTER",
            callback=named_folder,
            help="For poly and mhr: learn new tasks with the skills of an earlier adapter (DIR/adapter of its run).",
        ),
    ] = None,
    mode: Annotated[
        Literal["full", "z", "mu", "random"] | None,
        typer.Option(
            help="With --from, what is trained: all, only the routing table, the average of all skills, or newly initialised "
            "skills."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="S", min=0, help="Seed of the initial weights and the data order (train.seed)."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", metavar=" ", help="Continue the run in DIR with the config it was started with."),
    ] = False,
    assignments: Annotated[list[str] | None, setting("method.alpha=32")] = None,
    config_files: Annotated[
        list[Path] | None,
        typer.Option("--config", metavar="FILE", help="TOML file with any fields: [method], [train], [task]."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter (LoRA and others) for a frozen model, and show what each task gained.

    Only the tokens of the answers count in the loss. Ctrl-C saves; --resume continues exactly where it stopped.

    Example: anabranch adapt SmolLM2-135M rows.jsonl --out runs/mine && anabranch eval SmolLM2-135M --adapter runs/mine/adapter
    """
    require("lm", by="anabranch adapt")
    from anabranch.adapters.adapt import AdaptTask
    from anabranch.adapters.adapt.method import ADAPTER
    from anabranch.train import Trainer

    assigned = read_assignments(assignments)
    check_settings(assigned, ("method", "task", "train", "parallel"), "method.alpha or train.learning_rate")
    settings = {**_of_file(only_file(config_files)), **_under_task(assigned)}
    said = {
        "task.method.targets": None if targets is None else list(targets),
        "task.method.rank": rank,
        "task.method.start": None if source is None else str(Path(source).absolute()),
        "task.method.mode": mode,
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.learning_rate": learning_rate,
        "train.eval_every": eval_every,
        **ending_settings(patience, keep_best),
        "task.quantize": quantize,
        "task.evaluation": None if evaluation is None else str(evaluation.absolute()),
        "train.seed": seed,
    }
    said = {name: value for name, value in said.items() if value is not None}
    settings |= said
    make = _resumed if resume else _started
    config = make(out, model, data, method, settings, said)
    task: Any = config.task
    AdaptTask.check_place(task, out / ADAPTER)
    first = int(os.environ.get("RANK", "0")) == 0
    progress = Progress(config.train.steps, "step", quiet=quiet or not first)
    with progress:
        trainer = Trainer(config, out, resume=resume, on_event=lambda event: _show(event, progress))
        _tell_rows(trainer, progress)
        if first and not quiet:
            _introduce(trainer)
        result = trainer.fit()
    if first:
        _conclude(trainer, result, out, as_json=as_json)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED.get(result.signal or "", 130))


def _of_file(path: Path | None) -> dict[str, Any]:
    from anabranch.cli.runs import flatten

    return {} if path is None else _under_task(flatten(read_toml(path)))


def _under_task(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to the task by its whole path: ``method.rank`` is ``task.method.rank``."""
    return {f"task.{name}" if name.startswith("method.") else name: value for name, value in settings.items()}


# Options of methods that not all of them have, by their fields.
_OF_METHODS = {"start": "--from", "mode": "--mode", "rank": "--rank"}


def _check_options(method: Any, said: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option that the method has not, with the methods that have it."""
    from anabranch.adapters.adapt import methods_with

    for name, option in _OF_METHODS.items():
        # By the methods' names: the catalogue's have one config, with the options of them all.
        if f"task.method.{name}" in said and method.build().name not in methods_with(name):
            raise ConfigError(
                f"{option} is {said[f'task.method.{name}']!r}, which method {method.build().name!r} does not take; "
                f"{', '.join(methods_with(name))} do"
            )


def _started(
    out: Path,
    model: str | None,
    data: Path | None,
    method: str | None,
    settings: dict[str, Any],
    said: Mapping[str, Any],
) -> TaskRunConfig:
    """The config of a new run; ``said`` are those of its settings that are options by themselves."""
    from anabranch.adapters.adapt import AdaptTask, method_named
    from anabranch.adapters.adapt.rows import check_file
    from anabranch.adapters.adapt.task import template_of
    from anabranch.config import override
    from anabranch.lm.folder import files_of
    from anabranch.train import TaskRunConfig, TrainConfig
    from anabranch.train.run import check_free, check_new

    if model is None or data is None:
        raise ConfigError(
            f"{'MODEL' if model is None else 'DATA'} is missing; use anabranch adapt MODEL DATA --out DIR, or --resume"
        )
    check_file(data)
    read = [data, settings.get("task.evaluation"), settings.get("task.method.start")]
    check_apart([out], [*read, *(files_of(model) if Path(model).exists() else [model])])
    check_free(out)
    check_new(out)
    place = str(Path(model).absolute()) if Path(model).exists() else model
    named = settings.pop("task.method.kind", "lora")
    task = AdaptTask.Config(model=place, data=str(data.absolute()), method=method_named(method or named))
    _check_options(task.method, said)
    made = override(TaskRunConfig(task=task, train=TrainConfig(**_TRAIN)), settings)
    made = override(made, _absolute(made.task))
    # The record has it, so that a run goes on as it began whatever becomes of the notes that it was read from.
    settled: Any = made.task
    return override(made, {"task.template": template_of(settled)})


def _absolute(task: Any, held: Any = None) -> dict[str, Any]:
    """Files and folders that a task names, so that it goes on from any place; those that ``held`` names by the same words stay."""
    found: dict[str, Any] = {}
    for part, names in (("task", ("evaluation",)), ("task.method", task.method.owner.folders)):
        own, other = (task, held) if part == "task" else (task.method, None if held is None else held.method)
        for name in names:
            told = getattr(own, name)
            if told is None or (other is not None and told == getattr(other, name)):
                continue
            is_one = isinstance(told, str)
            places = [str(Path(place).absolute()) for place in ([told] if is_one else told)]
            found[f"{part}.{name}"] = places[0] if is_one else places
    return found


def _resumed(
    out: Path,
    model: str | None,
    data: Path | None,
    method: str | None,
    settings: dict[str, Any],
    said: Mapping[str, Any],
) -> TaskRunConfig:
    """That of the run in ``out``, with what is set anew."""
    from anabranch.adapters.adapt import AdaptTask
    from anabranch.adapters.adapt.catalogued import plain_name
    from anabranch.config import override
    from anabranch.train import read_task_run_config

    config = read_task_run_config(out, AdaptTask)
    task: Any = config.task
    for name, value, held in (("MODEL", model, task.model), ("DATA", data, task.data)):
        if value is not None and str(Path(value).absolute()) != held and str(value) != held:
            raise ConfigError(
                f"{name} is {str(value)!r}, but the run in {out} began with {held}; leave it out to continue"
            )
    began = task.method.build().name
    if method is not None and plain_name(method) != plain_name(began):
        raise ConfigError(f"--method is {method!r}, but the run in {out} uses {began!r}; leave it out to continue")
    _check_options(task.method, said)
    made = override(config, settings)
    return override(made, _absolute(made.task, task))


def _introduce(trainer: Trainer[Any]) -> None:
    task: Any = trainer.task
    learns, everything = _sizes(task)
    fact("base", f"{task.config.model}   {quantity(everything - learns)} parameters, frozen", to=sys.stderr)
    fact(
        "method",
        f"{task.method.name}   {quantity(learns)} parameters learn, {learns / everything:.2%} of all",
        to=sys.stderr,
    )
    held = 0 if task.held_out is None else len(task.held_out)
    tasks = "" if task.names == ("",) else f" of {len(task.names)} tasks"
    cut = f", {task.num_cut} cut to {task.most_tokens} tokens" if task.num_cut else ""
    fact(
        "data",
        f"{task.config.data}   {len(task.learned)} rows{tasks}, {held} held out{cut}   {trainer.workers.device}",
        to=sys.stderr,
    )


def _sizes(task: AdaptTask) -> tuple[int, int]:
    """(parameters that learn, all)."""
    return task.num_learning, sum(each.numel() for each in task.base.parameters())


def _tell_rows(trainer: Trainer[Any], progress: Progress) -> None:
    """Show how far an evaluation is: on a large base it takes as long as many steps."""
    task: Any = trainer.task
    task.on_rows = lambda done, total: progress.doing(f"held-out rows {done}/{total}")


def _show(event: Event, progress: Progress) -> None:
    if event.kind == "step":
        rate = quantity(event.values["tokens_per_second"])
        progress.update(event.step, f"loss {event.values['loss']:.3f}  {rate} tokens/s")
    elif event.kind == "evaluation":
        width = len(str(event.steps))
        progress.note(
            f"step {event.step:>{width}}/{event.steps}  held-out answers: {event.values['nats_per_token']:.3f} nats/token"
            f"{told_of_best(event.values)}"
        )


def _conclude(trainer: Trainer[Any], result: TrainResult, out: Path, *, as_json: bool) -> None:
    from anabranch.adapters.adapt.method import ADAPTER

    task: Any = trainer.task
    learns, _ = _sizes(task)
    told: dict[str, Any] = {
        "folder": str(out),
        "method": task.method.name,
        "model": task.config.model,
        "status": result.status,
        "step": result.step,
        "steps": trainer.config.train.steps,
        **ending(result),
        "parameters": learns,
        "tasks": sum(bool(name) for name in task.names),
        "before": _measured(task.before),
        "after": _measured(result.measures),
        "seconds": result.seconds,
        "trained_tokens": result.units,
        "skipped_steps": result.skipped_steps,
        "peak_memory_bytes": result.peak_memory_bytes,
        "checkpoint": str(result.checkpoint) if result.checkpoint else None,
    }
    note = ""
    if result.status == "finished":
        written = _write(trainer, out / ADAPTER)
        told |= {"adapter": str(written.folder), "form": written.form}
        if routing := task.routing():
            told["routing"] = routing
        told["template"] = task.template
        note = written.note
        _save_report(out / REPORT, told)
    if as_json:
        print_json(told)
        return
    _tell(told, note)
    tell_ending(result)
    if result.status == "interrupted":
        wrote(f"{result.checkpoint}", f"anabranch adapt --out {shell_word(out)} --resume")
        return
    base, adapter = shell_word(task.config.model), shell_word(told["adapter"])
    following = (
        f"anabranch adapters eval {base} {adapter} --data {shell_word(task.config.evaluation or task.config.data)}"
    )
    if told["form"] == "model":
        following = f"anabranch eval {adapter}"
    elif told["form"] != "peft" and task.method.needs_task:
        following = f"anabranch adapters export {base} {adapter} --task {shell_word(task.names[0])} --out DIR"
    fact("asked as", _form_of(task))
    wrote(told["adapter"], following)


def _form_of(task: Any) -> str:
    """How what was learned is asked, in words."""
    from anabranch.adapters.adapt.prompts import CHAT

    template = task.template
    if template == CHAT:
        return "the model's own form of a chat, as chat and /v1/chat/completions write it"
    form = f"{json.dumps(template, ensure_ascii=False)}, which generate and /v1/completions are to be given"
    has_form = task.tokenizer.chat_template is not None
    return (
        f"{form}   (chat writes prompts in another form: --set task.template={CHAT} learns that one)"
        if has_form
        else form
    )


def _write(trainer: Trainer[Any], folder: Path) -> Any:
    """The adapter as others use it. Raises DataError where each process has a part of it only."""
    if trainer.workers.is_sharded:
        raise DataError(
            "weights are sharded, so the adapter is only in the last checkpoint; --resume in one process writes it"
        )
    task: Any = trainer.task
    return task.write(folder)


def _save_report(path: Path, told: Mapping[str, Any]) -> None:
    from anabranch.files import atomic_write_json

    atomic_write_json(path, finite(dict(told)))


def _measured(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What of an evaluation is told; None where there was none."""
    names = ("nats_per_token", "tokens", "by_task", "choice_accuracy")
    if not values or "nats_per_token" not in values:
        return None
    return {name: values[name] for name in names if name in values}


def _tell(told: Mapping[str, Any], note: str) -> None:
    fact("method", f"{told['method']}   {quantity(told['parameters'])} parameters")
    fact(
        "work",
        f"{told['step']} of {told['steps']} steps, {quantity(told['trained_tokens'])} tokens in {duration(told['seconds'])}, "
        f"{size(told['peak_memory_bytes'])} memory",
    )
    if told["skipped_steps"]:
        fact(
            "skipped",
            f"{told['skipped_steps']} of {told['step']} steps changed nothing, as a gradient was not finite; {_advice(told)}",
        )
    if "routing" in told:
        numbers = {name: value for name, value in told["routing"].items() if isinstance(value, float)}
        fact("routing", "   ".join(f"{name} {value:.2f}" for name, value in numbers.items()))
    if note:
        fact("note", note)
    before, after = told["before"], told["after"]
    if after is None or before is None:
        fact(
            "note",
            "no rows are held out, so nothing was measured; give some with --eval-data, or mark them with a split",
        )
        return
    rows = [
        [visible(name), *_change(before["by_task"].get(name), found), str(found["rows"])]
        for name, found in after["by_task"].items()
    ]
    rows.append(["all", *_change(before, after), str(sum(found["rows"] for found in after["by_task"].values()) or "")])
    table(["held-out answers, nats/token", "before", "after", "change", "rows"], rows)
    if told["tasks"] > len(after["by_task"]):
        missing = told["tasks"] - len(after["by_task"])
        fact("note", f"{missing} of {told['tasks']} tasks have no rows among those that were measured")
    if "choice_accuracy" in before and "choice_accuracy" in after:
        was, now = 100 * before["choice_accuracy"], 100 * after["choice_accuracy"]
        fact("choices", f"{now:.1f} % of held-out rows prefer their answer to all wrong choices; {was:.1f} % before")


def _advice(told: Mapping[str, Any]) -> str:
    """What helps where gradients were not finite."""
    before = told["before"]
    if before is not None and not math.isfinite(before["nats_per_token"]):
        return f"nor were answers of {told['model']} before the first step, so the model itself is not sound"
    return "take a lower --learning-rate"


def _change(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    now = after["nats_per_token"]
    if before is None:
        return ["", f"{now:.3f}", ""]
    was = before["nats_per_token"]
    return [f"{was:.3f}", f"{now:.3f}", f"{now - was:+.3f}"]
