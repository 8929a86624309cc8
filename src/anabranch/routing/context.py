"""`RoutingContext`: what travels beside the items through a routed computation, and what is collected on the way.

Nothing per call is stored on a module: losses and loads are *emitted* into the context, and `commit` hands loads to their
balancers once, after the forward pass. Activation recompute runs a layer in a `fork` whose emissions are dropped, so nothing
is counted twice.
"""
# Shapes: N items, E destinations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from torch import Tensor


class LoadSink(Protocol):
    """What takes loads after a forward pass (a balancer that adapts to them)."""

    def add_load(self, load_E: Tensor) -> None:
        """Add the loads of one forward pass."""


class LossOverLayers(Protocol):
    """What makes one loss of parts that several layers emitted (a balance over a pool that layers share)."""

    def close(self, parts: list[tuple[Tensor, ...]]) -> tuple[str, Tensor]:
        """(name, loss) from the parts, in the order of the layers."""


@dataclass
class RoutingContext:
    """State of one forward pass.

    Attributes:
        item_mask_N: bool, False for padding items, which are neither routed nor counted; None if all items are real.
        sequence_length: items are ``num_sequences * sequence_length`` in row-major order; None if they are no sequences.
        training: balancers emit losses and loads only then.
        losses: emitted losses by name, one entry per layer that emitted it.
        loads: emitted (balancer, load_E) pairs.
        parts: emitted (loss over layers, its part of one layer) pairs.
        state: what a design carries between layers or calls, by a name of its own (recurrent router state, masks).
    """

    item_mask_N: Tensor | None = None
    sequence_length: int | None = None
    training: bool = False
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    loads: list[tuple[LoadSink, Tensor]] = field(default_factory=list)
    parts: list[tuple[LossOverLayers, tuple[Tensor, ...]]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)

    def emit_loss(self, name: str, loss: Tensor) -> None:
        """Add a loss of one layer. The training loss takes the mean over layers of each name."""
        self.losses.setdefault(name, []).append(loss)

    def emit_load(self, sink: LoadSink, load_E: Tensor) -> None:
        """Note a load for ``sink``; it gets it at `commit`."""
        self.loads.append((sink, load_E))

    def emit_part(self, owner: LossOverLayers, part: tuple[Tensor, ...]) -> None:
        """Add one layer's part of a loss that ``owner`` makes of several layers' parts."""
        self.parts.append((owner, part))

    def fork(self) -> Self:
        """A context that sees the same state but collects on its own."""
        return replace(self, losses={}, loads=[], parts=[])

    def merge(self, losses: dict[str, list[Tensor]], loads: list, parts: list) -> None:
        """Take over what a fork collected."""
        for name, values in losses.items():
            self.losses.setdefault(name, []).extend(values)
        self.loads.extend(loads)
        self.parts.extend(parts)

    def commit(self) -> None:
        """Hand the loads to their balancers. Call once per forward pass, outside recomputed code."""
        for sink, load_E in self.loads:
            sink.add_load(load_E)
        self.loads = []

    def mean_losses(self) -> dict[str, Tensor]:
        """Each emitted loss, averaged over the layers (or groups of layers) that emitted it."""
        losses = {name: list(values) for name, values in self.losses.items()}
        owners = {id(owner): owner for owner, _ in self.parts}
        for key, owner in owners.items():
            name, loss = owner.close([part for other, part in self.parts if id(other) == key])
            losses.setdefault(name, []).append(loss)
        return {name: sum(values[1:], start=values[0]) / len(values) for name, values in losses.items()}
