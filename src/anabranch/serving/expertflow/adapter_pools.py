"""Adapters of mixtures beside matrices as the experts of a budget: each of a layer's `LowRankPool` is one."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from anabranch.adapters.offloaded import OffloadedLowRank
from anabranch.adapters.pool import LowRankPool
from anabranch.adapters.routed import RoutedLowRank
from anabranch.nn.offloaded import ExpertSlots, Waves
from anabranch.serving.expertflow.arena import Kind
from anabranch.serving.expertflow.pools import Pools

__all__ = ["AdapterPools", "adapter_pools"]


class AdapterPools(Pools):
    """The pools of a model's layers beside its matrices, in the order they run. Nobody predicts what these want."""

    parts: ClassVar[tuple[str, str]] = ("a", "b")
    what: ClassVar[str] = "adapters of a mixture"
    predicts: ClassVar[bool] = False

    def pool_of(self, layer: Any) -> Any:
        """See `Pools`."""
        return layer.pool

    def choices_of(self, layer: Any) -> int:
        """One at a time will do."""
        return 1

    def kind_of(self, pool: LowRankPool) -> Kind:
        """See `Pools`."""
        return Kind(pool.dim, pool.hidden_dim, pool.dtype, out_dim=pool.out_dim)

    def offloaded(self, number: int, slots: ExpertSlots, waves: Waves, is_watched: bool) -> OffloadedLowRank:
        """See `Pools`."""
        return OffloadedLowRank(number, self.pool_of(self.layers[number]), slots, waves)

    def put(self, layer: Any, pool: nn.Module) -> None:
        """See `Pools`."""
        layer.pool = pool


def adapter_pools(model: nn.Module) -> AdapterPools | None:
    """Those of a model; None for one that has no mixture of adapters."""
    layers: Sequence[Any] = [
        module for module in model.modules() if isinstance(module, RoutedLowRank) and type(module.pool) is LowRankPool
    ]
    return AdapterPools(layers) if layers else None
