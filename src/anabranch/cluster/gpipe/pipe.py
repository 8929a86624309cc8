"""`GPipe`: the interface. Which layers go to which stage, and one step of all of them.

The update is that of the model that was not split (Huang et al., arXiv 1811.06965, section 2): gradients of M micro-batches are added up,
each micro-batch's loss weighted by its share n_m / N of the batch, so they are those of the mean over the batch.

Departures from the paper: the partition minimises the largest stage instead of the variance of stages (which is an option); random numbers
are a function of (seed, step, layer, micro-batch) instead of a saved state, so they do not depend on the number of stages.
"""
# Shapes: N items of a batch, M micro-batches, K stages, L layers

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.bounds import is_whole
from anabranch.cluster.gpipe.chunk import Chunk, StepKey
from anabranch.cluster.gpipe.costs import By, layer_costs
from anabranch.cluster.gpipe.distributed import Messages, agree
from anabranch.cluster.gpipe.local import run_local
from anabranch.cluster.gpipe.micro_batches import join, num_items, sizes_of, split
from anabranch.cluster.gpipe.skips import copy_before_changes, routes_of
from anabranch.cluster.gpipe.stage import Batch, Failure, Stage
from anabranch.cluster.gpipe.ties import StandIns, Ties, stand_ins, ties_of, unfit
from anabranch.cluster.gradients import average_gradients
from anabranch.cluster.messages import MessageLog
from anabranch.cluster.partitions import Objective, Partition, check_balance, partition
from anabranch.cluster.saved_bytes import SavedBytes
from anabranch.cluster.schedules import FORWARD, Schedule, schedule
from anabranch.cluster.simulation import is_recomputed
from anabranch.errors import InputError

__all__ = ["Checkpoint", "GPipe"]

Checkpoint = Literal["always", "except_last", "never"]


class GPipe(nn.Module):
    """A sequential model in K stages, trained by micro-batches.

        pipe = GPipe(model, stages=4, micro_batches=8)
        optimizer = torch.optim.AdamW(pipe.parameters())
        for x, target in batches:
            optimizer.zero_grad()
            loss = pipe.step(x, target, loss_fn)
            optimizer.step()

    Its parameters, their names and its state dict are the model's own. Under ``runner="distributed"`` every rank is given the same model,
    and keeps its stage's layers alone.

    Args:
        model: any ``nn.Sequential``.
        stages: K. Default: as ``balance`` says, else the ranks or devices that there are.
        micro_batches: M, into which a batch is cut; where M does not go into N the last is smaller. It may be less than K.
        checkpoint: of which micro-batches backward does the forward again instead of keeping activations: ``always``, ``except_last`` (its
            backward comes at once), or ``never``. In inference nothing is kept.
        balance: layers of each stage; or by what the best partition is chosen: ``parameters``, and with a ``sample`` ``flops``, ``time``
            or ``size``, see `anabranch.cluster.gpipe.costs`.
        sample: a micro-batch, for ``balance`` by something that must be run.
        objective: ``minimax``, or ``variance`` as in the paper.
        schedule: ``gpipe``; or ``1f1b`` or ``interleaved`` for the same gradients with fewer micro-batches in flight; or ``zero-bubble``,
            where gradients of weights come when a stage would wait else, see `anabranch.cluster.decoupled`.
        visits: chunks of each stage, of ``interleaved``.
        deferred_batch_norm: batch norms track the statistics of whole batches, see `anabranch.cluster.gpipe.batch_norm`.
        tied: names of parameters that several layers have, in groups; ``auto`` for those that there are.
        runner: ``local``, a thread per stage; ``distributed``, a rank per stage, in a group of ``torch.distributed``.
        devices: of the stages, of the local runner; one for this rank, of the other. Default: where the model is.
        group: ranks of the pipeline, in order of stages; None for all.
        data_group: ranks with the same stage of other pipelines, over which gradients are averaged once a step.
        seed: of random numbers in layers.
        draws: whether layers draw random numbers; None to find out when each first runs in training. Layers that may begin to draw later
            (but for dropouts of torch, whose share is looked at each time) need True.
        is_exact: whether a micro-batch whose forward is done again is run by the kernels of one that keeps its graph, so ``checkpoint``
            changes no bit where layers have others for inference. It takes a little longer.
        timeout_s: for which the local runner waits for a stage.
        meter: counts what stages keep between forward and backward.
        log: told of messages between stages; under ``distributed`` of those that this rank sends.

    Attributes:
        partition: layers of each chunk.
        steps: done so far, of which random numbers are a function; set it when training is resumed.

    Raises:
        TypeError: for a model that is no ``nn.Sequential``.
        InputError (a ValueError): for a balance that does not fit, more stages than layers, devices or ranks, fewer than one micro-batch,
            parameters in several layers that are not declared as tied, skips that do not fit.
    """

    def __init__(
        self,
        model: nn.Sequential,
        stages: int | None = None,
        micro_batches: int = 1,
        checkpoint: Checkpoint = "except_last",
        runner: Literal["local", "distributed"] = "local",
        *,
        balance: Sequence[int] | By | None = None,
        sample: Any = None,
        objective: Objective = "minimax",
        schedule: str = "gpipe",
        visits: int | None = None,
        deferred_batch_norm: bool = False,
        tied: Ties = (),
        devices: Sequence[torch.device | str] | None = None,
        group: dist.ProcessGroup | None = None,
        data_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        draws: bool | None = None,
        is_exact: bool = False,
        timeout_s: float = 1800.0,
        meter: SavedBytes | None = None,
        log: MessageLog | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Sequential):
            raise TypeError(
                f"GPipe takes an nn.Sequential, and model is a {type(model).__name__}; write it as a list of layers"
            )
        if not isinstance(micro_batches, int) or micro_batches < 1:
            raise InputError(f"micro_batches is {micro_batches!r}; use at least 1")
        for name, value, allowed in (
            ("checkpoint", checkpoint, ("always", "except_last", "never")),
            ("runner", runner, ("local", "distributed")),
        ):
            if value not in allowed:
                raise InputError(f"{name} is {value!r}; use {', '.join(allowed)}")
        if runner == "distributed" and not dist.is_initialized():
            raise InputError("runner is 'distributed', and there is no process group; start it with torchrun")
        self.micro_batches, self.checkpoint, self.runner = micro_batches, checkpoint, runner
        self.seed, self.steps, self.timeout_s = seed, 0, timeout_s
        self.meter, self.log = meter, log
        self._schedule_name, self._visits = schedule, visits
        self._group, self._data_group = group, data_group
        self._tables: dict[int, Schedule] = {}
        self._num_stages = self._stages(stages, balance, devices)
        chunks = self._table(1).num_chunks
        self.partition = _partition(model, chunks, self._num_stages, balance, sample, objective)
        _check_modules(model)
        self._ties = ties_of(model, tied)
        self._names = [name for name, _ in model.named_children()]
        routes = routes_of(list(model), self.partition.parts)
        copy_before_changes(list(model))
        placed: list[torch.device | None] = [None] * self._num_stages
        if devices is not None:
            placed = [torch.device(device) for device in devices]
        own = range(self._num_stages) if runner == "local" else [dist.get_rank(group)]
        self._own_stages: list[Stage] = []
        self._stage_of = [self.partition.part_of(number) % self._num_stages for number in range(len(model))]
        for stage in own:
            device = placed[stage] if runner == "local" else placed[0]
            self._own_stages.append(
                Stage(
                    stage,
                    [
                        Chunk(
                            [model[number].to(device) if device is not None else model[number] for number in part],
                            part,
                            routes,
                            number_of,
                            chunks,
                            is_deferred=deferred_batch_norm,
                            meter=meter,
                            draws=draws,
                            is_exact=is_exact,
                            puts_off=self._table(1).has_weight_slots,
                        )
                        for number_of, part in enumerate(self.partition.parts)
                        if number_of % self._num_stages == stage
                    ],
                    device,
                )
            )
        self._running: list[threading.Thread] = []
        self._channel = None
        if runner == "distributed":
            where = placed[0] or torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
            self._channel = Messages(group, [route.name for route in routes], where, log=log)
            self._device = where
        self._register(model)
        # Not `train`, which would change layers that are in evaluation mode on their own.
        self.training = model.training

    # What the model says of itself is said by its layers, under their own names.

    def _register(self, model: nn.Sequential) -> None:
        own = {stage.number for stage in self._own_stages}
        for number, (name, layer) in enumerate(model.named_children()):
            if name not in self._modules and hasattr(self, name):
                raise InputError(
                    f"layer {number} is called {name!r}, as something of GPipe's own; give it another name"
                )
            if self._stage_of[number] in own:
                self.add_module(name, layer)

    def _stages(self, stages: int | None, balance: Any, devices: Sequence[Any] | None) -> int:
        by_balance = None if balance is None or isinstance(balance, str) else len(balance)
        available = None
        if self.runner == "distributed":
            available = dist.get_world_size(self._group)
        elif devices is not None:
            available = len(devices)
        visits = 2 if self._visits is None and self._schedule_name == "interleaved" else self._visits or 1
        if by_balance is not None and by_balance % visits:
            raise InputError(f"balance has {by_balance} entries, which {visits} visits do not divide")
        wanted = stages if stages is not None else (None if by_balance is None else by_balance // visits) or available
        if wanted is None:
            raise InputError("nothing says how many stages there are; give stages=, balance= or devices=")
        if not is_whole(wanted) or wanted < 1:
            raise InputError(f"stages is {wanted!r}; use a whole number of at least 1")
        if by_balance is not None and by_balance != wanted * visits:
            raise InputError(
                f"balance has {by_balance} entries, and stages is {wanted} with {visits} visits; they must agree"
            )
        what = "ranks" if self.runner == "distributed" else "devices"
        if available is not None and wanted > available:
            raise InputError(f"there are {wanted} stages and {available} {what}; use at most {available} stages")
        if self.runner == "distributed" and available is not None and wanted < available:
            raise InputError(f"there are {wanted} stages and {available} ranks in the group; give a group of {wanted}")
        return wanted

    def _table(self, micro_batches: int) -> Schedule:
        if micro_batches not in self._tables:
            self._tables[micro_batches] = schedule(
                self._schedule_name, stages=self._num_stages, micro_batches=micro_batches, visits=self._visits
            )
        return self._tables[micro_batches]

    def measure_saved(self) -> list[SavedBytes]:
        """A new meter for each stage here, of what it keeps between forward and backward; the one of ``meter=`` no longer counts."""
        meters = []
        for stage in self._own_stages:
            meter = SavedBytes(ignored=self.parameters())
            meters.append(meter)
            for chunk in stage.chunks:
                chunk.meter = meter
        return meters

    @property
    def num_stages(self) -> int:
        """K."""
        return self._num_stages

    def schedule_of(self, items: int) -> Schedule:
        """The table of a step over a batch of N items."""
        return self._table(len(sizes_of(items, self.micro_batches)))

    # Work

    def step(
        self,
        x: Any,
        target: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        weights: Callable[[Any], float] | None = None,
        first_row: int = 0,
        first_micro_batch: int = 0,
        after_backward: Callable[[int, Sequence[nn.Module]], None] | None = None,
    ) -> Tensor:
        """One batch forward and backward; gradients are added to those that are there.

        Hooks of a parameter are called for each micro-batch, with its gradient. Those of one that several stages have are called once a
        step, with the sum over stages and micro-batches, under ``distributed`` on each rank that has it.

        Args:
            x: the batch: a tensor, or a nested tuple, list or dictionary; what is no tensor goes to every micro-batch. Under
                ``distributed`` the first stage's counts, others may give None.
            target: likewise; of the last stage.
            loss_fn: of an output and a target, the mean over the items of a micro-batch.
            weights: of a micro-batch's target, how much its mean counts, where that is not by items (tokens that are no padding).
            first_row: the number of the first item here in a batch that several pipelines share, by which `KeyedDropout` draws.
            first_micro_batch: likewise of the first micro-batch, by which all else draws.
            after_backward: called as (micro-batch here, layers) when the gradients of these layers have those of a micro-batch added, on
                the thread of their stage; it may take them away. What several stages have is there as a parameter of the stage's own,
                with the gradient of this stage alone.

        Returns:
            The loss, the weighted mean over micro-batches: float, detached, the same on every rank.

        Raises StageError where a layer or the loss fails, on every rank, with the stage and the micro-batch; gradients are then of no use.
        """
        sizes = self._sizes(x)
        table = self._table(len(sizes))
        if any(chunk.puts_off and chunk.is_sharded for stage in self._own_stages for chunk in stage.chunks):
            raise InputError(
                f"schedule is {table.name!r}, and layers are in shards (FSDP2), whose gradients travel as soon as those of their inputs "
                "are there; use gpipe, 1f1b or interleaved"
            )
        batch = Batch(
            key=StepKey(self.seed, self.steps, tuple(first_row + start for start in _starts(sizes)), first_micro_batch),
            recomputes=[
                self.training and is_recomputed(self.checkpoint, number, len(sizes)) for number in range(len(sizes))
            ],
            inputs=split(x, sizes) if self._owns(0) else [],
            targets=[],
            weights=[size / sum(sizes) for size in sizes],
            loss_fn=loss_fn,
            after_backward=after_backward,
        )
        if self._owns(self.partition.num_layers - 1):
            try:
                self._give_targets(batch, target, sizes, weights)
            except Exception as error:
                if self.runner == "local":
                    raise
                # Other ranks are on their way into the step already; they hear of it there.
                batch.problem = error
        loss = self._run(table, batch)
        self.steps += 1
        return loss

    def forward(self, x: Any) -> Any:
        """Inference: the output of the whole batch, micro-batch by micro-batch, without gradients.

        Under ``distributed`` the last stage gets it, others None.
        """
        sizes = self._sizes(x)
        table = self._table(len(sizes))
        # A visit after the other, without waiting for backward passes.
        slots = [slot for slot in table.slots if slot.kind == FORWARD]
        batch = Batch(
            key=StepKey(self.seed, self.steps),
            recomputes=[False] * len(sizes),
            inputs=split(x, sizes) if self._owns(0) else [],
            targets=[],
            weights=[],
            loss_fn=None,
        )
        self._run(replace(table, slots=tuple(slots)), batch)
        if not self._owns(self.partition.num_layers - 1):
            return None
        return join([batch.outputs[number] for number in range(len(sizes))])

    def _run(self, table: Schedule, batch: Batch) -> Tensor:
        is_training = batch.loss_fn is not None
        # What is tied within one stage is one parameter already.
        spread = [tie for tie in self._ties if len({self._stage_of[layer] for layer in tie.layers}) > 1]
        own = {stage.number for stage in self._own_stages}
        with stand_ins(self, spread if is_training else (), self._stage_of, own) as shared:
            if self._channel is None:
                failure = run_local(
                    self._own_stages, table, batch, log=self.log, timeout_s=self.timeout_s, running=self._running
                )
            else:
                self._channel.begin(table.num_micro_batches, is_training=is_training)
                failure = self._own_stages[0].run(table, batch, self._channel)
                self._channel.finish()
        if failure is None:
            failure = unfit(shared, self._own_stages[0].number, table.num_micro_batches)
        if self._channel is not None:
            return self._over_ranks(batch, failure, shared)
        if failure is not None:
            raise failure.error()
        for each in shared:
            each.deliver(each.gradient())
        return _sum(batch)

    def _over_ranks(self, batch: Batch, failure: Failure | None, shared: Sequence[StandIns]) -> Tensor:
        """The loss, and what ranks do together at the end of a step. Raises on all of them where one has failed."""
        counts = [count for each in shared for count in (each.gradient() is not None, each.learns)]
        loss, found = agree(failure, _sum(batch), self._group, self._device, counts)
        for each, learning in zip(shared, found[1::2], strict=True):
            each.check(learning)
        for each, giving in zip(shared, found[::2], strict=True):
            # What has no part in a step keeps no gradient, as then no optimizer moves it.
            if giving:
                each.deliver(each.over_ranks(self._group))
        if batch.loss_fn is not None and self._data_group is not None:
            average_gradients(list(self.parameters()), self._data_group)
        return loss

    def _sizes(self, x: Any) -> list[int]:
        if self.runner == "local":
            return sizes_of(num_items(x), self.micro_batches)
        items = torch.zeros(1, dtype=torch.int64, device=self._device)
        problem: InputError | None = None
        if self._owns(0):
            try:
                items[0] = num_items(x)
            except InputError as error:
                problem = error
        # 0 tells the others that there is no batch.
        dist.broadcast(items, group=self._group, group_src=0)
        if problem is not None:
            raise problem
        if not items[0]:
            raise InputError("the first stage was given no batch that can be cut; see its own error")
        return sizes_of(int(items[0]), self.micro_batches)

    def _give_targets(
        self, batch: Batch, target: Any, sizes: list[int], weights: Callable[[Any], float] | None
    ) -> None:
        """Fill in targets, and how much each micro-batch counts."""
        if (found := num_items(target, "target")) != sum(sizes):
            raise InputError(f"target has {found} items, and x has {sum(sizes)}; they must be of the same batch")
        batch.targets = split(target, sizes)
        if weights is not None:
            counts = [float(weights(piece)) for piece in batch.targets]
            # Where nothing counts, neither does the loss.
            batch.weights = [count / (sum(counts) or 1.0) for count in counts]

    def _owns(self, layer: int) -> bool:
        return self._stage_of[layer] in {stage.number for stage in self._own_stages}

    # State

    def state_dict(self, *args: Any, local: bool = False, **kwargs: Any) -> Any:
        """The model's state dict, with the keys of the ``nn.Sequential`` that was given.

        Under ``distributed`` all ranks must call it together, and all get the whole; with ``local`` each gets its stage's part.
        """
        own = super().state_dict(*args, **kwargs)
        if self.runner == "local" or local:
            return own
        pieces: list[Any] = [None] * self._num_stages
        dist.all_gather_object(pieces, dict(own), group=self._group)
        merged = {name: value for piece in pieces for name, value in piece.items()}
        order = {name: number for number, name in enumerate(self._names)}
        return {name: merged[name] for name in sorted(merged, key=lambda name: order[name.partition(".")[0]])}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Read the state dict of the whole model; under ``distributed`` each rank takes its part.

        Raises RuntimeError with ``strict`` where keys of the layers that are here are missing or too many, and for keys of no layer.
        """
        if self.runner == "distributed":
            others = set(self._names).difference(name for name, _ in self.named_children())
            state_dict = {name: value for name, value in state_dict.items() if name.partition(".")[0] not in others}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"stages={self._num_stages}, balance={list(self.partition.balance)}, micro_batches={self.micro_batches}"


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each micro-batch begins."""
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _sum(batch: Batch) -> Tensor:
    """The losses of all micro-batches, added in their order."""
    losses = [batch.losses[number] for number in sorted(batch.losses)]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def _partition(
    model: nn.Sequential,
    chunks: int,
    stages: int,
    balance: Sequence[int] | By | None,
    sample: Any,
    objective: Objective,
) -> Partition:
    if not len(model):
        raise InputError("model has no layers")
    if balance is not None and not isinstance(balance, str):
        return check_balance(balance, len(model))
    if chunks > len(model):
        of = f"{stages} stages" if chunks == stages else f"{stages} stages of {chunks // stages} chunks"
        raise InputError(f"the model has {len(model)} layers, too few for {of}; use at most {len(model)} stages")
    return partition(layer_costs(model, balance or "parameters", sample), chunks, objective=objective)


def _check_modules(model: nn.Sequential) -> None:
    """Raise InputError for one module in two layers, which stages would call at once."""
    found: dict[int, int] = {}
    for number, layer in enumerate(model):
        for module in layer.modules():
            has_state = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
            if has_state and found.setdefault(id(module), number) != number:
                raise InputError(
                    f"layers {found[id(module)]} and {number} are or have the same {type(module).__name__}; "
                    "give each one of its own, and tie their parameters"
                )
