"""`StepParts`: by how many tokens each request gets on in a step: those that run, then those that wait."""

from collections import Counter
from collections.abc import Container, Sequence

from anabranch.serving.core.batch import Chunk
from anabranch.serving.core.dual_batches import DualBatches
from anabranch.serving.core.invitation import Invitation, state_expects
from anabranch.serving.core.places import Places
from anabranch.serving.core.state import RequestState
from anabranch.serving.core.tables import BlockTables
from anabranch.serving.core.tier import Memory
from anabranch.sharing import even_shares

# Of a step: a request, its epoch, and what it computes.
Part = tuple[RequestState, int, Chunk]


class StepParts:
    """Shares out the tokens of steps, one step after the other.

    Args:
        places: who runs and who waits.
        tables: where blocks come from.
        memory: decides, beside the free blocks, whether a waiting request may join those that run.
        dual_batches: who decodes in which of two steps; None for all in each.
        max_batched_tokens, max_seqs, long_prefill_chunk: see `SchedulerConfig`.

    Attributes:
        started: requests that run for the first time in the step that was formed last.
    """

    def __init__(
        self,
        places: Places,
        tables: BlockTables,
        memory: Memory | None,
        dual_batches: DualBatches | None,
        *,
        max_batched_tokens: int,
        max_seqs: int,
        long_prefill_chunk: int | None,
    ) -> None:
        self._places, self._tables, self._memory, self._dual_batches = places, tables, memory, dual_batches
        self._most_tokens, self._most_later, self._most_portion = max_batched_tokens, max_seqs, long_prefill_chunk
        self._block_tokens = tables.pool.block_tokens
        self.invitation = Invitation(places, tables, memory)
        self.started: list[RequestState] = []
        # Of the step that is being formed: whether blocks were short, and whether several keys share it.
        self._is_short = self._is_shared = False

    def form(self, step: int) -> tuple[list[Part], int]:
        """The parts of a step, and what is left of its tokens."""
        places, parts = self._places, list[Part]()
        self._is_short, self._is_shared, self.started = False, places.seats.is_shared, []
        able = places.set_aside() if places.paused else places.running
        self.invitation.renew(step)
        # But for those who made room.
        able = [state for state in able if state.blocks]
        turn = None if self._dual_batches is None else self._dual_batches.take(able)
        budget = self._continue_running(able, parts, self._most_tokens, turn, step)
        # None of them has a block for its token; the first in rank always gets one.
        if not parts and turn is not None:
            budget = self._continue_running(able, parts, budget, None, step)
        if not self._is_short and budget and len(places.waiting) and not places.is_full:
            budget = self._admit_waiting(parts, budget, step)
        if self._is_shared and parts:
            computed: Counter[str] = Counter()
            for state, _, chunk in parts:
                computed[state.key] += len(chunk.tokens)
            places.seats.computed(computed)
        return parts, budget

    def _continue_running(
        self,
        running: Sequence[RequestState],
        parts: list[Part],
        budget: int,
        turn: Container[RequestState] | None,
        step: int,
    ) -> int:
        """Chunks of running requests, of those that decode only the ones in ``turn``; the budget that is left."""
        block_tokens = self._block_tokens
        counts = [len(state.tokens) - state.computed for state in running]
        reserved = counts.count(1)
        shares = self._prompt_shares(running, counts, budget - reserved) if self._is_shared else None
        for state, count in zip(running, counts, strict=True):
            # Sent back by one before it, and so are all behind it.
            if not state.blocks:
                break
            if count == 1:
                reserved -= 1
                if state.awaits_last or (turn is not None and state not in turn):
                    # The step under way gives its last token, or the next one is its turn.
                    continue
            elif shares is None or not count:
                count = self._portion(count, budget - reserved)
            else:
                count = self._portion(count, min(budget - reserved, shares[state.key]))
                shares[state.key] -= count
            if len(state.blocks) * block_tokens < state.computed + count:
                count = self._make_room(state, count)
            if count > 0:
                budget -= count
                parts.append((state, state.epoch, state.advance(count, step)))
        return budget

    def _prompt_shares(
        self, running: Sequence[RequestState], counts: Sequence[int], budget: int
    ) -> dict[str, int] | None:
        """Tokens for the prompts of each key, of those that decodes leave, the one that is invited among them; None for one key alone."""
        wanted: Counter[str] = Counter()
        for state, count in zip(running, counts, strict=True):
            if count > 1:
                wanted[state.key] += self._portion(count, budget)
        invited = self.invitation.state
        if invited is not None:
            wanted[invited.key] += self._portion(len(invited.tokens), budget)
        if len(wanted) < 2:
            return None
        return dict(zip(wanted, even_shares(list(wanted.values()), budget), strict=True))

    def _portion(self, missing: int, budget: int) -> int:
        cap = self._most_portion
        return min(missing, budget) if cap is None else min(missing, budget, cap)

    def _make_room(self, state: RequestState, count: int) -> int:
        """Blocks for ``count`` more tokens, from requests of later rank if need be; for how many tokens there is room."""
        tables, places = self._tables, self._places
        while not tables.grow(state, state.computed + count):
            self._is_short = True
            last = next((each for each in places.paused if each.blocks), places.running[-1])
            if last is not state and not tables.will_hold(state, state.computed + count):
                places.send_back(last)
            else:
                # It is the last itself, or a step under way is about to give back enough: it takes what there is and
                # waits.
                count = tables.can_hold(state) - state.computed
        return count

    def _admit_waiting(self, parts: list[Part], budget: int, step: int) -> int:
        """First chunks of waiting requests, in order, until one does not fit; the budget that is left."""
        tables, places, memory = self._tables, self._places, self._memory
        promised = tables.promised(places.running)
        expected = None if memory is None else [state_expects(each, memory) for each in places.running]
        later: list[RequestState] = []
        while budget and not places.is_full and len(later) <= self._most_later:
            state = self.invitation.take()
            if state is None:
                break
            cached = tables.look_up(state)
            if cached is None:
                places.waiting.take(state)
                later.append(state)
                continue
            if tables.short(state, cached, promised) > 0:
                break
            if memory is not None and expected is not None:
                candidate = state_expects(state, memory)
                if expected and not memory.admits(expected, candidate):
                    break
                expected.append(candidate)
            places.waiting.take(state)
            count = self._start(state, cached, budget)
            tables.promise(promised, state)
            budget -= count
            parts.append((state, state.epoch, state.advance(count, step)))
        for state in later:
            places.waiting.add_front(state)
        return budget

    def _start(self, state: RequestState, cached: list[list[int]], budget: int) -> int:
        """Let a waiting request run, from behind its cached blocks; the size of its first chunk."""
        tables = self._tables
        tables.begin(state, cached)
        count = self._portion(min(len(state.tokens), tables.can_hold(state)) - state.computed, budget)
        has_room = tables.grow(state, state.computed + count)
        assert has_room, "blocks for the whole request were counted"
        assert count > 0, "what its windows need was counted"
        self._places.run(state)
        if not state.is_known:
            state.is_known = True
            # Of one that began elsewhere it stays what was so there: here its own tokens may be found too, those of its answer among them.
            if state.num_cached is None:
                state.num_cached = min(state.computed, state.num_prompt)
            state.cached_tokens = state.num_cached
            self.started.append(state)
        return count
