"""OpenAI's shapes of answers: chat and text, whole and in chunks, with log probabilities, usage and routing."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from anabranch import __version__
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.core.request import Finish, TokenLogprob
from anabranch.serving.http.choice import Choice, ChoiceDelta, TokenText, joined, sides_of
from anabranch.serving.http.deltas import Delta, MessageDeltas, message_of
from anabranch.serving.http.deltas import joined as joined_deltas
from anabranch.serving.http.generation_request import GenerationRequest
from anabranch.serving.http.reading import Reader
from anabranch.web.api_error import ApiError
from anabranch.web.ids import new_id
from anabranch.web.json_text import Rows
from anabranch.web.large_json import together
from anabranch.web.sse import DONE, event, event_slices

# Told for a token that cannot be, as OpenAI does: JSON has no infinity.
LEAST_LOGPROB = -9999.0
# Values, tokens and their rivals, that are told at once; it takes a millisecond or two.
MOST_AT_ONCE = 1000
# Characters of a text that take no longer than a value.
VALUE_CHARACTERS = 64
# Changes of an answer that is told whole, which are kept as they came.
MOST_APART = 256


# Of an engine, what says nothing of its answers: how much room there is, and how experts come; and what is in its settings too.
NOT_ANSWERS = ("num_blocks", "block_tokens", "experts", "beside", "adapter_versions", "planned")


def fingerprint(info: EngineInfo, adapters: Sequence[tuple[str, str]] = ()) -> str:
    """``system_fingerprint``: differs where the same seed may give other tokens.

    Args:
        info: of the engine.
        adapters: names and versions of those of a request that the engine has not had from its start.
    """
    facts = {field.name: getattr(info, field.name) for field in fields(info) if field.name not in NOT_ANSWERS}
    # Wherever they lie, and whenever they were written.
    facts |= {"files": info.files.content, "routed_layers": sorted(info.routed_layers.items())}
    told = (__version__, facts, *([tuple(adapters)] if adapters else ()))
    return f"fp_{hashlib.sha256(repr(told).encode()).hexdigest()[:12]}"


class Shape:
    """How one request is answered.

    Args:
        request: the request.
        choices: of it, for usage at the end.
        reader: shows tokens as text.
        info: of the engine.
    """

    object_name = ""
    chunk_name = ""
    id_kind = ""

    def __init__(self, request: GenerationRequest, choices: Sequence[Choice], reader: Reader, info: EngineInfo) -> None:
        self.request, self.choices, self.reader, self.info = request, choices, reader, info
        # Of an answer that is told whole, by choice.
        self._taken: list[list[ChoiceDelta]] = [[] for _ in range(request.num_choices)]
        self._head = {
            "id": new_id(self.id_kind),
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": fingerprint(info, request.adapter_versions),
        }

    # After all events of a stream.
    ending = DONE

    def events(self, change: ChoiceDelta) -> bytes:
        """The events of a stream for what is new of a choice, and not long."""
        return b"".join(map(event, self.chunks(change)))

    def is_long(self, changes: Sequence[ChoiceDelta]) -> bool:
        """Whether there is so much to tell of what is new of some choices, each once, that it is told by `long_events`."""
        return self._num_values(changes) > MOST_AT_ONCE

    def long_events(self, changes: Iterable[ChoiceDelta]) -> Iterator[bytes]:
        """`events` of changes in slices, none of which takes long to make."""
        chunks = (chunk for change in changes for chunk in self.chunks(change))
        return together(piece for chunk in chunks for piece in event_slices(chunk))

    @property
    def has_told_prompts(self) -> bool:
        """Whether nothing of the prompts is still to be told in the events of a stream."""
        return True

    @property
    def has_long_end(self) -> bool:
        """Whether there is so much to tell after every choice has ended that it is told by `long_last_events`."""
        return False

    def long_last_events(self) -> Iterator[bytes]:
        """`last_events` in slices, none of which takes long to make."""
        return together(piece for chunk in self.last() for piece in event_slices(chunk))

    def last_events(self) -> bytes:
        """Those after every choice has ended."""
        return b"".join(map(event, self.last()))

    def failed(self, error: ApiError) -> bytes:
        """The event that ends a stream instead of the rest."""
        return event(error.to_dict())

    def chunks(self, change: ChoiceDelta) -> list[dict[str, Any]]:
        """The chunks of a stream for what is new of a choice."""
        raise NotImplementedError

    def last(self) -> list[dict[str, Any]]:
        """The chunks after every choice has ended: usage and the summary of routing, where asked for."""
        if not self.request.has_usage and not self.request.is_routing:
            return []
        chunk: dict[str, Any] = {**self._head, "object": self.chunk_name, "choices": []}
        if self.request.has_usage:
            chunk["usage"] = self.usage()
        if self.request.is_routing:
            chunk["routing"] = self.routing()
        return [chunk]

    def take(self, change: ChoiceDelta) -> None:
        """What is new of an answer that is told whole."""
        taken = self._taken[change.index]
        taken.append(change)
        # Each apart would take many times what they say.
        if len(taken) > MOST_APART:
            taken[:] = [joined(taken)]

    def whole(self) -> dict[str, Any]:
        """The answer in one, of all that was taken; what is long of it is made while it is written."""
        made = {**self._head, "object": self.object_name, "choices": self._rows(self._num_taken(), self._choices)}
        made["usage"] = self.usage()
        if self.request.is_routing:
            made["routing"] = self.routing()
        return made

    def usage(self) -> dict[str, Any]:
        """Tokens. A prompt of several choices counts once."""
        prompt, completion = self.request.prompt_tokens, sum(choice.completion_tokens for choice in self.choices)
        made: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.request.reasoning is not None:
            thought = sum(choice.reasoning_tokens for choice in self.choices)
            made["completion_tokens_details"] = {"reasoning_tokens": thought}
        if self.info.max_depth is not None or self.info.skips_tokens:
            made["depth"] = self.depth()
        if self.request.rewires:
            made["rewiring"] = [choice.rewiring for choice in self.choices]
        return made

    def depth(self) -> dict[str, Any]:
        """Blocks that tokens ran: on average, of how many, and which for each prompt; choices of a prompt run the same.

        Where blocks passed over tokens of a prompt, ``computed`` has how many each computed, and the blocks are those of new tokens.
        """
        whole = range(self.info.num_layers)
        runs = tokens = 0
        for choice in self.choices:
            # The last token of an answer is told, and not run.
            count, new = choice.prompt_tokens, max(0, choice.completion_tokens - 1)
            blocks = len(whole if choice.path is None else choice.path)
            runs += new * blocks + (count * blocks if choice.computed is None else sum(choice.computed))
            tokens += count + new
        paths = [list(whole if choice.path is None else choice.path) for choice in self.choices[:: self.request.n]]
        made = {"layers_per_token": round(runs / max(tokens, 1), 3), "num_layers": len(whole), "layers": paths}
        computed = [None if one.computed is None else list(one.computed) for one in self.choices[:: self.request.n]]
        return made if not any(computed) else {**made, "computed": computed}

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were there: the first choice of each prompt says it, for the others share with the first."""
        return sum(choice.cached_tokens for choice in self.choices[:: self.request.n])

    def routing(self) -> dict[str, Any]:
        """Which model answered, how many tokens of the answer went to each expert of each layer, and how many layers a token ran; of
        pools of adapters also why, for each choice (`Output.explained`)."""
        experts: dict[str, dict[str, int]] = {str(layer): {} for layer in sorted(self.info.routed_layers)}
        counts: Counter[tuple[int, int]] = Counter()
        for choice in self.choices:
            counts.update(choice.experts)
        for (layer, expert), count in sorted(counts.items()):
            experts.setdefault(str(layer), {})[str(expert)] = count
        recorded = sum(choice.recorded for choice in self.choices)
        depth = sum(choice.layers_run for choice in self.choices) / recorded if recorded else 0.0
        made: dict[str, Any] = {
            "arm": self._head["model"],
            "experts": experts,
            "depth": round(depth, 3),
            "tokens": recorded,
        }
        if chosen := self._adapters():
            made["adapters"] = chosen
        if any(choice.explained for choice in self.choices):
            made["explained"] = [choice.explained for choice in self.choices]
        return made

    def _adapters(self) -> dict[str, dict[str, int]]:
        """How many tokens of the answer went to each adapter beside each matrix, where routers were asked for."""
        found: dict[str, dict[str, int]] = {}
        for choice in self.choices:
            for (matrix, name), count in sorted(choice.adapters.items()):
                row = found.setdefault(matrix, {})
                row[name] = row.get(name, 0) + count
        return found

    def _choices(self) -> Iterator[dict[str, Any]]:
        return (self._choice(at, changes) for at, changes in enumerate(self._taken))

    def _choice(self, at: int, changes: Sequence[ChoiceDelta]) -> dict[str, Any]:
        raise NotImplementedError

    def _num_taken(self) -> int:
        """Values that the answer in one tells."""
        return sum(map(self._num_values, self._taken))

    def _num_values(self, changes: Iterable[ChoiceDelta]) -> int:
        """Values that are told of changes."""
        return sum(
            1 + len(one.text) // VALUE_CHARACTERS + self._of_tokens(one.tokens) + self._of_end(one) for one in changes
        )

    def _of_end(self, change: ChoiceDelta) -> int:
        """Values that a choice tells as it ends."""
        return 0 if change.finish is None else self._of_state(change.index)

    def _of_state(self, index: int) -> int:
        """Values of how the routers of a choice are turned, where asked for."""
        # Of a prompt that is told alone nothing was run.
        state = self.choices[index].rewire_state if self.choices else None
        return 0 if state is None else sum(map(len, state["delta"]))

    def _state(self, change: ChoiceDelta) -> dict[str, Any]:
        """How the routers of a choice that ends are turned, where asked for."""
        state = self.choices[change.index].rewire_state if self.choices else None
        if change.finish is None or state is None:
            return {}
        rows: Any = self._rows(self._of_state(change.index), lambda: state["delta"])
        return {"rewire_state": {**state, "delta": rows}}

    def _of_tokens(self, tokens: Sequence[TokenText]) -> int:
        """Values that are told of tokens: themselves with their rivals, and where they went."""
        sides = sum(len(token.route or ()) for token in tokens) if self.request.is_routing else 0
        return len(tokens) * self._each + sides

    @property
    def _each(self) -> int:
        """Values of a token with its rivals."""
        return 1 + (self.request.logprobs or 0)

    def _rows(self, values: int, make: Callable[[], Iterable[Any]]) -> Rows | list[Any]:
        """What has so many values: made while it is written, where that takes long."""
        return Rows(make) if values > MOST_AT_ONCE else list(make())

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        made = {**self._head, "object": self.chunk_name, "choices": [choice]}
        return {**made, "usage": None} if self.request.has_usage else made

    def _route(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        """Tokens with the experts they went to, where asked for."""
        if not self.request.is_routing:
            return {}
        return {"routing": {"tokens": self._rows(self._of_tokens(tokens), lambda: map(self._routed, tokens))}}

    def _routed(self, item: TokenText) -> dict[str, Any]:
        experts, adapters = sides_of(item.route or {})
        row: dict[str, Any] = {
            "text": self.reader.token_text(item.token)[0],
            "experts": {str(layer): list(chosen) for layer, chosen in experts.items()},
        }
        if adapters:
            row["adapters"] = {matrix: list(chosen) for matrix, chosen in adapters.items()}
        return row


class ChatShape(Shape):
    """``/v1/chat/completions``."""

    object_name, chunk_name, id_kind = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        tools, reasoning = self.request.tools, self.request.reasoning
        offered = () if tools is None else tools.offered
        self._messages = [MessageDeltas(tools, self.reader.dialect.parser(offered, reasoning)) for _ in self.choices]
        self._has_begun = [False] * len(self.choices)
        # Of an answer that is told whole: what its text says, found as it comes.
        self._parts: list[list[Delta]] = [[] for _ in self.choices]
        self._most_apart = [MOST_APART] * len(self.choices)

    def take(self, change: ChoiceDelta) -> None:
        """See `Shape`."""
        super().take(change)
        parts = self._parts[change.index]
        parts += self._deltas(change)
        if len(parts) > self._most_apart[change.index]:
            parts[:] = joined_deltas(parts)
            # Where text and calls alternate they stay many, and are not looked at again for each that comes.
            self._most_apart[change.index] = max(MOST_APART, 2 * len(parts))

    def chunks(self, change: ChoiceDelta) -> list[dict[str, Any]]:
        """See `Shape`."""
        made = []
        if not self._has_begun[change.index]:
            self._has_begun[change.index] = True
            made.append(self._delta(change.index, {"role": "assistant", "content": ""}))
        deltas = self._deltas(change)
        more = {**self._logprobs(change.tokens), **self._route(change.tokens)} if change.tokens else {}
        if more and not deltas:
            deltas = [{"content": ""}]
        made += [self._delta(change.index, delta, more if not at else {}) for at, delta in enumerate(deltas)]
        if change.finish is not None:
            made.append(self._delta(change.index, {}, self._state(change), finish=self._reason(change)))
        return made

    def _deltas(self, change: ChoiceDelta) -> list[Delta]:
        message = self._messages[change.index]
        deltas: list[Delta] = [{"reasoning_content": change.reasoning}] if change.reasoning else []
        deltas += message.push(change.text)
        return deltas if change.finish is None else [*deltas, *message.end()]

    def _reason(self, change: ChoiceDelta) -> str:
        assert change.finish is not None
        is_call = self._messages[change.index].has_called and change.finish is Finish.STOP
        return "tool_calls" if is_call else str(change.finish)

    def _delta(
        self, index: int, delta: Delta, more: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return self._chunk({"index": index, "delta": delta, "logprobs": None, **(more or {}), "finish_reason": finish})

    def _choice(self, at: int, changes: Sequence[ChoiceDelta]) -> dict[str, Any]:
        message = message_of(self._parts[at])
        tokens = [item for change in changes for item in change.tokens]
        return {
            "index": at,
            "message": {**message, "refusal": None},
            "logprobs": None,
            **self._logprobs(tokens),
            **self._route(tokens),
            **self._state(changes[-1]),
            "finish_reason": self._reason(changes[-1]),
        }

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        if self.request.logprobs is None:
            return {}
        rows = self._rows(self._of_tokens(tokens), lambda: self._scored(tokens))
        return {"logprobs": {"content": rows, "refusal": None}}

    def _scored(self, tokens: Sequence[TokenText]) -> Iterator[dict[str, Any]]:
        for item in tokens:
            if item.logprob is not None:
                top = [self._entry(token, value) for token, value in item.logprob.top[: self.request.logprobs]]
                yield {**self._entry(item.token, item.logprob.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self.reader.token_name(token)
        return {"token": text, "logprob": logprob, "bytes": raw}


class CompletionShape(Shape):
    """``/v1/completions``."""

    object_name = chunk_name = "text_completion"
    id_kind = "cmpl"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._has_begun = [False] * len(self.choices)

    def chunks(self, change: ChoiceDelta) -> list[dict[str, Any]]:
        """See `Shape`."""
        is_first = not self._has_begun[change.index]
        text = self._echo(change.index) + change.text if is_first else change.text
        has_scores = is_first and self.choices[change.index].scores is not None
        if not text and not change.tokens and change.finish is None and not has_scores:
            return []
        self._has_begun[change.index] = True
        part = self._part(change.index, text, change.tokens, change.finish, is_first=is_first)
        return [self._chunk({**part, **self._state(change)})]

    def is_long(self, changes: Sequence[ChoiceDelta]) -> bool:
        """See `Shape`; the first change of a choice brings its prompt."""
        begin = [change.index for change in changes if not self._has_begun[change.index]]
        return self._num_values(changes) + sum(map(self._of_prompt, begin)) > MOST_AT_ONCE

    @property
    def has_told_prompts(self) -> bool:
        """See `Shape`."""
        return all(self._has_begun)

    def echoed(self) -> dict[str, Any]:
        """The answer where only the prompt was asked for (``echo`` with ``max_tokens`` 0)."""
        for at in range(self.request.num_choices):
            self.take(ChoiceDelta(at, "", finish=Finish.LENGTH))
        return self.whole()

    def _num_taken(self) -> int:
        """See `Shape`; each choice brings its prompt."""
        return super()._num_taken() + sum(map(self._of_prompt, range(self.request.num_choices)))

    def _of_prompt(self, index: int) -> int:
        """Values that are told of the prompt of a choice: its text, and its scores."""
        scores = None if self.request.logprobs is None else self.choices[index].scores
        return len(self._echo(index)) // VALUE_CHARACTERS + (0 if scores is None else len(scores.rows) * self._each)

    def _echo(self, index: int) -> str:
        return self.request.texts[index // self.request.n] if self.request.is_echo else ""

    def _choice(self, at: int, changes: Sequence[ChoiceDelta]) -> dict[str, Any]:
        text = self._echo(at) + "".join(change.text for change in changes)
        tokens = [item for change in changes for item in change.tokens]
        part = self._part(at, text, tokens, changes[-1].finish, is_first=True)
        return {**part, **self._state(changes[-1])}

    def _part(
        self, index: int, text: str, tokens: Sequence[TokenText], finish: Finish | None, *, is_first: bool
    ) -> dict[str, Any]:
        made = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, tokens, is_first=is_first),
            "finish_reason": finish and str(finish),
        }
        return {**made, **self._route(tokens)}

    def _logprobs(self, index: int, tokens: Sequence[TokenText], *, is_first: bool) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        scores = self.choices[index].scores if is_first else None
        items = [item for item in tokens if item.logprob is not None]
        # Nothing comes before the first token of a prompt, so nothing is told of that.
        scored = () if scores is None else (None, *scores.rows)
        prompt = () if scores is None else self.request.prompts[index // self.request.n]
        count, text = (len(prompt) + len(items)) * self._each, self._echo(index)

        def rows() -> Iterator[tuple[int, TokenLogprob | None]]:
            yield from zip(prompt, scored, strict=True)
            yield from ((item.token, item.logprob) for item in items)

        def starts() -> Iterator[int]:
            yield from self.reader.offsets(prompt, text)
            yield from (len(text) + item.start for item in items)

        return {
            "tokens": self._rows(count, lambda: (self.reader.token_name(token)[0] for token, _ in rows())),
            "token_logprobs": self._rows(count, lambda: (_own(told) for _, told in rows())),
            "top_logprobs": self._rows(count, lambda: (self._top(told) for _, told in rows())),
            "text_offset": self._rows(count, starts),
        }

    def _top(self, told: TokenLogprob | None) -> dict[str, float] | None:
        if told is None:
            return None
        return {
            self.reader.token_name(token)[0]: max(value, LEAST_LOGPROB)
            for token, value in told.top[: self.request.logprobs]
        }


def _own(told: TokenLogprob | None) -> float | None:
    return None if told is None else max(told.logprob, LEAST_LOGPROB)
