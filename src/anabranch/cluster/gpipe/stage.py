"""A stage: goes through its column of the schedule, with what it gets from other stages and what it sends them.

Every piece of work receives and sends the same messages whether it succeeds or not: a stage that fails goes through the rest of its column
and sends its failure in place of tensors. So all stages hear of it, nobody waits for a message that never comes, and the channels are as
empty afterwards as after a step that went well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from anabranch.cluster.gpipe.chunk import Chunk, StepKey
from anabranch.cluster.gpipe.micro_batches import map_tensors, tensors_of
from anabranch.cluster.schedules import BACKWARD, FORWARD, WEIGHT, Schedule, Slot

__all__ = ["Address", "Batch", "Channel", "Failure", "Stage", "StageError"]


class StageError(RuntimeError):
    """A stage of a pipeline failed; what it failed with is the cause, where that is of this process.

    Attributes:
        stage, micro_batch, kind: where: ``forward``, ``backward``, or ``weight`` where gradients of weights are work of their own.
        is_original: whether it is of this stage; else another one told of it.
    """

    def __init__(self, stage: int, micro_batch: int, kind: str, why: str) -> None:
        self.stage, self.micro_batch, self.kind, self.why = stage, micro_batch, kind, why
        work = "gradients of weights" if kind == WEIGHT else kind
        super().__init__(f"stage {stage} failed in the {work} of micro-batch {micro_batch}: {why}")

    def __reduce__(self) -> Any:
        return StageError, (self.stage, self.micro_batch, self.kind, self.why)


@dataclass(frozen=True)
class Failure:
    """What is sent in place of tensors."""

    stage: int
    micro_batch: int
    kind: str
    why: str
    cause: BaseException | None = field(default=None, compare=False)

    def error(self) -> StageError:
        """As an error to raise."""
        made = StageError(self.stage, self.micro_batch, self.kind, self.why)
        made.__cause__ = self.cause
        return made


@dataclass(frozen=True)
class Address:
    """What a message is.

    Attributes:
        kind: ``forward`` and ``backward`` of the boundary between two chunks; ``skip`` and ``skip gradient`` of a skip.
        name: of the skip.
        micro_batch: its number.
        source, target: chunks.
    """

    kind: str
    name: str
    micro_batch: int
    source: int
    target: int


class Channel(Protocol):
    """How messages go between chunks."""

    def send(self, address: Address, value: Any) -> None:
        """Send without waiting: a nested value, a list of gradients, or a `Failure`."""

    def receive(self, address: Address) -> Any:
        """What was sent to this address; waits for it."""


@dataclass
class Batch:
    """What a step is of, as far as a stage needs it.

    Attributes:
        key: of random numbers.
        recomputes: whether the forward of each micro-batch is done again.
        inputs: of each micro-batch, where the first chunk is.
        targets: likewise, where the last chunk is.
        weights: of each micro-batch's loss.
        loss_fn: of output and target.
        losses: of each micro-batch, filled in by the last chunk.
        outputs: of each micro-batch, in inference.
        problem: why the last stage cannot do its part.
        after_backward: told of each backward, when gradients of weights are there, with the layers that it was of.
    """

    key: StepKey
    recomputes: Sequence[bool]
    inputs: Sequence[Any]
    targets: Sequence[Any]
    weights: Sequence[float]
    loss_fn: Callable[..., Tensor] | None
    losses: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    problem: Exception | None = None
    after_backward: Callable[[int, Sequence[nn.Module]], None] | None = None


class Stage:
    """One stage, with a chunk for each visit.

    Args:
        number: of the stage.
        chunks: its own.
        device: where its work is done.
    """

    def __init__(self, number: int, chunks: Sequence[Chunk], device: torch.device | None) -> None:
        self.number, self.chunks, self.device = number, list(chunks), device
        self._graphs: dict[tuple[int, int], Tensor] = {}

    def run(self, schedule: Schedule, batch: Batch, channel: Channel) -> Failure | None:
        """The stage's column. Returns the failure that it met or heard of, if there was one."""
        # A step that was given up left what it had.
        self._clear()
        failure: Failure | None = None
        slots = schedule.of_stage(self.number)
        last = {slot.visit: slot for slot in slots if slot.kind == BACKWARD}
        for slot in slots:
            if slot == last.get(slot.visit):
                self.chunks[slot.visit].exchange_gradients(True)
            elif slot.kind == BACKWARD:
                self.chunks[slot.visit].exchange_gradients(False)
            failure = self._slot(slot, self.chunks[slot.visit], batch, channel, failure)
        if failure is None and batch.loss_fn is not None:
            for chunk in self.chunks:
                for statistics in chunk.statistics:
                    statistics.commit()
        self._clear()
        return failure

    def _clear(self) -> None:
        self._graphs.clear()
        for chunk in self.chunks:
            chunk.clear()

    def _slot(
        self, slot: Slot, chunk: Chunk, batch: Batch, channel: Channel, failure: Failure | None
    ) -> Failure | None:
        sends: dict[Address, Any] = {}
        work = {FORWARD: self._forward, BACKWARD: self._backward, WEIGHT: self._weights}[slot.kind]
        if failure is None and slot.kind == BACKWARD:
            # A recomputation does not wait for the gradient.
            failure = self._tried(slot, lambda: chunk.prepare(slot.micro_batch, batch.key))
        received = {address: channel.receive(address) for address in _incoming(slot, chunk)}
        told = next((value for value in received.values() if isinstance(value, Failure)), None)
        failure = failure or told
        if failure is None:
            found = {address: self._placed(value) for address, value in received.items()}
            failure = self._tried(slot, lambda: sends.update(work(slot.micro_batch, chunk, batch, found)))
        for address in _outgoing(slot, chunk):
            if failure is None:
                # What cannot be sent is found out before anything of it is.
                failure = self._tried(slot, partial(channel.send, address, sends[address]), TypeError)
                if failure is None:
                    continue
            channel.send(address, failure)
        return failure

    def _tried(self, slot: Slot, work: Callable[[], Any], kind: type[Exception] = Exception) -> Failure | None:
        try:
            work()
        except kind as error:
            why = f"{type(error).__name__}: {error}"
            return Failure(self.number, slot.micro_batch, slot.kind, why, error)
        return None

    def _placed(self, value: Any) -> Any:
        """A received value on this stage's device, its leaves leaves still."""
        if self.device is None or all(tensor.device == self.device for tensor in tensors_of(value)):
            return value
        return map_tensors(value, lambda tensor: tensor.detach().to(self.device).requires_grad_(tensor.requires_grad))

    def _forward(
        self, micro_batch: int, chunk: Chunk, batch: Batch, received: dict[Address, Any]
    ) -> dict[Address, Any]:
        entry, imports = None, {}
        if chunk.is_last and batch.problem is not None:
            raise batch.problem
        if chunk.is_first:
            entry = self._placed(map_tensors(batch.inputs[micro_batch], lambda tensor: tensor.detach()))
        for address, value in received.items():
            if address.kind == "skip":
                imports[address.name] = value
            else:
                entry = value
        if batch.loss_fn is None:
            output, exports = chunk.infer(entry, imports)
            if chunk.is_last:
                batch.outputs[micro_batch] = output
        else:
            recomputes = batch.recomputes[micro_batch]
            output, exports = chunk.forward(micro_batch, entry, imports, batch.key, keeps_graph=not recomputes)
            if chunk.is_last and not recomputes:
                self._loss(micro_batch, chunk, batch)
        return {
            address: exports[address.name] if address.kind == "skip" else output
            for address in _outgoing_forward(micro_batch, chunk)
        }

    def _backward(
        self, micro_batch: int, chunk: Chunk, batch: Batch, received: dict[Address, Any]
    ) -> dict[Address, Any]:
        skips: dict[str, Tensor | None] = {}
        gradients: list[Tensor | None] = []
        for address, value in received.items():
            if address.kind == "skip gradient":
                skips[address.name] = value[0]
            else:
                gradients = value
        if chunk.is_last:
            if (micro_batch, chunk.number) not in self._graphs:
                self._loss(micro_batch, chunk, batch)
            loss = self._graphs.pop((micro_batch, chunk.number))
            gradients, skips = chunk.backward_loss(micro_batch, loss)
        else:
            gradients, skips = chunk.backward(micro_batch, gradients, skips)
        if batch.after_backward is not None and not chunk.puts_off:
            batch.after_backward(micro_batch, chunk.layers)
        return {
            address: [skips[address.name]] if address.kind == "skip gradient" else gradients
            for address in _outgoing_backward(micro_batch, chunk)
        }

    def _weights(
        self, micro_batch: int, chunk: Chunk, batch: Batch, received: dict[Address, Any]
    ) -> dict[Address, Any]:
        chunk.backward_weights(micro_batch)
        if batch.after_backward is not None:
            batch.after_backward(micro_batch, chunk.layers)
        return {}

    def _loss(self, micro_batch: int, chunk: Chunk, batch: Batch) -> None:
        assert batch.loss_fn is not None
        target = self._placed(batch.targets[micro_batch])
        graph, value = chunk.loss(micro_batch, target, batch.loss_fn, batch.weights[micro_batch], batch.key)
        self._graphs[micro_batch, chunk.number] = graph
        batch.losses[micro_batch] = value


def _incoming(slot: Slot, chunk: Chunk) -> list[Address]:
    micro_batch, number = slot.micro_batch, chunk.number
    if slot.kind == WEIGHT:
        return []
    if slot.kind == FORWARD:
        boundary = [] if chunk.is_first else [Address("forward", "", micro_batch, number - 1, number)]
        return boundary + [Address("skip", route.name, micro_batch, route.source, number) for route in chunk.imports]
    boundary = [] if chunk.is_last else [Address("backward", "", micro_batch, number + 1, number)]
    return boundary + [
        Address("skip gradient", route.name, micro_batch, route.target, number) for route in chunk.exports
    ]


def _outgoing(slot: Slot, chunk: Chunk) -> list[Address]:
    if slot.kind == WEIGHT:
        return []
    of_kind = _outgoing_forward if slot.kind == FORWARD else _outgoing_backward
    return of_kind(slot.micro_batch, chunk)


def _outgoing_forward(micro_batch: int, chunk: Chunk) -> list[Address]:
    number = chunk.number
    boundary = [] if chunk.is_last else [Address("forward", "", micro_batch, number, number + 1)]
    return boundary + [Address("skip", route.name, micro_batch, number, route.target) for route in chunk.exports]


def _outgoing_backward(micro_batch: int, chunk: Chunk) -> list[Address]:
    number = chunk.number
    boundary = [] if chunk.is_first else [Address("backward", "", micro_batch, number, number - 1)]
    return boundary + [
        Address("skip gradient", route.name, micro_batch, number, route.source) for route in chunk.imports
    ]
