"""`Best`: which evaluation of a run is the best so far, when a run ends since none is better for long, and the weights that are kept of it.

    OUT/checkpoints/best-00000300/     what the task keeps of step 300, with SHA256SUMS: a checkpoint to use, not to go on from

How evaluations have gone is in every checkpoint, so a resumed run knows it. The weights that any checkpoint there tells of as the best
stay beside it: whichever is resumed finds them. Once no checkpoint does, and a better evaluation has come, they are removed.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import CheckpointError, ConfigError
from anabranch.files import atomic_folder, read_json
from anabranch.lm.folder import STEPS_FOLDER, TRAINER_FILE, best_name, best_of, run_bests, seal, verify
from anabranch.train.checkpoint import checkpoints, remove_folder
from anabranch.train.config import Parallel, TrainConfig
from anabranch.train.parallel import Workers
from anabranch.train.task import Task

__all__ = ["TOLD", "Best", "check_best"]

# What a line of metrics says of an evaluation besides, where the best one is looked for.
TOLD = ("best_step", "since_best", "stopped_early")


def check_best(train: TrainConfig, parallel: Parallel, task: Task, held_out: Any) -> None:
    """Raise ConfigError where a run is to look for its best evaluation and cannot."""
    wanted = train.looks_for_best
    if wanted is None:
        return
    if held_out is None:
        raise ConfigError(
            f"train.{wanted}, and no {task.material} are held out, by which to know what is better: {task.holds_out}"
        )
    if _direction(task) is None:
        raise ConfigError(
            f"train.{wanted}, and {type(task).__name__} does not say whether lower or higher is better of its headline, "
            f"{task.headline}; say so in Task.better, or leave it out"
        )
    # There each process ends by itself, or evaluates by itself, and the others would go on.
    beside = {
        "parallel.elastic.coordinator": parallel.elastic.coordinator,
        "parallel.diloco.master": parallel.diloco.master,
    }
    for name, value in beside.items():
        if value is not None:
            raise ConfigError(
                f"train.{wanted}, and {name} is {value!r}, where processes come and go; leave one of the two out"
            )


def _direction(task: Task) -> str | None:
    return task.better or ("lower" if task.headline == "loss" else None)


class Best:
    """How the evaluations of a run have gone.

    Args:
        out: the run's folder.
        train: says what is wanted of it; where nothing is, this does nothing.
        task: whose headline is compared.
        workers: the first of them decides, and writes.

    Attributes:
        evaluation: the record of the best one; None where none was finite yet.
        since: evaluations in a row that were not better.
    """

    def __init__(self, out: Path, train: TrainConfig, task: Task, workers: Workers) -> None:
        self._out, self._train, self._task, self._workers = out, train, task, workers
        self._is_wanted = train.looks_for_best is not None
        self.evaluation: dict[str, Any] | None = None
        self.since = 0
        # The headline of the best one, as the first process has it.
        self._value = math.nan

    @property
    def step(self) -> int | None:
        """Of the best evaluation."""
        return None if self.evaluation is None else self.evaluation["step"]

    @property
    def is_over(self) -> bool:
        """Whether there was no better evaluation for so long that the run ends."""
        return self._train.patience is not None and self.since >= self._train.patience

    @property
    def folder(self) -> Path | None:
        """Where the best weights are; None where none are kept."""
        return None if self.step is None or not self._train.keep_best else self._place(self.step)

    def _place(self, step: int) -> Path:
        return self._out / STEPS_FOLDER / best_name(step)

    # Evaluations

    def see(self, record: dict[str, Any], write: Callable[[Path], None]) -> dict[str, Any]:
        """Take an evaluation into account: its record, with what is told of it besides. All processes call it together.

        ``write`` keeps the weights of this step in a folder; it is called before anything says that this is the best.
        """
        if not self._is_wanted:
            return record
        value, step = self._workers.of_first(_number(record.get(self._task.headline))), record["step"]
        is_better = self._is_better(value)
        if is_better and self._train.keep_best:
            write(self._place(step))
        self.since = 0 if is_better else self.since + 1
        ends = self.is_over and step < self._train.steps
        told = (step if is_better else self.step, self.since, ends)
        record = {**record, **dict(zip(TOLD, told, strict=True))}
        if is_better:
            self.evaluation, self._value = record, value
            self.tidy()
        return record

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value) or self.evaluation is None:
            return math.isfinite(value)
        return value < self._value if _direction(self._task) == "lower" else value > self._value

    # What is kept

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints; empty where nothing is wanted."""
        return {"since": self.since, "evaluation": self.evaluation} if self._is_wanted else {}

    def load_state_dict(self, state: Mapping[str, Any] | None, evaluation: dict[str, Any] | None) -> None:
        """Go on from what `state_dict` gave; where a run has not looked for its best before, from ``evaluation``, None for none.

        Raises CheckpointError where the best weights are to be kept, and are gone.
        """
        if not self._is_wanted:
            return
        if state is None:
            is_one = evaluation is not None and math.isfinite(_number(evaluation.get(self._task.headline)))
            state = {"since": 0, "evaluation": evaluation if is_one else None}
        self.since, self.evaluation = state["since"], state["evaluation"]
        if self.evaluation is not None:
            self._value = _number(self.evaluation.get(self._task.headline))
        if self.folder is not None and not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is gone, the weights of the best evaluation so far; put it back, or go on without: "
                "train.keep_best=false"
            )

    def write(self, place: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Write what the task keeps, whole or not at all, in the first process, while the others wait.

        Raises CapacityError if the disk is full, DataError if the place cannot be written; what was the best before is then untouched.
        """
        if self._workers.is_first:
            with atomic_folder(place, replacing=".*") as temporary:
                self._task.save(temporary, model, tensors)
                seal(temporary)
        self._workers.wait()

    def put_back(self, model: nn.Module) -> None:
        """Give ``model`` the best weights. Raises CheckpointError where they are damaged."""
        assert self.folder is not None, "it is kept"
        verify(self.folder)
        with torch.no_grad():
            self._task.load(self.folder, model)

    def tidy(self) -> None:
        """Remove weights that are the best no more, and that no checkpoint tells of either: whichever is resumed finds its own."""
        if not self._workers.is_first:
            return
        told = {self.step, *map(_told_by, checkpoints(self._out))} if self._train.keep_best else set()
        for folder in run_bests(self._out):
            if best_of(folder.name) not in told:
                remove_folder(folder)


def _number(value: Any) -> float:
    """Of a headline, which a stored record may have as null."""
    return float(value) if isinstance(value, int | float) else math.nan


def _told_by(checkpoint: Path) -> int | None:
    """The step that a checkpoint tells of as the best; None where it does not, or is damaged, which is told when it is read."""
    try:
        return read_json(checkpoint / TRAINER_FILE)["best"]["evaluation"]["step"]
    except (CheckpointError, KeyError, TypeError):
        return None
