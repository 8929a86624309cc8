"""Expert parallelism: each process holds E / P of a pool's experts, and rows travel to their experts and back.

    pool = ExpertParallel(pool, group)          # keeps this process's experts of the full pool
    y_ND = pool(x_ND, routing)                  # each process with its own items, routed over all E experts

How many rows go where is exchanged first (all-to-all of counts), then the rows themselves (all-to-all with uneven splits);
each process runs its experts on what it received, and the same exchange backwards brings the results home (GShard,
arXiv 2006.16668; dropless as in MegaBlocks, arXiv 2211.15841). The backward pass runs the exchanges in reverse.

The experts' gradients sum over the items of all processes, so they must not be reduced again: see `owned_parameters`.
"""
# Shapes: N items here, E experts of all processes, P processes, L = E / P experts here, M rows received, K places, D width

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.nn.pool import ExpertPool
from anabranch.precision import autocast_dtype
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import combine, plan_dispatch

__all__ = ["ExpertParallel", "owned_parameters"]


class ExpertParallel(nn.Module):
    """This process's share of an `ExpertPool`, called like the whole one. Every process of the group must call it together.

    Args:
        pool: the full pool, equal on every process; only this process's experts are kept.
        group: the processes that share the experts; all of them if None.
        average_gradients: divide the experts' gradients by the number of processes, as data parallel training divides
            those it reduces. Then each is the gradient of the mean of the processes' losses, otherwise of their sum.

    Attributes:
        experts: an `ExpertPool` of E / P experts: ``rank * E / P`` up to ``(rank + 1) * E / P`` of the full one.

    Raises:
        ConfigError: the number of processes does not divide the number of experts.
    """

    def __init__(
        self, pool: ExpertPool, group: dist.ProcessGroup | None = None, *, average_gradients: bool = False
    ) -> None:
        super().__init__()
        self.group = group
        self.size, rank = dist.get_world_size(group), dist.get_rank(group)
        if pool.num_experts % self.size:
            raise ConfigError(
                f"{pool.num_experts} experts cannot be split over {self.size} processes; "
                f"use a number of processes that divides {pool.num_experts}"
            )
        self.num_experts = pool.num_experts
        local = pool.num_experts // self.size
        options = {"recompute": pool.recompute, "backend": pool.backend, "is_shared": pool.is_shared}
        self.experts = ExpertPool(local, pool.dim, pool.hidden_dim, device="meta", **options)  # type: ignore[arg-type]
        for name in ("w13", "w2"):
            kept = getattr(pool, name).detach()[rank * local : (rank + 1) * local].clone()
            weight = nn.Parameter(kept, requires_grad=getattr(pool, name).requires_grad)
            if average_gradients and weight.requires_grad:
                weight.register_hook(lambda gradient: gradient / self.size)
            setattr(self.experts, name, weight)

    def forward(
        self,
        x_ND: Tensor,
        routing: Routing,
        *,
        weight_on: Literal["output", "input"] = "output",
        context: RoutingContext | None = None,
    ) -> Tensor:
        """y_ND: each item's experts, weighted and summed, wherever they are."""
        plan = plan_dispatch(routing)
        x_ND = x_ND.to(autocast_dtype(x_ND.device.type) or x_ND.dtype)  # before it travels
        place_R = plan.place_R[: int(plan.offset_E[-1])]
        rows_RD = x_ND[place_R // plan.num_places]
        if weight_on == "input":
            rows_RD = rows_RD * routing.weight_NK.reshape(-1)[place_R].unsqueeze(-1).to(rows_RD.dtype)
        send_PL = plan.load_E.long().view(self.size, -1)
        receive_PL = torch.empty_like(send_PL)
        dist.all_to_all_single(receive_PL, send_PL, group=self.group)
        send, receive = send_PL.sum(1).tolist(), receive_PL.sum(1).tolist()

        rows_MD = _Exchange.apply(rows_RD, send, receive, self.group)
        y_RD = _Exchange.apply(
            self.experts(rows_MD, _local_routing(receive_PL), context=context), receive, send, self.group
        )

        y_RD = F.pad(y_RD, (0, 0, 0, plan.place_R.shape[0] - place_R.shape[0]))
        return combine(y_RD, plan, None if weight_on == "input" else routing.weight_NK)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"num_experts={self.num_experts}, processes={self.size}"


def owned_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that live on one process only: data parallel training must leave them alone.

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, owned_parameters(model))
    """
    return [
        f"{name}.{inner}" if name else inner
        for name, module in model.named_modules()
        if isinstance(module, ExpertParallel)
        for inner, _ in module.named_parameters()
    ]


def _local_routing(receive_PL: Tensor) -> Routing:
    """Received rows stand by sender, then by expert; each is an item that goes to one expert here."""
    senders, local = receive_PL.shape
    expert_PL = torch.arange(local, device=receive_PL.device).expand(senders, local)
    index_M1 = torch.repeat_interleave(expert_PL.reshape(-1), receive_PL.reshape(-1)).unsqueeze(-1)
    ones_M1 = torch.ones_like(index_M1, dtype=torch.float32)
    return Routing(index_M1, ones_M1, ones_M1.expand(-1, local))


class _Exchange(torch.autograd.Function):
    """All-to-all of rows with uneven splits; its gradient travels the other way."""

    @staticmethod
    def forward(ctx, rows_RD, send, receive, group):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows_RD, send, receive, group)

    @staticmethod
    def backward(ctx, gradient_MD):
        return _Exchange.apply(gradient_MD, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    rows_MD = rows_RD.new_empty(sum(receive), rows_RD.shape[1])
    dist.all_to_all_single(rows_MD, rows_RD.contiguous(), receive, send, group=group)
    return rows_MD
