"""Keys of upstreams: from the environment, or from a file encrypted with a passphrase. They are in no config, repr, log or error.

ANABRANCH_PASSPHRASE=... python -c "from anabranch.gateway.providers.keys import write_key; write_key('openai.key', 'sk-...')"
"""

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import atomic_file

# The variable that holds it.
PASSPHRASE = "ANABRANCH_PASSPHRASE"
_MAGIC = b"anabranch-key-1\n"

# Scrypt's n, with r = 8 and p = 1: 32 MB and a tenth of a second.
_SALT_BYTES, _COST = 16, 2**15


class UpstreamKey:
    """A key that is held, and shows itself only when asked. Where one is, a `Secret` of the config says."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The key."""
        return self._value

    def __repr__(self) -> str:
        return "UpstreamKey('***')"

    def __reduce__(self) -> Any:
        raise TypeError("a key is not written anywhere")


def read_key(variable: str | None, file: str | None) -> UpstreamKey | None:
    """The key from ``variable`` of the environment, else from ``file``; None if neither is named.

    Raises ConfigError if what is named is not there, or the passphrase is wrong.
    """
    if variable and os.environ.get(variable):
        return UpstreamKey(_checked(os.environ[variable].strip(), f"the environment variable {variable}"))
    if file:
        return UpstreamKey(_checked(_decrypt(Path(file)), file))
    if variable:
        raise ConfigError(f"the environment variable {variable} is not set; it is to hold the key of the upstream")
    return None


def write_key(path: str | Path, key: str) -> None:
    """Encrypt ``key`` with the passphrase in the environment and write it, readable by its owner only."""
    salt = os.urandom(_SALT_BYTES)
    token = _cipher(salt).encrypt(_checked(key.strip(), "the key").encode())
    with atomic_file(path, mode=0o600) as temporary:
        temporary.write_bytes(_MAGIC + base64.b64encode(salt) + b"\n" + token + b"\n")


def _decrypt(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"no key file {path}; write one with anabranch.gateway.providers.keys.write_key")
    magic, salt, token, *_ = [*path.read_bytes().split(b"\n"), b"", b""]
    if magic + b"\n" != _MAGIC:
        raise ConfigError(f"{path} is no encrypted key file; keys are not read from plain files")
    from cryptography.fernet import InvalidToken

    # Its own complaints are ValueErrors too.
    cipher = _cipher(base64.b64decode(salt))
    try:
        return cipher.decrypt(token).decode()
    except (InvalidToken, ValueError):
        raise ConfigError(f"{path} cannot be decrypted; is {PASSPHRASE} the one it was written with?") from None


def _cipher(salt: bytes) -> Any:
    require("signatures", by="an encrypted key file")
    from cryptography.fernet import Fernet

    passphrase = os.environ.get(PASSPHRASE)
    if not passphrase:
        raise ConfigError(f"the environment variable {PASSPHRASE} is not set; key files are encrypted with it")
    key = hashlib.scrypt(passphrase.encode(), salt=salt, n=_COST, r=8, p=1, maxmem=64 << 20, dklen=32)
    return Fernet(base64.urlsafe_b64encode(key))


def _checked(key: str, where: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where} holds no key: it must be one word of printable ASCII")
    return key
