"""A plan as a `RoutingTrace`, the record that layers of experts, routers and gateways write too: a piece is an item, a link a destination.

So what measures and draws the load of experts measures and draws that of links: ``anabranch report plan.parquet --out report``.
"""
# Shapes: Q pieces, D links of a piece, L links

from typing import TYPE_CHECKING

import numpy as np

from anabranch.cluster.fabric.planner import Plan, routes
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.routing import RoutingTrace


def plan_trace(made: Plan) -> "RoutingTrace":
    """One layer whose destinations are links, by number; the choices of a piece are its links in the order in which they are passed.

    The weight of a choice is the bytes that the link carries of the piece (float32: exact up to 16 MiB), the position the step, the
    domain the scheme. A spread piece has all links of its paths. Needs the extra ``lm``.
    """
    require("lm", by="a trace of a plan")
    from anabranch.routing import TraceBuilder, TraceLayer

    start, link_E, weight_E = routes(made)
    length_Q = np.diff(start)
    longest = int(length_Q.max(initial=1))
    index_QD, weight_QD = np.full((len(made), longest), -1, np.int64), np.zeros((len(made), longest), np.float32)
    piece_E = np.repeat(np.arange(len(made)), length_Q)
    place_E = np.arange(len(link_E)) - start[piece_E]
    index_QD[piece_E, place_E], weight_QD[piece_E, place_E] = link_E, made.size_Q[piece_E] * weight_E
    builder = TraceBuilder()
    layer = TraceLayer(layer=0, name="links", num_destinations=made.topology.num_links, top_k=longest)
    if len(made):
        step_Q = made.flows.step_F[made.flow_Q]
        builder.add(layer, index_QD, weight_QD, item_N=np.arange(len(made)), position_N=step_Q, domain=made.scheme)
    else:
        builder.layers[0] = layer
    return builder.trace()
