"""What an upstream's error means: its status, and the words that providers document for ``code`` and ``type``, compared whole.

Messages say nothing of a deployment. They are for people, and quote what a sender wrote: the name of a tool, a schema, a prompt. A word
that a sender puts there would otherwise say that the account is out of money, and shut the deployment for everybody.

Some providers say in words alone that a prompt is too long, or that the account is out of money. Where the request goes next, and nothing
else, is decided by those too (`hint_of`): a sender who puts them there has their own request asked of another model.

The words are those of OpenAI's "Error codes", Azure OpenAI's "Content filtering", Anthropic's "Errors", GitHub Models and Copilot, vLLM,
llama.cpp and Z.AI (whose 1261 is a prompt that is too long).
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from anabranch.gateway.providers.too_long import LETTERS, says_too_long

if TYPE_CHECKING:
    from anabranch.gateway.providers.failures import FailureKind

WORDS: "dict[str, FailureKind]" = {
    "insufficient_quota": "credit",
    "credit_balance_exhausted": "credit",
    "organization_spend_limit_exceeded": "credit",
    "project_spend_limit_exceeded": "credit",
    "billing_hard_limit_reached": "credit",
    "billing_not_active": "credit",
    "billing_error": "credit",
    "invalid_api_key": "auth",
    "authentication_error": "auth",
    "account_deactivated": "auth",
    "unsupported_country_region_territory": "auth",
    "context_length_exceeded": "context",
    "string_above_max_length": "context",
    "request_too_large": "context",
    "tokens_limit_reached": "context",
    "exceed_context_size_error": "context",
    "model_max_prompt_tokens_exceeded": "context",
    "1261": "context",
    "content_filter": "filter",
    "content_policy_violation": "filter",
    "responsibleaipolicyviolation": "filter",
    "moderation_blocked": "filter",
    "model_not_found": "missing",
    "deploymentnotfound": "missing",
    "notfounderror": "missing",
}

# Statuses at which such a word is believed.
_BELIEVED: "dict[FailureKind, tuple[int, ...]]" = {
    "credit": (400, 403, 429),
    "auth": (400, 403),
    "context": (400, 413, 422),
    "filter": (400, 403, 422),
    "missing": (400, 403, 404),
}
_OF_STATUS: "dict[int, FailureKind]" = {
    401: "auth",
    402: "credit",
    403: "forbidden",
    404: "not_found",
    408: "timeout",
    409: "conflict",
    413: "context",
    425: "conflict",
    429: "rate_limit",
}

# Of errors that come without a status of HTTP, inside a stream or under 200: the status that their words stand for.
_STATUS: "dict[FailureKind, int]" = {"credit": 402, "auth": 401, "context": 400, "filter": 400, "missing": 404}
_STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "overloaded_error": 529,
}

# What the words of a refusal sound like, where nothing else says it.
Hint = Literal["context", "credit"]
_CREDIT = re.compile(
    r"credit balance|insufficient (?:balance|credits?|funds|quota)|exceeded your (?:current )?quota|usage limits?\b"
    r"|spend(?:ing)? limit|out of credits?|billing (?:hard )?limit",
    re.I,
)
# Statuses of a refusal in words. A 429 or 403 goes to another deployment, and then to another model, anyway.
_HINTED = (400, 413, 422)


def hint_of(status: int, message: str) -> Hint | None:
    """What the words of a refusal sound like; None for nothing that another model could change.

    Args:
        status: of HTTP.
        message: of the error's body.
    """
    if status not in _HINTED:
        return None
    if says_too_long(message):
        return "context"
    return "credit" if _CREDIT.search(message, 0, LETTERS) else None


def kind_of(status: int, type: str | None, code: str | None) -> "FailureKind":
    """What an answer that is not 2xx means.

    Args:
        status: of HTTP.
        type, code: of the error's body; None where it has none.
    """
    for word in (code, type):
        kind = WORDS.get((word or "").lower())
        if kind is not None and status in _BELIEVED[kind]:
            return kind
    if status >= 500 or status < 200:
        return "server"
    # A redirect to another host.
    return "garbage" if status < 400 else _OF_STATUS.get(status, "request")


def status_said(value: Mapping[str, Any]) -> int:
    """The status that an error without one stands for: a number that it holds, else what its words say, else 500."""
    error = value.get("error")
    sources = (error if isinstance(error, dict) else {}, value)
    for source in sources:
        for name in ("status", "code", "status_code"):
            word = str(source.get(name))[:4]
            if len(word) == 3 and word.isascii() and word.isdigit() and 400 <= int(word) < 600:
                return int(word)
    for name in ("code", "type"):
        word = str(sources[0].get(name)).lower()
        kind = WORDS.get(word)
        if kind is not None or word in _STATUS_OF_TYPE:
            return _STATUS_OF_TYPE[word] if kind is None else _STATUS[kind]
    return 500
