"""DiLoCo over peers that come and go (arXiv 2311.08105): many steps apart, then one step together.

    outer = DiLoCo(model, peers, every=500)
    for batch in batches:
        outer.begin_step()             # at the beginning of a round: let in who waits, have equal weights
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        outer.end_step()               # at its end: average what was learned, take an outer step

    delta = outer weights - local weights, mean over peers;  outer weights by SGD with Nesterov momentum;  local weights = outer weights

Outer weights and momentum are the shared state: equal to the bit on all peers, and what a newcomer gets. A peer that is lost in the
midst of a round is a delta less in its mean.

``asynchronous``: the mean of a round is on its way while the next round is trained, and its step is taken a round late. Until then a peer
goes on from the outer weights and what it has learned in that round itself. One that comes in takes part in the reduction under way with a
delta of zero, so that this one step is smaller by its share.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anabranch.bounds import shown
from anabranch.cluster.pccl.communicator import Communicator
from anabranch.cluster.pccl.faults import CollectiveError, PeerLost, TopologyFailed
from anabranch.cluster.pccl.part import Reduced, Reduction, quantiser_of
from anabranch.cluster.pccl.quantise import Quantiser
from anabranch.cluster.pccl.sharing import Shared, SharedState
from anabranch.errors import InputError

__all__ = ["DiLoCo", "Round"]

# Numbers of a tensor below which it is not worth a range of its own.
_SMALL = 1024
_TRIES = 16
# After which a round begins without those who wait to be let in, and whom others do not reach.
_TRIES_TO_LET_IN = 2
# The same on all peers, whatever pools they have.
_BUCKETS = 4


@dataclass(frozen=True)
class Round:
    """What the end of a round did.

    Attributes:
        number: of the round, from 1; the shared state's revision.
        peers: that took part in the smallest of its reductions; 0 where nothing was applied yet (the first of asynchronous rounds).
        delta_norm: of the mean delta that was applied.
    """

    number: int
    peers: int
    delta_norm: float


class DiLoCo:
    """See the module.

    Args:
        model: whose parameters with ``requires_grad`` learn together; in place, so optimizers keep theirs. Buffers stay each peer's own.
        peers: connected.
        every: inner steps of a round.
        learning_rate, momentum, nesterov: of the outer SGD.
        quantise: how deltas go over the wire, as of `Communicator.all_reduce`; each larger tensor has ranges of its own.
        asynchronous: take each outer step a round late.
        rounds: that were done before, where this goes on with what was trained; a newcomer learns them from the others.
        done: inner steps of the round after these that were done before; likewise.

    Attributes:
        state: the shared state; its revision counts rounds.
        received_bytes: of shared state, since the beginning: a newcomer's first round, and nothing where all compute the same.

    Peers whose settings are others than those of the group get `Mismatch`, by name, when they meet.

    Raises InputError for values that are none and for a model without floating-point parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        peers: Communicator,
        *,
        every: int = 500,
        learning_rate: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        quantise: Quantiser | str | None = None,
        asynchronous: bool = False,
        rounds: int = 0,
        done: int = 0,
    ) -> None:
        if type(every) is not int or every < 1:
            raise InputError(f"every is {shown(every)}; use 1 step or more")
        if type(done) is not int or not 0 <= done < every:
            raise InputError(f"done is {shown(done)}; use 0 to {every - 1}, as a round has {every} steps")
        if not 0 <= learning_rate < 1e6 or not 0 <= momentum < 1:
            raise InputError(
                f"learning_rate is {shown(learning_rate)} and momentum {shown(momentum)}; use at least 0, and 0 to below 1"
            )
        if not momentum and nesterov:
            raise InputError("nesterov is True and momentum 0; set it to False, or give a momentum")
        self.peers, self.every, self.quantise, self.asynchronous = peers, every, quantise, asynchronous
        self._local = {
            name: value for name, value in model.named_parameters() if value.is_floating_point() and value.requires_grad
        }
        if not self._local:
            raise InputError(f"{type(model).__name__} has no floating-point parameters that learn")
        self._outer = {name: nn.Parameter(value.detach().clone()) for name, value in self._local.items()}
        self._optimizer = torch.optim.SGD(
            self._outer.values(), lr=learning_rate, momentum=momentum, nesterov=nesterov, foreach=False
        )
        moments = {}
        for name, value in self._outer.items():
            if momentum:
                # There from the beginning, so that all peers share the same tensors.
                moments[f"momentum.{name}"] = self._optimizer.state[value]["momentum_buffer"] = torch.zeros_like(value)
        outer = {f"outer.{name}": value.detach() for name, value in self._outer.items()}
        # Inner steps of the round that is under way, as of a meeting: 0, but where a group goes on in the midst of one.
        self._met_at = torch.zeros(1, dtype=torch.int64)
        quantiser = quantiser_of(quantise)
        settings = {
            "every": str(every),
            "learning_rate": repr(float(learning_rate)),
            "momentum": repr(float(momentum)),
            "nesterov": str(bool(nesterov)),
            "quantise": "None" if quantiser is None else f"{quantiser.kind} of {quantiser.bits} bits",
            "asynchronous": str(bool(asynchronous)),
        }
        self.state = SharedState({**outer, **moments, "done": self._met_at}, revision=rounds, settings=settings)
        self.received_bytes = 0
        self._done, self._has_met = done, False
        self._pending: Future[list[Reduced]] | None = None
        self._deltas: dict[str, Tensor] = {}
        # Weights with which an asynchronous round began.
        self._begun: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pccl outer") if asynchronous else None

    @property
    def steps(self) -> int:
        """Inner steps that the group has done: those of a newcomer are counted from where the others were."""
        # Meetings so far; the last began the round that is under way.
        return (self.state.revision - self._has_met) * self.every + self._done

    def begin_step(self) -> bool:
        """Before an inner step; at the beginning of a round all peers meet here. Whether this is one.

        Raises CollectiveError where the group cannot go on.
        """
        if self._has_met:
            return False
        is_first = self._meet()
        if self.asynchronous:
            nothing = {name: torch.zeros_like(value) for name, value in self._outer.items()}
            self._go_ahead(nothing)
            if not is_first:
                # The others are about to reduce what they have just trained.
                self._launch(nothing)
        return True

    def end_step(self) -> Round | None:
        """After an inner step; at the end of a round all peers meet here, and weights are then those of all. None in between."""
        self._done += 1
        if self._done < self.every:
            return None
        self._done, self._has_met = 0, False
        number = self.state.revision
        if not self.asynchronous:
            self._find_deltas()
            told = self._applied(number, self._reduce())
            self._take()
            return told
        told = Round(number, 0, 0.0)
        mine = {name: (self._begun[name] - value).detach() for name, value in self._local.items()}
        if self._pending is not None:
            told = self._applied(number, self._arrived())
        self._meet()
        self._go_ahead(mine)
        self._launch(mine)
        return told

    @torch.no_grad()
    def _go_ahead(self, own: dict[str, Tensor]) -> None:
        """Begin a round at the outer weights and what this peer has learned that is not in them yet."""
        # All of them before the first is changed, so that where memory runs out weights are what was trained.
        begun = {name: value.detach() - own[name] for name, value in self._local.items()}
        for name, value in self._local.items():
            value.copy_(begun[name])
        self._begun = begun

    def _launch(self, deltas: dict[str, Tensor]) -> None:
        """Send deltas on their way, while the next round is trained."""
        assert self._thread is not None
        self._deltas = {name: value.detach() for name, value in deltas.items()}
        self._pending = self._thread.submit(self._reduce)

    def finish(self) -> Round | None:
        """Take the outer step that is still on its way, where there is one."""
        if self._pending is None:
            return None
        told = self._applied(self.state.revision, self._arrived())
        self._take()
        return told

    def _arrived(self) -> list[Reduced]:
        """What is on its way, once it has come or failed, and is on its way no more."""
        pending, self._pending = self._pending, None
        assert pending is not None
        return pending.result()

    def close(self) -> None:
        """Wait for what is on its way, and take no step more. The communicator stays open."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _meet(self) -> bool:
        """Let in who waits, share the state, and have its weights. Whether nothing was shared before."""
        self._met_at.fill_(self._done)
        self.state.progress = self._done
        shared = self._shared()
        self._done = int(self._met_at)
        self.received_bytes += shared.received_bytes
        self._take()
        self._has_met = True
        return shared.is_first

    def _shared(self) -> Shared:
        for _ in range(_TRIES_TO_LET_IN):
            try:
                self.peers.admit()
                break
            except TopologyFailed:
                continue
        for _ in range(_TRIES):
            self.state.revision += 1
            try:
                return self.peers.sync_shared_state(self.state)
            except PeerLost as error:
                self.state.revision -= 1
                if not error.retryable or self.peers.is_given_up:
                    raise
        raise PeerLost(f"the shared state was not shared in {_TRIES} tries")

    @torch.no_grad()
    def _take(self) -> None:
        for name, value in self._local.items():
            value.copy_(self._outer[name])

    @torch.no_grad()
    def _find_deltas(self) -> None:
        self._deltas = {name: self._outer[name] - value for name, value in self._local.items()}

    def _reduce(self) -> list[Reduced]:
        """The mean of all peers' deltas, in the place of this peer's, which stay where nobody is left; what came of those reduced."""
        buckets = list(_buckets(self._deltas, self.quantise))
        outcomes = self.peers.all_reduce_many([one for one, _ in buckets], attempts=_TRIES)
        for outcome in outcomes:
            # With nobody left there is nothing to reduce with: what was not is this peer's own.
            is_alone = isinstance(outcome, PeerLost) and self.peers.group_size < 2
            if isinstance(outcome, CollectiveError) and not is_alone:
                raise outcome
        for one, parts in buckets:
            if parts:
                for value, part in zip(parts, one.send.split([part.numel() for part in parts]), strict=True):
                    value.copy_(part.reshape(value.shape))
        return [outcome for outcome in outcomes if isinstance(outcome, Reduced)]

    def _applied(self, number: int, outcomes: list[Reduced]) -> Round:
        squares = 0.0
        for name, value in self._outer.items():
            value.grad = self._deltas[name]
            squares += float(self._deltas[name].double().square().sum())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Round(number, min((outcome.world for outcome in outcomes), default=1), squares**0.5)


def _buckets(deltas: dict[str, Tensor], quantise: Quantiser | str | None) -> Iterable[tuple[Reduction, list[Tensor]]]:
    """What is reduced at a time, and the tensors that it is made of (none where it is one itself).

    Without quantisation a few buckets of neighbouring tensors, so that several connections have something to do; with it each larger tensor
    by itself.
    """
    own = {name for name, value in deltas.items() if quantise is not None and value.numel() >= _SMALL}
    tag = 0
    for name in sorted(own):
        yield Reduction(deltas[name], op="avg", quantise=quantise, tag=tag), []
        tag += 1
    kinds = sorted({str(deltas[name].dtype) for name in deltas if name not in own})
    for kind in kinds:
        rest = [value for name, value in sorted(deltas.items()) if name not in own and str(value.dtype) == kind]
        most = -(-sum(value.numel() for value in rest) // _BUCKETS)
        held: list[Tensor] = []
        for place, value in enumerate(rest):
            held.append(value)
            if sum(one.numel() for one in held) >= most or place == len(rest) - 1:
                flat = torch.cat([one.reshape(-1).to("cpu") for one in held])
                yield Reduction(flat, op="avg", tag=tag), held
                tag, held = tag + 1, []
