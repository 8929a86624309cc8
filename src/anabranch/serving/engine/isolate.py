"""`Isolation`: a step that raises is run again one request at a time, so that it ends those alone that it fails for."""

import logging
from collections.abc import Callable, Sequence

from anabranch.serving.core.batch import PENDING, Chunk, Sampled

__all__ = ["Isolation"]

logger = logging.getLogger(__name__)

# Steps in a row that fail with a single request in each: then it is hardly the requests.
_MOST_FAILED = 3


class Isolation:
    """Runs steps.

    To run a chunk again is to write the same keys and values to the same places. What fails for every one of several requests, or for the
    only one of three steps in a row, is a failure of the engine, and is raised; so is the loss of another process.

    Args:
        step: what a step of these chunks, with these tokens, gives; it must not have taken a sample where it raises.
    """

    def __init__(self, step: Callable[[Sequence[Chunk], Sequence[int]], list[Sampled]]) -> None:
        self._step = step
        self._failed = 0

    def run(self, chunks: Sequence[Chunk], tokens: Sequence[int]) -> list[Sampled]:
        """What the step gives, with `Sampled.error` of each request that it fails for."""
        try:
            results = self._step(chunks, tokens)
        except ConnectionError:
            raise
        except Exception as error:
            results = self._apart(chunks, tokens, error)
        else:
            self._failed = 0
        return results

    def _apart(self, chunks: Sequence[Chunk], tokens: Sequence[int], error: Exception) -> list[Sampled]:
        if len(chunks) == 1:
            self._failed += 1
            if self._failed >= _MOST_FAILED:
                raise error
            return [_failure(chunks[0], error)]
        logger.warning(
            "a step of %d requests failed (%s: %s); they run one by one", len(chunks), type(error).__name__, error
        )
        results: list[Sampled] = []
        start = num_failed = 0
        for chunk in chunks:
            own = tokens[start : start + len(chunk.tokens)]
            start += len(chunk.tokens)
            try:
                results += self._step([chunk], own)
            except ConnectionError:
                raise
            except Exception as own_error:
                num_failed += 1
                results.append(_failure(chunk, own_error))
        if num_failed == len(chunks):
            raise error
        self._failed = 0
        return results


def _failure(chunk: Chunk, error: Exception) -> Sampled:
    logger.error("request %s failed in a step", chunk.id, exc_info=error)
    # The next step may be formed already, with the token that this one does not give: it gets one that nobody is told.
    token = 0 if chunk.samples else PENDING
    return Sampled(id=chunk.id, token=token, error=f"the request failed in a step: {type(error).__name__}: {error}")
