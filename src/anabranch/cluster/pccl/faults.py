"""What can go wrong between peers, each with its own type, so that a program knows whether to try again.

    try:
        peers.all_reduce(gradient)
    except CollectiveError as error:
        if not error.retryable:
            raise                       # PeerLost and TopologyFailed may be tried again with the peers that are left

All are `anabranch.errors.PeerError`.
"""

from __future__ import annotations

from typing import Any

from anabranch.errors import PeerError

__all__ = [
    "CollectiveError",
    "Kicked",
    "MasterLost",
    "Mismatch",
    "PeerLost",
    "Refused",
    "RevisionError",
    "TagInUse",
    "TopologyFailed",
]


class CollectiveError(PeerError):
    """An operation of several peers failed.

    Attributes:
        retryable: the same call may succeed with the peers that are left. All survivors were told the same.
    """

    retryable = False


class PeerLost(CollectiveError):  # noqa: N818
    """A peer went away or a link broke in the midst of it; buffers are as they were before the call.

    Where this peer has itself given up waiting (``wait_s``, ``gives_up``), it is not ``retryable``, and nobody else was told.
    """

    retryable = True


class TopologyFailed(CollectiveError):  # noqa: N818
    """A peer could not reach its neighbour; the ring is as it was before."""

    retryable = True


class Kicked(CollectiveError):  # noqa: N818
    """The master has dropped this peer; only `Communicator.connect` of a new communicator lets it come back."""


class MasterLost(CollectiveError):  # noqa: N818
    """The master does not answer, and did not come back in time."""


class Refused(CollectiveError):  # noqa: N818
    """The other side does not let this peer in: another secret, another version, a full master."""


class TagInUse(CollectiveError):  # noqa: N818
    """A collective of this tag is under way, or another operation that goes with none."""


class Mismatch(CollectiveError):  # noqa: N818
    """Peers asked for different things under one name; the message names both."""


class RevisionError(CollectiveError):
    """The revision of a shared state is not one more than the last.

    Attributes:
        expected, got: revisions.
    """

    def __init__(self, expected: int, got: int, peer: int) -> None:
        super().__init__(f"the shared state of peer {peer} has revision {got}, and after the last one comes {expected}")
        self.expected, self.got, self.peer = expected, got, peer

    def __reduce__(self) -> Any:
        return RevisionError, (self.expected, self.got, self.peer)


def not_in_time(why: str) -> PeerLost:
    """Of a peer that waits no longer: the same call would wait as long again, and the others heard nothing of it."""
    error = PeerLost(why)
    error.retryable = False
    return error


# By the name under which the master tells of them.
_NAMED: dict[str, type[CollectiveError]] = {
    "lost": PeerLost,
    "topology": TopologyFailed,
    "kicked": Kicked,
    "mismatch": Mismatch,
    "refused": Refused,
    "tag": TagInUse,
}


def told(reply: dict[str, Any]) -> CollectiveError | None:
    """The error that a reply of the master tells of; None for one that tells of none."""
    name = reply.get("error")
    if name is None:
        return None
    if name == "revision":
        return RevisionError(int(reply["expected"]), int(reply["got"]), int(reply["peer"]))
    if name == "late":
        return not_in_time(str(reply.get("why", name)))
    return _NAMED.get(str(name), CollectiveError)(str(reply.get("why", name)))
