"""What FTP is compared with, each at the work that it does, as measured.

    dense        the model as it is
    random       random tokens of the prompt pass blocks over, the same share in each block
    static       the static router, the same share in each block
    searched     the static router with the schedule given
    truncation   the tokens that the static router passes over are cut out before the model
    shortgpt     whole blocks left out, those of least influence, in prompt and continuation (arXiv 2403.03853)

ShortGPT can only leave out whole blocks: as many as leave it at least the work that the skipper takes, so it is never at a disadvantage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.depth.ftp.evaluate import Evaluation, evaluate_items, evaluate_path, evaluate_truncated
from anabranch.depth.ftp.items import items_of
from anabranch.depth.ftp.passes import dense_work
from anabranch.depth.ftp.skipper import TokenSkipper
from anabranch.depth.influence import least_influence_first
from anabranch.depth.stack import BlockStack

__all__ = ["Contestant", "compare", "equal_work_path"]


@dataclass(frozen=True)
class Contestant:
    """One row of a comparison.

    Attributes:
        name: short.
        about: what it is.
        found: what it gave.
    """

    name: str
    about: str
    found: Evaluation


def equal_work_path(
    stack: BlockStack, influence: Sequence[float], lengths: Sequence[int], work: int
) -> tuple[int, ...]:
    """The path of ShortGPT with the fewest blocks that still does at least ``work`` multiply-adds on sequences of these lengths."""
    gone: set[int] = set()
    left = sum(dense_work(stack, length) for length in lengths)
    for layer in least_influence_first(influence):
        left -= sum(dense_work(stack, length, (layer,)) for length in lengths)
        if left < work:
            break
        gone.add(layer)
    return tuple(layer for layer in range(stack.num_blocks) if layer not in gone)


def compare(
    skipper: TokenSkipper, items: Sequence[Any], influence: Sequence[float], *, seed: int = 0
) -> list[Contestant]:
    """A skipper and its baselines on the same items.

    Args:
        skipper: ours.
        items: `Item`, or pairs of (prompt, continuation) ids, on which nothing was fitted.
        influence: of each block, measured elsewhere (`block_influence`).
        seed: of random tokens.
    """
    stack, kept = skipper.stack, items_of(items, skipper.stack)
    # All blocks but the first pass over the same share, so that the mean is that of ours.
    blocks = stack.num_blocks
    uniform = (0.0, *[min(skipper.sparsity * blocks / (blocks - 1), 1.0)] * (blocks - 1)) if blocks > 1 else (0.0,)
    ours = evaluate_items(skipper, kept)
    path = equal_work_path(stack, influence, [len(item.tokens) - 1 for item in kept], ours.work)
    by_place = skipper.changed(router="static")
    names = "".join(f" {layer}" for layer in range(stack.num_blocks) if layer not in path) or " none"
    return [
        Contestant("dense", "the model as it is", evaluate_path(stack, kept)),
        Contestant("ours", "the skipper", ours),
        Contestant("searched", "static router, the same schedule", evaluate_items(by_place, kept)),
        Contestant("static", "static router, uniform", evaluate_items(by_place.changed(schedule=uniform), kept)),
        Contestant(
            "random",
            "random tokens, uniform",
            evaluate_items(skipper.changed(router="random", schedule=uniform, seed=seed), kept),
        ),
        Contestant("truncation", "prompts cut before the model", evaluate_truncated(stack, kept, skipper.sparsity)),
        Contestant("shortgpt", f"without blocks{names}", evaluate_path(stack, kept, path)),
    ]
