"""Training: tasks, config, schedules, the loop, evaluation, checkpoints, metrics.

config = RunConfig(model=..., data=..., train=TrainConfig(steps=1000))               # a language model
result = Trainer(config, "runs/a").fit()
config = TaskRunConfig(task=MyTask.Config(...), train=TrainConfig(steps=1000))       # anything else
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.train.checkpoint import checkpoints
from anabranch.train.config import RunConfig, TaskRunConfig, TrainConfig, read_run_config, read_task_run_config
from anabranch.train.evaluate import Evaluation, evaluate
from anabranch.train.examples import Examples
from anabranch.train.hooks import StepHooks, follow_steps
from anabranch.train.language_model import DecoderTask, LanguageModel, TextTask
from anabranch.train.metrics import read_metrics
from anabranch.train.result import Event, TrainResult
from anabranch.train.schedule import Constant, Cosine, Schedule, WarmupStableDecay
from anabranch.train.task import Losses, Stream, Task, TaskContext
from anabranch.train.trainer import Trainer

__all__ = [
    "Constant",
    "Cosine",
    "DecoderTask",
    "Evaluation",
    "Event",
    "Examples",
    "LanguageModel",
    "Losses",
    "RunConfig",
    "Schedule",
    "StepHooks",
    "Stream",
    "Task",
    "TaskContext",
    "TaskRunConfig",
    "TextTask",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "WarmupStableDecay",
    "checkpoints",
    "evaluate",
    "follow_steps",
    "read_metrics",
    "read_run_config",
    "read_task_run_config",
]
