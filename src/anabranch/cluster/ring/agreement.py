"""Whether all processes were given the same: asked once in a call, so that a difference is one message and not a wait without an end."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch

from anabranch.cluster.ring.link import GroupLink, Traffic, drive, everyone
from anabranch.errors import InputError

__all__ = ["check_agreement", "told_apart"]

# Columns of the message, so that ranks which ask for different things understand each other; bytes of a value that is told in words, and
# of one in which the place is looked for where ranks differ.
_COLUMNS, _MOST_TOLD, _MOST_SENT = 32, 160, 1 << 16
_MOST_RANKS = 8


def check_agreement(values: Mapping[str, Any], link: GroupLink, problem: str | None = None) -> None:
    """Raise InputError on all ranks if one has another value than the others, or a ``problem`` of its own.

    Args:
        values: by name, at most 30; they are compared as ``repr`` writes them, and a difference is told in these words.
        link: to the others, which call this too. What it sends for this is not counted.
        problem: what is wrong here already; the others learn that something is.

    Raises PeerError for a rank that does not answer in the link's time.
    """
    texts = {name: repr(value) for name, value in values.items()}
    assert len(texts) <= _COLUMNS - 2, "the message has a column for each value"
    told = [_digest(repr(list(texts))), int(problem is not None), *map(_digest, texts.values())]
    mine_F = torch.tensor([*told, *[0] * (_COLUMNS - len(told))], dtype=torch.int64, device=link.device)
    asking = GroupLink(link.group, timeout_s=link.timeout_s)
    table = [parts[0].tolist() for parts in drive(everyone(asking, "agree", [mine_F]), Traffic())]
    if problem is not None:
        raise InputError(problem)
    if wrong := [rank for rank, row in enumerate(table) if row[1]]:
        raise InputError(f"rank {wrong[0]} was given what it cannot work on; see its own message")
    if len({row[0] for row in table}) > 1:
        raise InputError("ranks called different functions of attention; all must call the same")
    for column, (name, text) in enumerate(texts.items(), start=2):
        # The table is the same on all, so all ask each other for this value next.
        if len({row[column] for row in table}) > 1:
            digests = [row[column] for row in table]
            found = _in_words(digests, told_apart(_texts(text, asking), digests))
            raise InputError(f"ranks were given different {name}: {found}; it must be the same on all")


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _texts(text: str, link: GroupLink) -> list[bytes]:
    """What each rank says, as far as a message of this is sent."""
    raw = text.encode()
    mine_1 = torch.tensor([len(raw)], dtype=torch.int64, device=link.device)
    sizes = [int(parts[0]) for parts in drive(everyone(link, "agree", [mine_1]), Traffic())]
    most = min(max(sizes), _MOST_SENT)
    mine_F = torch.tensor(list(raw[:most].ljust(most, b"\0")), dtype=torch.uint8, device=link.device)
    came = drive(everyone(link, "agree", [mine_F]), Traffic())
    return [bytes(parts[0].tolist())[:size] for parts, size in zip(came, sizes, strict=True)]


def told_apart(texts: Sequence[bytes], digests: Sequence[int]) -> list[str]:
    """Of each text what is short enough to be told: from its beginning, or from before the first place where they are not all the same.

    Two that are alike in what is told, and are not by their ``digests``, have these behind them.
    """
    letters = enumerate(zip(*texts, strict=False))
    differ = next((place for place, found in letters if len(set(found)) > 1), min(map(len, texts)))
    fits = max(map(len, texts)) <= _MOST_TOLD
    start = 0 if fits or differ < _MOST_TOLD // 2 else differ - _MOST_TOLD // 4
    front = b"..." if start else b""
    told = []
    for text in texts:
        part, most = front + text[start:], _MOST_TOLD
        told.append((part if len(part) <= most else part[: most - 3] + b"...").decode(errors="replace"))
    if len(set(told)) < len(set(digests)):
        told = [f"{said} (digest {digest % (1 << 64):016x})" for said, digest in zip(told, digests, strict=True)]
    return told


def _in_words(digests: Sequence[int], texts: Sequence[str]) -> str:
    """Which value has which ranks: "'ring' on rank 0, 'token_ring' on ranks 1 and 2"."""
    ranks: dict[int, list[int]] = {}
    for rank, digest in enumerate(digests):
        ranks.setdefault(digest, []).append(rank)
    said = []
    for members in ranks.values():
        names = [str(rank) for rank in members[:_MOST_RANKS]]
        if len(members) > _MOST_RANKS:
            names[-1] = f"{len(members) - _MOST_RANKS + 1} others"
        several = "" if len(names) == 1 else f"{', '.join(names[:-1])} and "
        said.append(f"{texts[members[0]]} on rank{'s' * (len(members) > 1)} {several}{names[-1]}")
    return ", ".join(said)
