"""`ResponseStream`: a stream of chat as the events of a response."""

from collections.abc import Iterator
from typing import Any

from anabranch.web.beside import beside, images_of, is_whole, joined
from anabranch.web.reasoning_details import details_in, joined_details, sealed_blocks
from anabranch.web.responses.answer import finished, own_of, response_of, why_cut
from anabranch.web.responses.items import (
    call_item,
    image_item,
    message_item,
    new_id,
    part_of,
    reasoning_item,
)
from anabranch.web.responses.scores import logprobs_of, logprobs_of_nothing, logprobs_within
from anabranch.web.responses.thoughts import sealed, thought_in
from anabranch.web.responses.tools import custom_names, text_of
from anabranch.web.sse import event, event_slices

# Events of a part, by what it is.
_TEXTS = {"text": "output_text", "refusal": "refusal", "reasoning": "reasoning_text"}


# Its name and its data.
_Event = tuple[str, dict[str, Any]]


class ResponseStream:
    """Turns the chunks of a chat stream into the events of a streamed response: `begin`, `add` each chunk, `end` or `fail`.

    Attributes:
        response: as of its last event.

    Args:
        body: the request, as it came.
        tells: whether there are events; without, each is empty, and the response is all that is made.
    """

    def __init__(self, body: dict[str, Any], *, tells: bool = True) -> None:
        self._body, self._tells = body, tells
        self._made = self.response = response_of(body, body.get("model"), None)
        self._number = -1
        self._output: list[dict[str, Any]] = []
        # The message or reasoning that is being told, and what its last part is: "text", "refusal" or "reasoning".
        self._item: dict[str, Any] | None = None
        self._part: str | None = None
        self._calls: dict[int, dict[str, Any]] = {}
        # Of calls of custom tools, by id, the arguments that have come: what stands in them is told once it is whole.
        self._custom, self._arguments = custom_names(body), dict[str, str]()
        # What has come of that part, which its item has once it ends.
        self._pieces: list[str] = []
        # Log probabilities of tokens whose text is held back still; whether those of thoughts or calls may be among them.
        self._scores: list[Any] = []
        self._has_others = False
        self._thoughts: list[dict[str, Any]] = []
        self._details: list[Any] = []
        self._beside: dict[str, Any] = {}
        self._reason: str | None = None
        self._usage: dict[str, Any] | None = None

    def begin(self) -> Iterator[bytes]:
        """Before the first chunk."""
        return self._told(self._begin(), in_slices=False)

    def add(self, chunk: dict[str, Any], *, in_slices: bool = False) -> Iterator[bytes]:
        """The events of one chunk, each whole or in slices, none of which takes long to make."""
        return self._told(self._add(chunk), in_slices=in_slices)

    def end(self, *, in_slices: bool = False) -> Iterator[bytes]:
        """After the last chunk; as of `add`."""
        return self._told(self._end(), in_slices=in_slices)

    def fail(self, message: str, code: str | None, *, in_slices: bool = False) -> Iterator[bytes]:
        """Instead of the end; as of `add`."""
        return self._told(self._fail(message, code), in_slices=in_slices)

    def _begin(self) -> Iterator[_Event]:
        yield self._event("response.created", response=self._made)
        yield self._event("response.in_progress", response=self._made)

    def _add(self, chunk: dict[str, Any]) -> Iterator[_Event]:
        self._usage = chunk.get("usage") or self._usage
        self._made["model"] = chunk.get("model") or self._made["model"]
        for choice in (chunk.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            self._reason = choice.get("finish_reason") or self._reason
            self._made.update(own_of(choice))
            self._beside = joined(self._beside, beside(delta))
            self._details += details_in(delta)
            texts = (
                ("reasoning", thought_in(delta)),
                ("text", delta.get("content")),
                ("refusal", delta.get("refusal")),
            )
            scores = self._scores_of(delta, logprobs_of(choice))
            for kind, text in texts:
                if text:
                    yield from self._add_text(kind, text, scores if kind == "text" else [])
                if kind == "reasoning" and (delta.get("thinking_blocks") or (self._details and self._item is None)):
                    yield from self._add_thoughts(delta.get("thinking_blocks") or [])
            for image in images_of(delta):
                yield from self._add_image(image_item(*image))
            for call in delta.get("tool_calls") or ():
                yield from self._add_call(call)

    def _scores_of(self, delta: dict[str, Any], own: list[Any]) -> list[Any]:
        """The log probabilities that the text of a delta is told with; those without one are held for the next."""
        content, is_call = delta.get("content"), bool(delta.get("tool_calls"))
        is_other = is_call or bool(thought_in(delta))
        held, self._scores = self._scores, []
        has_others, self._has_others = self._has_others or is_other, is_call
        if not isinstance(content, str) or not content:
            # Of what is no text the last alone: beside it may stand those of the text that comes next.
            if is_other:
                self._scores = list(own)
            elif not delta.get("refusal"):
                # Those that are held are not copied for each piece without text.
                held.extend(own)
                self._scores = held
            self._has_others = has_others
            return []
        scores = held + own
        is_first = self._item is None or self._item["type"] != "message"
        if is_first or has_others:
            # Whose those behind it are says what comes next: more text, a call, or the end.
            scores, behind = logprobs_within(content, scores, has_others=has_others)
            self._scores = [] if is_call else behind
        return scores

    def _end(self) -> Iterator[_Event]:
        is_cut = why_cut(self._reason) is not None
        self._tell_held()
        yield from self._close_item("incomplete" if is_cut else "completed")
        if self._details:
            # They came behind what was said.
            yield from self._add_thoughts([])
            yield from self._close_item()
        yield from self._close_calls(is_cut=is_cut)
        if not self._output:
            yield from self._open_part("text")
            self._scores = logprobs_of_nothing(self._scores, self._usage)
            self._tell_held()
            yield from self._close_item("incomplete" if is_cut else "completed")
        self.response = made = finished(self._made, self._output, self._reason, self._usage, self._beside)
        yield self._event(f"response.{made['status']}", response=made)

    def _fail(self, message: str, code: str | None) -> Iterator[_Event]:
        self._put_together()
        failed = {**self._made, "status": "failed", "output": self._output}
        failed["error"] = {"code": code or "server_error", "message": message}
        self.response = failed
        yield self._event("response.failed", response=failed)

    def _event(self, name: str, /, **fields: Any) -> _Event:
        self._number += 1
        return name, {"type": name, "sequence_number": self._number, **fields}

    def _told(self, events: Iterator[_Event], *, in_slices: bool) -> Iterator[bytes]:
        """They change with what comes behind them, so each is told before the next is made."""
        for name, data in events:
            if not self._tells:
                yield b""
            elif in_slices:
                yield from event_slices(data, name)
            else:
                yield event(data, name)

    def _open_part(self, kind: str) -> Iterator[_Event]:
        """Begin what the text is part of, unless it goes on."""
        is_thought = kind == "reasoning"
        if self._item is not None and (self._item["type"] == "reasoning") != is_thought:
            yield from self._close_item()
        item = self._item
        if item is None:
            yield from self._close_calls(only_whole=True)
            made = reasoning_item(new_id("rs"), "") if is_thought else message_item(new_id("msg"), "", "")
            item = self._item = {**made, "status": "in_progress", "content": []}
            self._output.append(item)
            yield self._event("response.output_item.added", output_index=self._at(item), item=item)
        if self._part != kind:
            yield from self._close_part()
            self._part = kind
            item["content"].append(part_of(kind, ""))
            yield self._event("response.content_part.added", **self._where(item), part=item["content"][-1])

    def _add_text(self, kind: str, text: str, logprobs: list[Any]) -> Iterator[_Event]:
        if not isinstance(text, str):
            # Before it is kept: what was told is put together once more where a stream fails.
            raise TypeError(f"text of a chunk is {type(text).__name__}")
        yield from self._open_part(kind)
        item = self._item
        assert item is not None
        self._pieces.append(text)
        more: dict[str, Any] = {}
        if kind == "text":
            item["content"][-1]["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        yield self._event(f"response.{_TEXTS[kind]}.delta", **self._where(item), delta=text, **more)

    def _add_thoughts(self, blocks: list[dict[str, Any]]) -> Iterator[_Event]:
        """What seals the thoughts that were told before, or is sealed whole."""
        if self._item is None or self._item["type"] != "reasoning":
            yield from self._close_item()
            yield from self._close_calls(only_whole=True)
            item = self._item = {**reasoning_item(new_id("rs"), ""), "status": "in_progress", "content": []}
            self._output.append(item)
            yield self._event("response.output_item.added", output_index=self._at(item), item=item)
        self._thoughts += blocks

    def _tell_held(self) -> None:
        """Give the text that is being told what is left of log probabilities: of a stop string, or of half a character."""
        if self._item is not None and self._part == "text" and not self._has_others:
            self._item["content"][-1]["logprobs"] += self._scores
            self._scores = []

    def _close_part(self) -> Iterator[_Event]:
        if self._part is None or self._item is None:
            return
        self._put_together()
        part, kind, item = self._item["content"][-1], self._part, self._item
        field = "refusal" if kind == "refusal" else "text"
        more: dict[str, Any] = {"logprobs": part["logprobs"]} if kind == "text" else {}
        yield self._event(f"response.{_TEXTS[kind]}.done", **self._where(item), **{field: part[field]}, **more)
        yield self._event("response.content_part.done", **self._where(item), part=part)
        self._part = None

    def _put_together(self) -> None:
        """Give the part that is being told its text."""
        if self._item is not None and self._part is not None:
            self._item["content"][-1]["refusal" if self._part == "refusal" else "text"] += "".join(self._pieces)
        self._pieces = []

    def _close_item(self, status: str = "completed") -> Iterator[_Event]:
        if self._item is None:
            return
        yield from self._close_part()
        item, self._item = self._item, None
        item["status"] = status
        if item["type"] == "reasoning":
            thoughts, self._thoughts = self._thoughts, []
            details, self._details = self._details, []
            item |= sealed(item, thoughts or sealed_blocks(joined_details(details)), self._body)
        yield self._event("response.output_item.done", output_index=self._at(item), item=item)

    def _add_image(self, item: dict[str, Any]) -> Iterator[_Event]:
        yield from self._close_item()
        self._output.append(item)
        begun = {**item, "status": "in_progress", "result": None}
        yield self._event("response.output_item.added", output_index=self._at(item), item=begun)
        yield self._event("response.output_item.done", output_index=self._at(item), item=item)

    def _place(self, part: dict[str, Any]) -> int:
        """Which call a piece is of; of a server that numbers none, each that is named is another."""
        number = part.get("index")
        if isinstance(number, int):
            return number
        is_new = bool(part.get("id") or (part.get("function") or {}).get("name"))
        return len(self._calls) if is_new else len(self._calls) - 1

    def _add_call(self, part: dict[str, Any]) -> Iterator[_Event]:
        number, function = self._place(part), part.get("function") or {}
        call = self._calls.get(number)
        if call is None:
            yield from self._close_item()
            # Others that are told at the same time go on.
            yield from self._close_calls(only_whole=True)
            name = function.get("name")
            is_custom = name in self._custom
            id = new_id("ctc" if is_custom else "fc")
            call = call_item(id, part.get("id"), name, "", status="in_progress", is_custom=is_custom)
            if is_custom:
                self._arguments[id] = ""
            self._calls[number] = call
            self._output.append(call)
            yield self._event("response.output_item.added", output_index=self._at(call), item=call)
        text = function.get("arguments")
        if text and call["status"] == "completed":
            if text.strip():
                raise ValueError("a call goes on behind its end")
        elif text and call["id"] in self._arguments:
            self._arguments[call["id"]] += text
        elif text:
            call["arguments"] += text
            yield self._event(
                "response.function_call_arguments.delta", item_id=call["id"], output_index=self._at(call), delta=text
            )

    def _close_calls(self, *, only_whole: bool = False, is_cut: bool = False) -> Iterator[_Event]:
        for call in self._calls.values():
            told = self._arguments.get(call["id"], call.get("arguments", ""))
            if call["status"] != "in_progress" or (only_whole and not is_whole(told)):
                continue
            if is_cut and not is_whole(told):
                # Nobody is told that these arguments are done.
                call["status"] = "incomplete"
                if call["id"] in self._arguments:
                    call["input"] = text_of(told)
                yield self._event("response.output_item.done", output_index=self._at(call), item=call)
            else:
                yield from self._close_call(call)

    def _close_call(self, call: dict[str, Any]) -> Iterator[_Event]:
        call["status"] = "completed"
        at = self._at(call)
        if call["id"] in self._arguments:
            call["input"] = text_of(self._arguments[call["id"]])
            where = {"item_id": call["id"], "output_index": at}
            yield self._event("response.custom_tool_call_input.delta", **where, delta=call["input"])
            yield self._event("response.custom_tool_call_input.done", **where, input=call["input"])
            yield self._event("response.output_item.done", output_index=at, item=call)
            return
        yield self._event(
            "response.function_call_arguments.done",
            item_id=call["id"],
            output_index=at,
            name=call["name"],
            arguments=call["arguments"],
        )
        yield self._event("response.output_item.done", output_index=at, item=call)

    def _at(self, item: dict[str, Any]) -> int:
        return next(at for at, held in enumerate(self._output) if held is item)

    def _where(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": self._at(item), "content_index": len(item["content"]) - 1}
