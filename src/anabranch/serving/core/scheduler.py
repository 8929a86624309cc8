"""`Scheduler`: which tokens of which requests the next step computes. One decision per step, no phases of prefill and decode.

Each request has tokens and a count of those computed; a step brings the counts nearer to the lengths, within a budget of tokens.
One that decodes lacks one token, one that starts lacks its prompt, one that was preempted lacks prompt and output; all are the same.

1. Running requests in order of rank (priority, arrival). A prompt takes what the decodes of the step leave. Without a free block the
   last in rank is sent back to the front of the queue, so the first in rank is never sent back, and every request ends.
2. If no block was short: waiting requests (`WaitingQueue`), each with what the prefix cache has of it.
3. The batch. A chunk samples if it ends with the last token.

With ``is_async`` a step may be formed while the one before runs; what that one will sample is then `PENDING`.

Sources: Orca (Yu et al., OSDI 2022) for the iteration as unit, Sarathi-Serve (Agrawal et al., OSDI 2024) for prompts in chunks beside
decodes, NanoFlow (Zhu et al., arXiv 2408.12757) for the step that is formed ahead.
"""

import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable

from anabranch.config import Config, Field, configclass
from anabranch.errors import InputError
from anabranch.serving.core.batch import Batch, Chunk, Sampled
from anabranch.serving.core.blocks import BlockPool
from anabranch.serving.core.client import EngineStats
from anabranch.serving.core.prefix import PrefixCache
from anabranch.serving.core.queue import WaitingQueue
from anabranch.serving.core.request import Finish, Output, Request
from anabranch.serving.core.state import RequestState
from anabranch.serving.core.tier import KVTier

COUNTERS = (
    "prompt_tokens", "cached_prompt_tokens", "generation_tokens", "discarded_tokens", "preemptions", "steps",
    "evicted_blocks", "swapped_out_blocks", "swapped_in_blocks", *(f"finished_{finish.value}" for finish in Finish),
)  # fmt: skip
KEPT_SAMPLES = 4096


@configclass
class SchedulerConfig(Config):
    """Limits of a step and of the cache.

    Attributes:
        num_blocks, block_tokens: size of the key-value cache.
        max_positions: longest prompt and output together; a cache that holds less limits it further.
        max_batched_tokens: tokens in a step.
        max_seqs: requests in a step.
        long_prefill_chunk: most tokens of one prompt in a step, so that prompts behind a long one start; None for the whole budget.
        prefix_cache: use blocks of earlier requests.
        is_async: a step may be formed while the one before runs.
        stop_tokens: the model's own ends of text.
        quantum: tokens that a key gets in its turn, see `WaitingQueue`.
    """

    num_blocks: int = Field(ge=1)
    max_positions: int = Field(ge=2)
    block_tokens: int = Field(default=16, ge=1)
    max_batched_tokens: int = Field(default=512, ge=1)
    max_seqs: int = Field(default=16, ge=1)
    long_prefill_chunk: int | None = Field(default=None, ge=1)
    prefix_cache: bool = True
    is_async: bool = False
    stop_tokens: tuple[int, ...] = ()
    quantum: int = Field(default=512, ge=1)

    def build(self, tier: KVTier | None = None) -> "Scheduler":
        """Make the scheduler."""
        return Scheduler(self, tier=tier)


class Scheduler:
    """Requests in, batches out, sampled tokens in, outputs out. For one thread.

    Args:
        config: limits.
        tier: where blocks go that have no room on the device; needs the prefix cache.
        clock: seconds, as `Request.arrival` has them.
    """

    def __init__(
        self, config: SchedulerConfig, *, tier: KVTier | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if tier is not None and not config.prefix_cache:
            raise InputError("a tier finds blocks by their prefix; it needs prefix_cache=True")
        self.config, self._tier, self._clock = config, tier, clock
        self.pool = BlockPool(config.num_blocks, config.block_tokens, self._on_evicted)
        self.prefixes = PrefixCache(self.pool)
        # A step takes a token of each running request at least, and a request must fit alone.
        self._most_running = min(config.max_seqs, config.max_batched_tokens)
        self.max_positions = min(config.max_positions, config.num_blocks * config.block_tokens)
        self._stop_tokens = frozenset(config.stop_tokens)
        self._states: dict[str, RequestState] = {}
        self._waiting: WaitingQueue[RequestState] = WaitingQueue(config.quantum)
        self._running: list[RequestState] = []  # by rank
        self._coming: dict[bytes, RequestState] = {}  # prefixes that are being computed, and by whom
        self._under_way: dict[int, list[tuple[RequestState, int, Chunk]]] = {}  # with epochs, by step
        self._held: dict[int, list[list[int]]] = {}  # blocks to free when a step has run
        self._num_held = self._serial = self._step = self._queued_tokens = 0
        self._is_short = False  # of blocks, in the step that is being formed
        self._new: list[Request] = []
        self._gone: list[str] = []
        self._swaps_out: list[tuple[int, int]] = []
        self._swaps_in: list[tuple[int, int]] = []
        self._counts = Counter(dict.fromkeys(COUNTERS, 0))
        self._batch_tokens: deque[float] = deque(maxlen=KEPT_SAMPLES)

    # What comes from outside

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended, or a step is under way."""
        return bool(self._states or self._under_way)

    def add(self, request: Request) -> None:
        """Queue a request. Raises InputError for one that can never run, and for an id that is under way."""
        if not request.prompt:
            raise InputError("the prompt has no tokens; it must have at least one")
        if len(request.prompt) >= self.max_positions:
            raise InputError(
                f"the prompt has {len(request.prompt)} tokens; with one new token it must fit in {self.max_positions}"
            )
        if min(request.prompt) < 0:
            raise InputError(f"the prompt has the token {min(request.prompt)}; tokens are not negative")
        if request.id in self._states:
            raise InputError(f"a request {request.id!r} is under way; ids must differ")
        state = RequestState(
            request,
            serial=self._serial,
            now=self._clock(),
            stop_tokens=self._stop_tokens,
            max_positions=self.max_positions,
        )
        self._serial += 1
        self._states[request.id] = state
        self._waiting.add(state)
        self._queued_tokens += state.num_prompt

    def abort(self, id: str) -> Output | None:
        """End a request, wherever it is; None if there is none of that id. What a step under way computes for it is discarded."""
        state = self._states.get(id)
        if state is None:
            return None
        return self._output(self._end(state, Finish.ABORT))

    def reset_prefixes(self) -> int:
        """Let no request from now on use what was computed before; how many blocks were cached."""
        for state in self._waiting:
            state.root = b""
            state.keys.clear()
        if self._tier is not None:
            self._tier.reset()
        self._coming.clear()
        return self.prefixes.reset()

    def stats(self) -> EngineStats:
        """Counters, gauges, and the sizes of batches since the last call."""
        self._counts["evicted_blocks"] = self.pool.evictions
        gauges = {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "queued_tokens": self._queued_tokens,
            "kv_usage_ratio": 1 - self.pool.num_free / self.pool.num_blocks,
            "cached_blocks": self.pool.num_cached,
        }
        sizes = list(self._batch_tokens)
        self._batch_tokens.clear()
        return EngineStats(counters=dict(self._counts), gauges=gauges, samples={"batch_tokens": sizes})

    # Forming a step

    def schedule(self) -> Batch | None:
        """The next step; None if there is nothing to do, or not before a step under way has been told to `update`."""
        if len(self._under_way) >= (2 if self.config.is_async else 1) or not self._states:
            return None
        self._is_short = False
        formed: list[tuple[RequestState, int, Chunk]] = []
        budget = self._continue_running(formed, self.config.max_batched_tokens)
        if not self._is_short and budget and self._waiting and len(self._running) < self._most_running:
            self._admit_waiting(formed, budget)
        if not formed:
            return None
        chunks = tuple([chunk for _, _, chunk in formed])
        batch = Batch(
            step=self._step,
            chunks=chunks,
            new=tuple(self._new),
            gone=tuple(self._gone),
            swaps_out=tuple(self._swaps_out),
            swaps_in=tuple(self._swaps_in),
        )
        if self._tier is not None:
            self._counts["swapped_out_blocks"] += len(self._swaps_out)
            self._counts["swapped_in_blocks"] += len(self._swaps_in)
            self._tier.formed()
        for told in (self._new, self._gone, self._swaps_out, self._swaps_in):
            told.clear()
        self._under_way[self._step] = formed
        self._step += 1
        self._counts["steps"] += 1
        self._batch_tokens.append(batch.num_tokens)
        return batch

    def _continue_running(self, formed: list[tuple[RequestState, int, Chunk]], budget: int) -> int:
        """Chunks of running requests; the budget that is left."""
        running, block_tokens = self._running, self.config.block_tokens
        decodes = sum([len(state.tokens) - state.computed == 1 for state in running])
        index = 0
        while index < len(running):  # it may grow shorter from its end
            state = running[index]
            index += 1
            count = len(state.tokens) - state.computed
            if count == 1:
                decodes -= 1
                if state.is_pending and len(state.tokens) >= state.most_tokens:
                    continue  # the step under way gives its last token
            else:
                count = self._portion(count, budget - decodes)
            if len(state.blocks) * block_tokens < state.computed + count:
                count = self._make_room(state, count)
            if count <= 0:
                continue
            budget -= count
            formed.append(self._chunk(state, count))
        return budget

    def _portion(self, missing: int, budget: int) -> int:
        cap = self.config.long_prefill_chunk
        return min(missing, budget) if cap is None else min(missing, budget, cap)

    def _make_room(self, state: RequestState, count: int) -> int:
        """Blocks for ``count`` more tokens, from requests of higher rank if need be; for how many tokens there is room."""
        pool, running = self.pool, self._running
        while not pool.append(state.blocks, state.computed + count):
            self._is_short = True
            needed = pool.blocks_for(state.computed + count) - len(state.blocks)
            if running[-1] is not state and pool.num_free + self._num_held < needed:
                self._send_back(running[-1])
                continue
            # It is the last itself, or a step under way is about to give back enough: it takes what there is and waits.
            assert state is not running[0] or self._num_held, f"request {state.request.id} does not fit alone"
            count = (len(state.blocks) + pool.num_free) * pool.block_tokens - state.computed
        state.table = tuple(state.blocks)
        return count

    def _send_back(self, state: RequestState) -> None:
        """Preempt: the blocks go, the tokens stay."""
        self._running.remove(state)
        self._release(state)
        state.send_back()
        self._waiting.add_front(state)
        self._queued_tokens += state.num_prompt
        self._counts["preemptions"] += 1

    def _admit_waiting(self, formed: list[tuple[RequestState, int, Chunk]], budget: int) -> None:
        """First chunks of waiting requests, in order, until one does not fit."""
        promised = sum([self.pool.blocks_for(len(each.tokens)) - len(each.blocks) for each in self._running])
        later: list[RequestState] = []
        while budget and len(self._running) < self._most_running and len(later) <= self.config.max_seqs:
            state = self._waiting.peek()
            if state is None:
                break
            cached = self._look_up(state)
            if cached is None:
                later.append(self._waiting.pop())
                continue
            needed = self.pool.blocks_for(len(state.tokens)) - len(cached)
            revived = sum([self.pool.holders(block) == 0 for block in cached])
            if needed + revived + promised > self.pool.num_free:
                break
            self._waiting.pop()
            count = self._start(state, cached, budget)
            promised += self.pool.blocks_for(len(state.tokens)) - len(state.blocks)
            budget -= count
            formed.append(self._chunk(state, count))
        for state in later:
            self._waiting.add_front(state)

    def _look_up(self, state: RequestState) -> list[int] | None:
        """Blocks that hold the beginning of a waiting request already; None if it had better wait for a step under way."""
        if state.is_pending:
            return None
        if not self.config.prefix_cache:
            return []
        if not state.root:
            state.root = self.prefixes.root(state.request.cache_salt, state.request.options)
        known = len(state.tokens) - 1  # the last token is computed in any case, for its logits
        self.prefixes.extend(state.keys, state.root, state.tokens, known)
        cached = self.prefixes.match(state.keys[: known // self.config.block_tokens])
        # Another request computes the next block just now (one prompt with n choices): to wait is cheaper than to do it twice.
        other = self._coming.get(state.keys[len(cached)]) if len(cached) < len(state.keys) else None
        return None if other is not None and other.rank[0] <= state.rank[0] else cached

    def _start(self, state: RequestState, cached: list[int], budget: int) -> int:
        """Let a waiting request run, from behind its cached blocks; the size of its first chunk."""
        self.pool.hold(cached)
        state.blocks = cached
        if self._tier is not None:
            self._bring_back(state, self._tier)
        state.num_published = len(state.blocks)
        state.computed = state.num_published * self.config.block_tokens
        count = self._portion(len(state.tokens) - state.computed, budget)
        has_room = self.pool.append(state.blocks, state.computed + count)
        assert has_room, "blocks for the whole request were counted"
        state.table = tuple(state.blocks)
        for key in state.keys[state.num_published :]:
            self._coming.setdefault(key, state)
        insort(self._running, state, key=_rank)
        self._queued_tokens -= state.num_prompt
        if not state.is_known:
            state.is_known = True
            self._new.append(state.request)
            state.cached_tokens = state.computed
            state.queue_s = self._clock() - state.rank[1]
            self._counts["prompt_tokens"] += state.num_prompt
            self._counts["cached_prompt_tokens"] += state.computed
        return count

    def _bring_back(self, state: RequestState, tier: KVTier) -> None:
        """Blocks for what the tier has of a request's prefix behind what the pool has."""
        block_tokens, found = self.config.block_tokens, len(state.blocks)
        end = found
        while end < (len(state.tokens) - 1) // block_tokens and tier.holds(state.keys[end]):
            end += 1
        # All slots are pinned before a block is taken: taking one may make the tier save another into a slot.
        slots = [tier.load(key) for key in state.keys[found:end]]
        self.pool.append(state.blocks, end * block_tokens)
        for slot, key, block in zip(slots, state.keys[found:end], state.blocks[found:], strict=True):
            self._swaps_in.append((slot, block))
            self.pool.publish(block, key)

    def _chunk(self, state: RequestState, count: int) -> tuple[RequestState, int, Chunk]:
        """The next ``count`` tokens of a request as a part of the step that is being formed."""
        start = state.computed
        end = state.computed = start + count
        tokens = state.tokens
        samples = end == len(tokens)
        chunk = Chunk(
            id=state.request.id,
            tokens=(tokens[start],) if count == 1 else tuple(tokens[start:end]),
            start=start,
            blocks=state.table,
            samples=samples,
        )
        state.last_step = self._step
        if samples:
            state.expect()
        return state, state.epoch, chunk

    # After a step

    def update(self, batch: Batch, sampled: Iterable[Sampled]) -> list[Output]:
        """What a step gave: news of its requests. Steps are told in the order in which they were formed.

        A `Sampled` with an error ends its request only, also that of a chunk that does not sample; so does one that is missing.
        """
        formed = self._under_way.pop(batch.step)
        given = {item.id: item for item in sampled}
        outputs = []
        block_tokens = self.config.block_tokens
        for state, epoch, chunk in formed:
            item = given.get(chunk.id)
            if state.finish is not None:  # it ended while the step was under way
                self._counts["discarded_tokens"] += chunk.samples
                continue
            if item is None or item.error is not None:
                if item is not None or chunk.samples:
                    error = "the step gave no token" if item is None else item.error
                    outputs.append(self._output(self._end(state, Finish.ERROR), error=error))
                    continue
            if epoch == state.epoch and chunk.start + len(chunk.tokens) >= (state.num_published + 1) * block_tokens:
                self._publish(state, chunk.start + len(chunk.tokens))
            if chunk.samples:
                assert item is not None
                outputs.append(self._take(state, item))
        for blocks in self._held.pop(batch.step, ()):
            self._num_held -= len(blocks)
            self.pool.free(blocks)
        return outputs

    def _take(self, state: RequestState, item: Sampled) -> Output:
        is_output = state.take(item.token)
        if state.finish is not None:
            self._end(state, state.finish)
        if not is_output:
            return self._output(state)
        self._counts["generation_tokens"] += 1
        return self._output(state, item)

    def _publish(self, state: RequestState, computed: int) -> None:
        """Let others find the blocks of a request that have become full."""
        if not self.config.prefix_cache:
            return
        self.prefixes.extend(state.keys, state.root, state.tokens, computed)
        for index in range(state.num_published, computed // self.config.block_tokens):
            key, block = state.keys[index], state.blocks[index]
            if self._coming.get(key) is state:
                del self._coming[key]
            if self.pool.publish(block, key) and self._tier is not None:
                slot = self._tier.filled(key, block)
                if slot is not None:
                    self._swaps_out.append((block, slot))
        state.num_published = computed // self.config.block_tokens

    def _end(self, state: RequestState, finish: Finish) -> RequestState:
        """Take a request out of everything."""
        state.finish = finish
        self._counts[f"finished_{finish.value}"] += 1
        del self._states[state.request.id]
        if state.blocks:
            self._running.remove(state)
            self._release(state)
            state.blocks = []
        else:
            self._waiting.remove(state)
            self._queued_tokens -= state.num_prompt
        if state.is_known:
            self._waiting.refund(state, state.most_tokens - len(state.tokens))
            self._gone.append(state.request.id)
        return state

    def _release(self, state: RequestState) -> None:
        """Free a request's blocks, once the last step that uses them has run."""
        for key in state.keys[state.num_published :]:
            if self._coming.get(key) is state:
                del self._coming[key]
        if state.last_step in self._under_way:
            self._held.setdefault(state.last_step, []).append(state.blocks)
            self._num_held += len(state.blocks)
        else:
            self.pool.free(state.blocks)

    def _output(self, state: RequestState, item: Sampled | None = None, error: str | None = None) -> Output:
        cached_tokens, queue_s = state.cached_tokens, state.queue_s
        if queue_s is not None:  # told once
            state.cached_tokens = state.queue_s = None
        if item is None:
            return Output(
                id=state.request.id, finish=state.finish, error=error, cached_tokens=cached_tokens, queue_s=queue_s
            )
        return Output(
            id=state.request.id,
            tokens=(item.token,),
            logprobs=() if item.logprob is None else (item.logprob,),
            finish=state.finish,
            cached_tokens=cached_tokens,
            queue_s=queue_s,
            routing=(item.routing,) if item.routing else (),
        )

    def _on_evicted(self, key: bytes, block: int) -> None:
        if self._tier is not None:
            slot = self._tier.evicted(key, block)
            if slot is not None:
                self._swaps_out.append((block, slot))


def _rank(state: RequestState) -> tuple[int, float, int]:
    return state.rank
