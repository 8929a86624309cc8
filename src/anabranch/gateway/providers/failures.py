"""What may go wrong with an attempt, in one vocabulary, and how whoever asked is told of it."""

from dataclasses import dataclass
from typing import Any, Literal

from anabranch.errors import AnabranchError
from anabranch.gateway.providers.vocabulary import Hint

FailureKind = Literal[
    # No connection, so that nothing was sent.
    "connect",
    # 408, or the answer took longer than it may.
    "timeout",
    # A stream brought no first token in time.
    "first_token",
    "conflict",  # 409
    "rate_limit",  # 429
    # A deployment in this process has no room now, or is being loaded: it is well, and says so itself.
    "busy",
    "server",  # 5xx
    # An answer that cannot be read: HTML, broken JSON or SSE, wrong length, a redirect.
    "garbage",
    # An answer that is nested too deep, or too long, to be read: whoever asks can bring that about, so it says nothing of the deployment.
    "excess",
    # The connection broke, or the stream ended, before the answer did.
    "cut",
    # The prompt is too long for this model.
    "context",
    # The provider's content filter refused.
    "filter",
    # The account behind the key is out of money.
    "credit",
    # Our key is not accepted.
    "auth",
    # 403, and nothing says whether it is for our key or for what was asked.
    "forbidden",
    # 404 that says the model is not there: it is named by our config.
    "missing",
    # Any other 404: the address may be wrong, or what the request names is not there.
    "not_found",
    # This provider cannot do what is asked.
    "unsupported",
    # Any other 4xx: the request itself is at fault.
    "request",
    # Nothing to ask: breakers open, limits reached.
    "unavailable",
    # The plan did not allow the price.
    "refused",
    # The time of the whole request is up.
    "deadline",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What went wrong with an attempt.

    Attributes:
        kind: one word for it.
        message: a sentence for people; holds no key.
        status: HTTP status of the upstream; None if there was none.
        retry_after_s: how long the upstream asks to be left alone; None if it does not say.
        type: the upstream's own word, of OpenAI's ``error.type``.
        code: of ``error.code``.
        param: of ``error.param``.
        is_crowded: of ``unavailable``: limits alone keep a deployment from taking it, none that is thought broken.
        hint: what its words sound like. It decides only where the request goes next, never what is held against the deployment: a sender
            may have written them.
    """

    kind: FailureKind
    message: str
    status: int | None = None
    retry_after_s: float | None = None
    type: str | None = None
    code: str | None = None
    is_crowded: bool = False
    param: str | None = None
    hint: Hint | None = None

    @property
    def cause(self) -> FailureKind:
        """What decides where the request goes next."""
        return self.kind if self.hint is None or self.kind != "request" else self.hint


class UpstreamError(AnabranchError):
    """An attempt failed, or, from a `Dispatcher`, all that may be tried failed. The gateway answers with ``status`` and ``to_dict()``.

    Attributes:
        failure: what went wrong last.
        report: all attempts made; None from a provider.
    """

    def __init__(self, failure: Failure, report: Any = None) -> None:
        super().__init__(failure.message)
        self.failure, self.report = failure, report
        self.is_for_room = failure.kind in ("rate_limit", "busy") or failure.is_crowded

    @property
    def status(self) -> int:
        """The HTTP status for whoever asked."""
        failure = self.failure
        if failure.kind in ("request", "context", "filter", "unsupported", "forbidden", "missing", "not_found"):
            return failure.status if failure.status is not None and 400 <= failure.status < 500 else 400
        if failure.kind == "busy" and failure.status is not None and 400 <= failure.status < 600:
            return failure.status
        return _STATUS.get(failure.kind, 502)

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        failure, ours = self.failure, self.status >= 500
        # Words of other APIs are none that a client of this one knows, and a status is no code.
        kind = "server_error" if ours else failure.type if failure.type in _TYPES else "invalid_request_error"
        code = None if failure.code is None or failure.code.isdecimal() else failure.code
        code = code or _CODE.get(failure.cause, f"upstream_{failure.cause}")
        return {"error": {"message": failure.message, "type": kind, "code": code, "param": failure.param}}


# Of ``error.type``, as OpenAI's "Error codes" and its answers have them.
_TYPES = frozenset(
    {
        "invalid_request_error",
        "rate_limit_error",
        "requests",
        "tokens",
        "insufficient_quota",
        "request_forbidden",
        "image_generation_user_error",
    }
)
_STATUS = {
    "rate_limit": 429,
    "busy": 503,
    "refused": 429,
    "unavailable": 503,
    "deadline": 504,
    "timeout": 504,
    "first_token": 504,
}

_CODE = {
    "rate_limit": "rate_limit_exceeded",
    "refused": "insufficient_quota",
    "context": "context_length_exceeded",
    "filter": "content_filter",
    "request": "invalid_request",
    "unsupported": "unsupported",
    "deadline": "deadline_exceeded",
    "missing": "model_not_found",
    "not_found": "invalid_request",
}


def excess(what: str) -> UpstreamError:
    """The failure of an answer that is too much to be read."""
    return UpstreamError(Failure(kind="excess", message=f"the upstream sent {what}"))


def garbage(what: str, body: bytes = b"") -> UpstreamError:
    """The failure of an answer that cannot be read."""
    kind = "HTML" if body[:200].lstrip().lower().startswith((b"<!doctype", b"<html")) else f"{len(body)} bytes"
    return UpstreamError(Failure(kind="garbage", message=f"the upstream sent {what} ({kind})" if body else what))
