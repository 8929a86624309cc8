"""`Trainer`: the loop that trains a task, and saves, measures, resumes it.

    result = Trainer(RunConfig(...), "runs/a").fit()
    Trainer(read_run_config("runs/a"), "runs/a", resume=True).fit()     # goes on, to the bit, where it was stopped

A step is made by `anabranch.train.step`, what is told of it by `anabranch.train.measuring`, files are kept by
`anabranch.train.checkpoint_manager` and `anabranch.train.run_folder`, and a `Task` says what is trained on what. A design takes part by
step hooks on any of its modules, see `anabranch.train.hooks`. No design edits this file.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from anabranch.cluster.elastic import UnrecoverableError
from anabranch.errors import AnabranchError, ConfigError, NotFiniteError, PeerError
from anabranch.nn.kernels.memory import keep_freed_memory
from anabranch.routing import discard_loads, sync_loads
from anabranch.train.best import check_best
from anabranch.train.checkpoint_manager import CheckpointManager, Progress
from anabranch.train.config import RunConfig, TaskRunConfig
from anabranch.train.elastic import Elastic
from anabranch.train.hooks import StepHooks
from anabranch.train.interrupt import Interrupts, has_lost_process
from anabranch.train.measuring import Measuring
from anabranch.train.meter import MEASURES
from anabranch.train.mezo import MeZOStepper
from anabranch.train.optimizer import check_whole, make_optimizer
from anabranch.train.outer import Outer, own_order
from anabranch.train.parallel import Workers
from anabranch.train.result import Event, TrainResult, peak_memory
from anabranch.train.run import check_free, check_new, find_checkpoint
from anabranch.train.run_folder import RunFolder
from anabranch.train.setup import learning_model, random_state_kept, task_context
from anabranch.train.step import Gradient, Stepper
from anabranch.train.task import Task

log = logging.getLogger(__name__)

# What is trained: a language model's run, written short, or any other task's.
R = TypeVar("R", bound=RunConfig | TaskRunConfig)


class Trainer(Generic[R]):
    """Trains one model.

    Args:
        config: the run.
        out: its folder.
        resume: go on from the newest checkpoint in ``out``.
        on_event: called as training goes on, in the first process only.
        given: what the task takes beside its config. Of a language model that is ``model``, a `Decoder` whose weights training starts
            from and whose config must be ``config.model``, and ``tokenizer``, that of ``model``, in the place of the configured one.

    Raises DataError if ``out`` holds a run (without ``resume``) or none (with it), or another process trains in it, ConfigError if a
    resumed config changes the training or parts do not fit, CheckpointError if the checkpoint is damaged.
    """

    def __init__(
        self,
        config: R,
        out: str | Path,
        *,
        resume: bool = False,
        on_event: Callable[[Event], None] | None = None,
        **given: Any,
    ) -> None:
        self.config = config
        self.out = Path(out)
        self._settings = config.train
        self._on_event = on_event
        Elastic.check(config)
        check_whole(config)
        is_shared = config.parallel.elastic.coordinator is not None
        if not is_shared and (not dist.is_initialized() or dist.get_rank() == 0):
            # Where there is a group already the first process may be in the folder before the others have looked.
            check_free(self.out)
        if not resume:
            check_new(self.out)
        found = find_checkpoint(self.out, config) if resume else None
        self.workers = Workers(config.train, config.parallel)
        self._context = task_context(config, self.workers)
        self.task: Task = config.task.build(**given)
        if config.parallel.context > 1 and not self.task.cuts_sequences:
            raise ConfigError(
                f"parallel.context is {config.parallel.context}, and {type(self.task).__name__} does not learn from cut sequences; "
                "set it to 1"
            )
        part, parts = self.workers.part_of_evaluation
        self._held_out = self.task.validation_data(replace(self._context, rank=part, world_size=parts))
        check_best(config.train, config.parallel, self.task, self._held_out)
        self.stream = self.task.training_data(own_order(self._context, config.parallel.diloco))
        # Whatever module the task makes.
        self.model: Any = learning_model(self.task, self._context, found)
        self._elastic: Elastic | None = None
        if is_shared:
            # It takes the groups from an optimizer, which it makes of slices.
            self.optimizer = make_optimizer(self.model, config.train, self.task.speed)
            self._elastic = Elastic.of(config, self.model, self.optimizer, self.task, self.stream)
            self.workers.elastic = self._elastic
        is_mezo = config.train.optimizer == "mezo"
        wrapped = self.workers.wrap(self.model, self.task.sharded_parts(self.model), has_gradients=not is_mezo)
        self._measuring = Measuring(self.task, self.model, self.workers, config.train)
        if not is_shared:
            self.optimizer = make_optimizer(self.model, config.train, self.task.speed)
        self._hooks = StepHooks(self.model, config.train.steps, [self.task])
        if self._elastic is not None:
            self._elastic.at_step = self._hooks.run_after
        made = MeZOStepper if is_mezo else Stepper
        self._stepper = made(self.task, self.model, wrapped, self.optimizer, self.workers, self._hooks, self._context)
        self._checkpoints = CheckpointManager(
            self.out, config, self.task, self.model, self.optimizer, self.workers, found
        )
        self._outer: Outer | Elastic | None = self._elastic or Outer.of(config, self.model, self.workers)
        self._folder = RunFolder(self.out, config, self.workers, self._checkpoints, resumes=resume)
        if found is not None:
            self._checkpoints.restore(found, self.stream)
        self._progress, self._best = self._checkpoints.progress, self._checkpoints.best
        # What there is between two steps can be saved; what there is in the midst of an update cannot.
        self._is_between_steps = True
        self._stream_state = self.stream.state_dict()

    @property
    def data(self) -> Any:
        """The task's data, where it has an attribute of this name: the tokenised text of a language model."""
        return self.task.data  # type: ignore[attr-defined]

    def fit(self) -> TrainResult:
        """Train to the end, or until SIGINT, SIGTERM or SIGHUP, which save a checkpoint first. A trainer fits once.

        An error from outside the training (data, disk, display, memory) is raised after a checkpoint of the last finished step is saved.
        Raises PeerError where another process of the run is gone.
        """
        try:
            with self._told_if_it_fails():
                return self._fit()
        except RuntimeError as error:
            if self.workers.size > 1 and has_lost_process(error):
                raise PeerError(
                    "another process of this run has ended, and this one has lost its connection to it; the error of that one, or whoever "
                    "killed it, says why; --resume goes on from the last checkpoint"
                ) from error
            raise
        finally:
            self.close()

    def _fit(self) -> TrainResult:
        # The random state is set in every step.
        with Interrupts() as interrupts, random_state_kept(self.workers.device), self._folder.held:
            keep_freed_memory()
            if self._elastic is None:
                self._folder.hold()
                self._folder.start()
                self._best.tidy()
                self._emit("start")
            self._hooks.run_after(self._progress.step)
            with self._saved_if_it_fails():
                self._train(interrupts)
                done = self._is_done()
                if done and self._outer is not None:
                    self._outer.finish()
                if done and not self._progress.is_evaluated:
                    self._evaluate()
                    # A checkpoint of this step, if there is one, lacks the evaluation.
                    self._checkpoints.newest = None
            self._save()
            if done and self._elastic is not None:
                self._checkpoints.newest = self._elastic.conclude(self._saved_for_all) or self._checkpoints.newest
            if self._checkpoints.is_sound():
                self._checkpoints.prune()
            if done and (step := self._checkpoints.put_best_back()) is not None:
                # As where a run goes on from a checkpoint: what follows from the step alone is that of this one.
                discard_loads(self.model)
                self._hooks.run_after(step)
        result = self._result("finished" if done else "interrupted", interrupts.received)
        self._emit("stop", {"status": result.status})
        return result

    def close(self) -> None:
        """Close files, remove hooks, leave the process group. `fit` does it."""
        self._measuring.close()
        self._folder.close()
        # DDP would keep the process group alive.
        self._stepper.call = self._stepper.wrapped = self.model
        if self._outer is not None:
            self._outer.close()
        self.workers.close()

    def _saved_for_all(self) -> Path:
        """The last checkpoint, written by this process if the one before it did not come to it."""
        if self._folder.wait_for_turn():
            self._emit("start")
        self._save()
        assert self._checkpoints.newest is not None
        return self._checkpoints.newest

    # Training

    @contextmanager
    def _told_if_it_fails(self) -> Iterator[None]:
        """Processes that share the run are told by what this one ends."""
        try:
            yield
        except BaseException as error:
            if self._elastic is not None:
                self._elastic.fail(error)
            raise

    @contextmanager
    def _saved_if_it_fails(self) -> Iterator[None]:
        """Save what was learned up to the last finished step if training fails for a reason that lies outside it.

        Data, disk, display or memory can fail at any moment; none of that is in weights and moments. A failure in the midst of an
        update, a gradient that stays infinite, or a NaN in the midst of the model, is, and then the last checkpoint stays the newest. With
        several processes the others wait in an exchange for the one that failed, so nothing can be saved.
        """
        try:
            yield
        except NotFiniteError as error:
            if self.workers.size > 1:
                raise
            raise self._diverged(str(error)) from error
        except Exception as error:
            if self._is_between_steps and self.workers.is_alone and self._progress.step > 0:
                self._save_after(error)
            raise

    def _save_after(self, error: Exception) -> None:
        step = self._progress.step
        # The loads are of a step that was begun and not finished.
        discard_loads(self.model)
        self.stream.load_state_dict(self._stream_state)
        try:
            self._save()
        except Exception as another:
            # Where saving is what failed, it is told once.
            if str(another) != str(error):
                log.warning("step %d could not be saved after an error: %s", step, another)
        else:
            log.warning(
                "step %d is saved, after an error (%s); --resume goes on from there", step, type(error).__name__
            )

    def _train(self, interrupts: Interrupts) -> None:
        settings, progress = self._settings, self._progress
        if self._outer is not None:
            self._outer.is_stopped = lambda: interrupts.received is not None
        began, logged = progress.step, _Logged(progress.step, progress.seconds)
        while not self._is_done() and not self.workers.any(interrupts.received is not None):
            start = time.perf_counter()
            if self._outer is not None and (step := self._outer.before(progress.step)) != progress.step:
                if step is None:
                    break
                self._go_on_from(step)
                logged.step = began = step
                continue
            if self._folder.take_over(must=progress.step == began):
                self._emit("start")
            is_logged = (progress.step + 1) % settings.log_every == 0
            if is_logged:
                self._measuring.begin()
            try:
                gradient = self._step()
            except (PeerError, UnrecoverableError):
                if self._elastic is None or interrupts.received is None:
                    raise
                # The others were told to stop too, and have gone first.
                break
            progress.step += 1
            self._count_skipped(gradient)
            self._end_step(gradient, start, logged, is_logged=is_logged)
            # The last evaluation comes before the last checkpoint, so that it is in it and is not repeated by a resumed run.
            if _is_due(progress.step, settings.eval_every) or progress.step == settings.steps:
                self._evaluate()
            # After a skipped step the weights are those of before, and perhaps diverged: nothing new that is worth a place.
            if _is_due(progress.step, settings.checkpoint_every) and not progress.skipped_in_a_row:
                self._save()

    def _end_step(self, gradient: Gradient, start: float, logged: "_Logged", *, is_logged: bool) -> None:
        """All that belongs to a step whose update is done, and what is told of it; ``start`` is when it began."""
        progress, device = self._progress, self.workers.device
        record = self._record(gradient) if is_logged else {}
        failure: Exception | None = None
        is_last, is_over = progress.step == self._settings.steps, True
        try:
            if self._outer is not None:
                is_over = self._outer.after(is_last=is_last) is not False
        except Exception as error:
            # The step is whole all the same, with the weights that were trained here.
            failure = error
        if isinstance(self._outer, Outer) and is_last and (failure is not None or not is_over):
            # The run is not at its end without the others' mean: it is saved as one step less, and meets them again.
            progress.step -= 1
        if gradient.is_finite:
            self._checkpoints.prune()
        sync_loads(self.model)
        self._hooks.run_after(progress.step)
        self._is_between_steps, self._stream_state = True, self.stream.state_dict()
        if device.type == "cuda" and is_logged:
            torch.cuda.synchronize(device)
        progress.seconds += time.perf_counter() - start
        rate = {f"{self.task.unit}_per_second": logged.steps_per_second(progress) * self._step_units}
        if is_logged:
            self._folder.write({**record, "seconds": progress.seconds, **rate})
            logged.step, logged.seconds = progress.step, progress.seconds
        if failure is not None:
            raise failure
        self._emit("step", self._values(gradient) | rate)

    def _is_done(self) -> bool:
        """Whether all steps are made, or no evaluation was better for too long. The same in all processes."""
        return self._progress.step >= self._settings.steps or self._best.is_over

    def _go_on_from(self, step: int) -> None:
        """Those that this run learns with are at ``step``, and it goes on from their weights, also from an earlier step than its own."""
        is_back = step < self._progress.step
        self._checkpoints.go_on_from(step, holds_folder=self._folder.is_written)
        self._hooks.run_after(step)
        if is_back and self._folder.is_written:
            log.warning(
                "the others are at step %d, and this run goes on from there; what it had done since is given up", step
            )
            self._folder.cut(step)
            if step:
                self._save()

    @property
    def _step_units(self) -> int:
        return self._settings.batch_size * self.task.units_per_item(self._context)

    def _step(self) -> Gradient:
        """One optimizer step."""
        step = self._progress.step
        gradient = self._stepper.gradient(self.stream, replace(self._context, step=step))
        # It stays so until all that belongs to the step is done.
        self._is_between_steps = False
        self._stepper.update(gradient, step)
        return gradient

    def _count_skipped(self, gradient: Gradient) -> None:
        progress = self._progress
        progress.skipped += not gradient.is_finite
        progress.skipped_in_a_row = 0 if gradient.is_finite else progress.skipped_in_a_row + 1
        if not gradient.is_finite and (layers := self._measuring.layers_with_nan()):
            raise self._diverged(f"routers have NaN scores, that of layer {layers[0]} first")
        if progress.skipped_in_a_row >= self._settings.max_skipped:
            times = f"{progress.skipped_in_a_row} times in a row (loss {float(gradient.total)})"
            raise self._diverged(f"the gradient was not finite {times}")

    def _diverged(self, why: str) -> AnabranchError:
        return AnabranchError(f"training stopped at step {self._progress.step}: {why}; {self._checkpoints.way_back()}")

    # Measuring and saving

    def _values(self, gradient: Gradient) -> dict[str, Any]:
        return {
            "loss": float(gradient.total),
            "gradient_norm": gradient.norm,
            "learning_rate": self._stepper.learning_rate(self._progress.step - 1),
        }

    def _record(self, gradient: Gradient) -> dict[str, Any]:
        progress = self._progress
        rate, units = self._stepper.learning_rate(progress.step - 1), progress.step * self._step_units
        return self._measuring.of_step(gradient, progress, learning_rate=rate, units=units)

    def _evaluate(self) -> None:
        if self._held_out is None or (self._elastic is not None and not self._elastic.has_weights):
            return
        context = replace(self._context, step=self._progress.step)
        self._progress.evaluation = self._checkpoints.see(self._measuring.of_held_out(self._held_out, context))
        self._folder.write(self._progress.evaluation)
        self._emit("evaluation", self._progress.evaluation)

    def _save(self) -> None:
        path = self._checkpoints.save(self.stream)
        if path is not None and self._elastic is not None:
            self._elastic.wrote(path)
        if path is not None:
            self._emit("checkpoint", {"path": str(path)})

    def _emit(self, kind: str, values: dict[str, Any] | None = None) -> None:
        if self._on_event is not None and self.workers.is_first:
            self._on_event(Event(kind, self._progress.step, self._settings.steps, values or {}))

    def _result(self, status: str, signal: str | None) -> TrainResult:
        progress, best, done = self._progress, self._best, status == "finished"
        has_best = done and best.folder is not None
        record = (best.evaluation if has_best else progress.evaluation) or {}
        headline = record.get(self.task.headline)
        return TrainResult(
            status=status,
            signal=signal if status == "interrupted" else None,
            step=progress.step,
            measures=record,
            headline=math.nan if headline is None else headline,
            units=progress.step * self._step_units,
            seconds=progress.seconds,
            skipped_steps=progress.skipped,
            peak_memory_bytes=peak_memory(self.workers.device),
            checkpoint=self._checkpoints.newest,
            routing={name: record[name] for name in MEASURES if name in record},
            stopped_early=done and best.is_over and progress.step < self._settings.steps,
            best_step=best.step,
            best=best.folder if has_best else None,
        )


@dataclass
class _Logged:
    """How far a run was when a step was last logged."""

    step: int
    seconds: float

    def steps_per_second(self, progress: Progress) -> float:
        """Since then."""
        return (progress.step - self.step) / max(progress.seconds - self.seconds, 1e-9)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
