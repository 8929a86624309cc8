"""A decoder trained in stages: `PipelinedDecoder` is called like the decoder and runs the step of a `GPipe` beneath.

    torchrun --nproc-per-node 4 -m anabranch train tiny --set parallel.pipeline=2      # two pipelines of two stages

A process works through the layers of its stage alone, and keeps the activations of these. Weights are in every process: gradients are
summed over the stages and averaged over pipelines, so that optimizer, clipping, step hooks, checkpoints and evaluations are those of
replicas, and a run goes on in another layout.

Blocks that have a module together (the pool of a ReXMoE group) are one layer here, so no stage begins among them. What blocks emit into
the context goes with what they hand on: losses as sums with their gradients, loads to their balancers once.
"""
# Shapes: B sequences, L positions, D width, V vocabulary

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.cluster import partition
from anabranch.cluster.gpipe import GPipe
from anabranch.cluster.gpipe.chunk import is_recomputing
from anabranch.errors import ConfigError, InputError
from anabranch.lm.decoder import Decoder, DecoderOutput
from anabranch.lm.layers import layer_costs, uncut_groups
from anabranch.nn.context import ForwardContext, set_unregistered
from anabranch.routing import SwitchLoss

__all__ = ["PipelinedDecoder"]

# What goes from layer to layer: x_BLD, the tokens, what designs carry, and what was emitted, each name with its sum and its count.
_Handed = tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, int]]
_METRIC = "metric "


class PipelinedDecoder(nn.Module):
    """A decoder in the stages of a group of processes.

    Args:
        model: in every process, with equal weights.
        group: its processes, in order of stages.
        num_pipelines: groups beside this one, each with a batch of its own.
        micro_batches: M; None for four times the stages, or as many as there are sequences.
        recomputes: do the forward of a stage again in its backward, for all micro-batches but the last.

    Attributes:
        is_last: whether gradients are summed over processes after the next backward.

    Raises ConfigError for a model that cannot be cut so.
    """

    model: Decoder
    pipe: GPipe

    def __init__(
        self,
        model: Decoder,
        group: dist.ProcessGroup,
        num_pipelines: int,
        *,
        micro_batches: int | None,
        recomputes: bool,
    ) -> None:
        super().__init__()
        stages = dist.get_world_size(group)
        self.is_last = True
        self._group, self._num_pipelines = group, num_pipelines
        _check(model, stages)
        layers, balance = _layers(model, stages)
        pipe = GPipe(
            nn.Sequential(*layers),
            micro_batches=4 * stages if micro_batches is None else micro_batches,
            checkpoint="except_last" if recomputes else "never",
            runner="distributed",
            balance=balance,
            devices=[next(model.parameters()).device],
            group=group,
        )
        # Both are the model's, which whoever trains it has already.
        set_unregistered(self, "model", model)
        set_unregistered(self, "pipe", pipe)
        self._terms: list[tuple[float, dict[str, Tensor]]] = []
        self._seed: int | None = None

    def forward(self, token_BL: Tensor, target_BL: Tensor | None = None, **options: Any) -> DecoderOutput:
        """The training loss, of the same batch in all processes of the group; its backward adds gradients to those that are there.

        Raises ConfigError for any other call of a decoder: stages give the loss of a batch, and no logits.
        """
        if target_BL is None or options:
            stages = dist.get_world_size(self._group)
            raise ConfigError(
                f"parallel.pipeline is {stages}, and the task asks the model for more than the loss of tokens and targets; set it to 1"
            )
        self._set_seed()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        self._terms = []
        try:
            value = self.pipe.step(token_BL, target_BL, self._loss)
            found = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
        terms, metrics = self._told(len(token_BL))
        loss = _Step.apply(parameters[0], value.float(), self, found)
        cross_entropy = terms.pop("cross_entropy")
        return DecoderOutput(loss=loss, cross_entropy=cross_entropy, auxiliary=terms, metrics=metrics)

    def _loss(self, output: tuple[Tensor, dict[str, Tensor], dict[str, int]], target_BL: Tensor) -> Tensor:
        logits_BLV, sums, counts = output
        total = F.cross_entropy(
            logits_BLV.flatten(0, 1).float(), target_BL.flatten(), ignore_index=-100, reduction="sum"
        )
        cross_entropy = total / (target_BL != -100).sum().clamp_min(1)
        means = {name: value / counts[name] for name, value in sums.items()}
        auxiliary = [value for name, value in means.items() if not name.startswith(_METRIC)]
        detached = {name: value.detach() for name, value in means.items()}
        self._terms.append((float(len(target_BL)), {"cross_entropy": cross_entropy.detach(), **detached}))
        return sum(auxiliary, start=cross_entropy)

    def _told(self, items: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(terms of the loss, metrics) of the whole batch, which the last stage knows and tells."""
        means: dict[str, float] = {}
        for size, terms in self._terms:
            for name, value in terms.items():
                means[name] = means.get(name, 0.0) + float(value) * size / items
        told: list[Any] = [means]
        last = dist.get_world_size(self._group) - 1
        dist.broadcast_object_list(told, group=self._group, group_src=last)
        device = next(self.model.parameters()).device
        found = {name: torch.tensor(value, device=device) for name, value in told[0].items()}
        metrics = {name.removeprefix(_METRIC): value for name, value in found.items() if name.startswith(_METRIC)}
        return {name: value for name, value in found.items() if not name.startswith(_METRIC)}, metrics

    def _set_seed(self) -> None:
        """What layers draw is a function of torch's seed, which the trainer sets in each step, and of which pass since then this is."""
        seed = torch.initial_seed() & (2**63 - 1)
        if seed != self._seed:
            self._seed, self.pipe.seed, self.pipe.steps = seed, seed, 0

    def add(self, gradients: list[tuple[nn.Parameter, Tensor]], factor: Tensor) -> None:
        """Add a step's gradients, times a factor, to those that are there; after the last micro-batch, over all processes."""
        for parameter, gradient in gradients:
            scaled = gradient * factor.to(gradient.dtype)
            parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled
        if self.is_last:
            self._sum()

    def _sum(self) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # What has no part in the step anywhere has no gradient, which is another thing than one of 0.
        device = parameters[0].device
        has_part = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=device)
        dist.all_reduce(has_part)
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter, has in zip(parameters, has_part.tolist(), strict=True):
            if has:
                by_type.setdefault(parameter.dtype, []).append(parameter)
        for alike in by_type.values():
            flat = torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).reshape(-1) for one in alike])
            dist.all_reduce(flat)
            flat /= self._num_pipelines
            for one, piece in zip(alike, flat.split([one.numel() for one in alike]), strict=True):
                one.grad = piece.view_as(one)


class _Step(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, owner: PipelinedDecoder, found: Any) -> Tensor:
        """``value``, which depends on ``anchor`` as far as autograd sees."""
        ctx.owner, ctx.found = owner, found
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Hand the known ones out."""
        ctx.owner.add(ctx.found, gradients[0])
        return None, None, None, None


def _check(model: nn.Module, stages: int) -> None:
    said = f"parallel.pipeline is {stages}"
    if not isinstance(model, Decoder):
        raise ConfigError(f"{said}, and the model is a {type(model).__name__}; only a Decoder is cut into stages")
    if model.streams is not None:
        raise ConfigError(f"{said}, and the model runs parallel streams, which are not cut into stages; set it to 1")
    for module in model.modules():
        if isinstance(module, SwitchLoss) and module.config.scope == "global_batch":
            raise ConfigError(
                f"{said}, and a balance loss is over the global batch, which stages do not see together; "
                "use the scope micro_batch or sequence"
            )


def _layers(model: Decoder, stages: int) -> tuple[list[nn.Module], list[int]]:
    """The layers that a stage may begin with, and how many of them each stage has."""
    config = model.config
    groups = [range(group.start - 1, group.stop - 1) for group in uncut_groups(config)]
    inside = {number for group in groups for number in group}
    parts = sorted(
        [*groups, *(range(number, number + 1) for number in range(config.num_layers) if number not in inside)],
        key=lambda part: part.start,
    )
    costs = layer_costs(config, tokens=1, sequence_length=config.max_positions, dtype=torch.float32)
    flops = [0.0, *(sum(costs[1 + number].flops for number in part) for part in parts), costs[-1].flops]
    layers: list[nn.Module] = [_Embed(model), *(_Blocks(model, part) for part in parts), _Head(model)]
    try:
        return layers, list(partition(flops, stages).balance)
    except InputError as error:
        raise ConfigError(f"parallel.pipeline is {stages}, and {error}") from None


class _Of(nn.Module):
    """A layer of a model that is registered elsewhere."""

    model: Decoder

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        set_unregistered(self, "model", model)


class _Embed(_Of):
    """Tokens to what the first block gets."""

    def forward(self, token_BL: Tensor) -> _Handed:
        return self.model.embed(token_BL), token_BL, {}, {}, {}


class _Blocks(_Of):
    """Blocks that stay together."""

    def __init__(self, model: Decoder, part: range) -> None:
        super().__init__(model)
        self.part = part

    def forward(self, handed: _Handed) -> _Handed:
        x_BLD, token_BL, carry, sums, counts = handed
        context = self.model.context(token_BL)
        context.carry.update(carry)
        for number in self.part:
            x_BLD = self.model.blocks[number](x_BLD, context)
        sums, counts = dict(sums), dict(counts)
        for name, values in _emitted(context).items():
            sums[name] = sum(values, start=sums.get(name, torch.zeros((), device=x_BLD.device)))
            counts[name] = counts.get(name, 0) + len(values)
        if not is_recomputing():
            context.commit()
        # How often routers were visited is counted for those who override them, which nobody does here.
        carried = {name: value for name, value in context.carry.items() if not name.startswith("visits.")}
        for name, value in carried.items():
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"block {self.part.stop - 1} hands on {name!r}, a {type(value).__name__}, and only tensors go from stage to stage"
                )
        return x_BLD, token_BL, carried, sums, counts


class _Head(_Of):
    """The last norm and the scores over the vocabulary."""

    def forward(self, handed: _Handed) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
        x_BLD, token_BL, _, sums, counts = handed
        return self.model.logits(self.model.norm(x_BLD), self.model.context(token_BL)), sums, counts


def _emitted(context: ForwardContext) -> dict[str, list[Tensor]]:
    """Losses of layers, those that are made of several layers' parts, and metrics."""
    found = {name: list(values) for name, values in context.losses.items()}
    for owner in {id(owner): owner for owner, _ in context.parts}.values():
        name, loss = owner.close([part for other, part in context.parts if other is owner])
        found.setdefault(name, []).append(loss)
    return found | {_METRIC + name: [value.float() for value in values] for name, values in context.metrics.items()}
