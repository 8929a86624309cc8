"""Walks to nodes, queries to neighbours: graphs, PageRank, embeddings, nearest-neighbour search and ranking. Knows no model.

Stands on its own beside `anabranch.errors` and `anabranch.files`; needs the extra ``graph`` (scipy, numba).
"""

from anabranch.graph.store import Graph

__all__ = ["Graph"]
