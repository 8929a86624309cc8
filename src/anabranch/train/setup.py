"""What a trainer sets up before its first step: which part of a batch is whose, and the model as it learns."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from anabranch.errors import ConfigError
from anabranch.train.config import RunConfig, TaskRunConfig
from anabranch.train.parallel import Workers
from anabranch.train.task import Task, TaskContext

__all__ = ["learning_model", "random_state_kept", "task_context"]


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """The caller's random state, on the CPU and ``device``, is afterwards as it was."""
    return torch.random.fork_rng([device.index] if device.type == "cuda" else [])


def task_context(config: RunConfig | TaskRunConfig, workers: Workers) -> TaskContext:
    """What a task is told of a run. Raises ConfigError if processes and micro-batches cannot share a batch evenly."""
    settings = config.train
    shares = workers.num_batches
    size, rest = divmod(settings.batch_size, settings.accumulation * shares)
    if rest:
        who = f"{shares} processes" if shares == workers.size else f"{shares} groups of processes"
        raise ConfigError(
            f"train.batch_size is {settings.batch_size}, which {who} with accumulation={settings.accumulation} "
            f"cannot share evenly; use a multiple of {settings.accumulation * shares}"
        )
    return TaskContext(settings, size, workers.batch_number, shares, workers.device)


def learning_model(task: Task, context: TaskContext, checkpoint: Path | None) -> nn.Module:
    """The task's model on the context's device, drawn by the run's seed, or with the weights of ``checkpoint``.

    Raises ConfigError where it cannot be trained as the settings say, or nothing of it learns.
    """
    settings = context.settings
    with random_state_kept(context.device):
        torch.manual_seed(settings.seed)
        model = task.build_model(replace(context, checkpoint=checkpoint))
    if checkpoint is not None:
        task.load(checkpoint, model)
    if hasattr(model, "recompute"):
        model.recompute = settings.recompute  # type: ignore[assignment]
    elif settings.recompute:
        raise ConfigError(f"train.recompute is True, which {type(model).__name__} cannot do; set it to False")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(task.learns(name, parameter))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"no parameter of {type(model).__name__} learns; see which do in Task.learns")
    return model.to(context.device).train()
