"""What routers have to beat at the same number of layers: skipping at random, removing the same blocks always, and leaving early.

The mean number of layers that routers use is no whole number, so baselines mix two neighbouring numbers of blocks over the questions, such
that the mean is the same. Routers that see the states before the first block alone are a bank with ``features="first"``.
"""

import random
from collections.abc import Callable, Sequence

from anabranch.depth.dr_llm.moves import Steps
from anabranch.depth.dr_llm.settings import seed_of
from anabranch.depth.influence import without_least
from anabranch.errors import ConfigError

__all__ = ["early_exit", "random_skip", "shortgpt", "spread"]


def spread(mean_layers: float, count: int, num_blocks: int, seed: int = 0) -> list[int]:
    """Numbers of blocks for ``count`` sequences, two neighbouring ones, whose mean is as near to ``mean_layers`` as it can be.

    Raises ConfigError for a mean that is not from 0 to ``num_blocks``.
    """
    if not 0 <= mean_layers <= num_blocks:
        raise ConfigError(
            f"mean_layers is {mean_layers}; it must be from 0 to {num_blocks}, since a baseline repeats no block"
        )
    total = round(mean_layers * count)
    least, more = divmod(total, count) if count else (0, 0)
    order = sorted(range(count), key=lambda place: seed_of(seed, "spread", str(place)))
    found = [least] * count
    for place in order[:more]:
        found[place] += 1
    return found


def _paths(
    mean_layers: float, count: int, num_blocks: int, seed: int, keep: Callable[[int, int], Steps]
) -> list[Steps]:
    numbers = spread(mean_layers, count, num_blocks, seed)
    return [keep(number, place) for place, number in enumerate(numbers)]


def random_skip(num_blocks: int, mean_layers: float, count: int, *, seed: int = 0) -> list[Steps]:
    """A path for each of ``count`` sequences, with blocks drawn without replacement."""

    def keep(number: int, place: int) -> Steps:
        draw = random.Random(seed_of(seed, "random skip", str(place)))
        return tuple(sorted(draw.sample(range(num_blocks), number)))

    return _paths(mean_layers, count, num_blocks, seed, keep)


def shortgpt(influence: Sequence[float], mean_layers: float, count: int, *, seed: int = 0) -> list[Steps]:
    """The blocks that change their input most, for all sequences alike.

    Args:
        influence: 1 - cos(in, out) of each block, see `anabranch.depth.influence.block_influence`.
        mean_layers: blocks that are kept.
        count: sequences.
        seed: of which sequences have the larger of two numbers.
    """
    num_blocks = len(influence)
    return _paths(mean_layers, count, num_blocks, seed, lambda number, _: without_least(influence, num_blocks - number))


def early_exit(num_blocks: int, mean_layers: float, count: int, *, seed: int = 0) -> list[Steps]:
    """The first blocks; the head reads what they leave."""
    return _paths(mean_layers, count, num_blocks, seed, lambda number, _: tuple(range(number)))
