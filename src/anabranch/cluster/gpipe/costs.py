"""What each layer of a sequential model costs: parameters, operations, measured time, memory."""

import copy
import time
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from anabranch.cluster.gpipe.micro_batches import map_tensors, tensors_of
from anabranch.cluster.gpipe.skips import Area
from anabranch.errors import InputError

__all__ = ["By", "layer_costs"]

By = Literal["parameters", "flops", "time", "size"]


def layer_costs(
    model: nn.Sequential, by: By, sample: Any = None, *, budget_s: float = 1.0, param_scale: float = 2.0
) -> list[float]:
    """The cost of each layer, in the unit of ``by``.

    Args:
        model: is left as it is: what runs is a copy of each layer.
        by: ``parameters``, their number, which needs no sample; ``flops`` of a forward; ``time`` in seconds of forward and backward; or
            ``size`` in bytes, the output's and ``param_scale`` times the parameters'.
        sample: a micro-batch.
        budget_s: for which time is measured, all layers together.
        param_scale: copies of a parameter in memory: 2 with its gradient, 4 with the state of Adam.

    Raises InputError without a sample where one is needed, and for another ``by``.
    """
    if by == "parameters":
        # A layer without any is still one to go through.
        return [1.0 + sum(parameter.numel() for parameter in layer.parameters()) for layer in model]
    if by not in ("flops", "time", "size"):
        raise InputError(f"balance is {by!r}; use parameters, flops, time, size, or a list of layers per stage")
    if sample is None:
        raise InputError(f"balance={by!r} runs the layers; give a micro-batch as sample=")
    costs = []
    area = Area()
    with area.here(), torch.random.fork_rng():
        x = map_tensors(sample, lambda tensor: tensor.detach())
        for layer in model:
            own = copy.deepcopy(layer)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                before = dict(area.waiting)
                y = own(x)
            if by == "flops":
                costs.append(1.0 + counter.get_total_flops())
            elif by == "size":
                held = sum(parameter.nbytes for parameter in layer.parameters()) * param_scale
                costs.append(float(held + sum(tensor.nbytes for tensor in tensors_of(y))))
            else:
                after = dict(area.waiting)
                costs.append(_time(own, x, area, before, budget_s / len(model)))
                area.waiting = after
            x = y
    return costs


def _time(layer: nn.Module, x: Any, area: Area, waiting: dict[str, torch.Tensor], budget_s: float) -> float:
    """Median seconds of forward and backward of one layer."""
    taken: list[float] = []
    start = time.perf_counter()
    while not taken or time.perf_counter() - start < budget_s:
        area.waiting = dict(waiting)
        entry = map_tensors(x, lambda t: t.detach().requires_grad_(t.is_floating_point()))
        _synchronize(x)
        begin = time.perf_counter()
        with torch.enable_grad():
            output = layer(entry)
            roots = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
            if roots:
                torch.autograd.backward(roots, [torch.ones_like(tensor) for tensor in roots])
        _synchronize(x)
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[len(taken) // 2]


def _synchronize(x: Any) -> None:
    if any(tensor.is_cuda for tensor in tensors_of(x)):
        torch.cuda.synchronize()
