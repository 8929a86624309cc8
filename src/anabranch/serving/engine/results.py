"""What a step gives each request that it answers: tokens with their routes, scores of the prompt, a vector, in one `Sampled`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anabranch.serving.core.batch import Chunk, Sampled
from anabranch.serving.engine.explained import TokenRoute

__all__ = ["joined", "tell_routes"]


def joined(
    sampled: Sequence[Sampled], scored: Mapping[str, Sampled], pooled: Mapping[str, Sampled]
) -> dict[str, Sampled]:
    """All that a step gives each request, by id: a token, scores of its prompt, a vector."""
    results = {result.id: result for result in sampled}
    for id, found in scored.items():
        result = results.setdefault(id, found)
        result.prompt_logprobs, result.error = found.prompt_logprobs, result.error or found.error
    for id, found in pooled.items():
        result = results.setdefault(id, found)
        result.embedding, result.error = found.embedding, result.error or found.error
    return results


def tell_routes(
    sampled: Sequence[Sampled],
    chunks: Sequence[Chunk],
    rows: Sequence[int],
    routes: Mapping[int, TokenRoute],
    explain: Callable[[str, TokenRoute], dict[str, Any]],
) -> None:
    """Give each token that was sampled the route of its row, and what ``explain`` makes of that for a request."""
    if not routes:
        return
    start = 0
    for first, chunk in zip(sampled, [chunk for chunk in chunks if chunk.samples], strict=True):
        for result, row in zip((first, *first.later), rows[start:], strict=False):
            if row in routes:
                result.routing, result.explained = dict(routes[row]), explain(first.id, routes[row])
        start += chunk.num_samples
