"""The contract of tasks holds for ours, and finds what is broken."""

import pytest
import torch

from anabranch.testing import check_task
from anabranch.train import Examples, TaskRunConfig, TrainConfig
from digits import Digits

SETTINGS = TrainConfig(batch_size=8, learning_rate=1e-2)


def test_an_image_classifier_keeps_it():
    check_task(TaskRunConfig(task=Digits.Config(), train=SETTINGS), ranks=False)


@pytest.mark.slow  # starts two processes
def test_two_processes_tell_images_apart_as_one_does():
    check_task(TaskRunConfig(task=Digits.Config(), train=SETTINGS))


def test_the_language_model_keeps_it(make_run):
    check_task(make_run(), ranks=False)  # with ranks: tests/train/test_parallel.py


class Forgetful(Digits):
    """Its stream does not say where it is."""

    def training_data(self, context):
        stream = super().training_data(context)
        stream.load_state_dict = lambda state: None
        return stream


class Drifting(Digits):
    """Changes what it says does not learn."""

    def learns(self, name, parameter):
        return not name.endswith("bias")

    def step(self, model, batch, context):
        with torch.no_grad():
            model[0].bias.add_(1.0)
        return super().step(model, batch, context)


class Doubled(Digits):
    """Logs half of what it differentiates."""

    def step(self, model, batch, context):
        from dataclasses import replace

        losses = super().step(model, batch, context)
        return replace(losses, total=losses.total * 2)


class Alone(Digits):
    """Every process takes the same items."""

    def training_data(self, context):
        return Examples(self.image_ND[:1400], self.label_N[:1400], seed=context.settings.seed)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Forgetful, r"resumed, .*(differs|is another)"),
        (Drifting, "0.bias does not learn, and has changed"),
        (Doubled, "and its terms add up to"),
    ],
)
def test_broken_tasks_are_found(task, message):
    with pytest.raises(AssertionError, match=message):
        check_task(TaskRunConfig(task=task.Config(), train=SETTINGS), ranks=False)


@pytest.mark.slow  # starts two processes
def test_processes_that_share_nothing_are_found():
    with pytest.raises(AssertionError, match="the loss of step 1 in two processes under ddp"):
        check_task(TaskRunConfig(task=Alone.Config(), train=SETTINGS))
