"""Adapters: a task is served by few numbers beside the matrices of a model that stays as it is."""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.adapters.algebra import Combined, combine
from anabranch.adapters.attach import adapter_of, load_peft, merge, save_peft, unload, unmerge
from anabranch.adapters.low_rank import LowRank, Pair
from anabranch.adapters.peft_folder import Adapter, read_peft, write_peft
from anabranch.adapters.pool import LowRankPool

__all__ = [
    "Adapter",
    "Combined",
    "LowRank",
    "LowRankPool",
    "Pair",
    "adapter_of",
    "combine",
    "load_peft",
    "merge",
    "read_peft",
    "save_peft",
    "unload",
    "unmerge",
    "write_peft",
]
