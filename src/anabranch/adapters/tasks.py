"""Task names: what each row of a pass is about, for layers that route by task.

    model(token_BL, state=task_rows(model, ["summaries", "sql"], token_BL.shape[1]))

    with on_tasks(model, ["summaries", "sql"]):         # for whoever calls the model without knowing of tasks
        generate(model, [first, second])

A row carries the number of its task in the forward context's state, ``[B, L]``, so that it goes where its tokens go: into experts, into
blocks that some rows skip, through a cache. Names become numbers in one place, here. A name that no table has is an error; where a model
is used, and not trained, it may mean the average of all skills instead (``unknown="average"``).
"""
# Shapes: B rows, L positions, N items

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.adapters.by_row import telling
from anabranch.bounds import shown
from anabranch.errors import ConfigError, InputError

__all__ = [
    "AVERAGE",
    "TASK",
    "Unknown",
    "goes_by_task",
    "needs_task",
    "numbers_of",
    "on_tasks",
    "task_names",
    "task_rows",
    "told_tasks",
]

Unknown = Literal["error", "average"]
# Of a forward context's state: the number of each item's task.
TASK = "adapters.task"
# The number of a task that is not known, and gets the average of all skills.
AVERAGE = -1


def task_names(model: nn.Module) -> tuple[str, ...]:
    """The tasks that the layers of ``model`` route by, in the order of their numbers.

    Raises ConfigError where no layer routes by task, or two do by other names.
    """
    routed: list[Any] = [module for module in model.modules() if getattr(module, "routes_by_task", False)]
    found = {tuple(module.tasks) for module in routed}
    if not found:
        raise ConfigError("no layer of the model routes by task; put such layers on first, e.g. MultiHeadRouted")
    if len(found) > 1:
        first, second = sorted(found)[:2]
        raise ConfigError(
            f"layers of the model route by other tasks: {shown(list(first))} and {shown(list(second))}; they must have the same"
        )
    return found.pop()


def goes_by_task(model: nn.Module) -> bool:
    """Whether a layer of ``model`` asks which task a row is of."""
    return any(getattr(module, "routes_by_task", False) for module in model.modules())


def needs_task(model: nn.Module) -> bool:
    """Whether a layer of ``model`` has nothing for a row that is of no task."""
    layers: list[Any] = [module for module in model.modules() if getattr(module, "routes_by_task", False)]
    return any(
        getattr(layer.config, "unknown", "error") == "error" and not getattr(layer.config, "uniform", False)
        for layer in layers
    )


def numbers_of(names: Sequence[str | None], known: Sequence[str], unknown: Unknown = "error") -> list[int]:
    """The number of each name; `AVERAGE` for None, and for one that is not known where ``unknown`` is "average".

    Raises InputError for an unknown name otherwise, with the nearest of those that there are.
    """
    if unknown not in ("error", "average"):
        raise ConfigError(f"unknown is {unknown!r}; it must be 'error' or 'average'")
    place = {name: number for number, name in enumerate(known)}
    numbers = []
    for name in names:
        if name is not None and name not in place and unknown == "error":
            near = difflib.get_close_matches(str(name), known, n=1)
            some = ", ".join(map(repr, known[:6])) + (", ..." if len(known) > 6 else "")
            hint = f"did you mean {near[0]!r}?" if near else f"there are {some}"
            raise InputError(
                f"task {shown(name)} is not one of the {len(known)} that the model was trained for; {hint}"
            )
        numbers.append(AVERAGE if name is None else place.get(name, AVERAGE))
    return numbers


def task_rows(
    model: nn.Module, names: Sequence[str | None], length: int, *, unknown: Unknown = "error"
) -> dict[str, Tensor]:
    """The ``state`` of a forward pass whose rows are of these tasks.

    Args:
        model: whose layers route by task.
        names: of each row; None for the average of all skills.
        length: L of the pass.
        unknown: what a name means that there is not: "error", or "average" as None. In a model that is in training it is an error always.

    Raises InputError for an unknown name, ConfigError for a model that does not route by task.
    """
    number_B = torch.tensor(_numbers(model, names, unknown), dtype=torch.int64)
    return told_tasks(number_B.to(next(model.parameters()).device), length)


def told_tasks(number_B: Tensor, length: int) -> dict[str, Tensor]:
    """The same by numbers, int64 ``[B]``, which nobody checks before the layers do."""
    return {TASK: number_B.unsqueeze(1).expand(len(number_B), length)}


@contextmanager
def on_tasks(model: nn.Module, names: str | Sequence[str | None], *, unknown: Unknown = "error") -> Iterator[None]:
    """Every pass of ``model`` in this block is of these tasks.

    Args:
        model: whose layers route by task: one of ours, or any that `put_on` put them onto.
        names: of each row of its batches, or one for all rows. Rows that leave a batch (a sequence that stopped), or are repeated in it
            (beams), keep their task: a cache knows them. Without a cache, and in a model that is not ours, a batch may have each row
            several times in a row, as transformers' generate has beams.
        unknown: see `task_rows`.

    Raises InputError for an unknown name, and in a pass whose rows are neither these nor a multiple of them.
    """
    one = isinstance(names, str)
    number_B = torch.tensor(_numbers(model, [names] if isinstance(names, str) else names, unknown), dtype=torch.int64)
    with telling(model, TASK, number_B, told_tasks, what="tasks", for_all=one):
        yield


def _numbers(model: nn.Module, names: Sequence[str | None], unknown: Unknown) -> list[int]:
    """As `numbers_of` with the model's tasks. While a model learns, a name that is misspelt must not pass for the average."""
    known = task_names(model)
    numbers = numbers_of(names, known, unknown)
    if model.training and unknown == "average":
        try:
            numbers_of(names, known)
        except InputError as error:
            raise InputError(
                f"{error}. The model is in training, where unknown='average' holds for no name; say None, or call model.eval()"
            ) from None
    return numbers
