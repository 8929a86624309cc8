"""G-Rank: rankings from gossiped click logs, in which peers cluster by themselves. No server, no training, no labels.

"G-Rank: Unsupervised Continuous Learn-to-Rank for Edge Devices in a P2P Network", Gold and Pouwelse, 2023, arXiv 2301.12530. A
node keeps a log of clicks (its own and what others handed over) and ranks the items k clicked for a query Q by

    R_i(Q)[k] = sum_j C_jk(Q) (S_i(j) + F)
    S_i(j)    = (kappa_t + kappa_m^2) / kappa_u, over the largest of all known peers

with C clicks by node j, kappa_t common terms among the 10 most searched of both, kappa_m common (term, item) clicks, kappa_u items
that either clicked, F >= 0 the isolation constant. Items whose metadata match Q stand above all others. Unseen terms fall back to
metadata, then to the tags of logged clicks, then to popularity. With probability 0.5 two random results change places.

    GRank          rankings of a click log that lies in one place (`anabranch.graph.rank.estimator`)
    Peer           one node: query, click, gossip, keep (`anabranch.graph.rank.peer`)
    GossipServer   a peer on TCP (`anabranch.graph.rank.transport`)
    Network        a simulated network with churn, disconnection and attackers (`anabranch.graph.rank.network`)
    Defences       caps, quotas, windows, signatures

Departures: a node's own clicks have S = 1 and do not take part in the normalisation; rows are numbered by click, not by query, so
that sequences have no holes; instead of a progress pointer per peer an asker sends the vector of rows it has; clicks saturate at 3
by default (``saturation=None`` is the paper's); items of the library that match and have no click are shown, with score 0. The
authors' notebook differs from the paper in places (it squares kappa_t, and F has no effect there); here the paper is followed.
"""

from anabranch.graph.rank.attacks import Attack, paper_attack
from anabranch.graph.rank.clicks import read_clicks
from anabranch.graph.rank.defences import NONE, Defences
from anabranch.graph.rank.estimator import GRank
from anabranch.graph.rank.items import Item, library, matches, normalize
from anabranch.graph.rank.keys import SigningKey
from anabranch.graph.rank.measures import ndcg, rank_distance
from anabranch.graph.rank.network import Network
from anabranch.graph.rank.peer import Peer
from anabranch.graph.rank.results import Merged, Ranked, Results
from anabranch.graph.rank.rows import Row
from anabranch.graph.rank.swarm import run_swarm
from anabranch.graph.rank.transport import GossipServer

__all__ = [
    "NONE",
    "Attack",
    "Defences",
    "GRank",
    "GossipServer",
    "Item",
    "Merged",
    "Network",
    "Peer",
    "Ranked",
    "Results",
    "Row",
    "SigningKey",
    "library",
    "matches",
    "ndcg",
    "normalize",
    "paper_attack",
    "rank_distance",
    "read_clicks",
    "run_swarm",
]
