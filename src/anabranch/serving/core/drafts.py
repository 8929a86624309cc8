"""`Drafts`: tokens that are guessed for requests that decode, put into a step that is formed, and what becomes of them.

They take what the step has left: the budget of tokens when every request has got its own, and blocks that hold nothing, which go back as
soon as the step has run. So nobody is sent back for a guess, and nothing that may be found again goes for one. A step with guesses is
longer, and everyone in it waits for its end: beside others there are at most as many guesses as requests that decode, shared in turn
among those that guess, so the rows of decoding at most double. A request that is alone in its step guesses as many as are allowed.
"""

from collections.abc import Sequence

from anabranch.serving.core.batch import Chunk
from anabranch.serving.core.lookup import PromptLookup
from anabranch.serving.core.state import RequestState
from anabranch.serving.core.tables import BlockTables
from anabranch.sharing import even_shares

# Places of texts that are read in a step, about two milliseconds: who has a longer prompt begins to guess some steps later.
MOST_READ = 4096


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
        self._turn = 0
        self.drafted = self.accepted = 0

    def extend(self, parts: Sequence[tuple[RequestState, int, Chunk]], budget: int) -> int:
        """Lengthen chunks of one token that sample; the budget that is left."""
        decodes = [(state, chunk) for state, _, chunk in parts if chunk.samples and len(chunk.tokens) == 1]
        room = budget if len(parts) == 1 else min(budget, len(decodes))
        if not room or not decodes:
            return budget
        # Who is served first, where there is not enough for all, is another one each time.
        first = self._turn % len(decodes)
        self._turn += 1
        guesses = self._guesses([*decodes[first:], *decodes[:first]], room)
        counts = even_shares([len(guess) for _, _, guess in guesses], room)
        for (state, chunk, guess), count in zip(guesses, counts, strict=True):
            budget -= self._put(state, chunk, guess[:count])
        return budget

    def _guesses(
        self, decodes: Sequence[tuple[RequestState, Chunk]], room: int
    ) -> list[tuple[RequestState, Chunk, list[int]]]:
        """Of those that have any."""
        made, reading = [], MOST_READ
        for state, chunk in decodes:
            if state.lookup is None:
                state.lookup = PromptLookup(self._ngram, self._most)
            # The token that the chunk samples anyway is the last of ``tokens``, and pending.
            length = len(state.tokens) - state.num_pending
            missing = state.lookup.missing(length)
            if missing > reading:
                state.lookup.read(state.tokens, length - missing + reading)
                reading = 0
                continue
            reading -= missing
            guess = state.lookup.guess(
                state.tokens, length, min(self._most, room, state.most_tokens - len(state.tokens))
            )
            # Behind an end of the text nothing would be kept.
            end = next((at for at, token in enumerate(guess) if token in state.stop_tokens), len(guess))
            if end:
                made.append((state, chunk, guess[:end]))
        return made

    def _put(self, state: RequestState, chunk: Chunk, guess: Sequence[int]) -> int:
        """As many tokens of a guess as there are blocks for; how many."""
        count = min(len(guess), self._tables.can_hold_spare(state) - chunk.start - 1)
        if count <= 0:
            return 0
        self._tables.grow(state, chunk.start + 1 + count)
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
