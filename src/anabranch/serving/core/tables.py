"""`BlockTables`: the blocks of requests, from the prefix cache, from a second tier, or new, and back when no step needs them."""

from collections.abc import Container, Iterable, Sequence

from anabranch.serving.core.blocks import BlockPool
from anabranch.serving.core.kinds import Kind
from anabranch.serving.core.prefix import PrefixCache
from anabranch.serving.core.request import Request
from anabranch.serving.core.state import RequestState
from anabranch.serving.core.tier import KVTier


class BlockTables:
    """Gives requests their blocks.

    Args:
        num_blocks, block_tokens: see `BlockPool`.
        has_prefixes: use what is cached.
        tier: where blocks go that have no room on the device.
        num_streams: of requests that do not say it; see `SchedulerConfig`.
        window, local_window, local_blocks: see `SchedulerConfig`.
        num_new: see `Kind`.

    Attributes:
        kinds: of layers, the one that sees furthest back first; one or two.
        pool, prefixes: the blocks of the first kind, and what is found again.
        saves: block that the next batch has to save, by slot: should a tier give a slot twice, what was to be saved first is forgotten.
        loads: (slot, block) that it has to bring back.
    """

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        *,
        has_prefixes: bool,
        tier: KVTier | None = None,
        num_streams: int | None = None,
        window: int | None = None,
        local_window: int | None = None,
        local_blocks: int | None = None,
        num_new: int = 1,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_tokens, self._on_evicted)
        self.kinds = [Kind(self.pool, window, num_new)]
        if local_blocks is not None:
            self.kinds.append(Kind(BlockPool(local_blocks, block_tokens), local_window, num_new))
        self.prefixes = PrefixCache(self.kinds)
        self.saves: dict[int, int] = {}
        self.loads: list[tuple[int, int]] = []
        self._has_prefixes, self._tier, self._num_streams = has_prefixes, tier, num_streams
        # Prefixes that are being computed, and by whom.
        self._coming: dict[bytes, RequestState] = {}
        # Blocks to free, by the step that has to run before.
        self._held: dict[int, list[tuple[list[int], list[int]]]] = {}

    @property
    def usage(self) -> float:
        """Of the blocks of the kind that is used most, the part that requests hold."""
        return max([1 - kind.pool.num_free / kind.pool.num_blocks for kind in self.kinds])

    def most_positions(self) -> int | None:
        """Tokens of the longest request that fits alone; None for any."""
        return min([kind.limit for kind in self.kinds if kind.limit is not None], default=None)

    def look_up(self, state: RequestState) -> list[list[int]] | None:
        """Tables of what is stored of the beginning of a waiting request; None if it had better wait for a step under way."""
        if state.num_pending:
            return None
        if not self._has_prefixes or not state.request.shares_prefix:
            return [[] for _ in self.kinds]
        if not state.root:
            state.root = self.root_of(state.request)
        # All keys, also of blocks that it computes anew: others may wait for them.
        self.prefixes.extend(state.keys, state.root, state.tokens, len(state.tokens) - 1)
        usable = state.keys[: state.num_reusable // self.pool.block_tokens]
        cached = self.prefixes.match(usable)
        # Another request computes the next block just now (one prompt with n choices): to wait is cheaper than to do it twice.
        length = len(cached[0])
        other = self._coming.get(usable[length]) if length < len(usable) else None
        return None if other is not None and other.rank[0] <= state.rank[0] else cached

    def root_of(self, request: Request) -> bytes:
        """The prefix key before a request's first block: of all that its keys and values depend on beside the tokens."""
        own_streams = None if request.num_streams == self._num_streams else request.num_streams
        return self.prefixes.root(request.cache_salt, request.options, num_streams=own_streams, path=request.path)

    def short(
        self, state: RequestState, cached: Sequence[Sequence[int]], promised: Sequence[int], *, is_later: bool = False
    ) -> int:
        """Blocks that a waiting request as long as it is now lacks beside the ``promised`` ones of others, of the kind with fewest left.

        There is room for it where that is 0 or less. ``is_later``: when the steps under way have run.
        """
        lacking = []
        for kind, table, others in zip(self.kinds, cached, promised, strict=True):
            new, pool = kind.missing(table, len(state.tokens)), kind.pool
            revived = sum([pool.holders(block) == 0 for block in table[kind.num_gone(table) :]])
            lacking.append(new + revived + others - pool.num_free - is_later * kind.num_held)
        return max(lacking)

    def promised(self, states: Iterable[RequestState]) -> list[int]:
        """Blocks that running requests lack for the tokens they have now, by kind."""
        counts = [0] * len(self.kinds)
        for state in states:
            self.promise(counts, state)
        return counts

    def promise(self, counts: list[int], state: RequestState) -> None:
        """Add what one more running request lacks."""
        for place, (kind, table) in enumerate(zip(self.kinds, state.tables, strict=False)):
            counts[place] += kind.missing(table, len(state.tokens))

    def begin(self, state: RequestState, cached: list[list[int]]) -> None:
        """Give a waiting request, for which there is room (`short`), what is cached of it; all that follows is to be computed."""
        for kind, table in zip(self.kinds, cached, strict=True):
            kind.hold(table)
        state.blocks, state.local = cached[0], cached[1] if len(cached) > 1 else []
        if self._tier is not None:
            self._bring_back(state, self._tier)
        state.num_published = len(state.blocks)
        state.computed = state.num_published * self.pool.block_tokens
        for key in state.keys[state.num_published :]:
            self._coming.setdefault(key, state)

    def can_hold(self, state: RequestState) -> int:
        """Tokens that a running request has room for with all that is free."""
        return min([kind.can_hold(table) for kind, table in zip(self.kinds, state.tables, strict=False)])

    def can_hold_spare(self, state: RequestState) -> int:
        """The same without taking what the prefix cache would find again."""
        pairs = zip(self.kinds, state.tables, strict=False)
        return min([(len(table) + kind.pool.num_spare) * kind.pool.block_tokens for kind, table in pairs])

    def will_hold(self, state: RequestState, num_tokens: int) -> bool:
        """Whether it has room for so many when the steps under way have run."""
        return all(
            kind.pool.blocks_for(num_tokens) - len(table) <= kind.pool.num_free + kind.num_held
            for kind, table in zip(self.kinds, state.tables, strict=False)
        )

    def grow(self, state: RequestState, num_tokens: int) -> bool:
        """Blocks for the first ``num_tokens`` tokens of a running request; False, and nothing changed, if too few are free."""
        if self.can_hold(state) < num_tokens:
            return False
        for kind, table in zip(self.kinds, state.tables, strict=False):
            kind.pool.append(table, num_tokens)
        state.renew_tables()
        return True

    def trim(self, state: RequestState, computed: int) -> None:
        """Give back the blocks that no token of a request behind the first ``computed`` sees; none of a model without windows.

        Whatever step is under way or to come starts there at the earliest.
        """
        trimmed = [
            kind.trim(table, computed, state.num_prompt)
            for kind, table in zip(self.kinds, state.tables, strict=False)
            if kind.window is not None
        ]
        if any(trimmed):
            state.renew_tables()

    def shrink(self, state: RequestState, num_tokens: int) -> None:
        """Take the blocks behind the first ``num_tokens`` tokens of a running request, which no step needs; they are not published."""
        kept = self.pool.blocks_for(num_tokens)
        if len(state.blocks) > kept:
            for kind, table in zip(self.kinds, state.tables, strict=False):
                kind.pool.free(table[kept:])
                del table[kept:]
            state.renew_tables()

    def publish(self, state: RequestState, computed: int) -> None:
        """Let others find the blocks of a request that have become full."""
        if not self._has_prefixes or not state.request.shares_prefix:
            return
        self.prefixes.extend(state.keys, state.root, state.tokens, computed)
        full = computed // self.pool.block_tokens
        for index in range(state.num_published, full):
            key, block = state.keys[index], state.blocks[index]
            if self._coming.get(key) is state:
                del self._coming[key]
            if self.pool.publish(block, key) and self._tier is not None:
                slot = self._tier.filled(key, block)
                if slot is not None:
                    self.saves[slot] = block
            for kind in self.kinds[1:]:
                kind.pool.publish(state.local[index], key)
        state.num_published = full

    def release(self, state: RequestState, under_way: Container[int]) -> None:
        """Take a request's blocks; they are free when the last of the steps ``under_way`` that it is in has run."""
        for key in state.keys[state.num_published :]:
            if self._coming.get(key) is state:
                del self._coming[key]
        if state.last_step in under_way:
            self._held.setdefault(state.last_step, []).append(state.tables)
        for kind, table in zip(self.kinds, state.tables, strict=False):
            if state.last_step in under_way:
                kind.num_held += len(table) - kind.num_gone(table)
            else:
                kind.free(table)
        state.drop_blocks()

    def ran(self, step: int) -> None:
        """A step has run."""
        for tables in self._held.pop(step, ()):
            for kind, table in zip(self.kinds, tables, strict=False):
                kind.num_held -= len(table) - kind.num_gone(table)
                kind.free(table)

    def formed(self) -> None:
        """The moves are in a batch."""
        self.saves.clear()
        self.loads.clear()
        if self._tier is not None:
            self._tier.formed()

    def reset(self) -> int:
        """Let no request that starts from now on use what was computed before; how many blocks were cached."""
        self._coming.clear()
        self.saves.clear()
        if self._tier is not None:
            self._tier.reset()
        return self.prefixes.reset()

    def _bring_back(self, state: RequestState, tier: KVTier) -> None:
        """Blocks for what the tier has of a request's prefix behind what the pool has."""
        found = len(state.blocks)
        end = found
        while end < state.num_reusable // self.pool.block_tokens and tier.holds(state.keys[end]):
            end += 1
        # All slots are pinned before a block is taken: taking one may make the tier save another into a slot.
        slots = [tier.load(key) for key in state.keys[found:end]]
        self.pool.append(state.blocks, end * self.pool.block_tokens)
        for slot, key, block in zip(slots, state.keys[found:end], state.blocks[found:], strict=True):
            self.loads.append((slot, block))
            self.pool.publish(block, key)

    def _on_evicted(self, key: bytes, block: int) -> None:
        if self._tier is not None:
            slot = self._tier.evicted(key, block)
            if slot is not None:
                self.saves[slot] = block
