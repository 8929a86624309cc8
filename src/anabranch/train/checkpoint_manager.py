"""`CheckpointManager`: what of a run is kept on disk as it goes on, and which checkpoints can be trusted."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from anabranch.config import to_dict
from anabranch.errors import CheckpointError, DataError
from anabranch.lm.folder import TRAINER_FILE, step_of
from anabranch.lm.tensors import state_once
from anabranch.train.best import Best
from anabranch.train.checkpoint import (
    GIVEN_UP,
    checkpoint_path,
    checkpoints,
    prune,
    read_checkpoint,
    set_aside,
    write_checkpoint,
)
from anabranch.train.config import RunConfig, TaskRunConfig
from anabranch.train.optimizer import full_tensor, load_optimizer_tensors, optimizer_tensors
from anabranch.train.parallel import Workers
from anabranch.train.task import Stream, Task

__all__ = ["CheckpointManager", "Progress"]

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What is stored beside weights and moments: finished steps, seconds they took, those that were skipped, and the last evaluation."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluation: dict[str, Any] | None = None

    @property
    def is_evaluated(self) -> bool:
        """Whether the last evaluation is of this step."""
        return self.evaluation is not None and self.evaluation["step"] == self.step


class CheckpointManager:
    """Saves and restores a run, and removes checkpoints once newer ones have proved good.

    Args:
        out: the run's folder.
        config: of the run.
        task: what it is about.
        model: that learns.
        optimizer: of its parameters.
        workers: the first of them writes.
        newest: the checkpoint that the run goes on from, None for none.

    Attributes:
        newest: the last checkpoint that was written or read, None where there is none of use.
        progress: what is saved of how far the run is.
        best: how its evaluations have gone, see `anabranch.train.best`.
    """

    def __init__(
        self,
        out: Path,
        config: RunConfig | TaskRunConfig,
        task: Task,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        workers: Workers,
        newest: Path | None,
    ) -> None:
        self.out, self.config, self.task, self.workers, self.newest = out, config, task, workers, newest
        self.model, self.optimizer = model, optimizer
        self.progress = Progress()
        self.best = Best(out, config.train, task, workers)
        # Whether older checkpoints wait for the newest to prove good, before they are removed.
        self._is_prunable = newest is not None

    def restore(self, path: Path, stream: Stream) -> None:
        """Take moments, place in the data and progress from the checkpoint ``path``; weights were loaded when the model was made.

        Raises CheckpointError if it is damaged or does not fit, DataError if it is of other data.
        """
        state, tensors = read_checkpoint(path, has_moments=self.config.train.optimizer != "mezo")
        load_optimizer_tensors(self.model, self.optimizer, tensors)
        for load, name in ((stream.load_state_dict, "stream"), (self.task.load_state_dict, "task")):
            try:
                load(state.get(name, {}))
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{name} in {path / TRAINER_FILE} is not what a trainer stores ({error}); "
                    f"remove {path} to go on from the checkpoint before"
                ) from None
        self._check_data(state, path)
        self.progress = Progress(**state["progress"])
        # That of other weights says nothing about these.
        self.best.load_state_dict(state.get("best"), self.progress.evaluation if self.progress.is_evaluated else None)

    def go_on_from(self, step: int, *, holds_folder: bool) -> None:
        """Count from ``step``, which is that of others. Where it is an earlier one, what there is of it and of later ones is given up.

        Args:
            step: finished steps.
            holds_folder: whether this process writes.
        """
        progress, is_back = self.progress, step < self.progress.step
        progress.step, progress.skipped_in_a_row = step, 0
        if not is_back:
            return
        progress.skipped = min(progress.skipped, step)
        if progress.evaluation is not None and progress.evaluation["step"] >= step:
            progress.evaluation = None
        self.newest = None
        if holds_folder:
            self.give_up(step)

    def give_up(self, step: int) -> None:
        """Set aside the checkpoints of ``step`` and later, so that none of them is ever taken for this run's newest."""
        if any((step_of(path.name) or 0) >= step for path in checkpoints(self.out)):
            moved = set_aside(self.out, step, GIVEN_UP)
            log.warning("given up, and set aside in %s: %s", moved[0].parent, ", ".join(path.name for path in moved))

    def _check_data(self, state: dict[str, Any], path: Path) -> None:
        """The stream has told of other training data; checkpoints of before the whole was stored say no more."""
        fingerprint, material = self.task.fingerprint(), self.task.material
        if fingerprint is None or "data" not in state:
            return
        if state["data"] not in (fingerprint, *self.task.earlier_fingerprints()):
            raise DataError(
                f"cannot resume the data: the held-out {material} (or what is said of its parts) is not that of before, so "
                f"evaluations of {path} and later ones could not be compared; bring the {material} back, or start a new run"
            )

    def save(self, stream: Stream) -> Path | None:
        """Write a checkpoint of this step, unless there is one (None)."""
        path = checkpoint_path(self.out, self.progress.step)
        if path == self.newest:
            return None
        keep = self.workers.is_first
        elastic = self.workers.elastic
        if elastic is not None:
            shared = elastic.moments(self.progress.step)
            if shared is None:
                # Another process writes, or nobody can between the steps after which all is gathered.
                return None
            return self._write(path, stream, dict(state_once(self.model)), shared)
        tensors = self._whole_tensors()
        own = optimizer_tensors(self.model, self.optimizer, keep=keep or self.workers.is_staged)
        moments = self.workers.gathered(own)
        return self._write(path, stream, tensors, moments)

    def _whole_tensors(self) -> dict[str, Tensor]:
        """Of the model, in all processes, which call it together."""
        self.workers.make_whole()
        return {name: full_tensor(tensor) for name, tensor in state_once(self.model).items()}

    def see(self, record: dict[str, Any]) -> dict[str, Any]:
        """Take an evaluation of this step into account: its record, with what is told of it besides, see `Best.see`."""
        return self.best.see(record, lambda place: self.best.write(place, self.model, self._whole_tensors()))

    def put_best_back(self) -> int | None:
        """At the end: give the model the best weights, if they are kept and are others than it has, and their step; else None.

        Of a model in shards the best weights stay on disk alone.
        """
        if self.best.folder is None or self.best.step == self.progress.step or self.workers.is_sharded:
            return None
        self.best.put_back(self.model)
        return self.best.step

    def _write(self, path: Path, stream: Stream, tensors: dict[str, Tensor], moments: dict[str, Tensor]) -> Path:
        """Write it in the first process, while the others wait."""
        if self.workers.is_first:
            write_checkpoint(
                self.out, self._state(stream), lambda folder: self.task.save(folder, self.model, tensors), moments
            )
        self.workers.wait()
        self.newest, self._is_prunable = path, True
        return path

    def _state(self, stream: Stream) -> dict[str, Any]:
        fingerprint, own, best = self.task.fingerprint(), self.task.state_dict(), self.best.state_dict()
        return {
            "step": self.progress.step,
            "progress": vars(self.progress),
            "stream": stream.state_dict(),
            **({} if fingerprint is None else {"data": fingerprint}),
            "run": to_dict(self.config),
            **({"task": own} if own else {}),
            **({"best": best} if best else {}),
        }

    def prune(self) -> None:
        """Remove the checkpoints that are too many, once the newest has proved good."""
        if self._is_prunable and self.workers.is_first:
            prune(self.out, self.config.train.keep_checkpoints)
            self.best.tidy()
        self._is_prunable = False

    def is_sound(self) -> bool:
        """Whether the weights as they are can be trusted, though no step has been made from them: as far as can be seen."""
        progress = self.progress
        if progress.skipped_in_a_row:
            return False
        if progress.evaluation is not None and progress.is_evaluated:
            headline = progress.evaluation[self.task.headline]
            return headline is not None and math.isfinite(headline)
        parameters = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        shards = (parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters)
        return not self.workers.any(not all(bool(torch.isfinite(shard).all()) for shard in shards))

    def way_back(self) -> str:
        """What to do after weights have diverged. Checkpoints that hold them are set aside, so that resuming goes on from a good one."""
        diverged = self.progress.step - self.progress.skipped_in_a_row
        if self.workers.is_first:
            set_aside(self.out, diverged)
        self.workers.wait()
        good = checkpoints(self.out)
        if not good:
            return "start again with a lower train.learning_rate"
        return f"resume with a lower train.learning_rate, which goes on from {good[-1].name}, the last whose weights were good"
