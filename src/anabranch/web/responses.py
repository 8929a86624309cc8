"""OpenAI's Responses API on top of chat: a request becomes one of chat, the answer or its stream becomes a response.

What holds state on the server (``previous_response_id``, ``conversation``, ``background``) and tools that run there are refused: nothing
here keeps a conversation. Fields that chat has too, and those nobody knows, pass through. A gateway and a server of a model both use it.
"""

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from anabranch.web.api_error import ApiError, wrong
from anabranch.web.beside import beside, images_of, is_whole, joined
from anabranch.web.body import said
from anabranch.web.json_text import to_json
from anabranch.web.sse import event

_HERE = frozenset(
    {
        "input",
        "instructions",
        "max_output_tokens",
        "text",
        "tools",
        "tool_choice",
        "reasoning",
        "include",
        "truncation",
        "prompt",
    }
)
_STATE = ("previous_response_id", "conversation", "background", "prompt")
_ROLES = ("system", "developer", "user", "assistant")
_TEXT = (lambda value: isinstance(value, str), "text")
# Fields of an item, by its type, and what they may be.
_ITEMS: dict[str, tuple[tuple[str, Callable[[Any], bool], str], ...]] = {
    "message": (("role", lambda value: value in _ROLES, f"one of {', '.join(_ROLES)}"),),
    "function_call": (
        ("name", *_TEXT),
        ("arguments", lambda value: value is None or isinstance(value, str), "JSON as text"),
    ),
    "function_call_output": (
        ("call_id", *_TEXT),
        ("output", lambda value: isinstance(value, str | list), "text or a list of parts"),
    ),
}
# Events of a part, by what it is.
_TEXTS = {"text": "output_text", "refusal": "refusal", "reasoning": "reasoning_text"}
_SHOWN: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
    "store": False,
}


def to_chat(body: dict[str, Any], *, keeps_reasoning: bool = False) -> dict[str, Any]:
    """The request of ``/v1/chat/completions`` that asks the same.

    Args:
        body: the request, as it came.
        keeps_reasoning: what a model thought comes back to it; what another did is not for it to see.

    Raises ApiError for what chat cannot do.
    """
    for name in _STATE:
        if body.get(name):
            raise wrong(name, f"{name} needs a server that keeps conversations; send all of it in input", "unsupported")
    chat = {name: value for name, value in body.items() if name not in _HERE}
    chat["messages"] = _messages(body, keeps_reasoning)
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    if body.get("tools"):
        chat["tools"] = [_tool(tool, at) for at, tool in enumerate(_listed(body, "tools"))]
    if body.get("tool_choice") is not None:
        chat["tool_choice"] = _choice(body["tool_choice"])
    wanted = _table(_table(body, "text"), "format", "text.format")
    if wanted and wanted.get("type") != "text":
        form = {name: value for name, value in wanted.items() if name != "type"}
        is_schema = wanted.get("type") == "json_schema"
        chat["response_format"] = {"type": wanted.get("type"), **({"json_schema": form} if is_schema else form)}
    if effort := _table(body, "reasoning").get("effort"):
        chat["reasoning_effort"] = effort
    if verbosity := _table(body, "text").get("verbosity"):
        chat["verbosity"] = verbosity
    if body.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    return chat


def to_response(body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """The response that says what an answer of chat says.

    Args:
        body: the request, as it came.
        answer: of chat.
    """
    choice = (answer.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    output: list[dict[str, Any]] = []
    if _thought_in(message) or message.get("thinking_blocks"):
        thought = _reasoning_item(_new("rs"), _thought_in(message))
        output.append(_sealed(thought, message.get("thinking_blocks"), body))
    if message.get("content") is not None or message.get("refusal"):
        output.append(_message_item(_new("msg"), _as_text(message.get("content")), message.get("refusal") or ""))
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        output.append(_call_item(_new("fc"), call.get("id"), function.get("name"), function.get("arguments") or ""))
    output += [_image_item(kind, data) for kind, data in images_of(message)]
    made = _response(body, answer.get("model"), answer.get("created"))
    return _finished(made, output, choice.get("finish_reason"), answer.get("usage"), beside(message))


def _thought_in(message: dict[str, Any]) -> str:
    """What was thought, in a message or a piece of one."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    return thought if isinstance(thought, str) else ""


def _as_text(content: Any) -> str:
    """Of a message: some servers give its text in parts."""
    if not isinstance(content, list):
        return content or ""
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


class ResponseStream:
    """Turns the chunks of a chat stream into the events of a streamed response: `begin`, `add` each chunk, `end` or `fail`."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body, self._made = body, _response(body, body.get("model"), None)
        self._number = -1
        self._output: list[dict[str, Any]] = []
        # The message or reasoning that is being told, and what its last part is: "text", "refusal" or "reasoning".
        self._item: dict[str, Any] | None = None
        self._part: str | None = None
        self._calls: dict[int, dict[str, Any]] = {}
        self._thoughts: list[dict[str, Any]] = []
        self._beside: dict[str, Any] = {}
        self._reason: str | None = None
        self._usage: dict[str, Any] | None = None

    def begin(self) -> Iterator[bytes]:
        """Before the first chunk."""
        yield self._event("response.created", response=self._made)
        yield self._event("response.in_progress", response=self._made)

    def add(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        """The events of one chunk."""
        self._usage = chunk.get("usage") or self._usage
        self._made["model"] = chunk.get("model") or self._made["model"]
        for choice in (chunk.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            self._reason = choice.get("finish_reason") or self._reason
            self._beside = joined(self._beside, beside(delta))
            texts = (
                ("reasoning", _thought_in(delta)),
                ("text", delta.get("content")),
                ("refusal", delta.get("refusal")),
            )
            for kind, text in texts:
                if text:
                    yield from self._add_text(kind, text)
                if kind == "reasoning" and delta.get("thinking_blocks"):
                    yield from self._add_thoughts(delta["thinking_blocks"])
            for image in images_of(delta):
                yield from self._add_image(_image_item(*image))
            for call in delta.get("tool_calls") or ():
                yield from self._add_call(call)

    def end(self) -> Iterator[bytes]:
        """After the last chunk."""
        yield from self._close_item()
        yield from self._close_calls()
        made = _finished(self._made, self._output, self._reason, self._usage, self._beside)
        yield self._event(f"response.{made['status']}", response=made)

    def fail(self, message: str, code: str | None) -> Iterator[bytes]:
        """Instead of the end."""
        failed = {**self._made, "status": "failed", "output": self._output}
        failed["error"] = {"code": code or "server_error", "message": message}
        yield self._event("response.failed", response=failed)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": name, "sequence_number": self._number, **fields}, name)

    def _add_text(self, kind: str, text: str) -> Iterator[bytes]:
        is_thought = kind == "reasoning"
        if self._item is not None and (self._item["type"] == "reasoning") != is_thought:
            yield from self._close_item()
        item = self._item
        if item is None:
            yield from self._close_calls(only_whole=True)
            made = _reasoning_item(_new("rs"), "") if is_thought else _message_item(_new("msg"), "", "")
            item = self._item = {**made, "status": "in_progress", "content": []}
            self._output.append(item)
            yield self._event("response.output_item.added", output_index=self._at(item), item=item)
        if self._part != kind:
            yield from self._close_part()
            self._part = kind
            item["content"].append(_part(kind, ""))
            yield self._event("response.content_part.added", **self._where(item), part=item["content"][-1])
        item["content"][-1]["refusal" if kind == "refusal" else "text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "text" else {}
        yield self._event(f"response.{_TEXTS[kind]}.delta", **self._where(item), delta=text, **more)

    def _add_thoughts(self, blocks: list[dict[str, Any]]) -> Iterator[bytes]:
        """What seals the thoughts that were told before, or is sealed whole."""
        if self._item is None or self._item["type"] != "reasoning":
            yield from self._close_item()
            yield from self._close_calls(only_whole=True)
            item = self._item = {**_reasoning_item(_new("rs"), ""), "status": "in_progress", "content": []}
            self._output.append(item)
            yield self._event("response.output_item.added", output_index=self._at(item), item=item)
        self._thoughts += blocks

    def _close_part(self) -> Iterator[bytes]:
        if self._part is None or self._item is None:
            return
        part, kind, item = self._item["content"][-1], self._part, self._item
        field = "refusal" if kind == "refusal" else "text"
        more: dict[str, Any] = {"logprobs": []} if kind == "text" else {}
        yield self._event(f"response.{_TEXTS[kind]}.done", **self._where(item), **{field: part[field]}, **more)
        yield self._event("response.content_part.done", **self._where(item), part=part)
        self._part = None

    def _close_item(self) -> Iterator[bytes]:
        if self._item is None:
            return
        yield from self._close_part()
        item, self._item = self._item, None
        item["status"] = "completed"
        if item["type"] == "reasoning":
            thoughts, self._thoughts = self._thoughts, []
            item |= _sealed(item, thoughts, self._body)
        yield self._event("response.output_item.done", output_index=self._at(item), item=item)

    def _add_image(self, item: dict[str, Any]) -> Iterator[bytes]:
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

    def _add_call(self, part: dict[str, Any]) -> Iterator[bytes]:
        number, function = self._place(part), part.get("function") or {}
        call = self._calls.get(number)
        if call is None:
            yield from self._close_item()
            # Others that are told at the same time go on.
            yield from self._close_calls(only_whole=True)
            call = _call_item(_new("fc"), part.get("id"), function.get("name"), "", status="in_progress")
            self._calls[number] = call
            self._output.append(call)
            yield self._event("response.output_item.added", output_index=self._at(call), item=call)
        text = function.get("arguments")
        if text and call["status"] == "completed":
            if text.strip():
                raise ValueError("a call goes on behind its end")
        elif text:
            call["arguments"] += text
            yield self._event(
                "response.function_call_arguments.delta", item_id=call["id"], output_index=self._at(call), delta=text
            )

    def _close_calls(self, *, only_whole: bool = False) -> Iterator[bytes]:
        for call in self._calls.values():
            if call["status"] == "in_progress" and not (only_whole and not is_whole(call["arguments"])):
                yield from self._close_call(call)

    def _close_call(self, call: dict[str, Any]) -> Iterator[bytes]:
        call["status"] = "completed"
        at = self._at(call)
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


def _messages(body: dict[str, Any], keeps_reasoning: bool) -> list[dict[str, Any]]:
    wanted, messages = body.get("input"), []
    if body.get("instructions") is not None:
        if not isinstance(body["instructions"], str):
            raise wrong("instructions", f"instructions is {said(body['instructions'])}; it must be text")
        messages.append({"role": "system", "content": body["instructions"]})
    if isinstance(wanted, str):
        return [*messages, {"role": "user", "content": wanted}]
    if not isinstance(wanted, list) or not wanted:
        raise wrong("input", "input must be text or a list of items with at least one in it")
    for at, item in enumerate(wanted):
        if not isinstance(item, dict):
            raise wrong(f"input[{at}]", f"input[{at}] must be an object")
        if item.get("type") == "reasoning":
            made = _thoughts_of(item, keeps_reasoning)
            # It is of the message or the call that follows.
            if made:
                messages.append({"role": "assistant", "content": "", **made})
        else:
            _add_item(messages, item, f"input[{at}]")
    return messages


# Marks thoughts that were sealed here, for whoever gets them back.
_SEAL = "anabranch-1."
_THOUGHTS = ("reasoning_content", "thinking_blocks")


def _sealed(item: dict[str, Any], thoughts: Any, body: dict[str, Any]) -> dict[str, Any]:
    """A reasoning item with the signed thoughts behind it, if they are asked for (``include``): the model goes on from them."""
    included = body.get("include")
    if not thoughts and (unsigned := _thought(item)):
        # Of a model that signs none, and wants them back all the same.
        thoughts = [{"type": "thinking", "thinking": unsigned}]
    if not thoughts or not isinstance(included, list) or "reasoning.encrypted_content" not in included:
        return item
    text = to_json(thoughts, (",", ":"))
    return {**item, "encrypted_content": _SEAL + base64.urlsafe_b64encode(text).decode()}


def _thoughts_of(item: dict[str, Any], keeps_reasoning: bool) -> dict[str, Any]:
    """What a reasoning item says of a message: its text, where the model may see it, and the thoughts that were sealed here."""
    made: dict[str, Any] = {}
    if keeps_reasoning and (thought := _thought(item)):
        made["reasoning_content"] = thought
    sealed = None if made else item.get("encrypted_content")
    if isinstance(sealed, str) and sealed.startswith(_SEAL):
        try:
            blocks = json.loads(base64.urlsafe_b64decode(sealed.removeprefix(_SEAL)))
        except (ValueError, RecursionError):
            blocks = None
        if isinstance(blocks, list) and blocks and all(isinstance(block, dict) for block in blocks):
            made["thinking_blocks"] = blocks
    return made


def _thought(item: dict[str, Any]) -> str:
    parts = item.get("content")
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], name: str) -> None:
    kind = item.get("type", "message")
    for field, is_right, wanted in _ITEMS.get(kind, ()) if isinstance(kind, str) else ():
        if not is_right(item.get(field)):
            raise wrong(f"{name}.{field}", f"{name}.{field} is {said(item.get(field))}; it must be {wanted}")
    if kind == "message":
        made: dict[str, Any] = {"role": item.get("role"), "content": _content(item.get("content"), name)}
        before = messages[-1] if messages else {}
        is_thought = any(before.get(name) for name in _THOUGHTS) and not before["content"]
        if made["role"] == "assistant" and is_thought and not before.get("tool_calls"):
            messages.pop()
            made |= {name: before[name] for name in (*_THOUGHTS, "images") if name in before}
        messages.append(made)
    elif kind == "function_call":
        call = {"name": item.get("name"), "arguments": item.get("arguments") or ""}
        made = {"id": item.get("call_id"), "type": "function", "function": call}
        # What was said before the call, and calls beside it.
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(made)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [made]})
    elif kind == "image_generation_call" and isinstance(item.get("result"), str):
        _add_image(messages, item)
    elif kind == "function_call_output":
        content = _content(item.get("output"), name)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    else:
        what = f"{name} is of type {str(kind)[:40]!r}, which no chat model can be sent"
        raise wrong(f"{name}.type", what, "unsupported")


def _add_image(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """A picture that the model made before."""
    form, result = item.get("output_format"), item["result"]
    url = result if "://" in result[:10] else f"data:image/{form if isinstance(form, str) else 'png'};base64,{result}"
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("images", []).append({"type": "image_url", "image_url": {"url": url}})


def _choice(choice: Any) -> Any:
    """A ``tool_choice`` as chat has it."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        what = 'as an object tool_choice is {"type": "function", "name": ...}; no other kind can be chosen'
        raise wrong("tool_choice", what, "unsupported")
    return {"type": "function", "function": {"name": choice["name"]}}


def _content(content: Any, name: str) -> Any:
    if not isinstance(content, list):
        return content
    parts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text", "text"):
            parts.append({"type": "text", "text": part.get("text")})
        elif kind == "refusal":
            parts.append({"type": "refusal", "refusal": part.get("refusal")})
        elif kind == "input_image" and part.get("image_url"):
            detail = {"detail": part["detail"]} if part.get("detail") else {}
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"], **detail}})
        elif kind == "input_file" and (part.get("file_data") or part.get("file_id")):
            file = {field: part[field] for field in ("file_data", "file_id", "filename") if part.get(field)}
            parts.append({"type": "file", "file": file})
        elif kind == "input_audio" and isinstance(part.get("input_audio"), dict):
            parts.append({"type": "input_audio", "input_audio": part["input_audio"]})
        else:
            where = f"{name}.content[{at}]"
            raise wrong(
                where,
                f"{where} is of type {str(kind)[:40]!r}; text, images by URL, files with their data and sound can be sent",
                "unsupported",
            )
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"]
    return parts


def _tool(tool: Any, at: int) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise wrong(
            f"tools[{at}]", f"tools[{at}] is of type {str(kind)[:40]!r}; only functions can be offered", "unsupported"
        )
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _response(body: dict[str, Any], model: str | None, created: int | None) -> dict[str, Any]:
    shown = {name: default if body.get(name) is None else body[name] for name, default in _SHOWN.items()}
    reasoning = {"effort": _table(body, "reasoning").get("effort"), "summary": None}
    return {
        "id": _new("resp"),
        "object": "response",
        "created_at": created or int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model or body.get("model"),
        "output": [],
        "previous_response_id": None,
        "reasoning": reasoning,
        "text": body.get("text") or {"format": {"type": "text"}},
        "usage": None,
        **shown,
    }


def _finished(
    made: dict[str, Any],
    output: list[dict[str, Any]],
    reason: str | None,
    usage: dict[str, Any] | None,
    more: dict[str, Any],
) -> dict[str, Any]:
    why = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(reason or "")
    status = {"status": "incomplete", "incomplete_details": {"reason": why}} if why else {"status": "completed"}
    told = {"extra_content": more} if more else {}
    return {**made, **status, "output": output, "usage": _usage(usage), **told}


def _usage(usage: dict[str, Any] | None) -> dict[str, Any] | None:
    if not usage:
        return None
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + completion,
    }


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "refusal":
        return {"type": "refusal", "refusal": text}
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message_item(id: str, text: str, refusal: str, status: str = "completed") -> dict[str, Any]:
    content = [_part(kind, value) for kind, value in (("text", text), ("refusal", refusal)) if value or kind == "text"]
    return {"id": id, "type": "message", "role": "assistant", "status": status, "content": content}


def _reasoning_item(id: str, text: str, status: str = "completed") -> dict[str, Any]:
    return {"id": id, "type": "reasoning", "summary": [], "content": [_part("reasoning", text)], "status": status}


def _image_item(kind: str, data: str) -> dict[str, Any]:
    """A picture; one that is elsewhere by its address."""
    form = {"output_format": kind.partition("/")[2]} if kind else {}
    return {"id": _new("ig"), "type": "image_generation_call", "status": "completed", "result": data, **form}


def _call_item(id: str, call_id: Any, name: Any, arguments: str, status: str = "completed") -> dict[str, Any]:
    return {
        "id": id,
        "type": "function_call",
        "call_id": call_id or id,
        "name": name or "",
        "arguments": arguments,
        "status": status,
    }


def _listed(body: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(body[name], list):
        raise wrong(name, f"{name} must be a list")
    return body[name]


def _table(body: dict[str, Any], name: str, shown: str | None = None) -> dict[str, Any]:
    value = body.get(name) or {}
    if not isinstance(value, dict):
        raise wrong(shown or name, f"{shown or name} must be an object")
    return value


def _new(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


__all__ = ["ApiError", "ResponseStream", "to_chat", "to_response"]
