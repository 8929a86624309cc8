"""`ElasticTrainer`: a rank of a training that goes on, with the same computation, when ranks are lost or come.

    trainer = ElasticTrainer(layers, global_batch=32, optimizer_factory=torch.optim.AdamW, seed=0, loss=F.cross_entropy,
                             coordinator="127.0.0.1:4711", secret="s3cret")
    while trainer.steps < 1000:
        loss = trainer.step(batch_of(trainer.steps))      # the whole batch, on every rank; each works on its samples

Every rank runs this. A rank that comes later runs it too: the constructor waits until it is in. When ranks are lost a step is taken back,
what they had comes from neighbours, the step is done again by those who are left, with the same samples and the same random numbers.

`anabranch.cluster.elastic.member` is a rank's standing in a layout, and how it comes to another; `control` its connection to the
coordinator, `stepping` a step, of which `execution` is the work of a stage, and `exchange` what ranks give each other.
"""
# Shapes: B samples, N numbers of a layer

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from anabranch.cluster.elastic.clocks import FrequencyControl, StageClock
from anabranch.cluster.elastic.control import Control
from anabranch.cluster.elastic.exchange import whole_weights
from anabranch.cluster.elastic.execution import Batch, StepSettings, check_batch, draws_of
from anabranch.cluster.elastic.fingerprint import told
from anabranch.cluster.elastic.links import CalledAwayError, LinkPool
from anabranch.cluster.elastic.member import Member
from anabranch.cluster.elastic.planner import Policy
from anabranch.cluster.elastic.saving import read_slices, remove_others, write_manifest, write_slices
from anabranch.cluster.elastic.snapshots import Snapshots
from anabranch.cluster.elastic.state import (
    PARAM,
    Slice,
    check_layers,
    digest_of,
    install,
    learning,
    weights_digest,
)
from anabranch.cluster.elastic.stepping import Step, Stepping
from anabranch.cluster.elastic.updating import Groups, OptimizerFactory, Updater
from anabranch.errors import AnabranchError, CheckpointError, ConfigError

__all__ = ["ElasticTrainer"]

T = TypeVar("T")


class ElasticTrainer:
    """One rank.

    Args:
        layers: of the whole model, in order; each takes what the one before gives: a tensor of samples, or a tuple of such. All ranks make
            the same, and each trains those of its stage.
        global_batch: B, of every step whatever ranks there are.
        optimizer_factory: makes an optimizer of a list of flat parameters, such as ``torch.optim.AdamW``; see `Updater`.
        loss: of the last layer's output and the targets, a mean over samples; or (loss, {name: number}) with others that are told.
        coordinator: "host:port".
        secret: as the coordinator has it.
        mesh: (D, P), replicas and stages, where the coordinator is to have these; None takes what it has.
        policy: how losses are answered, where the coordinator has none of its own; None takes what it has.
        seed: of what layers draw.
        micro_batches: M; default: 2 P.
        snapshot_copies: neighbours that keep a rank's slices.
        exact: sums in one fixed order, block by block: the same bits whatever ranks there are. Without it blocks go through layers
            together, and results differ by rounding.
        block: samples of a block.
        learning_rate: factor of the optimizer's, by committed steps.
        draws: True where layers draw by other means than torch's dropout modules; None finds those.
        resume: a folder of checkpoints, see `save`; the newest is where training goes on, in any mesh. Or (committed steps, by layer its
            slice, whole).
        groups: runs of a layer's numbers that the optimizer treats otherwise, see `Updater`.
        clip: largest norm of the whole gradient; None for no limit.
        skips_infinite: a step whose gradient is not finite changes nothing; else it changes weights by what is not finite.
        gathers: by committed steps, whether after such a step every rank has all weights, and the first all of the optimizer's state
            (`gathered`): it is part of the step, so a loss takes it back and it is done again.
        signature: what else ranks must agree on, JSON-ready. One with another is refused, and so is one whose layers, optimizer, loss (by
            name) or settings are not those of the others.
        gives_up: asked once a second while this rank waits to come in; True ends that by PeerError.
        at_step: called with committed steps before a step is made again where `step` was called for a later one meanwhile: for whoever sets
            something in layers by the step.
        clock: of the processor that this rank computes on, which then runs as the plan wants its stage to; see `StageClock`. None leaves
            clocks alone.
        host: where other ranks reach this one.
        wish: the rank that it would like to be at the beginning.
        timeout_s: a rank that works on its own for so long, while others wait as long for it, is cast out as stuck (unless nobody has a
            copy of what it has). A coordinator that says nothing for so long ends this rank with PeerError.
        on_epoch_change: called after every change with the layout, its version and predicted step, and who was lost and why.
        probe: called with the name of each state of the protocol as it is reached, for tests.

    Attributes:
        rank: its name among ranks; those who come later have new ones.

    Raises ConfigError for what cannot be trained so, CheckpointError for a checkpoint that is none or damaged, PeerError where the
    coordinator is not there or refuses.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        global_batch: int,
        optimizer_factory: OptimizerFactory,
        loss: Callable[[Any, Any], Any],
        coordinator: str,
        secret: str = "",
        mesh: tuple[int, int] | None = None,
        policy: Policy | None = None,
        seed: int = 0,
        micro_batches: int | None = None,
        snapshot_copies: int = 1,
        exact: bool = True,
        block: int = 1,
        learning_rate: Callable[[int], float] | None = None,
        draws: bool | None = None,
        resume: str | Path | tuple[int, dict[int, Slice]] | None = None,
        groups: Groups | None = None,
        clip: float | None = None,
        skips_infinite: bool = False,
        gathers: Callable[[int], bool] | None = None,
        signature: Mapping[str, Any] | None = None,
        gives_up: Callable[[], bool] | None = None,
        at_step: Callable[[int], None] | None = None,
        clock: FrequencyControl | None = None,
        host: str = "127.0.0.1",
        wish: int | None = None,
        timeout_s: float = 60.0,
        on_epoch_change: Callable[[dict[str, Any]], None] | None = None,
        probe: Callable[[str], None] | None = None,
    ) -> None:
        self._layers = list(layers)
        check_layers(self._layers)
        for name, number in (
            ("global_batch", global_batch),
            ("micro_batches", 1 if micro_batches is None else micro_batches),
            ("block", block),
            ("snapshot_copies", snapshot_copies + 1),
        ):
            if number < 1:
                raise ConfigError(f"{name} is {number}; use more")
        draw = tuple(draws_of(layer) if draws is None else draws for layer in layers)
        # Where nobody says into how many micro-batches, the coordinator does.
        self._settings = StepSettings(global_batch, micro_batches or 0, block if exact else 1, exact, loss, seed, draw)
        numbers = [[parameter.numel() for parameter in learning(layer)] for layer in self._layers]
        updater = Updater(optimizer_factory, learning_rate, groups, dict(enumerate(numbers)))
        sizes = [sum(of) for of in numbers]
        version, loaded = self._resumed(resume, sizes)
        self._probe = probe or (lambda state: None)
        key = secret.encode()
        self._links = LinkPool(
            host,
            key,
            on_snapshot=lambda *told: self._snapshots.take(self._links, *told),
            interrupted=lambda: self._control.is_called(),
            suspect=lambda rank: self._control.suspect(rank),
            waiting=lambda of: self._control.waiting(of),
            timeout_s=math.inf,
        )
        self._control = Control(self._links.changed, timeout_s=timeout_s, gives_up=gives_up)
        self._snapshots = Snapshots(self._control, snapshot_copies, self._probe)
        self._member = Member(
            self._layers,
            sizes,
            updater,
            links=self._links,
            control=self._control,
            snapshots=self._snapshots,
            loaded=loaded,
            version=version,
            clock=StageClock(clock),
            probe=self._probe,
            on_change=on_epoch_change,
        )
        self._stepping = Stepping(
            self._member,
            self._links,
            self._control,
            self._snapshots,
            self._layers,
            clip=clip,
            skips_infinite=skips_infinite,
            gathers=gathers,
            at_step=at_step,
            probe=self._probe,
        )
        try:
            self._control.connect(coordinator, key)
            shared = {
                **(signature or {}),
                **told(layers, optimizer_factory, groups, learning_rate, loss),
                "clip": clip,
                "draws": list(draw),
                "skips_infinite": skips_infinite,
                "gathers": gathers is not None,
                "policy": None if policy is None else asdict(policy),
            }
            moments = digest_of(loaded, version) if loaded else ""
            self._begin(host, wish, mesh, snapshot_copies, shared, moments)
        except BaseException as error:
            self.close(error)
            raise

    def _resumed(
        self, resume: str | Path | tuple[int, dict[int, Slice]] | None, sizes: Sequence[int]
    ) -> tuple[int, dict[int, Slice]]:
        """(committed steps, each layer whole) of what training goes on from; weights are put into the layers."""
        if resume is None:
            return 0, {}
        version, loaded = resume if isinstance(resume, tuple) else read_slices(resume, sizes)
        for layer, own in loaded.items():
            install(self._layers[layer], own.tensors[PARAM])
        return version, loaded

    def _begin(
        self,
        host: str,
        wish: int | None,
        mesh: tuple[int, int] | None,
        copies: int,
        signature: dict[str, Any],
        moments: str,
    ) -> None:
        """Say hello, and wait until this rank is in; ``moments`` is a hash of what the optimizer goes on from."""
        settings = self._settings
        signature |= {
            "sizes": self._member.sizes,
            "global_batch": settings.global_batch,
            "micro_batches": settings.micro_batches,
            "block": settings.block,
            "exact": settings.is_exact,
            "seed": settings.seed,
            "copies": copies,
        }
        welcome = self._control.ask(
            "hello",
            "welcome",
            told="the coordinator does not answer",
            host=host,
            port=self._links.port,
            wish=wish,
            mesh=None if mesh is None else list(mesh),
            version=self._member.version,
            weights=weights_digest(self._layers),
            moments=moments,
            signature=signature,
        )
        self.rank = self._links.rank = int(welcome["rank"])
        self._member.settings = replace(settings, micro_batches=int(welcome["micro_batches"]))
        self._control.start()
        # Others may come late: this wait has no bound but the coordinator.
        self._control.wait_until(lambda: bool(self._control.news), None)
        self._member.follow()

    @property
    def steps(self) -> int:
        """Committed steps: the number of the next one."""
        return self._member.version

    @property
    def last(self) -> Step:
        """What the newest step gave."""
        return self._stepping.last

    @property
    def gathered(self) -> tuple[int, dict[int, Slice]] | None:
        """(committed steps, each layer's slice whole) at the first rank after a step that gathers; None elsewhere."""
        return self._stepping.gathered

    @property
    def has_weights(self) -> bool:
        """Whether all layers here have the weights of the committed step."""
        return self._stepping.gathered_at[0] == self.steps

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of the layout that holds."""
        return self._member.layout.grid.ranks[0] == self.rank

    def step(self, batch: Batch) -> float:
        """One step of the whole batch; the loss, a mean over it, as all ranks have it.

        Args:
            batch: (inputs, targets) of step `steps`: tensors of B samples, or tuples of such.

        Raises InputError for a batch of another size, UnrecoverableError where what was lost is with nobody, PeerError where the
        coordinator stopped or this rank was cast out; and what layers raise. That ends this rank, and the others go on, unless the same
        step ends another one in the same way.
        """
        check_batch(batch, self._settings.global_batch)
        version = self.steps
        made = self._stepping
        made.stands_at = version
        made.batches = {version: batch} | {step: one for step, one in made.batches.items() if step == version - 1}
        try:
            self._run_to(version + 1)
        except Exception as error:
            self._control.fail(error, self.steps)
            raise
        return self._stepping.last.loss

    def _run_to(self, goal: int) -> None:
        """Make steps until so many are committed, also those that are taken back on the way."""
        while self.steps < goal:
            try:
                self._control.raise_if_called()
                self._stepping.make()
            except CalledAwayError:
                self._member.follow()

    def _together(self, work: Callable[[], T]) -> T:
        """What all ranks do after the same step, until all have done it.

        Where ranks are lost before that, it is done again by those who are left; also by those who had done their part, and after the step
        again where that was taken back. So ``work`` ends with what the coordinator says when all have told it of theirs. Who comes in after
        the same step begins with the next one and has no part: until then the layout stays that made the step.
        """
        goal = self.steps
        try:
            while True:
                try:
                    with self._control.staying():
                        self._control.raise_if_called()
                        return work()
                except CalledAwayError:
                    self._member.follow()
                    self._run_to(goal)
                    self._stepping.stand_at(goal)
        except CheckpointError:
            # All ranks have it, and go on.
            raise
        except Exception as error:
            self._control.fail(error, self.steps)
            raise

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of all layers, with the keys of ``nn.Sequential(*layers)``. All ranks call it together, after the same step."""

        def work() -> dict[str, Tensor]:
            member = self._member
            assert member.work is not None
            self._probe("weights")
            self._stepping.install(whole_weights(self._links, member.work, member.state.flat, f"s{self.steps}"))
            self._control.agree("weights")
            return {name: value.detach().clone() for name, value in nn.Sequential(*self._layers).state_dict().items()}

        return self._together(work)

    def finish(self, write: Callable[[], str]) -> str:
        """At the end of training: the first rank writes what was learned, and the others stay until it has; what ``write`` returned.

        Where the first rank is lost before it is done, the next one writes, of which then ``gathered`` is. All ranks call it, after the
        same step, and nobody is missed afterwards.

        Args:
            write: called at the rank that writes; says where.
        """
        control, goal = self._control, self.steps

        def work() -> str:
            # After a change of ranks another one may be the first, and one that came has nothing.
            if self._stepping.gathered_at != (goal, self._member.layout_epoch):
                self._stepping.gather(self._member.state, goal, f"z{goal}")
                control.agree("gathered")
            if self.is_first:
                self.wrote(write(), is_last=True)
            control.wait_until(lambda: "finished" in control.answers, None)
            return str(control.answers["finished"]["where"])

        return self._together(work)

    def wrote(self, where: str, *, is_last: bool = False) -> None:
        """Tell the coordinator of a checkpoint, which it names where training cannot go on."""
        self._control.tell("wrote", epoch=self._control.epoch, version=self.steps, where=where, is_last=is_last)

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint of the last committed step: each rank its own slices. All ranks call it together, after the same step.

        When it returns the checkpoint is whole. Raises CheckpointError on all ranks where one could not write; training can go on, and an
        older checkpoint is as it was.
        """
        self._together(lambda: self._save(folder))

    def _save(self, folder: str | Path) -> None:
        control, version, why, name = self._control, self.steps, None, ""
        self._probe("save")
        try:
            name = write_slices(folder, self.rank, self._member.state.slices, version)
        except (OSError, AnabranchError) as error:
            why = f"{type(error).__name__}: {error}"
        what = f"slices of step {version}"
        told: dict[str, Any] = {"epoch": control.epoch, "version": version, "folder": str(folder)}
        answer = control.ask(
            "slices", "saved", "manifest", of=lambda: {"round": what}, what=what, file=name, why=why, **told
        )
        if answer["kind"] == "manifest":
            files = list(answer["files"])
            self._probe("manifest")
            # Whoever was cast out meanwhile makes nothing of it.
            control.raise_if_called()
            try:
                write_manifest(folder, version, files, self._member.sizes)
            except (OSError, AnabranchError) as error:
                why = f"{type(error).__name__}: {error}"
            answer = control.ask("manifest", "saved", of=lambda: {"round": what}, why=why, **told)
            if answer["why"] is None:
                with suppress(OSError):
                    remove_others(folder, version, files)
        if answer["why"] is not None:
            raise CheckpointError(f"step {version} is not saved in {folder}: {answer['why']}")

    def status(self) -> dict[str, Any]:
        """JSON-ready: rank, layout, steps; and of the last change of ranks how long each part took here.

        ``clock``: of this rank's processor, see `StageClock.to_dict`.
        ``plan``: of the layout that holds, as `ElasticPlan.to_dict` has it, without moves. ``recovery``: seconds to detect (for how long
        a rank that was lost had not been heard; 0 where none was), to agree (from when this rank noticed until a layout was announced), to
        edit links, to move slices, until all were ready, to the first commit after it; links opened and closed, and those that stayed;
        bytes moved; who was lost, and why.
        """
        work = self._member.work
        return {
            "rank": self.rank,
            "epoch": self._control.epoch,
            "steps": self.steps,
            "stage": None if work is None else work.stage,
            "layers": None if work is None else [work.layers.start, work.layers.stop - 1],
            "is_moving": self._member.stream is not None,
            "stages": None if work is None else [list(stage) for stage in work.layout.grid.stages],
            "links": self._links.count,
            "links_ever": self._links.opened,
            "plan": self._member.plan,
            "clock": self._member.clock.to_dict(),
            "recovery": dict(self._member.recovery),
        }

    def owned(self) -> dict[int, tuple[int, int]]:
        """By layer, the numbers that this rank owns; of all ranks together for `census`."""
        return {layer: (own.first, own.end) for layer, own in self._member.state.slices.items()}

    def digest(self) -> str:
        """Of this rank's slices with the optimizer's state, to the bit."""
        return self._member.state.digest()

    def close(self, error: BaseException | None = None, *, is_done: bool = True) -> None:
        """Leave, after what others wait for is sent.

        Args:
            error: what ends this rank, where something does: then it counts as lost, others are told of the error and go on.
            is_done: False where training is not done, and goes on without this rank. After a rank has left because it is done nobody is
                waited for any more.
        """
        if error is not None:
            self._control.fail(error, self.steps)
        # Told first, so that nobody suspects a rank whose links end.
        if self._control.part(is_done=is_done):
            self._member.clock.release()
            self._links.close()
            self._control.close()

    def __enter__(self) -> "ElasticTrainer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, *more: object) -> None:
        self.close(error)
