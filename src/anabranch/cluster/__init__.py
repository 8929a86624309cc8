"""Tensor -> machine: what of a model, a batch or a sequence is on which machine, and how it gets there.

    from anabranch.cluster import GPipe

    pipe = GPipe(model, stages=4, micro_batches=8)      # any nn.Sequential
    loss = pipe.step(x, target, loss_fn)                # gradients are those of the model that was not split

    from anabranch.cluster import token_ring_attention

    out = token_ring_attention(q, k, v, causal=True, layout="zigzag")   # of a sequence that is cut over ranks

    from anabranch.cluster import Communicator

    with Communicator("10.0.0.1:48148") as peers:                       # collectives whose peers come and go
        peers.all_reduce(gradient, op="avg")

Names are loaded when they are first used: what plans and draws needs numpy alone, what trains needs torch.
"""

from typing import TYPE_CHECKING

from anabranch.extras import lazy

if TYPE_CHECKING:
    from anabranch.cluster.elastic import Coordinator, ElasticTrainer
    from anabranch.cluster.gpipe import GPipe, Pop, Stash
    from anabranch.cluster.keyed_random import KeyedDropout, keyed_uniform, random_key
    from anabranch.cluster.messages import MessageLog
    from anabranch.cluster.partitions import Partition, partition
    from anabranch.cluster.pccl import Communicator, DiLoCo, Master, PeerLost, SharedState
    from anabranch.cluster.plans import LayerCost, Plan, plan
    from anabranch.cluster.ring import (
        ContextParallel,
        context_parallel_attention,
        plan_attention,
        ring_attention,
        token_ring_attention,
    )
    from anabranch.cluster.saved_bytes import SavedBytes
    from anabranch.cluster.schedules import SCHEDULES, Schedule, Slot, schedule
    from anabranch.cluster.simulation import Durations, Timeline, simulate

__all__ = [
    "SCHEDULES",
    "Communicator",
    "ContextParallel",
    "Coordinator",
    "DiLoCo",
    "Durations",
    "ElasticTrainer",
    "GPipe",
    "KeyedDropout",
    "LayerCost",
    "Master",
    "MessageLog",
    "Partition",
    "PeerLost",
    "Plan",
    "Pop",
    "SavedBytes",
    "Schedule",
    "SharedState",
    "Slot",
    "Stash",
    "Timeline",
    "context_parallel_attention",
    "keyed_uniform",
    "partition",
    "plan",
    "plan_attention",
    "random_key",
    "ring_attention",
    "schedule",
    "simulate",
    "token_ring_attention",
]
_HOMES: dict[str, str | None] = {
    **dict.fromkeys(("Coordinator", "ElasticTrainer"), ".elastic"),
    **dict.fromkeys(("GPipe", "Pop", "Stash"), ".gpipe"),
    **dict.fromkeys(("KeyedDropout", "keyed_uniform", "random_key"), ".keyed_random"),
    "MessageLog": ".messages",
    "SavedBytes": ".saved_bytes",
    **dict.fromkeys(("Durations", "Timeline", "simulate"), ".simulation"),
    **dict.fromkeys(("Communicator", "DiLoCo", "Master", "PeerLost", "SharedState"), ".pccl"),
    **dict.fromkeys(("LayerCost", "Plan", "plan"), ".plans"),
    **dict.fromkeys(("Partition", "partition"), ".partitions"),
    **dict.fromkeys(
        (
            "ContextParallel",
            "context_parallel_attention",
            "plan_attention",
            "ring_attention",
            "token_ring_attention",
        ),
        ".ring",
    ),
    **dict.fromkeys(("SCHEDULES", "Schedule", "Slot", "schedule"), ".schedules"),
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
