"""Adapters of experts: the experts of one layer in a pass with adapters, those of a row's mixture with what it adds to their matrices."""
# Shapes: N items, M items of one mixture, R routed rows, D width, Z what the first matrix gives

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.lm.decoder import Decoder
from anabranch.nn import ExpertPool, MoE
from anabranch.nn.activation import activation_of
from anabranch.nn.expert_call import WeightOn
from anabranch.nn.quantize import QuantizedPool
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import combine, dispatch, plan_dispatch
from anabranch.serving.engine.adapter_parts import PartRows
from anabranch.serving.engine.pass_adapters import PassAdapters, of_items

__all__ = ["AdaptingExperts", "adaptable_pools"]


def adaptable_pools(model: Decoder) -> Iterator[tuple[str, "AdaptingExperts"]]:
    """(name, what stands in its place) of each pool of experts whose matrices are all here and nothing else."""
    for name, pool in model.named_modules():
        is_plain = isinstance(pool, ExpertPool) and pool.layers is None and pool.b13 is None and pool.exchange is None
        owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
        is_few = isinstance(pool, QuantizedPool) and pool.is_plain
        if (is_plain or is_few) and isinstance(owner, MoE):
            yield name, AdaptingExperts(pool, name)


class AdaptingExperts(nn.Module):
    """Experts, and for rows whose adapters have parts of them, experts with these.

    Args:
        pool: an `ExpertPool` of plain matrices, or a `QuantizedPool`.
        name: of it in the model.
    """

    def __init__(self, pool: Any, name: str) -> None:
        super().__init__()
        self.pool, self.name = pool, name
        activation = activation_of(getattr(pool, "activation", "swiglu"))
        self._apply_to, self._rows = activation.apply, activation.rows(pool.hidden_dim)

    @property
    def parts(self) -> list[str]:
        """Names of the parts of all experts' matrices."""
        parts = (*self._rows, "down")
        return [f"{self.name}.{expert}.{part}" for expert in range(self.pool.num_experts) for part in parts]

    def forward(self, x_ND: Tensor, routing: Routing, *, weight_on: WeightOn = "output", context: Any = None) -> Tensor:
        """y_ND, as of the pool."""
        adapters, index = of_items(context, len(x_ND))
        own = [group for group in adapters.groups(index) if adapters.adapts_experts(group[0], self.name)]
        if len(own) == 1 and own[0][1] is None:
            return self._of_mixture(adapters, own[0][0], x_ND, routing, weight_on == "input")
        y_ND = self.pool(x_ND, routing, weight_on=weight_on, context=context)
        for number, row_M in own:
            parts = (routing.index_NK[row_M], routing.weight_NK[row_M], routing.score_NE[row_M])
            made_MD = self._of_mixture(adapters, number, x_ND[row_M], Routing(*parts), weight_on == "input")
            y_ND[row_M] = made_MD.to(y_ND.dtype)
        return y_ND

    def _of_mixture(
        self, adapters: PassAdapters, number: int, x_MD: Tensor, routing: Routing, on_input: bool
    ) -> Tensor:
        """y_MD of rows that all have this mixture, expert by expert."""
        plan = plan_dispatch(routing)
        rows_RD = dispatch(x_MD, plan, routing.weight_NK if on_input else None)
        made, start = [], 0
        for expert, end in enumerate(plan.offset_E.tolist()):
            if end > start:
                made.append(self._expert(adapters, number, expert, rows_RD[start:end]))
            start = end
        # Of unused choices.
        made.append(rows_RD.new_zeros(len(rows_RD) - start, x_MD.shape[1]))
        return combine(torch.cat(made), plan, None if on_input else routing.weight_NK)

    def _expert(self, adapters: PassAdapters, number: int, expert: int, x_RD: Tensor) -> Tensor:
        name = f"{self.name}.{expert}"
        z_RZ = self._product(0, expert, x_RD, self._rows, adapters, number, name)
        a_RF = self._apply_to(z_RZ)
        return self._product(1, expert, a_RF, {"down": x_RD.shape[1]}, adapters, number, name)

    def _product(
        self,
        side: int,
        expert: int,
        x: Tensor,
        rows: Mapping[str, int],
        adapters: PassAdapters,
        number: int,
        name: str,
    ) -> Tensor:
        """What the first or the second matrix of an expert makes of x, with what the mixture adds to its parts."""
        y = self._matrix(side, expert, x)
        start = 0
        for part, size in rows.items():
            of_part = y[:, start : start + size]
            delta = adapters.delta(number, f"{name}.{part}", PartRows(x))
            if delta is not None:
                of_part += delta.to(y.dtype)
            start += size
        return y

    def _matrix(self, side: int, expert: int, x: Tensor) -> Tensor:
        if isinstance(self.pool, QuantizedPool):
            return self.pool.packed[side].expert(expert).linear(x)
        return F.linear(x, self.pool.stacks[side][expert])
