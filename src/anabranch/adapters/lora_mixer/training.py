"""`fit_router` and `fit_joint`: LoRA-Mixer's two regimes, as trainings that can be stopped and go on.

    fit_router(model, rows, "runs/router", train=TrainConfig(steps=200, batch_size=16))                    # experts are given, and stay
    fit_joint(model, rows, "runs/joint", train=TrainConfig(steps=600, batch_size=16), stages="anneal")     # experts and routers

A killed training goes on, to the bit, from its newest checkpoint with ``resume=True``. What it made is read back with

    load_fitted(fitted.result.checkpoint, load_mixture(folders, model))
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from anabranch.adapters.lora_mixer.mixture_file import Mixture
from anabranch.adapters.lora_mixer.task import Labelled, MixtureTask
from anabranch.adapters.mixture_report import MixtureReport, mixture_report
from anabranch.data import Tokenizer
from anabranch.lm.checkpoint import load_weights
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import Piece, open_tensors, overwrite, state_once
from anabranch.train import TaskRunConfig, TrainConfig, Trainer, TrainResult

__all__ = ["Fitted", "fit_joint", "fit_router", "load_fitted"]


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


def load_fitted(folder: str | Path, model: nn.Module) -> nn.Module:
    """Put what a training left in the folder of a checkpoint into ``model``, which has its mixture, in place, and return the model.

    The model must be on the base that was trained on, with adapters of the same names, scales and layers in the same order, and the same
    ``top_k``. A checkpoint of an earlier version says nothing of names and base, which a warning in the log then says.

    Raises ConfigError for a model without mixed layers, CheckpointError where there is no checkpoint, or one of another base, of other
    adapters or of the same in another order, of another ``top_k``, or with tensors of other names or sizes. The model is then as it was.
    """
    Mixture.of(model).check(Path(folder))
    if isinstance(model, Decoder):
        load_weights(model, Path(folder))
    else:
        overwrite(
            model, open_tensors(Path(folder)), {name: [Piece(name)] for name in state_once(model)}, where=Path(folder)
        )
    return model


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
