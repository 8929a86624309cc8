"""`Scheduler`: which tokens of which requests the next step computes. One decision per step, no phases of prefill and decode.

Each request has tokens and a count of those computed; a step brings the counts nearer to the lengths, within a budget of tokens.
One that decodes lacks one token, one that starts lacks its prompt, one that was preempted lacks prompt and output; all are the same.

1. Running requests in order of rank (priority, arrival). A prompt takes what the decodes of the step leave; prompts of several keys share
   that evenly. Without a free block the last in rank is sent back to the front of the queue, never the first in rank.
2. If no block was short: waiting requests (`WaitingQueue`), each with what the prefix cache has of it. Where other keys have more than
   their share of the places, one of theirs makes room first (`Invitation`, `Seats`); each time it runs it gets on, so every request ends.
   Both of these are `StepParts`, and who runs and who waits is in `Places`.
3. With ``prompt_lookup``: of what is left of the budget, guesses for those that decode (`Drafts`).
4. The batch. A chunk samples if it ends with the last token; of a prompt that is to be scored, each token is by the row before it.

With ``is_async`` a step may be formed while the one before runs; what that one will sample is then `PENDING`.

A request that is paused is in no step. While others wait or lack blocks it has to give up its place, so nobody starves for it.

Sources: Orca (Yu et al., OSDI 2022) for the iteration as unit, Sarathi-Serve (Agrawal et al., OSDI 2024) for prompts in chunks beside
decodes, NanoFlow (Zhu et al., arXiv 2408.12757) for the step that is formed ahead.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from anabranch.config import Config, Field, Repeats, Size, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.serving.core.batch import Batch, Chunk, Sampled
from anabranch.serving.core.client import EngineStats
from anabranch.serving.core.drafts import Drafts
from anabranch.serving.core.dual_batches import DualBatches, Order
from anabranch.serving.core.kinds import most_new
from anabranch.serving.core.places import Places, rank_of
from anabranch.serving.core.request import Finish, Output, Request
from anabranch.serving.core.state import RequestState
from anabranch.serving.core.step_parts import Part, StepParts
from anabranch.serving.core.tables import BlockTables
from anabranch.serving.core.tier import KVTier, Memory

COUNTERS = (
    "prompt_tokens",
    "cached_prompt_tokens",
    "generation_tokens",
    "discarded_tokens",
    "preemptions",
    "steps",
    "drafted_tokens",
    "accepted_draft_tokens",
    "evicted_blocks",
    "swapped_out_blocks",
    "swapped_in_blocks",
    *(f"finished_{finish.value}" for finish in Finish),
)
KEPT_SAMPLES = 4096
# Why a request is paused: its reader is slow, or it waits to be told how it goes on.
READER, TURN = "reader", "turn"
_MISSING = "the step gave no token"


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
        min_run: steps that a request runs on, from when it is where it was, before it makes room for another key's, see `Seats`.
        max_decodes: most requests that decode in a step, the others in the next; None for all. See `DualBatches`.
        prompt_lookup: most tokens guessed for a request in a step, see `anabranch.serving.core.drafts`; 0 for none. A guess needs the
            tokens that come before it, so ``is_async`` must be false.
        prompt_lookup_ngram: tokens of the longest end of the text that is looked for.
        num_streams: parallel streams of a request that does not say it; None where nobody knows, so such a request never shares
            keys and values with one that says it.
        window: positions that a token sees in any layer, its own among them; None for all. Blocks before it are given back.
        local_window: where some layers see less than others, what they do; the blocks that others have are the ``num_blocks``.
        local_blocks: blocks of these layers.
    """

    num_blocks: Size = Field(ge=1)
    max_positions: Size = Field(ge=2)
    block_tokens: Size = Field(default=16, ge=1)
    max_batched_tokens: Size = Field(default=512, ge=1)
    max_seqs: Size = Field(default=16, ge=1)
    long_prefill_chunk: Size | None = Field(default=None, ge=1)
    prefix_cache: bool = True
    is_async: bool = False
    stop_tokens: tuple[int, ...] = ()
    quantum: int = Field(default=512, ge=1)
    min_run: Size = Field(default=128, ge=1)
    max_decodes: int | None = Field(default=None, ge=1)
    prompt_lookup: int = Field(default=0, ge=0, le=64)
    prompt_lookup_ngram: int = Field(default=3, ge=1, le=64)
    num_streams: Repeats | None = Field(default=None, ge=1)
    window: Size | None = Field(default=None, ge=1)
    local_window: Size | None = Field(default=None, ge=1)
    local_blocks: Size | None = Field(default=None, ge=1)

    def __post_init__(self) -> None:
        if (self.local_window is None) != (self.local_blocks is None):
            raise ConfigError(
                f"local_window is {self.local_window} and local_blocks {self.local_blocks}; layers that see less need both"
            )

    @property
    def num_new(self) -> int:
        """Tokens of one request that steps under way, and the one that is formed, compute at most."""
        return most_new(self.max_batched_tokens, self.long_prefill_chunk, self.prompt_lookup, is_async=self.is_async)

    def build(
        self, *, tier: KVTier | None = None, memory: Memory | None = None, order: Order | None = None
    ) -> "Scheduler":
        """Make the scheduler."""
        return Scheduler(self, tier=tier, memory=memory, order=order)


class Scheduler:
    """Requests in, batches out, sampled tokens in, outputs out. For one thread.

    Args:
        config: limits.
        tier: where blocks go that have no room on the device; needs the prefix cache.
        memory: decides, beside the free blocks, whether a waiting request may join those that run.
        order: groups those that decode into two steps; needs ``max_decodes``.
        clock: seconds, as `Request.arrival` has them.

    Attributes:
        max_positions: the config's, or what the cache holds if that is less.
        pool, prefixes: blocks, and what is found again.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        tier: KVTier | None = None,
        memory: Memory | None = None,
        order: Order | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check(config, tier, order)
        self.config, self._memory, self._clock = config, memory, clock
        self._tables = BlockTables(
            config.num_blocks,
            config.block_tokens,
            has_prefixes=config.prefix_cache,
            tier=tier,
            num_streams=config.num_streams,
            window=config.window,
            local_window=config.local_window,
            local_blocks=config.local_blocks,
            num_new=config.num_new,
        )
        self.pool, self.prefixes = self._tables.pool, self._tables.prefixes
        ngram = config.prompt_lookup_ngram
        self._drafts = Drafts(config.prompt_lookup, ngram, self._tables) if config.prompt_lookup else None
        self._has_windows = config.window is not None or config.local_window is not None
        self.max_positions = min(config.max_positions, self._tables.most_positions() or config.max_positions)
        self._stop_tokens = frozenset(config.stop_tokens)
        self._states: dict[str, RequestState] = {}
        self._under_way: dict[int, list[Part]] = {}  # by step
        self._places = Places(
            self._tables,
            self._under_way,
            # A step takes a token of each running request at least, and a request must fit alone.
            most_running=min(config.max_seqs, config.max_batched_tokens),
            quantum=config.quantum,
            min_run=config.min_run,
        )
        self._parts = StepParts(
            self._places,
            self._tables,
            memory,
            None if config.max_decodes is None else DualBatches(config.max_decodes, order),
            max_batched_tokens=config.max_batched_tokens,
            max_seqs=config.max_seqs,
            long_prefill_chunk=config.long_prefill_chunk,
        )
        self._serial = self._step = 0
        self._gone: list[str] = []
        self._counts = Counter(dict.fromkeys(COUNTERS, 0))
        self._batch_tokens: deque[float] = deque(maxlen=KEPT_SAMPLES)

    # What comes from outside

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended, or a step is under way."""
        return bool(self._states or self._under_way)

    @property
    def is_between_steps(self) -> bool:
        """Whether no step is under way."""
        return not self._under_way

    def states(self) -> list[RequestState]:
        """All requests that have not ended, by rank."""
        return sorted(self._states.values(), key=rank_of)

    def waiting(self) -> list[RequestState]:
        """Those that wait for a seat, by rank."""
        return sorted(self._places.waiting, key=rank_of)

    def add(
        self, request: Request, output: Sequence[int] = (), num_scored: int = 0, num_cached: int | None = None
    ) -> RequestState:
        """Queue a request, which may have given ``output`` elsewhere, and the first ``num_scored`` of its prompt's log probabilities.

        ``num_cached``: tokens of its prompt that were cached when it began there; None for one that begins here.

        Raises InputError for one that can never run, and for an id that is under way.
        """
        request.check_room(self.max_positions)
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
        state.tokens.extend(output)
        state.num_scored = max(state.num_scored, num_scored)
        state.num_cached = num_cached
        # What raises here leaves nothing behind.
        self._places.come(state)
        self._states[request.id] = state
        return state

    def pause(self, id: str, why: str = READER) -> None:
        """Compute nothing more for a request until `resume` of each reason; nothing if there is none of that id.

        Steps under way still give theirs.
        """
        state = self._states.get(id)
        if state is None:
            return
        if not state.holds:
            self._places.pause(state)
        state.holds.add(why)

    def resume(self, id: str, why: str = READER) -> None:
        """Let a paused request go on, unless it is held for another reason too; nothing if there is none of that id."""
        state = self._states.get(id)
        if state is None or why not in state.holds:
            return
        state.holds.discard(why)
        if not state.holds:
            self._places.resume(state)

    def go_on(self, id: str, request: Request | None) -> None:
        """Let a request go on that waits after so many new tokens (`Request.turn_every`); nothing if there is none of that id.

        ``request`` is what it is from now on, with other ``options``, so that all of it is computed again; None for as before.
        """
        state = self._states.get(id)
        if state is None:
            return
        if request is not None and state.blocks:
            self._places.send_back(state)
        state.go_on(request)
        self.resume(id, TURN)

    def abort(self, id: str) -> Output | None:
        """End a request, wherever it is; None if there is none of that id. What a step under way computes for it is discarded."""
        state = self._states.get(id)
        if state is None:
            return None
        self._end(state, Finish.ABORT)
        return state.output()

    def root_of(self, request: Request) -> bytes:
        """The prefix key before a request's first block, see `BlockTables.root_of`."""
        return self._tables.root_of(request)

    def reset_prefixes(self) -> int:
        """Let no request from now on use what was computed before; how many blocks were cached."""
        for state in self._places.waiting:
            state.root = b""
            state.keys.clear()
        return self._tables.reset()

    def stats(self) -> EngineStats:
        """Counters, gauges, and the sizes of batches since the last call."""
        places = self._places
        self._counts["preemptions"] = places.preemptions
        self._counts["evicted_blocks"] = sum([kind.pool.evictions for kind in self._tables.kinds])
        if self._drafts is not None:
            self._counts["drafted_tokens"] = self._drafts.drafted
            self._counts["accepted_draft_tokens"] = self._drafts.accepted
        gauges = {
            "running": len(places.running),
            "waiting": len(places.waiting),
            "paused": len(places.paused),
            "queued_tokens": places.queued_tokens,
            "kv_usage_ratio": self._tables.usage,
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
        parts, budget = self._parts.form(self._step)
        if not parts:
            return None
        if started := self._parts.started:
            self._note_started(started)
        if self._drafts is not None:
            budget = self._drafts.extend(parts, budget)
        tables = self._tables
        batch = Batch(
            step=self._step,
            chunks=tuple([chunk for _, _, chunk in parts]),
            new=tuple([state.request for state in started]),
            gone=tuple(self._gone),
            swaps_out=tuple([(block, slot) for slot, block in tables.saves.items()]),
            swaps_in=tuple(tables.loads),
        )
        self._counts["swapped_out_blocks"] += len(tables.saves)
        self._counts["swapped_in_blocks"] += len(tables.loads)
        tables.formed()
        self._gone.clear()
        self._under_way[self._step] = parts
        self._step += 1
        self._counts["steps"] += 1
        self._batch_tokens.append(self.config.max_batched_tokens - budget)
        return batch

    def _note_started(self, started: Iterable[RequestState]) -> None:
        """These run for the first time."""
        for state in started:
            state.queue_s = self._clock() - state.rank[1]
            self._counts["prompt_tokens"] += state.num_prompt
            self._counts["cached_prompt_tokens"] += state.cached_tokens or 0

    # After a step

    def update(self, batch: Batch, sampled: Iterable[Sampled]) -> list[Output]:
        """What a step gave: news of its requests. Steps are told in the order in which they were formed.

        A `Sampled` with an error ends its request only, also that of a chunk that does not sample; so does one that is missing.
        """
        parts = self._under_way.pop(batch.step)
        given = {item.id: item for item in sampled}
        outputs = []
        for state, epoch, chunk in parts:
            # It ended while the step was under way.
            if state.finish is not None:
                self._counts["discarded_tokens"] += chunk.samples
                continue
            item = given.get(chunk.id)
            error = item.error if item is not None else _MISSING if chunk.is_answered else None
            if error is not None:
                self._end(state, Finish.ERROR)
                outputs.append(state.output(error=error))
                continue
            # A guess may not hold: `_take` tells.
            computed = chunk.start + len(chunk.tokens) - chunk.drafts
            if epoch == state.epoch:
                self._store(state, computed)
            if item is not None:
                state.prompt_logprobs += item.prompt_logprobs
                state.path = state.path if item.path is None else item.path
                state.kept = state.kept if item.computed is None else item.computed
            # It asked for no new token.
            if computed >= state.most_tokens:
                self._end(state, Finish.LENGTH)
                outputs.append(state.output())
                outputs[-1].embedding = () if item is None else item.embedding
            elif chunk.samples and item is not None:
                outputs.append(self._take(state, chunk, item))
            elif state.prompt_logprobs:
                outputs.append(state.output())
        self._tables.ran(batch.step)
        return outputs

    def _store(self, state: RequestState, computed: int) -> None:
        """So many tokens of a request are stored: others may find its full blocks, and what no token behind them sees is given back."""
        if computed >= (state.num_published + 1) * self.config.block_tokens:
            self._tables.publish(state, computed)
        if self._has_windows:
            self._tables.trim(state, computed)

    def _take(self, state: RequestState, chunk: Chunk, item: Sampled) -> Output:
        kept = state.take_all(item)
        if self._drafts is not None and chunk.drafts:
            # No step is under way, so the request is where it was.
            self._store(state, state.computed)
            self._drafts.settle(state, chunk, len(item.later))
        if state.finish is not None:
            self._end(state, state.finish)
            if self._memory is not None:
                self._memory.saw(state.num_output)
        self._counts["generation_tokens"] += len(kept)
        return state.output(kept)

    def _end(self, state: RequestState, finish: Finish) -> None:
        """Take a request out of everything."""
        state.finish = finish
        self._counts[f"finished_{finish.value}"] += 1
        del self._states[state.request.id]
        self._places.go(state)
        if state.is_known:
            self._gone.append(state.request.id)


def _check(config: SchedulerConfig, tier: KVTier | None, order: Order | None) -> None:
    """Raise InputError for what does not go together."""
    if tier is not None and not config.prefix_cache:
        raise InputError("a tier finds blocks by their prefix; it needs prefix_cache=True")
    if tier is not None and (config.window or config.local_window):
        raise InputError("a tier keeps whole sequences; it needs window=None and local_window=None")
    if order is not None and config.max_decodes is None:
        raise InputError("order groups what decodes into two steps; it needs max_decodes")
    if config.prompt_lookup and config.is_async:
        raise InputError(
            f"prompt_lookup is {config.prompt_lookup}; a step that is formed ahead has no tokens to look up, so is_async must be false"
        )
