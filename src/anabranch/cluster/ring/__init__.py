"""TokenRing: exact attention over a sequence that is cut over ranks (Wang et al. 2024, arXiv 2412.20501).

    from anabranch.cluster import token_ring_attention

    out_BLHD = token_ring_attention(q_BLHD, k_BLGD, v_BLGD, causal=True, layout="zigzag")         # under torchrun

`attention` is where to begin; `layout` says who has which positions, `pieces` what they see, `schedule` who sends what when, `program` what
a rank does, `kernel` the arithmetic, `link` the messages, `choice` which scheme is quickest, `model` and `sharded_cache` decoders, `grid`
rings of ranks that cut heads between them, `hybrid` TokenRing inside nodes and a ring of keys between them.
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.cluster.ring.attention import (
    RingOptions,
    context_parallel_attention,
    placed_attention,
    ring_attention,
    simulated_attention,
    simulated_placed_attention,
    token_ring_attention,
)
from anabranch.cluster.ring.choice import AttentionPlan, plan_attention
from anabranch.cluster.ring.costs import SCHEMES, SchemeCost, Topology
from anabranch.cluster.ring.layout import Layout, Placement, Run
from anabranch.cluster.ring.link import Traffic
from anabranch.cluster.ring.measure import measure_topology
from anabranch.cluster.ring.model import ContextOutput, ContextParallel, average_gradients
from anabranch.cluster.ring.sharded_cache import ShardedCache

__all__ = [
    "SCHEMES",
    "AttentionPlan",
    "ContextOutput",
    "ContextParallel",
    "Layout",
    "Placement",
    "RingOptions",
    "Run",
    "SchemeCost",
    "ShardedCache",
    "Topology",
    "Traffic",
    "average_gradients",
    "context_parallel_attention",
    "measure_topology",
    "placed_attention",
    "plan_attention",
    "ring_attention",
    "simulated_attention",
    "simulated_placed_attention",
    "token_ring_attention",
]
