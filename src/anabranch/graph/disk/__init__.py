"""An index of vectors that stays on disk: short codes in memory, vectors and links in blocks of one file, read as a search needs them.

A walk over a graph of neighbours as in `HNSW`, laid out as in Subramanya et al., "DiskANN: Fast Accurate Billion-point Nearest Neighbor
Search on a Single Node", NeurIPS 2019.
"""

from anabranch.extras import require

require("graph", by=__name__)

from anabranch.graph.disk.index import DiskIndex
from anabranch.graph.disk.making import build, from_hnsw
from anabranch.graph.disk.stored import is_on_disk

__all__ = ["DiskIndex", "build", "from_hnsw", "is_on_disk"]
