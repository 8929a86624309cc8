"""Personalised PageRank of every node of a weighted graph, by walks on one machine or on a Spark cluster.

"Distributed Algorithms for Fully Personalized PageRank on Large Graphs", Lin, WWW 2019, arXiv 1903.11749.

    pi(u, v) = P(a walk from u, which ends with probability alpha before each step and steps by weight, ends at v)

for all pairs, kept as the ``top_k`` best v of each u. Estimates: the ends of omega walks of each node, (walks that end at v) / omega,
or their visits, (visits of v) / (all visits); scores of at least delta have a relative error of at most eps with probability 1 - p_f for

    omega >= (2 + 2 eps / 3) ln(2 / p_f) / (eps^2 delta).

    fully_ppr(graph, top_k=50).top(7)
    FullyPPR(engine="spark", out="scores").fit(graph)

- `local`: the embedded engine, all walks of a source at once; `chunks`: parallel, streamed to disk, resumable
- `devices`: what the paper adds for clusters: pieces of hubs (alias trees), big moves, pipelines, the choice of gamma
- `rounds`: the partitioned plan as pure functions of arrays, run in this process; `spark`: both plans on Spark
- `from_edges`: from edges in Parquet to scores in Parquet on Spark, with no process that holds the graph

    fully_ppr("edges.parquet", engine="spark", out="scores")

Departures: the paper's details of these devices are not known to us, so their layouts are ours, with its guarantees; big moves draw from
exact outcome tables instead of stored walks; walks of one source at one node are one row with a count; gamma follows counted walks, not
measured times, so that runs repeat to the bit; locally an index of few walks with exact decomposition (PowerWalk) stands beside walks.
"""

import sys
from types import ModuleType
from typing import Any

from anabranch.graph.fully_ppr.api import FullyPPR, fully_ppr
from anabranch.graph.fully_ppr.result import FullyPPRResult
from anabranch.graph.fully_ppr.stored import StoredScores
from anabranch.graph.spark.edges import EdgeFiles

__all__ = ["EdgeFiles", "FullyPPR", "FullyPPRResult", "StoredScores", "fully_ppr"]


class _Callable(ModuleType):
    """So that ``from anabranch.graph import fully_ppr``, which finds this package, gives what the name says."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return fully_ppr(*args, **options)


sys.modules[__name__].__class__ = _Callable
