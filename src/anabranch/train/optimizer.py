"""AdamW, or GaLore, over the right groups of parameters, and its state as named tensors."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from anabranch.errors import CheckpointError, ConfigError
from anabranch.routing import Router
from anabranch.train.config import RunConfig, TaskRunConfig, TrainConfig
from anabranch.train.galore import GaLore


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
) -> torch.optim.AdamW | GaLore:
    """AdamW, fused, or GaLore, as ``config.optimizer`` says. Decays matrices and stacks of them; the config says whether routers and the
    embedding are among them.

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
    if config.optimizer == "galore":
        return GaLore(
            made,
            projected=_projected(model),
            rank=config.galore_rank,
            every=config.galore_every,
            scale=config.galore_scale,
            betas=config.betas,
            eps=config.eps,
        )
    return torch.optim.AdamW(made, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def _projected(model: nn.Module) -> set[int]:
    """The parameters whose gradients GaLore projects, by id: not those of embeddings, heads and routers."""
    others = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | Router) or name.rpartition(".")[2] == "head"
        for parameter in module.parameters()
    }
    return {id(parameter) for parameter in model.parameters()} - others


def check_whole(config: RunConfig | TaskRunConfig) -> None:
    """Raise ConfigError where other settings do not go with an optimizer that moves parameters which are whole in each process."""
    train, parallel = config.train, config.parallel
    if train.optimizer == "adamw":
        return
    beside = {
        "train.parallel is fsdp": train.parallel == "fsdp",
        "parallel.experts is set": parallel.experts > 1,
        "parallel.context is set": parallel.context > 1,
        "parallel.pipeline is set": parallel.pipeline > 1,
        "parallel.exact is set": parallel.exact is not None,
        "parallel.elastic.coordinator is set": parallel.elastic.coordinator is not None,
    }
    if refused := [said for said, is_so in beside.items() if is_so]:
        raise ConfigError(
            f"train.optimizer is {train.optimizer}, and {refused[0]}; it moves whole parameters, so use one process, or replicas (ddp)"
        )


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
        wanted = None if parameter is None else parameter.shape
        if parameter is not None and isinstance(optimizer, GaLore):
            wanted = torch.Size(optimizer.shape_of(parameter, moment))
        if parameter is None or (value.dim() and value.shape != wanted):
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
    if value.shape == parameter.shape and value.stride() != parameter.stride():
        # AdamW, fused, goes over weights and moments in the order in which they lie in memory, which files do not keep.
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value
