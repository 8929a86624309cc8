"""`Admission`: whether a request may join the queue, and if not, when to come back.

A queue without a bound serves everybody too late. What is over a limit is refused at once, and so is a request that would get its
first token after its deadline; both are told after how many seconds there should be room, from how fast the queue has drained lately.

Where keys share an engine, one that has fewer seats than another gets some of those (`anabranch.serving.core.seats`), however long the
requests of that other one take. What it waits for is known from those that came like it, not from a queue that stands still: one whose key
has nothing in flight from those whose keys had nothing either when they came, one whose key has one from those that had one, and so on
(two or three, four to seven, ...). So nobody is refused for what keys wait that have more. Prompts share the steps, so it is also not
refused for how long longer prompts wait.

A request may wait for what is not the engine's time: its adapters are read or have to find memory, its grammar is compiled. It stands aside
meanwhile (`Ticket.prepared`): it holds up nobody, and what it waits for is held against nobody, whatever others ask for. Who would have
to wait for the like is let in, and told when it does: what is in memory, and whose turn it is, is known to the engine alone.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from anabranch.config import Config, Field, configclass
from anabranch.errors import InputError
from anabranch.serving.core.overload import REASONS, OverloadError, overloaded, seconds_until
from anabranch.serving.core.pace import DrainRate, Line
from anabranch.sharing import most_beside

__all__ = ["Admission", "AdmissionConfig", "Held", "Ticket"]


@configclass
class AdmissionConfig(Config):
    """Limits; None for none.

    Attributes:
        max_in_flight: requests that are admitted and have not ended.
        max_queued: of these, requests without a first token.
        max_queued_tokens: prompt tokens of the queued ones. A single request larger than that is admitted to an empty queue; where several
            keys share an engine, the only one of a key counts for no more than the key's part.
        max_per_key: requests of one key in flight.
        key_share: where several keys share an engine, the part of each of the first three that one may have of what the others leave:
            a key alone never takes the last place, and among n busy ones there is room for another (`anabranch.sharing`). A key that has
            nothing is let in where there is room; 1 shares nothing out.
        status: HTTP status of a refusal: 429, or 503 as some balancers want it.
        window_s: time over which the drain rate is averaged.
    """

    max_in_flight: int | None = Field(default=256, ge=1)
    max_queued: int | None = Field(default=128, ge=1)
    max_queued_tokens: int | None = Field(default=65536, ge=1)
    max_per_key: int | None = Field(default=None, ge=1)
    key_share: float = Field(default=0.5, gt=0, le=1)
    status: int = Field(default=429, ge=400, le=599)
    window_s: float = Field(default=30.0, gt=0)

    def build(self, *, is_shared: bool = False) -> "Admission":
        """Make the gate; see `Admission`."""
        return Admission(self, is_shared=is_shared)


@dataclass
class Held:
    """What is let in: requests that have not ended, those of them without a first token, prompt tokens of these, and as what they count."""

    in_flight: int = 0
    queued: int = 0
    queued_tokens: int = 0
    counted_tokens: int = 0

    @property
    def started(self) -> int:
        """Those that have a first token."""
        return self.in_flight - self.queued

    def enter(self, num_tokens: int, counted: int) -> None:
        """One more, queued."""
        self.in_flight += 1
        self.queued += 1
        self.queued_tokens += num_tokens
        self.counted_tokens += counted

    def dequeue(self, num_tokens: int, counted: int) -> None:
        """One is no longer queued."""
        self.queued -= 1
        self.queued_tokens -= num_tokens
        self.counted_tokens -= counted


class Admission(Held):
    """The gate before an engine. For one thread (an event loop).

    Args:
        config: limits.
        is_shared: there are several keys, none of which may keep the others out (``key_share``).
        clock: seconds, monotonic.

    Attributes:
        in_flight, queued, queued_tokens: as in the config.
        rejections: refusals by reason, all of them there from the start.
    """

    def __init__(
        self,
        config: AdmissionConfig | None = None,
        *,
        is_shared: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.config, self._is_shared, self._clock = config or AdmissionConfig(), is_shared, clock
        self.rejections: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._of_key: dict[str, Held] = {}
        window_s = self.config.window_s
        # All that are queued and wait for nothing but the engine.
        self._line = Line[Ticket](window_s)
        # Of these, those for which other keys make room, by how many their keys had in flight when they came (bits of that number).
        self._owed: defaultdict[int, Line[Ticket]] = defaultdict(lambda: Line(window_s, is_passed=True))
        # Prompt tokens that leave the queue, and requests that end.
        self._token_rate, self._end_rate = DrainRate(window_s), DrainRate(window_s)

    def admit(self, num_tokens: int, key: str = "", deadline_s: float | None = None) -> "Ticket":
        """Let a request of ``num_tokens`` prompt tokens in; close the ticket when it ends.

        ``deadline_s``: seconds from now by which its first token must be there. Raises OverloadError.
        """
        return self.admit_all([num_tokens], key, deadline_s)[0]

    def admit_all(self, prompts: Sequence[int], key: str = "", deadline_s: float | None = None) -> list["Ticket"]:
        """`admit` for each of ``prompts`` (tokens of each), or for none of them.

        When nothing is in flight no deadline is refused: what is known of the pace is then old, and only who is let in renews it. Raises
        InputError for more than would be let in even then.
        """
        if not self.in_flight:
            deadline_s = None
        tickets: list[Ticket] = []
        try:
            tickets.extend(self._admit(num_tokens, key, deadline_s) for num_tokens in prompts)
        except OverloadError as error:
            for ticket in tickets:
                ticket.close()
            most = self._most_together(prompts)
            if most < len(prompts):
                self.rejections[error.reason] -= 1
                raise InputError(
                    f"{len(prompts)} sequences are asked for together (n, best_of, prompts); this server never takes more than {most} of "
                    "them at once, so ask for fewer in one request"
                ) from None
            raise
        return tickets

    def _most_together(self, prompts: Sequence[int]) -> int:
        """How many of these, from the first on, are let in together where there is nothing else."""
        empty = Admission(self.config, is_shared=self._is_shared, clock=self._clock)
        try:
            for num_tokens in prompts:
                empty._admit(num_tokens, "", None)
        except OverloadError:
            return empty.in_flight
        return len(prompts)

    def _admit(self, num_tokens: int, key: str, deadline_s: float | None) -> "Ticket":
        self.check(num_tokens, key)
        if deadline_s is not None:
            expected_s = self.expected_first_token_s(num_tokens, key)
            if expected_s is not None and expected_s > deadline_s:
                text = f"the first token is expected in {expected_s:.1f} s, after the deadline of {deadline_s:g} s"
                self.rejections["deadline"] += 1
                raise self._refusal("deadline", text, expected_s - deadline_s)
        return Ticket(self, num_tokens, key, self._counted(num_tokens, key), self._owed_line(key))

    def _owed_line(self, key: str) -> "Line[Ticket] | None":
        """Those that came like one more of this key, if another makes room for it; None if not.

        One does if the key has no seat yet, or were all it has seated, the other had two more.
        """
        if not self._is_shared:
            return None
        own = self._of_key.get(key, Held())
        most = max((held.started for name, held in self._of_key.items() if name != key), default=0)
        is_owed = not own.in_flight or most - own.queued >= own.in_flight + 2
        return self._owed[own.in_flight.bit_length()] if is_owed else None

    def _counted(self, num_tokens: int, key: str) -> int:
        """As how many tokens a prompt counts for the limit: the only one of a key, however long, leaves the others their part."""
        limit = self.config.max_queued_tokens
        if not self._is_shared or limit is None or self._of_key.get(key, Held()).queued:
            return num_tokens
        return min(num_tokens, int(most_beside(self.counted_tokens, limit, self.config.key_share)))

    def has_spare(self, num_tokens: int, key: str = "") -> bool:
        """Whether a request that is in no hurry may come in now: it would be let in, and leaves a part of each limit to those that are.

        That part is what ``key_share`` leaves of it, whether there are several keys or not. Counts no refusal.
        """
        config = self.config
        for limit, has, more in (
            (config.max_in_flight, self.in_flight, 1),
            (config.max_queued, self.queued, 1),
            (config.max_queued_tokens, self.counted_tokens, num_tokens),
        ):
            if limit is not None and has + more > config.key_share * limit:
                return False
        return self.has_room(num_tokens, key)

    def has_room(self, num_tokens: int, key: str = "") -> bool:
        """Whether `check` would pass; counts no refusal."""
        try:
            self._find_room(num_tokens, key)
        except OverloadError:
            return False
        return True

    def expected_first_token_s(self, num_tokens: int, key: str = "") -> float | None:
        """Seconds to the first token of a request that came now and had all it needs; None while nothing is known of the engine's pace.

        For one that is owed a seat that is the pace of those that came like it. If none has waited lately nothing is known.
        """
        now, owed = self._clock(), self._owed_line(key)
        expected_s = self._line.expected_s(key, num_tokens, now)
        if expected_s is None or owed is None:
            return expected_s
        owed_s = owed.expected_s(key, num_tokens, now)
        return None if owed_s is None else min(expected_s, owed_s)

    def check(self, num_tokens: int, key: str = "") -> None:
        """Raises OverloadError for a request that would not be let in now, whatever its deadline."""
        try:
            self._find_room(num_tokens, key)
        except OverloadError as error:
            self.rejections[error.reason] += 1
            raise

    def _find_room(self, num_tokens: int, key: str) -> None:
        config, now = self.config, self._clock()
        if config.max_in_flight is not None and self.in_flight >= config.max_in_flight:
            wait_s = seconds_until(self.in_flight + 1 - config.max_in_flight, self._end_rate.per_s(now))
            raise self._refusal("in_flight", f"{self.in_flight} requests are in flight, as many as may be", wait_s)
        own = self._of_key[key].in_flight if key in self._of_key else 0
        if config.max_per_key is not None and own >= config.max_per_key:
            # This key's requests end as often as others, so its share of all that end is its share of what is in flight.
            rate = self._end_rate.per_s(now)
            wait_s = seconds_until(own + 1 - config.max_per_key, None if rate is None else rate * own / self.in_flight)
            raise self._refusal(
                "key_concurrency", f"{own} requests of this key are in flight, as many as may be", wait_s
            )
        if config.max_queued is not None and self.queued >= config.max_queued:
            wait_s = seconds_until(self.queued + 1 - config.max_queued, self._line.rate.per_s(now))
            raise self._refusal("queued", f"{self.queued} requests wait, as many as may", wait_s)
        counted, limit = self._counted(num_tokens, key), config.max_queued_tokens
        over = 0 if limit is None else self.counted_tokens + counted - limit
        if over > 0 and self.queued:
            wait_s = seconds_until(self._tokens_before(over), self._token_rate.per_s(now))
            text = f"{self.queued_tokens} prompt tokens wait; {num_tokens} more are over the limit of {config.max_queued_tokens}"
            raise self._refusal("queued_tokens", text, wait_s)
        self._check_share(num_tokens, key)

    def _tokens_before(self, over: float, key: str | None = None) -> int:
        """Prompt tokens that are through when ``over`` of what they count for are, of all or of one key: a prompt goes as a whole."""
        tokens, freed = 0, 0.0
        for ticket in self._line.waiting:
            if freed >= over:
                break
            if key is None or ticket.key == key:
                tokens, freed = tokens + ticket.num_tokens, freed + ticket.counted
        return tokens

    def _check_share(self, num_tokens: int, key: str) -> None:
        """Raises OverloadError where a key would have more than its part of what the others leave."""
        if not self._is_shared or key not in self._of_key:
            return
        config, held, now = self.config, self._of_key[key], self._clock()
        most_tokens = config.max_queued_tokens
        for what, limit, total, has, more, rate in (
            (
                "requests of this key are in flight",
                config.max_in_flight,
                self.in_flight,
                held.in_flight,
                1,
                self._end_rate,
            ),
            ("requests of this key wait", config.max_queued, self.queued, held.queued, 1, self._line.rate),
            (
                "prompt tokens of this key wait",
                most_tokens,
                self.counted_tokens,
                held.counted_tokens,
                num_tokens,
                self._token_rate,
            ),
        ):
            most = math.inf if limit is None else most_beside(total - has, limit, config.key_share)
            if has and has + more > most:
                over, per_s = min(has + more - most, has), rate.per_s(now)
                if rate is self._token_rate:
                    has, total, over = held.queued_tokens, self.queued_tokens, self._tokens_before(over, key)
                # Of what goes its part goes for it.
                wait_s = seconds_until(over, None if per_s is None else per_s * has / total)
                text = f"{has} {what}; beside the other keys {max(int(most), 1)} may"
                raise self._refusal("key_share", text, wait_s)

    def _refusal(self, reason: str, text: str, wait_s: float) -> OverloadError:
        return overloaded(reason, text, wait_s, self.config.status)

    def _lines(self, ticket: "Ticket") -> list["Line[Ticket]"]:
        """Those that a request waits in."""
        return [self._line, *([] if ticket.owed is None else [ticket.owed])]

    def _enter(self, ticket: "Ticket") -> None:
        self.enter(ticket.num_tokens, ticket.counted)
        self._of_key.setdefault(ticket.key, Held()).enter(ticket.num_tokens, ticket.counted)
        self._end_rate.resume(self._clock())
        self._line_up(ticket)

    def _line_up(self, ticket: "Ticket") -> None:
        now = self._clock()
        for line in self._lines(ticket):
            line.join(ticket, now)
        self._token_rate.resume(now)

    def _dequeue(self, ticket: "Ticket", *, is_served: bool) -> None:
        self.dequeue(ticket.num_tokens, ticket.counted)
        self._of_key[ticket.key].dequeue(ticket.num_tokens, ticket.counted)
        self._leave_line(ticket, is_served=is_served)

    def _leave_line(self, ticket: "Ticket", *, is_served: bool) -> None:
        """One has its first token, or waits for the engine no more without it; nothing for one that stands aside."""
        now = self._clock()
        if ticket not in self._line.waiting:
            return
        for line in self._lines(ticket):
            line.leave(ticket, now, is_served=is_served)
        if is_served:
            self._token_rate.drained(ticket.num_tokens, now)
        else:
            # One that goes away makes room, but says nothing of the engine's pace.
            self._token_rate.forget(next(iter(self._line.waiting.values()), now), now)
        if not self._line.waiting:
            self._token_rate.pause(now)

    def _leave(self, ticket: "Ticket") -> None:
        now = self._clock()
        self.in_flight -= 1
        self._of_key[ticket.key].in_flight -= 1
        if not self._of_key[ticket.key].in_flight:
            del self._of_key[ticket.key]
        self._end_rate.drained(1, now)
        if not self.in_flight:
            self._end_rate.pause(now)


class Ticket:
    """A request that was let in. Also a context manager that closes it.

    ``owed``: those for which, as for it, other keys make room.
    """

    __slots__ = ("_admission", "_is_open", "_is_queued", "counted", "key", "num_tokens", "owed")

    def __init__(
        self, admission: Admission, num_tokens: int, key: str, counted: int, owed: "Line[Ticket] | None"
    ) -> None:
        self._admission, self.num_tokens, self.key, self.counted, self.owed = admission, num_tokens, key, counted, owed
        self._is_open = self._is_queued = True
        admission._enter(self)

    def prepared(self, is_prepared: bool | None) -> None:
        """What it needs beside the engine is there; False while it is not: it is queued then, and stands aside. None says nothing."""
        if not self._is_queued or is_prepared is None:
            return
        self._admission._leave_line(self, is_served=False)
        if is_prepared:
            self._admission._line_up(self)

    def started(self) -> None:
        """Its first token is there. A second call does nothing."""
        if self._is_queued:
            self._is_queued = False
            self._admission._dequeue(self, is_served=True)

    def close(self) -> None:
        """It has ended, well or not. A second call does nothing."""
        if self._is_queued:
            self._is_queued = False
            self._admission._dequeue(self, is_served=False)
        if self._is_open:
            self._is_open = False
            self._admission._leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
