"""`Isolation`: a step that raises is run again one request at a time, so that it ends those alone that it fails for."""

import logging
from collections.abc import Callable, Sequence

from anabranch.serving.core.batch import PENDING, Chunk, Sampled

__all__ = ["Isolation"]

logger = logging.getLogger(__name__)


class Isolation:
    """Runs steps.

    To run a chunk again is to write the same keys and values to the same places. Where a step fails for all its requests, the engine may be
    what fails: that is found out by a token of nobody's, and raised; so is the loss of another process.

    Args:
        step: what a step of these chunks, with these tokens, gives; it must not have taken a sample where it raises.
        try_out: runs a token of nobody's, and raises where that fails; it may use the blocks of a chunk, and leaves them as they are.
    """

    def __init__(
        self, step: Callable[[Sequence[Chunk], Sequence[int]], list[Sampled]], try_out: Callable[[Chunk], None]
    ) -> None:
        self._step, self._try_out = step, try_out

    def run(self, chunks: Sequence[Chunk], tokens: Sequence[int]) -> list[Sampled]:
        """What the step gives, with `Sampled.error` of each request that it fails for."""
        try:
            return self._step(chunks, tokens)
        except ConnectionError:
            raise
        except Exception as error:
            failures: dict[str, Exception] = {chunks[0].id: error}
            results = [] if len(chunks) == 1 else self._apart(chunks, tokens, failures, error)
            if len(failures) == len(chunks):
                self._check_engine(chunks[-1], error)
        given = {result.id: result for result in results}
        given |= {chunk.id: _failure(chunk, failures[chunk.id]) for chunk in chunks if chunk.id in failures}
        return [given[chunk.id] for chunk in chunks if chunk.id in given]

    def _apart(
        self, chunks: Sequence[Chunk], tokens: Sequence[int], failures: dict[str, Exception], error: Exception
    ) -> list[Sampled]:
        """What each chunk gives alone; fills in ``failures``, by request."""
        logger.warning(
            "a step of %d requests failed (%s: %s); they run one by one", len(chunks), type(error).__name__, error
        )
        failures.clear()
        results: list[Sampled] = []
        start = 0
        for chunk in chunks:
            own = tokens[start : start + len(chunk.tokens)]
            start += len(chunk.tokens)
            try:
                results += self._step([chunk], own)
            except ConnectionError:
                raise
            except Exception as own_error:
                failures[chunk.id] = own_error
        return results

    def _check_engine(self, chunk: Chunk, error: Exception) -> None:
        try:
            self._try_out(chunk)
        except Exception:
            logger.exception("a token of nobody's fails as well: it is the engine")
            raise error from None


def _failure(chunk: Chunk, error: Exception) -> Sampled:
    logger.error("request %s failed in a step", chunk.id, exc_info=error)
    # The next step may be formed already, with the token that this one does not give: it gets one that nobody is told.
    token = 0 if chunk.samples else PENDING
    return Sampled(id=chunk.id, token=token, error=f"the request failed in a step: {type(error).__name__}: {error}")
