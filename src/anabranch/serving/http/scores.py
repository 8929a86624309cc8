"""`PromptScores`: log probabilities of an echoed prompt, computed for one of its choices and shown with each."""

import asyncio
from collections.abc import Sequence

from anabranch.serving.core.request import TokenLogprob


class PromptScores:
    """Those of one prompt.

    Args:
        num_tokens: of the prompt, at least one.

    Attributes:
        rows: of the prompt's tokens after the first, so far.
    """

    def __init__(self, num_tokens: int) -> None:
        # Nothing comes before the first token.
        self._num_rows = num_tokens - 1
        self.rows: list[TokenLogprob] = []
        self._all = asyncio.Event()
        self.add(())

    @property
    def is_complete(self) -> bool:
        """Whether all are there."""
        return self._all.is_set()

    def add(self, rows: Sequence[TokenLogprob]) -> None:
        """The next ones."""
        self.rows += rows
        if len(self.rows) >= self._num_rows:
            self._all.set()

    async def wait(self) -> None:
        """Until all are there."""
        await self._all.wait()
