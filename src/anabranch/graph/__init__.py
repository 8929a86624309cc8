"""Walks to nodes, queries to neighbours: graphs, PageRank, embeddings, nearest-neighbour search and ranking. Knows no model.

    graph = read_graph("edges.csv")                                    # or Graph.from_edges, load_dataset("karate").graph
    # All below take as well what `as_graph` does: a path, networkx, igraph, scipy, torch, PyG, tables; and nodes by name.
    ids, scores = PageRank().personalized(graph, 7, top_k=10)          # PowerWalk: in a millisecond; FullyPPR: for all nodes
    vectors = FastRP(dim=128).fit_transform(graph)                     # or GraphVite
    index = HNSW(128, metric="cosine"); index.add(vectors); index.search(vectors[7], k=10)
    GRank().fit("clicks.parquet").rank("jazz", node="alice")

Stands on its own beside `anabranch.errors`, `anabranch.extras` and `anabranch.files`; needs the extra ``graph`` (scipy, numba).
Names are loaded when they are first used, so that importing this package is quick and works without the extra; a name that is
used without it raises MissingExtraError.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.extras import lazy
from anabranch.graph import forking as forking
from anabranch.places import cache_folder, can_write

if TYPE_CHECKING:
    from anabranch.graph.coerce import as_graph
    from anabranch.graph.datasets import load_dataset
    from anabranch.graph.fastrp import FastRP
    from anabranch.graph.formats import read_graph, write_graph
    from anabranch.graph.fully_ppr import FullyPPR, fully_ppr
    from anabranch.graph.graphvite import GraphVite
    from anabranch.graph.hnsw import HNSW
    from anabranch.graph.powerwalk import PowerWalk
    from anabranch.graph.ppr import PageRank
    from anabranch.graph.rank import GRank
    from anabranch.graph.store import Graph
    from anabranch.graph.typed import TypedGraph

__all__ = [
    "HNSW",
    "FastRP",
    "FullyPPR",
    "GRank",
    "Graph",
    "GraphVite",
    "PageRank",
    "PowerWalk",
    "TypedGraph",
    "as_graph",
    "fully_ppr",
    "load_dataset",
    "read_graph",
    "write_graph",
]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "FastRP": ".fastrp",
        "FullyPPR": ".fully_ppr",
        "GRank": ".rank",
        "Graph": ".store",
        "GraphVite": ".graphvite",
        "HNSW": ".hnsw",
        "PageRank": ".ppr",
        "PowerWalk": ".powerwalk",
        "TypedGraph": ".typed",
        "as_graph": ".coerce",
        # The package, which can be called as the function of its name.
        "fully_ppr": None,
        "load_dataset": ".datasets",
        "read_graph": ".formats",
        "write_graph": ".formats",
    },
)


def _keep_compiled(package: Path = Path(__file__).parent) -> None:
    """Numba keeps compiled kernels beside the modules; where nothing can be written there, in our cache.

    Left to itself it would look for a home directory, and refuse to define a kernel where there is none.
    """
    if os.environ.get("NUMBA_CACHE_DIR") or can_write(package / "__pycache__"):
        return
    # Processes that are started from here find it too.
    os.environ["NUMBA_CACHE_DIR"] = str(cache_folder() / "numba")
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]


_keep_compiled()
