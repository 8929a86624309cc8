"""Signatures of rows: Ed25519, through the package ``cryptography``.

A node that signs is named by its public key, so no directory is needed.
"""

from pathlib import Path
from typing import Any

from anabranch.errors import DataError
from anabranch.extras import require
from anabranch.graph.beside import new_file
from anabranch.graph.rank.rows import Row

PREFIX = "ed25519:"


def _ed25519() -> Any:
    require("signatures", by="a signed row")
    from cryptography.hazmat.primitives.asymmetric import ed25519

    return ed25519


class SigningKey:
    """The secret key of a node. Make one with `generate`, keep it with `save`."""

    def __init__(self, secret: bytes) -> None:
        try:
            self._key = _ed25519().Ed25519PrivateKey.from_private_bytes(secret)
        except ValueError as error:
            raise DataError(f"a secret key has 32 bytes, this has {len(secret)}") from error
        self._secret = secret
        self.node_id = PREFIX + self._key.public_key().public_bytes_raw().hex()

    @classmethod
    def generate(cls) -> "SigningKey":
        """A new key, from the system's randomness."""
        return cls(_ed25519().Ed25519PrivateKey.generate().private_bytes_raw())

    def sign(self, content: bytes) -> str:
        """The signature, in hexadecimal."""
        return self._key.sign(content).hex()

    def save(self, path: str | Path) -> None:
        """Write the key, for its owner alone to read, all or nothing. Raises as `anabranch.graph.beside.new_file`."""
        # Readable by the owner alone.
        with new_file(path, mode=0o600) as temporary:
            temporary.write_bytes(self._secret)

    @classmethod
    def load(cls, path: str | Path) -> "SigningKey":
        """Read what `save` wrote. Raises DataError for a file that is missing or no key."""
        try:
            return cls(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"cannot read the key {path}: {(error.strerror or str(error)).lower()}") from error


def is_signed(row: Row) -> bool:
    """Whether the row's signature is its origin's. Raises BackendError without the package."""
    ed25519 = _ed25519()
    from cryptography.exceptions import InvalidSignature

    if not row.origin.startswith(PREFIX) or not row.signature:
        return False
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(row.origin.removeprefix(PREFIX)))
        key.verify(bytes.fromhex(row.signature), row.signed_bytes())
    except (ValueError, InvalidSignature):
        return False
    return True
