"""`Made`: what a stream can have made of which not all was seen, or told.

What came is charged by its text; what did not come, by the time in which it can have been made, at the speed that is declared of the
deployment (`OutputSpeed`), of every answer that is made at the same time. No other stream has a part in it, and how fast a stream itself
showed what came has none either: it may come by the burst.

    a model that shows what it makes    what came, and what can have been made since its answer last grew, until it is noticed; and for as
                                        long as what came may have been held back, with more behind it (`Lag.held_s`)
    one that may think unseen           not less than what can have been made since the request was sent, until it is noticed: before the
                                        first text and between two of them it may have thought, of which a summary may be shown
    sound and pictures                  the most: neither a text nor a time says how many tokens they are

Several answers that are made at the same time are as one that thinks: that one of them grew says nothing of the others.
"""

from typing import TYPE_CHECKING

from anabranch.gateway.dispatch.billed import FEW, broken_off
from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.hidden import asks_media, may_hide
from anabranch.gateway.dispatch.plan import Attempt
from anabranch.gateway.dispatch.stream_lag import Lag
from anabranch.gateway.dispatch.stream_tally import Tally
from anabranch.gateway.prompt_tokens import Answers
from anabranch.gateway.providers.provider import UpstreamRequest, Usage

if TYPE_CHECKING:
    from anabranch.gateway.dispatch.run import Run


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
        self.lag = Lag(run.dispatcher.now, self._sent_at)
        self.waited_s = 0.0
        self._answers = Answers.of(request.endpoint, request.body)

    def waited(self, seconds: float) -> None:
        """Nothing was there, and the upstream was waited for."""
        self.lag.waited(seconds)
        if self._attempt.first_token_s is not None:
            self.waited_s += seconds

    def took(self, size: int, told: Usage | None, has_finished: bool) -> None:
        """All that was there has been taken, ``size`` bytes, and tallied; so much is ``told`` by now."""
        tally = self._tally
        self.lag.took(size, tally.texts, tally.text_bytes, (0 if told is None else told.completion, has_finished))

    def told_whole(self, told: Usage) -> None:
        """It is whole, and its upstream said what it came to."""
        if self._tally.has_media or self._request.body.get("prediction"):
            # What was predicted and not taken is told, and was not made.
            return
        now, margin_s = self._run.dispatcher.now(), self._run.rules.margin_s
        self._live.speed.told(told.completion, now - self._sent_at, self._answers.made, margin_s, now)

    def left(self, most: Usage, told: Usage | None) -> Usage:
        """The most that may be billed of it, if it is left now."""
        lag = self.lag
        silent_s = self._run.dispatcher.now() - lag.known_at + self._run.rules.margin_s
        return self._at_most(most, told, lag.known_at, lag.held_s, silent_s)

    def untold(self, most: Usage, told: Usage | None) -> Usage:
        """Likewise of an answer that is whole, and did not say what it comes to."""
        ended_at = self._run.dispatcher.now() if self.lag.ended_at is None else self.lag.ended_at
        return self._at_most(most, told, ended_at, 0.0, 0.0)

    def _at_most(self, most: Usage, told: Usage | None, until: float, held_s: float, silent_s: float) -> Usage:
        """What can have been made ``until`` its answer last grew, and since.

        What came last may have been held back for ``held_s`` seconds; ``silent_s`` seconds were not seen since.
        """
        if self._tally.has_media or asks_media(self._request.body):
            return broken_off(most, told, 0, None)
        speed, seen = self._live.speed, self._tally.at_most(self._run.rules.bytes_per_token) * self._answers.each
        # All that can have been made until then, whatever was shown of it.
        made = speed.at_most(until - self._sent_at, self._answers.made)
        if not (self._tally.has_thought or may_hide(self._live, self._request.body, most, self._answers.made)):
            made = min(made, seen + speed.at_most(held_s, self._answers.made))
        return broken_off(
            most, told, max(seen, made), speed.at_most(silent_s, self._answers.made) + FEW * self._answers.made
        )
