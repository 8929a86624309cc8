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
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from anabranch.cluster.gpipe import GPipe, StageError
from anabranch.cluster.gradients import average_gradients
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
from anabranch.train.exact import TOTAL, ExactSums, Terms, have_part, norm_in_order, weighted_means
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
        group: its processes, in order of stages; None for one stage in this process.
        data_group: processes with the same stage of other pipelines, each with a batch of its own, and this one; None for this one alone.
        micro_batches: M; None for four times the stages, or as many as there are sequences.
        recomputes: do the forward of a stage again in its backward, for all micro-batches but the last.
        exact: micro-batches of all pipelines together, a power of two; then ``micro_batches`` says nothing, and losses and gradients are a
            function of this number alone, to the bit, and not of stages and pipelines. None for sums in the order that is fastest.
        schedule: of the stages, one of `anabranch.cluster.SCHEDULES`.
        visits: chunks of each stage; more than one for ``interleaved`` alone.

    Attributes:
        is_last: whether gradients are summed over processes after the next backward.

    Raises ConfigError for a model that cannot be cut so.
    """

    model: Decoder
    pipe: GPipe

    def __init__(
        self,
        model: Decoder,
        group: dist.ProcessGroup | None,
        data_group: dist.ProcessGroup | None,
        *,
        micro_batches: int | None,
        recomputes: bool,
        exact: int | None = None,
        schedule: str = "gpipe",
        visits: int = 1,
    ) -> None:
        super().__init__()
        self.is_last = True
        self._group, self._data_group = group, data_group
        self._num_stages, self._stage = _place_in(group)
        self._num_pipelines, self._pipeline = _place_in(data_group)
        stages = self._num_stages
        self._said = f"parallel.exact is {exact}" if stages == 1 else f"parallel.pipeline is {stages}"
        check_cut(model, self._said)
        layers, balance = layers_of(model, stages, visits)
        if exact is not None:
            micro_batches = exact // self._num_pipelines
        self._device = next(model.parameters()).device
        pipe = GPipe(
            nn.Sequential(*layers),
            micro_batches=4 * stages if micro_batches is None else micro_batches,
            checkpoint="except_last" if recomputes else "never",
            runner="local" if group is None else "distributed",
            balance=balance,
            schedule=schedule,
            visits=visits,
            devices=[self._device],
            group=group,
            # What is drawn must come again in a recomputation, and on other ranks, also where a design begins to draw in a later step.
            draws=True if recomputes or exact is not None else None,
            is_exact=exact is not None,
        )
        # Both are the model's, which whoever trains it has already.
        set_unregistered(self, "model", model)
        set_unregistered(self, "pipe", pipe)
        self._told: list[Terms] = []
        # Of the batch of the step: its sequences, and how many tokens of them are to be predicted.
        self._sequences, self._targets = 0, 0
        self._seed: int | None = None
        # By name, the stages that have a parameter or buffer; those that no layer names are in all.
        self._stages = stages_of(model, layers, pipe.partition.parts, stages)
        self._others = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and self._stage not in self._stages[name]
        ]
        for parameter in self._others:
            parameter.requires_grad_(False)
        self._learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self._learning:
            raise ConfigError(f"{self._said}, and stage {self._stage} has no parameter that learns; use fewer stages")
        # What several stages have: its gradients are summed over them.
        learn = {id(parameter) for parameter in (*self._learning, *self._others)}
        self._together = [
            parameter
            for name, parameter in model.named_parameters()
            if len(self._stages[name]) > 1 and id(parameter) in learn
        ]
        self._sums = None if exact is None else ExactSums(self._learning, self._together, pipe.micro_batches, group)

    def forward(self, token_BL: Tensor, target_BL: Tensor | None = None, **options: Any) -> DecoderOutput:
        """The training loss, of the same batch in all processes of the group; its backward adds gradients to those that are there.

        Raises ConfigError for any other call of a decoder: stages give the loss of a batch, and no logits.
        """
        if target_BL is None or options:
            raise ConfigError(
                f"{self._said}, and the task asks the model for more than the loss of tokens and targets; leave it out"
            )
        self._set_seed()
        before = [parameter.grad for parameter in self._learning]
        for parameter in self._learning:
            parameter.grad = None
        self._told = []
        self._count(target_BL)
        if self._sums is not None:
            # A step that failed may have left some.
            self._sums.begin()
        try:
            value = self._step(token_BL, target_BL)
            if self._sums is not None:
                self._sums.finish()
            found = [(parameter, parameter.grad) for parameter in self._learning if parameter.grad is not None]
        finally:
            for parameter, gradient in zip(self._learning, before, strict=True):
                parameter.grad = gradient
        terms = self._means()
        if self._sums is not None:
            value = terms[TOTAL]
        del terms[TOTAL]
        loss = _Step.apply(torch.zeros((), requires_grad=True), value.float(), self, found)
        cross_entropy = terms.pop("cross_entropy")
        metrics = {name.removeprefix(METRIC): value for name, value in terms.items() if name.startswith(METRIC)}
        auxiliary = {name: value for name, value in terms.items() if not name.startswith(METRIC)}
        return DecoderOutput(loss=loss, cross_entropy=cross_entropy, auxiliary=auxiliary, metrics=metrics)

    def _count(self, target_BL: Tensor) -> None:
        """Sequences and targets: of this pipeline's batch, whose mean is its loss; or, to be exact, of all of them."""
        counts = torch.tensor([len(target_BL), int((target_BL != -100).sum())], device=target_BL.device)
        if self._sums is not None and self._num_pipelines > 1:
            dist.all_reduce(counts, group=self._data_group)
        self._sequences, self._targets = counts.tolist()

    def _step(self, token_BL: Tensor, target_BL: Tensor) -> Tensor:
        row_B = torch.arange(len(token_BL))
        sums = self._sums
        try:
            return self.pipe.step(
                token_BL,
                (target_BL, row_B),
                self._loss,
                first_row=self._pipeline * len(token_BL),
                # What ranks draw apart from one another is keyed by their seeds.
                first_micro_batch=0 if sums is None else self._pipeline * self.pipe.micro_batches,
                after_backward=None if sums is None else lambda micro_batch, layers: sums.take(micro_batch),
            )
        except StageError as error:
            # What went wrong in a layer is told as without stages, on every process.
            kind = _TOLD.get(error.why.partition(":")[0])
            if kind is None:
                raise
            raise kind(f"{error.why.partition(': ')[2]} (in stage {error.stage})") from error

    def _loss(self, output: tuple[Tensor, dict[str, Tensor], dict[str, int]], target: tuple[Tensor, Tensor]) -> Tensor:
        logits_BLV, sums, counts = output
        target_BL, row_B = target
        total = F.cross_entropy(
            logits_BLV.flatten(0, 1).float(), target_BL.flatten(), ignore_index=-100, reduction="sum"
        )
        # A micro-batch counts by its sequences; that times this is the sum over its targets over those of the whole batch. Where all
        # sequences have as many, it is the mean over the micro-batch.
        share = self._targets * len(target_BL) / self._sequences
        cross_entropy = total / total.new_tensor(share or 1.0)
        means = {name: value / counts[name] for name, value in sums.items()}
        auxiliary = [value for name, value in means.items() if not name.startswith(METRIC)]
        loss: Tensor = sum(auxiliary, start=cross_entropy)
        told = {TOTAL: loss, "cross_entropy": cross_entropy, **means}
        self._told.append(
            Terms(int(row_B[0]), len(row_B), {name: float(value.detach()) for name, value in told.items()})
        )
        return loss

    def _means(self) -> dict[str, Tensor]:
        """Terms of the loss and metrics of the whole batch, which the last stage knows and tells."""
        told: list[Any] = [self._told]
        if self._group is not None:
            dist.broadcast_object_list(told, group=self._group, group_src=self._num_stages - 1)
        if self._sums is not None and self._data_group is not None:
            everywhere: list[Any] = [None] * self._num_pipelines
            dist.all_gather_object(everywhere, told[0], group=self._data_group)
            told = everywhere
        means = weighted_means([terms for each in told for terms in each])
        return {name: torch.tensor(value, device=self._device) for name, value in means.items()}

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
        # To be exact they have been summed for each micro-batch.
        together = self._together if self._sums is None else []
        has_part = have_part([[parameter.grad] for parameter in together], self._group, self._device)
        for parameter in (one for one, has in zip(together, has_part, strict=True) if has):
            summed = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            dist.all_reduce(summed, group=self._group)
            parameter.grad = summed if parameter.requires_grad else None
        if self._data_group is not None:
            average_gradients(self._learning, self._data_group, in_pairs=self._sums is not None)

    @torch.no_grad()
    def make_whole(self) -> None:
        """Parameters and buffers of all layers as their stages have them. All processes of the group call it together."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            stages = self._stages[name]
            if len(stages) < self._num_stages:
                assert self._group is not None
                # Of what pipelines share, each stage of this one has the same part.
                own = tensor.to_local() if isinstance(tensor, DTensor) else tensor.data
                if own.numel():
                    _broadcast(own, self._group, stages[0])

    def norm(self, norm_of: Callable[[Sequence[nn.Parameter]], float]) -> float:
        """The norm of the gradients of all stages; ``norm_of`` gives that of some parameters here."""
        first = {id(one) for name, one in self.model.named_parameters() if self._stages[name][0] == self._stage}
        if self._sums is not None:
            # Of each parameter by itself, and then of these in the order of the model, wherever they are.
            counted = [one if id(one) in first and one.requires_grad else None for one in self.model.parameters()]
            return norm_in_order([None if one is None else one.grad for one in counted], self._group, self._device)
        # What several stages have, the first of them counts.
        own = norm_of([parameter for parameter in self._learning if id(parameter) in first])
        square = torch.tensor(own * own, dtype=torch.float64, device=self._device)
        dist.all_reduce(square, group=self._group)
        return math.sqrt(float(square))

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named tensors of all stages together, on the CPU where they are another's."""
        if self._group is None:
            return tensors
        parts: list[Any] = [None] * self._num_stages
        own = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        dist.all_gather_object(parts, own, group=self._group)
        return {name: tensor for part in reversed(parts) for name, tensor in part.items()} | tensors

    def release(self) -> None:
        """What other stages taught may learn here again."""
        for parameter in self._others:
            parameter.requires_grad_(True)


def _place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(how many processes, which of them this is)."""
    return (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))


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


def check_cut(model: nn.Module, said: str) -> None:
    """Raise ConfigError for a model whose layers cannot be in several processes; ``said`` is what asks for it."""
    if not isinstance(model, Decoder):
        raise ConfigError(f"{said}, and the model is a {type(model).__name__}; only a Decoder is cut into stages")
    if model.streams is not None:
        raise ConfigError(f"{said}, and the model runs parallel streams, which are not cut into stages; leave it out")
    for module in model.modules():
        if isinstance(module, SwitchLoss) and module.config.scope == "global_batch":
            raise ConfigError(
                f"{said}, and a balance loss is over the global batch, which stages do not see together; "
                "use the scope micro_batch or sequence"
            )
