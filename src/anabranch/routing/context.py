"""`RoutingContext`: what travels beside the items through a routed computation, and what is collected on the way.

Nothing per call is stored on a module: losses and loads are *emitted* into the context, and `commit` hands loads to their
balancers once, after the forward pass. Activation recompute runs a layer in a `fork` whose emissions are dropped, so nothing
is counted twice.
"""
# Shapes: N items, E destinations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from anabranch.routing.override import Overrides

T = TypeVar("T")


class LoadSink(Protocol):
    """What takes loads after a forward pass (a balancer that adapts to them)."""

    def add_load(self, load_E: Tensor, open_E: Tensor | None = None) -> None:
        """Add the loads of one forward pass; ``open_E`` is zero for destinations that were closed in it."""


class LossOverLayers(Protocol):
    """What makes one loss of parts that several layers emitted (a balance over a pool that layers share).

    Layers that are in several processes (`anabranch.train.pipeline`) find it again if it is a module of the model, or compares by value and
    can be pickled, as a frozen dataclass does.
    """

    def close(self, parts: list[tuple[Tensor, ...]]) -> tuple[str, Tensor]:
        """(name, loss) from the parts, in the order of the layers."""


@dataclass(frozen=True)
class OfPass:
    """A tensor, or anything else, of the whole forward pass: no layer takes it apart, whatever its shape.

    context.carry["table"] = OfPass(table_ED)                # [E, D]; in a pass of E items it could be theirs
    table_ED = context.carry["table"].value
    """

    value: Any


@dataclass
class RoutingContext:
    """State of one forward pass.

    Attributes:
        item_mask_N: bool, False for padding items, which are neither routed nor counted; None if all items are real.
        sequence_length: items are ``num_sequences * sequence_length`` in row-major order; None if they are no sequences.
        num_streams: the items are this many times the same sequences, one stream after another.
        sequences: a name of the sequence in each row of ``sequence_length`` items of a stream, its own as long as it goes on and
            whatever row it is in; None if nobody says.
        all_sequences: the names of all sequences of the pass, where this context is of some of them; None where it is of all.
        training: balancers emit losses and loads only then.
        is_measured: whether anyone reads metrics; not while tokens are generated, where making them would cost as much as a layer.
        losses: emitted losses by name, one entry per layer that emitted it.
        loads: emitted (balancer, load_E, open_E) triples.
        parts: emitted (loss over layers, its part of one layer) pairs.
        metrics: emitted numbers to log, by name, one entry per layer that emitted it.
        carry: tensors that a layer hands to the layers above it, by name (the state of a recurrent router). One ``[N, ...]`` or
            ``[B, L, ...]`` is of the items, and a layer that some of them go to sees those. One of the whole pass is wrapped in `OfPass`,
            unless it is a single number. Replace entries, never write into their tensors: activation recompute keeps what a layer was
            given and repeats it from there.
        state: what a caller gives to designs and recorders, by a name of its own; tensors are of the items, or in an `OfPass`, likewise.
        memo: see `once`.
        refuses_nan: whether a score that is NaN ends the pass. Where rows are of users who know nothing of one another it ends its own
            row alone, which whoever draws tokens sees.
        routing: what overrides the decisions of routers, asked in this order; see `anabranch.routing.override`. One list for the whole
            pass: forks have it too.
    """

    item_mask_N: Tensor | None = None
    sequence_length: int | None = None
    num_streams: int = 1
    sequences: Sequence[Hashable] | None = None
    all_sequences: Sequence[Hashable] | None = None
    training: bool = False
    is_measured: bool = True
    refuses_nan: bool = True
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    loads: list[tuple[LoadSink, Tensor, Tensor | None]] = field(default_factory=list)
    parts: list[tuple[LossOverLayers, tuple[Tensor, ...]]] = field(default_factory=list)
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)
    carry: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    memo: dict[int, Any] = field(default_factory=dict)
    routing: list["Overrides"] = field(default_factory=list)

    def emit_loss(self, name: str, loss: Tensor) -> None:
        """Add a loss of one layer. The training loss takes the mean over layers of each name."""
        self.losses.setdefault(name, []).append(loss)

    def emit_load(self, sink: LoadSink, load_E: Tensor, open_E: Tensor | None = None) -> None:
        """Note a load for ``sink``; it gets it at `commit`. ``open_E`` is zero for closed destinations, None if all were open."""
        self.loads.append((sink, load_E, open_E))

    def once(self, owner: object, make: Callable[[], Any]) -> Any:
        """What ``make`` gave ``owner`` first in this forward pass.

        A recomputation in the backward pass finds the same, whatever has changed since.
        """
        if id(owner) not in self.memo:
            self.memo[id(owner)] = make()
        return self.memo[id(owner)]

    def visit(self, owner: object) -> int:
        """How often ``owner`` called this before in this forward pass; the same again where the backward pass repeats the call.

        The count is carried from layer to layer as a tensor, since recomputation begins with what was carried to it.
        """
        name = f"visits.{id(owner)}"
        count = int(self.carry.get(name, 0))
        self.carry[name] = torch.tensor(count + 1)
        return count

    def emit_part(self, owner: LossOverLayers, part: tuple[Tensor, ...]) -> None:
        """Add one layer's part of a loss that ``owner`` makes of several layers' parts."""
        self.parts.append((owner, part))

    def emit_metric(self, name: str, value: Tensor) -> None:
        """Add a number of one layer that is worth logging; nothing is differentiated through it."""
        self.metrics.setdefault(name, []).append(value.detach())

    def fork(self, carry: dict[str, Any] | None = None) -> Self:
        """A context that sees the same state but collects on its own; it goes on from ``carry`` (default: what ours carries)."""
        carry = self.carry if carry is None else carry
        return replace(self, losses={}, loads=[], parts=[], metrics={}, carry=dict(carry))

    def trial(self) -> Self:
        """A `fork` for one of several calls of the same part in one pass: each is the first of the pass for what it calls."""
        return replace(self.fork(), memo=dict(self.memo))

    def collected(self) -> tuple[dict, list, list, dict]:
        """All that was emitted, for `merge`."""
        return self.losses, self.loads, self.parts, self.metrics

    def merge(self, losses: dict, loads: list, parts: list, metrics: dict) -> None:
        """Take over what a fork `collected`."""
        for ours, theirs in ((self.losses, losses), (self.metrics, metrics)):
            for name, values in theirs.items():
                ours.setdefault(name, []).extend(values)
        self.loads.extend(loads)
        self.parts.extend(parts)

    def take_over(self, fork: "RoutingContext") -> None:
        """Go on from where a fork is: with what it carries, and all that it `collected`."""
        self.carry = fork.carry
        self.merge(*fork.collected())

    def commit(self) -> None:
        """Hand the loads to their balancers. Call once per forward pass, outside recomputed code."""
        for sink, load_E, open_E in self.loads:
            sink.add_load(load_E, open_E)
        self.loads = []

    def mean_losses(self) -> dict[str, Tensor]:
        """Each emitted loss, averaged over the layers (or groups of layers) that emitted it."""
        losses = {name: list(values) for name, values in self.losses.items()}
        owners = {id(owner): owner for owner, _ in self.parts}
        for key, owner in owners.items():
            name, loss = owner.close([part for other, part in self.parts if id(other) == key])
            losses.setdefault(name, []).append(loss)
        return _means(losses)

    def mean_metrics(self) -> dict[str, Tensor]:
        """Each emitted metric, averaged over the layers that emitted it."""
        return _means(self.metrics)


def argument_of(kind: type[T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T | None:
    """The first argument of a call that is a ``kind``, by position or by name: forward hooks get calls as they were written."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, kind):
            return value
    return None


def _means(values: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: sum(entries[1:], start=entries[0]) / len(entries) for name, entries in values.items()}
