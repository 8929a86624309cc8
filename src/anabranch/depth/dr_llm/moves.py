"""Edits of a path: what Dr.LLM's search may do to the list of blocks that a model runs.

A move deletes one or two entries that follow each other, at any place, or doubles one in place. A block is on a path at most twice, and a
path has one to 2 L entries.
"""

from anabranch.depth.decisions import MOST_VISITS

__all__ = ["DELETED_AT_ONCE", "Steps", "in_common", "moves_of"]

Steps = tuple[int, ...]

# Entries that one move may delete.
DELETED_AT_ONCE = 2


def in_common(first: Steps, second: Steps) -> int:
    """How many entries two paths have in common from the start."""
    return next(
        (place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )


def moves_of(path: Steps, num_blocks: int) -> list[Steps]:
    """The paths that one move makes of ``path``, each once, in a fixed order; ``path`` itself is none of them.

    Args:
        path: block numbers.
        num_blocks: L, of the model.
    """
    found: dict[Steps, None] = {}
    for count in range(1, DELETED_AT_ONCE + 1):
        for place in range(len(path) - count + 1):
            found[path[:place] + path[place + count :]] = None
    if len(path) < MOST_VISITS * num_blocks:
        for place, block in enumerate(path):
            if path.count(block) < MOST_VISITS:
                found[path[: place + 1] + path[place:]] = None
    return [steps for steps in found if steps]
