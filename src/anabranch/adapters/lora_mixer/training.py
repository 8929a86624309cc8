"""`fit_router` and `fit_joint`: LoRA-Mixer's two regimes, as trainings that can be stopped and go on.

    fit_router(model, rows, "runs/router", train=TrainConfig(steps=200, batch_size=16))                    # experts are given, and stay
    fit_joint(model, rows, "runs/joint", train=TrainConfig(steps=600, batch_size=16), stages="anneal")     # experts and routers

A killed training goes on, to the bit, from its newest checkpoint with ``resume=True``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from anabranch.adapters.lora_mixer.task import Labelled, MixtureTask
from anabranch.adapters.mixture_report import MixtureReport, mixture_report
from anabranch.data import Tokenizer
from anabranch.train import TaskRunConfig, TrainConfig, Trainer, TrainResult

__all__ = ["Fitted", "fit_joint", "fit_router"]


@dataclass(frozen=True)
class Fitted:
    """What a training gave.

    Attributes:
        result: of the trainer.
        report: what routers do with the held-out rows, or those learned from where nothing is held out.
    """

    result: TrainResult
    report: MixtureReport


def fit_router(
    model: nn.Module,
    data: Labelled,
    out: str | Path,
    *,
    train: TrainConfig,
    held_out: Labelled | None = None,
    experts: Literal["frozen", "preserved"] = "frozen",
    beta: float = 0.01,
    alignment: float = 0.0,
    tokenizer: Tokenizer | None = None,
    resume: bool = False,
) -> Fitted:
    """Let routers learn to choose among given experts, from all of them by their softmax ("plug and play").

    Args:
        model: with mixed layers (`load_mixture`), changed in place.
        data: rows of all tasks; labels are for the report, and for ``alignment``.
        out: the run's folder.
        train: its settings; ``steps`` and ``batch_size`` are the budget.
        held_out: rows to measure on.
        experts: frozen to the bit, or held by the preservation loss of weight ``beta``.
        alignment: c_T, see `MixtureTask`.
        tokenizer: saved beside a model of ours.
        resume: go on from the newest checkpoint in ``out``.

    Raises as `MixtureTask` and `Trainer`.
    """
    config = MixtureTask.Config(stages="soft", experts=experts, beta=beta, alignment=alignment)
    return _fit(config, model, data, out, train, held_out, tokenizer, resume)


def fit_joint(
    model: nn.Module,
    data: Labelled,
    out: str | Path,
    *,
    train: TrainConfig,
    held_out: Labelled | None = None,
    stages: Literal["hard", "hard_soft", "anneal"] = "hard_soft",
    experts: Literal["frozen", "preserved", "free"] = "frozen",
    beta: float = 0.01,
    alignment: float = 0.1,
    tokenizer: Tokenizer | None = None,
    resume: bool = False,
) -> Fitted:
    """Train experts by the labels of their tasks, and routers after them (see `MixtureTask.Config`). Arguments as of `fit_router`."""
    config = MixtureTask.Config(stages=stages, experts=experts, beta=beta, alignment=alignment)
    return _fit(config, model, data, out, train, held_out, tokenizer, resume)


def _fit(
    config: MixtureTask.Config,
    model: nn.Module,
    data: Labelled,
    out: str | Path,
    train: TrainConfig,
    held_out: Labelled | None,
    tokenizer: Tokenizer | None,
    resume: bool,
) -> Fitted:
    run = TaskRunConfig(task=config, train=train)
    trainer = Trainer(run, out, resume=resume, model=model, data=data, held_out=held_out, tokenizer=tokenizer)
    result = trainer.fit()
    # Whoever goes on with the model finds it as the training left it, but for what learns.
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    device = next(model.parameters()).device
    rows = data if held_out is None else held_out
    moved = (
        tuple(value if value is None else value.to(device) for value in batch)
        for batch in rows.batches(train.batch_size)
    )
    with torch.no_grad():
        return Fitted(result, mixture_report(model, moved))  # type: ignore[arg-type]
