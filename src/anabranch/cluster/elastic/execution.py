"""One step of one rank: its samples of each column forward and backward through its stage's layers, in the order of the plan.

Between stages of different sizes a rank sends slices of its samples to whoever has them next: the overlaps of two cuts. With a fixed order
of sums each *block* of samples goes through the layers by itself, so that what a block gives is the same wherever it is computed, and
gradients are the nodes of one tree (`anabranch.cluster.elastic.tree`). Where the plan has gradients of weights as work of their own, a
block's are made when their turn comes (`anabranch.cluster.decoupled`), and are the same.
"""
# Shapes: B samples of the whole batch, N numbers of a layer

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.cluster.decoupled import Later, backward_of_inputs
from anabranch.cluster.elastic.cuts import covers, recut
from anabranch.cluster.elastic.layout import Layout
from anabranch.cluster.elastic.links import LinkPool
from anabranch.cluster.elastic.planner import cut_samples
from anabranch.cluster.elastic.state import gradient_of, learning
from anabranch.cluster.elastic.timing import simulate_ranks
from anabranch.cluster.elastic.tree import TreeSum
from anabranch.cluster.keyed_random import KeyedDropout, drawing, place_of, random_key
from anabranch.cluster.saved_bytes import SavedBytes, SavedTensor
from anabranch.cluster.schedules import BACKWARD, FORWARD, WEIGHT
from anabranch.errors import ConfigError, InputError

__all__ = ["Batch", "StageStep", "StepSettings", "Work", "check_batch", "draws_of"]

# The whole batch: inputs and targets, tensors of B samples (or tuples of such).
Batch = tuple[Any, Any]
_DROPPERS = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase, nn.RReLU)


@dataclass(frozen=True)
class StepSettings:
    """What does not change in a run.

    Attributes:
        global_batch, micro_batches: B, M.
        block: samples that go through the layers together where ``is_exact``.
        is_exact: sums in one fixed order, block by block.
        loss: of an output and targets, a mean over their samples; or (loss, {name: number}) with others that are told.
        seed: of what layers draw.
        draws: by layer, whether it draws by itself.
    """

    global_batch: int
    micro_batches: int
    block: int
    is_exact: bool
    loss: Callable[[Any, Any], Any]
    seed: int
    draws: tuple[bool, ...]

    @property
    def blocks(self) -> int:
        """Of the whole batch."""
        return -(-self.global_batch // self.block)

    def leaves(self, ranks: int) -> int:
        """Of the tree of sums: blocks, or the ranks of a stage."""
        return self.blocks if self.is_exact else ranks


class Work:
    """What a rank does in a layout: samples, order, neighbours. The same for every step until the layout changes."""

    def __init__(
        self, layout: Layout, rank: int, settings: StepSettings, schedule_name: str, costs: Sequence[float]
    ) -> None:
        grid = layout.grid
        self.layout, self.rank = layout, rank
        self.stage = grid.stage_of(rank)
        self.place = grid.stages[self.stage].index(rank)
        self.layers = layout.parts[self.stage]
        _, self.cuts_P = cut_samples(grid, settings.global_batch, settings.micro_batches, settings.block)
        self.is_first, self.is_last = self.stage == 0, self.stage == len(grid.stages) - 1
        # Every rank simulates the same, so orders fit together.
        free = [0.0] * layout.num_layers
        timed = simulate_ranks(
            layout, self.cuts_P, costs, schedule_name, send_L=free, frequency_P=[1.0] * len(grid.stages)
        )
        self.order = timed.orders[rank]
        self.puts_off = any(kind == WEIGHT for kind, _ in self.order)

    def samples(self, column: int) -> range:
        """Of this rank."""
        cut = self.cuts_P[self.stage][column]
        return range(cut[self.place], cut[self.place + 1])

    def before(self, column: int) -> list[tuple[int, int, int]]:
        """(rank, first, end) of who has this rank's samples in the stage in front."""
        return self._overlaps(self.stage - 1, column, is_source=False)

    def behind(self, column: int) -> list[tuple[int, int, int]]:
        """Likewise in the next stage."""
        return self._overlaps(self.stage, column, is_source=True)

    def _overlaps(self, stage: int, column: int, *, is_source: bool) -> list[tuple[int, int, int]]:
        stages = self.layout.grid.stages
        found = recut(self.cuts_P[stage][column], self.cuts_P[stage + 1][column])
        if is_source:
            return [(stages[stage + 1][b], first, end) for a, b, first, end in found if a == self.place]
        return [(stages[stage][a], first, end) for a, b, first, end in found if b == self.place]


@dataclass
class _Block:
    """A run of samples that goes through the layers at once: what came in, what came out."""

    first: int
    end: int
    entry: list[Tensor]
    output: list[Tensor]
    # What autograd keeps of it, and the gradients of weights, where these are work of their own.
    saved: "list[weakref.ref[SavedTensor]]" = field(default_factory=list)
    later: Later | None = None
    # The floating parts of what came in on which nothing depends.
    gaps: list[int] = field(default_factory=list)


@dataclass
class StageStep:
    """One step of one rank.

    Args:
        work, settings: see there.
        layers: all of the model; those of the stage run.
        links: to neighbours.
        step: committed steps before this one.

    Attributes:
        sums: by layer of the stage, the tree of gradients as far as they are here; of a loss that is the mean of the whole batch.
        without: by layer of the stage, the parameters, by their place, that have had no part in the step here.
        losses: likewise, of the last stage.
        terms: likewise, by name.
        seconds: by layer, forward of all its samples here.
        meter: of what is kept between forward and backward, and until gradients of weights, where these are work of their own.
    """

    work: Work
    settings: StepSettings
    layers: Sequence[nn.Module]
    links: LinkPool
    step: int
    sums: dict[int, TreeSum[Tensor]] = field(default_factory=dict)
    without: dict[int, frozenset[int]] = field(default_factory=dict)
    losses: TreeSum[float] = field(init=False)
    terms: dict[str, TreeSum[float]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    meter: SavedBytes = field(init=False)
    _blocks: dict[int, list[_Block]] = field(default_factory=dict)
    _told: dict[str, float] = field(default_factory=dict)
    _names: frozenset[str] | None = None

    def run(self, batch: Batch, probe: Callable[[str], None]) -> None:
        """All slots. Raises what layers raise, and what a wait raises."""
        settings, work = self.settings, self.work
        ranks = len(work.layout.grid.stages[work.stage])
        leaves = settings.leaves(ranks)
        self.sums = {layer: TreeSum(leaves) for layer in work.layers}
        self.losses = TreeSum(leaves)
        self.meter = SavedBytes(parameter for layer in work.layers for parameter in self.layers[layer].parameters())
        for layer in work.layers:
            # What a step that was taken back has left goes; nothing has a part yet.
            gradient_of(self.layers[layer])
            self.without[layer] = frozenset(range(len(learning(self.layers[layer]))))
        for kind, column in work.order:
            probe(kind)
            if kind == FORWARD:
                self._forward(column, batch)
            elif kind == BACKWARD:
                self._backward(column)
            else:
                self._weights(column)
        if not settings.is_exact:
            for layer in work.layers:
                self._take(layer, work.place)
            for name, value in self._told.items():
                self._sum_of(name).add(work.place, value)

    def _forward(self, column: int, batch: Batch) -> None:
        work = self.work
        mine = work.samples(column)
        if work.is_first:
            entry = _cut(batch[0], mine.start, mine.stop)
        else:
            parts = [self.links.receive(rank, f"f{self.step}.{column}")[0] for rank, _, _ in work.before(column)]
            entry = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        blocks = []
        for first, end in self._runs(mine):
            inside = [part[first - mine.start : end - mine.start] for part in entry]
            saved: list[weakref.ref[SavedTensor]] = []
            with self.meter.watch(saved) if work.puts_off else nullcontext():
                block = self._through(inside, first, end)
                if work.is_last:
                    self._lose(block, _cut(batch[1], first, end))
            block.saved = saved
            blocks.append(block)
        self._blocks[column] = blocks
        if not work.is_last and blocks:
            whole = [torch.cat([block.output[n].detach() for block in blocks]) for n in range(len(blocks[0].output))]
            for rank, first, end in work.behind(column):
                self.links.send(
                    rank, f"f{self.step}.{column}", [part[first - mine.start : end - mine.start] for part in whole]
                )

    def _lose(self, block: _Block, target: list[Tensor]) -> None:
        """The loss of a block in place of its output."""
        output = block.output[0] if len(block.output) == 1 else tuple(block.output)
        found = self.settings.loss(output, target[0] if len(target) == 1 else tuple(target))
        loss, terms = found if isinstance(found, tuple) else (found, {})
        if loss.ndim or not loss.requires_grad:
            raise ConfigError(
                f"the loss has shape {list(loss.shape)}; it must be one number that depends on a parameter"
            )
        # A sum over samples, over the whole batch: whatever ranks there are, this is its mean.
        share = (block.end - block.first) / self.settings.global_batch
        block.output = [loss * share]
        self._count(block.first, "", float(block.output[0].detach()))
        self._check_names(frozenset(terms))
        for name, value in terms.items():
            self._count(block.first, name, float(value) * share)

    def _through(self, inside: list[Tensor], first: int, end: int) -> _Block:
        entry = [part.detach().requires_grad_(part.is_floating_point() and not self.work.is_first) for part in inside]
        value: Any = entry[0] if len(entry) == 1 else tuple(entry)
        for number in self.work.layers:
            layer = self.layers[number]
            began = time.perf_counter()
            self._begin_at(number, first)
            value = self._drawn(number, value, first, end) if self.settings.draws[number] else layer(value)
            self.seconds[number] = self.seconds.get(number, 0.0) + time.perf_counter() - began
        output = list(value) if isinstance(value, tuple) else [value]
        for part in output:
            if not isinstance(part, Tensor) or not part.ndim or len(part) != end - first:
                shape = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ConfigError(
                    f"layer {number} gives {shape} for {end - first} samples; layers give tensors of samples, or tuples"
                )
        return _Block(first, end, entry, output)

    def _begin_at(self, number: int, first: int) -> None:
        """The next samples that go through a layer begin with this one: their masks are theirs, whoever has them, and beside what."""
        keyed = (module for module in self.layers[number].modules() if isinstance(module, KeyedDropout))
        for place, module in enumerate(keyed):
            module.step, module.first_row, module.run_seed = self.step, first, self.settings.seed
            module.place = place_of(number, place)

    def _drawn(self, number: int, value: Any, first: int, end: int) -> Any:
        """The output of a layer that draws by itself: of samples that are never cut otherwise its numbers are a function of the first.

        Where ranks have runs of samples as the grid wants it, that is each sample by itself.
        """
        layer, settings = self.layers[number], self.settings
        if settings.is_exact or end - first == 1:
            with drawing(random_key(settings.seed, self.step, number, first)):
                return layer(value)
        parts = []
        for at in range(end - first):
            one = tuple(part[at : at + 1] for part in value) if isinstance(value, tuple) else value[at : at + 1]
            self._begin_at(number, first + at)
            with drawing(random_key(settings.seed, self.step, number, first + at)):
                parts.append(layer(one))
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
        return torch.cat(parts)

    def _check_names(self, names: frozenset[str]) -> None:
        """Raise ConfigError where a loss tells other terms of some samples than of others: their sum would be of some alone."""
        if self._names is not None and names != self._names:
            raise ConfigError(
                f"the loss told {sorted(self._names)} of some samples and {sorted(names)} of others; tell the same terms of all"
            )
        self._names = names

    @property
    def absent(self) -> list[int]:
        """Of the leaves of the loss those that nobody will tell: of this rank, where it has no samples."""
        has_none = not any(len(self.work.samples(column)) for column in range(self.settings.micro_batches))
        return [self.work.place] if has_none and self.work.is_last and not self.settings.is_exact else []

    def _backward(self, column: int) -> None:
        work = self.work
        mine = work.samples(column)
        blocks = self._blocks.pop(column)
        received: list[Tensor] = []
        # (part, first, end) of samples of which nothing depends on a part.
        gaps: list[tuple[int, int, int]] = []
        if not work.is_last:
            found = [self.links.receive(rank, f"b{self.step}.{column}") for rank, _, _ in work.behind(column)]
            received = [torch.cat(pieces) for pieces in zip(*(parts for parts, _ in found), strict=True)]
            gaps = [tuple(gap) for _, header in found for gap in header.get("gaps", ())]
        back: list[list[Tensor]] = []
        for block in blocks:
            at = slice(block.first - mine.start, block.end - mine.start)
            back.append(self._backward_of(block, [part[at] for part in received], gaps))
        if work.puts_off:
            self._blocks[column] = blocks
        if not work.is_first:
            whole = [torch.cat(pieces) for pieces in zip(*back, strict=True)]
            own = [(number, block.first, block.end) for block in blocks for number in block.gaps]
            for rank, first, end in work.before(column):
                told = [(n, max(low, first), min(high, end)) for n, low, high in own if low < end and first < high]
                self.links.send(
                    rank,
                    f"b{self.step}.{column}",
                    [part[first - mine.start : end - mine.start] for part in whole],
                    **({"gaps": told} if told else {}),
                )

    def _backward_of(
        self, block: _Block, gradients: Sequence[Tensor], gaps: Sequence[tuple[int, int, int]]
    ) -> list[Tensor]:
        """Of the floating parts of what came in; those of weights are added to theirs, or put off.

        Where nothing depends on a part its gradient is 0 for who sent it, and it is one of the block's ``gaps``: a layer in front that
        nothing else depends on has no part in the step.
        """
        pairs: list[tuple[Tensor, Tensor | None]] = [(block.output[0], None)]
        if not self.work.is_last:
            # Gradients come of floating parts alone, in order.
            outputs = [part for part in block.output if part.is_floating_point()]
            pairs = [
                (out, gradient)
                for number, (out, gradient) in enumerate(zip(outputs, gradients, strict=True))
                if out.requires_grad and not covers([g[1:] for g in gaps if g[0] == number], block.first, block.end)
            ]
        roots, given = [root for root, _ in pairs], [gradient for _, gradient in pairs]
        entry = [part for part in block.entry if part.is_floating_point()]
        if self.work.puts_off:
            found, block.later = backward_of_inputs(roots, given, entry, meter=self.meter, saved=block.saved)
            block.entry, block.output = [], []
        else:
            if roots:
                torch.autograd.backward(roots, given)
            found = [part.grad for part in entry]
            self._add(block)
        block.gaps = [number for number, gradient in enumerate(found) if gradient is None]
        return [
            torch.zeros_like(part) if gradient is None else gradient
            for part, gradient in zip(entry, found, strict=True)
        ]

    def _weights(self, column: int) -> None:
        for block in self._blocks.pop(column):
            assert block.later is not None
            block.later.finish()
            self._add(block)

    def _add(self, block: _Block) -> None:
        """What a block's backward gave is a leaf of the tree."""
        if self.settings.is_exact:
            for layer in self.work.layers:
                self._take(layer, block.first // self.settings.block)

    def _take(self, layer: int, leaf: int) -> None:
        """A layer's gradients are a leaf of its tree."""
        gradient, without = gradient_of(self.layers[layer])
        self.sums[layer].add(leaf, gradient)
        self.without[layer] &= without

    def _count(self, first: int, name: str, value: float) -> None:
        if self.settings.is_exact:
            self._sum_of(name).add(first // self.settings.block, value)
        else:
            self._told[name] = self._told.get(name, 0.0) + value

    def _sum_of(self, name: str) -> TreeSum[float]:
        """Of a term; that without a name is the loss."""
        if not name:
            return self.losses
        leaves = self.settings.leaves(len(self.work.layout.grid.stages[self.work.stage]))
        return self.terms.setdefault(name, TreeSum(leaves))

    def _runs(self, mine: range) -> list[tuple[int, int]]:
        """Of a rank's samples, what goes through the layers at once."""
        if not self.settings.is_exact:
            return [(mine.start, mine.stop)] if len(mine) else []
        return list(pairwise([*range(mine.start, mine.stop, self.settings.block), mine.stop]))


def draws_of(layer: nn.Module) -> bool:
    """Whether a layer has a module of torch's that draws. Layers that draw by themselves say so (``draws=True`` of the trainer)."""
    return any(isinstance(module, _DROPPERS) for module in layer.modules())


def _cut(value: Any, first: int, end: int) -> list[Tensor]:
    """The samples of a tensor, or of each of a tuple."""
    parts = value if isinstance(value, tuple | list) else (value,)
    return [part[first:end] for part in parts]


def check_batch(batch: Batch, global_batch: int) -> None:
    """Raise InputError for what is no whole batch."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError(f"batch is a {type(batch).__name__}; give (inputs, targets)")
    for name, part in zip(("inputs", "targets"), batch, strict=True):
        for tensor in part if isinstance(part, tuple | list) else (part,):
            if not isinstance(tensor, Tensor) or not tensor.ndim or len(tensor) != global_batch:
                shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise InputError(f"{name} are {shape}, and global_batch is {global_batch}; give the whole batch")
