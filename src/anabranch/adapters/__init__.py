"""Adapters: a task is served by few numbers beside the matrices of a model that stays as it is."""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.adapters.algebra import Combined, combine
from anabranch.adapters.attach import (
    adapter_of,
    load_peft,
    load_pool,
    merge,
    rows_for,
    save_peft,
    unload,
    unmerge,
)
from anabranch.adapters.low_rank import LowRank, Pair
from anabranch.adapters.peft_folder import Adapter, read_peft, write_peft
from anabranch.adapters.pool import LowRankPool
from anabranch.adapters.routed import RoutedLowRank, chosen_rows

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
