"""PowerWalk: online personalised PageRank from a small index of walks and vertex-centric decomposition.

Liu, Li, Lui, Cheng, "PowerWalk: Scalable Personalized PageRank via Random Walks with Vertex-Centric Decomposition", CIKM 2016, arXiv
1608.06054. Offline, short walks from every node leave a fingerprint; online, a few rounds of the identity

    pi_u = alpha e_u + (1 - alpha) sum_w P(u, w) pi_w

take a query to nodes whose fingerprints, looked up and averaged, answer it better than its own would: the error falls as (1 - alpha)^T and
with the number of independent fingerprints.

Departures: walks have no limit by default (the reference cuts at 10 steps) and survivors are drawn exactly (it rounds;
``moves="rounding"`` is that); walks vanish at dead ends and the policy is applied at the end, so that the identity holds under each
(the reference sends them to their source, for which it does not); flows below ``eps`` leave alpha of themselves where the
reference drops all.

    index     walks, chunk by chunk        moves    walkers one by one, or counts of them
    query     decomposition, compiled      batch    many queries at once
    stored    arrays and files of an index
    held      what a `PowerWalk` holds     asking, changing    its queries, its changes of the graph     model    the rest of it
"""

from anabranch.graph.powerwalk.model import PowerWalk

__all__ = ["PowerWalk"]
