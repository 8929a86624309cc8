"""AdamW over the right groups of parameters, and its state as named tensors."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from anabranch.errors import CheckpointError
from anabranch.routing import Router
from anabranch.train.config import TrainConfig


@dataclass(frozen=True)
class Speed:
    """How a parameter learns, where not as all others.

    Attributes:
        factor: times the learning rate.
        weight_decay: its own; None as the config says.
    """

    factor: float = 1.0
    weight_decay: float | None = None


# In a group of the optimizer: times the learning rate.
FACTOR = "factor"


def make_optimizer(
    model: nn.Module, config: TrainConfig, speed: Callable[[str, nn.Parameter], Speed | None] | None = None
) -> torch.optim.AdamW:
    """AdamW, fused. Decays matrices and stacks of them; the config says whether routers and the embedding are among them.

    ``speed`` says of a parameter by its name whether it learns otherwise. The groups carry the factor of their learning rate as
    ``factor``, and whoever sets rates multiplies by it.
    """
    spared = {id(parameter) for parameter in _spared(model, config)}
    # In this order, so that a run without speeds has the groups that it always had.
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, config.weight_decay): []}
    groups.setdefault((1.0, 0.0), [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = (speed(name, parameter) if speed is not None else None) or Speed()
            decay = 0.0 if parameter.dim() < 2 or id(parameter) in spared else config.weight_decay
            decay = decay if own.weight_decay is None else own.weight_decay
            groups.setdefault((own.factor, decay), []).append(parameter)
    made = [
        {"params": alike, "weight_decay": decay, "lr": config.learning_rate * factor, FACTOR: factor}
        for (factor, decay), parameters in groups.items()
        for alike in by_layout(parameters)
    ]
    return torch.optim.AdamW(made, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def _spared(model: nn.Module, config: TrainConfig) -> Iterable[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.Embedding) and not config.embedding_weight_decay:
            yield from module.parameters()
        if isinstance(module, Router) and not config.router_weight_decay:
            yield from module.parameters()


def by_layout(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """``tensors`` in groups that one call of torch can go over together: those that are whole, and those in parts, by who holds them."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def full_tensor(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or all of it where each rank holds a shard (a collective call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """The optimizer's state as ``{"parameter name/moment": tensor}``; with shards a collective call, kept where ``keep``."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for moment, value in sorted(optimizer.state.get(parameter, {}).items()):
            value = full_tensor(value)
            if keep:
                tensors[f"{name}/{moment}"] = value
    return tensors


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; where parameters are sharded, so is their state.

    Raises CheckpointError for state of parameters that the model does not have, or of another shape.
    """
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is not None and parameter.shape == (1,) and moment != "step":
            # A single number was stored without an axis by earlier versions.
            value = value.reshape(-1)
        if parameter is None or (value.dim() and value.shape != parameter.shape):
            raise CheckpointError(
                f"the optimizer state has {key} {list(value.shape)}, which fits no parameter of the model"
            )
        # Where another stage of the model learns it, its moments are there.
        if parameter.requires_grad:
            optimizer.state[parameter][moment] = _like(value, parameter)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    value = value.to(parameter.device)
    if value.dim() and isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
