"""VersatileFFN: one feed-forward reused wide and deep, mixed by the difficulty of each token."""

from anabranch.experts.versatile.branch import Branch
from anabranch.experts.versatile.convert import (
    VersatileMLP,
    collect_routing,
    from_dense,
    patch_model,
    to_dense,
    unpatch,
)
from anabranch.experts.versatile.layer import VersatileFFN
from anabranch.experts.versatile.loop_gate import LoopGate, loop_gates, record_difficulty
from anabranch.experts.versatile.patched import PatchedModel
from anabranch.experts.versatile.paths import Paths
from anabranch.train import follow_steps

__all__ = [
    "Branch",
    "LoopGate",
    "PatchedModel",
    "Paths",
    "VersatileFFN",
    "VersatileMLP",
    "collect_routing",
    "follow_steps",
    "from_dense",
    "loop_gates",
    "patch_model",
    "record_difficulty",
    "to_dense",
    "unpatch",
]
