"""Personalised PageRank on one machine: exact, by forward push, or by random walks; one query, a weighted set, or a batch.

    PageRank().personalized(graph, 7, top_k=10)
    PageRank().batch(graph, [7, [1, 2], {3: 0.5, 4: 1.0}], top_k=10)
    PageRank().scores(graph)

`anabranch.graph.ppr.rules` states the walk, its dead ends and the bound on the error.
"""

from anabranch.graph.ppr.factor import Factor, prepare
from anabranch.graph.ppr.pagerank import PageRank
from anabranch.graph.ppr.power import power_block, power_iteration, power_rows
from anabranch.graph.ppr.push import Scores, forward_push
from anabranch.graph.ppr.rules import Dangling, Transition, parse_seeds
from anabranch.graph.ppr.solve import solve
from anabranch.graph.ppr.walks import monte_carlo

__all__ = [
    "Dangling",
    "Factor",
    "PageRank",
    "Scores",
    "Transition",
    "forward_push",
    "monte_carlo",
    "parse_seeds",
    "power_block",
    "power_iteration",
    "power_rows",
    "prepare",
    "solve",
]
