"""`SharedRooms`: limits of deployments that several processes keep together."""

from dataclasses import dataclass
from typing import Protocol

from anabranch.gateway.dispatch.deployments import Deployment


@dataclass(frozen=True, slots=True)
class Full:
    """A deployment has no room for an attempt, though by what this process knows it has.

    Attributes:
        wait_s: seconds until it has, as far as others do not take it; None until an attempt somewhere ends.
        tokens: fewest of an attempt that has none.
    """

    wait_s: float | None
    tokens: int = 0


class NoRoomError(Exception):
    """An attempt that was counted in here has no room, and was counted out as if it had never been."""


class SharedRooms(Protocol):
    """Where it cannot be asked, it says yes: each process still has its own counts."""

    async def take(self, deployment: Deployment, id: str, tokens: int) -> Full | None:
        """Count an attempt in, unless it is `Full`: all limits are taken from, or none."""

    def leave(self, whose: str, id: str) -> None:
        """An attempt at a deployment is under way no more."""

    def spent(self, deployment: Deployment, tokens: int) -> None:
        """So many completion tokens were made."""

    def corrected(self, deployment: Deployment, by: int, ago_s: float) -> None:
        """The prompt of an attempt that began so many seconds ago had so many tokens more (or less) than it was counted in with."""
