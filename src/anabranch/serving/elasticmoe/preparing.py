"""Requests that come to a rank: what they were given elsewhere before (`ResumingSampler`), and those that have to wait until their
grammars have been compiled in another thread (`Preparing`), so that the others' steps go on."""

from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from anabranch.errors import AnabranchError, BackendError
from anabranch.serving.core.batch import Sampled
from anabranch.serving.core.request import Request
from anabranch.serving.elasticmoe.handover import Carried
from anabranch.serving.sampling import Sampler

__all__ = ["Preparing", "ResumingSampler"]


class Preparing:
    """See the module.

    Args:
        prepare: begins to compile what a request needs; None for nothing. Its future may fail: see `check`.
    """

    def __init__(self, prepare: Callable[[Request], Future[Any] | None]) -> None:
        self._prepare = prepare
        self._waiting: dict[str, tuple[Carried, Future[Any]]] = {}
        # So that nobody drops them before they are used.
        self._held: dict[str, Future[Any]] = {}
        self._paused: set[str] = set()

    def __bool__(self) -> bool:
        """Whether one waits."""
        return bool(self._waiting)

    def begin(self, given: Carried) -> bool:
        """Whether a request has to wait; if so `ready` gives it back."""
        future = self._prepare(given.request)
        if future is None:
            return False
        id = given.request.id
        self._held[id] = future
        if future.done():
            return False
        self._waiting[id] = given, future
        return True

    def ready(self, *, wait: bool = False) -> list[Carried]:
        """Those that need not wait any longer, each told once; with ``wait`` all, when they are."""
        if wait:
            futures.wait([future for _, future in self._waiting.values()])
        done = [id for id, (_, future) in self._waiting.items() if future.done()]
        return [self._waiting.pop(id)[0] for id in done]

    def check(self, id: str) -> None:
        """Raises AnabranchError where a request that need not wait any longer cannot have what it needs."""
        future = self._held.get(id)
        error = None if future is None else future.exception()
        if isinstance(error, AnabranchError):
            raise error
        if error is not None:
            raise BackendError(f"what the request needs could not be prepared: {error!r}") from error

    def forget(self, id: str) -> None:
        """A request has ended, or has what it needs; an unknown one is left alone."""
        self._waiting.pop(id, None)
        future = self._held.pop(id, None)
        if future is not None:
            # What nobody waits for need not be made.
            future.cancel()
        self._paused.discard(id)

    def pause(self, id: str) -> None:
        """A request that waits is to be paused once it need not."""
        if id in self._waiting:
            self._paused.add(id)

    def resume(self, id: str) -> None:
        """It is not."""
        self._paused.discard(id)

    def is_paused(self, id: str) -> bool:
        """Whether it is to be paused."""
        return id in self._paused


class ResumingSampler:
    """The sampler, told of tokens that requests were given elsewhere.

    Attributes:
        outputs: those tokens, by request, until it is set up.
        preparing: requests that wait.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.preparing = Preparing(sampler.prepare)

    def add(self, request: Request) -> None:
        """See `Sampler.add`."""
        self.sampler.add(request, self.outputs.pop(request.id, ()))
        # The sampler holds what it needs of it.
        self.preparing.forget(request.id)

    def forget(self, id: str) -> None:
        """See `Sampler.forget`."""
        self.sampler.forget(id)

    def __call__(self, logits_RV: Tensor, ids: Sequence[str]) -> list[Sampled]:
        """See `Sampler`."""
        return self.sampler(logits_RV, ids)
