"""`BlockPool`: who holds which block of the key-value cache, and which free blocks still hold something worth finding again.

A block is a number; the keys and values themselves are the runner's. A block is *held* (its count of holders is above zero) or *free*.
Free blocks wait in one doubly linked list: at its front those that hold nothing, behind them those that were given a key, least
recently used first. Taking a block takes the front, so what is cached goes last, and the tail of a chain before its head.

Source: PagedAttention (Kwon et al., SOSP 2023) for blocks, counts and copy on write.
"""

from collections.abc import Callable, Iterable, Sequence

from anabranch.errors import ConfigError, InputError


class BlockPool:
    """Blocks 0 to ``num_blocks - 1`` of ``block_tokens`` tokens each. Every operation is O(1) a block.

    Args:
        num_blocks: how many there are.
        block_tokens: tokens in each.
        evicted: told (key, block) when a block that was found by a key is about to be used for something else.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int = 16, evicted: Callable[[bytes, int], None] | None = None
    ) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ConfigError(f"num_blocks is {num_blocks} and block_tokens {block_tokens}; both must be at least 1")
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.evictions = 0
        self._evicted = evicted
        self._holders = [0] * num_blocks
        self._key: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # The list of free blocks; the entry behind the last block is both its ends.
        self._next = [*range(1, num_blocks + 1), 0]
        self._previous = [num_blocks, *range(num_blocks)]
        self._num_free = self._num_spare = num_blocks
        # Of each block, whether it is free and stands in front of those that are worth finding again.
        self._is_spare = bytearray([1]) * num_blocks

    @property
    def num_spare(self) -> int:
        """Free blocks that hold nothing, or what is spent: taking them loses nothing. They are taken first."""
        return self._num_spare

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones among them."""
        return self._num_free

    @property
    def num_cached(self) -> int:
        """Blocks that a key finds."""
        return len(self._block_of)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill, the last perhaps in part."""
        return -(-num_tokens // self.block_tokens)

    def holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block]

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks, each with one holder, or None (and nothing changed) if fewer are free."""
        if count > self._num_free:
            return None
        following, end, taken = self._next, self.num_blocks, []
        block = following[end]
        for _ in range(count):
            taken.append(block)
            self._holders[block] = 1
            self._num_spare -= self._is_spare[block]
            self._is_spare[block] = 0
            if self._key[block] is not None:
                self._forget(block)
            block = following[block]
        following[end], self._previous[block] = block, end
        self._num_free -= count
        return taken

    def append(self, blocks: list[int], num_tokens: int) -> bool:
        """Lengthen ``blocks`` until it holds ``num_tokens`` tokens; False (and nothing changed) if too few are free."""
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing <= 0:
            return True
        taken = self.allocate(missing)
        if taken is None:
            return False
        blocks += taken
        return True

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for each of ``blocks``, which are held by others or cached."""
        for block in blocks:
            if self._holders[block] == 0:
                self._unlink(block)
            self._holders[block] += 1

    def fork(self, blocks: Sequence[int], num_tokens: int) -> tuple[list[int], tuple[tuple[int, int], ...]] | None:
        """A second sequence with the same ``num_tokens`` tokens: (its blocks, (from, to) blocks to copy), or None if there is no room.

        Full blocks are shared. A last one that is full in part would be written by both, so the new sequence gets its own.
        """
        full = num_tokens // self.block_tokens
        own = self.allocate(self.blocks_for(num_tokens) - full)
        if own is None:
            return None
        self.hold(blocks[:full])
        return [*blocks[:full], *own], tuple(zip(blocks[full : full + len(own)], own, strict=True))

    def free(self, blocks: Sequence[int], *, is_spent: bool = False) -> None:
        """One holder less for each of a sequence's ``blocks``. Those nobody holds go back, the tail of the sequence to be taken first.

        With ``is_spent`` they are taken before all others: a key finds them no longer than that.
        """
        for block in reversed(blocks):
            holders = self._holders[block] - 1
            if holders < 0:
                raise InputError(f"block {block} is freed, but nobody holds it")
            self._holders[block] = holders
            if holders == 0:
                self._link(block, at_front=is_spent)

    def publish(self, block: int, key: bytes) -> bool:
        """Let ``key`` find a held block that is full; False if another block has the key already (this one stays without)."""
        if self._holders[block] == 0 or self._key[block] is not None:
            raise InputError(
                f"block {block} is {'free' if self._holders[block] == 0 else 'published'}; it cannot be given a key"
            )
        if key in self._block_of:
            return False
        self._block_of[key], self._key[block] = block, key
        return True

    def find(self, key: bytes) -> int | None:
        """The block that ``key`` finds. `hold` it before anything else is allocated."""
        return self._block_of.get(key)

    def forget_all(self) -> int:
        """Take every key away; how many there were. Held blocks stay held."""
        count = len(self._block_of)
        for block in self._block_of.values():
            self._key[block] = None
            if self._holders[block] == 0:
                self._is_spare[block] = 1
        self._num_spare = self._num_free
        self._block_of.clear()
        return count

    def check(self) -> None:
        """Raise AssertionError if the books do not balance: for tests, O(blocks)."""
        end, free = self.num_blocks, []
        block = self._next[end]
        while block != end:
            assert self._previous[self._next[block]] == block, f"block {block} is linked one way only"
            free.append(block)
            assert len(free) <= self._num_free, "the list of free blocks is longer than their count"
            block = self._next[block]
        assert len(free) == self._num_free == len(set(free)), "a block is free twice or lost"
        spare = [block for block in free if self._is_spare[block]]
        assert spare == free[: self._num_spare], "what holds nothing is not in front"
        assert sum(self._is_spare) == self._num_spare, "a held block is spare"
        assert all(self._key[block] is not None for block in free[len(spare) :]), "a block that holds nothing is kept"
        held = {block for block, holders in enumerate(self._holders) if holders}
        assert held.isdisjoint(free), "a held block is free"
        assert len(held) + len(free) == self.num_blocks, "a block is neither held nor free"
        assert {key: block for block, key in enumerate(self._key) if key is not None} == self._block_of, (
            "keys and blocks disagree"
        )

    def _link(self, block: int, at_front: bool) -> None:
        """Put a block that nobody holds any more into the list: at its end if a key finds it, else at its front."""
        end = self.num_blocks
        is_spare = at_front or self._key[block] is None
        if is_spare:
            before, after = end, self._next[end]
        else:
            before, after = self._previous[end], end
        self._next[before], self._previous[after] = block, block
        self._previous[block], self._next[block] = before, after
        self._num_free += 1
        self._is_spare[block] = is_spare
        self._num_spare += is_spare

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self._num_free -= 1
        self._num_spare -= self._is_spare[block]
        self._is_spare[block] = 0

    def _forget(self, block: int) -> None:
        key = self._key[block]
        assert key is not None
        self._key[block] = None
        del self._block_of[key]
        self.evictions += 1
        if self._evicted is not None:
            self._evicted(key, block)
