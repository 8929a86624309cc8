"""Training: config, schedules, the loop, evaluation, checkpoints, metrics.

config = RunConfig(model=..., data=..., train=TrainConfig(steps=1000))
result = Trainer(config, "runs/a").fit()
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.train.checkpoint import checkpoints
from anabranch.train.config import RunConfig, TrainConfig, read_run_config
from anabranch.train.evaluate import Evaluation, evaluate
from anabranch.train.metrics import read_metrics
from anabranch.train.result import Event, TrainResult
from anabranch.train.schedule import Constant, Cosine, Schedule, WarmupStableDecay
from anabranch.train.trainer import Trainer

__all__ = [
    "Constant",
    "Cosine",
    "Evaluation",
    "Event",
    "RunConfig",
    "Schedule",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "WarmupStableDecay",
    "checkpoints",
    "evaluate",
    "read_metrics",
    "read_run_config",
]
