"""The most that the calls of one request may be billed for: what is reserved before each of them is made."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anabranch.gateway.asked import Asked
from anabranch.gateway.dispatch import Report
from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.media_requests import in_seconds, is_by_second, is_media, most_made
from anabranch.gateway.prompt_tokens import (
    BYTES_PER_TOKEN,
    PromptCount,
    count_prompt,
    num_made,
    predicted_tokens,
    room_of,
)
from anabranch.gateway.providers.provider import WRITES, Usage

if TYPE_CHECKING:
    from anabranch.gateway.runtime import Runtime

# Tokens, at most, of telling a model to go on where another broke off.
CONTINUED = 200


def with_prediction(most: Usage, lives: Iterable[Live], endpoint: str, body: Mapping[str, Any]) -> Usage:
    """``most``, and what is billed of a text that the sender predicted, where one of these deployments is sent that."""
    if "prediction" not in body or endpoint not in WRITES or not any(live.provider.predicts for live in lives):
        return most
    predicted = predicted_tokens(body) * num_made(endpoint, body)
    return replace(most, completion=most.completion + predicted, predicted=predicted)


class Bounds:
    """Those of one request.

    Attributes:
        prepared: messages that the strategy sends to a model in place of the sender's.
        counted: of models whose engine has read what it is sent, how long that is.

    Args:
        endpoint: of OpenAI's.
        body: of the sender.
        runtime: that the request began on.
        count: tokens of its prompt.
        asked: what else in it is billed.
    """

    def __init__(
        self, endpoint: Any, body: dict[str, Any], runtime: "Runtime", count: PromptCount, asked: Asked
    ) -> None:
        self.endpoint, self.body, self.runtime, self.count, self.asked = endpoint, body, runtime, count, asked
        self.prepared: Mapping[str, Any] = {}
        self.counted: dict[str, PromptCount] = {}

    def most_tokens(self, model: str) -> int:
        """The most completion tokens this may cost at a model."""
        if self.endpoint == "embeddings":
            return 0
        body, limits = self.body, self.runtime.config.limits
        if is_media(self.endpoint):
            return most_made(self.endpoint, body, self.runtime.models[model].max_tokens, limits.max_tokens)
        # An upstream may know only one of them.
        asked = max(body.get("max_completion_tokens") or 0, body.get("max_tokens") or 0)
        # Where no end is said, the context is one.
        most = asked or self.bound(model) or self.runtime.models[model].context or limits.max_tokens
        return most * num_made(self.endpoint, body)

    def bound(self, model: str) -> int | None:
        """Where a request does not say how long an answer may be, the model is told, and this is what is reserved; see `room_of`."""
        given = self.runtime.models[model]
        most = given.max_tokens or self.runtime.config.limits.max_tokens
        thinking = self.body.get("thinking")
        budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
        if isinstance(budget, int) and budget >= most:
            # Thoughts are part of an answer's tokens, and must leave some.
            most += budget
        return room_of(most, given.context, self.count_of(model))

    def count_of(self, model: str) -> PromptCount:
        """Of what is sent to a model."""
        if model in self.counted:
            return self.counted[model]
        if model not in self.prepared:
            return self.count
        return count_prompt({**self.body, "messages": self.prepared[model]})

    def most(self, model: str, report: Report | None) -> Usage:
        """The most tokens that one call of a model may be billed for, after what was tried so far."""
        count = self.count_of(model)
        if is_media(self.endpoint) and all(
            is_by_second(live.price) for live in self.runtime.dispatcher.groups[model].lives
        ):
            count = in_seconds(count)
        if report is not None and report.attempts and self.runtime.config.mid_stream == "continue":
            # The next one is sent what was said.
            more = CONTINUED + sum(attempt.seen for attempt in report.attempts) * BYTES_PER_TOKEN
            count = replace(count, at_most=count.at_most + more)
        most = self.asked.most(count, self.most_tokens(model), self.runtime.models[model].context)
        return with_prediction(most, self.runtime.dispatcher.groups[model].lives, self.endpoint, self.body)

    def worst_nano(self, model: str, report: Report | None) -> int:
        """The most nano-dollars that one call of a model may cost, likewise."""
        return self.runtime.dispatcher.groups[model].worst_nano(self.most(model, report))

    def fitting(self, model: str, report: Report | None, nano: int) -> int:
        """The largest ``max_tokens`` with which one call of a model costs no more than so much; 0 if none does, or it has no such field."""
        if self.endpoint not in WRITES:
            return 0
        given, answers = self.most(model, report), num_made(self.endpoint, self.body)
        group = self.runtime.dispatcher.groups[model]

        def worst(tokens: int) -> int:
            completion = tokens * answers + given.predicted
            return group.worst_nano(
                replace(
                    given,
                    completion=completion,
                    audio_output=min(given.audio_output, completion),
                    image_output=min(given.image_output, completion),
                )
            )

        low, high = 0, (given.completion - given.predicted) // answers
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if worst(middle) <= nano else (low, middle - 1)
        return low
