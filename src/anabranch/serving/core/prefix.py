"""`PrefixCache`: full blocks of earlier requests that begin as a new one does.

The key of a block is a digest of all that its keys and values depend on: the tokens in it, the key of the block before it, and, at
the root, the salt and options of the request. Equal keys therefore mean equal prefixes, and whoever does not know a salt cannot
find out by timing what others asked. SHA-256, since a prompt may be chosen by an adversary.
"""

import struct
from collections.abc import Sequence
from hashlib import sha256

from anabranch.serving.core.kinds import Kind, match


def root_key(
    salt: str,
    options: Sequence[tuple[str, str]] = (),
    generation: int = 0,
    *,
    num_streams: int | None = None,
    path: Sequence[int] | None = None,
) -> bytes:
    """The key before the first block: digest of the salt, of the options in any order, and of how the model runs, each with its length.

    ``generation`` sets apart what was computed before a reset. ``num_streams`` and ``path`` are None for the usual; they have places of
    their own, so that no option, whatever its name, stands for them.
    """
    blocks = "" if path is None else f"path {','.join(map(str, path))}"
    parts = [str(generation), salt, "" if num_streams is None else str(num_streams), blocks]
    parts += [text for pair in sorted(map(tuple, options)) for text in pair]
    return sha256(b"".join(_framed(part) for part in parts)).digest()


def child_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block of ``tokens`` that follows the block of key ``parent``."""
    return sha256(parent + struct.pack(f"<{len(tokens)}q", *tokens)).digest()


class PrefixCache:
    """Keys of sequences, and the blocks they find: one in the pool of each kind of layers, see `Kind`."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._kinds = kinds
        self._generation = 0

    def root(
        self,
        salt: str,
        options: Sequence[tuple[str, str]],
        *,
        num_streams: int | None = None,
        path: Sequence[int] | None = None,
    ) -> bytes:
        """The root of requests that come from now on; see `root_key`."""
        return root_key(salt, options, self._generation, num_streams=num_streams, path=path)

    def extend(self, keys: list[bytes], root: bytes, tokens: Sequence[int], num_tokens: int) -> None:
        """Lengthen ``keys`` to all full blocks of the first ``num_tokens`` tokens; each block is hashed once."""
        size = self._kinds[0].pool.block_tokens
        for index in range(len(keys), num_tokens // size):
            keys.append(child_key(keys[-1] if keys else root, tokens[index * size : (index + 1) * size]))

    def match(self, keys: Sequence[bytes]) -> list[list[int]]:
        """A table of each kind for the longest known prefix of ``keys``. `Kind.hold` them before anything else is allocated."""
        return match(self._kinds, keys)

    def reset(self) -> int:
        """Forget everything; how many blocks that were, of the first kind.

        What sequences under way publish later has an older root, so that no new request finds it.
        """
        self._generation += 1
        counts = [kind.pool.forget_all() for kind in self._kinds]
        return counts[0]


def _framed(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<q", len(data)) + data
