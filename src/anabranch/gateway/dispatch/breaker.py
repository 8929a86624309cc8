"""The circuit breaker of a deployment, as pure functions of state, event and time.

    closed ──(≥ failures in the window and ≥ rate of them, or a fatal error)──▶ open
    open ──(its time is up; the next request is a probe)──▶ half open
    half open ──(a probe fails)──▶ open, for twice as long        half open ──(enough successes)──▶ closed

`admit` says whether a request may go and gives it a ticket; `record` takes what came of it. A ticket of an earlier phase says nothing about
the present one and is ignored, unless it brings a fatal error.
"""

from dataclasses import dataclass, replace
from typing import Literal

from anabranch.config import Config, Field, configclass

Phase = Literal["closed", "open", "half_open"]
Outcome = Literal["success", "failure", "fatal", "ignored"]

# Parts of the window that are counted.
GRAINS = 30


@configclass
class BreakerRules(Config):
    """When a breaker opens and closes.

    Attributes:
        failures: fewest failures in the window that open it.
        rate: least share of failures among what ended in the window.
        window_s: the window, seconds.
        open_s: how long it is open the first time.
        max_open_s: how long at most; each time in a row lasts twice as long as the last.
        probes: requests let through at once when half open.
        successes: probes that must succeed to close it.
        senders: so many whose attempts took too long are no single one whose requests do so.
    """

    failures: int = Field(default=5, ge=1)
    rate: float = Field(default=0.5, gt=0, le=1)
    window_s: float = Field(default=30.0, gt=0)
    open_s: float = Field(default=5.0, gt=0)
    max_open_s: float = Field(default=300.0, gt=0)
    probes: int = Field(default=1, ge=1)
    successes: int = Field(default=2, ge=1)
    senders: int = Field(default=8, ge=1)


@dataclass(frozen=True, slots=True)
class Breaker:
    """State of a breaker.

    Attributes:
        phase: where in the graph.
        ticket: grows with every change of phase.
        since: when the phase began.
        until: when an open breaker lets a probe through.
        times: openings in a row without a closing between them.
        probing: probes under way.
        passed: probes that succeeded.
        counts: (start, ended, failed) of parts of the window, oldest first.
    """

    phase: Phase = "closed"
    ticket: int = 0
    since: float = 0.0
    until: float = 0.0
    times: int = 0
    probing: int = 0
    passed: int = 0
    counts: tuple[tuple[float, int, int], ...] = ()


def would_admit(state: Breaker, rules: BreakerRules, now: float) -> bool:
    """Whether `admit` would say yes."""
    if state.phase == "closed":
        return True
    if state.phase == "open":
        return now >= state.until
    return state.probing < rules.probes


def admit(state: Breaker, rules: BreakerRules, now: float) -> tuple[Breaker, int | None]:
    """The next state, and a ticket if the request may go."""
    if state.phase == "closed":
        return state, state.ticket
    if state.phase == "open":
        if now < state.until:
            return state, None
        state = Breaker(phase="half_open", ticket=state.ticket + 1, since=now, times=state.times)
    if state.probing >= rules.probes:
        return state, None
    return replace(state, probing=state.probing + 1), state.ticket


def record(
    state: Breaker,
    rules: BreakerRules,
    ticket: int,
    outcome: Outcome,
    now: float,
    retry_after_s: float | None = None,
) -> Breaker:
    """The next state after the request with ``ticket`` has ended.

    Args:
        outcome: ``fatal`` opens at once (key refused, no credit); ``ignored`` only gives the place of a probe back.
        retry_after_s: how long the upstream asked to be left alone; takes the place of the time the rules give.
    """
    if outcome == "fatal" and state.phase != "open":
        return _opened(state, rules, now, retry_after_s)
    if ticket != state.ticket or state.phase == "open":
        return state
    if state.phase == "half_open":
        state = replace(state, probing=state.probing - 1)
        if outcome == "failure":
            return _opened(state, rules, now, retry_after_s)
        if outcome == "success":
            state = replace(state, passed=state.passed + 1)
        return _closed(state, now) if state.passed >= rules.successes else state
    if outcome == "ignored":
        return state
    counts = _counted(state.counts, rules, now, outcome == "failure")
    state = Breaker("closed", state.ticket, state.since, 0.0, state.times, 0, 0, counts)
    if outcome == "failure":
        ended, failed = sum(part[1] for part in counts), sum(part[2] for part in counts)
        if failed >= rules.failures and failed >= rules.rate * ended:
            return _opened(state, rules, now, retry_after_s)
    return state


def _opened(state: Breaker, rules: BreakerRules, now: float, retry_after_s: float | None) -> Breaker:
    open_s = rules.open_s * 2 ** min(state.times, 60) if retry_after_s is None else retry_after_s
    until = now + min(open_s, rules.max_open_s)
    return Breaker(phase="open", ticket=state.ticket + 1, since=now, until=until, times=state.times + 1)


def _closed(state: Breaker, now: float) -> Breaker:
    return Breaker(phase="closed", ticket=state.ticket + 1, since=now)


def _counted(
    counts: tuple[tuple[float, int, int], ...], rules: BreakerRules, now: float, failed: bool
) -> tuple[tuple[float, int, int], ...]:
    if counts and now - counts[-1][0] < rules.window_s / GRAINS:
        start, ended, failures = counts[-1]
        counts = (*counts[:-1], (start, ended + 1, failures + failed))
    else:
        counts = (*counts, (now, 1, int(failed)))
    oldest = now - rules.window_s
    kept = 0
    while counts[kept][0] <= oldest:
        kept += 1
    return counts[kept:] if kept else counts
