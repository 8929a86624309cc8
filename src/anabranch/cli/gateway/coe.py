"""``anabranch gateway coe``: what a fitted Composition of Experts would host under every budget, and how well it tells categories apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.doors import help_of
from anabranch.cli.gateway.options import ColumnMap, embed, read_data
from anabranch.cli.options import AsJson
from anabranch.cli.output import fact, print_json, table
from anabranch.errors import InputError

if TYPE_CHECKING:
    from anabranch.routers.coe.predictor import CompositionOfExperts
    from anabranch.routers.fitted import FittedRouter

GROUP = "coe"
BY = {"budget": "hosted", "trade_off": "active"}
Router = Annotated[Path, typer.Option(metavar="DIR", help="Routers made by fit: their folder, or one file.")]
Named = Annotated[
    str | None, typer.Option(metavar="NAME", help="Which router of the folder. Default: the only one of this kind.")
]


def frontier(
    router: Router,
    strategy: Named = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="WHAT", help="budget: limit the hosted parameters; trade_off: put a price on active parameters."
        ),
    ] = "budget",
    size: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="MODEL=B", help="Billions of parameters of a model; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the best assignment of categories to models for every budget of parameters, or for every price of active parameters.

    Model sizes are those known at fitting, or given here.

    Example: anabranch gateway coe frontier --router routers --size small=8 --size large=70
    """
    if by not in BY:
        raise InputError(f"--by is {by!r}; it must be one of {', '.join(BY)}")
    fitted, predictor = _read(router, strategy)
    predictor.meet(_sized(fitted, size or []).pool)
    maps = predictor.frontier(by)  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = [
        {
            "hosted": one.host,
            "active": one.active,
            "quality": one.quality,
            "trade_off": one.limits.trade_off,
            "models": list(one.chosen),
            "map": dict(one.choice),
        }
        for one in maps
    ]
    if as_json:
        print_json({"by": by, "maps": rows})
        return
    table(
        ["models", "hosted\nB", "active\nB", "quality", "lambda\nper B"],
        [
            [
                ", ".join(one["models"]),
                f"{one['hosted']:.4g}",
                f"{one['active']:.4g}",
                f"{one['quality']:.4f}",
                f"{one['trade_off']:.4g}",
            ]
            for one in rows
        ],
    )


def report(
    router: Router,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]", help="Outcomes with tasks. Default: the data of the fit, by cross-validation."
        ),
    ] = None,
    strategy: Named = None,
    columns: ColumnMap = None,
    as_json: AsJson = False,
) -> None:
    """Show how well prompts are classified into categories, and which model serves each category.

    Example: anabranch gateway coe report outcomes.jsonl --router routers
    """
    fitted, predictor = _read(router, strategy)
    found = predictor.router.report(*_labelled(fitted, data, columns)) if data else predictor.router.report()
    predictor.meet(fitted.pool)
    chosen = dict(predictor.plan().map.choice)
    facts = {"accuracy": found.accuracy, "ece": found.ece, "abstained": found.abstained}
    if as_json:
        print_json({**facts, "categories": found.of_category, "confusion": found.confusion_CC.tolist(), "map": chosen})
        return
    fact(
        "accuracy",
        f"{found.accuracy:.4f}, calibration error {found.ece:.4f}, {found.abstained:.1%} go to the general model",
    )
    rows = [
        [
            name,
            chosen.get(name, ""),
            *(_number(one[each]) for each in ("precision", "recall", "f1")),
            f"{one['count']:,.0f}",
        ]
        for name, one in found.of_category.items()
    ]
    table(["category", "model", "precision", "recall", "f1", "prompts"], rows, text_columns=2)


def group(door: str) -> typer.Typer:
    """Both commands, as one door shows them."""
    made = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
        help="Inspect a fitted Composition of Experts (--strategy coe).",
    )
    commands: dict[str, Callable[..., None]] = {"frontier": frontier, "report": report}
    for name, command in commands.items():
        made.command(name, help=help_of(command, door))(command)
    return made


def _read(place: Path, name: str | None) -> tuple[FittedRouter, CompositionOfExperts]:
    """The router that is meant. Raises InputError where there is none, or several, of this kind."""
    from anabranch.routers.coe.predictor import CompositionOfExperts
    from anabranch.routers.fitted import load_folder

    held = load_folder(place, None if name is None else [name]).routers
    found = {
        key: one
        for key, one in held.items()
        if isinstance(getattr(one.strategy, "predictor", None), CompositionOfExperts)
    }
    if len(found) != 1:
        which = f"{', '.join(found)} are; name one with --strategy" if found else f"it holds {', '.join(held)}"
        raise InputError(f"{place} must hold one router of kind coe; {which}")
    router = next(iter(found.values()))
    return router, router.strategy.predictor  # type: ignore[attr-defined]


def _sized(router: FittedRouter, sizes: list[str]) -> FittedRouter:
    """With sizes in the place of what is known of models. Raises InputError for what is no ``MODEL=B``."""
    given: dict[str, float] = {}
    names = [model.name for model in router.models]
    for text in sizes:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in names or not 0 < value < 1e9:
            raise InputError(f"--size is {text!r}; write MODEL=B with one of {', '.join(names)}, and billions above 0")
        given[name] = value
    models: tuple[Any, ...] = tuple(
        dataclasses.replace(model, parameters=given.get(model.name, model.parameters)) for model in router.models
    )
    return dataclasses.replace(router, models=models)


def _labelled(router: FittedRouter, name: str, columns: str | None) -> tuple[Any, list[str]]:
    """Vectors and tasks of the questions that have one. Raises InputError if none has, or the router reads no texts."""
    import numpy as np

    data = read_data(name, columns, None)[0]
    rows = [row for row, task in enumerate(data.task or ()) if task is not None]
    if not rows:
        raise InputError(
            f"no question of {name} has a task; a report compares these with the categories that were learned"
        )
    if router.embedder is None:
        raise InputError("this router brings no embedder, so that it cannot read the questions")
    data = embed(router.embedder, data.take(rows), lambda text: None)
    return np.asarray(data.vector_ND), [str(task) for task in data.task]


def _number(value: float) -> str:
    return "" if value != value else f"{value:.4f}"
