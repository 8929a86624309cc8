"""PCCL: collectives over ordinary TCP whose peers come and go (arXiv 2505.14065).

from anabranch.cluster.pccl import Communicator, Master, SharedState

Master("0.0.0.0:48148").run()                           # one process, somewhere: anabranch cluster master

with Communicator("10.0.0.1:48148") as peers:           # on every machine, at any time
    peers.admit()
    peers.all_reduce(gradient, op="avg")
"""

from typing import TYPE_CHECKING

from anabranch.extras import lazy

if TYPE_CHECKING:
    from anabranch.cluster.pccl.communicator import Communicator, Reduced, Reduction
    from anabranch.cluster.pccl.diloco import DiLoCo, Round
    from anabranch.cluster.pccl.faults import (
        CollectiveError,
        Kicked,
        MasterLost,
        Mismatch,
        PeerLost,
        Refused,
        RevisionError,
        TagInUse,
        TopologyFailed,
    )
    from anabranch.cluster.pccl.master import Master
    from anabranch.cluster.pccl.quantise import Quantiser
    from anabranch.cluster.pccl.sharing import Shared, SharedState
    from anabranch.cluster.pccl.tours import best_tour

__all__ = [
    "CollectiveError",
    "Communicator",
    "DiLoCo",
    "Kicked",
    "Master",
    "MasterLost",
    "Mismatch",
    "PeerLost",
    "Quantiser",
    "Reduced",
    "Reduction",
    "Refused",
    "RevisionError",
    "Round",
    "Shared",
    "SharedState",
    "TagInUse",
    "TopologyFailed",
    "best_tour",
]
_HOMES: dict[str, str | None] = {
    **dict.fromkeys(("Communicator", "Reduced", "Reduction"), ".communicator"),
    **dict.fromkeys(
        (
            "CollectiveError",
            "Kicked",
            "MasterLost",
            "Mismatch",
            "PeerLost",
            "Refused",
            "RevisionError",
            "TagInUse",
            "TopologyFailed",
        ),
        ".faults",
    ),
    **dict.fromkeys(("DiLoCo", "Round"), ".diloco"),
    "Master": ".master",
    "Quantiser": ".quantise",
    **dict.fromkeys(("Shared", "SharedState"), ".sharing"),
    "best_tour": ".tours",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
