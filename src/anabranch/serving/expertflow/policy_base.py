"""What every cache policy is: told what happens in the cache that it belongs to, and asked who leaves and what to load ahead."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from anabranch.serving.expertflow.layout import Expert

if TYPE_CHECKING:
    from anabranch.serving.expertflow.cache import ExpertCache

__all__ = ["LoadsAhead", "Policy"]


class Policy:
    """Replaces nothing in particular; the base of the others.

    Attributes:
        per_layer: slots are divided among the pools beforehand.
        spares: slots that no pool owns, for loads that begin before their pool has a slot to give.
        needs_reference: it asks for predictions.
    """

    name: ClassVar[str]
    per_layer: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    spares: int = 0

    def attach(self, cache: "ExpertCache") -> None:
        """The cache it decides for; once."""
        self.cache = cache

    def group(self, expert: Expert) -> int:
        """Experts of one group compete for slots."""
        return self.cache.layout.kind(expert)

    def quota(self, group: int) -> int:
        """Slots of a group."""
        return self.cache.num_slots[group]

    def begin_step(self) -> None:
        """A forward pass begins; `ExpertCache.reference` is set."""

    def begin_layer(self, unwanted: frozenset[Expert]) -> None:
        """A router has spoken; ``unwanted`` was predicted for this layer in vain."""

    def started(self, expert: Expert) -> None:
        """An expert is being loaded."""

    def used(self, expert: Expert) -> None:
        """An expert has run."""

    def give_up(self, expert: Expert) -> None:
        """A prefetch has failed; it is not asked for again in this pass."""

    def victim(self, incoming: Expert) -> Expert | None:
        """What leaves for an expert that is wanted now; None if nothing may."""
        return self.worst(self.group(incoming))

    def worst(self, group: int) -> Expert | None:
        """The first to leave of those that may."""
        raise NotImplementedError  # abstract

    def prepare(self) -> None:
        """There is time to find out what `prefetch` will want to know."""

    def prefetch(self) -> tuple[Expert, Expert | None] | None:
        """What to load ahead and what leaves for it (None for a free slot); None for nothing."""
        return None

    def evictable(self, group: int) -> Iterator[Expert]:
        """Those of a group that may leave, in the group's order."""
        # As `ExpertCache.is_evictable` says, of members.
        cache = self.cache
        return (one for one in cache.members.get(group, ()) if one not in cache.wanted and one not in cache.loading)


class LoadsAhead(Policy):
    """Base of policies that load before anybody asks: what cannot be loaded is skipped for the rest of a pass."""

    def attach(self, cache: "ExpertCache") -> None:
        """Nothing has failed yet."""
        super().attach(cache)
        self._given_up: set[Expert] = set()

    def begin_step(self) -> None:
        """Everything may be tried again."""
        self._given_up.clear()

    def give_up(self, expert: Expert) -> None:
        """Skip it in this pass."""
        self._given_up.add(expert)
