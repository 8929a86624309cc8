"""`Choice`: outputs of one sequence become what is new for its reader: text up to a stop string, and log probabilities."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from anabranch.serving.core.request import Finish, Output, Request, Route, TokenLogprob
from anabranch.serving.http.answer_text import AnswerText, Text
from anabranch.serving.http.scores import PromptScores
from anabranch.web.api_error import ApiError

ENGINE_FAILED = "the engine failed; the server's log says how"


@dataclass(slots=True)
class TokenText:
    """A token whose text has been told.

    Attributes:
        token: id.
        start, end: characters of the answer that it stands for.
        logprob: its own and those of its rivals, where asked for.
        route: see `Output.routing`, where asked for.
    """

    token: int
    start: int
    end: int
    logprob: TokenLogprob | None = None
    route: Route | None = None


@dataclass(slots=True)
class ChoiceDelta:
    """What is new of one choice.

    Attributes:
        index: of the choice.
        text: new text.
        reasoning: what was thought, where the model's reasoning is told apart.
        tokens: whose text is told now; kept only where log probabilities or routing were asked for.
        finish: why it ended; with the last change.
    """

    index: int
    text: str
    tokens: list[TokenText] = field(default_factory=list)
    finish: Finish | None = None
    reasoning: str = ""


# Of a token that is kept, of one score (its own, or of a rival), of where it went in one layer, and of a character, as Python holds them.
TOKEN_BYTES, SCORE_BYTES, ROUTE_BYTES, TEXT_BYTES = 256, 128, 160, 4


def bytes_of(change: ChoiceDelta) -> int:
    """Memory that it takes."""
    size = TEXT_BYTES * (len(change.text) + len(change.reasoning))
    for token in change.tokens:
        scores = 0 if token.logprob is None else 1 + len(token.logprob.top)
        size += TOKEN_BYTES + SCORE_BYTES * scores + ROUTE_BYTES * len(token.route or ())
    return size


def joined(changes: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """One change that says what several of one choice say, in order."""
    return ChoiceDelta(
        changes[0].index,
        "".join(change.text for change in changes),
        [token for change in changes for token in change.tokens],
        changes[-1].finish,
        "".join(change.reasoning for change in changes),
    )


def refused(output: Output, request: Request) -> ApiError | None:
    """The error that an output of ``request`` is; None for any other."""
    if output.finish is Finish.ABORT:
        return ApiError(503, "aborted", "the request was aborted by the server", headers={"Retry-After": "1"})
    if output.finish is not Finish.ERROR:
        return None
    if output.engine_failed:
        return ApiError(500, "engine_failed", ENGINE_FAILED)
    # Asked again it would fail again.
    message, again = output.error or "the request failed", {"x-should-retry": "false"}
    if request.adapters:
        # They may be the reason, and whoever runs the server looks for the model first.
        message += f", with the adapters {', '.join(repr(name) for name, _ in request.adapters)}"
    return ApiError(500, "request_failed", message, headers=again)


def sides_of(route: Route) -> tuple[dict[int, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    """({layer: experts}, {matrix: adapters}) of a token."""
    experts: Any = {layer: chosen for layer, chosen in route.items() if isinstance(layer, int)}
    adapters: Any = {matrix: chosen for matrix, chosen in route.items() if isinstance(matrix, str)}
    return experts, adapters


class Choice:
    """One sequence of an answer.

    Attributes:
        index: of the choice.
        request: what the engine runs.
        prompt_tokens, completion_tokens, cached_tokens: for usage.
        queue_s: seconds it waited in the engine.
        first_at: seconds of `time.monotonic` at which the first token came; None before.
        experts: tokens by (layer, expert), and tokens that were recorded, for the summary.
        adapters: tokens by (matrix, adapter) of the routers that were asked for.
        finish: why it ended; None while it goes on.
        path: the blocks that its tokens run, where they are not all blocks; None for all.
        explained: what pools of adapters went by, see `Output.explained`.
        rewiring: reports of each time that routers were turned to its text, see `Output.rewiring`.
        rewire_state: how they are turned, see `Output.rewire_state`; None where that was not asked for.
        computed: where blocks pass over tokens of the prompt, how many of these each has computed; None elsewhere.
        scores: of its prompt, complete before the first change; None where they were not asked for.

        brings_scores: its outputs have them.

    Args:
        index, request, scores: see above.
        text: makes the text of its tokens.
        on_gap: called for each token after the first with the seconds since the one before.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        text: AnswerText,
        scores: PromptScores | None = None,
        on_gap: Callable[[float], None] = lambda gap_s: None,
    ) -> None:
        self.index, self.request, self._text = index, request, text
        self._keeps = request.sampling.logprobs is not None or request.record_routing
        self._held: list[TokenText] = []
        self._has_told = False
        self.scores, self.brings_scores = scores, request.sampling.prompt_logprobs is not None
        self.prompt_tokens, self.completion_tokens = len(request.prompt), 0
        self.cached_tokens: int = 0
        self.path: tuple[int, ...] | None = request.path
        self.computed: tuple[int, ...] | None = None
        self.rewiring: list[dict[str, Any]] = []
        self.rewire_state: dict[str, Any] | None = None
        self.explained: dict[str, Any] = {}
        self.queue_s: float | None = None
        self.first_at: float | None = None
        self._last_at, self._on_gap = 0.0, on_gap
        self.experts: Counter[tuple[int, int]] = Counter()
        self.adapters: Counter[tuple[str, str]] = Counter()
        self.recorded, self.layers_run = 0, 0
        self.finish: Finish | None = None

    @property
    def reasoning_tokens(self) -> int:
        """Of `completion_tokens`, those that were thought."""
        return self._text.reasoning_tokens

    def push(self, output: Output) -> ChoiceDelta | None:
        """What is new by an output; None where nothing is. Raises ApiError where it says that the sequence has failed."""
        change = self._take(output)
        is_new = change.text or change.reasoning or change.tokens or change.finish is not None or not self._has_told
        return change if is_new else None

    def _take(self, output: Output) -> ChoiceDelta:
        if (error := refused(output, self.request)) is not None:
            raise error
        if output.cached_tokens is not None:
            self.cached_tokens = output.cached_tokens
        if output.queue_s is not None:
            self.queue_s = output.queue_s
        if output.path is not None:
            self.path = output.path
        self.rewiring += output.rewiring
        self.rewire_state = output.rewire_state or self.rewire_state
        self.explained = output.explained or self.explained
        if output.computed is not None:
            self.computed = output.computed
        if self.scores is not None:
            self.scores.add(output.prompt_logprobs)
        if output.tokens:
            self._came(len(output.tokens))
        change = ChoiceDelta(self.index, "")
        for at, token in enumerate(output.tokens):
            self.completion_tokens += 1
            start = self._text.read
            self._add(change, self._text.push(token))
            self._note(output, at, token, start)
            if self._text.is_stopped:
                return self._end(change, Finish.STOP)
        if output.finish is not None:
            self._add(change, self._text.end())
            return self._end(change, output.finish)
        change.tokens = self._release(self._text.told)
        return change

    def _came(self, count: int) -> None:
        now = time.monotonic()
        if self.first_at is None:
            self.first_at = now
        else:
            for _ in range(count):
                self._on_gap((now - self._last_at) / count)
        self._last_at = now

    def _add(self, change: ChoiceDelta, told: Text) -> None:
        change.reasoning += told[0]
        change.text += told[1]
        self._has_told = self._has_told or bool(told[0] or told[1])

    def _note(self, output: Output, at: int, token: int, start: int) -> None:
        route = output.routing[at] if at < len(output.routing) else None
        if route is not None:
            experts, adapters = sides_of(route)
            self.recorded += 1
            self.layers_run += sum(1 for chosen in experts.values() if chosen)
            self.experts.update((layer, expert) for layer, chosen in experts.items() for expert in chosen)
            self.adapters.update((matrix, name) for matrix, chosen in adapters.items() for name in chosen)
        if self._keeps:
            logprob = output.logprobs[at] if at < len(output.logprobs) else None
            self._held.append(TokenText(token, start, self._text.read, logprob, route))

    def _release(self, told: int) -> list[TokenText]:
        """Tokens whose text is told in full."""
        count = 0
        while count < len(self._held) and self._held[count].end <= told:
            count += 1
        free, self._held = self._held[:count], self._held[count:]
        return free

    def _end(self, change: ChoiceDelta, finish: Finish) -> ChoiceDelta:
        self.finish = change.finish = finish
        told = self._text.told
        change.tokens = [item for item in self._held if item.start < told or item.end <= told]
        self._held = []
        return change
