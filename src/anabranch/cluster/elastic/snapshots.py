"""What a rank keeps of its neighbours, and what they keep of it: slices of the last two versions, verified as they come."""

from collections.abc import Callable

from anabranch.cluster.elastic.control import Control
from anabranch.cluster.elastic.layout import Layout
from anabranch.cluster.elastic.links import LinkPool
from anabranch.cluster.elastic.moving import Held
from anabranch.cluster.elastic.state import Slice, Snapshot, snapshot_of
from anabranch.cluster.elastic.wire import Body, Header
from anabranch.errors import InputError

__all__ = ["Snapshots"]

_VERSIONS = 2


class Snapshots:
    """One rank's.

    Args:
        links, control: of the rank.
        copies: neighbours that keep a rank's slices.
        probe: called with the state ``snapshot`` where one is sent.

    Attributes:
        held: by (epoch of the layout, owner), snapshots by version.
    """

    def __init__(self, control: Control, copies: int, probe: Callable[[str], None]) -> None:
        self.held: Held = {}
        self._control, self._copies, self._probe = control, copies, probe

    def send(self, links: LinkPool, epoch: int, layout: Layout, slices: dict[int, Slice], version: int) -> None:
        """Queue a copy of this rank's slices for those who are to keep it."""
        self._probe("snapshot")
        holders = layout.holders(links.rank, self._copies)
        if not holders:
            return
        snapshot = snapshot_of(slices, version)
        header = {
            "kind": "snapshot",
            "layout": epoch,
            "version": version,
            "layers": snapshot.layers,
            "digest": snapshot.digest,
        }
        for rank in holders:
            links.send_packed(rank, header, snapshot.body)

    def take(self, links: LinkPool, owner: int, header: Header, body: Body) -> None:
        """In a link's thread: verified as it comes, and told; of more than two versions the oldest makes room."""
        layers = tuple((int(layer), told, spec) for layer, told, spec in header["layers"])
        snapshot = Snapshot(int(header["version"]), layers, body, str(header["digest"]))
        epoch = int(header["layout"])
        try:
            snapshot.slices()
        except InputError as error:
            self.tell_damaged(owner, str(error))
            return
        with links.changed:
            versions = self.held.setdefault((epoch, owner), {})
            versions[snapshot.version] = snapshot
            for old in sorted(versions)[:-_VERSIONS]:
                del versions[old]
            # Told when it is here, since who is told may ask for it at once; and before this rank, which waits for it, tells what is next.
            self._control.tell("held", owner=owner, version=snapshot.version, layout=epoch)
            links.changed.notify_all()

    def tell_damaged(self, owner: int, why: str) -> None:
        """What is kept here of a rank cannot be used."""
        self._control.tell("bad", epoch=self._control.epoch, owner=owner, why=why)

    def wait(self, rank: int, epoch: int, layout: Layout, version: int) -> None:
        """Until this rank has the snapshots of a version that it is to keep, so that those before need not be kept any longer."""
        owners = [other for other in layout.grid.ranks if rank in layout.holders(other, self._copies)]

        def missing() -> list[int]:
            return [owner for owner in owners if version not in self.held.get((epoch, owner), {})]

        self._control.wait_until(lambda: not missing(), lambda: {"ranks": missing()}, is_called=True)

    def keep(self, links: LinkPool, epoch: int) -> None:
        """Drop those of layouts before this one. Of the next they may be here already, from ranks that are ahead."""
        with links.changed:
            for key in [key for key in self.held if key[0] < epoch]:
                del self.held[key]
