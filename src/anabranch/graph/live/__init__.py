"""An index of vectors that takes changes for good: what was acknowledged is there after a crash.

    with LiveIndex.open("index.anb") as live:
        live.upsert([7, 8], vectors)        # returns when it is on the disk
        live.delete([3])
        ids, distances = live.index.search(queries, 10)

Beside ``index.anb``, which stays as it is, lies the folder ``index.anb.live``:

    log-00000001    changes, in the order in which they were acknowledged (`log`)
    snapshot.anb    the index as it was when a log was begun; older logs are gone
    lock            held by the one process that writes

    log     frames with checksums: written, read back, cut where the last one is torn
    folder  the files of an index, and what is found in them
    index   `LiveIndex`: changes in groups, one write to the disk for each; snapshots in the background
"""

from anabranch.extras import require

require("graph", by=__name__)

from anabranch.graph.live.folder import check_unchanged, live_folder, open_index, replacing
from anabranch.graph.live.index import LiveIndex, NoRoomError

__all__ = ["LiveIndex", "NoRoomError", "check_unchanged", "live_folder", "open_index", "replacing"]
