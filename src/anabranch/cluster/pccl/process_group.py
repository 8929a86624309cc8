"""PCCL as a backend of torch.distributed, for what is written against that: DDP, FSDP, DeviceMesh.

    import anabranch.cluster.pccl.process_group        # registers it
    dist.init_process_group("pccl")                    # under torchrun; cpu tensors, and cuda ones by way of the host
    model = DistributedDataParallel(model)

A process group of torch has a fixed size, so a rank that is lost ends it, in the midst of a collective or between two: every wait of a
survivor raises `PeerLost` from then on, whatever `timeout` says, with tensors as they were, and torchrun starts the workers anew (DDP's
reducer makes a RuntimeError of it, which names it). What outlives losses is `Communicator` itself.

The master of the default group is the one that ANABRANCH_CLUSTER_MASTER names, for one job at a time; it may be restarted with its journal.
Without it, and for every further group (`new_group`, `DeviceMesh`), the first rank of the group has one in a thread, since all peers of a
master are one run; where that rank is lost the others hear `PeerLost` as of any other, at once where its process ended. Broadcasts and
gathers are sums of bytes of which all but one are zero: exact, and twice the bytes of what a ring of their own would send.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.cluster.pccl.communicator import Communicator
from anabranch.cluster.pccl.faults import MasterLost, PeerLost
from anabranch.cluster.pccl.master import Master
from anabranch.cluster.pccl.part import Reduced
from anabranch.errors import InputError

__all__ = ["NAME", "PCCLGroup"]

NAME = "pccl"
_OPS = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.AVG: "avg",
    dist.ReduceOp.PRODUCT: "prod",
    dist.ReduceOp.MAX: "max",
    dist.ReduceOp.MIN: "min",
}
_MOST_TAG = 1 << 20
_WAIT_S = 300.0
# At least, without a sign of life of a rank that is there.
_SILENT_S = 5.0


class _Work(dist._Work):
    """What torch waits for: some collectives, and then what is to be done with their result; ``told`` makes of an error what is raised."""

    def __init__(
        self,
        handles: list[Future[Reduced]],
        result: Any,
        done: Callable[[], None],
        told: Callable[[BaseException], BaseException],
    ) -> None:
        super().__init__()
        self._told = told
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        # What torch's own code in C++ asks (DDP's reducer): a future whose error was set from Python has that as its value, and only Python
        # raises it; what a callback raises is an error for both.
        self._shown = self._future.then(lambda future: future.value())
        self._left, self._lock = len(handles), threading.Lock()
        self._result, self._done = result, done
        for handle in handles:
            handle.add_done_callback(self._count)
        if not handles:
            self._finish()

    def _count(self, handle: Future[Reduced]) -> None:
        error = handle.exception()
        with self._lock:
            self._left -= 1
            is_last = not self._left
            if error is not None and not self._future.done():
                self._future.set_exception(self._told(error))
        if is_last and not self._future.done():
            self._finish()

    def _finish(self) -> None:
        try:
            self._done()
        except Exception as error:
            # Such as a result that does not fit where it should go: in a thread of the communicator nobody else would hear of it.
            self._future.set_exception(error)
        else:
            self._future.set_result(self._result)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Until it is done; raises what went wrong. Peers that are lost are found without ``timeout``."""
        self._future.wait()
        return True

    def is_completed(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return bool(self._future.done())

    def get_future(self) -> torch.futures.Future[Any]:
        """Of the result."""
        return self._shown


class PCCLGroup(dist.ProcessGroup):
    """A process group over a `Communicator`.

    Args:
        rank, size: of torch.
        peers: connected, with ``size`` peers.
        master: that ends with the group; None for one elsewhere.
        is_own: whether the master is the first rank's.
    """

    def __init__(
        self, rank: int, size: int, peers: Communicator, master: Master | None = None, *, is_own: bool = False
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # its stubs know a group with a store only
        self._peers, self._master, self._number_of_ranks = peers, master, size
        self._told = _as_a_lost_rank if is_own else _as_it_is
        self._rank, self._next, self._name = rank, 0, ""

    def getBackendName(self) -> str:  # torch's name
        """``pccl``."""
        return NAME

    # What torch keeps in a backend of a group, and this group has none.
    def _set_group_name(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:  # torch's name
        """By which `DeviceMesh` and others find the group."""
        return self._name

    @property
    def group_name(self) -> str:  # type: ignore[override]  # a property of torch's that cannot be set
        """As ``getGroupName``."""
        return self._name

    def shutdown(self) -> None:
        """Leave."""
        self._peers.close()
        if self._master is not None:
            self._master.stop()

    abort = shutdown

    def _begin(self, tensor: Tensor, op: str) -> Future[Reduced]:
        # The same on all ranks, since they call in the same order.
        tag, self._next = self._next, (self._next + 1) % _MOST_TAG
        return self._peers.all_reduce_async(tensor, op=op, tag=tag, world=self._number_of_ranks)

    def _work(self, handles: list[Future[Reduced]], result: Any, done: Callable[[], None] = lambda: None) -> _Work:
        return _Work(handles, result, done, self._told)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist._Work:  # type: ignore[override]  # the form that torch calls
        """In place; of several tensors all or none."""
        op = _op_of(opts)
        if len(tensors) == 1:
            return self._work([self._begin(tensors[0], op)], tensors)
        held = [tensor.detach().clone() for tensor in tensors]

        def put() -> None:
            for tensor, reduced in zip(tensors, held, strict=True):
                tensor.detach().copy_(reduced)

        return self._work([self._begin(tensor, op) for tensor in held], tensors, put)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist._Work:
        """In place."""
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist._Work:  # type: ignore[override]  # the form that torch calls
        """In place, from ``opts.rootRank``."""
        held = [
            _bytes(tensor) if self._rank == opts.rootRank else _bytes(torch.zeros_like(tensor)) for tensor in tensors
        ]

        def put() -> None:
            for tensor, data in zip(tensors, held, strict=True):
                tensor.detach().copy_(_like(data, tensor))

        return self._work([self._begin(data, "sum") for data in held], tensors, put)

    def allgather(  # type: ignore[override]  # the form that torch calls
        self, output_tensors: list[list[Tensor]], input_tensors: list[Tensor], opts: Any = None
    ) -> dist._Work:
        """``output_tensors[i][rank]`` become the ``input_tensors[i]`` of each rank."""
        held = [self._slots(tensor) for tensor in input_tensors]

        def put() -> None:
            for outputs, slots in zip(output_tensors, held, strict=True):
                for output, data in zip(outputs, slots, strict=True):
                    output.detach().copy_(_like(data, output))

        return self._work([self._begin(slots.reshape(-1), "sum") for slots in held], output_tensors, put)

    def _allgather_base(self, output: Tensor, given: Tensor, opts: Any = None) -> dist._Work:
        slots = self._slots(given)

        def put() -> None:
            output.detach().copy_(_like(slots.reshape(-1), output))

        return self._work([self._begin(slots.reshape(-1), "sum")], output, put)

    # Newer versions of torch call it so.
    all_gather_single = _allgather_base  # type: ignore[assignment]

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist._Work:
        """As ``_allgather_base`` for each."""
        held = [self._slots(tensor) for tensor in inputs]

        def put() -> None:
            for output, slots in zip(outputs, held, strict=True):
                output.detach().copy_(_like(slots.reshape(-1), output))

        return self._work([self._begin(slots.reshape(-1), "sum") for slots in held], outputs, put)

    def reduce_scatter(  # type: ignore[override]  # the form that torch calls
        self, output_tensors: list[Tensor], input_tensors: list[list[Tensor]], opts: Any = None
    ) -> dist._Work:
        """``output_tensors[i]`` become this rank's part of the reduced ``input_tensors[i]``."""
        whole = [torch.stack([part.detach() for part in parts]) for parts in input_tensors]

        def put() -> None:
            for output, reduced in zip(output_tensors, whole, strict=True):
                output.detach().copy_(reduced[self._rank])

        return self._work([self._begin(tensor, _op_of(opts)) for tensor in whole], output_tensors, put)

    def _reduce_scatter_base(self, output: Tensor, given: Tensor, opts: Any = None) -> dist._Work:
        whole = given.detach().clone()

        def put() -> None:
            output.detach().copy_(whole.reshape(self._number_of_ranks, -1)[self._rank].reshape(output.shape))

        return self._work([self._begin(whole, _op_of(opts))], output, put)

    reduce_scatter_single = _reduce_scatter_base  # type: ignore[assignment]

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist._Work:
        """As ``_reduce_scatter_base`` for each."""
        whole = [tensor.detach().clone() for tensor in inputs]

        def put() -> None:
            for output, reduced in zip(outputs, whole, strict=True):
                output.detach().copy_(reduced.reshape(self._number_of_ranks, -1)[self._rank].reshape(output.shape))

        return self._work([self._begin(tensor, _op_of(opts)) for tensor in whole], outputs, put)

    def barrier(self, opts: Any = None) -> dist._Work:
        """Until all are here."""
        return self._work([self._begin(torch.zeros(1), "sum")], None)

    def _slots(self, tensor: Tensor) -> Tensor:
        """uint8 ``[ranks, bytes]``: zero but for this rank's row."""
        data = _bytes(tensor)
        slots = torch.zeros(self._number_of_ranks, data.numel(), dtype=torch.uint8)
        slots[self._rank] = data
        return slots


def _as_it_is(error: BaseException) -> BaseException:
    return error


def _as_a_lost_rank(error: BaseException) -> BaseException:
    """The master was a thread of the first rank: who lost it has lost that rank."""
    return PeerLost(f"the first rank of the group is lost: {error}") if isinstance(error, MasterLost) else error


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous().reshape(-1).clone().view(torch.uint8)


def _like(data: Tensor, tensor: Tensor) -> Tensor:
    return data.view(tensor.dtype).reshape(tensor.shape)


def _op_of(opts: Any) -> str:
    asked = dist.ReduceOp.SUM if opts is None else opts.reduceOp
    for known, name in _OPS.items():
        if asked == known:
            return name
    raise InputError(
        f"{getattr(asked, 'op', asked)} is no operation of PCCL; use {', '.join(sorted(set(_OPS.values())))}"
    )


def _made(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """What ``init_process_group("pccl")`` and ``new_group`` call. Raises PeerLost where not all ranks come in ``timeout``."""
    # The default group is made before torch says that it is initialised, on every rank.
    is_default = not dist.is_initialized()
    address = os.environ.get("ANABRANCH_CLUSTER_MASTER", "") if is_default else ""
    secret, master = None, None
    try:
        if not address:
            if rank == 0:
                # Known to those who share the store.
                made = secrets.token_hex(16)
                # A rank that ends is found at once by its connection; one that is silent may be busy, for as long as `timeout`.
                silent_s = min(max(timeout.total_seconds(), _SILENT_S), _WAIT_S)
                master = Master(":0", secret=made, dead_s=silent_s).start()
                store.set("pccl", f"{_own_host(store, is_default)}:{master.address.rpartition(':')[2]} {made}")
            address, _, secret = store.get("pccl").decode().partition(" ")
        is_own = secret is not None
        return PCCLGroup(rank, size, _joined(address, secret, size, timeout.total_seconds()), master, is_own=is_own)
    except BaseException:
        if master is not None:
            master.stop()
        raise


def _joined(address: str, secret: str | None, size: int, timeout_s: float) -> Communicator:
    """A peer among ``size``; those that are late get the rest of ``timeout_s``."""
    deadline, is_whole = time.monotonic() + timeout_s, threading.Event()
    is_own = secret is not None
    peers = Communicator(
        address,
        secret=secret,
        master_wait_s=min(timeout_s, _WAIT_S),
        # With its process, and nobody starts it again.
        master_returns=not is_own,
        gives_up=lambda: not is_whole.is_set() and time.monotonic() > deadline,
    )
    try:
        peers.connect().wait_for(size)
    except BaseException as error:
        there = peers.world_size
        peers.close()
        if isinstance(error, PeerLost) and time.monotonic() > deadline:
            told = (
                f"{there} of {size} ranks were there after {timeout_s:g} s"
                if there
                else f"who runs at {address} lets nobody in"
            )
            raise PeerLost(
                f"{told}; start the others, give a longer timeout, or give each job a master of its own"
            ) from None
        if is_own:
            raise _as_a_lost_rank(error) from None
        raise
    is_whole.set()
    return peers


def _own_host(store: dist.Store, is_default: bool) -> str:
    """Where other ranks reach this process, as the host of an address.

    Rank 0 of the job is where its store is; the first rank of another group is on any machine, and names the address by which it
    reaches the store.
    """
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    host = store.host if isinstance(store, dist.TCPStore) else os.environ.get("MASTER_ADDR", "127.0.0.1")
    if not is_default and dist.get_rank() != 0:
        family, kind, protocol, _, place = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            # Of datagrams it sends nothing, and finds the way.
            sock.connect(place)
            host = str(sock.getsockname()[0])
    return f"[{host}]" if ":" in host else host


if NAME not in dist.Backend.backend_list:
    dist.Backend.register_backend(NAME, _made, devices=["cpu", "cuda"])
