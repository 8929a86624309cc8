"""`Kind`: blocks of the layers of a model that see equally far back, all positions or a window of the last so many.

A request has one logical sequence of blocks. Each kind of layers has memory of its own for it, and a table of its own: the numbers of the
blocks in that memory, in order. What lies before the window of every token that is still to be computed is given back, and `GONE` stands
in its place in the table, so that place i is of the same tokens in each. vLLM calls a kind a KV cache group.
"""

from bisect import bisect_left
from collections.abc import Sequence

from anabranch.serving.core.blocks import BlockPool

__all__ = ["GONE", "Kind", "match", "most_blocks", "most_new"]

# In a table: no token to come sees that block.
GONE = -1


def most_blocks(window: int, num_new: int, block_tokens: int) -> int:
    """Blocks for ``num_new`` tokens and what the first of them sees before it, wherever in a block they begin."""
    return -(-(window - 2 + num_new) // block_tokens) + 1


def most_new(max_batched_tokens: int, long_prefill_chunk: int | None, prompt_lookup: int, *, is_async: bool) -> int:
    """Tokens of one request that steps under way, and the one that is formed, compute at most; arguments as `SchedulerConfig`'s."""
    chunk = min(max_batched_tokens, max(long_prefill_chunk or max_batched_tokens, 1 + prompt_lookup))
    return chunk * 2 if is_async else chunk


class Kind:
    """The blocks of one kind of layers.

    Args:
        pool: all of them.
        window: positions that a token sees, its own among them; None for all.
        num_new: of layers with a window, tokens of one request that steps under way, and the one that is formed, compute at most.

    Attributes:
        num_held: blocks that will be free when the steps under way have run.
        limit: tokens of the longest request that always fits alone; None for any length.
    """

    def __init__(self, pool: BlockPool, window: int | None = None, num_new: int = 1) -> None:
        self.pool, self.window = pool, window
        self.num_held = 0
        self.limit: int | None = pool.num_blocks * pool.block_tokens
        self._most = pool.num_blocks
        if window is not None:
            self._most = min(self._most, most_blocks(window, num_new, pool.block_tokens))
            if pool.num_blocks >= most_blocks(window, 1, pool.block_tokens):
                self.limit = None

    def first(self, num_tokens: int) -> int:
        """The first block that tokens behind the first ``num_tokens`` see."""
        return 0 if self.window is None else max(0, num_tokens + 1 - self.window) // self.pool.block_tokens

    def num_gone(self, table: Sequence[int]) -> int:
        """Blocks of a table that were given back."""
        return 0 if self.window is None else bisect_left(table, True, key=_is_there)

    def missing(self, table: Sequence[int], num_tokens: int) -> int:
        """Blocks that a request of so many tokens lacks; with a window, at any one time until it has computed them."""
        blocks = self.pool.blocks_for(num_tokens)
        if self.window is None:
            return blocks - len(table)
        gone = self.num_gone(table)
        return max(0, min(blocks - gone, self._most) - (len(table) - gone))

    def can_hold(self, table: Sequence[int]) -> int:
        """Tokens that a request has room for with all that is free."""
        return (len(table) + self.pool.num_free) * self.pool.block_tokens

    def hold(self, table: Sequence[int]) -> None:
        """One more holder for what is left of a table."""
        self.pool.hold(table[self.num_gone(table) :])

    def free(self, table: Sequence[int]) -> None:
        """One holder less."""
        self.pool.free(table[self.num_gone(table) :])

    def trim(self, table: list[int], num_tokens: int, num_prompt: int) -> bool:
        """Give back what no token behind the first ``num_tokens`` sees; whether there was anything.

        Other requests begin as a prompt does, so what is in it may be looked for again; the middle of an answer is not, and taking that
        first a long answer lives on its own blocks.
        """
        gone, first = self.num_gone(table), min(self.first(num_tokens), len(table))
        if first <= gone:
            return False
        asked = min(max(gone, self.pool.blocks_for(num_prompt)), first)
        self.pool.free(table[gone:asked])
        self.pool.free(table[asked:first], is_spent=True)
        table[gone:first] = [GONE] * (first - gone)
        return True


def match(kinds: Sequence[Kind], keys: Sequence[bytes]) -> list[list[int]]:
    """Tables of the longest known prefix of ``keys``: of as many blocks that each kind has all of them that the next token sees.

    The last of them the first kind has, also where no token sees it, as behind a window of one: else nobody has been there.

    `Kind.hold` them before anything else is allocated.
    """
    size = kinds[0].pool.block_tokens
    found: list[list[int]] = [[] for _ in kinds]
    # Where the blocks without a gap, of which the last is the newest, begin.
    begins = [0] * len(kinds)
    length = 0
    for number, key in enumerate(keys, start=1):
        fits = kinds[0].pool.find(key) is not None
        for place, kind in enumerate(kinds):
            block = kind.pool.find(key)
            if block is None:
                if kind.window is None:
                    return _cut(kinds, found, length)
                begins[place] = number
            found[place].append(GONE if block is None else block)
            fits = fits and begins[place] <= kind.first(number * size)
        if fits:
            length = number
    return _cut(kinds, found, length)


def _cut(kinds: Sequence[Kind], found: Sequence[list[int]], length: int) -> list[list[int]]:
    tables = []
    for kind, blocks in zip(kinds, found, strict=True):
        first = kind.first(length * kind.pool.block_tokens)
        tables.append([GONE] * first + blocks[first:length])
    return tables


def _is_there(block: int) -> bool:
    return block != GONE
