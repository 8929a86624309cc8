"""Buffers that layers move when they run in training (running statistics, vectors of a spectral norm), under recomputation.

A forward that is done again must find what the first one found, and must leave nothing behind: it works on copies of the buffers as they
were before the first. Which buffers move is seen when layers first run so.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["BufferCopy", "MovingBuffers"]


@dataclass(frozen=True)
class BufferCopy:
    """A buffer as it was before a forward.

    Attributes:
        module, name: whose it is.
        original: the tensor that stood there.
        value: a copy of what it had.
    """

    module: nn.Module
    name: str
    original: Tensor
    value: Tensor


class MovingBuffers:
    """Those of some modules.

    Args:
        modules: all that run together.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list({id(module): module for module in modules}.values())
        # Modules with a buffer that moved; None before the first time, and where other modules are in training than then.
        self._moving: list[nn.Module] | None = None
        self._training: tuple[bool, ...] = ()

    def before(self) -> list[BufferCopy]:
        """Copies of all buffers that may move in a forward that comes now."""
        training = tuple(module.training for module in self._modules)
        if training != self._training:
            self._training, self._moving = training, None
        return [
            BufferCopy(module, name, buffer, buffer.detach().clone())
            for module in (self._modules if self._moving is None else self._moving)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def moved(self, copies: Sequence[BufferCopy]) -> list[BufferCopy]:
        """Those of the copies whose modules did move one, after the forward."""
        if self._moving is None:
            found = {
                id(copy.module): copy.module
                for copy in copies
                if copy.module._buffers.get(copy.name) is not copy.original
                or not torch.equal(copy.original, copy.value)
            }
            self._moving = list(found.values())
        moving = {id(module) for module in self._moving}
        return [copy for copy in copies if id(copy.module) in moving]

    @contextmanager
    def as_before(self, copies: Sequence[BufferCopy]) -> Iterator[None]:
        """In the block the buffers are the copies; what is done to these is forgotten."""
        now = [(copy.module, copy.name, copy.module._buffers[copy.name]) for copy in copies]
        for copy in copies:
            copy.module._buffers[copy.name] = copy.value
        try:
            yield
        finally:
            for module, name, buffer in now:
                module._buffers[name] = buffer
