"""A task that learns a line, and whose evaluations come to what a test says."""

import math

import torch
from torch import nn

from anabranch.config import configclass
from anabranch.train import Examples, Losses, Task, TaskRunConfig, TrainConfig

EVERY = 2


class Scripted(Task):
    """The evaluation after 2, 4, ... steps comes to the first, second, ... of ``losses`` (``inf``, and None for NaN); in processes but the
    first to those of ``others``, where there are any."""

    @configclass
    class Config(Task.Config):
        losses: tuple[float | str | None, ...] = ()
        others: tuple[float | str | None, ...] = ()
        holds_out: bool = True

    def build_model(self, context):
        return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))

    def training_data(self, context):
        input_ND = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        place = {"rank": context.rank, "world_size": context.world_size}
        return Examples(input_ND, input_ND.sum(1, keepdim=True), seed=context.settings.seed, **place)

    def validation_data(self, context):
        return torch.zeros(1) if self.config.holds_out else None

    def step(self, model, batch, context):
        input_BD, target_BD = batch
        return Losses.of(error=(model(input_BD) - target_BD).pow(2).mean())

    def evaluate(self, model, data, context):
        told = self.config.others if context.rank and self.config.others else self.config.losses
        value = told[context.step // EVERY - 1]
        return {self.headline: math.nan if value is None else float(value)}


class Rising(Scripted):
    headline, better = "accuracy", "higher"


class Unsaid(Scripted):
    headline = "accuracy"


def scripted_run(losses, *, task=Scripted, others=(), holds_out=True, **train) -> TaskRunConfig:
    """A run with as many steps as ``losses`` are evaluations, unless ``train`` says otherwise."""
    settings = {
        "steps": EVERY * len(losses),
        "batch_size": 8,
        "log_every": 1,
        "device": "cpu",
        "eval_every": EVERY,
        "checkpoint_every": 3,
    }
    made = task.Config(losses=tuple(losses), others=tuple(others), holds_out=holds_out)
    return TaskRunConfig(task=made, train=TrainConfig(**(settings | train)))
