"""Errors as Anthropic's clients know them."""

from typing import Any

from anabranch.web.api_error import ApiError

_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def to_error(error: ApiError, request_id: str) -> dict[str, Any]:
    """The body of an answer to this request that is an error."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": request_id}


# Of an error inside a stream, which has no status: by its code.
_OF_CODE = {
    "rate_limit_exceeded": "rate_limit_error",
    "insufficient_quota": "rate_limit_error",
    "deadline_exceeded": "timeout_error",
    "upstream_timeout": "timeout_error",
    "upstream_first_token": "timeout_error",
    "upstream_unavailable": "overloaded_error",
    "model_not_found": "not_found_error",
    "upstream_forbidden": "permission_error",
    "context_length_exceeded": "invalid_request_error",
    "content_filter": "invalid_request_error",
    "invalid_request": "invalid_request_error",
    "unsupported": "invalid_request_error",
}


def error_event(message: str, code: str | None) -> dict[str, Any]:
    """The event that ends a stream which broke."""
    return {"type": "error", "error": {"type": _OF_CODE.get(code or "", "api_error"), "message": message}}
