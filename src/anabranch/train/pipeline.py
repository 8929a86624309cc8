"""A decoder trained in stages: `PipelinedDecoder` is called like the decoder and runs the step of a `GPipe` beneath.

    torchrun --nproc-per-node 4 -m anabranch train tiny --set parallel.pipeline=2      # two pipelines of two stages

A process works through the layers of its stage alone: it keeps their activations, and gradients and moments of their parameters. It has the
weights of all layers too, which are made those of their stages before the model is evaluated or saved; so checkpoints are those of one
process, and a run goes on in another layout.

Blocks that have a module together (the pool of a ReXMoE group) are one layer here, so no stage begins among them; see
`anabranch.train.pipeline_layers`.
"""
# Shapes: B sequences, L positions, D width, V vocabulary

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.cluster.gpipe import GPipe, StageError
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
from anabranch.nn.context import set_unregistered
from anabranch.routing import SwitchLoss
from anabranch.train.pipeline_layers import METRIC, layers_of, stages_of

__all__ = ["PipelinedDecoder"]

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
        layers, balance = layers_of(model, stages)
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
        # Of the batch of the step: its sequences, and how many tokens of them are to be predicted.
        self._sequences, self._targets = 0, 0
        self._seed: int | None = None
        # By name, the stages that have a parameter or buffer; those that no layer names are in all.
        self._stages = stages_of(model, layers, pipe.partition.parts)
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
        self._sequences, self._targets = len(target_BL), int((target_BL != -100).sum())
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
        # A micro-batch counts by its sequences; that times this is the sum over its targets over those of the whole batch. Where all
        # sequences have as many, it is the mean over the micro-batch.
        share = self._targets * len(target_BL) / self._sequences
        cross_entropy = total / total.new_tensor(share or 1.0)
        means = {name: value / counts[name] for name, value in sums.items()}
        auxiliary = [value for name, value in means.items() if not name.startswith(METRIC)]
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
        metrics = {name.removeprefix(METRIC): value for name, value in found.items() if name.startswith(METRIC)}
        return {name: value for name, value in found.items() if not name.startswith(METRIC)}, metrics

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
