"""An index of vectors that takes changes for good: what was acknowledged is there after a crash.

    with LiveIndex.open("index.anb") as live:
        live.upsert([7, 8], vectors)        # returns when it is on the disk
        live.delete([3])
        ids, distances = live.index.search(queries, 10)

Beside ``index.anb``, which stays as it is, lies the folder ``index.anb.live``:

    log-00000001    changes, in the order in which they were acknowledged (`log`)
    snapshot.anb    the index as it was when a log was begun; older logs are gone
    lock            held by the one process that writes

    changes     what a change is, and what it is as bytes
    log         frames with checksums: written, read back, cut where the last one is torn
    logs        the one that is written, and those before it
    folder      the files of an index, and what is found in them
    group       changes of many threads, one write to the disk for each group
    background  snapshots, and bringing the log to the disk every so often
    index       `LiveIndex`: all of it
"""

from anabranch.extras import require

require("graph", by=__name__)

from anabranch.graph.beside import check_unchanged, live_folder, replacing
from anabranch.graph.live.folder import open_index, open_named
from anabranch.graph.live.index import LiveIndex, NoRoomError

__all__ = ["LiveIndex", "NoRoomError", "check_unchanged", "live_folder", "open_index", "open_named", "replacing"]
