"""`ApiError`: an answer that is an error, in the shape and with the status that OpenAI's clients know."""

from collections.abc import Mapping
from typing import Any

from anabranch.errors import AnabranchError


class ApiError(AnabranchError):
    """A request that is not answered. The HTTP layer turns it into a response, the Python API raises it.

    Attributes:
        status: of HTTP.
        code: short and stable, for programs.
        type: OpenAI's family of errors.
        param: the field that is wrong, if one is.
        what: is wrong with it, where the sentence is the field and this; None for any other sentence.
        headers: of the response (``Retry-After``).
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.what: str | None = None
        self.type = type or _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": str(self), "type": self.type, "code": self.code, "param": self.param}}


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def wrong(param: str, message: str, code: str | None = "invalid_value") -> ApiError:
    """A field of the request has a value it may not have (400)."""
    return ApiError(400, code, message, param=param)


def wrong_field(param: str, what: str, code: str | None = "invalid_value") -> ApiError:
    """As `wrong`, of a sentence that is the field and what is wrong with it, so another API can tell it by its own name of the field."""
    error = wrong(param, f"{param} {what}", code)
    error.what = what
    return error
