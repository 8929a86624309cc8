"""Endpoints that are no text in, text out: pictures, sound, moderation, ranking. Bodies pass as they are; here is what their answers are.

| endpoint | path | asked in | answer | what it says of its cost |
|---|---|---|---|---|
| images | /images/generations | JSON | `data` | tokens; else a picture is one token |
| image_edits | /images/edits | a form | `data` | likewise |
| speech | /audio/speech | JSON | sound | nothing: a letter is a token, and so is what is said of it |
| transcriptions, translations | /audio/... | a form | JSON or text | tokens or seconds |
| moderations | /moderations | JSON | `results` | nothing |
| rerank | /rerank | JSON | `results` | tokens, or units of documents: each is a call |
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.gateway.media_tokens import heard_seconds
from anabranch.gateway.providers.provider import (
    Answer,
    Endpoint,
    Json,
    UpstreamError,
    UpstreamRequest,
    garbage,
    parse_object,
)
from anabranch.gateway.providers.usage import TOKENS, Usage
from anabranch.gateway.providers.vocabulary import status_said

PATHS: dict[Endpoint, str] = {
    "images": "/images/generations",
    "image_edits": "/images/edits",
    "speech": "/audio/speech",
    "transcriptions": "/audio/transcriptions",
    "translations": "/audio/translations",
    "moderations": "/moderations",
    "rerank": "/rerank",
}

# What holds the answer; of others the answer is whatever comes.
_HOLDS = {"images": "data", "image_edits": "data", "moderations": "results", "rerank": "results"}
_JSON_FORMS = (None, "json", "verbose_json", "diarized_json")
# Forms of sound that may be asked for, and the types of them.
SOUNDS = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}

# Tokens of sound that a letter comes to at most: ten letters are heard in a second at least, which has about twenty.
SPOKEN = 2
SOUND_A_SECOND = 20


@dataclass(frozen=True, slots=True)
class Upload:
    """A file in a form.

    Attributes:
        name: of the file.
        type: of what is in it.
        data: what is in it.
    """

    name: str
    type: str
    data: bytes


def encoded(request: UpstreamRequest, model: str) -> tuple[bytes, str]:
    """The body with another name of the model, and its type: JSON, or a form where there are files."""
    if not any(isinstance(value, list) and value and isinstance(value[0], Upload) for value in request.body.values()):
        return request.encoded(model, False), "application/json"
    parts: list[tuple[str, bytes]] = []
    for name, value in {**request.body, "model": model}.items():
        for item in value if isinstance(value, list) else [value]:
            head = f'Content-Disposition: form-data; name="{_quoted(name)}"'
            if isinstance(item, Upload):
                head += f'; filename="{_quoted(item.name)}"\r\nContent-Type: {item.type}'
            parts.append((head, item.data if isinstance(item, Upload) else _text(item)))
    # Of what it parts, so that the same request is sent in the same bytes, and none of them can hold it.
    mark = hashlib.sha256(b"\0".join(data for _, data in parts)).hexdigest()[:32]
    pieces = [f"--{mark}\r\n{head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts]
    return b"".join([*pieces, f"--{mark}--\r\n".encode()]), f"multipart/form-data; boundary={mark}"


def _text(value: Any) -> bytes:
    return (str(value).lower() if isinstance(value, bool) else str(value)).encode("utf-8", "surrogatepass")


def _quoted(text: str) -> str:
    """As forms of browsers have it."""
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def read(request: UpstreamRequest, body: bytes, provider: Any) -> Answer:
    """The body of a 2xx answer. Raises UpstreamError (``garbage``)."""
    if request.endpoint == "speech" or not _is_json(request.endpoint, request.body):
        if not body:
            raise garbage("an empty answer")
        return Answer({}, body, usage_of(request, {}, body))
    value = parse_object(body)
    if isinstance(value.get("error"), dict):
        raise UpstreamError(provider.error(status_said(value), {}, body))
    wanted = _HOLDS.get(request.endpoint)
    if wanted is not None and not isinstance(value.get(wanted), list):
        raise garbage(f"an answer without {wanted!r}", body)
    if wanted is None and not isinstance(value.get("text"), str):
        raise garbage("an answer without 'text'", body)
    return Answer(value, body, usage_of(request, value))


def content_type(endpoint: Endpoint, body: Mapping[str, Any]) -> str:
    """Of the answer to a request."""
    form = body.get("response_format")
    if endpoint == "speech":
        return SOUNDS.get(str(form or "mp3"), "application/octet-stream")
    return "application/json" if _is_json(endpoint, body) else "text/plain"


def _is_json(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    is_heard = endpoint in ("transcriptions", "translations")
    return not is_heard or body.get("response_format") in _JSON_FORMS


def usage_of(request: UpstreamRequest, value: Json, data: bytes = b"") -> Usage:
    """What an answer says that it cost, else what was counted of the request and of what it holds.

    Args:
        request: that it answers.
        value: the answer, where it is JSON.
        data: the answer, where it is sound or plain text.
    """
    # Cohere says it elsewhere.
    told = _table(value, "usage") or _table(_table(value, "meta"), "tokens")
    prompt = _count(told, "input_tokens", "prompt_tokens", "total_tokens")
    completion = _count(told, "output_tokens", "completion_tokens")
    # So many documents of a ranking are a unit.
    units = _count(_table(_table(value, "meta"), "billed_units"), "search_units")
    calls = units if request.endpoint == "rerank" else None
    pictures = len(value["data"]) if request.endpoint in ("images", "image_edits") and value.get("data") else 0
    if prompt is None and completion is None:
        seconds = _count(told, "seconds")
        if seconds is not None:
            return Usage(seconds, 0, audio_input=seconds)
        sound = _spoken(request, data) if request.endpoint == "speech" else 0
        made = sound or pictures
        if request.endpoint in ("transcriptions", "translations"):
            # No tokenizer makes more of it than its bytes.
            made = len(data) or len(_text(value.get("text") or ""))
        return Usage(request.prompt_tokens, made, 0, True, audio_output=sound, image_output=pictures, calls=calls)
    asked = _table(told, "input_tokens_details") or _table(told, "input_token_details")
    prompt, completion = prompt or 0, completion or 0
    return Usage(
        prompt,
        completion,
        audio_input=min(_count(asked, "audio_tokens") or 0, prompt),
        image_input=min(_count(asked, "image_tokens") or 0, prompt),
        image_output=completion if pictures else 0,
        calls=calls,
    )


def _spoken(request: UpstreamRequest, data: bytes) -> int:
    """Tokens of sound: of its letters, or of the time that it lasts, whichever is more."""
    form = str(request.body.get("response_format") or "mp3")
    heard = math.ceil(heard_seconds(data, form) * SOUND_A_SECOND) if data else 0
    return max(SPOKEN * len(str(request.body.get("input") or "")), heard)


def _table(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    inner = value.get(name)
    return inner if isinstance(inner, dict) else {}


def _count(table: Mapping[str, Any], *names: str) -> int | None:
    """The first of these that is a count; seconds are rounded up."""
    for name in names:
        value = table.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= TOKENS:
            return -int(-value // 1)
    return None
