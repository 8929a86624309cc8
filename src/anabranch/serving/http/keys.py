"""API keys: kept as digests only, compared in constant time."""

import hashlib
import hmac
import string
from collections.abc import Sequence

from anabranch.errors import ConfigError
from anabranch.web.api_error import ApiError

_MARK = "sha256:"


class Keys:
    """Who may call.

    Args:
        entries: ``name=secret`` or ``name=sha256:HEX``; empty lets everybody in.

    Raises ConfigError for a digest that is none.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self._digests: dict[str, bytes] = {}
        for entry in entries:
            name, _, secret = entry.partition("=")
            self._digests[name] = _given(name, secret)

    def name_of(self, secret: str | None) -> str:
        """Whose key it is, "" where everybody is let in. Raises ApiError (401).

        Every digest is compared whatever the first ones say, so the time tells nothing.
        """
        if not self._digests:
            return ""
        digest = _digest(secret or "")
        found = [name for name, known in self._digests.items() if hmac.compare_digest(known, digest)]
        if not found or not secret:
            what = "the API key is not known" if secret else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, "invalid_api_key", what, headers={"WWW-Authenticate": "Bearer"})
        return found[0]


def is_token(given: str | None, token: str) -> bool:
    """Whether they are equal, in constant time."""
    return hmac.compare_digest(_digest(given or ""), _digest(token))


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


def _given(name: str, secret: str) -> bytes:
    if not secret.startswith(_MARK):
        return _digest(secret)
    digits = secret[len(_MARK) :]
    if len(digits) != 64 or set(digits) - set(string.hexdigits):
        raise ConfigError(f"api_keys: the digest of {name!r} is not 64 hexadecimal digits")
    return bytes.fromhex(digits)
