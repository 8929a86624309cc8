"""Texts parted before rows are cut from them, so that what is judged on is nothing that anything was fitted on."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

# So many tokens in a row are the same text; fewer are a turn of phrase.
RUN = 16
# Of all tokens, those of texts that rows to be judged on are cut from, at most.
JUDGED_SHARE = 1 / 3
# So often a row is drawn for each that is wanted, before there are too few.
TRIES = 50
Tokens = Sequence[int]
T = TypeVar("T", bound=Tokens)


def runs_of(tokens: Tokens) -> set[tuple[int, ...]]:
    """Every run of 16 tokens, or all of fewer."""
    return {tuple(tokens[start : start + RUN]) for start in range(max(1, len(tokens) - RUN + 1))}


def parted(texts: Sequence[T], draw: random.Random) -> tuple[list[T], list[T]]:
    """Texts to fit on and texts to be judged on, by chance; of two that share a run of 16 tokens both are on one side.

    Those to be judged on have at most a third of all tokens.
    """
    groups = _groups(texts)
    draw.shuffle(groups)
    room = JUDGED_SHARE * sum(map(len, texts))
    fitted, judged = list[T](), list[T]()
    for group in groups:
        size = sum(map(len, group))
        if size <= room:
            room -= size
            judged += group
        else:
            fitted += group
    return fitted, judged


def _groups(texts: Sequence[T]) -> list[list[T]]:
    """Texts with all that share a run with one of them, and so on."""
    above = list(range(len(texts)))

    def root(number: int) -> int:
        while above[number] != number:
            above[number] = above[above[number]]
            number = above[number]
        return number

    first: dict[tuple[int, ...], int] = {}
    for number, text in enumerate(texts):
        for run in runs_of(text):
            above[root(number)] = root(first.setdefault(run, number))
    groups = defaultdict[int, list[T]](list)
    for number, text in enumerate(texts):
        groups[root(number)].append(text)
    return list(groups.values())
