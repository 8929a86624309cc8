"""`BlockTables`: the blocks of requests, from the prefix cache, from a second tier, or new, and back when no step needs them."""

from collections.abc import Container

from anabranch.serving.core.blocks import BlockPool
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

    Attributes:
        pool, prefixes: the blocks there are, and what is found again.
        num_held: blocks that will be free when the steps under way have run.
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
    ) -> None:
        self.pool = BlockPool(num_blocks, block_tokens, self._on_evicted)
        self.prefixes = PrefixCache(self.pool)
        self.num_held = 0
        self.saves: dict[int, int] = {}
        self.loads: list[tuple[int, int]] = []
        self._has_prefixes, self._tier, self._num_streams = has_prefixes, tier, num_streams
        # Prefixes that are being computed, and by whom.
        self._coming: dict[bytes, RequestState] = {}
        # Blocks to free, by the step that has to run before.
        self._held: dict[int, list[list[int]]] = {}

    def look_up(self, state: RequestState) -> list[int] | None:
        """Blocks that hold the beginning of a waiting request already; None if it had better wait for a step under way."""
        if state.num_pending:
            return None
        if not self._has_prefixes:
            return []
        if not state.root:
            state.root = self.root_of(state.request)
        # All keys, also of blocks that it computes anew: others may wait for them.
        self.prefixes.extend(state.keys, state.root, state.tokens, len(state.tokens) - 1)
        usable = state.keys[: state.num_reusable // self.pool.block_tokens]
        cached = self.prefixes.match(usable)
        # Another request computes the next block just now (one prompt with n choices): to wait is cheaper than to do it twice.
        other = self._coming.get(usable[len(cached)]) if len(cached) < len(usable) else None
        return None if other is not None and other.rank[0] <= state.rank[0] else cached

    def root_of(self, request: Request) -> bytes:
        """The prefix key before a request's first block: of all that its keys and values depend on beside the tokens."""
        own_streams = None if request.num_streams == self._num_streams else request.num_streams
        return self.prefixes.root(request.cache_salt, request.options, num_streams=own_streams, path=request.path)

    def fits(self, state: RequestState, cached: list[int], promised: int) -> bool:
        """Whether there is room for a waiting request as long as it is now, beside ``promised`` blocks of others."""
        new = self.pool.blocks_for(len(state.tokens)) - len(cached)
        revived = sum([self.pool.holders(block) == 0 for block in cached])
        return new + revived + promised <= self.pool.num_free

    def missing(self, state: RequestState) -> int:
        """Blocks that a running request lacks for the tokens it has now."""
        return self.pool.blocks_for(len(state.tokens)) - len(state.blocks)

    def begin(self, state: RequestState, cached: list[int]) -> None:
        """Give a waiting request, which `fits`, what is cached of it; all that follows is to be computed."""
        self.pool.hold(cached)
        state.blocks = cached
        if self._tier is not None:
            self._bring_back(state, self._tier)
        state.num_published = len(state.blocks)
        state.computed = state.num_published * self.pool.block_tokens
        for key in state.keys[state.num_published :]:
            self._coming.setdefault(key, state)

    def grow(self, state: RequestState, num_tokens: int) -> bool:
        """Blocks for the first ``num_tokens`` tokens of a running request; False if too few are free."""
        has_room = self.pool.append(state.blocks, num_tokens)
        if has_room:
            state.table = tuple(state.blocks)
        return has_room

    def shrink(self, state: RequestState, num_tokens: int) -> None:
        """Take the blocks behind the first ``num_tokens`` tokens of a running request, which no step needs; they are not published."""
        kept = self.pool.blocks_for(num_tokens)
        if len(state.blocks) > kept:
            self.pool.free(state.blocks[kept:])
            del state.blocks[kept:]
            state.table = tuple(state.blocks)

    def publish(self, state: RequestState, computed: int) -> None:
        """Let others find the blocks of a request that have become full."""
        if not self._has_prefixes:
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
        state.num_published = full

    def release(self, state: RequestState, under_way: Container[int]) -> None:
        """Take a request's blocks; they are free when the last of the steps ``under_way`` that it is in has run."""
        for key in state.keys[state.num_published :]:
            if self._coming.get(key) is state:
                del self._coming[key]
        if state.last_step in under_way:
            self._held.setdefault(state.last_step, []).append(state.blocks)
            self.num_held += len(state.blocks)
        else:
            self.pool.free(state.blocks)
        state.drop_blocks()

    def ran(self, step: int) -> None:
        """A step has run."""
        for blocks in self._held.pop(step, ()):
            self.num_held -= len(blocks)
            self.pool.free(blocks)

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
