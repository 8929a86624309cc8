"""Adapters: a task is served by few numbers beside the matrices of a model that stays as it is."""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.adapters.after import ScaleShift, SerialBottleneck
from anabranch.adapters.algebra import Combined, combine
from anabranch.adapters.attach import load_peft, unload
from anabranch.adapters.bottleneck import Bottleneck
from anabranch.adapters.dora import Dora
from anabranch.adapters.dynmole import DynMoLE, lora_moe, mola
from anabranch.adapters.export import Exported, export_mixture
from anabranch.adapters.fresh import BESIDE as _BESIDE  # noqa: F401 - registers the recipe
from anabranch.adapters.front import Front
from anabranch.adapters.hashed_delta import HashedDelta
from anabranch.adapters.lora_mixer import (
    Labelled,
    MixedLowRank,
    MixtureTask,
    SoftThenTopK,
    SpecialisationLoss,
    fit_joint,
    fit_router,
    labelled_rows,
    load_fitted,
    load_mixture,
)
from anabranch.adapters.low_rank import LowRank, Pair
from anabranch.adapters.merging import merge, unmerge
from anabranch.adapters.mixture_report import MixtureReport, mixture_report
from anabranch.adapters.nested import NestedLowRank
from anabranch.adapters.peft_folder import Adapter, read_peft, write_peft
from anabranch.adapters.pool import LowRankPool
from anabranch.adapters.pooled import load_pool, rows_for
from anabranch.adapters.routed import RoutedLowRank, chosen_rows
from anabranch.adapters.saving import adapter_of, save_peft
from anabranch.adapters.scaling import Scaling
from anabranch.adapters.skills import SkilledLowRank
from anabranch.adapters.sparse_delta import SparseDelta
from anabranch.adapters.static import mu, static_mixture

__all__ = [
    "Adapter",
    "Bottleneck",
    "Combined",
    "Dora",
    "DynMoLE",
    "Exported",
    "Front",
    "HashedDelta",
    "Labelled",
    "LowRank",
    "LowRankPool",
    "MixedLowRank",
    "MixtureReport",
    "MixtureTask",
    "NestedLowRank",
    "Pair",
    "RoutedLowRank",
    "ScaleShift",
    "Scaling",
    "SerialBottleneck",
    "SkilledLowRank",
    "SoftThenTopK",
    "SparseDelta",
    "SpecialisationLoss",
    "adapter_of",
    "chosen_rows",
    "combine",
    "export_mixture",
    "fit_joint",
    "fit_router",
    "labelled_rows",
    "load_fitted",
    "load_mixture",
    "load_peft",
    "load_pool",
    "lora_moe",
    "merge",
    "mixture_report",
    "mola",
    "mu",
    "read_peft",
    "rows_for",
    "save_peft",
    "static_mixture",
    "unload",
    "unmerge",
    "write_peft",
]
