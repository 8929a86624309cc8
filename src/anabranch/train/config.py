"""What a training run is made of: `TrainConfig`, and a task beside it.

A `RunConfig` trains a language model and says its model and data; a `TaskRunConfig` trains any task.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from anabranch.cluster.gradients import is_power_of_two
from anabranch.config import Config, Field, Seed, Size, configclass, differences, from_dict, to_dict
from anabranch.data.config import DataConfig
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.files import atomic_write_json
from anabranch.lm.decoder import Decoder
from anabranch.run_folder import CONFIG_FILE, SCHEMA, read_run_table
from anabranch.train.language_model import LanguageModel
from anabranch.train.schedule import Cosine, Schedule
from anabranch.train.task import Task

__all__ = [
    "DiLoCoConfig",
    "ElasticConfig",
    "Parallel",
    "RunConfig",
    "Start",
    "TaskRunConfig",
    "TrainConfig",
    "differences",
    "read_run_config",
    "read_same_run",
    "read_task_run_config",
]

T = TypeVar("T")


@configclass
class TrainConfig(Config):
    """How to train.

    Attributes:
        steps: optimizer steps.
        optimizer: ``adamw`` (arXiv 1711.05101), or ``mezo``: steps without gradients, in the memory of inference, of which many more are
            needed, see `anabranch.train.mezo`. It wants rates of its own (1e-6 for whole models, 1e-4 for LoRA, in its paper) and a
            ``constant`` schedule; ``betas``, ``eps`` and ``clip`` say nothing to it. ``galore``: AdamW whose moments are in few directions
            of each matrix, for whole models in the memory of adapters, see `anabranch.train.galore`.
        mezo_scale: how far from the weights its two points are, times a normal direction; at most 1.
        mezo_samples: directions of each of its steps.
        galore_rank: directions of a matrix, of ``galore``; smaller matrices learn as with AdamW.
        galore_every: steps between which these are the same.
        galore_scale: times what AdamW would do in them.
        batch_size: items (sequences of text) per step, over all micro-batches and ranks.
        accumulation: micro-batches per step; more of them need less memory.
        learning_rate: the peak.
        schedule: how the learning rate moves, ``cosine``, ``wsd`` or ``constant``.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled; of matrices only, never of norms, biases and other vectors.
        router_weight_decay: decay routers too.
        embedding_weight_decay: decay the embedding too.
        clip: largest norm of the whole gradient, None for no limit.
        precision: ``float32``, or ``bfloat16`` autocast over float32 weights.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        compile: run the model through torch.compile.
        recompute: recompute each block's activations in the backward pass, to save memory.
        parallel: ``none``; under torchrun ``ddp`` (replicas) or ``fsdp`` (weights and optimizer sharded, FSDP2).
        eval_every: steps between evaluations; None for one at the end.
        eval_tokens: about how many tokens of text an evaluation takes, spread over the held-out split; None for all.
        patience: evaluations in a row without a better one (by the task's headline, a loss as a rule) after which training ends; None for
            all steps. The learning rate goes as it would over all of them. One that is not finite is never better.
        keep_best: the weights of the best evaluation are what is written in the end, as adapter or model; checkpoints, from which a run
            goes on, are of the last step all the same.
        checkpoint_every: steps between checkpoints; None for one at the end.
        keep_checkpoints: newest ones that are kept; one more until the newest has proved good, so that a run that diverges keeps good ones.
        log_every: steps between lines of metrics.
        max_skipped: steps in a row whose gradient is not finite before training stops.
        seed: of the initial weights, the data order, and everything random in between.
        tensorboard: write events for TensorBoard too (needs the extra ``tensorboard``).
    """

    steps: int = Field(default=1000, ge=0)
    optimizer: Literal["adamw", "mezo", "galore"] = "adamw"
    mezo_scale: float = Field(default=1e-3, gt=0, le=1)
    mezo_samples: Size = Field(default=1, ge=1)
    galore_rank: Size = Field(default=128, ge=1)
    galore_every: Size = Field(default=200, ge=1)
    galore_scale: float = Field(default=0.25, gt=0)
    batch_size: Size = Field(default=32, ge=1)
    accumulation: Size = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-3, ge=0)
    schedule: Schedule.Config = Cosine.Config()
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    router_weight_decay: bool = True
    embedding_weight_decay: bool = False
    clip: float | None = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    compile: bool = False
    recompute: bool = False
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    eval_every: int | None = Field(default=250, ge=1)
    eval_tokens: int | None = Field(default=65536, ge=1)
    patience: int | None = Field(default=None, ge=1)
    keep_best: bool = False
    checkpoint_every: int | None = Field(default=250, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every: int = Field(default=10, ge=1)
    max_skipped: int = Field(default=10, ge=1)
    seed: Seed = Field(default=0, ge=0)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"accumulation is {self.accumulation}, which does not divide batch_size={self.batch_size} sequences"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {self.betas}; both must be at least 0 and below 1")
        if self.looks_for_best is not None and self.eval_every is None:
            raise ConfigError(
                f"{self.looks_for_best}, and eval_every is None, so held-out data is looked at once, at the end; set eval_every to the "
                "steps between evaluations"
            )

    @property
    def looks_for_best(self) -> str | None:
        """What wants to know which evaluation is the best, in words; None where nothing does."""
        if self.patience is not None:
            return f"patience is {self.patience}"
        return "keep_best is True" if self.keep_best else None

    def device_kind(self) -> str:
        """``cpu`` or ``cuda``: what ``device`` means on this machine."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device.partition(":")[0]


@configclass
class DiLoCoConfig(Config):
    """Runs on several machines that learn together (`anabranch.cluster.pccl.DiLoCo`), each started by itself, at any time.

    Attributes:
        master: ``host:port`` of what ``anabranch cluster master`` says; None for a run that learns alone.
        worker: number of this run; others see the training data in another order.
        peers: so many runs wait for each other before the first step; one that comes later does not wait.
        every: inner steps of a round; it must divide ``train.steps``.
        learning_rate: of the outer SGD.
        momentum: of the outer SGD, with Nesterov's correction; 0 for none.
        quantise: how deltas go over the wire: ``min_max`` or ``zero_point`` (8 bits a number); None as they are.
        asynchronous: send a round's deltas while the next one is trained.
        pool: connections with each neighbour.
        group: runs of one group learn together.
        listen: where other runs reach this one: ``host``, ``host:port`` or ``:port``; empty for every address and a free port.
        advertise: ``host`` or ``host:port`` by which they reach it; empty for the address from which it calls the master.
        wait_s: seconds after which it gives up waiting for the others; None for never.
    """

    master: str | None = Field(default=None, min_length=1)
    worker: int = Field(default=0, ge=0)
    peers: Size = Field(default=1, ge=1)
    every: Size = Field(default=500, ge=1)
    learning_rate: float = Field(default=0.7, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    quantise: Literal["min_max", "zero_point"] | None = None
    asynchronous: bool = False
    pool: Size = Field(default=1, ge=1, le=64)
    group: int = Field(default=0, ge=0, le=65536)
    listen: str = ""
    advertise: str = ""
    wait_s: float | None = Field(default=None, gt=0)


@configclass
class ElasticConfig(Config):
    """Processes that share one training, which goes on with the same computation when some are lost or come (ElasWave).

    Each is started by itself with the same line, at any time; how many there are, and in what stages, the coordinator says.

    Attributes:
        coordinator: ``host:port`` of what ``anabranch cluster coordinate`` says; None for a run that is alone.
        micro_batches: M, into which a step is cut; None for twice the stages. Results do not depend on it.
        block: sequences that go through the layers together; what a loss takes over a micro-batch it takes over these.
        snapshot_copies: processes that keep a copy of what one has, so that as many may be lost at once.
        host: where other processes reach this one; of several machines each has its own.
        timeout_s: seconds after which a process that works on its own while others wait for it is cast out as stuck, and a coordinator
            that says nothing counts as gone.
        clock: of the processor, which runs faster where its stage lost processes and slower where it waits, as far as the coordinator
            allows (``--max-frequency``, ``--power-save``): ``simulated``; ``nvml``, a GPU's, which is read and not set; ``nvml-set``,
            which needs root.
    """

    coordinator: str | None = Field(default=None, min_length=1)
    micro_batches: Size | None = Field(default=None, ge=1)
    block: Size = Field(default=1, ge=1)
    snapshot_copies: int = Field(default=1, ge=0, le=1024)
    host: str = Field(default="127.0.0.1", min_length=1)
    timeout_s: float = Field(default=60.0, gt=0)
    clock: Literal["none", "simulated", "nvml", "nvml-set"] = "none"


@configclass
class Parallel(Config):
    """How the parts of a model are shared by the processes of torchrun, beside the batch (``train.parallel``).

    Attributes:
        experts: processes that keep the experts of a pool together, a part each; it must divide their number and that of the experts.
            Above 1, ``train.parallel`` none means ddp: what is no expert is in every process.
        context: processes that cut each sequence of a language model between them (`anabranch.cluster.ring`); it must divide the number of
            processes. Above 1, ``train.parallel`` none means ddp.
        context_scheme: how their attention travels, see `anabranch.cluster.ring`; ``auto`` takes the quickest by simulation over equal
            links, ``hybrid`` is TokenRing inside nodes and a ring of keys between them. It says nothing where no sequence is cut.
        context_node: processes of a node, a divisor of ``context``, for ``hybrid`` and ``auto``; None for those that torchrun started on
            each machine.
        pipeline: processes that work through the layers of a language model one after another, as stages (GPipe); it must divide the number
            of processes, and the others are pipelines with batches of their own.
        micro_batches: into which a pipeline cuts its batch; None for four times its stages. It says nothing where there is no pipeline.
        schedule: of a pipeline: ``gpipe``, all forward before all backward; ``1f1b`` or ``interleaved``, with fewer micro-batches in
            flight, so in less memory; ``zero-bubble``, 1f1b with gradients of weights in what would be waiting. Likewise.
        visits: parts of the model that each stage has, of ``interleaved``; None for two.
        data: processes, or groups of them that share one, that have a batch of their own; None for as many as there are. Above 1,
            ``train.parallel`` none means ddp.
        diloco: other runs that this one learns with.
        elastic: processes that share this run, and may be lost and come.
        exact: into how many micro-batches a step is cut, over all processes: 1, 2, 4, ... Losses and weights of a language model are then
            to the bit the same in any layout by ``pipeline`` and ``data``, also in one process. None: as nearly as sums in another order
            are, which takes less time.
    """

    experts: Size = Field(default=1, ge=1)
    context: Size = Field(default=1, ge=1)
    context_scheme: Literal["auto", "token_ring", "ring", "ring2", "all_gather", "ulysses", "hybrid"] = "auto"
    context_node: Size | None = Field(default=None, ge=1)
    pipeline: Size = Field(default=1, ge=1)
    micro_batches: Size | None = Field(default=None, ge=1)
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = "gpipe"
    visits: Size | None = Field(default=None, ge=2)
    data: Size | None = Field(default=None, ge=1)
    diloco: DiLoCoConfig = Field(default_factory=DiLoCoConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)
    exact: Size | None = Field(default=None, ge=1)

    def __post_init__(self) -> None:
        if self.exact is not None and not is_power_of_two(self.exact):
            raise ConfigError(f"exact is {self.exact}, and sums that are exact are of 1, 2, 4, 8, ... micro-batches")
        if self.context > 1 and self.context % (self.context_node or 1):
            raise ConfigError(
                f"context_node is {self.context_node}, and context {self.context}; nodes of a sequence are whole, so use a divisor"
            )
        if self.visits is not None and self.schedule != "interleaved":
            raise ConfigError(
                f"visits is {self.visits}, and schedule is {self.schedule!r}, which makes one; interleaved makes more"
            )

    @property
    def chunks(self) -> int:
        """Of the model in each stage."""
        return (self.visits or 2) if self.schedule == "interleaved" else 1


class _Run(Config):
    """What both kinds of runs do."""

    def save(self, out: str | Path) -> None:
        """Write ``config.json`` into the run's folder."""
        atomic_write_json(Path(out) / CONFIG_FILE, {"schema": SCHEMA, **to_dict(self)})


@configclass
class Start(Config):
    """Where a run's first weights come from, see `anabranch.train.start`.

    Attributes:
        model: the folder or file of the model.
        recipe: how it became this run's design: names as in `anabranch.lm.recipes`; empty where it had it.
        learns: only parameters whose name contains this learn; None for all.
        digest: sha256 of the model's weights; None in runs of before it was kept.
    """

    model: str = Field(min_length=1)
    recipe: tuple[str, ...] = ()
    learns: str | None = None
    digest: str | None = None


@configclass
class RunConfig(_Run):
    """A run that trains a language model: ``model``, ``data``, ``train``, what it starts from (``start``, None for random weights).

    ``parallel`` says what of the model is shared by several processes.

    Saved as ``config.json`` of the run's folder.
    """

    model: Decoder.Config = Field(default_factory=Decoder.Config)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    start: Start | None = None
    parallel: Parallel = Field(default_factory=Parallel)

    @property
    def task(self) -> LanguageModel.Config:
        """The task of this run."""
        return LanguageModel.Config(
            model=self.model, data=self.data, learns=None if self.start is None else self.start.learns
        )


@configclass
class TaskRunConfig(_Run):
    """A run that trains any task: ``task``, ``train``, ``parallel`` as of `RunConfig`. Saved as ``config.json`` of the run's folder."""

    task: Task.Config
    train: TrainConfig = Field(default_factory=TrainConfig)
    parallel: Parallel = Field(default_factory=Parallel)


def read_run_config(out: str | Path) -> RunConfig:
    """The config of a language model's run, equal to the one that was saved.

    Raises DataError if ``out`` holds no run or one of another task, CheckpointError if its config is damaged or of a newer version.
    """
    table = read_run_table(out)
    if "task" in table:
        raise DataError(
            f"{out} holds a run of {_kind(table)}, which goes on in Python: read_task_run_config reads its config"
        )
    return _parsed(out, lambda: from_dict(RunConfig, table))


def read_task_run_config(out: str | Path, task: type[Task] = Task) -> TaskRunConfig:
    """The config of a run of any task but a language model's, equal to the one that was saved.

    Args:
        out: the run's folder.
        task: its class; needed only where that has no registered name.

    Raises DataError if ``out`` holds no run of this task, CheckpointError if its config is damaged or of a newer version.
    """
    table = read_run_table(out)
    if "task" not in table:
        raise DataError(f"{out} holds a language model's run; read it with read_run_config")
    kind = task.kind if task is not Task else None
    if kind is not None and _kind(table) != f"the task {kind!r}":
        raise DataError(f"{out} holds a run of {_kind(table)}, not of the task {kind!r}; choose another folder")
    return _parsed(
        out,
        lambda: TaskRunConfig(
            task=from_dict(task.Config, table["task"], "task"),
            train=from_dict(TrainConfig, table.get("train", {}), "train"),
            parallel=from_dict(Parallel, table.get("parallel", {}), "parallel"),
        ),
    )


def read_same_run(out: str | Path, config: RunConfig | TaskRunConfig) -> RunConfig | TaskRunConfig:
    """The config of the run in ``out``, as `read_run_config` or `read_task_run_config`: as is fit for what ``config`` trains."""
    return read_run_config(out) if isinstance(config, RunConfig) else read_task_run_config(out, config.task.owner)


def _parsed(out: str | Path, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except ConfigError as error:
        raise CheckpointError(f"{Path(out) / CONFIG_FILE} does not describe a run: {error}") from None


def _kind(table: dict[str, Any]) -> str:
    """The task of a stored run, in words."""
    task = table["task"]
    return f"the task {task['kind']!r}" if isinstance(task, dict) and "kind" in task else "a task without a name"
