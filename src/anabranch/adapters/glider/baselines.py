"""What GLIDER is held against: one adapter of all, whose mean is factored again. Retrieval is `GliderPool.retrieve` with `rows_for`, mean
activations are gates (`mean_activations`), clusters of experts `merge_clusters` and ``GliderConfig(clusters=...)``."""

from collections.abc import Sequence
from pathlib import Path

from anabranch.adapters.algebra import Combined, combine
from anabranch.adapters.peft_folder import read_peft
from anabranch.errors import ConfigError

__all__ = ["merged_experts"]


def merged_experts(folders: Sequence[str | Path], *, rank: int | None = None) -> Combined:
    """The mean of ``scale B A`` over the experts, cut to ``rank`` by singular values; None for the greatest rank of theirs.

    Raises as `combine`, ConfigError for none.
    """
    if not folders:
        raise ConfigError("there are no experts to merge; give at least one folder")
    adapters = [read_peft(folder) for folder in folders]
    return combine(adapters, [1 / len(adapters)] * len(adapters), "svd", rank=rank)
