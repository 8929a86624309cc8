"""`SavedBytes`: what autograd keeps for the backward pass, in bytes, now and at most.

with SavedBytes(ignored=model.parameters()) as meter:
    loss = model(x).sum()
    meter.now              # bytes of activations that are kept
    loss.backward()
meter.most

What was kept and is not needed any more can be let go of one by one, which autograd itself does not do (`SavedTensor.let_go`).
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["SavedBytes", "SavedTensor", "touched"]


class SavedTensor:
    """A tensor that autograd keeps; when the graph lets go of this, the meter is told."""

    __slots__ = ("__weakref__", "_told", "tensor")

    def __init__(self, tensor: Tensor, told: Callable[[], None]) -> None:
        self.tensor: Tensor | None = tensor
        self._told = weakref.finalize(self, told)

    def let_go(self) -> None:
        """Nobody will ask for it again."""
        self.tensor = None
        self._told()


_here = threading.local()


@contextmanager
def touched() -> Iterator[set[SavedTensor]]:
    """What this thread asks autograd for meanwhile."""
    found: set[SavedTensor] = set()
    _here.touched = found
    try:
        yield found
    finally:
        _here.touched = None


def _unpacked(kept: Any) -> Tensor:
    if not isinstance(kept, SavedTensor):
        tensor: Tensor = kept
        return tensor
    if (asked := getattr(_here, "touched", None)) is not None:
        asked.add(kept)
    assert kept.tensor is not None, "it was let go of as what nobody would ask for again"
    return kept.tensor


class SavedBytes:
    """Counts the storages that autograd keeps, each once however often it is saved.

    A context manager; `watch` does the same for a part of the work in another thread. It may be read at any time.

    A sparse tensor counts with its indices and its values.

    Args:
        ignored: tensors that are there anyway (parameters, buffers).

    Attributes:
        now: bytes that are kept.
        most: the most that were, since the meter was made or `restart` was called.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        self.now = 0
        self.most = 0
        self._ignored = {storage.data_ptr() for tensor in ignored for storage in _storages(tensor)}
        self._uses: dict[int, list[int]] = {}
        # Backward passes of several threads let go of tensors at once; finalizers may run while the lock is held.
        self._lock = threading.RLock()
        self._open: list[saved_tensors_hooks] = []

    def __enter__(self) -> Self:
        hooks = self.watch()
        hooks.__enter__()
        self._open.append(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)

    def watch(self, into: "list[weakref.ref[SavedTensor]] | None" = None) -> saved_tensors_hooks:
        """A context in which this thread's saved tensors count too, and are put into a list."""
        return saved_tensors_hooks(partial(self._pack, into), _unpacked)

    def restart(self) -> None:
        """Forget the most."""
        self.most = self.now

    def hold(self, *tensors: Tensor) -> "Held":
        """Count tensors that are kept for backward without autograd (inputs of what is recomputed) until ``release`` of the result."""
        return Held(self, tensors)

    def _pack(self, into: "list[weakref.ref[SavedTensor]] | None", tensor: Tensor) -> Any:
        # Of a parameter itself, hooks may not give back another object (it is checked for changes), and it does not count.
        pointers = self._count(tensor)
        if not pointers:
            return tensor
        # An operator's own output knows the operator, which knows what is kept: nobody could let go of either.
        kept = SavedTensor(tensor if tensor.is_leaf else tensor.detach(), partial(self._remove, pointers))
        if into is not None:
            into.append(weakref.ref(kept))
        return kept

    def _count(self, tensor: Tensor) -> list[int]:
        """Count a tensor; the pointers of what is to be taken off again."""
        pointers = []
        for storage in _storages(tensor):
            if storage.nbytes() and storage.data_ptr() not in self._ignored:
                self._add(storage.data_ptr(), storage.nbytes())
                pointers.append(storage.data_ptr())
        return pointers

    def _add(self, pointer: int, size: int) -> None:
        with self._lock:
            uses = self._uses.setdefault(pointer, [0, size])
            if not uses[0]:
                self.now += size
                self.most = max(self.most, self.now)
            uses[0] += 1

    def _remove(self, pointers: Iterable[int]) -> None:
        with self._lock:
            for pointer in pointers:
                uses = self._uses[pointer]
                uses[0] -= 1
                if not uses[0]:
                    self.now -= uses[1]
                    del self._uses[pointer]


class Held:
    """Tensors that count until they are released."""

    def __init__(self, meter: SavedBytes, tensors: Iterable[Tensor]) -> None:
        self._meter = meter
        self._pointers = [pointer for tensor in tensors for pointer in meter._count(tensor)]

    def release(self) -> None:
        """They are no longer kept."""
        self._meter._remove(self._pointers)
        self._pointers.clear()


def _storages(tensor: Tensor) -> list[UntypedStorage]:
    """What a tensor lies in: one storage, or those of the parts of a sparse or a jagged one; none where it does not say (MKL-DNN)."""
    parts = [tensor]
    if tensor.layout != torch.strided:
        # Parts are asked for without a graph of their own.
        parts = [getattr(tensor.detach(), name)() for name in _PARTS.get(tensor.layout, ())]
    return [part.untyped_storage() for part in parts]


_ROWS, _COLUMNS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_PARTS: dict[torch.layout, tuple[str, ...]] = {
    # Those without an underscore are of sorted ones alone.
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _ROWS,
    torch.sparse_bsr: _ROWS,
    torch.sparse_csc: _COLUMNS,
    torch.sparse_bsc: _COLUMNS,
    torch.jagged: ("values", "offsets"),
}
