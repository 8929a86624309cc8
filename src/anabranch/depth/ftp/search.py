"""Steps 1 and 3 of FTP: the schedule, searched with the static router, and searched on from there with the router that learned."""

import random
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Literal

import torch

from anabranch.depth.ftp.decider import Schedule
from anabranch.depth.ftp.evaluate import calibration_loss, kl_loss
from anabranch.depth.ftp.items import Item, items_of
from anabranch.depth.ftp.passes import Kept
from anabranch.depth.ftp.schedule import ScheduleConfig, ScheduleSpace, Searched, find_schedule
from anabranch.depth.ftp.skipper import TokenSkipper
from anabranch.depth.genetic import Generation
from anabranch.depth.influence import block_influence
from anabranch.depth.stack import stack_of

__all__ = ["finetune_schedule", "search_schedule"]

Objective = Literal["nll", "kl"]


def search_schedule(
    model: Any,
    items: Sequence[Any],
    sparsity: float,
    *,
    config: ScheduleConfig | None = None,
    objective: Objective = "nll",
    kv: Kept = "drop",
    influence: Sequence[float] | None = None,
    seed: int = 0,
    memo: MutableMapping[Any, float] | None = None,
    on_generation: Callable[[Generation], None] | None = None,
) -> Searched:
    """Step 1: the schedule of mean ``sparsity`` with which the static router costs least.

    Args:
        model: or its stack.
        items: `Item`, or pairs of (prompt, continuation) ids, on which schedules are measured.
        sparsity: S, in [0, s_max).
        config: how schedules are crossed and changed, and sizes of the search.
        objective: ``nll`` of the continuations, or ``kl`` of the next tokens from the dense model's.
        kv: as of `TokenSkipper`.
        influence: of each block, for the schedule in proportion; None measures it on the items.
        seed: of all draws.
        memo: minus the loss by schedule, read and written; one that is kept makes the search stoppable.
        on_generation: told of each generation; its fitness is minus the loss.

    Raises ConfigError (a ValueError) for a sparsity that cannot be, DataError for no items.
    """
    stack, config = stack_of(model), config or ScheduleConfig()
    space = ScheduleSpace.of(sparsity, stack.num_blocks, config)
    kept = items_of(items, stack)
    if influence is None:
        influence = block_influence(stack, (torch.tensor([item.tokens]) for item in kept))
    initial = space.initial(influence, random.Random(seed), config.genetic.population)
    skipper = TokenSkipper(stack, initial["uniform"], kv=kv)
    return find_schedule(
        space,
        _loss_of(skipper, kept, objective),
        initial=initial,
        seed=seed,
        memo=memo,
        on_generation=on_generation,
    )


def finetune_schedule(
    skipper: TokenSkipper,
    items: Sequence[Any],
    *,
    config: ScheduleConfig | None = None,
    objective: Objective = "nll",
    seed: int = 0,
    memo: MutableMapping[Any, float] | None = None,
    on_generation: Callable[[Generation], None] | None = None,
) -> Searched:
    """Step 3: search on from the schedule of ``skipper``, its router deciding, with changes half as large.

    Arguments as of `search_schedule`; the mean stays that of the skipper's schedule.
    """
    stack, config = skipper.stack, (config or ScheduleConfig()).replace(first_dense=True)
    space = ScheduleSpace.of(skipper.sparsity, stack.num_blocks, config)
    return find_schedule(
        space,
        _loss_of(skipper, items_of(items, stack), objective),
        initial={"searched": space.exact(skipper.schedule)},
        seed=seed,
        scale=0.5,
        memo=memo,
        on_generation=on_generation,
    )


def _loss_of(skipper: TokenSkipper, items: list[Item], objective: Objective) -> Callable[[Schedule], float]:
    """The loss of a schedule."""
    if objective == "kl":
        loss = kl_loss(skipper.stack, items)
        return lambda schedule: loss(skipper.with_schedule(schedule))
    return lambda schedule: calibration_loss(skipper.with_schedule(schedule), items)
