"""OpenAI's shapes of answers: chat and text, whole and in chunks, with log probabilities, usage and routing."""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

from anabranch import __version__
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.core.request import Finish, TokenLogprob
from anabranch.serving.http.asked import Asked
from anabranch.serving.http.calls import Delta, Speech, merged
from anabranch.serving.http.choice import Choice, Piece, Shown
from anabranch.serving.http.reading import Reader
from anabranch.web.api_error import ApiError
from anabranch.web.ids import new_id
from anabranch.web.sse import DONE, event

# Told for a token that cannot be, as OpenAI does: JSON has no infinity.
LEAST_LOGPROB = -9999.0


def fingerprint(info: EngineInfo) -> str:
    """``system_fingerprint``: differs where the same seed may give other tokens."""
    facts = f"{__version__} {info.model} {info.vocab_size} {info.max_positions} {sorted(info.routed_layers.items())}"
    return f"fp_{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


class Shape:
    """How one request is answered.

    Args:
        asked: the request.
        choices: of it, for usage at the end.
        reader: shows tokens as text.
        info: of the engine.
    """

    object_name = ""
    chunk_name = ""
    id_kind = ""

    def __init__(self, asked: Asked, choices: Sequence[Choice], reader: Reader, info: EngineInfo) -> None:
        self.asked, self.choices, self.reader, self.info = asked, choices, reader, info
        self._head = {
            "id": new_id(self.id_kind), "created": int(time.time()), "model": asked.model, "system_fingerprint": fingerprint(info)
        }  # fmt: skip

    # After all events of a stream.
    ending = DONE

    def events(self, piece: Piece) -> bytes:
        """The events of a stream for what is new of a choice."""
        return b"".join(map(event, self.chunks(piece)))

    def last_events(self) -> bytes:
        """Those after every choice has ended."""
        return b"".join(map(event, self.last()))

    def failed(self, error: ApiError) -> bytes:
        """The event that ends a stream instead of the rest."""
        return event(error.to_dict())

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a stream for what is new of a choice."""
        raise NotImplementedError

    def last(self) -> list[dict[str, Any]]:
        """The chunks after every choice has ended: usage and the summary of routing, where asked for."""
        if not self.asked.has_usage and not self.asked.is_routing:
            return []
        chunk: dict[str, Any] = {**self._head, "object": self.chunk_name, "choices": []}
        if self.asked.has_usage:
            chunk["usage"] = self.usage()
        if self.asked.is_routing:
            chunk["routing"] = self.routing()
        return [chunk]

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The answer in one; pieces by choice."""
        made = {
            **self._head,
            "object": self.object_name,
            "choices": [self._choice(at, part) for at, part in enumerate(pieces)],
        }
        made["usage"] = self.usage()
        if self.asked.is_routing:
            made["routing"] = self.routing()
        return made

    def usage(self) -> dict[str, Any]:
        """Tokens. A prompt of several choices counts once."""
        prompt, completion = self.asked.prompt_tokens, sum(choice.completion_tokens for choice in self.choices)
        made: dict[str, Any] = {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }  # fmt: skip
        if self.asked.reasoning is not None:
            thought = sum(choice.reasoning_tokens for choice in self.choices)
            made["completion_tokens_details"] = {"reasoning_tokens": thought}
        return made

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were there: the first choice of each prompt says it, for the others share with the first."""
        return sum(choice.cached_tokens for choice in self.choices[:: self.asked.n])

    def routing(self) -> dict[str, Any]:
        """Which model answered, how many tokens of the answer went to each expert of each layer, and how many layers a token ran."""
        experts: dict[str, dict[str, int]] = {str(layer): {} for layer in sorted(self.info.routed_layers)}
        for choice in self.choices:
            for (layer, expert), count in sorted(choice.experts.items()):
                row = experts.setdefault(str(layer), {})
                row[str(expert)] = row.get(str(expert), 0) + count
        recorded = sum(choice.recorded for choice in self.choices)
        depth = sum(choice.layers_run for choice in self.choices) / recorded if recorded else 0.0
        return {"arm": self._head["model"], "experts": experts, "depth": round(depth, 3), "tokens": recorded}

    def _choice(self, at: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        made = {**self._head, "object": self.chunk_name, "choices": [choice]}
        return {**made, "usage": None} if self.asked.has_usage else made

    def _route(self, tokens: Sequence[Shown]) -> dict[str, Any]:
        """Tokens with the experts they went to, where asked for."""
        if not self.asked.is_routing:
            return {}
        rows = [
            {"text": self.reader.token_text(shown.token)[0], "experts": {str(at): list(to) for at, to in (shown.experts or {}).items()}}
            for shown in tokens
        ]  # fmt: skip
        return {"routing": {"tokens": rows}}


class ChatShape(Shape):
    """``/v1/chat/completions``."""

    object_name, chunk_name, id_kind = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        tools, reasoning = self.asked.tools, self.asked.reasoning
        offered = () if tools is None else tools.offered
        self._speech = [Speech(tools, self.reader.dialect.parser(offered, reasoning)) for _ in self.choices]
        self._has_begun = [False] * len(self.choices)

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """See `Shape`."""
        made = []
        if not self._has_begun[piece.index]:
            self._has_begun[piece.index] = True
            made.append(self._delta(piece.index, {"role": "assistant", "content": ""}))
        deltas = self._said(piece)
        more = {**self._logprobs(piece.tokens), **self._route(piece.tokens)} if piece.tokens else {}
        if more and not deltas:
            deltas = [{"content": ""}]
        made += [self._delta(piece.index, delta, more if not at else {}) for at, delta in enumerate(deltas)]
        if piece.finish is not None:
            made.append(self._delta(piece.index, {}, finish=self._reason(piece)))
        return made

    def _said(self, piece: Piece) -> list[Delta]:
        speech = self._speech[piece.index]
        deltas: list[Delta] = [{"reasoning_content": piece.reasoning}] if piece.reasoning else []
        deltas += speech.push(piece.text)
        return deltas if piece.finish is None else [*deltas, *speech.end()]

    def _reason(self, piece: Piece) -> str:
        assert piece.finish is not None
        is_call = self._speech[piece.index].has_called and piece.finish is Finish.STOP
        return "tool_calls" if is_call else str(piece.finish)

    def _delta(
        self, index: int, delta: Delta, more: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return self._chunk({"index": index, "delta": delta, "logprobs": None, **(more or {}), "finish_reason": finish})

    def _choice(self, at: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        message = merged([delta for piece in pieces for delta in self._said(piece)])
        tokens = [shown for piece in pieces for shown in piece.tokens]
        return {
            "index": at, "message": {**message, "refusal": None}, "logprobs": None, **self._logprobs(tokens), **self._route(tokens),
            "finish_reason": self._reason(pieces[-1]),
        }  # fmt: skip

    def _logprobs(self, tokens: Sequence[Shown]) -> dict[str, Any]:
        if self.asked.logprobs is None:
            return {}
        rows = []
        for shown in tokens:
            if shown.logprob is not None:
                top = [self._entry(token, value) for token, value in shown.logprob.top[: self.asked.logprobs]]
                rows.append({**self._entry(shown.token, shown.logprob.logprob), "top_logprobs": top})
        return {"logprobs": {"content": rows, "refusal": None}}

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

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """See `Shape`."""
        is_first = not self._has_begun[piece.index]
        text = self._echo(piece.index) + piece.text if is_first else piece.text
        has_scores = is_first and self.choices[piece.index].scores is not None
        if not text and not piece.tokens and piece.finish is None and not has_scores:
            return []
        self._has_begun[piece.index] = True
        return [self._chunk(self._part(piece.index, text, piece.tokens, piece.finish, is_first=is_first))]

    def echoed(self) -> dict[str, Any]:
        """The answer where only the prompt was asked for (``echo`` with ``max_tokens`` 0)."""
        pieces = [[Piece(at, "", finish=Finish.LENGTH)] for at in range(len(self.choices) or self.asked.num_choices)]
        return self.whole(pieces)

    def _echo(self, index: int) -> str:
        return self.asked.texts[index // self.asked.n] if self.asked.is_echo else ""

    def _choice(self, at: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = self._echo(at) + "".join(piece.text for piece in pieces)
        tokens = [shown for piece in pieces for shown in piece.tokens]
        return self._part(at, text, tokens, pieces[-1].finish, is_first=True)

    def _part(
        self, index: int, text: str, tokens: Sequence[Shown], finish: Finish | None, *, is_first: bool
    ) -> dict[str, Any]:
        made = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, tokens, is_first=is_first),
            "finish_reason": finish and str(finish),
        }
        return {**made, **self._route(tokens)}

    def _logprobs(self, index: int, tokens: Sequence[Shown], *, is_first: bool) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        before = len(self._echo(index))
        rows: list[_Row] = self._prompt_rows(index) if is_first else []
        rows += [(shown.token, shown.logprob, before + shown.start) for shown in tokens if shown.logprob is not None]
        return {
            "tokens": [self.reader.token_name(token)[0] for token, _, _ in rows],
            "token_logprobs": [None if told is None else max(told.logprob, LEAST_LOGPROB) for _, told, _ in rows],
            "top_logprobs": [None if told is None else self._top(told) for _, told, _ in rows],
            "text_offset": [start for _, _, start in rows],
        }

    def _prompt_rows(self, index: int) -> list["_Row"]:
        """Rows of an echoed prompt; nothing comes before its first token, so nothing is told of that."""
        scores = self.choices[index].scores
        if scores is None:
            return []
        at = index // self.asked.n
        tokens = self.asked.prompts[at]
        return list(zip(tokens, [None, *scores.rows], self.reader.offsets(tokens, self.asked.texts[at]), strict=True))

    def _top(self, told: TokenLogprob) -> dict[str, float]:
        return {
            self.reader.token_name(token)[0]: max(value, LEAST_LOGPROB)
            for token, value in told.top[: self.asked.logprobs]
        }


# Of log probabilities: a token, what is told of it, the character it begins at.
_Row = tuple[int, TokenLogprob | None, int]
