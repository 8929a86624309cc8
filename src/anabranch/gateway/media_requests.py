"""Requests to endpoints of media (`anabranch.gateway.providers.media`): what they may be, how long they are, what they may cost at most."""

import base64
import math
from dataclasses import replace
from typing import Any

from anabranch.gateway import media_tokens
from anabranch.gateway.asked import Asked
from anabranch.gateway.prompt_tokens import PromptCount, count_prompt
from anabranch.gateway.providers.media import PATHS, SPOKEN, Upload
from anabranch.gateway.sound_packets import Pieces, one_request
from anabranch.gateway.validate import check_model
from anabranch.routers.money import Price
from anabranch.web.api_error import wrong
from anabranch.web.body import is_int, said

Json = dict[str, Any]

# Of a picture, where the model does not say (`max_tokens`): the most that one of OpenAI's has.
PICTURE_TOKENS = 8192
_MOST_PICTURES = 64

# Of a picture to be edited, beside what it is in a prompt: the most that one of OpenAI's adds for its fidelity.
_FIDELITY = 6_240

# Tokens of sound that a digit or sign comes to at most, and a letter that is said as `instructions` want: a second, two of them. And the
# slowest that a voice is let speak.
_SIGN, _TOLD = 20, 40
_SLOWEST = 0.25

# Documents of a ranking that are billed together, and tokens of one, beside the query.
_UNIT, _PIECE_TOKENS = 100, 500

# Bytes of a picture in which its size mostly is.
_HEAD = 256 << 10

# Fields that each needs: text, files, or both.
_TEXTS = {"images": ("prompt",), "image_edits": ("prompt",), "speech": ("input", "voice"), "rerank": ("query",)}
_FILES = {"image_edits": "image", "transcriptions": "file", "translations": "file"}

# Those that are asked in a form; all others take JSON alone.
FORMS = frozenset(_FILES)


def is_media(endpoint: str) -> bool:
    """Whether an endpoint is one of these."""
    return endpoint in PATHS


def check_media(endpoint: str, body: Json) -> None:
    """Raises ApiError if the body is no request to the endpoint."""
    check_model(body)
    for name in _TEXTS.get(endpoint, ()):
        value = body.get(name)
        # A voice may be one of the account's own.
        if not isinstance(value, str) and not (name == "voice" and isinstance(value, dict)):
            raise wrong(name, f"{name} is {said(value)}; it must be text")
    held = _FILES.get(endpoint)
    files = body.get(held) if held is not None else None
    if held is not None and not (isinstance(files, list) and files and all(isinstance(one, Upload) for one in files)):
        raise wrong(held, f"{held} is missing; send it as a file of a multipart/form-data body")
    if endpoint == "moderations" and not isinstance(body.get("input"), str | list):
        raise wrong("input", f"input is {said(body.get('input'))}; it must be text or a list")
    if endpoint == "rerank" and not isinstance(body.get("documents"), list):
        raise wrong("documents", f"documents is {said(body.get('documents'))}; it must be a list")
    count = body.get("n")
    if count is not None and (not is_int(count) or not 1 <= count <= _MOST_PICTURES):
        raise wrong("n", f"n is {said(count)}; it must be an integer from 1 to {_MOST_PICTURES}")
    if body.get("stream") or body.get("stream_format") == "sse":
        raise wrong("stream", f"stream: {endpoint} is answered in one piece here", "unsupported")
    user = body.get("user")
    if user is not None and not isinstance(user, str):
        raise wrong("user", f"user is {said(user)}; it must be text")


def count_media(endpoint: str, body: Json) -> PromptCount:
    """Tokens of a request, as the endpoint counts: letters of what is to be said, tokens of sound and of pictures, bytes of text.

    Raises ApiError for sound that is made to be read slowly.
    """
    if endpoint == "speech":
        spoken = body["input"] + str(body.get("instructions") or "")
        return PromptCount(len(spoken), len(spoken.encode("utf-8", "surrogatepass")), True)
    texts = {name: value for name, value in body.items() if not _is_upload(value)}
    counted = count_prompt(texts)
    with one_request(_FILES.get(endpoint, "file")) as walked:
        found = [_media(endpoint, one, walked) for value in body.values() if _is_upload(value) for one in value]
    tokens = counted.tokens + sum(one.tokens for one in found)
    at_most = counted.at_most + sum(one.at_most for one in found)
    audio, images = (sum(one.at_most for one in found if one.kind == kind) for kind in ("audio", "image"))
    return PromptCount(tokens, at_most, True, audio, images)


def _media(endpoint: str, one: Upload, walked: Pieces) -> media_tokens.Media:
    """By what the endpoint takes it for: what a file is called, its sender chooses."""
    if endpoint == "image_edits":
        head = base64.b64encode(one.data[:_HEAD]).decode()
        picture = media_tokens.image(f"data:image/png;base64,{head}")
        return replace(picture, at_most=picture.at_most + _FIDELITY)
    return media_tokens.sound(one.data, one.name.rpartition(".")[2].lower(), walked)


def is_by_second(price: Price) -> bool:
    """Whether a token of sound is a second there: nothing but sound has a price."""
    return bool(price.audio_input) and not price.input and not price.output


def in_seconds(count: PromptCount) -> PromptCount:
    """With a token for each second of sound."""
    seconds = -(-count.audio // media_tokens.AUDIO_A_SECOND)
    return replace(count, at_most=count.at_most - count.audio + seconds, audio=seconds)


def _is_upload(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Upload)


def most_made(endpoint: str, body: Json, max_tokens: int | None, default: int) -> int:
    """The most completion tokens of an answer.

    Args:
        endpoint: which.
        body: checked.
        max_tokens: of the model; of a picture, where it makes pictures. None if it says none.
        default: where nothing is known.
    """
    if endpoint in ("images", "image_edits"):
        return (max_tokens or PICTURE_TOKENS) * (body.get("n") or 1)
    if endpoint == "speech":
        return _spoken_at_most(body)
    return (max_tokens or default) if endpoint in ("transcriptions", "translations") else 0


def _spoken_at_most(body: Json) -> int:
    """Tokens of sound that a text comes to: a digit is a word, and so is a sign of many scripts; instructions may slow it down."""
    text, speed = body["input"], body.get("speed")
    plain = sum(ord(one) < 0x250 and not one.isdigit() for one in text)
    made = _TOLD * len(text) if body.get("instructions") else SPOKEN * plain + _SIGN * (len(text) - plain)
    pace = max(float(speed), _SLOWEST) if isinstance(speed, int | float) and 0 < speed < 1 else 1.0
    return math.ceil(made / pace)


class MediaAsked(Asked):
    """Of what kind the tokens of a request are. Without a price of their own, they cost what others do, if those cost anything."""

    __slots__ = ()

    def lacks(self, price: Price, holds: bool = False) -> tuple[str, str | None] | None:
        """See `Asked.lacks`."""
        has_one = price.is_free or price.request or price.output or price.input
        if self.image_output and not has_one and price.image_output is None:
            return "model", "pictures (image_output_usd)"
        if self.audio_output and not has_one and price.audio_output is None:
            return "model", "sound in an answer (audio_output_usd)"
        if self.audio_input and not has_one and price.audio_input is None:
            return "model", "sound in a prompt (audio_input_usd)"
        return None


def _units(body: Json) -> int:
    """Units that Cohere bills a ranking as, at most: of 100 documents each, of which one of more than 500 tokens is several."""
    room = max(_PIECE_TOKENS // 2, _PIECE_TOKENS - len(_bytes(body["query"])))
    pieces = sum(max(1, -(-len(_bytes(one)) // room)) for one in body["documents"])
    return max(1, -(-pieces // _UNIT))


def _bytes(value: Any) -> bytes:
    return (value if isinstance(value, str) else str(value)).encode("utf-8", "surrogatepass")


def asked_of_media(endpoint: str, body: Json) -> Asked:
    """Of what kind its tokens are, for their prices, and as how many calls it may be billed."""
    return MediaAsked(
        audio_input=endpoint in ("transcriptions", "translations"),
        audio_output=endpoint == "speech",
        image_output=endpoint in ("images", "image_edits"),
        calls=_units(body) if endpoint == "rerank" else 1,
    )
