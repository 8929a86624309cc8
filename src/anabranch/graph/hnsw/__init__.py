"""HNSW: approximate nearest neighbours by a walk through a hierarchy of small-world graphs.

Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small World graphs", 2016,
arXiv 1603.09320.
"""

from anabranch.graph.hnsw.exact import brute_force
from anabranch.graph.hnsw.filters import Filter
from anabranch.graph.hnsw.index import HNSW
from anabranch.graph.hnsw.ranges import Within
from anabranch.graph.hnsw.sharded import ShardedHNSW

__all__ = ["HNSW", "Filter", "ShardedHNSW", "Within", "brute_force"]
