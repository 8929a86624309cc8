"""`OffloadedPool`: stands where an `ExpertPool` stood, computes the same, and owns no weights."""
# Shapes: N items, K places, E experts, P = N K places in a row, R places of a wave, S slots, D width, F hidden

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.nn.grouped import expert_mlp
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import plan_dispatch
from anabranch.serving.expertflow.arena import Arena

Waves = Callable[[int, Tensor, Routing, RoutingContext | None], Any]


class OffloadedPool(nn.Module):
    """Experts of a layer that come when they are wanted; for inference.

    Args:
        layer: number among the routed layers.
        num_experts, dim, hidden_dim, backend: as the pool that it replaces.
        kind: of its experts in the arena.
        arena: the slots.
        waves: yields {expert: slot} of what can run, until all that the routing wants has run.
    """

    def __init__(
        self,
        layer: int,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        backend: str,
        kind: int,
        arena: Arena,
        waves: Waves,
    ) -> None:
        super().__init__()
        self.layer, self.num_experts, self.dim, self.hidden_dim = layer, num_experts, dim, hidden_dim
        self.backend, self.kind, self.arena, self._waves = backend, kind, arena, waves
        self.is_shared = False

    @torch.compiler.disable
    def forward(
        self,
        x_ND: Tensor,
        routing: Routing,
        *,
        weight_on: Literal["output", "input"] = "output",
        context: RoutingContext | None = None,
    ) -> Tensor:
        """y_ND as `ExpertPool`'s; it does not depend on what was in slots before.

        Each place is computed as a row of its own and the rows of an item are added in the order of its places, in float32, so that it
        does not matter in which waves they came.

        Raises ConfigError where gradients are wanted, DataError if an expert cannot be loaded.
        """
        if torch.is_grad_enabled() and (x_ND.requires_grad or routing.weight_NK.requires_grad):
            raise ConfigError("offloaded experts cannot be trained; run under torch.inference_mode() or no_grad()")
        index_P = routing.index_NK.reshape(-1)
        num_items, num_places = routing.index_NK.shape
        rows_PD: Tensor | None = None
        for slot_of in self._waves(self.layer, x_ND, routing, context):
            slot_E = torch.full((self.num_experts + 1,), -1, dtype=torch.int64)  # the last is that of unused places
            slot_E[list(slot_of)] = torch.tensor(list(slot_of.values()))
            slot_P = slot_E.to(index_P.device)[index_P]
            place_R = (slot_P >= 0).nonzero().squeeze(1)
            rows_RD = self._run(
                x_ND[place_R // num_places], slot_P[place_R], routing.weight_NK.reshape(-1)[place_R], weight_on
            )
            if rows_PD is None:
                rows_PD = rows_RD.new_zeros(num_items * num_places, self.dim)
            rows_PD[place_R] = rows_RD
            self.arena.mark_used(self.kind, list(slot_of.values()))
        if rows_PD is None:
            return torch.zeros_like(x_ND)
        rows_NKD = rows_PD.view(num_items, num_places, self.dim)
        total_ND = rows_NKD[:, 0].to(torch.promote_types(rows_PD.dtype, torch.float32))
        for place in range(1, num_places):
            total_ND = total_ND + rows_NKD[:, place]
        return total_ND.to(rows_PD.dtype)

    def _run(self, x_RD: Tensor, slot_R: Tensor, weight_R: Tensor, weight_on: Literal["output", "input"]) -> Tensor:
        w13_SFD, w2_SDF = self.arena.w13_SFD[self.kind], self.arena.w2_SDF[self.kind]
        slot_R1, weight_R1 = slot_R.unsqueeze(1), weight_R.unsqueeze(1)
        no_scores = x_RD.new_empty(1, 1).expand(len(x_RD), len(w13_SFD))
        plan = plan_dispatch(Routing(slot_R1, weight_R1, no_scores))
        return expert_mlp(x_RD, plan, weight_R1, w13_SFD, w2_SDF, weight_on=weight_on, backend=self.backend)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"num_experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, offloaded"
