"""The distributed runner: a stage per rank, messages by torch.distributed's point-to-point operations.

torch's own `PipelineStage` fixes the shapes of all messages before the first step, so micro-batches that differ, and skips, are beyond it;
below it stand ``isend`` and ``irecv``, and those are used here. A message is one buffer: two numbers, then its tensors. Both ends expect it
to be as long as the last one of its kind, so it can be received before it is asked for; where it is something else, the numbers say so (a
header of JSON and the tensors follow, or the failure of the sender), and the rest of the buffer means nothing.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.cluster.gpipe.micro_batches import tensors_of
from anabranch.cluster.gpipe.stage import Address, Failure
from anabranch.cluster.messages import MessageLog

__all__ = ["Messages", "agree"]

_SAME, _CHANGED, _FAILED = 0, 1, -1
# Bytes of the two numbers, and what every tensor's place in a buffer is a multiple of.
_ALIGNED = 16
_PLAIN = (type(None), bool, int, float, str)


class Messages:
    """Messages between the ranks of a group; chunk c is on rank c mod K.

    Args:
        group: the ranks, stage by stage; None for all.
        names: of all skips, in an order that all ranks have.
        device: where messages are received: the CPU under gloo, this rank's GPU under NCCL.
        log: told of what is sent; None for nobody.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        names: Sequence[str],
        device: torch.device,
        *,
        log: MessageLog | None = None,
    ) -> None:
        self._group, self._device, self._log = group, device, log
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        # Kinds of messages between two ranks are told apart by tags, which gloo matches; under NCCL their order does.
        kinds = [("forward", ""), ("backward", "")]
        kinds += [(kind, name) for name in names for kind in ("skip", "skip gradient")]
        self._tags = {kind: number for number, kind in enumerate(kinds)}
        self._own: dict[Address, Any] = {}
        self._pending: dict[Address, list[tuple[dist.Work, Tensor]]] = {}
        # By (rank, tag): the header of the last message there, of what is sent and of what is received.
        self._sent: dict[tuple[int, int], bytes] = {}
        self._seen: dict[tuple[int, int], Any] = {}
        self._lengths: dict[tuple[int, int], int] = {}
        # Messages of this step that are still to come, and those that are being received already.
        self._left: dict[tuple[int, int], int] = {}
        self._coming: dict[tuple[int, int], tuple[dist.Work, Tensor]] = {}

    def begin(self, micro_batches: int, *, is_training: bool) -> None:
        """A step begins, in which a message of each kind comes for every micro-batch; those of gradients only in training."""
        self._left = dict.fromkeys(self._left, micro_batches)
        if not is_training:
            backward = {tag for (kind, _), tag in self._tags.items() if kind in ("backward", "skip gradient")}
            self._left = {key: count for key, count in self._left.items() if key[1] % len(self._tags) not in backward}
        self._micro_batches = micro_batches
        for key in self._left:
            self._expect(key)

    def send(self, address: Address, value: Any) -> None:
        """See `Channel`."""
        target = address.target % self._size
        if target == self._rank:
            self._own[address] = value
            return
        key = target, self._tag(address)
        length = self._lengths.get(key, 0)
        if isinstance(value, Failure):
            told = json.dumps([value.stage, value.micro_batch, value.kind, value.why]).encode()
            self._post(address, key, _packed(_FAILED, len(told), [], length))
            self._post(address, key, torch.frombuffer(bytearray(told), dtype=torch.uint8))
            return
        tensors = [tensor.detach() for tensor in tensors_of(value)]
        header = json.dumps(_described(value)).encode()
        if self._sent.get(key) == header:
            self._post(address, key, _packed(_SAME, 0, tensors, length))
        else:
            self._post(address, key, _packed(_CHANGED, len(header), [], length))
            self._post(address, key, torch.frombuffer(bytearray(header), dtype=torch.uint8))
            self._sent[key] = header
            self._lengths[key] = length = sum(_aligned(tensor.nbytes) for tensor in tensors)
            if length:
                self._post(address, key, _packed(_SAME, 0, tensors, length))
        if self._log is not None:
            size = sum(tensor.nbytes for tensor in tensors)
            self._log.add(self._rank, target, size, kind=address.kind, micro_batch=address.micro_batch)

    def receive(self, address: Address) -> Any:
        """See `Channel`."""
        source = address.source % self._size
        if source == self._rank:
            return self._own.pop(address)
        key = source, self._tag(address)
        self._left.setdefault(key, self._micro_batches)
        self._expect(key)
        work, buffer = self._coming.pop(key)
        work.wait()
        self._left[key] -= 1
        state, length = buffer[:_ALIGNED].view(torch.int64).tolist()
        if state == _FAILED:
            told = json.loads(bytes(self._get(key, length).tolist()))
            self._expect(key)
            stage, micro_batch, kind, why = told
            return Failure(stage, micro_batch, kind, why)
        if state == _CHANGED:
            self._seen[key] = json.loads(bytes(self._get(key, length).tolist()))
            size = _length_of(self._seen[key])
            buffer = self._get(key, _ALIGNED + size) if size else buffer
        self._expect(key)
        value, _ = _filled(self._seen[key], buffer, _ALIGNED)
        if address.kind in ("backward", "skip gradient"):
            # Whoever sent a gradient has had the output.
            kind = "forward" if address.kind == "backward" else "skip"
            self._wait(replace(address, kind=kind, source=address.target, target=address.source))
        return value

    def _expect(self, key: tuple[int, int]) -> None:
        """Begin to receive the next message of this kind, if there is to be one."""
        if key in self._coming or not self._left[key]:
            return
        size = _ALIGNED + (_length_of(self._seen[key]) if key in self._seen else 0)
        self._coming[key] = self._receiving(key, size)

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for address in list(self._pending):
            self._wait(address)

    def _tag(self, address: Address) -> int:
        # Boundaries between the same two ranks of several visits are told apart too.
        kind = self._tags[address.kind, address.name]
        return kind + len(self._tags) * min(address.source, address.target)

    def _post(self, address: Address, key: tuple[int, int], buffer: Tensor) -> None:
        target, tag = key
        buffer = buffer.to(self._device)
        work = dist.isend(buffer, group=self._group, group_dst=target, tag=tag)
        assert work is not None
        # The buffer is kept until it is sent.
        self._pending.setdefault(address, []).append((work, buffer))

    def _wait(self, address: Address) -> None:
        for work, _ in self._pending.pop(address, ()):
            work.wait()

    def _get(self, key: tuple[int, int], size: int) -> Tensor:
        work, buffer = self._receiving(key, size)
        work.wait()
        return buffer

    def _receiving(self, key: tuple[int, int], size: int) -> tuple[dist.Work, Tensor]:
        source, tag = key
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        work = dist.irecv(buffer, group=self._group, group_src=source, tag=tag)
        assert work is not None
        return work, buffer


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _packed(state: int, number: int, tensors: Sequence[Tensor], length: int) -> Tensor:
    """uint8: the two numbers, then the tensors, ``length`` bytes with what is between them."""
    device = tensors[0].device if tensors else None
    buffer = torch.empty(_ALIGNED + length, dtype=torch.uint8, device=device)
    buffer[:_ALIGNED].view(torch.int64).copy_(torch.tensor([state, number]))
    place = _ALIGNED
    for tensor in tensors:
        if tensor.numel():
            buffer[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        place += _aligned(tensor.nbytes)
    return buffer


def _filled(description: Any, buffer: Tensor, place: int) -> tuple[Any, int]:
    """(the value of a description, the place behind its last tensor); its tensors are parts of the buffer."""
    kind, content = description
    if kind == "tensor":
        name, shape, needs_grad = content
        dtype = getattr(torch, name)
        size = math.prod(shape) * dtype.itemsize
        tensor = buffer[place : place + size].view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
        return tensor.requires_grad_(needs_grad), place + _aligned(size)
    if kind == "plain":
        return content, place
    items = []
    for item in content:
        name, described = item if kind == "dict" else (None, item)
        value, place = _filled(described, buffer, place)
        items.append((name, value))
    if kind == "dict":
        return dict(items), place
    values = [value for _, value in items]
    return (tuple(values) if kind == "tuple" else values), place


def _length_of(description: Any) -> int:
    """Bytes of the tensors of a description in a buffer."""
    kind, content = description
    if kind == "tensor":
        name, shape, _ = content
        return _aligned(math.prod(shape) * getattr(torch, name).itemsize)
    if kind == "plain":
        return 0
    return sum(_length_of(item[1] if kind == "dict" else item) for item in content)


def _described(value: Any) -> list[Any]:
    """JSON of a nested value, without the numbers of its tensors."""
    if isinstance(value, Tensor):
        return ["tensor", [str(value.dtype).removeprefix("torch."), list(value.shape), value.requires_grad]]
    if isinstance(value, dict):
        return ["dict", [[name, _described(item)] for name, item in value.items()]]
    if isinstance(value, tuple | list):
        return ["tuple" if isinstance(value, tuple) else "list", [_described(item) for item in value]]
    if isinstance(value, _PLAIN):
        return ["plain", value]
    raise TypeError(
        f"a boundary of stages carries tensors, tuples, lists, dicts and plain numbers and texts, not {type(value).__name__}"
    )


def agree(
    failure: Failure | None,
    loss: Tensor,
    group: dist.ProcessGroup | None,
    device: torch.device,
    counts: Sequence[int] = (),
) -> tuple[Tensor, list[int]]:
    """(the loss of the last stage on every rank, the sums of ``counts`` over ranks); or, if a stage failed, raise its error on every rank.

    Raises StageError: of the failure with the smallest micro-batch and stage.
    """
    numbers = torch.tensor([float(failure is not None), *counts], dtype=torch.float64, device=device)
    told = torch.cat((loss.to(device, torch.float64).reshape(1), numbers))
    dist.all_reduce(told, group=group)
    if told[1] == 0:
        return told[0], [int(count) for count in told[2:].tolist()]
    texts: list[Any] = [None] * dist.get_world_size(group)
    text = None if failure is None else (failure.stage, failure.micro_batch, failure.kind, failure.why)
    dist.all_gather_object(texts, text, group=group)
    stage, micro_batch, kind, why = min(
        (text for text in texts if text is not None), key=lambda text: (text[1], text[0])
    )
    cause = failure.cause if failure is not None and text == (stage, micro_batch, kind, why) else None
    raise Failure(stage, micro_batch, kind, why, cause).error()
