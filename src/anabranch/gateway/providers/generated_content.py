"""Answers and streams of Google's ``generateContent``, in OpenAI's form; requests see `generate_content`.

| a part | is |
|---|---|
| text | ``content``; of a thought ``reasoning_content`` |
| a call of a function | one of ``tool_calls`` |
| a picture (``inlineData``, or ``fileData`` by its address) | one of ``images``, as OpenRouter has them |
| the signature of any | ``extra_content.google.thought_signature``, and one of ``thinking_blocks`` (`thoughts`) |
| anything else (sound, code that was run) | as it came, one of ``extra_content.google.parts`` |
"""

from typing import Any

from anabranch.gateway.providers.provider import Failure, Json, UpstreamError, Usage
from anabranch.gateway.providers.thoughts import of_call, of_picture, sealed
from anabranch.gateway.providers.translation import ForeignStream, count, message_of, tool_call

# Why an answer ended; all that is not here was held back, or came to nothing.
FINISH = {"STOP": "stop", "MAX_TOKENS": "length", "FINISH_REASON_UNSPECIFIED": "stop"}
WITHHELD = "content_filter"


def check_blocked(value: Json) -> None:
    """Raises UpstreamError (``filter``) where the prompt was refused, and so there is no answer."""
    reason = (value.get("promptFeedback") or {}).get("blockReason")
    if reason and not value.get("candidates"):
        message = f"the upstream's filter refused the prompt ({str(reason)[:100]})"
        raise UpstreamError(Failure(kind="filter", message=message, status=400, code="content_filter"))


def usage_of(given: Json) -> tuple[Usage, int]:
    """Tokens, and those of them that were thoughts. Gemini counts thoughts beside the answer, and cached tokens among the prompt."""
    prompt = count(given.get("promptTokenCount")) + count(given.get("toolUsePromptTokenCount"))
    thoughts = count(given.get("thoughtsTokenCount"))
    completion = count(given.get("candidatesTokenCount")) + thoughts
    if given.get("candidatesTokenCount") is None:
        # Left out of an answer that has some, they are in the sum.
        completion = max(completion, count(given.get("totalTokenCount")) - prompt)
    asked, made = given.get("promptTokensDetails"), given.get("candidatesTokensDetails")
    usage = Usage(
        prompt,
        completion,
        min(count(given.get("cachedContentTokenCount")), prompt),
        audio_input=min(prompt, _of_kind(asked, "AUDIO")),
        image_input=min(prompt, _of_kind(asked, "IMAGE")),
        audio_output=min(completion, _of_kind(made, "AUDIO")),
        image_output=min(completion, _of_kind(made, "IMAGE")),
    )
    return usage, thoughts


def _of_kind(details: Any, modality: str) -> int:
    """Tokens of sound or pictures, as far as they are told apart."""
    found = [one for one in details or () if isinstance(one, dict) and one.get("modality") == modality]
    return sum(count(one.get("tokenCount")) for one in found)


class Parts:
    """The parts of one candidate, each as pieces of a message.

    Attributes:
        num_calls: that have come.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._images = self._seals = self._others = 0
        # What was thought and has no seal yet.
        self._thought = ""

    def pieces(self, part: Json) -> list[Json]:
        """What a part adds to a message. Raises what reading a value of another shape raises."""
        signature = part.get("thoughtSignature")
        own = {"extra_content": {"google": {"thought_signature": signature}}} if signature else {}
        if "functionCall" in part:
            given, at = part["functionCall"], self.num_calls
            self.num_calls += 1
            call = {"index": at, **tool_call(given["name"], given.get("args"), given.get("id")), **own}
            # Its seal comes before it, as the thought did.
            return [*self._seal(of_call(call["id"]), signature), {"tool_calls": [call]}]
        if "text" in part:
            text, is_thought = part["text"], bool(part.get("thought"))
            if not isinstance(text, str):
                raise TypeError("a text that is none")
            self._thought += text if is_thought else ""
            made = {"reasoning_content" if is_thought else "content": text} if text else {}
            return [one for one in ({**made, **own}, *self._seal("h" if is_thought else "t", signature)) if one]
        if (image := _image(part)) is not None:
            at, self._images = self._images, self._images + 1
            seal = self._seal(of_picture(image["image_url"]["url"]), signature)
            return [*seal, {"images": [{"index": at, **image, **own}]}]
        at, self._others = self._others, self._others + 1
        return [{"extra_content": {"google": {"parts": [{"index": at, **part}]}}}] if part else []

    def _seal(self, place: str, signature: Any) -> list[Json]:
        if not signature:
            return []
        thought, self._thought = self._thought, ""
        at, self._seals = self._seals, self._seals + 1
        block = {"index": at, "type": "thinking", "thinking": thought, "signature": sealed(place, signature)}
        return [{"thinking_blocks": [block]}]


def _image(part: Json) -> Json | None:
    """A picture; None for what is none."""
    held, named = part.get("inlineData"), part.get("fileData")
    kind = str((held or named or {}).get("mimeType"))
    if not kind.startswith("image/"):
        return None
    url = f"data:{kind};base64,{held['data']}" if held else named["fileUri"]  # type: ignore[index]
    return {"type": "image_url", "image_url": {"url": url}}


def finish_of(reason: Any, has_calls: bool) -> str:
    """OpenAI's word for why an answer ended."""
    found = FINISH.get(reason, WITHHELD)
    return "tool_calls" if has_calls and found == "stop" else found


def choice_of(at: int, candidate: Json) -> Json:
    """A candidate as a choice, in place ``at`` unless it says another. Raises what reading a value of another shape raises."""
    parts = Parts()
    pieces = [piece for part in (candidate.get("content") or {}).get("parts") or [] for piece in parts.pieces(part)]
    made = message_of(pieces)
    choice = {
        "index": candidate.get("index", at),
        "message": made,
        "finish_reason": finish_of(candidate.get("finishReason"), bool(parts.num_calls)),
    }
    logprobs = _logprobs(candidate.get("logprobsResult"))
    return choice | ({"logprobs": logprobs} if logprobs else {})


def _logprobs(given: Any) -> Json | None:
    """OpenAI's form of ``logprobsResult``; what is none of its own is left out: it is no reason to lose an answer that was paid for."""
    if not given or not isinstance(given, dict):
        return None
    tops, content = _listed(given.get("topCandidates")), []
    for at, chosen in enumerate(_listed(given.get("chosenCandidates"))):
        told = tops[at] if at < len(tops) else None
        others = _listed(told.get("candidates")) if isinstance(told, dict) else []
        top = [token for one in others if (token := _token(one)) is not None]
        if (token := _token(chosen)) is not None:
            content.append({**token, "top_logprobs": top})
    return {"content": content}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _token(given: Any) -> Json | None:
    if not isinstance(given, dict) or not {"token", "logProbability"} <= given.keys():
        return None
    return {"token": given["token"], "logprob": given["logProbability"], "bytes": None}


class GeminiStream(ForeignStream):
    """Turns the events of one answer, each a piece of it in the form of a whole one, into chunks.

    There is no last event that says so: it is over when every candidate has ended, and the usage has been told.
    """

    def __init__(self, provider: Any, num_candidates: int) -> None:
        super().__init__(provider)
        self._num_candidates = num_candidates
        self._ended: set[int] = set()
        self._parts: dict[int, Parts] = {}

    def _chunks(self, value: Json) -> list[Json]:
        if isinstance(value.get("error"), dict):
            raise self._provider._told(value)
        check_blocked(value)
        if value.get("responseId"):
            self._head["id"] = value["responseId"]
        self._head["model"] = value.get("modelVersion") or self._head["model"]
        chunks = [
            chunk
            for candidate in value.get("candidates") or []
            for chunk in self._of(candidate.get("index", 0), candidate)
        ]
        if "usageMetadata" in value:
            usage, reasoning = usage_of(value["usageMetadata"])
            self.told = usage
            if len(self._ended) >= self._num_candidates:
                chunks.append(self._used(usage, reasoning))
                self.is_done = True
        return chunks

    def _of(self, index: int, candidate: Json) -> list[Json]:
        parts = self._parts.setdefault(index, Parts())
        chunks = [
            self._chunk(piece, None, index)
            for part in (candidate.get("content") or {}).get("parts") or []
            for piece in parts.pieces(part)
        ]
        if reason := candidate.get("finishReason"):
            self._ended.add(index)
            chunks.append(self._chunk({}, finish_of(reason, bool(parts.num_calls)), index))
        return chunks
