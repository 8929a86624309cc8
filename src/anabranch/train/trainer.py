"""`Trainer`: the loop that trains a language model, and saves, measures, resumes it.

    result = Trainer(RunConfig(...), "runs/a").fit()
    Trainer(read_run_config("runs/a"), "runs/a", resume=True).fit()     # goes on, to the bit, where it was stopped

A step: forward and backward over its micro-batches, clipping, AdamW, then the step hooks. A design takes part by a method
``on_step(step, fraction)`` on any of its modules, called before the first step, after every step and when a run is resumed, with the
number of finished steps and their fraction of the whole; what it changes is what the next step sees. Everything a hook needs to
go on must be in buffers or follow from its arguments. No design edits this file.
"""
# Shapes: B sequences, L positions

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from anabranch.config import to_dict
from anabranch.data import Tokenizer
from anabranch.errors import AnabranchError, ConfigError, DataError
from anabranch.lm.checkpoint import load_weights
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import state_once
from anabranch.nn.kernels.memory import keep_freed_memory
from anabranch.routing import discard_loads, sync_loads
from anabranch.train.checkpoint import checkpoint_path, checkpoints, prune, read_checkpoint, set_aside, write_checkpoint
from anabranch.train.config import RunConfig
from anabranch.train.evaluate import Evaluation, autocast, evaluate
from anabranch.train.interrupt import Interrupts
from anabranch.train.meter import MEASURES, LoadMeter
from anabranch.train.metrics import MetricsLog
from anabranch.train.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors, whole
from anabranch.train.parallel import Workers
from anabranch.train.result import Event, TrainResult
from anabranch.train.run import check_free, check_new, find_checkpoint, prepare, run_lock

log = logging.getLogger(__name__)


@dataclass
class _Progress:
    """What is stored beside weights and moments."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Step:
    """What one step gave.

    Attributes:
        losses: ``loss``, ``cross_entropy`` and every auxiliary loss, means of this process.
        metrics: what layers emitted to be logged, likewise.
        gradient_norm: of the whole gradient, before clipping.
        is_applied: whether weights moved.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    gradient_norm: float
    is_applied: bool


class Trainer:
    """Trains one model.

    Args:
        config: the run.
        out: its folder.
        resume: go on from the newest checkpoint in ``out``.
        on_event: called as training goes on, in the first process only.
        model: start from these weights instead of fresh ones; its config must be ``config.model``.
        tokenizer: that of ``model``; takes the place of the configured one.

    Raises DataError if ``out`` holds a run (without ``resume``) or none (with it), or another process trains in it, ConfigError if a
    resumed config changes the training or parts do not fit, CheckpointError if the checkpoint is damaged.
    """

    def __init__(
        self,
        config: RunConfig,
        out: str | Path,
        *,
        resume: bool = False,
        on_event: Callable[[Event], None] | None = None,
        model: Decoder | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config, self.out = config, Path(out)
        self._settings = config.train
        self._on_event = on_event
        check_free(self.out)
        if not resume:
            check_new(self.out)
        self._resumes = resume
        found = find_checkpoint(self.out, config) if resume else None
        self.workers = Workers(config.train)
        self._micro_size = _micro_size(config, self.workers.size)
        self.data = config.data.build(tokenizer)
        _check_vocabulary(config, self.data.tokenizer)
        self._windows = self._validation_windows()
        self.stream = self.data.train(seed=config.train.seed, rank=self.workers.rank, world_size=self.workers.size)
        self.model = self._model(model, found)
        self._wrapped = self.workers.wrap(self.model)
        self._meter = LoadMeter(self.model)
        self._call = torch.compile(self._wrapped, dynamic=False) if config.train.compile else self._wrapped
        self.optimizer = make_optimizer(self.model, config.train)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._schedule = config.train.schedule.build()
        self._hooks: list[Callable[[int, float], None]] = [
            module.on_step  # type: ignore[misc]
            for module in self.model.modules()
            if callable(getattr(module, "on_step", None))
        ]
        self._progress = _Progress()
        self._checkpoint = found
        # Whether older checkpoints wait for the newest to prove good, before they are removed.
        self._is_prunable = found is not None
        self._log: MetricsLog | None = None
        if found is not None:
            self._restore(found)
        # What there is between two steps can be saved; what there is in the midst of an update cannot.
        self._is_whole = True
        self._stream_state = self.stream.state_dict()

    def fit(self) -> TrainResult:
        """Train to the end, or until SIGINT, SIGTERM or SIGHUP, which save a checkpoint first. A trainer fits once.

        An error from outside the training (data, disk, display, memory) is raised after a checkpoint of the last finished step is saved.
        """
        try:
            return self._fit()
        finally:
            self.close()

    def _fit(self) -> TrainResult:
        devices = [self.workers.device.index] if self.workers.device.type == "cuda" else []
        # The random state is set in every step; the caller's stays as it was.
        with Interrupts() as interrupts, torch.random.fork_rng(devices), self._folder_held():
            keep_freed_memory()
            self._start_folder()
            self._emit("start")
            self._run_hooks()
            with self._saved_if_it_fails():
                self._train(interrupts)
                done = self._progress.step >= self._settings.steps
                if done and not self._is_evaluated():
                    self._evaluate()
                    self._checkpoint = None  # one of this step, if there is one, lacks the evaluation
            self._save()
            if self._is_sound():
                self._prune()
        result = self._result("finished" if done else "interrupted", interrupts.received)
        self._emit("stop", {"status": result.status})
        return result

    def close(self) -> None:
        """Close files, remove hooks, leave the process group. `fit` does it."""
        self._meter.close()
        if self._log is not None:
            self._log.close()
        self._call = self._wrapped = self.model  # DDP holds the process group
        self.workers.close()

    # Setting up

    def _validation_windows(self) -> Any:
        if self.config.data.validation_fraction == 0:
            return None
        tokens, length = self._settings.eval_tokens, self.config.data.sequence_length
        return self.data.validation(
            batch_size=self._micro_size,
            num_windows=None if tokens is None else max(1, tokens // length),
            rank=self.workers.rank,
            world_size=self.workers.size,
        )

    def _model(self, given: Decoder | None, checkpoint: Path | None) -> Decoder:
        if given is not None and given.config != self.config.model:
            raise ConfigError(
                "the given model has another config than config.model; pass config.replace(model=model.config)"
            )
        model: Decoder = given or self.config.model.build(seed=self._settings.seed)
        if checkpoint is not None:
            load_weights(model, checkpoint)
        model.recompute = self._settings.recompute
        return model.to(self.workers.device).train()

    def _restore(self, path: Path) -> None:
        state, tensors = read_checkpoint(path)
        load_optimizer_tensors(self.model, self.optimizer, tensors)
        self.stream.load_state_dict(state["stream"])
        # The stream has told of other training text; checkpoints of before the whole was stored say no more.
        if state.get("data", self.data.fingerprint()) != self.data.fingerprint():
            raise DataError(
                f"cannot resume the data: the held-out text (or what its parts are called) is not that of before, so evaluations of {path} "
                "and later ones could not be compared; bring the text back, or start a new run"
            )
        self._progress = _Progress(**state["progress"])

    @contextmanager
    def _folder_held(self) -> Iterator[None]:
        """Nobody else trains in the folder meanwhile, nor has since this trainer looked at it."""
        if not self.workers.is_first:
            yield
            return
        with run_lock(self.out):
            if not self._resumes:
                check_new(self.out)
            elif checkpoints(self.out)[-1:] != ([self._checkpoint] if self._checkpoint else []):
                raise DataError(f"another process has trained in {self.out} since this one began; resume it again")
            yield

    def _start_folder(self) -> None:
        self.workers.wait()  # all have looked at the folder
        if self.workers.is_first:
            prepare(self.out, self.config)
            self._log = MetricsLog(self.out, step=self._progress.step, tensorboard=self._settings.tensorboard)

    # Training

    @contextmanager
    def _saved_if_it_fails(self) -> Iterator[None]:
        """Save what was learned up to the last finished step if training fails for a reason that lies outside it.

        Data, disk, display or memory can fail at any moment; none of that is in weights and moments. A failure in the midst of an
        update, or a gradient that stays infinite, is, and then the last checkpoint stays the newest. With several processes the others
        wait in an exchange for the one that failed, so nothing can be saved.
        """
        try:
            yield
        except Exception as error:
            if self._is_whole and self.workers.size == 1 and self._progress.step > 0:
                self._save_after(error)
            raise

    def _save_after(self, error: Exception) -> None:
        step = self._progress.step
        discard_loads(self.model)  # of a step that was begun
        self.stream.load_state_dict(self._stream_state)
        try:
            self._save()
        except Exception as another:
            if str(another) != str(error):  # saving is what failed: it is told once
                log.warning("step %d could not be saved after an error: %s", step, another)
        else:
            log.warning(
                "step %d is saved, after an error (%s); --resume goes on from there", step, type(error).__name__
            )

    def _train(self, interrupts: Interrupts) -> None:
        settings, progress = self._settings, self._progress
        device = self.workers.device
        logged_step, logged_seconds = progress.step, progress.seconds
        while progress.step < settings.steps and not self.workers.any(interrupts.received is not None):
            start = time.perf_counter()
            is_logged = (progress.step + 1) % settings.log_every == 0
            if is_logged:
                self._meter.reset()
            step = self._step()
            progress.step += 1
            self._count_skipped(step)
            if step.is_applied:
                self._prune()
            record = self._record(step) if is_logged else {}
            sync_loads(self.model)
            self._run_hooks()
            self._is_whole, self._stream_state = True, self.stream.state_dict()
            if device.type == "cuda" and is_logged:
                torch.cuda.synchronize(device)
            progress.seconds += time.perf_counter() - start
            rate = (progress.step - logged_step) * self._step_tokens / max(progress.seconds - logged_seconds, 1e-9)
            if is_logged:
                self._write({**record, "seconds": progress.seconds, "tokens_per_second": rate})
                logged_step, logged_seconds = progress.step, progress.seconds
            self._emit("step", self._values(step) | {"tokens_per_second": rate})
            # The last evaluation comes before the last checkpoint, so that it is in it and is not repeated by a resumed run.
            if _is_due(progress.step, settings.eval_every) or progress.step == settings.steps:
                self._evaluate()
            # After a skipped step the weights are those of before, and perhaps diverged: nothing new that is worth a place.
            if _is_due(progress.step, settings.checkpoint_every) and not progress.skipped_in_a_row:
                self._save()

    @property
    def _step_tokens(self) -> int:
        return self._settings.batch_size * self.config.data.sequence_length

    def _step(self) -> _Step:
        """One optimizer step. Every micro-batch has equally many targets, so the mean of their means is the mean of all."""
        settings = self._settings
        self._seed_step()
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for number in range(settings.accumulation):
            batch = self.stream.next_batch(self._micro_size).to(self.workers.device, non_blocking=True)
            with self.workers.micro_batch(self._wrapped, is_last=number == settings.accumulation - 1):
                with autocast(self.workers.device, settings.precision):
                    output = self._call(batch.token_BL, batch.target_BL)
                (output.loss / settings.accumulation).backward()
            own = {"loss": output.loss.detach(), "cross_entropy": output.cross_entropy, **output.auxiliary}
            _add_share(losses, own, settings.accumulation)
            _add_share(metrics, output.metrics, settings.accumulation)
        norm = self._gradient_norm()
        is_applied = math.isfinite(norm)
        self._is_whole = False  # until all that belongs to the step is done
        if is_applied:
            self._update(norm)
        else:
            discard_loads(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        return _Step(losses, metrics, norm, is_applied)

    def _seed_step(self) -> None:
        """What is random in a step (jitter, masks per token) is a function of (seed, step, rank): resuming needs no state."""
        sequence = np.random.SeedSequence([self._settings.seed, self._progress.step, self.workers.rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def _gradient_norm(self) -> float:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        return float(whole(torch.nn.utils.get_total_norm(gradients)))

    def _update(self, norm: float) -> None:
        settings = self._settings
        if settings.clip is not None and norm > settings.clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, settings.clip, torch.tensor(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self._progress.step)
        self.optimizer.step()

    def _learning_rate(self, step: int) -> float:
        """Of the update after ``step`` finished ones."""
        return self._settings.learning_rate * self._schedule.factor(step, self._settings.steps)

    def _run_hooks(self) -> None:
        step = self._progress.step
        for hook in self._hooks:
            hook(step, step / max(self._settings.steps, 1))

    def _count_skipped(self, step: _Step) -> None:
        progress = self._progress
        progress.skipped += not step.is_applied
        progress.skipped_in_a_row = 0 if step.is_applied else progress.skipped_in_a_row + 1
        if progress.skipped_in_a_row >= self._settings.max_skipped:
            raise AnabranchError(
                f"training stopped at step {progress.step}: the gradient was not finite {progress.skipped_in_a_row} times in a "
                f"row (loss {float(step.losses['loss'])}); {self._way_back()}"
            )

    def _way_back(self) -> str:
        """What to do after weights have diverged. Checkpoints that hold them are set aside, so that resuming goes on from a good one."""
        diverged = self._progress.step - self._progress.skipped_in_a_row
        if self.workers.is_first:
            set_aside(self.out, diverged)
        self.workers.wait()
        good = checkpoints(self.out)
        if not good:
            return "start again with a lower train.learning_rate"
        return f"resume with a lower train.learning_rate, which goes on from {good[-1].name}, the last whose weights were good"

    # Measuring and saving

    def _values(self, step: _Step) -> dict[str, Any]:
        return {
            "loss": float(step.losses["loss"]),
            "gradient_norm": step.gradient_norm,
            "learning_rate": self._learning_rate(self._progress.step - 1),
        }

    def _record(self, step: _Step) -> dict[str, Any]:
        """The line of a step, apart from times. Losses are means over processes."""
        losses, metrics = self._over_processes(step.losses), self._over_processes(step.metrics)
        return {
            "step": self._progress.step,
            "kind": "train",
            "loss": losses.pop("loss"),
            "cross_entropy": losses.pop("cross_entropy"),
            "auxiliary": losses,
            **metrics,
            "learning_rate": self._learning_rate(self._progress.step - 1),
            "gradient_norm": step.gradient_norm,
            "skipped_steps": self._progress.skipped,
            "tokens": self._progress.step * self._step_tokens,
            **self._meter.read(training=True),
        }

    def _over_processes(self, values: dict[str, Tensor]) -> dict[str, float]:
        if not values:
            return {}
        means = self.workers.mean(torch.stack([value.float() for value in values.values()])).tolist()
        return dict(zip(values, means, strict=True))

    def _evaluate(self) -> None:
        if self._windows is None:
            return
        self._meter.reset()
        evaluation = evaluate(
            self.model,
            self._windows,
            precision=self._settings.precision,
            equal_passes=self.workers.parallel == "fsdp",
        )
        record = {"step": self._progress.step, "kind": "validation", **evaluation.to_dict()}
        self._progress.evaluation = record | self._meter.read(training=False)
        self._write(self._progress.evaluation)
        self._emit("evaluation", self._progress.evaluation)

    def _is_evaluated(self) -> bool:
        return self._progress.evaluation is not None and self._progress.evaluation["step"] == self._progress.step

    def _save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        path = checkpoint_path(self.out, self._progress.step)
        if path == self._checkpoint:
            return
        keep = self.workers.is_first
        tensors = {name: whole(tensor) for name, tensor in state_once(self.model).items()}
        moments = optimizer_tensors(self.model, self.optimizer, keep=keep)
        if keep:
            state = {
                "step": self._progress.step,
                "progress": vars(self._progress),
                "stream": self.stream.state_dict(),
                "data": self.data.fingerprint(),
                "run": to_dict(self.config),
            }
            write_checkpoint(
                self.out,
                state,
                self.model,
                self.data.tokenizer,
                tensors,
                moments,
            )
        self.workers.wait()
        self._checkpoint, self._is_prunable = path, True
        self._emit("checkpoint", {"path": str(path)})

    def _is_sound(self) -> bool:
        """Whether the weights as they are can be trusted, though no step has been made from them: as far as can be seen."""
        if self._progress.skipped_in_a_row:
            return False
        if self._progress.evaluation is not None and self._is_evaluated():
            return math.isfinite(Evaluation.from_dict(self._progress.evaluation).nats_per_token)
        shards = (
            parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in self._parameters
        )
        return all(bool(torch.isfinite(shard).all()) for shard in shards)

    def _prune(self) -> None:
        """Remove the checkpoints that are too many, once the newest has proved good."""
        if self._is_prunable and self.workers.is_first:
            prune(self.out, self._settings.keep_checkpoints)
        self._is_prunable = False

    def _write(self, record: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(record)

    def _emit(self, kind: str, values: dict[str, Any] | None = None) -> None:
        if self._on_event is not None and self.workers.is_first:
            self._on_event(Event(kind, self._progress.step, self._settings.steps, values or {}))

    def _result(self, status: str, signal: str | None) -> TrainResult:
        progress = self._progress
        record = progress.evaluation
        tokens = progress.step * self._step_tokens
        return TrainResult(
            status=status,
            signal=signal if status == "interrupted" else None,
            step=progress.step,
            evaluation=None if record is None else Evaluation.from_dict(record),
            tokens=tokens,
            seconds=progress.seconds,
            tokens_per_second=tokens / progress.seconds if progress.seconds else 0.0,
            skipped_steps=progress.skipped,
            peak_memory_bytes=_peak_memory(self.workers.device),
            checkpoint=self._checkpoint,
            routing={} if record is None else {name: record[name] for name in MEASURES if name in record},
        )


def _add_share(total: dict[str, Tensor], values: dict[str, Tensor], parts: int) -> None:
    for name, value in values.items():
        total[name] = total.get(name, 0.0) + value / parts


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _micro_size(config: RunConfig, world_size: int) -> int:
    """Sequences of one forward pass of one process."""
    settings = config.train
    size, rest = divmod(settings.batch_size, settings.accumulation * world_size)
    if rest:
        raise ConfigError(
            f"train.batch_size is {settings.batch_size}, which {world_size} processes with accumulation={settings.accumulation} "
            f"cannot share evenly; use a multiple of {settings.accumulation * world_size}"
        )
    return size


def _check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens; "
            f"set model.vocab_size={tokenizer.vocab_size}"
        )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
