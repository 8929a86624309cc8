"""A decoder trained in stages: `PipelinedDecoder` is called like the decoder and runs the step of a `GPipe` beneath.

    torchrun --nproc-per-node 4 -m anabranch train tiny --set parallel.pipeline=2      # two pipelines of two stages

A process works through the layers of its stage alone: it keeps their activations, and gradients and moments of their parameters. It has the
weights of all layers too, which are made those of their stages before the model is evaluated or saved; so checkpoints are those of one
process, and a run goes on in another layout.

Blocks that have a module together (the pool of a ReXMoE group) are one layer here, so no stage begins among them. What blocks emit into
the context goes with what they hand on: losses as sums with their gradients, loads to their balancers once.
"""
# Shapes: B sequences, L positions, D width, V vocabulary

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.cluster import partition
from anabranch.cluster.gpipe import GPipe, StageError
from anabranch.cluster.gpipe.chunk import is_recomputing
from anabranch.errors import (
    AnabranchError,
    BackendError,
    CapacityError,
    ConfigError,
    DataError,
    InputError,
    NotFiniteError,
)
from anabranch.lm.decoder import Decoder, DecoderOutput
from anabranch.lm.layers import layer_costs, referred_to, uncut_groups
from anabranch.nn.context import ForwardContext, set_unregistered
from anabranch.routing import SwitchLoss

__all__ = ["PipelinedDecoder"]

# What goes from layer to layer: x_BLD, the tokens, what designs carry, and what was emitted, each name with its sum and its count.
_Handed = tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, int]]
_METRIC = "metric "
# Errors of layers, by the names under which they are told to other stages.
_TOLD: dict[str, type[AnabranchError]] = {
    kind.__name__: kind for kind in (BackendError, CapacityError, ConfigError, DataError, InputError, NotFiniteError)
}


class PipelinedDecoder(nn.Module):
    """A decoder in the stages of a group of processes.

    Args:
        model: in every process, with equal weights.
        group: its processes, in order of stages.
        data_group: processes with the same stage of other pipelines, each with a batch of its own, and this one.
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
        data_group: dist.ProcessGroup,
        *,
        micro_batches: int | None,
        recomputes: bool,
    ) -> None:
        super().__init__()
        stages = dist.get_world_size(group)
        self.is_last = True
        self._group, self._data_group, self._stage = group, data_group, dist.get_rank(group)
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
            # What is drawn must come again in a recomputation, also where a design begins to draw in a later step.
            draws=True if recomputes else None,
        )
        # Both are the model's, which whoever trains it has already.
        set_unregistered(self, "model", model)
        set_unregistered(self, "pipe", pipe)
        self._terms: list[tuple[float, dict[str, Tensor]]] = []
        self._seed: int | None = None
        # By name, the stages that have a parameter or buffer; those that no layer names are in all.
        self._stages = _stages_of(model, layers, pipe.partition.parts)
        self._others = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and self._stage not in self._stages[name]
        ]
        for parameter in self._others:
            parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                f"parallel.pipeline is {stages}, and stage {self._stage} has no parameter that learns; use fewer stages"
            )

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
            value = self._step(token_BL, target_BL)
            found = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
        terms, metrics = self._told(len(token_BL))
        loss = _Step.apply(torch.zeros((), requires_grad=True), value.float(), self, found)
        cross_entropy = terms.pop("cross_entropy")
        return DecoderOutput(loss=loss, cross_entropy=cross_entropy, auxiliary=terms, metrics=metrics)

    def _step(self, token_BL: Tensor, target_BL: Tensor) -> Tensor:
        try:
            return self.pipe.step(token_BL, target_BL, self._loss)
        except StageError as error:
            # What went wrong in a layer is told as without stages, on every process.
            kind = _TOLD.get(error.why.partition(":")[0])
            if kind is None:
                raise
            raise kind(f"{error.why.partition(': ')[2]} (in stage {error.stage})") from error

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
        """Gradients of what several stages have are summed over the stages, and all averaged over pipelines."""
        learn = {id(parameter) for parameter in self._others}
        for name, parameter in self.model.named_parameters():
            if len(self._stages[name]) > 1 and (parameter.requires_grad or id(parameter) in learn):
                summed = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
                dist.all_reduce(summed, group=self._group)
                parameter.grad = summed if parameter.requires_grad else None
        if (pipelines := dist.get_world_size(self._data_group)) == 1:
            return
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # What has no part in the step anywhere has no gradient, which is another thing than one of 0.
        device = parameters[0].device
        has_part = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=device)
        dist.all_reduce(has_part, group=self._data_group)
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter, has in zip(parameters, has_part.tolist(), strict=True):
            if has:
                by_type.setdefault(parameter.dtype, []).append(parameter)
        for alike in by_type.values():
            flat = torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).reshape(-1) for one in alike])
            dist.all_reduce(flat, group=self._data_group)
            flat /= pipelines
            for one, piece in zip(alike, flat.split([one.numel() for one in alike]), strict=True):
                one.grad = piece.view_as(one)

    @torch.no_grad()
    def make_whole(self) -> None:
        """Parameters and buffers of all layers as their stages have them. All processes of the group call it together."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            stages = self._stages[name]
            if len(stages) < dist.get_world_size(self._group):
                _broadcast(tensor.data, self._group, stages[0])

    def counted(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those whose gradient this process adds to the norm of all: what several stages have, the first of them does."""
        first = {id(one) for name, one in self.model.named_parameters() if self._stages[name][0] == self._stage}
        return [parameter for parameter in parameters if id(parameter) in first]

    def norm(self, own: float) -> float:
        """The norm of the gradients of all stages, each of which has one of its own."""
        square = torch.tensor(own * own, dtype=torch.float64, device=next(self.model.parameters()).device)
        dist.all_reduce(square, group=self._group)
        return math.sqrt(float(square))

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named tensors of all stages together, on the CPU where they are another's."""
        parts: list[Any] = [None] * dist.get_world_size(self._group)
        own = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        dist.all_gather_object(parts, own, group=self._group)
        return {name: tensor for part in reversed(parts) for name, tensor in part.items()} | tensors

    def release(self) -> None:
        """What other stages taught may learn here again."""
        for parameter in self._others:
            parameter.requires_grad_(True)


def _broadcast(tensor: Tensor, group: dist.ProcessGroup, source: int) -> None:
    """Overwrite a tensor of any layout and type by that of ``source``."""
    # The tensor itself where it is one piece.
    sent = tensor.contiguous()
    # gloo knows no bools.
    dist.broadcast(sent.view(torch.uint8) if sent.dtype == torch.bool else sent, group=group, group_src=source)
    if not tensor.is_contiguous():
        tensor.copy_(sent)


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


def _stages_of(model: Decoder, layers: Sequence[nn.Module], parts: Sequence[range]) -> dict[str, tuple[int, ...]]:
    """By the name of a parameter or buffer, the stages whose layers have it; all, where no layer does."""
    found: dict[int, list[int]] = {}
    for stage, part in enumerate(parts):
        for number in part:
            layer = layers[number]
            assert isinstance(layer, _Of)
            for module in layer.parts():
                for tensor in (*module.parameters(), *module.buffers()):
                    if stage not in found.setdefault(id(tensor), []):
                        found[id(tensor)].append(stage)
    everywhere = list(range(len(parts)))
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tuple(found.get(id(tensor), everywhere)) for name, tensor in named}


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

    def parts(self) -> list[nn.Module]:
        """Modules of the model that it runs."""
        raise NotImplementedError  # abstract


class _Embed(_Of):
    """Tokens to what the first block gets."""

    def forward(self, token_BL: Tensor) -> _Handed:
        return self.model.embed(token_BL), token_BL, {}, {}, {}

    def parts(self) -> list[nn.Module]:
        """See `_Of`."""
        return [self.model.embedding]


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

    def parts(self) -> list[nn.Module]:
        """See `_Of`; with what is shared among these blocks."""
        blocks = [self.model.blocks[number] for number in self.part]
        shared = {id(module): module for module in self.model.shared.modules()}
        referred = {name for block in blocks for name in referred_to(block, set(shared))}
        return [*blocks, *(shared[name] for name in sorted(referred))]


class _Head(_Of):
    """The last norm and the scores over the vocabulary."""

    def forward(self, handed: _Handed) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
        x_BLD, token_BL, _, sums, counts = handed
        return self.model.logits(self.model.norm(x_BLD), self.model.context(token_BL)), sums, counts

    def parts(self) -> list[nn.Module]:
        """See `_Of`; the head may be the embedding."""
        return [self.model.norm, self.model.embedding if self.model.head is None else self.model.head]


def _emitted(context: ForwardContext) -> dict[str, list[Tensor]]:
    """Losses of layers, those that are made of several layers' parts, and metrics."""
    found = {name: list(values) for name, values in context.losses.items()}
    for owner in {id(owner): owner for owner, _ in context.parts}.values():
        name, loss = owner.close([part for other, part in context.parts if other is owner])
        found.setdefault(name, []).append(loss)
    return found | {_METRIC + name: [value.float() for value in values] for name, values in context.metrics.items()}
