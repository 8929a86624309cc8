"""`Made`: what a stream can have made of which not all was seen, or told; and what one that is whole tells of how fast its deployment is.

What came is charged by its text. What did not come, by the time in which it can have been made, at the speed of the deployment
(`output_speed`), of every answer that is made at the same time; where that is not known, by how fast the stream itself showed what came,
and of what may be thought unseen, the most that can be.
"""

import math
from typing import TYPE_CHECKING

from anabranch.gateway.dispatch.billed import USUAL_BYTES, broken_off, tokens_of
from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.hidden import asks_media, may_think
from anabranch.gateway.dispatch.plan import Attempt
from anabranch.gateway.dispatch.stream_lag import Lag
from anabranch.gateway.dispatch.stream_pace import Pace
from anabranch.gateway.dispatch.stream_tally import Tally
from anabranch.gateway.prompt_tokens import num_made, num_shown
from anabranch.gateway.providers.provider import UpstreamRequest, Usage

if TYPE_CHECKING:
    from anabranch.gateway.dispatch.run import Run

# Shortest time whose tokens say how fast a stream is itself: at its beginning many come at once.
OWN_S = 0.25


class Made:
    """Of one stream. It is told of every wait, and of all that is taken.

    Attributes:
        lag: up to when all that had been sent was read.
        waited_s: seconds since the first token in which the upstream was waited for.

    Args:
        tally: of the same stream.
    """

    def __init__(self, run: "Run", live: Live, attempt: Attempt, request: UpstreamRequest, tally: Tally) -> None:
        self._run, self._live, self._attempt, self._tally = run, live, attempt, tally
        self._request = request
        self._sent_at = run.began + attempt.start_s
        self.lag, self._pace = Lag(run.dispatcher.now), Pace(self._sent_at)
        # Of thoughts and the answer together, once some of the former are shown.
        self._pace_of_all: Pace | None = None
        self.waited_s = 0.0
        # Tokens, as they mostly are, that came with the first, and for how long that was waited for.
        self._first, self._first_wait_s = 0, 0.0
        # Made at the same time; and for each that is shown.
        self._answers = num_made(request.endpoint, request.body)
        self._unshown = -(-self._answers // num_shown(request.endpoint, request.body))

    def waited(self, seconds: float) -> None:
        """Nothing was there, and the upstream was waited for."""
        self.lag.waited(seconds)
        if self._attempt.first_token_s is not None:
            self.waited_s += seconds

    def took(self, size: int, told: Usage | None, has_finished: bool) -> None:
        """All that was there has been taken, ``size`` bytes, and tallied; so much is ``told`` by now."""
        tally, lag = self._tally, self.lag
        lag.took(size, tally.texts, tally.text_bytes, (0 if told is None else told.completion, has_finished))
        texts, text_bytes = tally.texts - tally.thoughts, tally.text_bytes - tally.thought_bytes
        now = self._run.dispatcher.now()
        self._pace.took(now, texts, text_bytes, tally.thoughts, self.waited_s, lag.is_behind)
        if tally.thoughts:
            self._pace_of_all = self._pace_of_all or Pace(self._sent_at)
            self._pace_of_all.took(now, tally.texts, tally.text_bytes, 0, self.waited_s, lag.is_behind)

    def begun(self) -> None:
        """The first token has come, with what came beside it."""
        self._first, self._first_wait_s = self._tally.usual, self.lag.known_wait_s

    def teach(self, told: int | None) -> None:
        """Its deployment learns by a whole answer that came to so many tokens, as far as they are such as others make.

        None of an upstream that did not tell.
        """
        tally = self._tally
        if tally.has_media or self._request.body.get("prediction") or self._request.body.get("echo"):
            return
        now, text_bytes = self._run.dispatcher.now(), tally.text_bytes - tally.thought_bytes
        answers, bytes_per_token = self._answers, self._run.rules.bytes_per_token
        lesson = self._pace.lesson(now, told, tally.thought_tokens, text_bytes, answers, bytes_per_token)
        if self._pace_of_all is not None and not (lesson.speed and lesson.is_exact):
            # Where thoughts are shown whole, they tell it as the answer does.
            of_all = self._pace_of_all.lesson(now, told, 0, tally.text_bytes, answers, bytes_per_token)
            lesson = of_all if of_all.speed and of_all.is_exact else lesson
        self._live.speed.learn(self._tier, lesson, now)

    def left(self, most: Usage, told: Usage | None) -> Usage:
        """The most that may be billed of it, if it is left now."""
        unseen_s = self._run.dispatcher.now() - self.lag.known_at + self._run.rules.margin_s
        return self._at_most(most, told, (self._attempt.first_token_s or 0.0) + unseen_s)

    def unread(self, most: Usage, told: Usage | None) -> Usage:
        """Likewise, where much of it lies there that nobody has read."""
        return self._broken_off(most, told, 0, None)

    def untold(self, most: Usage, told: Usage | None, has_said_all: bool) -> Usage:
        """Likewise of an answer that is whole, and did not say what it comes to; ``has_said_all``: it will not."""
        if has_said_all and not self._live.tells_usage and not self._tally.has_media:
            return self._broken_off(most, told, self._seen, 0.0)
        # What it was about to say may hold thoughts that were not shown, of the time before the first token.
        return self._at_most(most, told, self._attempt.first_token_s or 0.0)

    def _at_most(self, most: Usage, told: Usage | None, hidden_s: float) -> Usage:
        """Of which ``hidden_s`` seconds were not seen."""
        lag, now = self.lag, self._run.dispatcher.now()
        speed, seen = self._live.speed.of(self._tier, now), self._seen
        if self._is_hidden(speed):
            return self._broken_off(most, told, seen, None)
        first_at = self._sent_at + (self._attempt.first_token_s or 0.0)
        # Of a slow reader what came later came as fast as they read: that says how fast it is at least.
        known_s, read_s = lag.known_at - first_at, now - first_at
        rate: float | None = None
        if speed is not None:
            rate = max(speed * self._answers, self._own_rate(first_at) * self._unshown)
            # Between what is shown there may be thoughts, of which a summary comes: all the time it was made as fast as can be.
            seen = max(seen, math.ceil(rate * known_s))
        elif (wait_s := lag.known_wait_s - self._first_wait_s) > 0:
            # What a reader took their time for may have come at once.
            known = tokens_of(lag.texts, lag.text_bytes, self._run.rules.bytes_per_token) * self._unshown
            rate = max(known / min(wait_s, known_s), seen / read_s)
        return self._broken_off(most, told, seen, rate, hidden_s)

    @property
    def _seen(self) -> int:
        """Tokens at most of what was shown, and of those answers of which it is the best."""
        return self._tally.at_most(self._run.rules.bytes_per_token) * self._unshown

    def _own_rate(self, first_at: float) -> float:
        """Tokens a second that this stream itself showed at least. How fast they come depends little on how long they are."""
        lag, now = self.lag, self._run.dispatcher.now()
        found = ((tokens_of(lag.texts, lag.text_bytes, USUAL_BYTES), lag.known_at), (self._tally.usual, now))
        # What came with the first token was made before it, all since it was sent.
        since_first = ((tokens - self._first) / max(at - first_at, OWN_S) for tokens, at in found)
        return max(*since_first, *(tokens / max(at - self._sent_at, OWN_S) for tokens, at in found))

    def _is_hidden(self, speed: float | None) -> bool:
        """What came, and when, says nothing of how much was made."""
        if self._tally.has_media or asks_media(self._request.body):
            return True
        if speed is not None:
            return False
        config = self._live.provider.config
        model, is_told = str(getattr(config, "model", None) or ""), getattr(config, "reasons", None)
        return self._tally.has_thought or may_think(self._request.body, model, is_told)

    def _broken_off(
        self, most: Usage, told: Usage | None, seen: int, rate: float | None, hidden_s: float = 0.0
    ) -> Usage:
        return broken_off(most, told, seen, rate, hidden_s, self._answers)

    @property
    def _tier(self) -> str:
        """That was asked for: of a stream that is left nothing else is known."""
        return "" if self._attempt.most is None else self._attempt.most.tier
