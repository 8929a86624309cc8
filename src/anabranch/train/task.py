"""`Task`: what a training is about. The trainer knows steps, checkpoints and processes; a task knows batches, losses and measures.

    class Digits(Task):
        headline = "accuracy"

        def build_model(self, context): ...                    # the module that learns
        def training_data(self, context): ...                  # a stream of batches
        def step(self, model, batch, context): ...             # Losses
        def evaluate(self, model, data, context): ...          # {"accuracy": 0.97}

    Trainer(TaskRunConfig(task=Digits.Config(), train=TrainConfig(steps=200)), "runs/digits").fit()

A language model is one task (`anabranch.train.LanguageModel`, what `RunConfig` trains).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass, to_dict
from anabranch.errors import ConfigError
from anabranch.files import atomic_write_json
from anabranch.lm.shards import write_tensors
from anabranch.lm.tensors import Piece, open_tensors, overwrite, state_once

if TYPE_CHECKING:
    from anabranch.train.config import TrainConfig
    from anabranch.train.optimizer import Speed

__all__ = ["Losses", "Stream", "Task", "TaskContext", "moved"]

# In the config.json of a checkpoint that is no model folder of ours.
FORMAT = "anabranch-task"
# What the trainer itself writes in a line of metrics.
_TAKEN = frozenset({"step", "kind", "loss", "auxiliary", "learning_rate", "gradient_norm", "skipped_steps", "seconds"})


class Stream(Protocol):
    """Training batches without end, from which a resumed run goes on where it was."""

    def next_batch(self, batch_size: int) -> Any:
        """The next ``batch_size`` items of this process: what has ``to(device)``, or tensors in tuples, lists and dicts."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it is: JSON-ready, and the same in all processes."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where ``state`` says. Raises DataError if it is of other data."""
        ...


@dataclass(frozen=True)
class TaskContext:
    """Where and how a task is trained, and how far it is.

    Attributes:
        settings: the run's `TrainConfig`.
        batch_size: items of one forward pass of this process.
        rank, world_size: of ``world_size`` processes this is number ``rank``.
        device: where batches are moved, and the model is.
        step: finished steps.
        checkpoint: what a run goes on from, whose numbers the model is given as soon as it is built (`Task.load`); None at its beginning.
    """

    settings: TrainConfig
    batch_size: int
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    step: int = 0
    checkpoint: Path | None = None

    @property
    def fraction(self) -> float:
        """Finished steps, of all."""
        return self.step / max(self.settings.steps, 1)


@dataclass(frozen=True)
class Losses:
    """The losses of one batch.

    Attributes:
        total: a number, which is differentiated.
        terms: what it is the sum of, by name, to be logged. The first is what the task is about, the others are auxiliary.
        metrics: other numbers to be logged.
        mean_of: what terms and metrics are means of, by their names, where not of items: a unit that `Task.counts` counts. Parts of a
            batch with more of it then weigh more. Such a term must be differentiable by itself, as ``total`` is.

    Raises ConfigError if there is no term, ``total`` is more than one number, a name is one that the trainer logs itself, or ``mean_of``
    has one that is neither a term's nor a metric's.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    mean_of: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.terms:
            raise ConfigError("a step gave no losses; give at least one, as Losses.of(cross_entropy=...)")
        if self.total.numel() != 1:
            raise ConfigError(
                f"a step gave a loss of shape {list(self.total.shape)}; it must be one number, such as a mean"
            )
        taken = sorted(_TAKEN & {next(iter(self.terms)), *self.metrics} | {"loss"} & self.terms.keys())
        if taken:
            raise ConfigError(f"a step gave {taken[0]!r}, which the trainer logs itself; choose another name")
        unknown = sorted(set(self.mean_of) - {*self.terms, *self.metrics})
        if unknown:
            raise ConfigError(f"mean_of has {unknown[0]!r}, which is no term and no metric of the step")

    @classmethod
    def of(
        cls,
        *,
        metrics: Mapping[str, Tensor] | None = None,
        mean_of: Mapping[str, str] | None = None,
        **terms: Tensor,
    ) -> Self:
        """Losses whose total is the sum of ``terms``."""
        first, *others = terms.values() or [torch.zeros(())]
        return cls(sum(others, start=first), terms, metrics or {}, mean_of or {})

    def weighed(self, weights: Mapping[str, float]) -> Losses:
        """The same with each term and metric multiplied by the weight of the unit that it is a mean of; ``self`` where all are 1.

        Raises ConfigError for a unit without a weight.
        """
        for name, unit in self.mean_of.items():
            if unit not in weights:
                raise ConfigError(
                    f"{name} is a mean of {unit!r}, which Task.counts does not count; it counts {sorted(weights)}"
                )
        by_name = {name: weights[unit] for name, unit in self.mean_of.items() if weights[unit] != 1}
        if not by_name:
            return self
        total = self.total
        for name in by_name.keys() & self.terms.keys():
            total = total + (by_name[name] - 1) * self.terms[name]
        terms, metrics = (
            {name: value * by_name.get(name, 1) for name, value in values.items()}
            for values in (self.terms, self.metrics)
        )
        return Losses(total, terms, metrics, self.mean_of)


class Task(Part, family="task"):
    """What a batch is, what its losses are, which parameters learn, how it is measured, and what a checkpoint carries of it.

    Args:
        config: a config of its class, saved with the run.
        model: start from these weights, and this module, instead of a fresh one.

    Attributes:
        model: the one that was given, None without.
        headline: the number in an evaluation by which runs are compared; weights for which it is not finite are not trusted.
        better: whether a ``lower`` or a ``higher`` headline is better, which ``train.patience`` and ``train.keep_best`` need to know;
            None where nobody says. A headline ``loss`` is better if lower.
        holds_out: what to set so that some of the material is held out, in messages.
        unit: what is counted as work, in ``units_per_item`` to an item of a batch.
        material: what it learns from, in messages.
        pace: the learning rate of the next step is multiplied by it. 0 passes the step over: its batch is taken, and nothing is learned
            from it. `before_step` may set it, to the same in all processes.
        cuts_sequences: whether a model may be a `anabranch.cluster.ring.ContextParallel`, in which processes share every sequence.

    A task that must do something before or after each step has methods ``before_step`` and ``on_step``, see `StepHooks`.
    """

    headline: ClassVar[str] = "loss"
    better: ClassVar[Literal["lower", "higher"] | None] = None
    holds_out: ClassVar[str] = "give it in Task.validation_data"
    unit: ClassVar[str] = "items"
    material: ClassVar[str] = "data"
    cuts_sequences: ClassVar[bool] = False
    pace: float = 1.0

    @configclass
    class Config(BaseConfig):
        """Without fields of its own."""

    def __init__(self, config: Task.Config, *, model: nn.Module | None = None) -> None:
        self.config = config
        self.model = model

    # What it learns

    def build_model(self, context: TaskContext) -> nn.Module:
        """The module that learns. Torch's default generator is seeded for it by the run's seed. Default: the one that was given.

        Raises ConfigError if there is none, or it is another than the config says.
        """
        if self.model is None:
            raise ConfigError(f"{type(self).__name__} builds no model; give one: Trainer(run, out, model=...)")
        return self.model

    def learns(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the parameter of this name learns; the others stay as they are. Default: as ``requires_grad`` says."""
        return parameter.requires_grad

    def speed(self, name: str, parameter: nn.Parameter) -> Speed | None:
        """How a parameter learns, where not at the run's learning rate and weight decay. Default: None, as all others."""
        return None

    def sharded_parts(self, model: nn.Module) -> Iterable[nn.Module]:
        """What is gathered on its own where weights are in shards (``parallel="fsdp"``). Default: nothing, the model is one unit."""
        return ()

    # From what

    def training_data(self, context: TaskContext) -> Stream:
        """A new stream of training batches. Which items a process gets follows from seed, rank and world size."""
        raise NotImplementedError  # abstract

    def validation_data(self, context: TaskContext) -> Any:
        """What `evaluate` is given, tensors moved to the device as those of batches; None (the default) to evaluate nothing."""
        return None

    def units_per_item(self, context: TaskContext) -> int:
        """How many units an item of a batch has."""
        return 1

    def fingerprint(self) -> str | None:
        """Names the data by content, that of the evaluation too: a run is not resumed with other data. None: not known."""
        return None

    def earlier_fingerprints(self) -> tuple[str, ...]:
        """What earlier versions called the same data, which may tell less of it apart: their checkpoints are resumed, held to that."""
        return ()

    # How

    def step(self, model: nn.Module, batch: Any, context: TaskContext) -> Losses:
        """The losses of a batch, which is on the model's device.

        Call ``model`` itself, once: it stands for replicas, shards or compiled code. Losses are means over items, so that those of
        equal parts of a batch average to that of the whole, or over what `counts` counts. What is random comes from torch's default
        generator, which is seeded in every step.
        """
        raise NotImplementedError  # abstract

    def counts(self, batch: Any, context: TaskContext) -> Mapping[str, float]:
        """How much a batch, which is on the CPU, has of what losses are means of, by unit, as ``{"tokens": 37}``; see `Losses.mean_of`.

        The same units for every batch. Default: none, losses are means over items, of which all batches have equally many.
        """
        return {}

    def evaluate(self, model: nn.Module, data: Any, context: TaskContext) -> dict[str, Any]:
        """Numbers by name, JSON-ready, `headline` among them. The model is in evaluation mode, and no gradient is taken.

        In a process group every process gives the result of all; where weights are in shards, each makes equally many passes.
        """
        raise NotImplementedError  # abstract

    # What is kept

    def save(self, folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Write into a checkpoint's new folder: ``config.json`` and what `load` reads. Default: all ``tensors``, and the task's config.

        ``tensors`` are parameters and buffers of ``model`` by name, whole where the model holds shards.
        """
        write_tensors(folder, tensors)
        atomic_write_json(folder / "config.json", {"schema": 1, "format": FORMAT, "task": to_dict(self.config)})

    def load(self, folder: Path, model: nn.Module) -> None:
        """Put back into ``model`` what `save` wrote. Raises CheckpointError if it does not fit."""
        overwrite(model, open_tensors(folder), {name: [Piece(name)] for name in state_once(model)}, where=folder)

    def state_dict(self) -> dict[str, Any]:
        """What else a resumed run needs to go on: JSON-ready, and the same in all processes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""


def moved(batch: Any, device: torch.device) -> Any:
    """``batch`` on ``device``: what has ``to``, and tuples, lists and dicts of such; all else stays."""
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [moved(value, device) for value in batch]
        return batch._make(values) if hasattr(batch, "_make") else type(batch)(values)
    return batch
