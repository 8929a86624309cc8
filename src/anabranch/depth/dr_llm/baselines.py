"""What routers have to beat at the same number of layers: skipping at random, removing the same blocks always, and leaving early.

The mean number of layers that routers use is no whole number, so baselines mix two neighbouring numbers of blocks over the questions, such
that the mean is the same; over tokens, where questions have different numbers of them. Routers that see the states before the first block
alone are a bank with ``features="first"``.
"""

import bisect
import math
import random
from collections.abc import Callable, Sequence

from anabranch.depth.dr_llm.moves import Steps
from anabranch.depth.dr_llm.settings import seed_of
from anabranch.depth.influence import without_least
from anabranch.errors import ConfigError

__all__ = ["early_exit", "random_skip", "shortgpt", "spread"]


def spread(
    mean_layers: float, count: int, num_blocks: int, seed: int = 0, *, tokens: Sequence[int] | None = None
) -> list[int]:
    """Numbers of blocks for ``count`` sequences, two neighbouring ones, whose mean is ``mean_layers``, or nearly.

    Args:
        mean_layers: wanted, from 0 to ``num_blocks``.
        count: sequences.
        num_blocks: of the model.
        seed: of which sequences have the larger number.
        tokens: of each sequence, by which the mean is weighted; None for equally many. The mean is then missed by what no exchange of two
            sequences makes smaller.

    Raises ConfigError for another mean, or another number of ``tokens``.
    """
    if not 0 <= mean_layers <= num_blocks:
        raise ConfigError(
            f"mean_layers is {mean_layers}; it must be from 0 to {num_blocks}, since a baseline repeats no block"
        )
    if tokens is not None and (len(tokens) != count or any(length < 1 for length in tokens)):
        raise ConfigError(f"tokens is {list(tokens)!r:.80}; it must be a number from 1 for each of {count} sequences")
    order = sorted(range(count), key=lambda place: seed_of(seed, "spread", str(place)))
    if tokens is None or len(set(tokens)) <= 1:
        least, more = divmod(round(mean_layers * count), count) if count else (0, 0)
        taken = set(order[:more])
    else:
        least = math.floor(mean_layers)
        taken = _of_sum((mean_layers - least) * sum(tokens), tokens, order)
    return [least + (place in taken) for place in range(count)]


def _of_sum(wanted: float, sizes: Sequence[int], order: Sequence[int]) -> set[int]:
    """Places whose sizes add up to about ``wanted``: the first in ``order`` that have room, then exchanged while that comes nearer."""
    taken, left = set[int](), wanted
    for place in order:
        if sizes[place] <= left:
            taken.add(place)
            left -= sizes[place]
    while True:
        # None stands for no place: one is then only added, or only given back.
        out = sorted(((sizes[place], place) for place in order if place not in taken), key=lambda one: one[0])
        out_sizes = [0, *(size for size, _ in out)]
        out_places = [None, *(place for _, place in out)]
        best = abs(left)
        change: tuple[int | None, int | None] = (None, None)
        for given in (None, *(place for place in order if place in taken)):
            room = left + (0 if given is None else sizes[given])
            at = bisect.bisect_left(out_sizes, room)
            for index in {max(at - 1, 0), min(at, len(out_sizes) - 1)}:
                # Sums of floats: nothing that is nearer by rounding alone, or it would not end.
                if abs(room - out_sizes[index]) < best - 1e-6:
                    best, change = abs(room - out_sizes[index]), (given, out_places[index])
        if change == (None, None):
            return taken
        given, added = change
        left += (0 if given is None else sizes[given]) - (0 if added is None else sizes[added])
        taken = (taken - {given}) | ({added} if added is not None else set())


def _paths(
    mean_layers: float,
    count: int,
    num_blocks: int,
    seed: int,
    tokens: Sequence[int] | None,
    keep: Callable[[int, int], Steps],
) -> list[Steps]:
    numbers = spread(mean_layers, count, num_blocks, seed, tokens=tokens)
    return [keep(number, place) for place, number in enumerate(numbers)]


def random_skip(
    num_blocks: int, mean_layers: float, count: int, *, seed: int = 0, tokens: Sequence[int] | None = None
) -> list[Steps]:
    """A path for each of ``count`` sequences, with blocks drawn without replacement; ``tokens`` as of `spread`."""

    def keep(number: int, place: int) -> Steps:
        draw = random.Random(seed_of(seed, "random skip", str(place)))
        return tuple(sorted(draw.sample(range(num_blocks), number)))

    return _paths(mean_layers, count, num_blocks, seed, tokens, keep)


def shortgpt(
    influence: Sequence[float], mean_layers: float, count: int, *, seed: int = 0, tokens: Sequence[int] | None = None
) -> list[Steps]:
    """The blocks that change their input most, for all sequences alike.

    Args:
        influence: 1 - cos(in, out) of each block, see `anabranch.depth.influence.block_influence`.
        mean_layers: blocks that are kept.
        count: sequences.
        seed: of which sequences have the larger of two numbers.
        tokens: of each sequence, as of `spread`.
    """
    num_blocks = len(influence)
    return _paths(
        mean_layers, count, num_blocks, seed, tokens, lambda number, _: without_least(influence, num_blocks - number)
    )


def early_exit(
    num_blocks: int, mean_layers: float, count: int, *, seed: int = 0, tokens: Sequence[int] | None = None
) -> list[Steps]:
    """The first blocks; the head reads what they leave. ``tokens`` as of `spread`."""
    return _paths(mean_layers, count, num_blocks, seed, tokens, lambda number, _: tuple(range(number)))
