"""One step of a rank, from its samples to the decision: forward and backward, sums, the update beside what holds, the vote."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from anabranch.cluster.elastic.control import Control
from anabranch.cluster.elastic.exchange import clipped, gathered, reduced, whole_slices, whole_weights
from anabranch.cluster.elastic.execution import Batch, StageStep
from anabranch.cluster.elastic.fingerprint import batch_word
from anabranch.cluster.elastic.links import LinkPool
from anabranch.cluster.elastic.member import Member
from anabranch.cluster.elastic.snapshots import Snapshots
from anabranch.cluster.elastic.state import Slice, State, install
from anabranch.cluster.elastic.wire import Header
from anabranch.errors import PeerError

__all__ = ["Step", "Stepping"]


@dataclass(frozen=True)
class Step:
    """What a step gave, as all ranks have it.

    Attributes:
        loss: a mean over the batch.
        terms: what else the loss told, likewise.
        norm: of the gradient before it was clipped; None where nobody asked.
    """

    loss: float
    terms: dict[str, float] = field(default_factory=dict)
    norm: float | None = None


class Stepping:
    """Makes the steps of a rank.

    Args:
        member, links, control, snapshots: of the rank.
        layers: of the whole model.
        clip, skips_infinite, gathers, at_step: see `anabranch.cluster.elastic.ElasticTrainer`.
        probe: called with states of the protocol.

    Attributes:
        batches: by step, those that may have to be made again.
        last: what the newest step gave.
        gathered: (committed steps, each layer's slice whole) at the first rank after a step that gathers; None elsewhere.
        gathered_at: (committed steps, epoch of the layout) of what was gathered last.
        stands_at: the committed steps for which whoever makes steps has set what depends on them.
    """

    def __init__(
        self,
        member: Member,
        links: LinkPool,
        control: Control,
        snapshots: Snapshots,
        layers: Sequence[nn.Module],
        *,
        clip: float | None,
        skips_infinite: bool,
        gathers: Callable[[int], bool] | None,
        at_step: Callable[[int], None] | None,
        probe: Callable[[str], None],
    ) -> None:
        self.member, self.links, self.control, self.snapshots = member, links, control, snapshots
        self.batches: dict[int, Batch] = {}
        self.last = Step(math.nan)
        self.gathered: tuple[int, dict[int, Slice]] | None = None
        self.gathered_at = (-1, 0)
        self.stands_at = -1
        self._layers, self._probe = layers, probe
        self._clip, self._skips_infinite = clip, skips_infinite
        self._gathers = gathers or (lambda version: False)
        self._at_step = at_step or (lambda version: None)

    def make(self) -> None:
        """The next step, until it is committed. Raises CalledAwayError when called away, and what layers raise."""
        member, links = self.member, self.links
        work, version = member.work, member.version
        assert work is not None
        member.take_live_news()
        if version not in self.batches:
            raise PeerError(f"step {version} was taken back, and this rank does not have its batch any more")
        self.stand_at(version)
        before, stream = member.state, member.stream
        if stream is not None:
            self._probe("stream")
            stream.send_chunks(links, before.slices, version)
        run = StageStep(work, member.settings, self._layers, links, version)
        run.run(self.batches[version], self._probe)
        self._probe("reduce")
        gradients: dict[int, Tensor] | None
        gradients, without = reduced(links, work, member.settings, member.sizes, run)
        norm = None
        if self._clip is not None or self._skips_infinite:
            assert gradients is not None
            gradients, norm = clipped(links, work, gradients, version, self._clip)
            if self._skips_infinite and not math.isfinite(norm):
                gradients = None
        self._probe("update")
        if stream is not None:
            stream.send_gradients(links, before.slices, gradients, version, without)
        shadow = before
        if gradients is not None:
            slices = member.updater.next_slices(before.slices, gradients, version, without=without)
            shadow = State(gathered(links, work, member.sizes, slices, version), slices)
        if stream is not None:
            stream.take(links, version)
        if self._gathers(version + 1):
            self.gather(shadow, version + 1, f"g{version}")
        self.snapshots.wait(self.member.rank, member.layout_epoch, work.layout, version)
        self._probe("vote")
        self._vote(run)
        self._probe("voted")
        self._commit(self.control.decided("commit"), shadow, norm)

    def stand_at(self, version: int) -> None:
        """What depends on the committed steps is that of these; a step that was taken back was followed by what is of the next."""
        if self.stands_at != version:
            self._at_step(version)
            self.stands_at = version

    def _vote(self, run: StageStep) -> None:
        member = self.member
        work, settings = member.work, member.settings
        assert work is not None
        samples = sum(len(work.samples(column)) for column in range(settings.micro_batches))
        # The backward takes about twice the forward; at the usual clock it would take as much more as this one is faster.
        times = 3 * member.clock.factor / samples if samples else 0.0
        costs = {str(layer): times * seconds for layer, seconds in run.seconds.items()} if samples else {}
        sums = {"": run.losses, **run.terms}
        self.control.tell(
            "vote",
            epoch=self.control.epoch,
            step=member.version,
            blocks=settings.leaves(len(work.layout.grid.stages[-1])),
            absent=run.absent,
            batch=batch_word(self.batches[member.version]),
            loss=[[name, *node, value.hex()] for name, tree in sums.items() for node, value in tree.nodes()],
            costs=costs,
        )

    def _commit(self, news: Header, shadow: State, norm: float | None) -> None:
        self._probe("commit")
        self.member.commit(int(news["step"]), shadow)
        told = {name: float.fromhex(value) for name, value in news["loss"].items()}
        self.last = Step(told.pop(""), told, norm)

    def gather(self, state: State, version: int, tag: str) -> None:
        """Weights of all layers here, and at the first rank all state of the optimizer."""
        self._probe("gather")
        work = self.member.work
        assert work is not None
        self.install(whole_weights(self.links, work, state.flat, f"{tag}w"))
        whole = whole_slices(self.links, work, self.member.sizes, state.slices, f"{tag}s")
        self.gathered = None if whole is None else (version, whole)
        self.gathered_at = (version, self.member.layout_epoch)

    def install(self, flat: Mapping[int, Tensor]) -> None:
        """Put weights into layers."""
        for layer, weights in flat.items():
            install(self._layers[layer], weights)
