"""What a training run is made of: `TrainConfig`, and `RunConfig` with the model and the data beside it."""

from pathlib import Path
from typing import Literal

from anabranch.config import Config, Field, Seed, Size, configclass, differences, from_dict, to_dict
from anabranch.data.config import DataConfig
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.files import atomic_write_json
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import read_json
from anabranch.train.schedule import Cosine, Schedule

__all__ = ["CONFIG_FILE", "RunConfig", "TrainConfig", "differences", "read_run_config"]

SCHEMA = 1
CONFIG_FILE = "config.json"


@configclass
class TrainConfig(Config):
    """How to train. The optimizer is AdamW (arXiv 1711.05101).

    Attributes:
        steps: optimizer steps.
        batch_size: sequences per step, over all micro-batches and ranks.
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
        eval_every: steps between evaluations on the validation split; None for one at the end.
        eval_tokens: about how many tokens an evaluation takes, spread over the split; None for all.
        checkpoint_every: steps between checkpoints; None for one at the end.
        keep_checkpoints: newest ones that are kept; one more until the newest has proved good, so that a run that diverges keeps good ones.
        log_every: steps between lines of metrics.
        max_skipped: steps in a row whose gradient is not finite before training stops.
        seed: of the initial weights, the data order, and everything random in between.
        tensorboard: write events for TensorBoard too (needs the extra ``tensorboard``).
    """

    steps: int = Field(default=1000, ge=0)
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


@configclass
class RunConfig(Config):
    """A whole run: ``model``, ``data``, ``train``. Saved as ``config.json`` of the run's folder."""

    model: Decoder.Config = Field(default_factory=Decoder.Config)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)

    def save(self, out: str | Path) -> None:
        """Write ``config.json`` into the run's folder."""
        atomic_write_json(Path(out) / CONFIG_FILE, {"schema": SCHEMA, **to_dict(self)})


def read_run_config(out: str | Path) -> RunConfig:
    """The config of a run, equal to the one that was saved.

    Raises DataError if ``out`` holds no run, CheckpointError if its config is damaged or of a newer version.
    """
    path = Path(out) / CONFIG_FILE
    if not path.is_file():
        raise DataError(f"no training run in {out} (looked for {CONFIG_FILE})")
    table = read_json(path)
    schema = table.pop("schema", None)
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise CheckpointError(f"schema in {path} is {schema!r}; this version reads 1 to {SCHEMA}")
    try:
        return from_dict(RunConfig, table)
    except ConfigError as error:
        raise CheckpointError(f"{path} does not describe a run: {error}") from None
