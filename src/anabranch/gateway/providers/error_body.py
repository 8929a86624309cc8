"""An answer that is not 2xx: what it means, and what of its words is passed on."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from anabranch.gateway.providers.failures import Failure
from anabranch.gateway.providers.http_call import Headers
from anabranch.gateway.providers.vocabulary import hint_of, kind_of
from anabranch.redaction import hide_keys, hide_passwords

# Letters of a key from which on it is taken out of messages.
TELLING_KEY = 8

# Letters of an upstream's error that are passed on: of its message, and of each of its words (type, code, parameter).
MESSAGE_LETTERS, WORD_LETTERS = 500, 200

# As many are looked at for keys before that: of a key that is cut, the rest looks like none.
SAID_LETTERS = 64 << 10

# Longer waits than this are not believed.
RETRY_AFTER_S = 300.0


def hidden(failure: Failure, secret: str | None) -> Failure:
    """``failure`` with ``secret`` and whatever looks like a key taken out of all that it says, and then cut to what is passed on."""
    words = (failure.type, failure.code, failure.param)
    kind, code, param = (None if word is None else _without(word, secret)[:WORD_LETTERS] for word in words)
    message = _without(failure.message, secret)[:MESSAGE_LETTERS]
    return replace(failure, message=message, type=kind, code=code, param=param)


def _without(text: str, secret: str | None) -> str:
    # No real key is shorter, and a word such as "a" is in every sentence.
    if secret is not None and len(secret) >= TELLING_KEY:
        text = text.replace(secret, "[key]")
    return hide_keys(hide_passwords(text, "[key]"), "[key]")


def classify(status: int, headers: Headers, body: bytes) -> Failure:
    """What an answer that is not 2xx means (see `vocabulary`), in OpenAI's and Anthropic's forms.

    Its texts are as they came: `hidden` takes keys out of them, and cuts them.
    """
    message, kind, code, param = _said(body)
    what = kind_of(status, kind, code)
    if what == "garbage":
        message = f"the upstream redirects ({status}), which is not followed to another host"
    text = message or f"the upstream answered with status {status}"
    return Failure(
        kind=what,
        message=text[:SAID_LETTERS],
        status=status,
        retry_after_s=retry_after(headers),
        type=kind,
        code=code,
        param=param,
        hint=hint_of(status, message) if what == "request" else None,
    )


def _said(body: bytes) -> tuple[str, str | None, str | None, str | None]:
    """Message, type, code and parameter of an error's body, as far as they can be found."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        text = body[:SAID_LETTERS].decode("utf-8", "replace").strip()
        return ("" if text.startswith("<") else text), None, None, None
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, str):
        return error, None, None, None
    if not isinstance(error, dict):
        return "", None, None, None
    message = error.get("message") or error.get("detail") or ""
    found = [error.get(name) for name in ("type", "code", "param")]
    kind, code, param = (str(value)[:SAID_LETTERS] if isinstance(value, str | int) else None for value in found)
    return _as_text(message), kind, code, param


def _as_text(message: Any) -> str:
    """What an error says; some servers say it as a list of what is wrong with each field."""
    try:
        return message if isinstance(message, str) else json.dumps(message)
    except RecursionError:
        return ""


def retry_after(headers: Headers, now: datetime | None = None) -> float | None:
    """Seconds of ``Retry-After`` (a number or a date) or ``retry-after-ms``; None if absent or senseless, at most `RETRY_AFTER_S`."""
    given, scale = headers.get("retry-after-ms"), 1e-3
    if given is None:
        given, scale = headers.get("retry-after"), 1.0
    if given is None:
        return None
    try:
        seconds = float(given) * scale
    except ValueError:
        try:
            when = parsedate_to_datetime(given)
            seconds = (when.replace(tzinfo=when.tzinfo or UTC) - (now or datetime.now(UTC))).total_seconds()
        except (ValueError, OverflowError):
            # A year or an hour that no calendar has, or a zone that puts the time outside it.
            return None
    return min(max(seconds, 0.0), RETRY_AFTER_S) if seconds == seconds else None
