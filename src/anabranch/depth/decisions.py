"""What a depth router decides of a block: pass it over, run it, run it twice; and the path that such decisions make.

A path is the list of blocks that run, in order, see `anabranch.nn.visits`. Decisions say the same of paths that never go back.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from anabranch.bounds import shown
from anabranch.errors import ConfigError
from anabranch.nn.visits import Path, check_path

__all__ = ["EXECUTE", "MOST_VISITS", "REPEAT", "SKIP", "check_depth_path", "decisions_of", "path_of"]

# A decision is the number of times that the block runs.
SKIP, EXECUTE, REPEAT = 0, 1, 2

# How often a path of depth routing may come to one block (arXiv 2510.12773).
MOST_VISITS = 2


def check_depth_path(path: Path, num_blocks: int, batch: int = 1) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """``path`` in tuples, as `check_path` gives it; one for all sequences where all have the same.

    Args:
        path: the blocks to run, in any order, or such a path for each sequence.
        num_blocks: of the model.
        batch: sequences.

    Raises ConfigError for what `check_path` refuses, and for a block that a path comes to more than twice.
    """
    checked = check_path(path, num_blocks, batch)
    rows: Sequence[Any] = checked if checked and isinstance(checked[0], tuple) else [checked]
    for number, row in enumerate(rows):
        for block, times in Counter(row).items():
            if times > MOST_VISITS:
                whose = "the path" if len(rows) == 1 else f"path {number}"
                raise ConfigError(
                    f"{whose} comes to block {block} {times} times; a block may run at most {MOST_VISITS} times"
                )
    return checked


def decisions_of(path: Sequence[int], num_blocks: int) -> list[int]:
    """The decision on each of the blocks: how often ``path`` runs it.

    Raises ConfigError for a path that `check_depth_path` refuses, or one that goes back to an earlier block, as decisions
    say no order, and for paths of several sequences.
    """
    checked: Any = check_depth_path(path, num_blocks)
    if checked and isinstance(checked[0], tuple):
        raise ConfigError(f"path is {shown(path)}; it must be the blocks of one sequence")
    for before, block in pairwise(checked):
        if block < before:
            raise ConfigError(
                f"the path goes back from block {before} to {block}; decisions say how often a block runs, not in which order"
            )
    times = Counter(checked)
    return [times[block] for block in range(num_blocks)]


def path_of(decisions: Sequence[int]) -> tuple[int, ...]:
    """The path that ``decisions`` make, one of each block, in order.

    Raises ConfigError for a decision that is none of 0 (skip), 1 (execute), 2 (repeat).
    """
    for block, decision in enumerate(decisions):
        if isinstance(decision, bool) or decision not in (SKIP, EXECUTE, REPEAT):
            raise ConfigError(
                f"the decision on block {block} is {decision!r}; it must be 0 (skip), 1 (execute) or 2 (repeat)"
            )
    return tuple(block for block, decision in enumerate(decisions) for _ in range(int(decision)))
