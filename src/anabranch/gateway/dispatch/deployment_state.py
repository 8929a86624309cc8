"""`Live`: a deployment with how it is doing now."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from anabranch.bounds import LARGEST_INT
from anabranch.errors import ConfigError
from anabranch.gateway.dispatch.bill import bill, is_unpriced
from anabranch.gateway.dispatch.breaker import Breaker, BreakerRules, Outcome, admit, record, would_admit
from anabranch.gateway.dispatch.deployments import Deployment
from anabranch.gateway.dispatch.output_speed import OutputSpeed
from anabranch.gateway.dispatch.plain_transport import plain_transport
from anabranch.gateway.dispatch.senders import OWN, Senders, is_own
from anabranch.gateway.dispatch.shared_rooms import Full
from anabranch.gateway.dispatch.window import SlidingSum
from anabranch.gateway.in_flight import InFlight
from anabranch.gateway.logged_error import raised
from anabranch.gateway.plain_values import said, whole_of
from anabranch.gateway.providers.provider import Failure, FailureKind, Provider, Transport, Usage
from anabranch.routers.money import Price
from anabranch.web.turns import plainly

logger = logging.getLogger(__name__)

# Names of tiers that the log speaks of, for one deployment.
ODD_TIERS = 8

# Weight of the newest observation in smoothed values.
ALPHA = 0.1

# Of a stream's time since its first token, the part in which it was waited for: in the rest its reader was, which may have held it up.
TELLING_SHARE = 0.75

# Share of failures, smoothed, above which a deployment is not trusted blindly.
SHAKY = 0.05

# Shortest silence that casts doubt, and in multiples of how long it takes smoothly:
SILENT_S = 1.0
SILENT_TIMES = 4.0
MINUTE_S = 60.0

# Why a breaker changed that another process told of.
TOLD = "another process said so"

OnChange = Callable[["Live", str, str, float], None]


class Live:
    """State of one deployment. All methods are synchronous: nothing can come between a look and a step.

    Attributes:
        model: name of its group.
        in_flight: attempts under way.
        waiting: those of them that have brought nothing yet.
        failing: smoothed share of attempts that failed.
        first_token_s: smoothed; None before the first.
        token_s: smoothed seconds per completion token of a stream after the first.
        latency_s: smoothed seconds to a whole answer.
        speed: how fast it makes tokens at most, as is declared.
        rests_until: the upstream asked to be left alone until then.
        full_until: all processes together have used up its limits until then, for attempts of ``full_tokens`` and more.
        senders: what each of them met here.
        is_doubted: it refused somebody for what may well be its own fault, and has served nobody since.
    """

    def __init__(
        self,
        model: str,
        deployment: Deployment,
        price: Price,
        rules: BreakerRules,
        http: Transport,
        on_change: OnChange,
    ) -> None:
        self.model, self.deployment, self.rules = model, deployment, rules
        self.name = deployment.name
        self.price = price if deployment.price is None else deployment.price
        self.provider: Provider = deployment.provider.build()
        self.transport = plain_transport(self.provider.transport(http), http, deployment.name)
        self.breaker = Breaker()
        self.in_flight, self.waiting, self.failing, self.rests_until = 0, 0, 0.0, 0.0
        self.full_until, self.full_tokens = 0.0, 0
        self.first_token_s: float | None = None
        self.token_s: float | None = None
        self.latency_s: float | None = None
        self.speed = OutputSpeed(deployment.name, deployment.output_speed)
        self.requests, self.tokens = SlidingSum(MINUTE_S), SlidingSum(MINUTE_S)
        self._on_change, self._heard_at = on_change, 0.0
        # Tiers that were told and have no price, of which the log has spoken.
        self._odd_tiers: set[str] = set()
        self.senders = Senders(rules.window_s, rules.senders)
        most, share = deployment.max_in_flight, deployment.key_share
        self._parts = InFlight(None if most is None else lambda: (most, share))
        self.is_doubted = False
        # The last of what its breaker counts; None after a success.
        self.failed_of: FailureKind | None = None

    def context(self) -> int | None:
        """Most prompt and completion tokens that its provider, which has started, knows of; None for none.

        Raises ConfigError for what is no number of tokens, and where it cannot say.
        """
        try:
            given = plainly(lambda: self.provider.context)
            found = plainly(lambda: whole_of(given))
        except Exception as error:
            raise ConfigError(
                f"deployment {self.name}: its provider ({self.provider.kind}) cannot say its context: {raised(error)}"
            ) from error
        if given is not None and (found is None or not 1 <= found <= LARGEST_INT):
            raise ConfigError(
                f"deployment {self.name}: context of its provider ({self.provider.kind}) is {said(given)}; it must be a whole number of "
                "tokens, at least 1, or None"
            )
        return found

    def bill(self, usage: Usage, asked: Usage | None = None) -> int:
        """Nano-dollars of a call of it; see `bill`."""
        if is_unpriced(self.price, usage) and usage.tier not in self._odd_tiers and len(self._odd_tiers) < ODD_TIERS:
            self._odd_tiers.add(usage.tier)
            logger.warning(
                "deployment %s says that it served the tier %r, which its price does not name (tiers); such calls are charged as the "
                "dearest that it names, which may be less than the bill",
                self.name,
                usage.tier,
            )
        writes = self.provider.caches_unasked and self.price.cache_write is not None
        return bill(self.price, usage, asked, writes=writes)

    @property
    def stops_when_closed(self) -> bool:
        """It stops making a stream, and billing it, once the connection is closed."""
        said = self.deployment.stops_when_closed
        return self.provider.stops_when_closed if said is None else said

    @property
    def is_shaky(self) -> bool:
        """It failed lately more often than now and then."""
        return self.failing > SHAKY

    def is_silent(self, now: float) -> bool:
        """Attempts wait for a first sign, and none has come for much longer than usual: they may all be lost, though none has failed."""
        usual_s = max(self.latency_s or 0.0, self.first_token_s or 0.0)
        return self.waiting > 0 and now - self._heard_at > max(SILENT_S, SILENT_TIMES * usual_s)

    def is_doubtful(self, now: float) -> bool:
        """The next attempt had better not be a request's last."""
        return self.is_shaky or self.is_doubted or self.is_silent(now)

    def heard(self, now: float) -> None:
        """The first token of an attempt has come. `end` must be told that it had."""
        self.waiting -= 1
        self._heard_at = now

    def is_shut(self, now: float) -> bool:
        """Nobody may be sent there, however much room there is: it is thought broken, or asked to be left alone."""
        return now < self.rests_until or not would_admit(self.breaker, self.rules, now)

    def can_take(self, now: float, tokens: int, sender: str | None = None) -> bool:
        """Whether a request of so many tokens may go there. None asks for no sender: whether there is room for anybody."""
        own = self.deployment
        if self.is_shut(now):
            return False
        if now < self.full_until and tokens >= self.full_tokens:
            return False
        if own.max_in_flight is not None and self.in_flight >= own.max_in_flight:
            return False
        if sender is not None and not self._has_part(sender):
            return False
        if own.rpm is not None and self.requests.at(now) + 1 > own.rpm:
            return False
        return own.tpm is None or self.tokens.at(now) + tokens <= own.tpm

    def _has_part(self, sender: str) -> bool:
        """Whether a free place is one for this sender. What the gateway asks for itself leaves others one more."""
        most, is_ours = self.deployment.max_in_flight, is_own(sender)
        if is_ours and most is not None and self.in_flight and self.in_flight + 1 >= most:
            return False
        return self._parts.has_part(_whose(sender), is_key=not is_ours)

    def free_in_s(self, now: float, tokens: int) -> float:
        """Seconds until it may be asked again, as far as that is known."""
        own = self.deployment
        waits = [self.rests_until - now, self.breaker.until - now if self.breaker.phase == "open" else 0.0]
        if tokens >= self.full_tokens:
            waits.append(self.full_until - now)
        if own.rpm is not None:
            waits.append(self.requests.room_in_s(now, 1, own.rpm))
        if own.tpm is not None:
            waits.append(self.tokens.room_in_s(now, tokens, own.tpm))
        return max(0.0, *waits)

    def begin(self, now: float, tokens: int, sender: str = "") -> int:
        """Count an attempt in; `can_take` must have said yes. Returns a ticket for `end`, which is told the same sender."""
        before = self.breaker
        self.breaker, ticket = admit(before, self.rules, now)
        assert ticket is not None
        if before.phase != self.breaker.phase:
            self._on_change(self, before.phase, "its time is up", now)
        if not self.waiting:
            # From now on something is waited for.
            self._heard_at = now
        self.in_flight += 1
        self.waiting += 1
        self._parts.count(_whose(sender))
        own = self.deployment
        if own.rpm is not None:
            self.requests.add(now)
        if own.tpm is not None:
            self.tokens.add(now, tokens)
        return ticket

    def leave(self, sender: str = "") -> None:
        """An attempt of a sender is at the upstream no more; `end` must be told that it has left."""
        self._parts.leave(_whose(sender))
        self.in_flight -= 1

    def end(
        self,
        ticket: int,
        outcome: Outcome,
        now: float,
        failure: Failure | None = None,
        was_heard: bool = False,
        sender: str = "",
        has_left: bool = False,
    ) -> None:
        """Count an attempt out. Its first token ``was_heard`` if `heard` was called for it, and it ``has_left`` if `leave` was."""
        if not has_left:
            self.leave(sender)
        self.waiting -= not was_heard
        if outcome == "success":
            self._heard_at, self.is_doubted = now, False
        if outcome != "ignored":
            self.failed_of = None if failure is None else failure.kind
            self.failing += ALPHA * ((outcome != "success") - self.failing)
        before = self.breaker
        wait_s = None if failure is None else failure.retry_after_s
        self.breaker = record(before, self.rules, ticket, outcome, now, wait_s)
        if failure is not None and wait_s and outcome != "ignored":
            self.rests_until = max(self.rests_until, now + wait_s)
        if before.phase != self.breaker.phase:
            self._on_change(self, before.phase, "it works again" if failure is None else failure.kind, now)

    def back_out(self, ticket: int, now: float, tokens: int, full: Full, sender: str = "") -> None:
        """Count an attempt out as if it had never been: other processes had taken the room that it was given here."""
        self.end(ticket, "ignored", now, sender=sender)
        if self.deployment.rpm is not None:
            self.requests.give_back(1)
        if self.deployment.tpm is not None:
            self.tokens.give_back(tokens)
        if full.wait_s is not None:
            self.full_until, self.full_tokens = now + min(full.wait_s, MINUTE_S), full.tokens

    def told_open(self, for_s: float, times: int, now: float) -> None:
        """Another process found it out of order: nobody is sent there for so long. One that is open already stays as it is.

        Args:
            for_s: seconds.
            times: openings in a row, there.
            now: the time.
        """
        before = self.breaker
        if before.phase == "open" or for_s <= 0:
            return
        until = now + min(for_s, self.rules.max_open_s)
        self.breaker = Breaker("open", before.ticket + 1, now, until, max(times, before.times, 1))
        self._on_change(self, before.phase, TOLD, now)

    def told_well(self, now: float) -> None:
        """Another process found that it works again: the next request is a probe."""
        if self.breaker.phase == "open":
            self.breaker = replace(self.breaker, until=min(self.breaker.until, now))

    def spent(self, now: float, tokens: int) -> None:
        """So many completion tokens were made."""
        if self.deployment.tpm is not None and tokens:
            self.tokens.add(now, tokens)

    def corrected(self, now: float, since: float, by: int) -> None:
        """The prompt of an attempt that began at ``since`` had so many tokens more (or less) than it was counted in with."""
        if self.deployment.tpm is None:
            return
        if by > 0:
            self.tokens.add(now, min(by, self.deployment.tpm))
        else:
            self.tokens.take_back(since, -by)

    def timed(
        self,
        latency_s: float | None,
        first_token_s: float | None = None,
        tokens: int = 0,
        waited_s: float | None = None,
    ) -> None:
        """Learn from how long a successful attempt took.

        Args:
            latency_s: in all; None if that says nothing.
            first_token_s: of them, up to a stream's first token; None of a whole answer.
            tokens: that it came to.
            waited_s: of them, those after the first token in which the upstream was waited for; None for all. What its reader took longer
                than that is no time of the upstream's: a little is left out, and of a stream that was read slowly nothing is learned
                but its first token.
        """
        if latency_s is not None and first_token_s is not None and waited_s is not None:
            is_telling = waited_s >= TELLING_SHARE * (latency_s - first_token_s)
            latency_s = first_token_s + waited_s if is_telling else None
        if latency_s is not None:
            self.latency_s = _smoothed(self.latency_s, latency_s)
        if first_token_s is not None:
            self.first_token_s = _smoothed(self.first_token_s, first_token_s)
            if latency_s is not None and tokens > 1:
                token_s = (latency_s - first_token_s) / (tokens - 1)
                self.token_s = _smoothed(self.token_s, token_s)

    def load(self, now: float) -> float:
        """The largest share of a limit that is in use; 0 without limits."""
        own = self.deployment
        shares = [0.0]
        if own.max_in_flight:
            shares.append(self.in_flight / own.max_in_flight)
        if own.rpm:
            shares.append(self.requests.at(now) / own.rpm)
        if own.tpm:
            shares.append(self.tokens.at(now) / own.tpm)
        return max(shares)

    def adopt(self, other: "Live") -> None:
        """Take over what was learned of the same deployment."""
        for name in (
            "breaker",
            "failing",
            "first_token_s",
            "token_s",
            "latency_s",
            "rests_until",
            "full_until",
            "full_tokens",
            "is_doubted",
            "failed_of",
            "requests",
            "tokens",
        ):
            setattr(self, name, getattr(other, name))
        self.speed.adopt(other.speed)
        # The old one's probes do not report here.
        if self.breaker.phase == "half_open":
            self.breaker = Breaker("open", self.breaker.ticket + 1, self.breaker.since, 0.0, self.breaker.times)

    def state(self, now: float) -> dict[str, Any]:
        """For the page and for metrics."""
        return {
            "model": self.model,
            "deployment": self.name,
            "provider": self.provider.kind,
            "breaker": self.breaker.phase,
            "open_for_s": max(0.0, self.breaker.until - now) if self.breaker.phase == "open" else 0.0,
            "rests_for_s": max(0.0, self.rests_until - now),
            "in_flight": self.in_flight,
            "failing": self.failing,
            "first_token_s": self.first_token_s,
            "token_s": self.token_s,
            "latency_s": self.latency_s,
            "load": self.load(now),
            "weight": self.deployment.weight,
            "output_speed": self.speed.declared,
            "output_speed_exceeded": self.speed.exceeded(now),
        }


def _whose(sender: str) -> str:
    """Who shares places with others: all that the gateway asks for itself is one."""
    return OWN if is_own(sender) else sender


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + ALPHA * (new - old)
