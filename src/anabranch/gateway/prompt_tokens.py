"""Prompt tokens before a call: by the model's tokenizer where the config names one, else a quarter of the bytes, marked as an estimate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.gateway import media_tokens
from anabranch.gateway.media_tokens import Media, is_address
from anabranch.gateway.sound_packets import Pieces, one_request
from anabranch.web.large_json import num_bytes
from anabranch.web.said_order import unordered

BYTES_PER_TOKEN = 4

# By so much a prompt that is estimated may be longer.
ESTIMATE_FACTOR = 2

# Around each message: its role and the marks of its ends.
MESSAGE_TOKENS = 4

# Names and values of settings that no model reads; what there is more of them is none.
SETTINGS_BYTES = 1_024

# Names that messages and parts have; what is said under any other counts with its name.
_MESSAGE_NAMES = frozenset(
    "name refusal audio function_call tool_calls tool_call_id reasoning reasoning_content reasoning_details thinking_blocks annotations "
    "cache_control is_error".split()
)
_PART_NAMES = frozenset(
    "text refusal image_url detail url data format file_data file_id filename cache_control citations title context source content input "
    "name id tool_use_id thinking signature".split()
)

# Characters of what says which kind a part is.
_KIND = 40

IMAGES = ("image_url", "input_image")

# Parts that are no text: the field that holds them, and what counts it.
_INNER: dict[str, tuple[str, Callable[[Mapping[str, Any], Pieces | None], Media | None]]] = {
    "input_audio": ("data", media_tokens.audio),
    "file": ("file_data", media_tokens.file),
    "video_url": ("url", lambda inner, walked: media_tokens.elsewhere("video/")),
    "audio_url": ("url", lambda inner, walked: media_tokens.elsewhere("audio/")),
}

# Names of fields, and parts of them, that hold what is no text, or an address of it.
_PLACES = ("image", "audio", "video", "document", "file", "media", "pdf")

# Fields that no model reads. All others count, unknown ones too: a text that is sent on is a text that is paid for.
NO_PROMPT = frozenset(
    {
        "model",
        "user",
        "metadata",
        "logit_bias",
        "stop",
        "stream_options",
        "tool_choice",
        "encoding_format",
        "modalities",
    }
)

Counter = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class PromptCount:
    """Tokens of a prompt.

    Attributes:
        tokens: counted or estimated.
        at_most: no tokenizer makes more of it: each token is at least a byte; of images, audio and files see `media`. What is
            reserved from budgets.
        is_estimate: no tokenizer was there.
        audio, images: of ``at_most``, those of sound and of pictures.
    """

    tokens: int
    at_most: int
    is_estimate: bool
    audio: int = 0
    images: int = 0


def count_prompt(body: Mapping[str, Any], counter: Counter | None = None, walked: Pieces | None = None) -> PromptCount:
    """Of a request to ``/v1/chat/completions``, ``/v1/completions`` or ``/v1/embeddings``.

    Args:
        body: of the request.
        counter: the tokenizer of its model; None for a quarter of the bytes.
        walked: of the request that it was made of, see `one_request`; None if it came so.

    Raises ApiError for sound that is made to be read slowly.
    """
    with one_request("messages", walked) as of_request:
        return _counted(body, counter, of_request)


def _counted(body: Mapping[str, Any], counter: Counter | None, walked: Pieces) -> PromptCount:
    around = 0
    # Of what an upstream may count, and most do not.
    beside = max(0, sum(_setting_bytes(name, value) for name, value in body.items()) - SETTINGS_BYTES)
    texts: list[str] = []
    found: list[Media] = []
    for name, value in body.items():
        if name == "messages" and isinstance(value, list):
            around += MESSAGE_TOKENS * len(value) + 3
            beside += MESSAGE_TOKENS * sum(map(_more_parts, value))
            for message in value:
                _gather_message(message, texts, found, walked)
        elif name in ("prompt", "input") and isinstance(value, list):
            for part in value:
                if isinstance(part, int | list):  # ids of tokens
                    around += 1 if isinstance(part, int) else len(part)
                else:
                    texts.append(text_of(part))
        elif name not in NO_PROMPT and isinstance(value, str | list | dict):
            texts.append(text_of(value))
    tokens, at_most = (around + sum(each) for each in ([one.tokens for one in found], [one.at_most for one in found]))
    at_most += beside
    audio, images = (sum(one.at_most for one in found if one.kind == kind) for kind in ("audio", "image"))
    if counter is not None:
        counted = sum(counter(text) for text in texts)
        return PromptCount(tokens + counted, at_most + counted, False, audio, images)
    size = sum(num_bytes(text) for text in texts)
    return PromptCount(tokens + -(-size // BYTES_PER_TOKEN), at_most + size, True, audio, images)


def _setting_bytes(name: str, value: Any) -> int:
    """Of a field its name; and its value, where that is no text and nothing with texts in it."""
    return len(name) + (0 if isinstance(value, str | list | dict) else len(str(value)))


def _more_parts(message: Any) -> int:
    """Parts of a message behind the first, each with marks around it."""
    content = message.get("content") if isinstance(message, dict) else None
    return max(0, len(content) - 1) if isinstance(content, list) else 0


def room_of(most: int, context: int | None, prompt: PromptCount) -> int | None:
    """How many completion tokens to ask for, of a request that does not say: an end that it did not ask for must not make it too long.

    Args:
        most: that may be asked for.
        context: prompt and completion tokens that the model has room for; None if unknown.
        prompt: what it is sent.

    Returns:
        ``most``, or what the context has left; None to leave the end to the context, where an estimated prompt may leave next to nothing.
    """
    if context is None:
        return most
    # Twice an estimate: text that is no English has about two bytes a token.
    tokens = (
        min(prompt.at_most, ESTIMATE_FACTOR * prompt.tokens)
        if prompt.is_estimate
        else prompt.tokens + prompt.tokens // 50 + 16
    )
    left = context - tokens
    if left >= most:
        return most
    if prompt.is_estimate:
        return left if left >= most // 4 and left > 0 else None
    # A prompt that is too long is refused by the model, whatever is asked for.
    return left if left > 0 else most


def last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Text of the last user message; of the last message if no user spoke."""
    if not messages:
        return ""
    message = next((message for message in reversed(messages) if message.get("role") == "user"), messages[-1])
    texts: list[str] = []
    _gather(message.get("content"), texts)
    return "\n".join(texts)


def asked_text(endpoint: str, body: Mapping[str, Any]) -> str:
    """What a request asks: the last user message of a chat, else prompt or input; of several, one below the other."""
    if endpoint == "chat":
        return last_text(body["messages"])
    prompt = body.get("prompt", body.get("input", ""))
    return prompt if isinstance(prompt, str) else "\n".join(part for part in prompt if isinstance(part, str))


def has_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message carries an image."""
    return any(
        isinstance(content := message.get("content"), list) and any(part.get("type") in IMAGES for part in content)
        for message in messages
    )


def num_prompts(body: Mapping[str, Any]) -> int:
    """How many prompts a request to ``/v1/completions`` holds; each is answered."""
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def num_shown(endpoint: str, body: Mapping[str, Any]) -> int:
    """How many answers a request is given: choices, for each of its prompts."""
    return _number(body, "n") * (num_prompts(body) if endpoint == "completions" else 1)


def num_made(endpoint: str, body: Mapping[str, Any]) -> int:
    """How many answers are made for a request, and billed, at most: of ``best_of`` only the best are shown."""
    prompts = num_prompts(body) if endpoint == "completions" else 1
    return max(_number(body, "n"), _number(body, "best_of")) * prompts


@dataclass(frozen=True, slots=True)
class Answers:
    """How many answers a request comes to.

    Attributes:
        made: at the same time, and billed, at most: see `num_made`.
        shown: see `num_shown`.
    """

    made: int
    shown: int

    @classmethod
    def of(cls, endpoint: str, body: Mapping[str, Any]) -> "Answers":
        """Of a request."""
        return cls(num_made(endpoint, body), num_shown(endpoint, body))

    @property
    def each(self) -> int:
        """For each that is shown so many are made, at most."""
        return -(-self.made // self.shown)


def predicted_tokens(body: Mapping[str, Any]) -> int:
    """Tokens at most of a text of which the sender thinks that it is in the answer (``prediction``): those that are not are billed too."""
    given = body.get("prediction")
    content = given.get("content") if isinstance(given, dict) else None
    # Of parts that are no text nothing is looked at: nobody predicts sound, and clips are walked through once, with their request.
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return sum(num_bytes(text) for text in texts if isinstance(text, str))


def _number(body: Mapping[str, Any], name: str) -> int:
    asked = body.get(name)
    return asked if type(asked) is int and asked > 0 else 1


def _gather_message(message: Any, texts: list[str], found: list[Media], walked: Pieces) -> None:
    """Add all texts of a message to ``texts``, and what is none to ``found``."""
    if not isinstance(message, dict):
        texts.append(text_of(message))
        return
    # In which order its text and calls came nobody is sent as text.
    texts.extend(_said(unordered(message), _MESSAGE_NAMES, ("role", "content", "images")))
    _gather(message.get("content"), texts, found, walked)
    # Pictures that a model made before: what is none of them is text.
    images = message.get("images")
    if isinstance(images, list):
        _gather(images, texts, found, walked)
    elif images:
        texts.append(text_of(images))


def _gather(content: Any, texts: list[str], found: list[Media] | None = None, walked: Pieces | None = None) -> None:
    """Add the texts of a message's content to ``texts``, and what is none to ``found``, with what else is said of it to ``texts``."""
    if isinstance(content, str):
        texts.append(content)
        return
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict):
            texts.append(text_of(part))
            continue
        if found is None:
            # Only texts are wanted: a clip is not walked through for that.
            texts.extend(
                () if _is_media(part) else (text_of(one) for name, one in part.items() if name != "type" and one)
            )
            continue
        counted, said = _media_of(part, walked)
        if counted is None:
            # One that says nothing is sent all the same.
            kind = () if len(str(part.get("type"))) > _KIND else ("type",)
            said = _said(part, _PART_NAMES, kind) or [text_of(part)]
            found.extend(media_within(part, walked))
        else:
            found.append(counted)
            found.extend(_beside(part))
        texts.extend(said)


def _said(table: Mapping[str, Any], known: frozenset[str], without: Sequence[str]) -> list[str]:
    """What a message or a part says, ``without`` some fields; where a name is not ``known``, with the name."""
    return [
        text_of(value if name in known else {name: value})
        for name, value in table.items()
        if name not in without and (value or name not in known)
    ]


def media_within(part: Mapping[str, Any], walked: Pieces | None) -> list[Media]:
    """What a part names, at any depth, that a provider gets for itself; its letters say nothing of how long that is."""
    found: list[Media] = []
    left: list[Any] = [part]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            kind, source = value.get("type"), value.get("source")
            if isinstance(source, dict) and source.get("type") in ("url", "file"):
                found.append(media_tokens.elsewhere("image/" if kind == "image" else ""))
            elif value is not part and isinstance(kind, str):
                inner, _ = _media_of(value, walked)
                if inner is not None:
                    found += [inner, *_beside(value)]
                    left += value.values()
                    continue
            # A part says which kind it is, or is named so; what has neither is something within one.
            found += _fetched(value) if value is part or isinstance(kind, str) else []
            left += value.values()
    return found


def _beside(part: Mapping[str, Any]) -> list[Media]:
    """What is at the addresses of a part that is no text, beside the one that it is counted by."""
    field, inner, hidden = _held_in(part)
    main = hidden if isinstance(inner.get(hidden), str) else "file_url"
    more = [name for name, value in inner.items() if name != main and isinstance(value, str) and is_address(value)]
    return [media_tokens.elsewhere(_type_of(field)) for _ in more] + _fetched(part, field)


def _fetched(part: Mapping[str, Any], counted: str = "") -> list[Media]:
    """What is at the addresses of a part, whatever its provider calls them: ``document_url``, ``file_url``, a ``video`` or its frames.

    Args:
        part: of a message, or within one.
        counted: the field that it is counted by already; "" for none.
    """
    kind = part.get("type")
    word = kind if isinstance(kind, str) else ""
    found = []
    for name, value in part.items():
        # Or by what the part says that it is.
        is_own = name == word or (name == "url" and word.endswith("_url"))
        is_named = name.endswith(("_url", "_uri"))
        is_place = (
            is_named or name in _PLACES or name == "file_data" or (is_own and any(one in word for one in _PLACES))
        )
        if name == counted or not is_place:
            continue
        listed = value if isinstance(value, list) else [value]
        # Of a film in many pieces these are pictures.
        what = "image/" if listed is value and "video" in name else _type_of(name)
        found += [media_tokens.elsewhere(what) for one in listed if _is_address(one, is_named)]
    return found


def _type_of(name: str) -> str:
    """What is at the addresses of a field."""
    return next((f"{kind}/" for kind in ("image", "audio", "video") if kind in name), "")


def _is_address(value: Any, is_named: bool) -> bool:
    """Of something that is not within the request; ``is_named``: by the name of its field it is one, or what it stands for."""
    if isinstance(value, dict):
        return _is_address(value.get("url"), is_named) or any(
            isinstance(one, str) and is_address(one) for one in value.values()
        )
    return isinstance(value, str) and (
        is_address(value) or (is_named and bool(value) and not value.startswith("data:"))
    )


def _is_media(part: Mapping[str, Any]) -> bool:
    """Whether a part is none of text."""
    kind = part.get("type")
    return kind in IMAGES or (isinstance(kind, str) and kind in _INNER and isinstance(part.get(kind), dict | str))


def _held_in(part: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], str]:
    """Of a part that `_is_media` the field that holds it, what that says, and the name there of what it is counted by."""
    kind = part["type"]
    field, hidden = ("image_url", "url") if kind in IMAGES else (kind, _INNER[kind][0])
    given = part.get(field)
    return field, given if isinstance(given, dict) else {hidden: given}, hidden


def _media_of(part: Mapping[str, Any], walked: Pieces | None) -> tuple[Media | None, list[str]]:
    """What a part is if it is no text, and what it says beside that; None if it is text."""
    if not _is_media(part):
        return None, []
    field, inner, hidden = _held_in(part)
    if part["type"] in IMAGES:
        url = inner.get("url")
        counted: Media | None = media_tokens.image(url if isinstance(url, str) else "", walked)
    else:
        counted = _INNER[part["type"]][1](inner, walked)
    return counted, _said(part, _PART_NAMES, ("type", field)) + _said(
        inner, _PART_NAMES, (hidden,) if isinstance(inner.get(hidden), str) else ()
    )


def text_of(value: Any) -> str:
    """A text as it is; of all else about its JSON."""
    return value if isinstance(value, str) else str(value)
