"""Parallel training under torchrun: replicas (DDP), or weights and optimizer in shards (FSDP2); experts or sequences shared by processes.

torchrun --nproc-per-node 2 -m anabranch train ... --set train.parallel=ddp
torchrun --nproc-per-node 2 -m anabranch train ... --set parallel.experts=2
torchrun --nproc-per-node 2 -m anabranch train ... --set parallel.context=2
torchrun --nproc-per-node 4 -m anabranch train ... --set parallel.pipeline=2 --set parallel.exact=8
torchrun --nproc-per-node 8 -m anabranch train ... --set parallel.pipeline=2 --set parallel.experts=2 --set train.parallel=fsdp

Processes that may be lost and come, whoever starts them, are those of `anabranch.train.elastic`.
"""

import inspect
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from anabranch.cluster.ring import ContextParallel, Topology
from anabranch.errors import BackendError, ConfigError
from anabranch.nn.expert_parallel import expert_mesh, shard_experts, sharded_parameters
from anabranch.nn.pool import ExpertPool
from anabranch.routing.context import RoutingContext
from anabranch.train.config import Parallel, TrainConfig
from anabranch.train.pipeline import PipelinedDecoder
from anabranch.train.pipeline_layers import ends_of

if TYPE_CHECKING:
    from anabranch.train.elastic import Elastic

# What torch calls it depends on the version.
_BUFFER_OPTION = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class Workers:
    """The processes that train together; one, unless ``parallel`` says otherwise.

    Args:
        config: its ``parallel`` says what becomes of the model's weights, its ``device`` where.
        shared: what of the model the processes share; nothing if None.

    Attributes:
        device: this process's device.
        rank, size: which of how many.
        num_batches, batch_number: how many batches a step has, and which of them is this process's; those of processes that cut sequences
            between them are the same.

    Raises ConfigError if ``parallel`` and how the process was started do not fit, BackendError if the device is not there.
    """

    def __init__(self, config: TrainConfig, shared: Parallel | None = None) -> None:
        self._num_shares = 1 if shared is None else shared.experts
        self._num_cuts = 1 if shared is None else shared.context
        self._context = Parallel() if shared is None else shared
        self._num_stages = 1 if shared is None else shared.pipeline
        self._micro_batches = None if shared is None else shared.micro_batches
        self._schedule, self._visits = ("gpipe", 1) if shared is None else (shared.schedule, shared.chunks)
        self._exact = None if shared is None else shared.exact
        self._recomputes = config.recompute
        # The model in stages, once it is wrapped so.
        self._staged: PipelinedDecoder | None = None
        # Where processes share the run that are no group, and may be lost.
        self.elastic: Elastic | None = None
        self._num_data = None if shared is None else shared.data
        is_shared = max(self._num_shares, self._num_cuts, self._num_data or 1) > 1
        self.parallel: str = "ddp" if config.parallel == "none" and is_shared else config.parallel
        self._cut_model: ContextParallel | None = None
        self._check_cuts(config)
        self._check_stages(config)
        self._check_exact(config)
        self._is_fsdp = config.parallel == "fsdp"
        if self._num_stages > 1:
            self.parallel = "pipeline"
        if self._num_shares > 1 and config.compile:
            raise ConfigError(
                f"train.compile is True, and rows that travel between processes (parallel.experts={self._num_shares}) are not compiled; "
                "set it to False"
            )
        started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else None
        if self.parallel == "none":
            # Those that share a run elastically find each other by their coordinator, whoever started them.
            is_elastic = shared is not None and shared.elastic.coordinator is not None
            if started is not None and started > 1 and not is_elastic:
                raise ConfigError(
                    f"torchrun started {started} processes, and train.parallel is 'none'; set it to 'ddp' or 'fsdp'"
                )
            self.device = find_device(config.device)
            self.rank, self.size, self._owns_group = 0, 1, False
            self.batch_number, self.num_batches = 0, 1
            return
        if started is None and not dist.is_initialized():
            wanted = f"train.parallel is {config.parallel!r}"
            if self._num_shares > 1:
                wanted = f"parallel.experts is {self._num_shares}"
            elif self._num_cuts > 1:
                wanted = f"parallel.context is {self._num_cuts}"
            elif self._num_stages > 1:
                wanted = f"parallel.pipeline is {self._num_stages}"
            elif self._num_data is not None:
                wanted = f"parallel.data is {self._num_data}"
            raise ConfigError(f"{wanted}; start it with torchrun --nproc-per-node N -m anabranch train ...")
        self.device = find_device(config.device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        for name, number in (("context", self._num_cuts), ("pipeline", self._num_stages)):
            if self.size % number:
                raise ConfigError(
                    f"parallel.{name} is {number}, and there are {self.size} processes; use a number that divides them"
                )
        together = self._num_cuts * self._num_stages
        self.batch_number, self.num_batches = self.rank // together, self.size // together
        if self._num_data not in (None, self.num_batches):
            of = f" in groups of {together}" if together > 1 else ""
            raise ConfigError(
                f"parallel.data is {self._num_data}, and {self.size} processes{of} have {self.num_batches} batches; "
                f"start {self._num_data * together}, or set it to {self.num_batches}"
            )
        if self._num_stages > 1 and self.num_batches % self._num_shares:
            raise ConfigError(
                f"parallel.experts is {self._num_shares}, and pipelines share experts, of which there are {self.num_batches}; use a number "
                "that divides them"
            )
        if self._exact is not None and self._exact % self.num_batches:
            raise ConfigError(
                f"parallel.exact is {self._exact}, and there are {self.num_batches} pipelines, which must have equally many of so many "
                f"micro-batches; start 1, 2, 4, ... up to {self._exact} of them"
            )

    def _check_cuts(self, config: TrainConfig) -> None:
        """What does not go together with sequences that are cut."""
        if self._num_cuts == 1:
            return
        beside = {"train.compile": config.compile, "parallel.experts": self._num_shares > 1}
        if refused := [name for name, is_set in beside.items() if is_set]:
            raise ConfigError(
                f"parallel.context is {self._num_cuts}, and {refused[0]} is set; sequences that are cut go with replicas or shards of "
                "weights alone"
            )

    def _check_stages(self, config: TrainConfig) -> None:
        """What does not go together with stages."""
        if self._num_stages == 1:
            return
        beside = {"train.compile": config.compile, "parallel.context": self._num_cuts > 1}
        if refused := [name for name, is_set in beside.items() if is_set]:
            raise ConfigError(
                f"parallel.pipeline is {self._num_stages}, and {refused[0]} is set; stages go with replicas of pipelines, with weights in "
                "shards over these (train.parallel=fsdp) and with experts that these share (parallel.experts) alone"
            )
        if self._schedule == "zero-bubble" and config.parallel == "fsdp":
            raise ConfigError(
                "parallel.schedule is zero-bubble, and train.parallel=fsdp is set, which sends gradients of weights as soon as those of "
                "activations are there; use gpipe, 1f1b or interleaved"
            )

    def _check_exact(self, config: TrainConfig) -> None:
        """What has sums of its own order, and so does not go together with exactness."""
        if self._exact is None:
            return
        beside = {"train.compile": config.compile, "train.parallel=fsdp": config.parallel == "fsdp"}
        beside |= {"parallel.experts": self._num_shares > 1, "parallel.context": self._num_cuts > 1}
        beside |= {
            "parallel.schedule=interleaved": self._visits > 1,
            "parallel.micro_batches": self._micro_batches is not None,
            "train.accumulation": config.accumulation > 1,
        }
        if refused := [name for name, is_set in beside.items() if is_set]:
            raise ConfigError(
                f"parallel.exact is {self._exact}, and {refused[0]} is set; it says how many micro-batches a step has, and goes with "
                "stages (parallel.pipeline) and replicas of them (parallel.data) alone"
            )
        if config.batch_size % self._exact:
            raise ConfigError(
                f"parallel.exact is {self._exact}, which does not divide train.batch_size={config.batch_size}; use 1, 2, 4, ... that does"
            )

    @property
    def is_exact(self) -> bool:
        """Whether a step is to the bit that of any other layout."""
        return self._exact is not None

    @property
    def draws_as(self) -> int:
        """By which number torch's generators are seeded here, beside seed and step: the rank, or where all is keyed by the batch, 0."""
        return 0 if self.is_exact else self.rank

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0 if self.elastic is None else self.elastic.holds_folder

    @property
    def is_alone(self) -> bool:
        """Whether this process has all there is of the run, and nobody waits for it."""
        return self.size == 1 and self.elastic is None

    def wrap(self, model: nn.Module, parts: Iterable[nn.Module] = (), *, has_gradients: bool = True) -> Any:
        """``model`` as it is to be called in training. With ``fsdp`` its own parameters become shards, gathered by ``parts``.

        Without gradients replicas need no room for those of others: all that is done is that they begin as the first one.

        Raises ConfigError where experts are to be shared and cannot be, or there are none.
        """
        if self.elastic is not None:
            return self.elastic
        if self.parallel == "pipeline" or self.is_exact:
            return self._in_stages(model, parts)
        self._shard_experts(model)
        if self.parallel == "fsdp":
            shard(model, parts, init_device_mesh(self.device.type, (self.size,)))
        model = self._cut(model)
        if self.parallel == "ddp" and not has_gradients:
            for parameter in model.parameters():
                torch.distributed.broadcast(parameter.data, 0)
        elif self.parallel == "ddp":
            devices = [self.device.index] if self.device.type == "cuda" else None
            # Buffers are loads and schedules: each rank counts its own loads, and schedules are equal by construction.
            options: dict[str, Any] = {_BUFFER_OPTION: False}
            # Searching for parameters without a part in a step takes time, so it is done only where a module says there are some.
            options["find_unused_parameters"] = any(
                getattr(module, "has_idle_parameters", False) for module in model.modules()
            )
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded_parameters(model))
            return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **options)
        return model

    def _shard_experts(self, model: nn.Module) -> None:
        """Leave each process its experts; those of a stage are shared by the processes that have it in other pipelines."""
        if self._num_shares == 1:
            return
        pools = [module for module in model.modules() if isinstance(module, ExpertPool)]
        if not pools:
            raise ConfigError(
                f"parallel.experts is {self._num_shares}, but {type(model).__name__} has no experts; set it to 1"
            )
        mesh = expert_mesh(self.device.type, self._num_shares, self._num_stages)
        for pool in pools:
            shard_experts(pool, mesh)

    def _node_size(self) -> int:
        """Processes of a sequence that are on one machine, as the config or torchrun says; all of them where machines are no whole ones."""
        size = self._context.context_node or int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        return size if self._num_cuts % size == 0 else self._num_cuts

    def _cut(self, model: nn.Module) -> nn.Module:
        """The model as it is called with whole sequences, and works on this process's share of them."""
        if self._num_cuts == 1:
            return model
        mesh = init_device_mesh(
            self.device.type, (self.num_batches, self._num_cuts), mesh_dim_names=("batches", "context")
        )
        topology = Topology(node_size=self._node_size())
        self._cut_model = ContextParallel(
            model, mesh["context"], scheme=self._context.context_scheme, topology=topology
        )
        if self.parallel == "fsdp":
            self._cut_model.gather_by_fsdp()
        return self._cut_model

    @property
    def part_of_evaluation(self) -> tuple[int, int]:
        """Which of how many parts of what is evaluated this process has. Those that cut sequences between them have the same."""
        return (self.batch_number, self.num_batches) if self._num_cuts > 1 else (self.rank, self.size)

    def as_evaluated(self, model: nn.Module) -> nn.Module:
        """The model as it is called in evaluation: it too works on this process's share of each sequence, where sequences are cut."""
        return model if self._cut_model is None else self._cut_model

    def _in_stages(self, model: Any, parts: Iterable[nn.Module]) -> PipelinedDecoder:
        """The model as it is called with the batch of its pipeline; what is shared of a stage, pipelines share."""
        stages = pipelines = None
        if self.size > 1:
            mesh = init_device_mesh(
                self.device.type, (self.num_batches, self._num_stages), mesh_dim_names=("batches", "pipeline")
            )
            stages = mesh["pipeline"].get_group() if self._num_stages > 1 else None
            pipelines = mesh["batches"].get_group() if self.num_batches > 1 else None
            self._shard_experts(model)
            if self._is_fsdp:
                shard_parts(model, [*parts, *ends_of(model)], mesh["batches"])
        self._staged = PipelinedDecoder(
            model,
            stages,
            pipelines,
            micro_batches=self._micro_batches,
            recomputes=self._recomputes,
            exact=self._exact,
            schedule=self._schedule,
            visits=self._visits,
        )
        return self._staged

    @property
    def is_sharded(self) -> bool:
        """Whether a process has a part of the weights only."""
        return self._is_fsdp or self._num_shares > 1

    def micro_batch(self, wrapped: Any, is_last: bool) -> AbstractContextManager[Any]:
        """Around one micro-batch: gradients are exchanged in the last one only."""
        sharded = wrapped.model if isinstance(wrapped, ContextParallel) else wrapped
        if isinstance(sharded, FSDPModule):
            sharded.set_requires_gradient_sync(is_last)
        if isinstance(wrapped, PipelinedDecoder):
            wrapped.is_last = is_last
        if isinstance(wrapped, DistributedDataParallel) and not is_last:
            return wrapped.no_sync()
        return nullcontext()

    @property
    def is_staged(self) -> bool:
        """Whether a process has the moments of some layers only."""
        return self._staged is not None

    def make_whole(self) -> None:
        """Weights in this process are those of all, where other stages have taught some of them. All processes call it together."""
        if self._staged is not None:
            self._staged.make_whole()

    def gradient_norm(
        self, parameters: Sequence[nn.Parameter], norm_of: Callable[[Sequence[nn.Parameter]], float]
    ) -> float:
        """``norm_of`` the gradients of all parameters that learn in the model, those here being ``parameters``."""
        if self.elastic is not None:
            return self.elastic.norm
        if self._staged is None:
            return norm_of(parameters)
        return self._staged.norm(norm_of)

    def gathered(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Named tensors of all stages. All processes call it together."""
        return tensors if self._staged is None else self._staged.gathered(tensors)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` averaged over processes."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def of_first(self, value: float) -> float:
        """The first process's ``value``, in all."""
        if self.size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return float(told)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group, if it was joined here. Nothing may use it any more."""
        if self._staged is not None:
            self._staged.release()
            self._staged = None
        if self._owns_group:
            # Threads of gloo may still be letting go of tensors, for which they need the interpreter's lock. Destroying the
            # group holds that lock and waits for the threads: forever, if they come late.
            time.sleep(0.2)
            dist.destroy_process_group()


def shard(model: nn.Module, parts: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """FSDP2. Each of ``parts`` (a block, a pool that blocks share) is gathered when it is used, the rest of ``model`` for a whole pass."""
    fully_shard(model, mesh=mesh, ignored_params=shard_parts(model, parts, mesh))


def shard_parts(model: nn.Module, parts: Iterable[nn.Module], mesh: DeviceMesh) -> set[nn.Parameter]:
    """FSDP2 of the ``parts`` of a model alone, which may be called each by itself. Gives what of the model is spread already."""
    names = set(sharded_parameters(model))
    spread = {parameter for name, parameter in model.named_parameters() if name in names}
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            # FSDP takes none that lies turned in memory, as what was read from an adapter's file may.
            parameter.data = parameter.data.contiguous()
    for part in parts:
        if all(parameter in spread for parameter in part.parameters()):
            # Each process has its own experts already.
            continue
        # FSDP rebuilds arguments that hold tensors with gradients; what a block emits into a rebuilt context would be lost.
        part.register_forward_pre_hook(_unwrap_contexts, with_kwargs=True)
        # Said, as what is called by itself would keep all of its weights after a forward pass.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=spread)
        part.register_forward_pre_hook(_wrap_contexts, prepend=True, with_kwargs=True)
    return spread


class _WrappedContext:
    """Holds a context while FSDP looks at the arguments of a part."""

    def __init__(self, value: Any) -> None:
        self.value = value


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _wrap_contexts(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return _replaced(lambda value: _WrappedContext(value) if isinstance(value, RoutingContext) else value, args, kwargs)


def _unwrap_contexts(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return _replaced(lambda value: value.value if isinstance(value, _WrappedContext) else value, args, kwargs)


def _replaced(change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return tuple(map(change, args)), {name: change(value) for name, value in kwargs.items()}


def find_device(name: str, *, local_rank: int = 0) -> torch.device:
    """The device that ``name`` means; ``auto`` and ``cuda`` take the GPU of this process.

    Raises ConfigError for a name that is no device, BackendError for one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"train.device is {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        if device.type != "cpu":
            raise ConfigError(f"train.device is {name!r}; use auto, cpu, cuda or cuda:N")
        return device
    if not torch.cuda.is_available():
        raise BackendError(f"train.device is {name!r}, and there is no CUDA device here; use cpu")
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise BackendError(f"train.device is cuda:{index}, and there are {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
