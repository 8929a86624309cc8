"""`MessageLog`: who sent how many bytes to whom, as a matrix and as a `RoutingTrace`.

    log = MessageLog(4)
    log.add(0, 1, 4096, kind="forward", micro_batch=2)
    log.bytes_RR[0, 1]          # 4096
    log.trace().write("messages.parquet")

In a trace an item is a message, its destination a link (a directed pair of ranks, `link_of`), its weight the size in bytes (float32: exact
below 16 MiB, 7 digits above; the matrix is exact), its position the micro-batch, its domain the kind. So measures and reports of routing
read what a cluster did, and simulators of networks replay it.
"""
# Shapes: R ranks

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from anabranch.errors import InputError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.routing import RoutingTrace

__all__ = ["MessageLog", "link_of", "ranks_of"]


def link_of(source: int, target: int, num_ranks: int) -> int:
    """The number of a directed pair."""
    return source * num_ranks + target


def ranks_of(link: int, num_ranks: int) -> tuple[int, int]:
    """The directed pair of a number."""
    return divmod(link, num_ranks)


class MessageLog:
    """Messages between ``num_ranks`` ranks; threads may add at once.

    Attributes:
        num_ranks: R.
        bytes_RR: int64, from each rank (row) to each (column).
        counts_RR: int64, messages likewise.
    """

    def __init__(self, num_ranks: int) -> None:
        if num_ranks < 1:
            raise InputError(f"num_ranks is {num_ranks}; use at least 1")
        self.num_ranks = num_ranks
        self.bytes_RR = np.zeros((num_ranks, num_ranks), np.int64)
        self.counts_RR = np.zeros((num_ranks, num_ranks), np.int64)
        self._rows: list[tuple[int, int, int, str]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, source: int, target: int, size_bytes: int, *, kind: str = "message", micro_batch: int = 0) -> None:
        """One message. Raises InputError for ranks that there are not, and for a negative size."""
        for name, rank in (("source", source), ("target", target)):
            if not 0 <= rank < self.num_ranks:
                raise InputError(f"{name} is {rank}, and ranks are 0 to {self.num_ranks - 1}")
        if size_bytes < 0:
            raise InputError(f"size_bytes is {size_bytes}; a message has at least 0")
        with self._lock:
            self.bytes_RR[source, target] += size_bytes
            self.counts_RR[source, target] += 1
            self._rows.append((link_of(source, target, self.num_ranks), size_bytes, micro_batch, kind))

    def extend(self, others: Iterable["MessageLog"]) -> None:
        """All messages of other logs, such as those that each rank kept of what it sent."""
        for other in others:
            for link, size_bytes, micro_batch, kind in other._rows:
                source, target = ranks_of(link, other.num_ranks)
                self.add(source, target, size_bytes, kind=kind, micro_batch=micro_batch)

    def of_kind(self, kind: str) -> int:
        """Bytes of all messages of a kind."""
        return sum(row[1] for row in self._rows if row[3] == kind)

    def trace(self, *, name: str = "links") -> "RoutingTrace":
        """The messages, in the order they were added, as one layer of a `RoutingTrace`. Needs the extra ``cluster``."""
        require("lm", by="a trace of messages")
        from anabranch.routing import TraceBuilder, TraceLayer

        builder = TraceBuilder()
        layer = TraceLayer(layer=0, name=name, num_destinations=self.num_ranks**2, top_k=1)
        if self._rows:
            links, sizes, micro_batches, kinds = zip(*self._rows, strict=True)
            builder.add(
                layer,
                np.array(links)[:, None],
                np.array(sizes, np.float32)[:, None],
                item_N=np.arange(len(links)),
                position_N=np.array(micro_batches),
                domain=list(kinds),
            )
        else:
            builder.layers[0] = layer
        return builder.trace()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()
