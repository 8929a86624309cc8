"""Checkpoints of a run: ``OUT/checkpoints/step-00000100/``, what the task keeps with the trainer's state beside it.

    config.json, ...                                       of the task: for a language model a model folder, see `anabranch.lm.checkpoint`
    optimizer.safetensors                                  AdamW's moments by parameter name
    trainer.json                                           step, place in the data, counts, and the run's config
    SHA256SUMS                                             a digest of every other file, checked when it is loaded or resumed

Beside them lie the best weights so far where ``train.keep_best`` wants them, see `anabranch.train.best`.

A folder appears whole or not at all. An old one is removed only when a newer one has proved good: training has gone on from it, or its
evaluation was finite. No random state is stored: what is random in step n is a function of (seed, n).
"""

import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.errors import CheckpointError
from anabranch.files import atomic_folder, atomic_write_json, atomic_write_text, read_json
from anabranch.lm.folder import (
    OPTIMIZER_FILE,
    RECORD,
    STEPS_FOLDER,
    TRAINER_FILE,
    best_of,
    run_steps,
    seal,
    step_name,
    step_of,
    verify,
)

logger = logging.getLogger(__name__)

SCHEMA = 1
# Why checkpoints are set aside: their weights are of no use, or the run goes on from an earlier step of those that it learns with.
DIVERGED, GIVEN_UP = "diverged", "given-up"
# A file beside the checkpoints: all of them were set aside, so their absence is no loss.
BEGIN_AGAIN = "diverged.txt"
# What a process killed while it wrote or removed a checkpoint leaves behind: names of tempfile, and of `remove_folder`.
_LEFTOVER = re.compile(r"\.((?:step|best)-\d+)\.(old|(unfinished-)?[a-z0-9_]{8})")


def checkpoint_path(out: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return out / STEPS_FOLDER / step_name(step)


def checkpoints(out: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first. One that has lost a file is among them, and is refused when it is read."""
    return [path for path in run_steps(Path(out)) if (path / TRAINER_FILE).exists() or (path / RECORD).exists()]


def write_checkpoint(
    out: Path, state: dict[str, Any], write_task: Callable[[Path], None], optimizer_tensors: dict[str, Tensor]
) -> Path:
    """Write a checkpoint whole. ``state["step"]`` names it; ``write_task`` writes the task's files into a folder.

    Raises CapacityError if the disk is full, DataError if the place cannot be written; older checkpoints are then untouched.
    """
    path = checkpoint_path(out, state["step"])
    with atomic_folder(path, replacing=".*") as temporary:
        write_task(temporary)
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer_tensors.items()}
        save_file(ready, temporary / OPTIMIZER_FILE)
        atomic_write_json(temporary / TRAINER_FILE, {"schema": SCHEMA, **state})
        seal(temporary)
    # From here on the absence of all would be a loss.
    (out / STEPS_FOLDER / BEGIN_AGAIN).unlink(missing_ok=True)
    return path


def prune(out: Path, keep: int) -> None:
    """Remove all checkpoints but the newest ``keep``."""
    for old in checkpoints(out)[:-keep]:
        remove_folder(old)


def set_aside(out: Path, step: int, why: str = DIVERGED) -> list[Path]:
    """Rename the checkpoints of ``step`` and later ``diverged-step-...``, so that a run goes on from the one before; their new places.

    A name that is taken, by what diverged before, is numbered: ``diverged-step-00000004.2``. Where no checkpoint is left, the file
    `BEGIN_AGAIN` says so until the run is begun again. What is set aside for another reason (`GIVEN_UP`) is named by that.
    """
    moved = [path.replace(_free_place(path, why)) for path in checkpoints(out) if _step(path) >= step]
    if not checkpoints(out):
        atomic_write_text(
            out / STEPS_FOLDER / BEGIN_AGAIN,
            "The run diverged and has no checkpoint from before that: --resume begins again at step 0.\n"
            if why == DIVERGED
            else "What this run had done is given up, and there is no checkpoint from before that: --resume begins again at step 0.\n",
        )
    return moved


def _free_place(path: Path, why: str) -> Path:
    """Where a checkpoint that is set aside goes; nothing lies there."""
    name = f"{why}-{path.name}"
    names = (name if number == 1 else f"{name}.{number}" for number in itertools.count(1))
    return next(place for free in names if not os.path.lexists(place := path.with_name(free)))


def read_checkpoint(path: Path, *, has_moments: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The trainer's state and the optimizer's tensors; ``has_moments`` says whether that is an optimizer that has some.

    Raises CheckpointError if any file of the checkpoint is missing or damaged, or it is of a newer version. One that was written without
    digests is only looked through, with a warning.
    """
    try:
        state = read_json(path / TRAINER_FILE)
        # Before the digests, of which a newer version may have others.
        schema = state.pop("schema", None)
        if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
            raise CheckpointError(f"schema in {path / TRAINER_FILE} is {schema!r}; this version reads 1 to {SCHEMA}")
        if not verify(path, needed=("config.json", TRAINER_FILE, OPTIMIZER_FILE)):
            logger.warning("%s has no %s, so what is in it cannot be checked; it is resumed as it is", path, RECORD)
        _check_state(state, path / TRAINER_FILE)
        tensors = _read_optimizer(path / OPTIMIZER_FILE)
        progress = state["progress"]
        if has_moments and not tensors and progress["step"] > progress["skipped"]:
            raise CheckpointError(f"{path / OPTIMIZER_FILE} holds no moments, after {progress['step']} steps")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remove {path} to go on from the checkpoint before") from None
    return state, tensors


def _read_optimizer(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def _check_state(state: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError unless this is what a trainer stores."""
    progress, stream = (state.get(name) for name in ("progress", "stream"))
    numbers = {"step": int, "seconds": float, "skipped": int, "skipped_in_a_row": int}
    if not isinstance(progress, dict) or progress.keys() != {*numbers, "evaluation"}:
        raise CheckpointError(f"progress in {path} is not what a trainer stores; it is damaged")
    for name, kind in numbers.items():
        value = progress[name]
        if not isinstance(value, (int, float) if kind is float else int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"progress.{name} in {path} is {value!r}; it must be a number of at least 0")
    if progress["evaluation"] is not None and not isinstance(progress["evaluation"], dict):
        raise CheckpointError(f"progress.evaluation in {path} is not what a trainer stores; it is damaged")
    position = stream.get("position", 0) if isinstance(stream, dict) else None
    if not isinstance(position, int) or position < 0:
        raise CheckpointError(f"stream in {path} is not what a trainer stores; it is damaged")
    if not isinstance(state.get("task", {}), dict):
        raise CheckpointError(f"task in {path} is not what a trainer stores; it is damaged")
    best = state.get("best", {"since": 0, "evaluation": None})
    since, evaluation = (best.get(name, -1) if isinstance(best, dict) else -1 for name in ("since", "evaluation"))
    is_step = evaluation is None or (isinstance(evaluation, dict) and isinstance(evaluation.get("step"), int))
    if not isinstance(since, int) or isinstance(since, bool) or since < 0 or not is_step:
        raise CheckpointError(f"best in {path} is not what a trainer stores; it is damaged")


def remove_leftovers(out: Path) -> None:
    """Remove what a process killed while it wrote or removed a checkpoint, or best weights, left behind."""
    for folder in out.glob(f"{STEPS_FOLDER}/.*"):
        match = _LEFTOVER.fullmatch(folder.name)
        if match and (step_of(match[1]) is not None or best_of(match[1]) is not None):
            shutil.rmtree(folder, ignore_errors=True)


def _step(path: Path) -> int:
    step = step_of(path.name)
    assert step is not None, path
    return step


def remove_folder(path: Path) -> None:
    """Remove a checkpoint, or the like, of which nobody ever sees a part."""
    # Renaming is one step, so that no half-removed checkpoint can be taken for a whole one.
    hidden = path.with_name(f".{path.name}.old")
    path.replace(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
