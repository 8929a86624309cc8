"""`Rank`: one device's executing process. It owns no memory; it attaches to its device's, runs requests on it, and lets go.

    standby --attach--> attached --warm, start, go--> serving --pause--> paused --release--> standby

A rank on standby has everything that takes long: the interpreter and its imports, an empty model, channels to its peers. It is driven by
the coordinator through one channel: calls that are answered, requests that are not; outputs go back as they come.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anabranch.data.tokenizer import load_tokenizer
from anabranch.errors import AnabranchError
from anabranch.lm.checkpoint import load_config
from anabranch.lm.tensors import build_empty
from anabranch.serving.core.batch import Batch
from anabranch.serving.core.request import Finish, Output, Request
from anabranch.serving.core.scheduler import Scheduler
from anabranch.serving.elasticmoe import handover
from anabranch.serving.elasticmoe.arena import DenseArena, ExpertArena, KvArena, torch_dtype
from anabranch.serving.elasticmoe.backend import backend_of
from anabranch.serving.elasticmoe.exchange import Mailbox, Owner, Peer, ShardedExperts, shard_experts
from anabranch.serving.elasticmoe.layout import pool_names
from anabranch.serving.elasticmoe.memory import Attached, Which, attach
from anabranch.serving.elasticmoe.preparing import ResumingSampler
from anabranch.serving.elasticmoe.rank_boot import Boot
from anabranch.serving.elasticmoe.wire import Channel, ChannelClosedError
from anabranch.serving.engine.depths import Depths, routers_of
from anabranch.serving.engine.loop import IDLE_S
from anabranch.serving.engine.paged import PagedPool, PagedShape
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.engine.skips import Skips
from anabranch.serving.grammar import GrammarStore
from anabranch.serving.sampling import Sampler

__all__ = ["Rank"]

_PICTURE_S = 0.2


class Rank:
    """See the module. Methods named ``do_...`` are what the coordinator calls."""

    def __init__(self, channel: Channel, boot: Boot, fds: Sequence[int]) -> None:
        self.channel, self.boot, self.limits = channel, boot, boot.limits
        self.memory = Channel.of_fd(fds[0])
        self.backend, self.device = backend_of(boot.kind), torch.device("cpu")
        self._warm_device()
        self.model = build_empty(load_config(boot.layout.folder)).eval()
        self.empty: dict[str, Any] = dict(self.model.state_dict(keep_vars=True))
        folder = Path(boot.layout.folder)
        # Grammars need it.
        self.tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
        GrammarStore(self.tokenizer).warm_up()
        self.owner = Owner()
        peers = self._meet(fds[1:])
        pools = pool_names(self.model)
        self.sharded = shard_experts(
            self.model, pools, lambda layer, count: ShardedExperts(layer, boot.rank, self.owner, peers, count)
        )
        self.attached: Attached | None = None
        self.arenas: list[Any] = []
        self.kv: KvArena | None = None
        self.scheduler: Scheduler | None = None
        self.runner: ModelRunner | None = None
        self.is_serving = False
        self._picture_at = 0.0
        # Nothing has happened since the last picture, by a step or by what was asked.
        self._is_told = False

    def _warm_device(self) -> None:
        """Have the device's contexts before they are asked for: the driver's, and what torch keeps beside it."""
        self.backend.warm(self.boot.device)
        if self.boot.kind == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(self.boot.device % torch.cuda.device_count())
            torch.cuda.synchronize()

    def _meet(self, fds: Sequence[int]) -> list[Peer]:
        """Exchange mailboxes with the other ranks."""
        matrices = self.boot.layout.layers[0]
        dtype, dim = torch_dtype(matrices[0].dtype), self.model.config.dim
        rows = self.limits.max_batched_tokens
        places = max(_choices(self.model), default=0) or max(self.boot.layout.num_experts)
        others = [rank for rank in range(self.boot.num_ranks) if rank != self.boot.rank]
        asking, answering = fds[: len(others)], fds[len(others) :]
        peers = []
        for other, fd in zip(others, asking, strict=True):
            peer = Peer(other, Channel.of_fd(fd), Mailbox(rows, places, dim, dtype))
            peer.channel.send("mailbox", [peer.mailbox.fd])
            peers.append(peer)
        for fd in answering:
            channel = Channel.of_fd(fd)
            _, (mailbox,) = channel.recv()
            self.owner.serve(channel, Mailbox(rows, places, dim, dtype, mailbox))
            os.close(mailbox)
        return peers

    # Life

    def do_attach(self, which: Which) -> dict[str, int]:
        """Map the device's memory; blocks mapped by kind."""
        self.attached = attach(self.memory, self.boot.device, which, backend=self.backend)
        placement, copies = self.attached.placement, True if self.boot.copies else None
        dense = DenseArena(self.attached, copies=copies)
        dense.give_to(self.model)
        self.device = self.model.embedding.weight.device
        self.arenas = [dense]
        mapped = 0
        for layer, experts in enumerate(self.sharded):
            arena = ExpertArena(
                self.boot.layout.layers[layer], copies=copies, backend=self.backend, device=self.boot.device
            )
            mapped += arena.remap(self.attached.experts, placement.of(layer, self.boot.device))[0]
            self.arenas.append(arena)
            w13, w2 = arena.tensors()
            self.owner.layers.append((w13, w2))
            experts.place(placement, self.device)
        self.kv = KvArena(self.attached)
        return {"blocks": mapped}

    def do_warm(self) -> None:
        """Touch the weights and run a few tokens on a cache of its own; every rank must have attached."""
        for arena in self.arenas:
            for part in getattr(arena, "ranges", [getattr(arena, "range", None)]):
                part.touch()
        limits = self.limits
        runner = ModelRunner(self.model, num_blocks=1, block_tokens=limits.block_tokens)
        runner.warm_up()

    def do_start(
        self,
        frozen: bytes | None = None,
        parcels: Sequence[tuple[int, Sequence[handover.Carried]]] = (),
        free: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Make ready to serve. ``frozen``: the scheduler of this device before; ``parcels``: requests of devices that leave; ``free``: the
        only blocks to use until `do_give`."""
        limits = self.limits
        assert self.kv is not None
        shape = PagedShape.of(self.model, limits.max_depth)
        sizes = (shape.layers, shape.streams, limits.num_blocks * limits.block_tokens, shape.heads, shape.width)
        pool = PagedPool(
            shape, limits.num_blocks, block_tokens=limits.block_tokens, buffers=self.kv.buffers(sizes, shape.dtype)
        )
        sampler = Sampler(
            self.model.config.vocab_size,
            stop_tokens=limits.stop_tokens,
            tokenizer=self.tokenizer,
            seed=limits.seed,
            is_tried=True,
        )
        self.sampler = ResumingSampler(sampler)
        self.runner = ModelRunner(
            self.model,
            pool=pool,
            block_tokens=limits.block_tokens,
            sampler=self.sampler,
            max_depth=limits.max_depth,
            depths=self._depths(shape.layers),
            skips=self._skips(),
        )
        self.scheduler, decided = (limits.scheduler(), {}) if frozen is None else handover.thaw(frozen)
        self.runner.requests.take_over(decided)
        for each in handover.carried(self.scheduler):
            self.sampler.outputs[each.request.id] = each.output
        # The batches that were their first ran elsewhere.
        known = tuple([state.request for state in self.scheduler.states() if state.is_known])
        self.runner.run(Batch(step=-1, chunks=(), new=known))
        kept_out = [] if free is None else handover.keep_out(self.scheduler, free)
        told: dict[str, Any] = {"brought": 0, "again": 0, "kept_out": kept_out}
        for device, carried in parcels:
            brought, again_tokens = self._adopt(device, carried)
            told["brought"] += brought
            told["again"] += again_tokens
        return told

    def _depths(self, most: int) -> Depths | None:
        """The group's depth routers, held against the weights that are attached; ``most``: visits of blocks that there is room for."""
        if self.boot.routers is None:
            return None
        bank = routers_of(self.model, self.boot.routers.to(self.device))
        return Depths(bank, len(self.model.blocks), self.boot.control, most)

    def _skips(self) -> Skips | None:
        """The group's skipper of tokens, on the weights that are attached."""
        if self.boot.skipper is None:
            return None
        from anabranch.depth.ftp.skipper import TokenSkipper

        return Skips(TokenSkipper.of(self.boot.skipper, self.model), self.device)

    def do_go(self) -> None:
        """Begin to step: the coordinator knows by now that what was handed over is here."""
        self.is_serving = True

    def _adopt(self, device: int, carried: Sequence[handover.Carried]) -> tuple[int, int]:
        assert self.scheduler is not None
        assert self.runner is not None
        other = attach(self.memory, device, "current", only=("kv",), backend=self.backend, device_here=self.boot.device)
        arena, pool = KvArena(other), self.runner.pool

        def copy(pairs: Sequence[tuple[int, int]]) -> None:
            theirs = arena.buffers(tuple(pool.key.shape), pool.key.dtype)
            for here, there in zip((pool.key, pool.value), theirs, strict=True):
                blocks_here, blocks_there = (part.unflatten(2, (-1, pool.block_tokens)) for part in (here, there))
                for source, target in pairs:
                    blocks_here[:, :, target] = blocks_there[:, :, source]

        for each in carried:
            self.sampler.outputs[each.request.id] = each.output
        result = handover.adopt(self.scheduler, carried, copy)
        self._settle()
        arena.close()
        other.close()
        return result

    def do_pause(self, how: str) -> Any:
        """Stop between two steps and give what there is: ``freeze`` the scheduler, ``carry`` its requests, or ``drain``: go on with what
        is here and give the blocks that it cannot need."""
        assert self.scheduler is not None
        self._submit_prepared(wait=True)
        self._settle()
        if how == "drain":
            return handover.reserve(self.scheduler)
        self.is_serving = False
        if how != "freeze":
            return handover.carried(self.scheduler)
        assert self.runner is not None
        return handover.freeze(self.scheduler, self.runner.requests.handed_over())

    def do_resume(self, blocks: Sequence[int] = ()) -> None:
        """Nothing came of a pause: make ready to go on. ``blocks`` were given away by a drain."""
        assert self.scheduler is not None
        handover.give(self.scheduler, blocks)

    def do_give(self, blocks: Sequence[int]) -> None:
        """Blocks that were another's are this rank's from now on."""
        assert self.scheduler is not None
        handover.give(self.scheduler, blocks)

    def do_release(self) -> None:
        """Let go of the device's memory; the rank is on standby again."""
        self.is_serving = False
        self._settle()
        self.scheduler = self.runner = None
        self.owner.layers.clear()
        self.model.load_state_dict(self.empty, strict=False, assign=True)
        for arena in (*self.arenas, self.kv):
            if arena is not None:
                arena.close()
        self.arenas, self.kv = [], None
        if self.attached is not None:
            self.attached.close()
            self.attached = None

    def _settle(self) -> None:
        """Wait until what was begun on the device is done: other processes see its memory, and mappings go."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def do_ping(self) -> None:
        """Be there."""

    def do_probe(self, tokens: Sequence[int]) -> list[list[float]]:
        """Logits of each position, without the cache: to check a placement against the whole model."""
        with torch.inference_mode():
            return self.model(torch.tensor([list(tokens)], device=self.device)).logits_BLV[0].tolist()

    def do_reset_prefix_cache(self) -> int:
        """See `Scheduler.reset_prefixes`."""
        assert self.scheduler is not None
        return self.scheduler.reset_prefixes()

    # Requests

    def do_submit(
        self, request: Request, output: tuple[int, ...] = (), num_scored: int = 0, num_cached: int | None = None
    ) -> None:
        """Run a request, from what it was given elsewhere on, see `Scheduler.add`."""
        given = handover.Carried(request, output, num_scored=num_scored, num_cached=num_cached)
        if not self.sampler.preparing.begin(given):
            self._submit(given)

    def _submit(self, given: handover.Carried) -> None:
        assert self.scheduler is not None
        request = given.request
        try:
            self.sampler.preparing.check(request.id)
            self.sampler.outputs[request.id] = given.output
            self.scheduler.add(request, given.output, given.num_scored, given.num_cached)
        except AnabranchError as error:
            self._drop(request.id)
            self.channel.send(("outputs", [Output(id=request.id, finish=Finish.ERROR, error=str(error))], None))
        if self.sampler.preparing.is_paused(request.id):
            self.scheduler.pause(request.id)

    def _drop(self, id: str) -> None:
        self.sampler.outputs.pop(id, None)
        self.sampler.preparing.forget(id)

    def do_abort(self, id: str) -> None:
        """End a request."""
        output = self.scheduler.abort(id) if self.scheduler is not None else None
        if self.scheduler is not None:
            self._drop(id)
        if output is not None:
            self.channel.send(("outputs", [output], None))

    def do_give_back(self, count: int) -> None:
        """Let go of up to ``count`` requests that wait for a place, the last ones, and say which, with their ``num_cached``."""
        cached: dict[str, int | None] = {}
        if self.scheduler is not None:
            cached = {state.request.id: state.num_cached for state in self.scheduler.waiting()[-count:]}
            for id in cached:
                self.scheduler.abort(id)
                self._drop(id)
        self.channel.send(("given_back", cached))

    def do_pause_request(self, id: str) -> None:
        """Compute nothing more for a request until `do_resume_request`."""
        if self.scheduler is not None:
            self.scheduler.pause(id)
            self.sampler.preparing.pause(id)

    def do_resume_request(self, id: str) -> None:
        """Let a paused request go on."""
        if self.scheduler is not None:
            self.scheduler.resume(id)
            self.sampler.preparing.resume(id)

    # The loop

    def run(self) -> None:
        """Work until the coordinator is gone."""
        while True:
            self._submit_prepared()
            while self.channel.poll(0.0 if self._has_work or self._owes_picture else self._patience_s):
                self._obey(*self.channel.recv()[0])
                self._submit_prepared()
            if self._has_work:
                try:
                    self._step()
                except ChannelClosedError as error:
                    self._fail(f"a peer has gone ({error})")
                except Exception as error:
                    self._fail(f"{type(error).__name__}: {error}")
            elif self._owes_picture:
                self._tell([], is_idle=True)

    @property
    def _owes_picture(self) -> bool:
        """Whether what was told last of how it is may not be so any more."""
        return self.is_serving and self.scheduler is not None and not self._is_told

    @property
    def _has_work(self) -> bool:
        return self.is_serving and self.scheduler is not None and self.scheduler.has_work

    @property
    def _patience_s(self) -> float | None:
        return IDLE_S if self.scheduler is not None and self.sampler.preparing else None

    def _submit_prepared(self, *, wait: bool = False) -> None:
        if self.scheduler is not None:
            for given in self.sampler.preparing.ready(wait=wait):
                self._submit(given)

    def _fail(self, error: str) -> None:
        self.is_serving = False
        self.channel.send(("failed", error))

    def _obey(self, number: int | None, name: str, arguments: dict[str, Any]) -> None:
        self._is_told = False
        try:
            value = getattr(self, f"do_{name}")(**arguments)
        except ChannelClosedError as error:
            value = RuntimeError(f"rank {self.boot.rank}: {name}: {error}")
        except Exception as error:
            value = RuntimeError(f"rank {self.boot.rank}: {name}: {type(error).__name__}: {error}")
        if number is not None:
            self.channel.send(("reply", number, value))
        elif isinstance(value, Exception):
            self._fail(str(value))

    def _step(self) -> None:
        started = time.perf_counter()
        assert self.scheduler is not None
        assert self.runner is not None
        batch = self.scheduler.schedule()
        # What there is is paused, or blocks are another's for now: a message may change that.
        if batch is None:
            if not self._is_told:
                self._tell([], is_idle=True)
            self.channel.poll(IDLE_S)
            return
        outputs = self.scheduler.update(batch, self.runner.run(batch))
        seconds = time.perf_counter() - started
        due = max(self.limits.pace_s, self.limits.pace_token_s * batch.num_tokens)
        if due > seconds:
            time.sleep(due - seconds)
        self._tell(outputs, is_idle=not self.scheduler.has_work)

    def _tell(self, outputs: list[Output], *, is_idle: bool) -> None:
        """Send outputs, and a picture from time to time and before there is nothing to do."""
        assert self.scheduler is not None
        now = time.monotonic()
        picture = None
        if is_idle or now - self._picture_at > _PICTURE_S:
            self._picture_at = now
            picture = self.scheduler.stats()
        self._is_told = picture is not None
        if outputs or picture:
            self.channel.send(("outputs", outputs, picture))

    def do_heat(self) -> list[list[int]]:
        """Tokens that went to each expert of each layer since this rank attached."""
        return [each.load_E.tolist() for each in self.sharded]


def _choices(model: torch.nn.Module) -> list[int]:
    """The most places that a token may take, of each routed layer that knows it."""
    found = [getattr(getattr(module, "config", None), "num_choices", None) for module in model.modules()]
    # A router's config says it for a number of destinations.
    return [number for number in found if isinstance(number, int)]
