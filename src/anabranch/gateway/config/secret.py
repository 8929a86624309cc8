"""Secrets by reference: a config says where a key is, never what it is.

    key = "env:ANABRANCH_ADMIN_KEY"      from the environment
    key = "file:admin.key"               from a file encrypted with a passphrase (`anabranch.gateway.providers.keys`)

A `Secret` is the reference, so a config may be printed, saved and compared; ``reveal()`` gives the key itself when it is used.
"""

import os
import re
from typing import Any

from pydantic_core import core_schema

from anabranch.errors import ConfigError

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Secret(str):
    """A reference to a secret. Raises ConfigError for anything else, without repeating it: it may be the secret itself."""

    __slots__ = ()

    def __new__(cls, reference: str, field: str = "a secret") -> "Secret":
        """Check a reference; ``field`` is what an error calls it."""
        if not is_reference(reference):
            raise ConfigError(f"{field} {MUST}")
        return super().__new__(cls, reference)

    def reveal(self) -> str:
        """The secret. Raises ConfigError if the variable is not set, or the file cannot be read."""
        kind, _, rest = self.partition(":")
        if kind == "env":
            value = os.environ.get(rest, "").strip()
            if not value:
                raise ConfigError(f"the environment variable {rest} is not set, and {self!s} asks for it")
            return value
        from anabranch.gateway.providers.keys import read_key

        found = read_key(None, rest)
        assert found is not None
        return found.reveal()

    def __repr__(self) -> str:
        return f"Secret({self!s})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        def check(value: Any, info: core_schema.ValidationInfo) -> "Secret":
            return value if isinstance(value, cls) else cls(value, info.field_name or "a secret")

        return core_schema.with_info_plain_validator_function(check)


MUST = 'must say where the secret is, "env:VARIABLE" or "file:PATH"; a secret written into a config is refused (and not shown here)'


def is_reference(value: Any) -> bool:
    """Whether ``value`` is ``env:VARIABLE`` or ``file:PATH``."""
    if not isinstance(value, str):
        return False
    kind, _, rest = value.partition(":")
    return bool(VARIABLE.fullmatch(rest)) if kind == "env" else kind == "file" and bool(rest) and rest.isprintable()
