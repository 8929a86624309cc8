"""`ElasticTrainer`: a rank of a training that goes on, with the same computation, when ranks are lost or come.

    trainer = ElasticTrainer(layers, mesh=(2, 2), global_batch=32, optimizer_factory=torch.optim.AdamW, seed=0, loss=F.cross_entropy,
                             coordinator="127.0.0.1:4711", secret="s3cret")
    while trainer.steps < 1000:
        loss = trainer.step(batch_of(trainer.steps))      # the whole batch, on every rank; each works on its samples

Every rank runs this. A rank that comes later runs it too: the constructor waits until it is in. When ranks are lost a step is taken back,
what they had comes from neighbours, the step is done again by those who are left, with the same samples and the same random numbers.
"""
# Shapes: B samples, N numbers of a layer

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.cluster.elastic.coordinator import layout_from
from anabranch.cluster.elastic.execution import Batch, StageStep, StepSettings, Work, draws_of
from anabranch.cluster.elastic.layout import Layout
from anabranch.cluster.elastic.links import CalledAwayError, LinkPool
from anabranch.cluster.elastic.moving import Held, moved_state
from anabranch.cluster.elastic.saving import read_slices, write_manifest, write_slices
from anabranch.cluster.elastic.state import (
    PARAM,
    OptimizerFactory,
    Slice,
    Snapshot,
    State,
    Updater,
    check_layers,
    flat_of,
    install,
    learning,
    snapshot_of,
)
from anabranch.cluster.elastic.streaming import Stream
from anabranch.cluster.elastic.tree import TreeSum
from anabranch.cluster.elastic.wire import Channel, Header, connect
from anabranch.errors import AnabranchError, CheckpointError, ConfigError, InputError, PeerError

__all__ = ["ElasticTrainer", "UnrecoverableError"]

_BEAT_S = 0.5
# For so long who leaves waits until the coordinator has heard it.
_PARTING_S = 5.0


class UnrecoverableError(AnabranchError):
    """What was lost is with nobody who is left; the message names the last checkpoint."""


class ElasticTrainer:
    """One rank.

    Args:
        layers: of the whole model, in order; each takes what the one before gives: a tensor of samples, or a tuple of such. All ranks make
            the same, and each trains those of its stage.
        mesh: (D, P), replicas and stages, with which training begins.
        global_batch: B, of every step whatever ranks there are.
        optimizer_factory: makes an optimizer of a list of flat parameters, such as ``torch.optim.AdamW``; see `Updater`.
        loss: of the last layer's output and the targets, a mean over samples.
        coordinator: "host:port".
        secret: as the coordinator has it.
        seed: of what layers draw.
        micro_batches: M; default: 2 P.
        snapshot_copies: neighbours that keep a rank's slices.
        exact: sums in one fixed order, block by block: the same bits whatever ranks there are. Without it blocks go through layers
            together, and results differ by rounding.
        block: samples of a block.
        learning_rate: factor of the optimizer's, by committed steps.
        draws: True where layers draw by other means than torch's dropout modules; None finds those.
        resume: a folder of checkpoints, see `save`; the newest is where training goes on, in any mesh.
        host: where other ranks reach this one.
        wish: the rank that it would like to be at the beginning.
        timeout_s: after so long a wait for a rank ends with PeerError.
        on_epoch_change: called with the announcement's layout, version and predicted step after every change.
        probe: called with the name of each state of the protocol as it is reached, for tests.

    Attributes:
        rank: its name among ranks; those who come later have new ones.
        steps: committed ones.

    Raises ConfigError for what cannot be trained so, CheckpointError for a checkpoint that is none or damaged, PeerError where the
    coordinator is not there or refuses.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        mesh: tuple[int, int],
        global_batch: int,
        optimizer_factory: OptimizerFactory,
        loss: Callable[[Any, Any], Tensor],
        coordinator: str,
        secret: str = "",
        seed: int = 0,
        micro_batches: int | None = None,
        snapshot_copies: int = 1,
        exact: bool = True,
        block: int = 1,
        learning_rate: Callable[[int], float] | None = None,
        draws: bool | None = None,
        resume: str | Path | None = None,
        host: str = "127.0.0.1",
        wish: int | None = None,
        timeout_s: float = 60.0,
        on_epoch_change: Callable[[dict[str, Any]], None] | None = None,
        probe: Callable[[str], None] | None = None,
    ) -> None:
        self._layers = list(layers)
        check_layers(self._layers)
        _, stages = mesh
        micro = 2 * stages if micro_batches is None else micro_batches
        for name, number in (
            ("global_batch", global_batch), ("micro_batches", micro), ("block", block), ("snapshot_copies", snapshot_copies + 1),
        ):  # fmt: skip
            if number < 1:
                raise ConfigError(f"{name} is {number}; use more")
        if stages > len(self._layers):
            raise ConfigError(
                f"mesh has {stages} stages, and there are {len(self._layers)} layers; use at most as many stages"
            )
        draw = tuple(draws_of(layer) if draws is None else draws for layer in layers)
        self._settings = StepSettings(global_batch, micro, block if exact else 1, exact, loss, seed, draw)
        self._updater = Updater(optimizer_factory, learning_rate)
        self._sizes = [sum(parameter.numel() for parameter in learning(layer)) for layer in self._layers]
        self._version = 0
        self._loaded: dict[int, Slice] = {}
        if resume is not None:
            self._version, self._loaded = read_slices(resume, self._sizes)
            for layer, own in self._loaded.items():
                install(self._layers[layer], own.tensors[PARAM])
        self._copies, self._timeout_s = snapshot_copies, timeout_s
        self._on_epoch_change, self._probe = on_epoch_change, probe or (lambda state: None)
        # What the coordinator said and nobody has acted on.
        self._news: deque[Header] = deque()
        self._stop: Header | None = None
        self._welcome: Header | None = None
        self._work: Work | None = None
        self._epoch, self._layout_epoch = 0, 0
        self._saved: Header | None = None
        self._stream: Stream | None = None
        # Links opened and closed since the last layout.
        self._edited = (0, 0)
        self._states: dict[int, State] = {}
        self._batches: dict[int, Batch] = {}
        # By (epoch of the layout, owner): versions.
        self._held: Held = {}
        self._losses: dict[int, float] = {}
        self._recovery: dict[str, Any] = {}
        self._noticed_s: float | None = None
        self._is_closed = False
        key = secret.encode()
        self._links = LinkPool(
            host,
            key,
            on_snapshot=self._take_snapshot,
            interrupted=self._is_called,
            suspect=self._suspect,
            timeout_s=timeout_s,
        )
        where, _, port = coordinator.rpartition(":")
        if not where or not port.isdigit():
            raise ConfigError(f"coordinator is {coordinator!r}; say host:port")
        told: dict[str, Any] = {"on_frame": self._on_control, "on_close": self._on_control_lost}
        self._control = connect(where, int(port), key, timeout_s=min(timeout_s, 10.0), **told)
        self._begin(host, wish, mesh)

    def _begin(self, host: str, wish: int | None, mesh: tuple[int, int]) -> None:
        """Say hello, and wait until this rank is in."""
        settings = self._settings
        self._tell(
            "hello",
            host=host,
            port=self._links.port,
            wish=wish,
            copies=self._copies,
            version=self._version,
            weights=_weights_of(self._layers),
            signature={
                "sizes": self._sizes,
                "layers": [type(layer).__name__ for layer in self._layers],
                "mesh": list(mesh),
                "global_batch": settings.global_batch,
                "micro_batches": settings.micro_batches,
                "block": settings.block,
                "exact": settings.is_exact,
                "seed": settings.seed,
                "copies": self._copies,
            },
        )
        try:
            self._wait_until(lambda: self._welcome is not None, "the coordinator does not answer")
            assert self._welcome is not None
            self.rank = self._links.rank = int(self._welcome["rank"])
            threading.Thread(target=self._beat, daemon=True).start()
            # Others may come late: this wait has no bound but the coordinator.
            self._wait_until(lambda: bool(self._news), None)
            self._follow()
        except BaseException:
            self.close()
            raise

    @property
    def steps(self) -> int:
        """Committed steps: the number of the next one."""
        return self._version

    def step(self, batch: Batch) -> float:
        """One step of the whole batch; the loss, a mean over it, as all ranks have it.

        Args:
            batch: (inputs, targets) of step `steps`: tensors of B samples, or tuples of such.

        Raises InputError for a batch of another size, UnrecoverableError where what was lost is with nobody, PeerError where the
        coordinator stopped or this rank was cast out; and what layers raise, which ends training on all ranks.
        """
        self._check_batch(batch)
        goal = self._version + 1
        self._batches[self._version] = batch
        self._batches = {step: one for step, one in self._batches.items() if step >= self._version - 1}
        while self._version < goal:
            try:
                if self._is_called():
                    raise CalledAwayError
                self._one_step()
            except CalledAwayError:
                self._follow()
            except (AnabranchError, OSError) as error:
                self._fail(error)
                raise
            except Exception as error:
                self._fail(error)
                raise
        return self._losses[goal - 1]

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of all layers, with the keys of ``nn.Sequential(*layers)``. All ranks call it together, after the same step."""
        while True:
            try:
                if self._is_called():
                    raise CalledAwayError
                self._share_weights()
            except CalledAwayError:
                version = self._version
                self._follow()
                if self._version < version:
                    raise PeerError("a step was taken back while weights were gathered; make it again first") from None
                continue
            return {name: value.detach().clone() for name, value in nn.Sequential(*self._layers).state_dict().items()}

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint of the last committed step: each rank its own slices. All ranks call it together, after the same step.

        Raises CheckpointError on all of them where one could not write, or ranks were lost meanwhile and a step was taken back; training
        can go on, and an older checkpoint is as it was.
        """
        version = self._version
        while True:
            try:
                if self._is_called():
                    raise CalledAwayError
                self._save(folder, version)
                return
            except CalledAwayError:
                self._follow()
                if self._version != version:
                    raise CheckpointError(
                        f"step {version} was taken back while it was saved; save after the next one"
                    ) from None

    def _save(self, folder: str | Path, version: int) -> None:
        self._saved, why, name = None, None, ""
        self._probe("save")
        try:
            name = write_slices(folder, self.rank, self._states[version].slices, version)
        except (OSError, AnabranchError) as error:
            why = f"{type(error).__name__}: {error}"
        self._tell("saved", version=version, folder=str(folder), file=name, why=why)
        self._wait_until(lambda: self._saved is not None, "the other ranks do not save")
        assert self._saved is not None
        if self._saved.get("why"):
            raise CheckpointError(f"step {version} is not saved in {folder}: {self._saved['why']}")
        if self.rank == self._layout().grid.ranks[0]:
            write_manifest(folder, version, list(self._saved["files"].values()), self._sizes)

    def status(self) -> dict[str, Any]:
        """JSON-ready: rank, layout, steps; and of the last change of ranks how long each part took here.

        ``recovery``: seconds to agree (from when this rank noticed until a layout was announced), to edit links, to move slices, until
        all were ready, to the first commit after it; links opened and closed, and those that stayed; bytes moved.
        """
        work = self._work
        return {
            "rank": self.rank,
            "epoch": self._epoch,
            "steps": self._version,
            "stage": None if work is None else work.stage,
            "layers": None if work is None else [work.layers.start, work.layers.stop - 1],
            "stages": None if work is None else [list(stage) for stage in work.layout.grid.stages],
            "links": self._links.count,
            "links_ever": self._links.opened,
            "recovery": dict(self._recovery),
        }

    def owned(self) -> dict[int, tuple[int, int]]:
        """By layer, the numbers that this rank owns; of all ranks together for `census`."""
        return {layer: (own.first, own.end) for layer, own in self._states[self._version].slices.items()}

    def digest(self) -> str:
        """Of this rank's slices with the optimizer's state, to the bit."""
        return self._states[self._version].digest()

    def close(self) -> None:
        """Leave: training is done. Others are told, and links end."""
        if self._is_closed:
            return
        self._is_closed = True
        # Told first, so that nobody suspects a rank whose links end.
        self._tell("leave")
        self._links.close()
        self._control.close(after_sends=True)
        self._control.wait_closed(_PARTING_S)

    def __enter__(self) -> "ElasticTrainer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # A step

    def _one_step(self) -> None:
        work, version = self._work, self._version
        assert work is not None
        self._take_live_news()
        if version not in self._batches:
            raise PeerError(f"step {version} was taken back, and this rank does not have its batch any more")
        before = self._states[version]
        stream = self._stream
        if stream is not None:
            self._probe("stream")
            stream.send_chunks(self._links, before.slices, version)
        run = StageStep(work, self._settings, self._layers, self._links, version)
        run.run(self._batches[version], self._probe)
        self._probe("reduce")
        gradients = self._reduced(run)
        self._probe("update")
        if stream is not None:
            stream.send_gradients(self._links, before.slices, gradients, version)
        slices = self._updater.next_slices(before.slices, gradients, version)
        flat = self._gathered(slices)
        shadow = State(flat, slices)
        if stream is not None:
            stream.take(self._links, version)
        self._wait_for_snapshots()
        self._probe("vote")
        samples = sum(len(work.samples(column)) for column in range(self._settings.micro_batches))
        self._tell(
            "vote",
            epoch=self._epoch,
            step=version,
            blocks=self._settings.leaves(len(work.layout.grid.stages[-1])),
            loss=[[*node, value.hex()] for node, value in run.losses.nodes()],
            # The backward takes about twice the forward.
            costs={str(layer): 3 * seconds / max(samples, 1) for layer, seconds in run.seconds.items()}
            if samples
            else {},
        )
        self._probe("voted")
        self._wait_until(lambda: bool(self._news) or self._stop is not None, "the coordinator does not decide")
        if self._stop is not None or self._news[0]["kind"] != "commit":
            raise CalledAwayError
        self._commit(self._news.popleft(), shadow)

    def _commit(self, news: Header, shadow: State) -> None:
        self._probe("commit")
        step = int(news["step"])
        if step != self._version:
            raise PeerError(f"the coordinator committed step {step}, and this rank is at {self._version}")
        # The version before stays until snapshots of this one are with all neighbours, which the next vote says.
        self._states = {step: self._states[step], step + 1: shadow}
        self._losses = {step: float.fromhex(news["loss"])}
        self._version = step + 1
        for layer, flat in shadow.flat.items():
            install(self._layers[layer], flat)
        self._send_snapshots(self._layout_epoch, self._layout(), shadow, step + 1)
        if self._noticed_s is not None and self._recovery:
            now = time.monotonic()
            self._recovery["first_commit_s"] = now - self._recovery.pop("_going", now)
            self._recovery["total_s"] = now - self._noticed_s
            self._noticed_s = None

    def _reduced(self, run: StageStep) -> dict[int, Tensor]:
        """The gradient of this rank's slices, of all samples: nodes of sums go to the owners, who add them up in the tree's order."""
        work = self._work
        assert work is not None
        stage = work.layout.grid.stages[work.stage]
        owners = {layer: work.layout.slices(layer, self._sizes[layer]) for layer in work.layers}
        tag = f"r{run.step}"
        nodes = {layer: list(run.sums[layer].nodes()) for layer in work.layers}
        for rank in stage:
            if rank == self.rank:
                continue
            told, parts = [], []
            for layer in work.layers:
                for owner, first, end in owners[layer]:
                    if owner == rank:
                        told += [[layer, *node] for node, _ in nodes[layer]]
                        parts += [value[first:end] for _, value in nodes[layer]]
            self._links.send(rank, tag, parts, nodes=told)
        mine = {
            layer: (first, end) for layer in work.layers for owner, first, end in owners[layer] if owner == self.rank
        }
        sums: dict[int, TreeSum[Tensor]] = {layer: TreeSum(self._settings.leaves(len(stage))) for layer in mine}
        for layer, (first, end) in mine.items():
            for node, value in nodes[layer]:
                sums[layer].add_node(node, value[first:end])
        for rank in stage:
            if rank != self.rank:
                parts, header = self._links.receive(rank, tag)
                for (layer, level, place), value in zip(header["nodes"], parts, strict=True):
                    sums[layer].add_node((level, place), value)
        return {layer: tree.root() for layer, tree in sums.items()}

    def _gathered(self, slices: dict[int, Any]) -> dict[int, Tensor]:
        """Whole weights of the stage's layers, of the new slices of all its ranks."""
        work = self._work
        assert work is not None
        stage = work.layout.grid.stages[work.stage]
        tag, order = f"w{self._version}", sorted(slices)
        for rank in stage:
            if rank != self.rank:
                self._links.send(rank, tag, [slices[layer].tensors["param"] for layer in order], layers=order)
        parts = {(layer, self.rank): slices[layer].tensors["param"] for layer in order}
        for rank in stage:
            if rank != self.rank:
                received, header = self._links.receive(rank, tag)
                parts |= {(layer, rank): value for layer, value in zip(header["layers"], received, strict=True)}
        flat = {}
        for layer in work.layers:
            owners = work.layout.slices(layer, self._sizes[layer])
            flat[layer] = torch.cat([parts[layer, owner] for owner, _, _ in owners]) if owners else torch.empty(0)
        return flat

    def _share_weights(self) -> None:
        """Every layer's weights, from the first rank of its stage to all that do not have it."""
        work = self._work
        assert work is not None
        flat = self._states[self._version].flat
        tag = f"s{self._version}"
        for number, stage in enumerate(work.layout.grid.stages):
            if stage[0] == self.rank:
                for rank in work.layout.grid.ranks:
                    if rank not in stage:
                        self._links.send(rank, tag, [flat[layer] for layer in work.layers])
            if self.rank not in stage:
                received, _ = self._links.receive(stage[0], tag)
                for layer, value in zip(work.layout.parts[number], received, strict=True):
                    install(self._layers[layer], value)

    # Snapshots

    def _send_snapshots(self, layout_epoch: int, layout: Layout, state: State, version: int) -> None:
        self._probe("snapshot")
        holders = layout.holders(self.rank, self._copies)
        if not holders:
            return
        snapshot = snapshot_of(state.slices, version)
        header = {
            "kind": "snapshot", "layout": layout_epoch, "version": version, "layers": snapshot.layers, "digest": snapshot.digest,
        }  # fmt: skip
        for rank in holders:
            self._links.send_packed(rank, header, snapshot.body)

    def _take_snapshot(self, owner: int, header: Header, body: bytes) -> None:
        """In a link's thread: verified as it comes, and told; of two versions the older makes room."""
        layers = tuple((int(layer), told, spec) for layer, told, spec in header["layers"])
        snapshot = Snapshot(int(header["version"]), layers, body, str(header["digest"]))
        layout_epoch = int(header["layout"])
        try:
            snapshot.slices()
        except InputError as error:
            self._tell("bad", epoch=self._epoch, owner=owner, why=str(error))
            return
        self._tell("held", owner=owner, version=snapshot.version, layout=layout_epoch)
        with self._links.changed:
            versions = self._held.setdefault((layout_epoch, owner), {})
            versions[snapshot.version] = snapshot
            for old in sorted(versions)[:-2]:
                del versions[old]
            self._links.changed.notify_all()

    def _wait_for_snapshots(self) -> None:
        """Until this rank has the snapshots of this version that it is to keep, so that the one before need not be kept any longer."""
        layout = self._layout()
        owners = [rank for rank in layout.grid.ranks if self.rank in layout.holders(rank, self._copies)]
        self._wait_until(
            lambda: all(self._version in self._held.get((self._layout_epoch, owner), {}) for owner in owners),
            "a neighbour does not send its snapshot",
        )

    # Changes of ranks

    def _follow(self) -> None:
        """Do what the coordinator announced, until a layout holds. Raises UnrecoverableError and PeerError where it stopped."""
        if self._noticed_s is None:
            self._noticed_s = time.monotonic()
        while True:
            self._raise_if_stopped()
            news = None
            with self._links.changed:
                while self._news:
                    found = self._news.popleft()
                    if found["kind"] == "epoch" or (found["kind"] == "live" and self._work is None):
                        news = found
            if news is not None and news["kind"] == "live":
                self._observe(news)
                continue
            if news is None:
                # Called away by a link that broke: the coordinator will say.
                self._wait_until(
                    lambda: bool(self._news) or self._stop is not None, "the coordinator says nothing of a lost rank"
                )
                continue
            try:
                self._change(news)
            except CalledAwayError:
                continue
            return

    def _take_live_news(self) -> None:
        """Begin a stream that the coordinator announced at the last commit."""
        with self._links.changed:
            news = next((one for one in self._news if one["kind"] == "live"), None)
            if news is not None:
                self._news.remove(news)
        if news is not None:
            self._stream = self._stream_of(news)

    def _stream_of(self, news: Header) -> Stream:
        self._epoch = int(news["epoch"])
        self._edit({int(rank): (str(host), int(port)) for rank, (host, port) in news["members"].items()})
        before, after = layout_from(news["before"]), layout_from(news["after"])
        return Stream(before, after, self._sizes, int(news["chunk"]), int(news["version"]), self.rank, self._updater)

    def _edit(self, members: dict[int, tuple[str, int]]) -> None:
        opened, closed = self._links.edit(self._epoch, members)
        self._edited = (self._edited[0] + opened, self._edited[1] + closed)

    def _observe(self, news: Header) -> None:
        """As one who comes: take what is sent, step by step, until all is there; then the coordinator announces the layout."""
        try:
            stream = self._stream_of(news)
            for version in range(stream.start, stream.end):
                self._probe("observe")
                stream.take(self._links, version)
                self._tell("vote", epoch=self._epoch, step=version, loss=[])
                self._wait_until(lambda: bool(self._news), None, is_called=True)
                self._news.popleft()
            self._stream = stream
        except CalledAwayError:
            self._stream = None

    def _change(self, news: Header) -> None:
        start = time.monotonic()
        assert self._noticed_s is not None
        self._probe("epoch")
        self._epoch, base = int(news["epoch"]), int(news["version"])
        stream, self._stream = self._stream, None
        before = None if news["before"] is None else layout_from(news["before"])
        after = layout_from(news["after"])
        members = {int(rank): (str(host), int(port)) for rank, (host, port) in news["members"].items()}
        self._probe("links")
        self._edit(members)
        if self.rank not in after.grid.ranks:
            # It waits to come in, and is told when.
            raise CalledAwayError
        edited = time.monotonic()
        self._probe("moves")
        if before is not None and self.rank in before.grid.ranks:
            if base not in self._states:
                raise PeerError(f"version {base} is asked for, and this rank has {sorted(self._states)}")
            state: State | None = self._states[base]
        elif before is None:
            state = self._first_state(after)
        else:
            state = None
        moved = moved_state(
            self._links, self.rank, before, after, self._sizes, state, base,
            held=self._held, layout_epoch=self._layout_epoch_of(before), holders={int(r): tuple(h) for r, h in news["holders"].items()},
            alive=set(members), damaged=lambda owner, why: self._tell("bad", epoch=self._epoch, owner=owner, why=why),
            stream=stream,
        )  # fmt: skip
        assert moved.state is not None
        self._send_snapshots(self._epoch, after, moved.state, base)
        self._wait_for_new_snapshots(after, base)
        reshaped = time.monotonic()
        self._probe("ready")
        self._tell("ready", epoch=self._epoch)
        self._wait_until(lambda: bool(self._news) or self._stop is not None, "the other ranks are not ready")
        if self._stop is not None or self._news[0]["kind"] != "go":
            raise CalledAwayError
        self._news.popleft()
        self._probe("go")
        self._layout_epoch, self._version = self._epoch, base
        self._states = {base: moved.state}
        self._held = {key: value for key, value in self._held.items() if key[0] == self._epoch}
        for layer, flat in moved.state.flat.items():
            install(self._layers[layer], flat)
        self._work = Work(after, self.rank, self._settings, str(news["schedule"]), news["costs"])
        now = time.monotonic()
        self._recovery = {
            "epoch": self._epoch, "agree_s": start - self._noticed_s, "edit_s": edited - start, "reshard_s": reshaped - edited,
            "ready_s": now - reshaped, "links_opened": self._edited[0], "links_closed": self._edited[1],
            "links_kept": self._links.count - self._edited[0],
            "moved_bytes": moved.sent_bytes, "streamed": moved.streamed, "refused": moved.refused,
            "streamed_bytes": 0 if stream is None else stream.sent_bytes, "_going": now,
        }  # fmt: skip
        self._edited = (0, 0)
        if before is None:
            self._noticed_s = None
        if self._on_epoch_change is not None:
            self._on_epoch_change(
                {
                    "epoch": self._epoch,
                    "version": base,
                    "layout": after,
                    "step_s": news["step_s"],
                    "warnings": news["warnings"],
                }
            )

    def _layout_epoch_of(self, before: Layout | None) -> int:
        return 0 if before is None else self._layout_epoch

    def _first_state(self, after: Layout) -> State:
        layers = after.layers_of(self.rank)
        flat = {layer: flat_of(self._layers[layer]) for layer in layers}
        slices = {}
        for layer in layers:
            for owner, first, end in after.slices(layer, self._sizes[layer]):
                if owner == self.rank:
                    own = Slice(first, end, {PARAM: flat[layer][first:end]})
                    slices[layer] = self._loaded[layer].piece(first, end) if self._loaded else own
        return State(flat, slices)

    def _wait_for_new_snapshots(self, after: Layout, version: int) -> None:
        owners = [rank for rank in after.grid.ranks if self.rank in after.holders(rank, self._copies)]
        self._wait_until(
            lambda: all(version in self._held.get((self._epoch, owner), {}) for owner in owners),
            "a neighbour does not send its snapshot",
            is_called=True,
        )

    # The coordinator

    def _layout(self) -> Layout:
        assert self._work is not None
        return self._work.layout

    def _tell(self, kind: str, **more: Any) -> None:
        self._control.send({"kind": kind, **more})

    def _beat(self) -> None:
        while not self._is_closed and not self._control.is_closed:
            time.sleep(_BEAT_S)
            self._tell("beat")

    def _suspect(self, rank: int) -> None:
        if self._noticed_s is None and self._work is not None:
            self._noticed_s = time.monotonic()
        self._tell("suspect", epoch=self._epoch, rank=rank)

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, UnrecoverableError | PeerError):
            self._tell("fail", why=f"{type(error).__name__}: {error}")

    def _on_control(self, channel: Channel, header: Header, body: bytes) -> None:
        with self._links.changed:
            kind = header["kind"]
            if kind == "welcome":
                self._welcome = header
            elif kind in ("stop", "refuse"):
                self._stop = self._stop or header
            elif kind == "epoch":
                # Whatever was said of an older epoch is over, but for a commit, which all who are left must follow.
                self._news = deque(news for news in self._news if news["kind"] == "commit")
                self._news.append(header)
            elif kind == "saved":
                self._saved = header
            elif kind == "commit":
                self._news.append(header)
                if "live" in header:
                    self._news.append(header["live"])
            elif kind == "go" and int(header["epoch"]) >= self._epoch:
                self._news.append(header)
            self._links.changed.notify_all()

    def _on_control_lost(self, channel: Channel, why: str) -> None:
        with self._links.changed:
            if not self._is_closed:
                self._stop = self._stop or {
                    "kind": "stop",
                    "why": f"the coordinator is gone, or has cast this rank out ({why})",
                }
            self._links.changed.notify_all()

    def _is_called(self) -> bool:
        """Whether what this rank waits for will not come: another epoch, or the end."""
        with self._links.changed:
            return self._stop is not None or any(news["kind"] == "epoch" for news in self._news)

    def _raise_if_stopped(self) -> None:
        if self._stop is None:
            return
        why = str(self._stop["why"])
        if self._stop.get("is_lost"):
            raise UnrecoverableError(f"training cannot go on: {why}")
        raise PeerError(why)

    def _wait_until(self, holds: Callable[[], bool], told: str | None, *, is_called: bool = False) -> None:
        """Until ``holds``; bounded by the timeout where ``told`` says of what. Raises CalledAwayError when called away."""
        deadline = time.monotonic() + self._timeout_s
        with self._links.changed:
            while not holds():
                if self._work is None and self._stop is not None:
                    self._raise_if_stopped()
                if self._stop is not None or ((is_called or self._work is not None) and self._is_called()):
                    raise CalledAwayError
                if told is not None and time.monotonic() > deadline:
                    raise PeerError(f"{told} in {self._timeout_s:g} s")
                self._links.changed.wait(1.0)

    def _check_batch(self, batch: Batch) -> None:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(f"batch is a {type(batch).__name__}; give (inputs, targets)")
        for name, part in zip(("inputs", "targets"), batch, strict=True):
            for tensor in part if isinstance(part, tuple | list) else (part,):
                if not isinstance(tensor, Tensor) or not tensor.ndim or len(tensor) != self._settings.global_batch:
                    shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                    raise InputError(
                        f"{name} are {shape}, and global_batch is {self._settings.global_batch}; give the whole batch"
                    )


def _weights_of(layers: Sequence[nn.Module]) -> str:
    """A hash of what all begin with."""
    found = hashlib.blake2b(digest_size=16)
    for layer in layers:
        flat = flat_of(layer).contiguous()
        found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return found.hexdigest()
