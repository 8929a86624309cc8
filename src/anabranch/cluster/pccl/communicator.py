"""`Communicator`: a peer. Collectives that outlive the loss of any other peer, and new peers between them.

    peers = Communicator("10.0.0.1:48148")
    peers.connect()                                   # returns when those who run have let it in
    while ...:
        peers.admit()                                 # let in who waits
        state.revision += 1
        peers.sync_shared_state(state)                # sends nothing where all agree
        try:
            alone = peers.all_reduce(gradient, op="avg").alone
        except PeerLost:
            continue                                  # as it was before, on every survivor; try again with those who are left

Calls come in the same order on every peer. A call waits until all have made it; where it is sure that they never will, all get `Mismatch`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anabranch.bounds import shown
from anabranch.cluster.pccl.addresses import parse_address, tuned
from anabranch.cluster.pccl.bandwidth import RateServer, measure
from anabranch.cluster.pccl.checks import DTYPES, check_flood, check_many, check_reduction, check_settings
from anabranch.cluster.pccl.elections import POPULAR, RECEIVE, STRATEGIES
from anabranch.cluster.pccl.faults import CollectiveError
from anabranch.cluster.pccl.handshake import run_secret
from anabranch.cluster.pccl.line import Line
from anabranch.cluster.pccl.links import LinkError, Links, Listener, Place
from anabranch.cluster.pccl.master import PORT
from anabranch.cluster.pccl.membership import Membership
from anabranch.cluster.pccl.part import Reduced, Reduction, quantiser_of
from anabranch.cluster.pccl.quantise import Quantiser
from anabranch.cluster.pccl.records import MOST_TAGS
from anabranch.cluster.pccl.sharing import Shared, SharedState, Sharing, fetch
from anabranch.cluster.pccl.times import Times
from anabranch.errors import InputError

log = logging.getLogger(__name__)

__all__ = ["DTYPES", "Communicator", "Reduced", "Reduction"]


class Communicator(Membership):
    """See the module.

    Args:
        master: ``host:port`` of it.
        group: peers of one group reduce and share among themselves; letting in and measuring is of all groups together.
        pool: connections with each neighbour, 1 to 64: so many collectives move data at a time.
        secret: of the run; by default what the environment's ANABRANCH_CLUSTER_SECRET says, and otherwise none.
        listen: where other peers call: ``host``, ``host:port`` or ``:port``; every address and the first free port from 48149 by default.
        advertise: ``host`` or ``host:port`` by which others reach this peer, such as that of a forwarded port; by default the address from
            which it called the master, which is wrong for a peer that calls a master on its own machine by 127.0.0.1 while others are
            elsewhere.
        congestion: control of its connections, such as ``bbr``; the machine's own by default.
        connect_s: in which links to neighbours must stand; None, or where that is longer, for the master's own time for it.
        idle_s: after which a neighbour that does nothing in the midst of a collective is given up; None for 30 s, or twice the time after
            which the master drops a silent peer where that is longer.
        wait_s: after which a call (`connect` and `wait_for` as well) gives up waiting for the others, with a `PeerLost` that is not
            ``retryable``; None for never, as long as they show signs of life.
        master_wait_s: for so long a master may be gone.
        master_returns: whether one that is gone may come back; where nobody starts another, `MasterLost` comes at once.
        gives_up: asked now and then while a call waits to be let in, to let in, to share, or for others to begin a collective; where it
            says True, the call ends with `PeerLost`. For programs that are told to stop. What has begun comes to its end.

    Raises InputError for values that are none.
    """

    def __init__(
        self,
        master: str = f"127.0.0.1:{PORT}",
        *,
        group: int = 0,
        pool: int = 1,
        secret: str | None = None,
        listen: str = "",
        advertise: str = "",
        congestion: str | None = None,
        connect_s: float | None = None,
        idle_s: float | None = None,
        wait_s: float | None = None,
        master_wait_s: float = 30.0,
        master_returns: bool = True,
        gives_up: Callable[[], bool] | None = None,
        before: Callable[[str], None] = lambda name: None,
    ) -> None:
        waits = {"connect_s": connect_s, "idle_s": idle_s, "master_wait_s": master_wait_s, "wait_s": wait_s}
        check_settings(group, pool, {name: seconds for name, seconds in waits.items() if seconds is not None})
        # Port 0 stands for the one where it listens.
        self._advertised = parse_address(advertise, 0) if advertise else ("", 0)
        self._hello = {"group": group, "pool": pool, "host": self._advertised[0]}
        self._secret = run_secret(secret)
        super().__init__(wait_s, gives_up, before)
        self._connect_s, self._congestion = connect_s, congestion
        if congestion is not None:
            # Before anybody relies on it.
            with socket.socket() as tried:
                tuned(tried, congestion)
        self._line = Line(
            parse_address(master, PORT),
            self._secret,
            times=Times(idle_s=idle_s, master_wait_s=master_wait_s),
            master_returns=master_returns,
            on_reply=self._on_reply,
            on_abort=self._on_abort,
            before=lambda name: self._before(name),
        )
        host, port = parse_address(listen, 0) if listen else ("", 0)
        self._links = Links(self._secret, self._line.times.connect_s, congestion)
        self._sharing, self._rates = Sharing(), RateServer()
        handlers = {"link": self._links.offer, "state": self._sharing.serve, "rate": self._rates.serve}
        self._listener = Listener(host, port or None, self._secret, handlers)
        self._has_shared = False
        self._in_flight = threading.Semaphore(MOST_TAGS)

    # Who is there

    def connect(self) -> Communicator:
        """Join the run; returns when those who are in it have let this peer in, at once where nobody is, and where it is in already.

        Raises MasterLost where no master answers, Refused where it does not want this peer, Kicked where other peers cannot reach it,
        InputError for one that was closed: make a new one.
        """
        if self._line.has_begun and self._line.error is None:
            return self
        if self._line.has_begun or self._line.error is not None:
            raise InputError("this communicator was closed; make a new one, which comes as another peer")
        try:
            self._line.open({**self._hello, "port": self._advertised[1] or self._listener.port})
            self._listener.run = self._line.run
            # A neighbour that waited for longer would be the one that is late.
            self._links.connect_s = self._times.connect_s
            for told in self._times.advice():
                log.warning("%s", told)
            self._join()
        except BaseException:
            self.close()
            raise
        return self

    @property
    def _times(self) -> Times:
        """Of this run; for its links this peer may take less than the master gives it."""
        told = self._line.times
        return told if self._connect_s is None else replace(told, connect_s=min(self._connect_s, told.connect_s))

    def __enter__(self) -> Communicator:
        return self.connect()

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave. The others go on without this peer."""
        self._line.close()
        self._end()

    def optimize_topology(self, *, seconds: float = 10.0, streams: int = 4) -> dict[int, float]:
        """Measure the links that were not measured yet, and take the best ring. Returns Mbit/s to each peer that was measured from here.

        Args:
            seconds: that a link is flooded.
            streams: connections of a flood, at most 16.

        Raises TopologyFailed as `update_topology`, InputError for values that are none.
        """
        check_flood(seconds, streams)
        found: dict[int, float] = self._alone_in_it(lambda: self._optimize(seconds, streams))
        return found

    def _optimize(self, seconds: float, streams: int) -> dict[int, float]:
        reply = self._vote({"what": "optimize"})
        rates: dict[int, float] = {}
        deadline = time.monotonic() + (seconds + 1.0) * (len(reply["measure"]) + 1) * 4
        for place in map(Place.of, reply["measure"]):
            self._before("measure")
            try:
                rates[place.peer] = measure(
                    place,
                    secret=self._secret,
                    run=self.run,
                    me=self.peer,
                    seconds=seconds,
                    streams=streams,
                    deadline=deadline,
                    congestion=self._congestion,
                )
            except LinkError:
                # What is not measured counts as slow; who is gone is for the master to find.
                continue
        written = {str(peer): rate for peer, rate in rates.items()}
        self._form(self._vote({"what": "measured", "rates": written}))
        return rates

    # Shared state

    def sync_shared_state(self, state: SharedState, strategy: str | None = None) -> Shared:
        """Make ``state`` the same on all peers of the group, to the bit. Its revision must be one more than at the last call.

        Args:
            state: fetched tensors are written in place, and its revision becomes that of all.
            strategy: ``enforce_popular``: what most peers have counts; ``receive_only``: this peer's does not; ``send_only``: it must win.
                By default a newcomer's first call is ``receive_only`` and all others ``enforce_popular``.

        Raises PeerLost where a source went away or somebody could not fetch (states are then as they were), RevisionError, Mismatch,
        Kicked, and InputError for what cannot be shared.
        """
        if strategy is not None and strategy not in STRATEGIES:
            raise InputError(f"strategy is {shown(strategy)}; use {', '.join(STRATEGIES)}")
        state.check()
        return self._alone_in_it(lambda: self._sync(state, strategy))

    def _sync(self, state: SharedState, strategy: str | None) -> Shared:
        chosen = strategy or (POPULAR if self._has_shared else RECEIVE)
        plan = self._vote(
            {
                "what": "sync",
                "revision": state.revision,
                "progress": state.progress,
                "strategy": chosen,
                "is_default": strategy is None,
                "keys": state.entries(),
            }
        )
        revision, found, failure = int(plan["revision"]), {}, None
        self._sharing.offer(state, revision)
        try:
            if "fetch" in plan:
                self._before("fetch")
                try:
                    found = fetch(
                        Place.of(plan["from"]),
                        plan["fetch"],
                        state,
                        revision,
                        secret=self._secret,
                        run=self.run,
                        times=self._times,
                    )
                except LinkError as error:
                    failure = error
            self._vote({"what": "synced", "ok": failure is None, "why": str(failure)})
        finally:
            self._sharing.offer(None)
        with torch.no_grad():
            for name, tensor in found.items():
                state.tensors[name].copy_(tensor)
        state.revision, self._has_shared = revision, True
        received = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
        return Shared(revision, self._sharing.sent_bytes, received, tuple(found), bool(plan["is_first"]))

    # Collectives

    def all_reduce(
        self,
        send: Tensor,
        recv: Tensor | None = None,
        *,
        op: str = "sum",
        quantise: Quantiser | str | None = None,
        tag: int = 0,
        world: int | None = None,
    ) -> Reduced:
        """Reduce over the peers of the group; every one gets the same bits.

        Args:
            send: of any shape, the same number of elements and type on all peers. Without ``recv`` the result takes its place.
            recv: for the result; of the same type and number of elements.
            op: ``sum``, ``avg``, ``prod``, ``max`` or ``min``; averages of whole numbers are rounded down. Those of whole numbers and of
                float16 go around in a wider type, with two to four times the bytes, so that no sum on the way is too large.
            quantise: how floating-point numbers go over the wire: a `Quantiser`, ``min_max`` or ``zero_point`` (8 bits); None as they are.
            tag: of collectives at the same time each has its own.
            world: so many peers must take part, the same number on all; where fewer are left, all get `PeerLost` before anything is sent.
                None for whoever is there.

        Returns who took part. Raises PeerLost where a peer or link was lost: on every survivor, with all buffers as they were before;
        Mismatch where peers ask for different things; TagInUse, MasterLost, Kicked, InputError.
        """
        one = Reduction(send, recv, op, quantise, tag, world)
        check_reduction(one)
        self._take_tag(tag)
        try:
            return self._reduce(one)
        finally:
            self._give_tag(tag)

    def all_reduce_async(
        self,
        send: Tensor,
        recv: Tensor | None = None,
        *,
        op: str = "sum",
        quantise: Quantiser | str | None = None,
        tag: int = 0,
        world: int | None = None,
    ) -> Future[Reduced]:
        """`all_reduce` in a thread of its own: ``result()`` of what this returns waits for it, and raises what it raises.

        Neither tensor may be touched until then.
        """
        one = Reduction(send, recv, op, quantise, tag, world)
        check_reduction(one)
        self._take_tag(tag)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(MOST_TAGS, thread_name_prefix="pccl collective")

        def work() -> Reduced:
            try:
                return self._reduce(one)
            finally:
                self._give_tag(tag)

        return self._threads.submit(work)

    def all_reduce_many(
        self, reductions: Sequence[Reduction], *, max_in_flight: int = 8, attempts: int = 8
    ) -> list[Reduced | CollectiveError]:
        """Several collectives, some at a time; those that fail for a lost peer are tried again, once all have come to an end.

        Args:
            reductions: the same on all peers; each with a tag of its own.
            max_in_flight: at most so many at a time.
            attempts: after so many rounds what failed stays so.

        Returns for each what became of it: an error where it failed to the end, which is also where nobody is left to reduce with.
        """
        check_many(reductions, max_in_flight, attempts)
        found: dict[int, Reduced | CollectiveError] = {}
        for attempt in range(attempts):
            left = [place for place in range(len(reductions)) if not isinstance(found.get(place), Reduced)]
            if not left or (attempt and (self.group_size < 2 or self.is_given_up)):
                break
            self._round(reductions, left, max_in_flight, found)
            errors = [error for error in found.values() if isinstance(error, CollectiveError)]
            if any(not error.retryable for error in errors):
                break
        return [found[place] for place in range(len(reductions))]

    def _round(
        self, reductions: Sequence[Reduction], left: list[int], most: int, found: dict[int, Reduced | CollectiveError]
    ) -> None:
        waiting = deque(left)
        running: dict[Future[Reduced], int] = {}
        while waiting or running:
            while waiting and len(running) < most:
                place = waiting.popleft()
                one = reductions[place]
                handle = self.all_reduce_async(
                    one.send, one.recv, op=one.op, quantise=one.quantise, tag=one.tag, world=one.world
                )
                running[handle] = place
            for handle in wait(running, return_when=FIRST_COMPLETED).done:
                place = running.pop(handle)
                try:
                    found[place] = handle.result()
                except CollectiveError as error:
                    found[place] = error

    def _reduce(self, one: Reduction) -> Reduced:
        target = one.send if one.recv is None else one.recv
        quantiser = quantiser_of(one.quantise)
        written = "" if quantiser is None else f"{quantiser.kind}{quantiser.bits}"
        descriptor = {
            "count": target.numel(),
            "dtype": str(target.dtype).removeprefix("torch."),
            "op": one.op,
            "quantise": written,
            **({} if one.world is None else {"world": one.world}),
        }
        # The master takes so many of a peer at a time; those of all threads together, and the rest wait here.
        with self._in_flight:
            reply = self._vote({"what": "initiate", "tag": one.tag, "descriptor": descriptor})
            op = self._ops[one.tag, int(reply["seq"])]
            with torch.no_grad():
                return self._carry_out(op, reply, one, target, quantiser)
