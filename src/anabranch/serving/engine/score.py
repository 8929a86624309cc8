"""Scores of prompts: the log probability of each token by the row before it, a few rows at a time."""
# Shapes: S rows to score, V vocabulary, D width

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from anabranch.serving.core.batch import PENDING, Chunk, Sampled
from anabranch.serving.core.request import TokenLogprob
from anabranch.serving.sampling.logprobs import logprobs, not_numbers

# Rows whose logits are there at once: a step may have thousands, and a vocabulary hundreds of thousands of tokens.
TILE = 128


def scored_rows(chunks: Sequence[Chunk]) -> list[int]:
    """Rows of a step whose logits score a token of a prompt, in the order of all targets."""
    rows: list[int] = []
    first = 0
    for chunk in chunks:
        start = first + chunk.first_scored
        rows += range(start, start + len(chunk.targets))
        first += len(chunk.tokens)
    return rows


def score(
    x_SD: Tensor, head: Callable[[Tensor, int], Tensor], chunks: Sequence[Chunk], tops: Mapping[str, int]
) -> dict[str, Sampled]:
    """What each chunk with targets is told, by id, as if it did not sample.

    Args:
        x_SD: hidden states of `scored_rows`.
        head: logits_SV of some of them, and at which of all S they begin.
        chunks: of the step.
        tops: how many of the most likely tokens each id wants to know.
    """
    asking = [chunk for chunk in chunks if chunk.targets]
    targets = [token for chunk in asking for token in chunk.targets]
    wanted = [tops[chunk.id] for chunk in asking for _ in chunk.targets]
    told: list[TokenLogprob] = []
    best: list[float] = []
    for start in range(0, len(targets), TILE):
        part = slice(start, start + TILE)
        logits_SV = head(x_SD[part], start)
        best += logits_SV.amax(-1).tolist()
        told += logprobs(logits_SV, targets[part], wanted[part])
    made, first = {}, 0
    for chunk in asking:
        end = first + len(chunk.targets)
        error = next((error for error in map(not_numbers, best[first:end]) if error is not None), None)
        scores = () if error is not None else tuple(told[first:end])
        made[chunk.id] = Sampled(id=chunk.id, token=PENDING, error=error, prompt_logprobs=scores)
        first = end
    return made
