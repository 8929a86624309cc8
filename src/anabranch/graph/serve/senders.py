"""Who may change something: who has the token; without one, programs of this machine, and no page that its browser shows."""

import hmac

from starlette.requests import Request

from anabranch.graph.serve.requests import RequestError
from anabranch.web.senders import is_meant, is_same_origin, told


def check_sender(request: Request, token: str | None, host: str) -> None:
    """Raise RequestError for a request that may change nothing.

    Args:
        request: see the module.
        token: that it must have; None lets in whoever uses a name of this machine.
        host: that the server listens at, which may be such a name too.
    """
    origin, given = told(request.headers, "origin"), told(request.headers, "host") or ""
    if not is_same_origin(origin, given):
        raise RequestError(403, "other_origin", f"a page of {origin!r:.80} may change nothing here")
    if token is not None:
        check_token(request, token)
        return
    if not is_meant(given, (host.strip("[]").lower(),)):
        message = f"changes are for this machine, not for the host {given!r:.80}; start the server with a token, or send to localhost"
        raise RequestError(403, "other_host", message)


def check_token(request: Request, token: str) -> None:
    """Raise RequestError (401) without ``Authorization: Bearer TOKEN``; it takes as long for any wrong one."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # A token of the environment need not be text.
    known = token.encode("utf-8", "surrogateescape")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), known):
        message = "the token is missing or wrong; send Authorization: Bearer TOKEN"
        raise RequestError(401, "wrong_token", message, headers={"WWW-Authenticate": "Bearer"})
