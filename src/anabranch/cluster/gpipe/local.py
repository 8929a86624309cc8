"""The local runner: all stages in this process, a thread each. Messages are references."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from anabranch.cluster.gpipe.micro_batches import tensors_of
from anabranch.cluster.gpipe.stage import Address, Batch, Failure, Stage
from anabranch.cluster.messages import MessageLog
from anabranch.cluster.schedules import Schedule

__all__ = ["Mailboxes", "run_local"]


class Mailboxes:
    """Messages that wait for their receivers, by address.

    Args:
        num_stages: K, which says what goes from one stage to another.
        log: told of messages between stages; None for nobody.
        timeout_s: for which a receiver waits at most.
    """

    def __init__(self, num_stages: int, *, log: MessageLog | None = None, timeout_s: float = 1800.0) -> None:
        self._num_stages, self._log, self._timeout_s = num_stages, log, timeout_s
        self._arrived = threading.Condition()
        self._messages: dict[Address, Any] = {}
        self._is_closed = False

    def send(self, address: Address, value: Any) -> None:
        """See `Channel`."""
        source, target = address.source % self._num_stages, address.target % self._num_stages
        if self._log is not None and source != target and not isinstance(value, Failure):
            size = sum(tensor.nbytes for tensor in tensors_of(value))
            self._log.add(source, target, size, kind=address.kind, micro_batch=address.micro_batch)
        with self._arrived:
            self._messages[address] = value
            self._arrived.notify_all()

    def receive(self, address: Address) -> Any:
        """See `Channel`. Raises TimeoutError, and InterruptedError after `close`."""
        with self._arrived:
            is_there = self._arrived.wait_for(lambda: self._is_closed or address in self._messages, self._timeout_s)
            if self._is_closed:
                raise InterruptedError("the step was interrupted")
            if not is_there:
                raise TimeoutError(f"nothing came for {self._timeout_s} s: {address}")
            return self._messages.pop(address)

    def close(self) -> None:
        """Nobody waits any longer."""
        with self._arrived:
            self._is_closed = True
            self._arrived.notify_all()


# Seconds for stages to end in, once one of them has failed and told the others.
_GRACE_S = 1.0


def run_local(
    stages: Sequence[Stage],
    schedule: Schedule,
    batch: Batch,
    *,
    log: MessageLog | None,
    timeout_s: float,
    running: list[threading.Thread],
) -> Failure | None:
    """One step of all stages. Returns the first failure, by micro-batch and stage, if there was one.

    ``running`` are threads of steps before that did not end in time; those of this step are added.

    Raises TimeoutError where a stage has not ended ``timeout_s`` after the first one, or is still in a step before: a thread cannot be
    ended from outside.
    """
    _wait_for(running, timeout_s)
    channel = Mailboxes(len(stages), log=log, timeout_s=timeout_s)
    failures: dict[int, Failure] = {}
    errors: list[BaseException] = []
    settings = _ThreadSettings()

    def work(stage: Stage) -> None:
        try:
            with settings:
                failure = stage.run(schedule, batch, channel)
            if failure is not None:
                failures[stage.number] = failure
        except BaseException as error:
            errors.append(error)
            channel.close()

    threads = [
        threading.Thread(target=work, args=(stage,), name=f"stage {stage.number}", daemon=True) for stage in stages[1:]
    ]
    for thread in threads:
        thread.start()
    try:
        # The first stage's work is this thread's.
        work(stages[0])
        running.extend(threads)
        if errors:
            channel.close()
        _wait_for(running, min(timeout_s, _GRACE_S) if errors else timeout_s, errors)
    except BaseException:
        channel.close()
        raise
    if errors:
        raise errors[0]
    return min(failures.values(), key=lambda failure: (failure.micro_batch, failure.stage), default=None)


def _wait_for(threads: list[threading.Thread], timeout_s: float, errors: Sequence[BaseException] = ()) -> None:
    """Until ``threads`` have ended, which are then taken from the list. Raises TimeoutError with those that have not."""
    until = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0))
    threads[:] = [thread for thread in threads if thread.is_alive()]
    if threads:
        late = ", ".join(thread.name for thread in threads)
        raise TimeoutError(
            f"{late} did not end within {timeout_s:g} s, and is at work in a layer still; no step is made until it has ended"
        ) from (errors[0] if errors else None)


class _ThreadSettings:
    """What torch keeps for each thread, as it is where this was made."""

    def __init__(self) -> None:
        self._autocasts = [
            (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        ]
        self._open = threading.local()

    def __enter__(self) -> None:
        self._open.stack = [torch.autocast(kind, dtype) for kind, dtype in self._autocasts]
        for context in self._open.stack:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._open.stack):
            context.__exit__(*error)
