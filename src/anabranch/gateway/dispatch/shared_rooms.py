"""`SharedRooms`: limits of deployments that several processes keep together."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from anabranch.gateway.dispatch.deployments import Deployment
from anabranch.gateway.dispatch.senders import OWN, is_own


@dataclass(frozen=True, slots=True)
class Full:
    """A deployment has no room for an attempt, though by what this process knows it has.

    Attributes:
        wait_s: seconds until it has, as far as others do not take it; None until an attempt somewhere ends.
        tokens: fewest of an attempt that has none.
    """

    wait_s: float | None
    tokens: int = 0


def attempt_id(number: int, sender: str) -> str:
    """A name of an attempt, unlike any other of this process, which says whose it is, though not who that is; "" is nobody."""
    if not sender:
        return str(number)
    return f"{number}@{OWN if is_own(sender) else blake2b(sender.encode(), digest_size=8).hexdigest()}"


def mark_of(id: str) -> str:
    """What the names of all attempts of a sender end with; "" of nobody's."""
    _, at, whose = id.partition("@")
    return at + whose


class NoRoomError(Exception):
    """An attempt that was counted in here has no room, and was counted out as if it had never been."""


class SharedRooms(Protocol):
    """Where it cannot be asked, it says yes: each process still has its own counts."""

    async def take(self, deployment: Deployment, id: str, tokens: int) -> Full | None:
        """Count an attempt in, by its `attempt_id`, unless it is `Full`: all limits are taken from, or none.

        Of the attempts at a time a sender has its part of all, as `Live.can_take` says.
        """

    def leave(self, whose: str, id: str) -> None:
        """An attempt at a deployment is under way no more."""

    def spent(self, deployment: Deployment, tokens: int) -> None:
        """So many completion tokens were made."""

    def corrected(self, deployment: Deployment, by: int, ago_s: float) -> None:
        """The prompt of an attempt that began so many seconds ago had so many tokens more (or less) than it was counted in with."""
