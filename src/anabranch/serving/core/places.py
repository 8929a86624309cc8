"""`Places`: which requests run, which wait and which are paused, and how they come from one to the other.

One that runs has blocks and a seat (`Seats`), one that waits has neither. One that is paused keeps what it has until others need it.
"""

from bisect import insort
from collections.abc import Container

from anabranch.serving.core.queue import WaitingQueue
from anabranch.serving.core.seats import Seats
from anabranch.serving.core.state import RequestState
from anabranch.serving.core.tables import BlockTables


class Places:
    """All requests that have not ended.

    Args:
        tables: where their blocks come from.
        under_way: the steps that are, by number: what a request has in one of these is free when it has run.
        most_running: requests that run at a time.
        quantum, min_run: see `SchedulerConfig`.

    Attributes:
        running: by rank.
        waiting: the others but for those that are paused without blocks.
        paused: in the order in which they were.
        seats: what each key has.
        queued_tokens: of the prompts of those that wait.
        preemptions: how often one was sent back or made way.
    """

    def __init__(
        self, tables: BlockTables, under_way: Container[int], *, most_running: int, quantum: int, min_run: int
    ) -> None:
        self._tables, self._under_way, self._most_running = tables, under_way, most_running
        self.running: list[RequestState] = []
        self.waiting: WaitingQueue[RequestState] = WaitingQueue(quantum)
        self.paused: dict[RequestState, None] = {}
        self.seats = Seats(min_run, most_running)
        self.queued_tokens = self.preemptions = 0

    @property
    def is_full(self) -> bool:
        """Whether no more can run."""
        return len(self.running) >= self._most_running

    def come(self, state: RequestState) -> None:
        """A new request waits."""
        self.waiting.add(state)
        self.seats.come(state.key)
        self.queued_tokens += state.num_prompt

    def run(self, state: RequestState) -> None:
        """One that was taken from those that wait has its blocks."""
        insort(self.running, state, key=rank_of)
        self.seats.sit(state.key)
        self.queued_tokens -= state.num_prompt

    def go(self, state: RequestState) -> None:
        """One has ended, wherever it is."""
        if state.blocks:
            self._take_seat(state)
        elif state not in self.paused:
            self.waiting.remove(state)
            self.queued_tokens -= state.num_prompt
        self.seats.go(state.key)
        self.paused.pop(state, None)
        self.waiting.refund(state, state.most_tokens - len(state.tokens))

    def pause(self, state: RequestState) -> None:
        """Nothing more is computed for it."""
        self.paused[state] = None
        if not state.blocks:
            self.waiting.remove(state)
            self.queued_tokens -= state.num_prompt

    def resume(self, state: RequestState) -> None:
        """One that is paused goes on."""
        del self.paused[state]
        if not state.blocks:
            (self.waiting.add_front if state.is_known else self.waiting.add)(state)
            self.queued_tokens += state.num_prompt

    def set_aside(self) -> list[RequestState]:
        """Take their places from paused requests if somebody waits; the running ones that are not paused."""
        if len(self.waiting):
            for state in [state for state in self.paused if state.blocks]:
                self.send_back(state)
        return [state for state in self.running if state not in self.paused]

    def send_back(self, state: RequestState) -> None:
        """Preempt: the blocks go, the tokens stay."""
        self._take_seat(state)
        self.preemptions += 1
        if state not in self.paused:
            self.waiting.add_front(state)
            self.queued_tokens += state.num_prompt

    def make_way(self, state: RequestState) -> None:
        """Preempt for another key: as one that comes anew, with what it has left to do."""
        self._take_seat(state)
        self.preemptions += 1
        left = state.most_tokens - len(state.tokens)
        self.waiting.refund(state, left)
        state.cost = max(1, left)
        self.waiting.add(state)
        self.queued_tokens += state.num_prompt

    def _take_seat(self, state: RequestState) -> None:
        self.running.remove(state)
        self.seats.rise(state.key)
        self._tables.release(state, self._under_way)


def rank_of(state: RequestState) -> tuple[int, float, int]:
    """The order of service."""
    return state.rank
