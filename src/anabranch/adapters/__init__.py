"""Adapters: a task is served by few numbers beside the matrices of a model that stays as it is."""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.adapters.algebra import Combined, combine
from anabranch.adapters.attach import load_peft, unload
from anabranch.adapters.low_rank import LowRank, Pair
from anabranch.adapters.merging import merge, unmerge
from anabranch.adapters.peft_folder import Adapter, read_peft, write_peft
from anabranch.adapters.pool import LowRankPool
from anabranch.adapters.pooled import load_pool, rows_for
from anabranch.adapters.routed import RoutedLowRank, chosen_rows
from anabranch.adapters.saving import adapter_of, save_peft

__all__ = [
    "Adapter",
    "Combined",
    "LowRank",
    "LowRankPool",
    "Pair",
    "RoutedLowRank",
    "adapter_of",
    "chosen_rows",
    "combine",
    "load_peft",
    "load_pool",
    "merge",
    "read_peft",
    "rows_for",
    "save_peft",
    "unload",
    "unmerge",
    "write_peft",
]
