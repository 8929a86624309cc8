"""Expert parallelism: each process keeps E / P of a pool's experts, and rows travel to their experts and back.

    mesh = expert_mesh("cpu", 2)                # all processes, in groups of 2 that share experts
    shard_experts(pool, mesh)                   # the pool keeps this process's experts; it is called as ever
    y_ND = pool(x_ND, routing)                  # each process with its own items, routed over all E experts

How many rows go where is exchanged first (all-to-all of counts), then the rows themselves (all-to-all with uneven splits);
each process runs its experts on what it received, and the same exchange backwards brings the results home (GShard,
arXiv 2006.16668; dropless as in MegaBlocks, arXiv 2211.15841). The backward pass runs the exchanges in reverse.

The stacked weights become DTensors, of which each process holds its experts: their names, and what they are as a whole, stay. Their
gradients sum over the items of all processes and are averaged here, so data parallel training must leave them alone
(`sharded_parameters`).
"""
# Shapes: N items here, E experts of all processes, P processes of a group, M rows received, K choices, D width

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from anabranch.errors import ConfigError
from anabranch.nn.pool import ExpertPool
from anabranch.precision import autocast_dtype
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import combine, plan_dispatch, weigh

__all__ = ["ExpertExchange", "expert_mesh", "shard_experts", "sharded_parameters"]

Compute = Callable[[Tensor, Routing], Tensor]


def expert_mesh(device_type: str, size: int, stages: int = 1) -> DeviceMesh:
    """All processes in groups of ``size`` that share experts: dimensions ``replicas`` and ``experts``.

    Where every ``stages`` neighbours in rank have the layers of a model between them, it is of the processes with the same layers.

    Raises ConfigError unless ``size`` divides the number of those.
    """
    world = dist.get_world_size() // stages
    if world % size:
        raise ConfigError(
            f"experts are to be shared by {size} processes, and there are {world}; use a number that divides {world}"
        )
    names = ("replicas", "experts")
    if stages == 1:
        return init_device_mesh(device_type, (world // size, size), mesh_dim_names=names)
    return init_device_mesh(device_type, (world // size, size, stages), mesh_dim_names=(*names, "pipeline"))[names]


def shard_experts(pool: ExpertPool, mesh: DeviceMesh, *, average_gradients: bool = True) -> None:
    """Keep this process's experts of a pool that is equal on every process; all processes must then call it together.

    Args:
        pool: is changed in place.
        mesh: of `expert_mesh`.
        average_gradients: divide the experts' gradients by the number of processes, as data parallel training divides those it reduces.
            Then each is the gradient of the mean of the processes' losses, otherwise of their sum.

    Raises ConfigError if the processes of a group do not divide the experts, or experts have layers of their own.
    """
    size, rank = mesh["experts"].size(), mesh["experts"].get_local_rank()
    if pool.layers is not None:
        raise ConfigError(
            "experts have layers of their own (linears names parts of them), so they are not spread over processes; use parallel.experts=1"
        )
    if pool.num_experts % size:
        raise ConfigError(
            f"{pool.num_experts} experts cannot be split over {size} processes; "
            f"use a number of processes that divides {pool.num_experts}"
        )
    local = pool.num_experts // size
    for name in ("w13", "w2"):
        weight = getattr(pool, name)
        kept = weight.detach()[rank * local : (rank + 1) * local].clone()
        spread = DTensor.from_local(kept, mesh, [Replicate(), Shard(0)], run_check=False)
        setattr(pool, name, nn.Parameter(spread, requires_grad=weight.requires_grad))
    pool.exchange = ExpertExchange(mesh, mesh.size() if average_gradients else 1)


def sharded_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of which each process holds a part: data parallel training must leave them alone.

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded_parameters(model))
    """
    return [
        f"{name}.{inner}" if name else inner
        for name, module in model.named_modules()
        if isinstance(module, ExpertPool) and module.exchange is not None
        for inner, _ in module.named_parameters()
    ]


class ExpertExchange:
    """How the rows of a pool come to the experts of other processes, and home.

    Args:
        mesh: of `expert_mesh`.
        divisor: of the weights' gradients, which are summed over all processes.
    """

    def __init__(self, mesh: DeviceMesh, divisor: int) -> None:
        self.group, self.size = mesh["experts"].get_group(), mesh["experts"].size()
        self.replicas = mesh["replicas"].get_group() if mesh["replicas"].size() > 1 else None
        self.divisor = divisor

    def local(self, weight: Any) -> Tensor:
        """This process's part of a weight; its gradient is that of all processes."""
        return _Summed.apply(weight.to_local(), self.replicas, self.divisor)

    def __call__(self, compute: Compute, x_ND: Tensor, routing: Routing, *, on_input: bool) -> Tensor:
        """y_ND: each item's experts, weighted and summed, wherever they are; ``compute`` is of the experts here."""
        plan = plan_dispatch(routing)
        # Before it travels.
        x_ND = x_ND.to(autocast_dtype(x_ND.device.type) or x_ND.dtype)
        choice_R = plan.choice_R[: int(plan.offset_E[-1])]
        rows_RD = x_ND[choice_R // plan.num_choices]
        if on_input:
            rows_RD = weigh(rows_RD, routing.weight_NK, choice_R)
        send_PL = plan.load_E.long().view(self.size, -1)
        receive_PL = torch.empty_like(send_PL)
        dist.all_to_all_single(receive_PL, send_PL, group=self.group)
        send, receive = send_PL.sum(1).tolist(), receive_PL.sum(1).tolist()

        rows_MD = _Exchange.apply(rows_RD, send, receive, self.group)
        y_RD = _Exchange.apply(compute(rows_MD, _local_routing(receive_PL)), receive, send, self.group)

        y_RD = F.pad(y_RD, (0, 0, 0, plan.choice_R.shape[0] - choice_R.shape[0]))
        return combine(y_RD, plan, None if on_input else routing.weight_NK)


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


class _Summed(torch.autograd.Function):
    """A weight as it is; its gradient is summed over the processes that hold the same experts, and divided."""

    @staticmethod
    def forward(ctx, weight, replicas, divisor):
        ctx.replicas, ctx.divisor = replicas, divisor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.replicas is not None:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=ctx.replicas)
        return gradient / ctx.divisor, None, None


def _all_to_all(rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    rows_MD = rows_RD.new_empty(sum(receive), rows_RD.shape[1])
    dist.all_to_all_single(rows_MD, rows_RD.contiguous(), receive, send, group=group)
    return rows_MD
