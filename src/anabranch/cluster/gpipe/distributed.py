"""The distributed runner: a stage per rank, messages by torch.distributed's point-to-point operations.

torch's own `PipelineStage` fixes the shapes of all messages before the first step, so micro-batches that differ, and skips, are beyond it;
below it stand ``isend`` and ``irecv``, and those are used here. Each message begins with two numbers: 0 says that what follows has the
shapes of the last message of its kind, 1 that a header of so many bytes (JSON) describes it, -1 that the sender failed and says how.
"""

import json
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

_SAME, _FAILED = 0, -1
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
        self._sent: dict[tuple[int, int], bytes] = {}
        self._seen: dict[tuple[int, int], Any] = {}

    def send(self, address: Address, value: Any) -> None:
        """See `Channel`."""
        target = address.target % self._size
        if target == self._rank:
            self._own[address] = value
            return
        tag = self._tag(address)
        if isinstance(value, Failure):
            told = json.dumps([value.stage, value.micro_batch, value.kind, value.why]).encode()
            self._post(address, target, tag, torch.tensor([_FAILED, len(told)]))
            self._post(address, target, tag, torch.frombuffer(bytearray(told), dtype=torch.uint8))
            return
        tensors = [tensor.detach().contiguous() for tensor in tensors_of(value)]
        header = json.dumps(_described(value)).encode()
        if self._sent.get((target, tag)) == header:
            self._post(address, target, tag, torch.tensor([_SAME, 0]))
        else:
            self._sent[target, tag] = header
            self._post(address, target, tag, torch.tensor([1, len(header)]))
            self._post(address, target, tag, torch.frombuffer(bytearray(header), dtype=torch.uint8))
        for tensor in tensors:
            if tensor.numel():
                self._post(address, target, tag, tensor)
        if self._log is not None:
            size = sum(tensor.nbytes for tensor in tensors)
            self._log.add(self._rank, target, size, kind=address.kind, micro_batch=address.micro_batch)

    def receive(self, address: Address) -> Any:
        """See `Channel`."""
        source = address.source % self._size
        if source == self._rank:
            return self._own.pop(address)
        tag = self._tag(address)
        state, length = self._get(source, tag, (2,), torch.int64).tolist()
        if state == _FAILED:
            told = json.loads(bytes(self._get(source, tag, (length,), torch.uint8).tolist()))
            return Failure(*told)
        if state != _SAME:
            self._seen[source, tag] = json.loads(bytes(self._get(source, tag, (length,), torch.uint8).tolist()))
        value = self._filled(self._seen[source, tag], source, tag)
        if address.kind in ("backward", "skip gradient"):
            # Whoever sent a gradient has had the output.
            kind = "forward" if address.kind == "backward" else "skip"
            self._wait(replace(address, kind=kind, source=address.target, target=address.source))
        return value

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for address in list(self._pending):
            self._wait(address)

    def _tag(self, address: Address) -> int:
        # Boundaries between the same two ranks of several visits are told apart too.
        kind = self._tags[address.kind, address.name]
        return kind + len(self._tags) * min(address.source, address.target)

    def _post(self, address: Address, target: int, tag: int, tensor: Tensor) -> None:
        tensor = tensor.to(self._device)
        work = dist.isend(tensor, group=self._group, group_dst=target, tag=tag)
        assert work is not None
        # The buffer is kept until it is sent.
        self._pending.setdefault(address, []).append((work, tensor))

    def _wait(self, address: Address) -> None:
        for work, _ in self._pending.pop(address, ()):
            work.wait()

    def _get(self, source: int, tag: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        if tensor.numel():
            work = dist.irecv(tensor, group=self._group, group_src=source, tag=tag)
            assert work is not None
            work.wait()
        return tensor

    def _filled(self, description: Any, source: int, tag: int) -> Any:
        """The value of a description, its tensors received in order."""
        kind, content = description
        if kind == "tensor":
            dtype, shape, needs_grad = content
            return self._get(source, tag, shape, getattr(torch, dtype)).requires_grad_(needs_grad)
        if kind == "plain":
            return content
        if kind == "dict":
            return {name: self._filled(item, source, tag) for name, item in content}
        items = [self._filled(item, source, tag) for item in content]
        return tuple(items) if kind == "tuple" else items


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


def agree(failure: Failure | None, loss: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """The loss of the last stage on every rank; or, if a stage failed, raise its error on every rank.

    Raises StageError: of the failure with the smallest micro-batch and stage.
    """
    told = torch.stack(
        (loss.to(device, torch.float64), torch.tensor(float(failure is not None), dtype=torch.float64, device=device))
    )
    dist.all_reduce(told, group=group)
    if told[1] == 0:
        return told[0]
    texts: list[Any] = [None] * dist.get_world_size(group)
    text = None if failure is None else (failure.stage, failure.micro_batch, failure.kind, failure.why)
    dist.all_gather_object(texts, text, group=group)
    stage, micro_batch, kind, why = min(
        (text for text in texts if text is not None), key=lambda text: (text[1], text[0])
    )
    cause = failure.cause if failure is not None and text == (stage, micro_batch, kind, why) else None
    raise Failure(stage, micro_batch, kind, why, cause).error()
