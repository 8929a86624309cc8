"""VersatileFFN: one feed-forward reused wide and deep, mixed by the difficulty of each token."""

from anabranch.experts.versatile.convert import (
    VersatileMLP,
    collect_routing,
    follow_steps,
    from_dense,
    patch_model,
    to_dense,
    unpatch,
)
from anabranch.experts.versatile.layer import VersatileFFN
from anabranch.experts.versatile.paths import Branch, LoopGate, Paths, record_difficulty

__all__ = [
    "Branch",
    "LoopGate",
    "Paths",
    "VersatileFFN",
    "VersatileMLP",
    "collect_routing",
    "follow_steps",
    "from_dense",
    "patch_model",
    "record_difficulty",
    "to_dense",
    "unpatch",
]
