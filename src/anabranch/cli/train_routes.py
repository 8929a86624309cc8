"""``anabranch train ... --labels``: the routers of a frozen duo model learn the routes that ``anabranch oracle`` chose."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.cli.ending import ending, tell_ending, told_of_best
from anabranch.cli.output import duration, fact, print_json, quantity, shell_word, size, wrote
from anabranch.cli.progress import Progress
from anabranch.errors import ConfigError

if TYPE_CHECKING:
    from anabranch.train import Event, TaskRunConfig, TrainResult

# Of ``--set``: what is left to say where model and data are given.
_OWN = ("train.", "parallel.", "model.feed_forward.router")


def holds_routes(out: Path) -> bool:
    """Whether the run in ``out`` learns routes."""
    from anabranch.depth.duo_llm import LabelledRoutes
    from anabranch.run_folder import task_kind

    return task_kind(out) == LabelledRoutes.kind


def train_routes(
    labels: Path | None,
    source: str | None,
    out: Path,
    *,
    preset: str | None,
    config_file: Path | None,
    size_dial: str | None,
    settings: Mapping[str, Any],
    goes_on: bool,
    keeps_config: bool,
    quiet: bool,
    as_json: bool,
) -> TrainResult:
    """Start such a run, or go on with the one in ``out``: with its config where ``keeps_config``, else with what the line says.

    Raises ConfigError where something is set that labels and model say, DataError for labels that are not of this model.
    """
    from anabranch.train import Trainer

    if goes_on and keeps_config:
        config, given = _resumed(labels, source, out, settings)
    else:
        if source is None or labels is None:
            missing = "--from" if source is None else "--labels"
            raise ConfigError(f"--labels are routes of a trained duo model, which --from names; {missing} is not given")
        config, given = _started(labels, source, preset, config_file, size_dial, settings)
    first = int(os.environ.get("RANK", "0")) == 0
    progress = Progress(config.train.steps, "step", quiet=quiet or not first)
    with progress:
        trainer = Trainer(config, out, resume=goes_on, on_event=lambda event: _show(event, progress), **given)
        task: Any = trainer.task
        if first and not quiet:
            _introduce(task)
        result = trainer.fit()
    if first:
        _conclude(config, task, result, out, as_json=as_json)
    return result


def _started(
    labels: Path,
    source: str,
    preset: str | None,
    config_file: Path | None,
    size_dial: str | None,
    settings: Mapping[str, Any],
) -> tuple[TaskRunConfig, dict[str, Any]]:
    from anabranch.cli.runs import build_config, set_fields
    from anabranch.depth.duo_llm import DuoFFN, LabelledRoutes
    from anabranch.train import TaskRunConfig

    # ``kind`` is what a table of the layer begins with.
    said = [
        name
        for name in set_fields(config_file, settings)
        if not name.startswith(_OWN) and name != "model.feed_forward.kind"
    ]
    if said:
        raise ConfigError(f"{said[0]} is set, but model and text are those of --from and --labels; leave it out")
    name, wanted = build_config(preset or "duo", config_file, size_dial, settings)
    if not isinstance(wanted.model.feed_forward, DuoFFN.Config):
        raise ConfigError(
            f"--labels are for routers of duo models, and {name} has {wanted.model.feed_forward.owner.kind!r} layers"
        )
    model, tokenizer = _routed(source, wanted.model.feed_forward.router, wanted.train.seed)
    task = LabelledRoutes.Config(model=model.config, labels=str(labels.absolute()), source=str(Path(source).absolute()))
    return TaskRunConfig(task=task, train=wanted.train, parallel=wanted.parallel), {
        "model": model,
        "tokenizer": tokenizer,
    }


def _resumed(
    labels: Path | None, source: str | None, out: Path, settings: Mapping[str, Any]
) -> tuple[TaskRunConfig, dict[str, Any]]:
    from anabranch.config import override
    from anabranch.data import load_tokenizer
    from anabranch.depth.duo_llm import LabelledRoutes
    from anabranch.train import checkpoints, read_task_run_config

    config = read_task_run_config(out, LabelledRoutes)
    task: Any = config.task
    for option, value, held in (("--labels", labels, task.labels), ("--from", source, task.source)):
        if value is not None and str(Path(value).absolute()) != held:
            raise ConfigError(
                f"{option} is {str(value)!r}, but the run in {out} began with {held}; leave it out to continue"
            )
    if task.labels is None or task.source is None:
        raise ConfigError(f"the run in {out} was started in Python; go on with it by train_router(..., resume=True)")
    config = override(
        config, {f"task.{name}" if name.startswith("model.") else name: settings[name] for name in settings}
    )
    for newest in checkpoints(out)[-1:]:
        return config, {"tokenizer": load_tokenizer(newest) if (newest / "tokenizer.json").is_file() else None}
    model, tokenizer = _routed(task.source, task.model.feed_forward.router, config.train.seed)
    if model.config != task.model:
        raise ConfigError(f"{task.source} is another model than when the run in {out} began; start a new run")
    return config, {"model": model, "tokenizer": tokenizer}


def _routed(source: str, router: Any, seed: int) -> tuple[Any, Any]:
    """The model that starts, with its routers, and its tokenizer."""
    import torch

    from anabranch.depth.duo_llm import with_router
    from anabranch.lm import load_model

    model, tokenizer = load_model(source, dtype=torch.float32)
    return with_router(model, router, seed=seed), tokenizer


def _introduce(task: Any) -> None:
    labels = task.labels
    count, length, layers = labels.route_BLY.shape
    fact("from", str(task.config.source), to=sys.stderr)
    budget = "any number of" if labels.budget is None else labels.budget
    fact(
        "labels",
        f"{task.config.labels}   {count} sequences of {length} tokens, {layers} layers, {budget} big, {labels.bound}",
        to=sys.stderr,
    )


def _show(event: Event, progress: Progress) -> None:
    if event.kind == "step":
        rate = quantity(event.values["tokens_per_second"])
        progress.update(event.step, f"loss {event.values['loss']:.3f}  {rate} tokens/s")
    elif event.kind == "evaluation":
        width = len(str(event.steps))
        said = f"{_agreement(event.values)}{told_of_best(event.values)}"
        progress.note(f"step {event.step:>{width}}/{event.steps}  {said}")


def _agreement(values: Mapping[str, Any]) -> str:
    return f"routers take {values['agreement']:.1%} of the routes of their labels"


def _conclude(config: TaskRunConfig, task: Any, result: TrainResult, out: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "folder": str(out),
                "task": task.kind,
                "status": result.status,
                "step": result.step,
                "steps": config.train.steps,
                **ending(result),
                **({"agreement": result.measures["agreement"]} if "agreement" in result.measures else {}),
                "trained_tokens": result.tokens,
                "seconds": result.seconds,
                "peak_memory_bytes": result.peak_memory_bytes,
                "checkpoint": str(result.checkpoint) if result.checkpoint else None,
            }
        )
        return
    if "agreement" in result.measures:
        fact("quality", _agreement(result.measures))
    fact(
        "work",
        f"{result.step} of {config.train.steps} steps in {duration(result.seconds)}, {size(result.peak_memory_bytes)} memory",
    )
    tell_ending(result)
    done = result.status == "finished"
    wrote(
        f"{result.written}",
        f"anabranch eval {shell_word(out)}" if done else f"anabranch train --out {shell_word(out)} --resume",
    )
