"""A scheduler run against a model without weights, whose every token depends on all that is stored for those before it.

The key-value cache is a list of slots with digests of prefixes. What a chunk samples is a digest of all slots that its table of blocks
points to, so one stale, missing or foreign slot changes the stream.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from anabranch.serving.core.batch import PENDING, Batch, Chunk, Sampled
from anabranch.serving.core.kinds import most_blocks
from anabranch.serving.core.request import Finish, Output, Request, Sampling, TokenLogprob
from anabranch.serving.core.scheduler import TURN, Scheduler, SchedulerConfig

MODULUS = (1 << 61) - 1
VOCABULARY = 7


def seed_of(request: Request) -> int:
    """What the keys and values of a request depend on beside its tokens."""
    text = repr((request.cache_salt, sorted(request.options)))
    return sum((i + 1) * ord(character) for i, character in enumerate(text)) * 7919 % MODULUS


def stored(before: int, token: int, position: int) -> int:
    return (before * 1_000_003 + token * 97 + position * 13 + 17) % MODULUS


def token_of(values: list[int]) -> int:
    return sum((i + 1) * value for i, value in enumerate(values)) % MODULUS % VOCABULARY


def windows_of(config: SchedulerConfig) -> list[int | None]:
    """Of each kind of layers."""
    return [config.window] if config.local_blocks is None else [config.window, config.local_window]


def token_seen(values: list[int], windows: Sequence[int | None] = (None,)) -> int:
    """What is sampled behind ``values``, by layers that see so far back each."""
    return sum(token_of(values[-window if window else 0 :]) for window in windows) % VOCABULARY


def score_of(values: list[int], token: int) -> float:
    """A log probability that depends on all that is stored before a token."""
    return -float((values[-1] + token) % 1009)


class FakeRunner:
    """Runs batches as `ModelRunner` does."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.block_tokens = config.block_tokens
        self.windows = windows_of(config)
        counts = [config.num_blocks, config.local_blocks or 0]
        # Of each kind of layers; what the first has is what there is of a model without windows.
        self.memories: list[list[int | None]] = [[None] * (count * config.block_tokens) for count in counts]
        self.slots = self.memories[0]
        # What each request has stored at each position, or would have.
        self.truth: dict[str, list[int]] = {}
        # The tokens it was given after its prompt, by position: a request that was preempted twice may find what it stored the first time.
        self.given: dict[str, dict[int, int]] = {}
        self.host: dict[int, list[int | None]] = {}
        self.requests: dict[str, Request] = {}
        self.last: dict[str, int] = {}
        self.computed = 0

    def run(self, batch: Batch, failing: frozenset[str] = frozenset()) -> list[Sampled]:
        for id in batch.gone:
            del self.requests[id]  # told of before, and gone once
            self.truth.pop(id, None)
            self.given.pop(id, None)
            self.last.pop(id, None)
        for request in batch.new:
            assert request.id not in self.requests
            self.requests[request.id] = request
        self._move(batch)
        sampled = []
        for chunk in batch.chunks:
            request = self.requests[chunk.id]
            tokens = [self.last[chunk.id] if token == PENDING else token for token in chunk.tokens]
            values = self._run(request, tokens, chunk)
            if chunk.id in failing:
                self.last[chunk.id] = 0  # a step that was formed ahead has this one pending
                sampled.append(Sampled(id=chunk.id, token=0, error="made to fail"))
            elif chunk.is_answered:
                scores = self._scores(request, values, chunk)
                tokens = self._samples(values, chunk) if chunk.samples else [PENDING]
                if chunk.samples:
                    self.last[chunk.id] = tokens[-1]
                later = tuple(Sampled(id=chunk.id, token=token) for token in tokens[1:])
                sampled.append(Sampled(id=chunk.id, token=tokens[0], prompt_logprobs=scores, later=later))
        return sampled

    def _samples(self, values: list[int], chunk: Chunk) -> list[int]:
        """A token for each guess that holds, and one more."""
        end = len(values) - chunk.drafts
        tokens = [token_seen(values[:end], self.windows)]
        for guess in chunk.tokens[len(chunk.tokens) - chunk.drafts :]:
            if tokens[-1] != guess:
                break
            end += 1
            tokens.append(token_seen(values[:end], self.windows))
        return tokens

    def _scores(self, request: Request, values: list[int], chunk: Chunk) -> tuple[TokenLogprob, ...]:
        first = chunk.start + chunk.first_scored
        assert not chunk.targets or 0 <= chunk.first_scored < len(chunk.tokens)
        assert first + len(chunk.targets) <= len(values), "a token is scored by a row that did not run"
        if chunk.targets:
            assert request.sampling.prompt_logprobs is not None
            assert chunk.targets == request.prompt[first + 1 : first + 1 + len(chunk.targets)]
        return tuple(
            TokenLogprob(token=token, logprob=score_of(values[: row + 1], token))
            for row, token in enumerate(chunk.targets, first)
        )

    def _run(self, request: Request, tokens: list[int], chunk: Chunk) -> list[int]:
        size, start = self.block_tokens, chunk.start
        values, given = self.truth.setdefault(request.id, []), self.given.setdefault(request.id, {})
        for position in range(len(values), start):
            # Stored by another request that begins alike, or by itself before it was preempted.
            is_asked = position < len(request.prompt)
            token = request.prompt[position] if is_asked else given[position]
            values.append(stored(values[-1] if values else seed_of(request), token, position))
        del values[start:]
        for position, token in enumerate(tokens, start):
            given[position] = token
            values.append(stored(values[-1] if values else seed_of(request), token, position))
        for memory, table, window in zip(self.memories, (chunk.blocks, chunk.local), self.windows, strict=False):
            for position in range(0 if window is None else max(0, start - window + 1), len(values)):
                block = table[position // size]
                assert block >= 0, f"{request.id} reads a block that was given back"
                slot = block * size + position % size
                if position >= start:
                    memory[slot] = values[position]
                assert memory[slot] == values[position], f"{request.id} reads a slot that is not its own"
        self.computed += len(tokens)
        return list(values)

    def _move(self, batch: Batch) -> None:
        size = self.block_tokens
        for block, slot in batch.swaps_out:
            self.host[slot] = self.slots[block * size : (block + 1) * size]
        for source, target in batch.copies:
            self.slots[target * size : (target + 1) * size] = self.slots[source * size : (source + 1) * size]
        for slot, block in batch.swaps_in:
            self.slots[block * size : (block + 1) * size] = self.host[slot]


def expected(
    request: Request,
    max_positions: int,
    stop_tokens: tuple[int, ...] = (),
    windows: Sequence[int | None] = (None,),
) -> tuple[list[int], Finish]:
    """What the request gives alone: token by token, no blocks."""
    values: list[int] = []
    for position, token in enumerate(request.prompt):
        values.append(stored(values[-1] if values else seed_of(request), token, position))
    stops = set(request.sampling.stop_tokens) | (set() if request.sampling.ignore_eos else set(stop_tokens))
    output: list[int] = []
    while request.sampling.max_tokens:
        token = token_seen(values, windows)
        if token in stops and len(output) >= request.sampling.min_tokens:
            return output, Finish.STOP
        output.append(token)
        if len(output) == request.sampling.max_tokens or len(values) + 1 == max_positions:
            return output, Finish.LENGTH
        values.append(stored(values[-1], token, len(values)))
    return output, Finish.LENGTH


def expected_scores(request: Request) -> list[TokenLogprob]:
    """What the prompt's tokens after the first are scored as."""
    values: list[int] = []
    made = []
    for position, token in enumerate(request.prompt):
        if values:
            made.append(TokenLogprob(token=token, logprob=score_of(values, token)))
        values.append(stored(values[-1] if values else seed_of(request), token, position))
    return made if request.sampling.prompt_logprobs is not None else []


@dataclass
class Seen:
    """What came out for one request."""

    tokens: list[int] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    finish: Finish | None = None
    is_aborted: bool = False
    discarded: int = 0
    is_failing: bool = False


class Drive:
    """A scheduler, a runner and what both must keep at every step."""

    def __init__(self, config: SchedulerConfig, **arguments: object) -> None:
        self.config = config
        self.now = 1.0
        self.scheduler = Scheduler(config, clock=lambda: self.now, **arguments)  # type: ignore[arg-type]
        self.runner = FakeRunner(config)
        self.seen: dict[str, Seen] = {}
        self.requests: dict[str, Request] = {}
        self.formed: deque[Batch] = deque()
        self.started: list[str] = []
        self.paused: set[str] = set()
        self.steps = 0

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.seen[request.id] = Seen()
        self.requests[request.id] = request

    def abort(self, id: str) -> None:
        output = self.scheduler.abort(id)
        assert (output is None) == (self.seen[id].finish is not None)
        if output is not None:
            assert output.finish is Finish.ABORT
            assert output.tokens == ()
            self._see(output)
            self.seen[id].is_aborted = True

    def pause(self, id: str) -> None:
        self.scheduler.pause(id)
        if self.seen[id].finish is None:
            self.paused.add(id)

    def resume(self, id: str) -> None:
        self.scheduler.resume(id)
        self.paused.discard(id)

    def form(self) -> bool:
        """Form a step if there is one."""
        scheduler = self.scheduler
        first = next((state for state in scheduler._places.running if not state.holds), None)
        seats = scheduler._places.seats
        makes_way = first is not None and seats.is_shared and seats.had_run(first, scheduler._step)
        batch = scheduler.schedule()
        if first is not None and not makes_way:
            assert first in scheduler._places.running, "the first in rank was sent back"
        if batch is None:
            return False
        assert batch.chunks
        assert batch.num_tokens <= self.config.max_batched_tokens
        assert len(batch.chunks) <= self.config.max_seqs
        assert len({chunk.id for chunk in batch.chunks}) == len(batch.chunks)
        assert len({slot for _, slot in batch.swaps_out}) == len(batch.swaps_out)
        assert len({block for _, block in batch.swaps_in}) == len(batch.swaps_in)
        for chunk in batch.chunks:
            assert chunk.id not in self.paused
            assert len(chunk.tokens) - chunk.drafts <= (self.config.long_prefill_chunk or 10**9)
            assert chunk.drafts <= self.config.prompt_lookup
            assert chunk.start + len(chunk.tokens) <= len(chunk.blocks) * self.config.block_tokens
            assert PENDING not in chunk.tokens[:-1]
        self.started += [request.id for request in batch.new]
        self.formed.append(batch)
        self.steps += 1
        return True

    def finish_step(self) -> None:
        """Run the oldest step that was formed and tell of it."""
        for batch in self.formed:
            for chunk in batch.chunks:
                self._check_held(chunk)
        batch = self.formed.popleft()
        failing = frozenset(id for id, seen in self.seen.items() if seen.is_failing)
        sampled = self.runner.run(batch, failing)
        for item in sampled:
            self.seen[item.id].discarded += self.seen[item.id].finish is not None
        for output in self.scheduler.update(batch, sampled):
            self._see(output)
        for kind in self.scheduler._tables.kinds:
            kind.pool.check()
        if self.config.prompt_lookup:
            for state in self.scheduler._places.running:
                assert len(state.blocks) == self.scheduler.pool.blocks_for(state.computed), "a guess has left a block"

    def _check_held(self, chunk: Chunk) -> None:
        """What a step that is to run reads and writes is held."""
        for kind, table in zip(self.scheduler._tables.kinds, (chunk.blocks, chunk.local), strict=False):
            seen = table[kind.first(chunk.start) :]
            assert all(block >= 0 and kind.pool.holders(block) for block in seen), "a block in use is free"
            if kind.window is not None:
                live = len(table) - kind.num_gone(table)
                most = most_blocks(kind.window, self.config.num_new, self.config.block_tokens)
                assert live <= most, f"{live} blocks of a window of {kind.window} are held"

    def step(self) -> bool:
        """One turn of an engine's loop; False when nothing is left."""
        self.now += 0.01
        while len(self.formed) < (2 if self.config.is_async else 1) and self.form():
            pass
        if not self.formed:
            states = self.scheduler.states()
            waits = {state.request.id for state in states if TURN in state.holds}
            assert {state.request.id for state in states} == self.paused | waits, "requests that nothing is done for"
            return False
        self.finish_step()
        return True

    def _see(self, output: Output) -> None:
        seen = self.seen[output.id]
        assert seen.finish is None, "news after the end"
        seen.outputs.append(output)
        assert not output.prompt_logprobs or not seen.tokens, "a score after a new token"
        seen.scores += output.prompt_logprobs
        seen.tokens += output.tokens
        seen.finish = output.finish
        if seen.finish is not None:
            self.paused.discard(output.id)

    def check_end(self) -> None:
        """Every stream is what the request gives alone; nothing is left behind."""
        most = self.scheduler.max_positions
        for id, seen in self.seen.items():
            tokens, finish = expected(self.requests[id], most, self.config.stop_tokens, windows_of(self.config))
            scores = expected_scores(self.requests[id])
            if seen.is_aborted or seen.is_failing:
                assert seen.tokens == tokens[: len(seen.tokens)]
                assert seen.scores == scores[: len(seen.scores)]
                assert seen.finish in (Finish.ABORT, Finish.ERROR, finish)
            else:
                assert (seen.tokens, seen.finish) == (tokens, finish), id
                assert seen.scores == scores, id
            # An end is seen one step late when steps are formed ahead; an abort may come with all of them under way.
            assert seen.discarded <= self.config.is_async + seen.is_aborted
        self.check_empty()

    def check_empty(self) -> None:
        scheduler = self.scheduler
        for kind in scheduler._tables.kinds:
            assert kind.pool.num_free == kind.pool.num_blocks
            assert not kind.num_held
        assert not scheduler.has_work
        for name in ("_states", "_under_way"):
            assert not getattr(scheduler, name), f"{name} is left"
        for name in ("running", "paused", "queued_tokens"):
            assert not getattr(scheduler._places, name), f"{name} is left"
        assert not scheduler._places.seats._keys
        assert not scheduler._places.waiting._charged, "what was not used was not given back"
        for name in ("_coming", "_held"):
            assert not getattr(scheduler._tables, name), f"{name} is left"
        assert not len(scheduler._places.waiting)
        assert set(self.runner.requests) == set(scheduler._gone)
        counters = scheduler.stats().counters
        assert counters["generation_tokens"] == sum(len(seen.tokens) for seen in self.seen.values())
        assert sum(counters[f"finished_{finish.value}"] for finish in Finish) == len(self.seen)


def random_config(rng: random.Random, **changes: object) -> SchedulerConfig:
    size = rng.choice([1, 2, 3, 4, 8])
    values: dict[str, object] = {
        "block_tokens": size,
        "num_blocks": rng.randint(2, 40),
        "max_positions": rng.randint(3, 60),
        "max_batched_tokens": rng.choice([1, 2, 5, 16, 64]),
        "max_seqs": rng.randint(1, 8),
        "long_prefill_chunk": rng.choice([None, 1, 3, 8]),
        "prefix_cache": rng.random() < 0.7,
        "is_async": rng.random() < 0.5,
        "stop_tokens": rng.choice([(), (0,), (1, 2)]),
        "quantum": rng.choice([1, 16, 200]),
        "max_decodes": rng.choice([None, None, 1, 2]),
    }
    values["min_run"] = (1, 2, 6, 128)[int(str(values["max_positions"])) % 4]
    return SchedulerConfig(**{**values, **changes})  # type: ignore[arg-type]


def random_windows(rng: random.Random) -> dict[str, object]:
    """Kinds of layers: some with a window, or all, wider or narrower ones."""
    window = rng.choice([None, None, rng.randint(2, 24)])
    if window is not None and rng.random() < 0.5:
        return {"window": window}
    return {"window": window, "local_window": rng.randint(2, window or 24), "local_blocks": rng.randint(2, 40)}


def random_request(rng: random.Random, id: str, most: int, now: float, num_keys: int = 3) -> Request:
    length = rng.randint(1, most - 1)
    shared = [i * i % VOCABULARY for i in range(length)]
    cut = rng.randint(0, length)
    prompt = shared[:cut] + [rng.randrange(VOCABULARY) for _ in range(length - cut)]
    return Request(
        id=id,
        prompt=tuple(prompt),
        priority=rng.choice([0, 0, 0, 1, -1]),
        key=f"key{rng.randrange(num_keys)}",
        arrival=now,
        cache_salt=rng.choice(["", "", "", "a"]),
        options=rng.choice([(), (), (("adapter", "x"),)]),
        sampling=Sampling(
            max_tokens=rng.choice([0, *range(1, 31)]),
            prompt_logprobs=rng.choice([None, None, None, 0]),
            min_tokens=rng.choice([0, 0, 3]),
            stop_tokens=rng.choice([(), (), (3,)]),
            ignore_eos=rng.random() < 0.2,
        ),
    )


def random_run(
    seed: int, pauses: float = 0.0, has_drafts: bool = False, has_windows: bool = False, **arguments: object
) -> Drive:
    """One life of a server: requests come and some go, or are paused, until none is left. Checked at every step and at the end."""
    rng = random.Random(seed)
    # A tier finds blocks by their prefix.
    changes: dict[str, object] = {"prefix_cache": True} if arguments.get("tier") else {}
    if has_drafts:
        changes |= {"is_async": False, "prompt_lookup": 1 + seed % 5, "prompt_lookup_ngram": 1 + seed % 3}
    if has_windows:
        changes |= random_windows(rng)
    drive = Drive(random_config(rng, **changes), **arguments)
    most = drive.scheduler.max_positions
    if most < 2:
        return drive
    coming = rng.randint(1, 25)
    while True:
        while coming and rng.random() < 0.4:
            coming -= 1
            drive.add(random_request(rng, f"r{coming}", most, drive.now))
        if drive.seen and rng.random() < 0.05:
            drive.abort(rng.choice(list(drive.seen)))
        if drive.seen and rng.random() < 0.01:
            drive.seen[rng.choice(list(drive.seen))].is_failing = True
        if rng.random() < 0.02:
            drive.scheduler.reset_prefixes()
        if drive.seen and rng.random() < pauses:
            drive.pause(rng.choice(list(drive.seen)))
        if drive.paused and rng.random() < 0.2:
            drive.resume(rng.choice(sorted(drive.paused)))
        # In asynchronous runs not every step is formed ahead, and ends come in between.
        if drive.config.is_async and rng.random() < 0.5:
            drive.now += 0.01
            if len(drive.formed) < 2:
                drive.form()
            if drive.formed and rng.random() < 0.5:
                drive.finish_step()
        elif not drive.step() and not coming:
            if not drive.paused:
                break
            drive.resume(min(drive.paused))
    drive.check_end()
    return drive


class RandomTier:
    """A tier that saves and forgets as it likes, within what it promises."""

    def __init__(self, rng: random.Random, num_slots: int = 6, refusals: float = 0.2) -> None:
        self._rng, self._refusals = rng, refusals
        self._slot_of: dict[bytes, int] = {}
        self._free = list(range(num_slots))
        self._pinned: set[bytes] = set()
        self.saved = 0

    def filled(self, key: bytes, block: int) -> int | None:
        return self._save(key) if self._rng.random() < 0.3 else None

    def evicted(self, key: bytes, block: int) -> int | None:
        return self._save(key)

    def holds(self, key: bytes) -> bool:
        return key in self._slot_of

    def load(self, key: bytes) -> int:
        self._pinned.add(key)
        return self._slot_of[key]

    def formed(self) -> None:
        self._pinned.clear()

    def reset(self) -> None:
        self._free += self._slot_of.values()
        self._slot_of.clear()

    def _save(self, key: bytes) -> int | None:
        if key in self._slot_of or self._rng.random() < self._refusals:
            return None
        if not self._free:
            known = [other for other in self._slot_of if other not in self._pinned]
            if not known:
                return None
            self._free.append(self._slot_of.pop(self._rng.choice(known)))
        self.saved += 1
        slot = self._slot_of[key] = self._free.pop()
        return slot


def drive(**changes):
    arguments = {name: changes.pop(name) for name in ("tier", "memory", "order") if name in changes}
    values = {"num_blocks": 64, "block_tokens": 4, "max_positions": 200, "max_batched_tokens": 64, "max_seqs": 8}
    return Drive(SchedulerConfig(**{**values, **changes}), **arguments)


def request(id, length=6, *, max_tokens=5, start=0, **named):
    """A prompt of different tokens for each id, unless ``start`` is given."""
    first = start or 1 + sum(map(ord, id)) * 31 % 1000
    sampling = named.pop("sampling", None) or Sampling(max_tokens=max_tokens, ignore_eos=True)
    return Request(id=id, prompt=tuple(range(first, first + length)), sampling=sampling, **named)


def to_end(driven):
    while driven.step():
        pass
    driven.check_end()
    return driven
