"""How commands that train tell of the best evaluation, and of a training that ends early (``train.patience``, ``train.keep_best``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.output import fact

if TYPE_CHECKING:
    from anabranch.train import TrainResult

__all__ = ["KeepBest", "Patience", "ending", "ending_settings", "tell_ending", "told_of_best"]

Patience = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="End after N evaluations (train.eval_every) in a row without a lower loss of what is held out (train.patience). "
        "Default: never.",
    ),
]
KeepBest = Annotated[
    bool,
    typer.Option(
        "--keep-best",
        metavar=" ",
        help="Write the state of the evaluation with the lowest loss, not the last (train.keep_best).",
    ),
]


def ending_settings(patience: int | None, keep_best: bool) -> dict[str, Any]:
    """The fields of a config that these options set, by dotted path."""
    told = {"train.patience": patience, "train.keep_best": keep_best or None}
    return {name: value for name, value in told.items() if value is not None}


def told_of_best(values: Mapping[str, Any]) -> str:
    """What a line of progress says of an evaluation besides its numbers; empty where the best one is not looked for."""
    if "since_best" not in values:
        return ""
    if values["since_best"] == 0:
        return ", the best so far"
    of_which = "none was finite yet" if values["best_step"] is None else f"the best was step {values['best_step']}"
    return f", {of_which}{': training ends here' if values['stopped_early'] else ''}"


def ending(result: TrainResult) -> dict[str, Any]:
    """For ``--json`` and reports."""
    return {
        "stopped_early": result.stopped_early,
        "best_step": result.best_step,
        "written_step": result.written_step,
    }


def tell_ending(result: TrainResult) -> None:
    """Say that a training ended early, and that what is written is of another step than the last."""
    told = []
    if result.stopped_early:
        since = (
            "no evaluation was finite" if result.best_step is None else f"none since step {result.best_step} was better"
        )
        told.append(f"early, at step {result.step}: of its evaluations {since}")
    if result.best is not None:
        told.append(f"written is step {result.written_step}, the best evaluation")
    if told:
        fact("ended", "; ".join(told))
