"""Links of a given speed between processes of gloo: each directed pair carries one message at a time, size / bandwidth seconds long.

A thread for each destination sleeps as long as a link of that speed would be busy, and then sends; who computes meanwhile is not disturbed
but for the copy. So what overlaps on such links overlaps here. It is an emulation, and records that use it say so.
"""

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anabranch.cluster.ring.link import GroupLink, Traffic, pack


class PacedLink(GroupLink):
    """A `GroupLink` whose sends take as long as on links of ``bandwidth`` bytes per second."""

    def __init__(self, bandwidth: float, *, traffic: Traffic | None = None) -> None:
        super().__init__(traffic=traffic)
        self.bandwidth = bandwidth
        self._queues: dict[int, queue.SimpleQueue[Any]] = {}

    def exchange(self, flow: str, step: int, sends: Sequence[Any], receives: Sequence[Any]) -> Any:
        _, incoming = super().exchange(flow, step, [], receives)
        outgoing = []
        for to, number, parts in sends:
            # Copied, as real cards do: its owner may go on.
            made = _Paced(self, flow, step, to, number, pack(parts).clone())
            self._queue(to).put(made)
            outgoing.append(made)
        return outgoing, incoming

    def really_send(self, one: "_Paced") -> None:
        outgoing, _ = super().exchange(one.flow, one.step, [(one.to, one.number, one.buffer)], [])
        for handle in outgoing:
            handle.wait()

    def _queue(self, to: int) -> "queue.SimpleQueue[Any]":
        if to not in self._queues:
            self._queues[to] = queue.SimpleQueue()
            threading.Thread(target=self._carry, args=(self._queues[to],), daemon=True).start()
        return self._queues[to]

    def _carry(self, waiting: "queue.SimpleQueue[Any]") -> None:
        while True:
            one = waiting.get()
            time.sleep(one.buffer.numel() / self.bandwidth)
            try:
                self.really_send(one)
            except BaseException as error:  # told to the one that waits
                one.error = error
            one.is_sent.set()


class _Paced:
    """A message on such a link."""

    def __init__(self, link: PacedLink, flow: str, step: int, to: int, number: int, buffer: Tensor) -> None:
        self.link, self.flow, self.step, self.to, self.number, self.buffer = link, flow, step, to, number, buffer
        self.is_sent = threading.Event()
        self.error: BaseException | None = None

    @property
    def is_ready(self) -> bool:
        return self.is_sent.is_set()

    def wait(self) -> None:
        self.is_sent.wait()
        if self.error is not None:
            raise self.error

    def parts(self) -> list[Tensor]:
        return []
