"""Ranks of an elastic group without processes or weights: the rank's own code, schedulers included, with messages that wait in lists."""

from collections import deque
from contextlib import suppress
from types import SimpleNamespace

import torch

from anabranch.serving.core.batch import PENDING, Sampled
from anabranch.serving.core.request import TokenLogprob
from anabranch.serving.elasticmoe import handover
from anabranch.serving.elasticmoe.counts import Counts
from anabranch.serving.elasticmoe.ledger import Ledger
from anabranch.serving.elasticmoe.preparing import ResumingSampler
from anabranch.serving.elasticmoe.rank import Rank
from anabranch.serving.elasticmoe.report import ScaleReport
from anabranch.serving.elasticmoe.switch import migrate


class NothingComesError(Exception):
    """A rank waits for the coordinator, which has nothing for it."""


class Messages:
    """A channel: what the coordinator has sent and the rank has not read yet, and a function that takes what the rank sends."""

    def __init__(self, take):
        self.come, self.send = deque(), take

    def poll(self, timeout):
        if not self.come and timeout != 0.0:
            raise NothingComesError
        return bool(self.come)

    def recv(self):
        return self.come.popleft(), []


class Runner:
    """Gives tokens that depend on the request alone, and decides about depths anew in each process, with another result."""

    def __init__(self, told):
        self.requests = SimpleNamespace(handed_over=lambda: dict.fromkeys(self._decided))
        # Told of each batch.
        self._told, self._known, self._decided = told, {}, set()

    def take_over(self, requests, decided):
        """Those that began in another process of the device, and which of them were decided about there."""
        self._known = {request.id: request for request in requests}
        self._decided = set(decided)

    def run(self, batch):
        for id in batch.gone:
            self._known.pop(id, None)
            self._decided.discard(id)
        self._known |= {request.id: request for request in batch.new}
        self._told(batch)
        return [self._sampled(chunk, self._known[chunk.id]) for chunk in batch.chunks if chunk.is_answered]

    def _sampled(self, chunk, request):
        end = chunk.start + len(chunk.tokens)
        told = {}
        if (request.routes_depth or request.skips_tokens) and chunk.id not in self._decided:
            # In another process another one.
            told["path"] = (0, id(self) % 5)
            told["computed"] = (end, id(self) % 7) if request.skips_tokens else None
        self._decided.add(chunk.id)
        scores = tuple(TokenLogprob(token=token, logprob=-1.0) for token in chunk.targets)
        token = sum(request.prompt) * 7 + end * 3
        return Sampled(id=chunk.id, token=token % 61 if chunk.samples else PENDING, prompt_logprobs=scores, **told)


class PaperRank(Rank):
    """A rank that serves from the beginning."""

    def __init__(self, limits, take, told=lambda batch: None, frozen=None):
        self.channel, self.limits, self.device = Messages(take), limits, torch.device("cpu")
        self.boot = SimpleNamespace(rank=0)
        self.runner = Runner(told)
        self.sampler = ResumingSampler(SimpleNamespace(prepare=lambda request: None))
        self.scheduler, decided = (limits.scheduler(), {}) if frozen is None else handover.thaw(frozen)
        self.runner.take_over([state.request for state in self.scheduler.states() if state.is_known], decided)
        self.is_serving, self._picture_at, self._is_told = True, 0.0, False

    def obey_all(self):
        """Do what has come."""
        while self.channel.come:
            self._obey(*self.channel.come.popleft())

    def step(self):
        """Do what has come, and a step if there is something to do."""
        self.obey_all()
        if self._has_work:
            # All that it has may be paused.
            with suppress(NothingComesError):
                self._step()

    def run_until_idle(self):
        """The rank's loop, until it would wait for a message without end, or for what is paused."""
        with suppress(NothingComesError):
            self.run()


class PaperInstance:
    """Ranks of some devices; what they say is taken as a group takes it."""

    is_broken = False

    def __init__(self, devices, group):
        self.devices, self.group, self.ranks = tuple(devices), group, {}

    def begin(self, frozen=None):
        """Have ranks, from schedulers ``frozen`` where a device has one."""
        for device in self.devices:
            self.ranks[device] = PaperRank(
                self.group.limits,
                lambda event, device=device: self.group.event(self, device, event),
                self.group.note,
                (frozen or {}).get(device),
            )

    def tell(self, device, name, **arguments):
        """What `Instance` sends without an answer."""
        self.ranks[device].channel.come.append((None, name, arguments))

    def all(self, name, arguments):
        """What `Instance` asks all ranks at a switch."""
        if name == "start":
            self.begin({device: given.get("frozen") for device, given in arguments.items()})
            told = {}
            for device, given in arguments.items():
                parcels = [parcel for _, some in given["parcels"] for parcel in some]
                brought, again = handover.adopt(self.ranks[device].scheduler, parcels, lambda pairs: None)
                told[device] = {"brought": brought, "again": again, "kept_out": []}
            return told
        assert name == "pause"
        given = {}
        for device, how in arguments.items():
            self.ranks[device].obey_all()
            given[device] = self.ranks[device].do_pause(**how)
        return given


class PaperGroup:
    """A ledger, its counts and paper ranks.

    Attributes:
        first: of each request, how much of its prompt was there when its first chunk ran, in the run that its client heard of first.
        outputs: of each request, all that its client was given.
        steps: that were run.
    """

    def __init__(self, limits, devices):
        self.limits, self.devices = limits, tuple(devices)
        self.standby = SimpleNamespace(configurations=list)
        self.counts, self.ledger = Counts(), Ledger(limits, 61, lambda *times: None)
        self.first, self.outputs, self.steps = {}, {}, 0
        self.active = PaperInstance(devices, self)
        self.active.begin()
        self.ledger.resume(self.active)

    def submit(self, request):
        """Have it answered."""
        self.outputs[request.id] = []
        self.ledger.submit(request, self.outputs[request.id].append)

    def note(self, batch):
        """A rank runs this."""
        self.steps += 1
        for chunk in batch.chunks:
            self.first.setdefault(chunk.id, chunk.start)

    def event(self, instance, device, event):
        """As `Group` does."""
        if event[0] == "given_back":
            self.ledger.given_back(instance, device, event[1])
            return
        assert event[0] == "outputs", event
        if event[2] is not None:
            self.counts.picture(instance, device, event[2])
        self.ledger.take(instance, device, event[1])

    def change(self, devices):
        """Other devices, as `migrate` does it."""
        new = PaperInstance(devices, self)
        plan = SimpleNamespace(
            lost=(),
            kv_keep=[device for device in devices if device in self.devices],
            new=SimpleNamespace(devices=devices),
        )
        migrate(self, plan, self.active, new, ScaleReport(self.devices, tuple(devices), "migrate"))
        self.active, self.devices = new, tuple(devices)

    def die(self):
        """The ranks die, and others begin on the same devices."""
        new = PaperInstance(self.devices, self)
        new.begin()
        for live in self.ledger.with_instance(self.active):
            # Nobody has heard of how it began.
            if live.num_cached is None:
                self.first.pop(live.request.id, None)
        self.ledger.send_back(self.active)
        self.active = new
        self.ledger.resume(new)

    def stats(self):
        """As the group says it."""
        return self.counts.stats(self)
