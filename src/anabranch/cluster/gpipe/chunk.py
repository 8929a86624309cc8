"""A chunk: a contiguous part of the model, run forward and backward one micro-batch at a time.

Between the two a chunk keeps of a micro-batch either its graph, or its inputs alone; then backward does the forward again first, with the
same random numbers and without moving running statistics.

Where a schedule has gradients of weights as work of their own, `Chunk.backward` gives those of what came in, and `Chunk.backward_weights`
adds those of parameters (`anabranch.cluster.decoupled`).
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from anabranch.cluster.decoupled import Later, backward_of_inputs
from anabranch.cluster.gpipe.batch_norm import DeferredStatistics, untracked
from anabranch.cluster.gpipe.buffers import BufferCopy, MovingBuffers
from anabranch.cluster.gpipe.micro_batches import map_tensors, tensors_of
from anabranch.cluster.gpipe.skips import Area, Route, works_in_place
from anabranch.cluster.keyed_random import KeyedDropout, drawing, place_of, random_key
from anabranch.cluster.saved_bytes import Held, SavedBytes, SavedTensor
from anabranch.errors import InputError

__all__ = ["Borrowing", "Chunk", "Gradients", "StepKey", "is_recomputing"]

# One entry of each tensor of a nested value, None where it has no gradient.
Gradients = list[Tensor | None]
LossFunction = Callable[..., Tensor]

_DROPPERS = (
    nn.modules.dropout._DropoutNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)


class Borrowing(nn.Module):
    """A layer that runs modules of a model which are registered there, and not in the layer."""

    def parts(self) -> list[nn.Module]:
        """The modules that it runs."""
        raise NotImplementedError  # abstract


@dataclass(frozen=True)
class StepKey:
    """What random numbers are a function of, beside layer and micro-batch.

    Attributes:
        seed, step: of the pipeline.
        first_rows: of each micro-batch, the number that its first row has in the whole batch.
        first_micro_batch: the number that micro-batch 0 has in the whole batch.
    """

    seed: int
    step: int
    first_rows: tuple[int, ...] = ()
    first_micro_batch: int = 0

    def of(self, layer: int, micro_batch: int) -> int:
        """The key of all that a layer draws in a micro-batch."""
        return random_key(self.seed, self.step, layer, self.first_micro_batch + micro_batch)


@dataclass
class _Kept:
    """What is kept of a micro-batch between forward and backward."""

    entry: Any
    imports: dict[str, Tensor]
    output: Any = None
    exports: dict[str, Tensor] = field(default_factory=dict)
    # Whether there is a graph; else the forward is done again.
    has_graph: bool = False
    held: Held | None = None
    # As they were before the forward, where that is done again.
    buffers: list[BufferCopy] = field(default_factory=list)
    # Gradients of weights, where they are work of their own, and the kind of device that they are made on.
    later: Later | None = None
    device: str = "cpu"
    # What autograd keeps of it, where that is of account.
    saved: "list[weakref.ref[SavedTensor]]" = field(default_factory=list)


class Chunk:
    """Layers ``part`` of a model.

    Args:
        layers: those of the part, in order.
        part: their numbers in the model, by which random numbers are keyed.
        routes: the skips of the whole model.
        number, num_chunks: which chunk of how many.
        is_deferred: whether batch norms track a whole batch, see `DeferredStatistics`.
        meter: counts what is kept between forward and backward; None for no count.
        draws: whether layers draw random numbers; None to find out.
        is_exact: whether a forward that will be done again is run as if it were not.
        puts_off: whether gradients of weights are work of their own: `backward` leaves them to `backward_weights`.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        part: range,
        routes: Sequence[Route],
        number: int,
        num_chunks: int,
        *,
        is_deferred: bool = False,
        meter: SavedBytes | None = None,
        draws: bool | None = None,
        is_exact: bool = False,
        puts_off: bool = False,
    ) -> None:
        self.is_exact, self.puts_off = is_exact, puts_off
        self.layers, self.part, self.number = list(layers), part, number
        self.is_first, self.is_last = number == 0, number == num_chunks - 1
        self.imports = [route for route in routes if route.target == number != route.source]
        self.exports = [route for route in routes if route.source == number != route.target]
        self.modules = [module for layer in self.layers for module in layer.modules()]
        self.statistics = DeferredStatistics.of(self.modules) if is_deferred else []
        self._buffers = MovingBuffers(self.modules)
        self.meter = meter
        self._unread = SavedBytes()
        # Modules that draw as they are set; and whether a layer was seen to draw beside those, None until it has run in training.
        self._droppers = [
            [module for module in layer.modules() if isinstance(module, _DROPPERS)] for layer in self.layers
        ]
        self._draws: list[bool | None] = [draws for _ in self.layers]
        # Of each layer, those that draw by rows; one that stands in several layers has a place in each.
        self._keyed = [
            [module for module in layer.modules() if isinstance(module, KeyedDropout)] for layer in self.layers
        ]
        self._loss_draws: bool | None = None
        self._kept: dict[int, _Kept] = {}

    def clear(self) -> None:
        """Forget micro-batches that were not finished."""
        for micro_batch in list(self._kept):
            self._forget(micro_batch)
        for statistics in self.statistics:
            statistics.clear()

    def infer(self, entry: Any, imports: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Output and exported skips, without gradients."""
        with torch.no_grad():
            return self._run(entry, imports, None, 0)

    def forward(
        self, micro_batch: int, entry: Any, imports: dict[str, Tensor], key: StepKey, *, keeps_graph: bool
    ) -> tuple[Any, dict[str, Tensor]]:
        """Output and exported skips; what backward needs is kept.

        Args:
            micro_batch: its number.
            entry: what the first layer gets. Its tensors are leaves: those that ``requires_grad`` get gradients.
            imports: skips of other chunks by name, likewise.
            key: of random numbers.
            keeps_graph: keep the graph, or inputs alone.
        """
        kept = self._kept[micro_batch] = _Kept(entry, imports)
        if not keeps_graph:
            if self.meter is not None:
                kept.held = self.meter.hold(*tensors_of(entry), *imports.values())
            # Layers may take other kernels where no gradient is wanted, with other bits.
            with _graph_dropped() if self.is_exact else torch.no_grad(), self._counting():
                versions = [tensor._version for tensor in tensors_of(entry)]
                buffers = self._buffers.before()
                output, exports = self._run(entry, imports, key, micro_batch)
                kept.buffers = self._buffers.moved(buffers)
            self._check_unchanged(entry, versions)
            # What would need a gradient cannot be told without a graph: all that can have one.
            return _as_sent(output, None), _as_sent(exports, None)
        with torch.enable_grad(), self._counting(), self._watching(kept):
            kept.output, kept.exports = self._run(entry, imports, key, micro_batch)
        kept.has_graph = True
        return _as_sent(kept.output, True), _as_sent(kept.exports, True)

    def prepare(self, micro_batch: int, key: StepKey) -> None:
        """Do the forward again where there is no graph; the gradient is not needed for that."""
        kept = self._kept[micro_batch]
        if kept.has_graph:
            return
        if kept.held is not None:
            # From here on autograd counts them.
            kept.held.release()
        deferred = untracked(statistics.module for statistics in self.statistics)
        with torch.enable_grad(), deferred, self._buffers.as_before(kept.buffers), self._watching(kept), _recomputing():
            kept.output, kept.exports = self._run(kept.entry, kept.imports, key, micro_batch)
        kept.buffers = []
        kept.has_graph = True

    def loss(
        self, micro_batch: int, target: Any, loss_fn: LossFunction, weight: float, key: StepKey
    ) -> tuple[Tensor, Tensor]:
        """(what is to be differentiated, its value) of the last chunk: the micro-batch's part of the batch's loss."""
        kept = self._kept[micro_batch]
        with torch.enable_grad(), self._watching(kept):
            if weight == 0:
                # A mean over nothing is NaN; and the output may hold infinities, which times 0 are NaN too. A sum of none of its numbers
                # gives each of them a gradient of 0.
                nothing = (tensor.reshape(-1)[:0].sum().real for tensor in tensors_of(kept.output))
                loss = sum(nothing, start=torch.zeros(()))
            elif self._loss_draws is False:
                loss = loss_fn(kept.output, target)
            else:
                devices = {tensor.device for tensor in tensors_of(kept.output)}
                with drawing(key.of(self.part.stop, micro_batch), [*devices]) as mode:
                    loss = loss_fn(kept.output, target)
                self._loss_draws = mode.has_drawn
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shown = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"loss_fn gave {shown}; it must give one number, the mean over a micro-batch's items")
        loss = loss.reshape(()) * weight
        return loss, loss.detach()

    def backward(
        self, micro_batch: int, gradients: Gradients, skip_gradients: dict[str, Tensor | None]
    ) -> tuple[Gradients, dict[str, Tensor | None]]:
        """Gradients of the entry and of imported skips; those of parameters are added to theirs, or put off.

        Args:
            micro_batch: its number; `prepare` has been called.
            gradients: of each tensor of the output.
            skip_gradients: of exported skips.
        """
        kept = self._kept[micro_batch]
        roots, with_respect = [], []
        pairs = [*zip(tensors_of(kept.output), gradients, strict=True)]
        pairs += [(kept.exports[name], gradient) for name, gradient in skip_gradients.items()]
        for tensor, gradient in pairs:
            if tensor.requires_grad and gradient is not None:
                roots.append(tensor)
                with_respect.append(gradient)
        return self._differentiate(micro_batch, roots, with_respect)

    def backward_loss(self, micro_batch: int, loss: Tensor) -> tuple[Gradients, dict[str, Tensor | None]]:
        """As `backward`, of the last chunk."""
        roots = [loss] if loss.requires_grad else []
        return self._differentiate(micro_batch, roots, [None] * len(roots))

    def backward_weights(self, micro_batch: int) -> None:
        """Add the gradients of parameters that `backward` put off."""
        kept = self._kept[micro_batch]
        assert kept.later is not None
        with _without_autocast(kept.device):
            kept.later.finish()
        self._forget(micro_batch)

    def exchange_gradients(self, does: bool) -> None:
        """Whether layers that are in shards (FSDP2) exchange gradients in the next backward: once a step, in its last one."""
        for module in self._sharded():
            module.set_requires_gradient_sync(does, recurse=False)

    @property
    def is_sharded(self) -> bool:
        """Whether a layer is in shards (FSDP2)."""
        return any(True for _ in self._sharded())

    def _sharded(self) -> Iterator[FSDPModule]:
        borrowed = [part for layer in self.layers if isinstance(layer, Borrowing) for part in layer.parts()]
        for module in (*self.modules, *(module for part in borrowed for module in part.modules())):
            if isinstance(module, FSDPModule):
                yield module

    def _differentiate(
        self, micro_batch: int, roots: list[Tensor], gradients: Sequence[Tensor | None]
    ) -> tuple[Gradients, dict[str, Tensor | None]]:
        kept = self._kept[micro_batch]
        if self.puts_off:
            inputs = [*tensors_of(kept.entry), *kept.imports.values()]
            device = roots[0].device.type if roots else "cpu"
            with _without_autocast(device):
                of_inputs, later = backward_of_inputs(roots, gradients, inputs, meter=self.meter, saved=kept.saved)
            # What gradients of weights do not need is let go of here.
            self._kept[micro_batch] = _Kept(None, {}, later=later, device=device)
            of_skips = of_inputs[len(of_inputs) - len(kept.imports) :]
            return of_inputs[: len(of_inputs) - len(kept.imports)], dict(zip(kept.imports, of_skips, strict=True))
        if roots:
            with _without_autocast(roots[0].device.type):
                torch.autograd.backward(roots, list(gradients))
        found = [tensor.grad for tensor in tensors_of(kept.entry)]
        skips = {name: tensor.grad for name, tensor in kept.imports.items()}
        self._forget(micro_batch)
        return found, skips

    def _forget(self, micro_batch: int) -> None:
        kept = self._kept.pop(micro_batch)
        if kept.held is not None:
            kept.held.release()
        if kept.later is not None:
            kept.later.release()

    def _run(
        self, x: Any, imports: dict[str, Tensor], key: StepKey | None, micro_batch: int
    ) -> tuple[Any, dict[str, Tensor]]:
        area = Area(imports)
        if key is not None and works_in_place(self.layers[0]):
            # It would overwrite what a recomputation needs, and may not change a leaf.
            x = map_tensors(x, lambda tensor: tensor.clone())
        with area.here():
            for place, layer in enumerate(self.layers):
                x = self._call(place, layer, x, key, micro_batch)
        return x, {route.name: area.waiting.pop(route.name) for route in self.exports}

    def _call(self, place: int, layer: nn.Module, x: Any, key: StepKey | None, micro_batch: int) -> Any:
        """One layer; where it draws, with numbers that are a function of (seed, step, layer, micro-batch)."""
        if key is not None:
            for number, module in enumerate(self._keyed[place]):
                module.step, module.first_row, module.run_seed = key.step, key.first_rows[micro_batch], key.seed
                module.place = place_of(self.part[place], number)
        drops = any(map(_drops, self._droppers[place]))
        if key is None or not layer.training or not (drops or self._draws[place] is not False):
            return layer(x)
        devices = {tensor.device for tensor in tensors_of(x)}
        with drawing(key.of(self.part[place], micro_batch), [*devices]) as mode:
            x = layer(x)
        if not drops and self._draws[place] is None:
            self._draws[place] = mode.has_drawn
        return x

    def _check_unchanged(self, entry: Any, versions: list[int]) -> None:
        if [tensor._version for tensor in tensors_of(entry)] != versions:
            raise InputError(
                f"layer {self.part.start} changes its input in place, which its recomputation needs; "
                'let it make a new tensor, or use checkpoint="never"'
            )

    def _counting(self) -> ExitStack:
        stack = ExitStack()
        if self.statistics:
            stack.enter_context(untracked(statistics.module for statistics in self.statistics))
            for statistics in self.statistics:
                stack.enter_context(statistics.counting())
        return stack

    def _watching(self, kept: _Kept) -> Any:
        if self.puts_off:
            return (self.meter or self._unread).watch(kept.saved)
        return nullcontext() if self.meter is None else self.meter.watch()


@contextmanager
def _graph_dropped() -> Iterator[None]:
    """As if gradients were wanted, but nothing is kept for them."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _not_kept):
        yield


def _not_kept(packed: Any) -> Tensor:
    raise AssertionError("this graph is never differentiated: the forward is done again")


_here = threading.local()


def is_recomputing() -> bool:
    """Whether this thread does a forward again whose first time was counted."""
    return getattr(_here, "is_recomputing", False)


@contextmanager
def _recomputing() -> Iterator[None]:
    _here.is_recomputing = True
    try:
        yield
    finally:
        _here.is_recomputing = False


def _drops(module: nn.Module) -> bool:
    """Whether a module of `_DROPPERS` draws, as it is set now."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return module.dropout > 0 if isinstance(module, nn.MultiheadAttention | nn.RNNBase) else True


def _without_autocast(kind: str) -> Any:
    """What a backward computes in is the forward's choice."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _as_sent(value: Any, is_of_graph: bool | None) -> Any:
    """``value`` as leaves for the next chunk."""

    def leaf(tensor: Tensor) -> Tensor:
        can = tensor.is_floating_point() or tensor.is_complex()
        return tensor.detach().requires_grad_(can and (tensor.requires_grad or is_of_graph is None))

    return map_tensors(value, leaf)
