"""`Drafts`: tokens that are guessed for requests that decode, put into a step that is formed, and what becomes of them.

They take what the step has left: the budget of tokens when every request has got its own, and blocks that are free, which go back as soon
as the step has run. So nobody waits for a guess, and nobody is sent back for one. In order of rank, as all else.
"""

from collections.abc import Iterable

from anabranch.serving.core.batch import Chunk
from anabranch.serving.core.lookup import PromptLookup
from anabranch.serving.core.state import RequestState
from anabranch.serving.core.tables import BlockTables


class Drafts:
    """Guesses by `PromptLookup`.

    Args:
        most: tokens guessed for a request in a step.
        ngram: see `PromptLookup`.
        tables: where blocks come from.

    Attributes:
        drafted, accepted: tokens that were guessed in steps that have run, and those of them that were right.
    """

    def __init__(self, most: int, ngram: int, tables: BlockTables) -> None:
        self._most, self._ngram, self._tables = most, ngram, tables
        self.drafted = self.accepted = 0

    def extend(self, parts: Iterable[tuple[RequestState, int, Chunk]], budget: int) -> int:
        """Lengthen chunks of one token that sample; the budget that is left."""
        for state, _, chunk in parts:
            if not budget:
                break
            if chunk.samples and len(chunk.tokens) == 1:
                budget -= self._extend(state, chunk, budget)
        return budget

    def _extend(self, state: RequestState, chunk: Chunk, budget: int) -> int:
        # The token that the chunk samples anyway is the last of ``tokens``, and pending.
        most = min(self._most, budget, state.most_tokens - len(state.tokens))
        if state.lookup is None:
            state.lookup = PromptLookup(self._ngram, self._most)
        guess = state.lookup.guess(state.tokens, len(state.tokens) - state.num_pending, most)
        # Behind an end of the text nothing would be kept.
        count = next((at for at, token in enumerate(guess) if token in state.stop_tokens), len(guess))
        needed = chunk.start + 1 + count
        if count and not self._tables.grow(state, needed):
            count = min(count, len(state.blocks) * self._tables.pool.block_tokens - chunk.start - 1)
        if count:
            chunk.tokens += tuple(guess[:count])
            chunk.drafts, chunk.blocks, chunk.local = count, state.table, state.local_table
        return count

    def settle(self, state: RequestState, chunk: Chunk, right: int) -> None:
        """The step has run: of what was guessed for a request that goes on ``right`` tokens were."""
        self.drafted += chunk.drafts
        self.accepted += right
        if state.lookup is not None:
            state.lookup.learn(chunk.drafts, right)
        self._tables.shrink(state, state.computed)
