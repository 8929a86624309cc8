"""`Cut`: the processes over which an engine's keys and values are cut, block by block, and how all of them run the same passes.

    rank 0        schedules, chooses tokens, talks: before each pass it tells the others what runs
    the others    run what they are told, on weights of their own
    block b       of the scheduler's lies on rank b % N, there as block b // N

Every rank runs all rows of a pass. In attention each makes a partial result of the keys that it holds, and those go to everyone (pass-Q
decoding, arXiv 2411.01783): N (N - 1) H (D + 1) numbers of float32 for a row and layer, however long the texts are.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.cluster.ring.kernel import merge
from anabranch.cluster.ring.link import GroupLink, Traffic, drive, everyone
from anabranch.errors import ConfigError, PeerError
from anabranch.serving.core.batch import Chunk

__all__ = ["Cut", "RankLost", "Told"]

# Loading takes ranks differently long: the first word may come so much later.
START_S = 1800.0


class RankLost(PeerError, ConnectionError):  # noqa: N818
    """Another process of the engine is gone, or does not answer: nothing can be computed any more."""


@dataclass(frozen=True)
class Told:
    """A pass: its chunks, the token of each row, and the rows whose states are wanted."""

    chunks: Sequence[Chunk]
    tokens: Sequence[int]
    rows: Sequence[int]


class Cut:
    """This process among them.

    Args:
        context: how many there must be.
        timeout_s: after which one that does not answer is lost. The first is heard of four times as often, also where nothing runs.

    Raises ConfigError where the processes of `torch.distributed` are not as many.
    """

    def __init__(self, context: int, *, timeout_s: float = 60.0) -> None:
        started = dist.get_world_size() if dist.is_initialized() else 1
        if started != context:
            raise ConfigError(f"engine.context is {context}, and the processes that work together are {started}")
        self.world = context
        self.rank = dist.get_rank() if context > 1 else 0
        self.timeout_s = timeout_s
        self._patience_s = START_S
        # Of the group: a pass, or a sign of life.
        self._turn = threading.RLock()
        self._is_closed = threading.Event()
        self._lost: RankLost | None = None
        self._alive: threading.Thread | None = None
        self.traffic = Traffic()

    @property
    def is_first(self) -> bool:
        """Whether it says what runs."""
        return self.rank == 0

    def agree(self, loaded: str, where: str) -> None:
        """Raise ConfigError, on all ranks, unless the same was ``loaded`` on all of them, from ``where`` on this one.

        With other weights, or in another type, the partial results would be of several models. Raises RankLost where another is gone.
        """
        if self.world == 1:
            return
        own = torch.frombuffer(bytearray(hashlib.sha256(loaded.encode()).digest()), dtype=torch.uint8)
        first = own.clone()
        try:
            self._broadcast(first)
            is_other = torch.tensor([int(not torch.equal(first, own))])
            self._together(is_other, partial(dist.all_reduce, op=dist.ReduceOp.MAX))
        except RuntimeError as error:
            raise self._loses(f"the other processes do not answer: {_first_line(error)}") from error
        if int(is_other):
            raise ConfigError(
                f"the processes that work together have not loaded the same model, and {where} is that of rank {self.rank}; give all of "
                "them copies of the same files, and the same --dtype and --quantize"
            )

    def own(self, num_blocks: int) -> int:
        """Blocks of so many that a rank holds at most."""
        return -(-num_blocks // self.world)

    @contextmanager
    def passing(self, told: Told) -> Iterator[None]:
        """A pass on all ranks: the first one says what it is.

        Raises RankLost where another is gone. What else goes wrong in the midst of it leaves the others waiting, and is the end as well.
        """
        with self._turn:
            self._check()
            if self.is_first:
                self._say(told)
            try:
                yield
            except RankLost:
                raise
            except Exception as error:
                raise self._loses(
                    f"rank {self.rank} failed in the midst of a pass: {type(error).__name__}: {error}"
                ) from error
            except BaseException:
                self._loses(f"rank {self.rank} was interrupted in the midst of a pass")
                raise

    def follow(self, run: Callable[[Told], Any]) -> None:
        """Run what the first rank says until it ends. Raises RankLost where it goes away without a word."""
        assert not self.is_first, "the first one says what runs"
        while (told := self._hear()) is not None:
            if isinstance(told, Told):
                run(told)

    def merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """(out_BHLD, lse_BHL) over the keys of all ranks, from each rank's partial result."""
        if self.world == 1:
            return out, lse
        link = GroupLink(traffic=self.traffic, timeout_s=self.timeout_s)
        try:
            parts: Any = drive(everyone(link, "home", [lse, out]), self.traffic)
        except PeerError as error:
            raise self._loses(_first_line(error)) from error
        # In the order of ranks, on all of them: so they go on with equal bits.
        whole, total = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
        for part_lse, part in parts:
            merge(whole, total, part, part_lse)
        return whole, total

    def close(self) -> None:
        """Tell the others that it is over."""
        self._is_closed.set()
        if self._alive is not None:
            self._alive.join()
        with self._turn:
            if self.is_first and self._lost is None:
                self._say(None)

    def _say(self, told: Told | str | None) -> None:
        """To all others; a text is a sign of life."""
        if self.world == 1:
            return
        data = torch.frombuffer(bytearray(pickle.dumps(told)), dtype=torch.uint8)
        try:
            self._broadcast(torch.tensor([len(data)]))
            self._broadcast(data)
        except RuntimeError as error:
            raise self._loses(f"the other processes do not answer: {_first_line(error)}") from error
        self._patience_s = self.timeout_s
        if self._alive is None and not self._is_closed.is_set():
            self._alive = threading.Thread(target=self._beat, name="anabranch-context", daemon=True)
            self._alive.start()

    def _hear(self) -> Told | str | None:
        count = torch.zeros(1, dtype=torch.int64)
        try:
            self._broadcast(count)
            data = torch.empty(int(count), dtype=torch.uint8)
            self._broadcast(data)
        except RuntimeError as error:
            raise self._loses(f"the first process is gone: {_first_line(error)}") from error
        self._patience_s = self.timeout_s
        # From the first process of the same run, as all that torch sends.
        found: Told | str | None = pickle.loads(data.numpy().tobytes())
        return found

    def _broadcast(self, value: Tensor) -> None:
        self._together(value, partial(dist.broadcast, src=0))

    def _together(self, value: Tensor, begin: Callable[..., Any]) -> None:
        """A collective that leaves its result in ``value``."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        there = value.to(device)
        work = begin(there, async_op=True)
        assert work is not None, "it is in the group"
        work.wait(timedelta(seconds=self._patience_s))
        if there is not value:
            value.copy_(there)

    def _beat(self) -> None:
        """A sign of life where nothing runs, until it is closed."""
        while not self._is_closed.wait(self.timeout_s / 4):
            with self._turn:
                if self._lost is not None:
                    return
                try:
                    self._say("alive")
                except RankLost:
                    # The next pass says so.
                    return

    def _check(self) -> None:
        if self._lost is not None:
            raise RankLost(str(self._lost))

    def _loses(self, why: str) -> RankLost:
        self._lost = self._lost or RankLost(f"{why}; start all processes again")
        return self._lost


def _first_line(error: BaseException) -> str:
    """What gloo says, without the place in its source and its advice."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\] ", "", line).partition(". This is typically")[0]
