"""Whether all processes were given the same: asked once in a call, so that a difference is one message and not a wait without an end."""

from collections.abc import Mapping

import torch

from anabranch.cluster.ring.link import GroupLink, Traffic, drive, everyone
from anabranch.errors import InputError

__all__ = ["check_agreement"]


def check_agreement(values: Mapping[str, int], link: GroupLink, problem: str | None = None) -> None:
    """Raise InputError on all ranks if one has another value than the others, or a ``problem`` of its own.

    Args:
        values: by name; every rank gives the same names.
        link: to the others, which call this too. What it sends for this is not counted.
        problem: what is wrong here already; the others learn that something is.

    Raises PeerError for a rank that does not answer in the link's time.
    """
    names = list(values)
    mine_F = torch.tensor([*values.values(), int(problem is not None)], dtype=torch.int64, device=link.device)
    asking = GroupLink(link.group, timeout_s=link.timeout_s)
    table = [parts[0].tolist() for parts in drive(everyone(asking, "agree", [mine_F]), Traffic())]
    if problem is not None:
        raise InputError(problem)
    wrong = [rank for rank, row in enumerate(table) if row[-1]]
    if wrong:
        raise InputError(f"rank {wrong[0]} was given what it cannot work on; see its own message")
    for column, name in enumerate(names):
        found = [row[column] for row in table]
        if len(set(found)) > 1:
            raise InputError(f"ranks were given different {name}: {found}; it must be the same on all")
