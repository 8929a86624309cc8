"""Who keeps whose snapshots, as ranks have told, and how far a loss takes a training back: never below the *floor*.

    ledger = Ledger(copies=1)
    ledger.announce(epoch=1); ...; ledger.hold(layout, version=0)
    ledger.heard(holder=1, owner=0, version=7, epoch=1)
    ledger.way_back({1, 2, 3}, version=8)         # Way(version=7, holders={0: (1,)})

The floor is the newest version of which every rank's snapshot is verified at all ranks that are to keep it. A version below it is never
gone back to: whoever asks for one has lost more than there are copies, and training ends with the last checkpoint. Where there is no floor
(``copies`` 0, a rank that is alone, a layout that is not held yet) nobody keeps anything of a rank: nothing is taken back, a link that is
opened again or a rank that comes goes on from the committed step, and a rank that is lost ends training.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from anabranch.cluster.elastic.layout import Layout

__all__ = ["Ledger", "Way"]

# A holder keeps the newest versions: the one that is verified, and the one before, until all have the newer.
_KEPT = 2


@dataclass(frozen=True)
class Way:
    """Where training goes on after a loss.

    Attributes:
        version: committed steps.
        holders: of each lost rank, who has its slices of this version; the first gives them.
        why: where it cannot go on, the reason; then the others say nothing.
    """

    version: int
    holders: dict[int, tuple[int, ...]] = field(default_factory=dict)
    why: str | None = None


class Ledger:
    """Of one training.

    Args:
        copies: ranks that are to keep a rank's slices.

    Attributes:
        floor: the version below which nothing is taken back; None where there is none.
    """

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies
        self.floor: int | None = None
        self._layout: Layout | None = None
        # The version with which the layout began: what was before it is with nobody any more.
        self._since = 0
        # By (owner, holder), versions: in the layout that holds, and in the one that is announced.
        self._held: dict[tuple[int, int], list[int]] = {}
        self._next: dict[tuple[int, int], list[int]] = {}
        self._epoch = self._next_epoch = 0
        self._bad: set[tuple[int, int]] = set()

    def announce(self, epoch: int) -> None:
        """Snapshots of another layout come; those of one that was announced before and did not come to hold are nothing any more."""
        self._next, self._next_epoch = {}, epoch

    def hold(self, layout: Layout, version: int) -> None:
        """The layout that was announced last is the one that holds, from a version on."""
        self._layout, self._since = layout, version
        self._held, self._next = self._next, {}
        self._epoch = self._next_epoch
        self._bad.clear()
        self.floor = None
        self._raise_floor()

    def heard(self, *, holder: int, owner: int, version: int, epoch: int) -> None:
        """A rank has verified another's snapshot. One that comes late, behind newer ones, takes nothing back."""
        if epoch not in (self._epoch, self._next_epoch):
            return
        table = self._held if epoch == self._epoch else self._next
        versions = table.setdefault((owner, holder), [])
        if version not in versions:
            versions[:] = sorted([*versions, version])[-_KEPT:]
        if table is self._held:
            self._raise_floor()

    def damaged(self, *, holder: int, owner: int) -> None:
        """What a rank keeps of another is not what it was; all of it is left, until there is another layout."""
        self._bad.add((owner, holder))

    def way_back(self, alive: Collection[int], version: int) -> Way:
        """Where those who are left go on, ``version`` being committed: the newest version of which somebody alive has every slice."""
        if self._layout is None:
            return Way(version)
        dead = [rank for rank in self._layout.grid.ranks if rank not in alive]
        if not dead:
            return Way(version)
        if len(dead) == len(self._layout.grid.ranks):
            return Way(version, why="no rank is left")
        # Ranks have the committed version and the one before, if that was of this layout.
        lowest = max(version - 1, self._since, self._since if self.floor is None else min(self.floor, version))
        for candidate in range(version, lowest - 1, -1):
            holders = {owner: self._with(owner, candidate, alive) for owner in dead}
            if all(holders.values()):
                return Way(candidate, holders)
        missing = next(
            (owner for owner in dead if not any(self._with(owner, v, alive) for v in range(lowest, version + 1))),
            dead[0],
        )
        return Way(version, why=f"rank {missing} is lost, and {self._reason(missing, alive)}")

    def _with(self, owner: int, version: int, alive: Collection[int]) -> tuple[int, ...]:
        """Who is there with a sound snapshot of this version."""
        return tuple(holder for holder in self._sound(owner, alive) if version in self._held.get((owner, holder), ()))

    def _sound(self, owner: int, alive: Collection[int]) -> list[int]:
        assert self._layout is not None
        kept = self._layout.holders(owner, self.copies)
        return [holder for holder in kept if holder in alive and (owner, holder) not in self._bad]

    def _reason(self, owner: int, alive: Collection[int]) -> str:
        assert self._layout is not None
        if any(one == owner for one, _ in self._bad):
            return "the snapshot of it is damaged"
        if not self._layout.holders(owner, self.copies):
            return "nobody keeps snapshots (snapshot_copies is 0, or it was alone)"
        return (
            "no neighbour has a snapshot of the last two steps"
            if self._sound(owner, alive)
            else "its neighbour is lost too"
        )

    def _raise_floor(self) -> None:
        assert self._layout is not None
        newest = []
        for owner in self._layout.grid.ranks:
            kept = self._layout.holders(owner, self.copies)
            if not kept:
                return
            newest += [max(self._held.get((owner, holder), [-1])) for holder in kept]
        found = min(newest)
        if found >= self._since and (self.floor is None or found > self.floor):
            self.floor = found
