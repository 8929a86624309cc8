"""Sampling where tokens of a step are guessed: each request takes one token after the other, for as long as its guesses hold.

A guess changes nothing but when a token comes. The row before it is sampled as in a step of its own, by the request's own random numbers,
penalties and grammar, which know the tokens before it and no guess; only if that gives the guessed token is the next row sampled. So
outputs are those of plain decoding with any `Sampling`, greedy or not.
"""
# Shapes: R rows that sample, V vocabulary

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from anabranch.serving.core.batch import Batch, Chunk, Sampled

__all__ = ["sampled_rows", "verify", "without_drafts"]

logger = logging.getLogger(__name__)

# Logits of rows, and whose they are, to a token for each.
Sample = Callable[[Tensor, Sequence[str]], list[Sampled]]


def sampled_rows(chunks: Sequence[Chunk]) -> list[int]:
    """The rows of a step that sample: of each chunk that does its last one, and those before its guesses."""
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += len(chunk.tokens)
        rows += range(end - chunk.num_samples, end)
    return rows


def without_drafts(batch: Batch) -> Batch:
    """The same step with nothing guessed."""
    return replace(batch, chunks=tuple([_undrafted(chunk) if chunk.drafts else chunk for chunk in batch.chunks]))


def _undrafted(chunk: Chunk) -> Chunk:
    return replace(chunk, tokens=chunk.tokens[: -chunk.drafts], drafts=0)


def verify(sample: Sample, logits_RV: Tensor, chunks: Sequence[Chunk]) -> list[Sampled]:
    """What each chunk that samples gives, in order, with `Sampled.later` where guesses held.

    Args:
        sample: chooses tokens, which then count as taken.
        logits_RV: of `sampled_rows`.
        chunks: of the step.
    """
    going = [chunk for chunk in chunks if chunk.samples]
    if len(logits_RV) == len(going):
        return sample(logits_RV, [chunk.id for chunk in going])
    row_of, end = {}, 0
    for chunk in going:
        row_of[chunk.id] = end
        end += chunk.num_samples
    results = sample(logits_RV[[row_of[chunk.id] for chunk in going]], [chunk.id for chunk in going])
    found = {result.id: [result] for result in results}
    for depth in range(max(chunk.drafts for chunk in going)):
        going = [chunk for chunk in going if depth < chunk.drafts and _holds(chunk, depth, found[chunk.id])]
        if not going:
            break
        ids = [chunk.id for chunk in going]
        try:
            more = sample(logits_RV[[row_of[id] + depth + 1 for id in ids]], ids)
        except Exception:
            # What was taken cannot be taken back, and need not be: the next step begins with these rows, and meets it again.
            logger.exception("guessed tokens of a step could not be sampled")
            break
        for result in more:
            # Likewise for a row that fails alone.
            if result.error is None:
                found[result.id].append(result)
    for first, *later in found.values():
        first.later = tuple(later)
    return results


def _holds(chunk: Chunk, depth: int, found: Sequence[Sampled]) -> bool:
    """Whether the guess number ``depth`` of a chunk is the token that was sampled for its place."""
    if len(found) <= depth or found[depth].error is not None:
        return False
    return found[depth].token == chunk.tokens[len(chunk.tokens) - chunk.drafts + depth]
