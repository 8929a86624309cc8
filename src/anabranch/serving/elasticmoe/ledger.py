"""The coordinator's book of requests: who waits, who runs where, what each has given so far. Nothing that was accepted is lost.

A rank gets no more requests than it runs at once; the rest wait here, so that devices which come find work and a rank that dies takes
little with it. A request that was with such a rank is run again from its prompt and the tokens that its client has already.

One request may be what the ranks die of. Those whose ranks have failed twice, and that have given nothing between, are run one at a time
until each has given something: whoever is alone when the ranks fail again ends with an error, and nobody else does.

A request whose reader is slow is paused in the rank that has it, and takes no place there. That it is paused stands here: ranks that it is
handed to are told, and should its rank die it does not begin again before its reader has caught up.

Who waits here is taken as in the queue of one engine (`WaitingQueue`): by priority, then the keys in turn, each by its own priorities.
A rank with as many requests as it runs gets more of a key that has fewer there than its part of the places: the rank's own `Seats` then
have another key's make room. So no key waits for the end of another's requests. Where a device has places for which nobody waits here,
ranks are asked for as many of those that wait in them: a rank gives back the last of those that have no place, after all that these gave,
and they wait here as before they were taken.

A path that depth routers chose stays with its request, which wherever it goes on asks for that very path: a choice that is made anew, from
sums in another order, might be another one in the midst of an answer.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from anabranch.errors import InputError
from anabranch.serving.core.queue import WaitingQueue
from anabranch.serving.core.request import Finish, Output, Request
from anabranch.serving.elasticmoe.handover import Carried
from anabranch.serving.elasticmoe.instance import Instance
from anabranch.serving.elasticmoe.live_request import SUSPECT, Emit, Live
from anabranch.serving.elasticmoe.rank_boot import Limits

__all__ = ["Ledger"]

# Of one that was alone in the end: a request that takes its rank with it each time must end, however late.
_MOST_RERUNS = 10


class Ledger:
    """The book. Thread-safe.

    Args:
        limits: of every rank.
        vocab_size: tokens must be below it.
        served: told (time to first token, mean time per later token) of each request that ended well.
    """

    def __init__(self, limits: Limits, vocab_size: int, served: Callable[[float, float], None]) -> None:
        self.limits, self.vocab_size, self._served = limits, vocab_size, served
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.live: dict[str, Live] = {}
        self.active: Instance | None = None
        # Blocks that a device's requests may need together, while it shares its cache.
        self.room: dict[int, int] = {}
        # Ranks are about to be changed, and get no new requests.
        self.is_paused = False
        self.reruns = self.requests = 0
        self.longest_gap_s = 0.0
        # Counted here and not by the ranks, whose last counts are lost with them.
        self.counted: Counter[str] = Counter(prompt_tokens=0, cached_prompt_tokens=0, generation_tokens=0)
        self.counted.update({f"finished_{finish.value}": 0 for finish in Finish})
        self._queue: WaitingQueue[Live] = WaitingQueue()
        self._random = random.SystemRandom() if limits.seed is None else random.Random(limits.seed)
        self._serial = 0
        # Devices of the active instance that are asked for what waits there.
        self._asked: set[int] = set()
        # While ``is_paused``.
        self._aborted: set[str] = set()
        self._resumed: set[str] = set()  # likewise

    @property
    def num_waiting(self) -> int:
        """Requests that wait, for a rank or in one that has more than it runs."""
        waiting = sum(live.instance is None and live.paused is None for live in list(self.live.values()))
        return waiting + self._num_over

    @property
    def queued_tokens(self) -> int:
        """Tokens of their prompts."""
        waiting = (live for live in list(self.live.values()) if live.instance is None and live.paused is None)
        return sum(len(live.request.prompt) for live in waiting)

    @property
    def num_running(self) -> int:
        """Requests that a rank has and runs."""
        return sum(live.runs for live in list(self.live.values())) - self._num_over

    @property
    def _num_over(self) -> int:
        """Those that ranks have beyond what they run at once."""
        has = Counter((id(live.instance), live.device) for live in list(self.live.values()) if live.runs)
        return sum(max(0, count - self.limits.max_seqs) for count in has.values())

    @property
    def num_paused(self) -> int:
        """Requests that wait for their readers."""
        return sum(live.paused is not None for live in list(self.live.values()))

    def with_instance(self, instance: Instance) -> list[Live]:
        """Requests that an instance has."""
        return [live for live in self.live.values() if live.instance is instance]

    def submit(self, request: Request, emit: Emit) -> None:
        """Accept a request. Raises InputError for one that can never run."""
        positions = min(self.limits.max_positions, self.limits.num_blocks * self.limits.block_tokens)
        request.check_room(positions)
        outside = [token for token in request.prompt if not 0 <= token < self.vocab_size]
        if outside:
            raise InputError(f"the prompt has the token {outside[0]}; use 0 to {self.vocab_size - 1}")
        # Of its own, so that it goes on the same wherever it is taken.
        if request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=self._random.getrandbits(62)))
        longest = min(len(request.prompt) + request.sampling.max_tokens, positions)
        now = time.monotonic()
        with self.lock:
            if request.id in self.live:
                raise InputError(f"a request {request.id!r} is under way; ids must differ")
            self._serial += 1
            self.requests += 1
            need = -(-longest // self.limits.block_tokens)
            self.live[request.id] = Live(request, emit, self._serial, need, came=now, last=now)
            self.enqueue(self.live[request.id])
            self.dispatch()

    def abort(self, id: str) -> None:
        """End a request; an unknown one is left alone."""
        with self.lock:
            live = self.live.pop(id, None)
            if live is None:
                return
            if self.is_paused:
                self._aborted.add(id)
            self._unqueue(live)
            self._refund(live)
            self._tell(live, "abort")
            self.counted["finished_abort"] += 1
            live.emit(Output(id=id, finish=Finish.ABORT))
            self.dispatch()
            self.changed.notify_all()

    def pause_request(self, id: str) -> None:
        """Compute nothing more for a request, whose reader is slow, until `resume_request`; an unknown one is left alone.

        The step under way still gives its token. Others may have the request's place meanwhile.
        """
        with self.lock:
            live = self.live.get(id)
            if live is None or live.paused is not None:
                return
            live.paused = time.monotonic()
            self._unqueue(live)
            self._resumed.discard(id)
            self._tell(live, "pause_request")
            self.dispatch()
            self.changed.notify_all()

    def resume_request(self, id: str) -> None:
        """Let a paused request go on where it is, or begin again if no rank has it any more; an unknown one is left alone."""
        with self.lock:
            live = self.live.get(id)
            if live is None or live.paused is None:
                return
            live.last = time.monotonic()
            live.paused_s += live.last - live.paused
            live.paused = None
            if live.instance is None:
                self.enqueue(live)
            elif not live.is_held:
                self._go_on(live)
            self.dispatch()

    def dispatch(self) -> None:
        """Give what waits to ranks that have room, the one with fewest requests first."""
        with self.lock:
            active = self.active
            if active is None or active.is_broken or self.is_paused:
                return
            suspects = [live for live in self.live.values() if live.is_suspect]
            if suspects:
                self._dispatch_alone(active, min(suspects, key=lambda live: live.rank))
                return
            self._let_go()
            held: dict[int, list[Live]] = {device: [] for device in active.devices}
            for live in self.with_instance(active):
                if live.device is not None and live.paused is None:
                    held[live.device].append(live)
            passed: set[str] = set()
            while (first := self._queue.peek(passed)) is not None:
                device = self._place_of(first.key, held)
                if device is None:
                    passed.add(first.key)
                    continue
                if not self._has_room(device, first, held[device]):
                    return
                held[device].append(first)
                self._give(first, active, device)
            self._ask_back(active, {device: len(here) for device, here in held.items()})

    def _place_of(self, key: str, held: Mapping[int, Sequence[Live]]) -> int | None:
        """A device with a free place, else one where a key has fewer requests than its part of the places; None if there is none."""
        most = self.limits.max_seqs
        free = min(held, key=lambda device: len(held[device]))
        if len(held[free]) < most:
            return free
        has = {device: sum(each.key == key for each in here) for device, here in held.items()}
        device = min(held, key=lambda device: (has[device], len(held[device])))
        keys = {key, *(each.key for each in held[device])}
        return device if has[device] < max(1, most // len(keys)) else None

    def _ask_back(self, active: Instance, held: Mapping[int, int]) -> None:
        """Nobody waits here for the places that are free: ask ranks that have more than they run for as many."""
        most = self.limits.max_seqs
        free = sum(max(0, most - count) for count in held.values())
        # Blocks that are another's for now may be what is waited for.
        if self.room or self._asked:
            return
        for device, count in held.items():
            asked = min(count - most, free)
            if asked > 0:
                free -= asked
                self._asked.add(device)
                active.tell(device, "give_back", count=asked)

    def given_back(self, instance: Instance, device: int, cached: Mapping[str, int | None]) -> None:
        """A rank has let go of requests that waited in it, perhaps fewer than it was asked for; their `Carried.num_cached` by id."""
        with self.lock:
            if instance is self.active:
                self._asked.discard(device)
            for live in [self.live[id] for id in cached if id in self.live]:
                if live.instance is not instance or live.device != device:
                    continue
                live.num_cached = cached[live.request.id]
                if not live.reruns:
                    # It is charged anew when it is taken again.
                    self._queue.refund(live, live.cost)
                live.instance = live.device = None
                live.is_held = False
                self.enqueue(live)
            # Whoever gave nothing is not asked again at once.
            if cached:
                self.dispatch()

    def _dispatch_alone(self, active: Instance, live: Live) -> None:
        """Let one request run once nothing else does."""
        if not any(other.runs for other in self.live.values()):
            devices = [device for device in active.devices if self._has_room(device, live, ())]
            if devices:
                self._give(live, active, devices[0])

    def _give(self, live: Live, active: Instance, device: int) -> None:
        if live.is_queued:
            # Its key is charged with it.
            self._queue.take(live)
            live.is_queued = False
        live.instance, live.device = active, device
        active.tell(
            device,
            "submit",
            request=live.request,
            output=tuple(live.output),
            num_scored=live.num_scored,
            num_cached=live.num_cached,
        )

    def take(self, instance: Instance, device: int, outputs: Iterable[Output]) -> None:
        """Outputs of a rank; those of a rank that a request is not with any more say nothing."""
        now, has_changed = time.monotonic(), False
        with self.lock:
            for output in outputs:
                live = self.live.get(output.id)
                if live is None or live.instance is not instance or live.device != device:
                    continue
                live.note(output)
                self._clock(live, output, now)
                if output.finish is not None:
                    del self.live[output.id]
                    self._refund(live)
                    has_changed = True
                elif output.tokens or output.prompt_logprobs:
                    has_changed |= self._clear(live)
                live.emit(output)
            if has_changed:
                self.dispatch()
                self.changed.notify_all()

    def _clear(self, live: Live) -> bool:
        """A request has given something, so it is not what ranks die of. If others are still suspect it waits until they are not."""
        was_suspect, live.failures = live.is_suspect, 0
        if was_suspect and any(other.is_suspect for other in self.live.values()):
            live.is_held = True
            self._resumed.discard(live.request.id)
            self._tell(live, "pause_request")
        return was_suspect

    def _let_go(self) -> None:
        """Nobody is suspect: those that are held go on."""
        for live in self.live.values():
            if live.is_held:
                live.is_held = False
                if live.paused is None:
                    self._go_on(live)

    def _go_on(self, live: Live) -> None:
        """Tell the rank of a request, which nothing keeps any longer."""
        if self.is_paused:
            self._resumed.add(live.request.id)
        self._tell(live, "resume_request")

    def move(self, old: Instance, new: Instance, devices: Mapping[str, int]) -> None:
        """Requests of ``old`` are with ``new`` from now on, on the ``devices`` given by id."""
        with self.lock:
            for live in self.with_instance(old):
                live.instance, live.device = new, devices[live.request.id]

    def send_back(self, instance: Instance) -> int:
        """Requests of an instance that is gone wait again; how many. One that it ran alone, after other failures, ends with an error."""
        count = 0
        with self.lock:
            lost = self.with_instance(instance)
            ran = [live for live in lost if live.runs]
            for live in ran:
                live.failures += 1
            for live in lost:
                live.instance = live.device = None
                live.is_held = False
                live.reruns += 1
                count += 1
                if ran == [live] and (live.failures > SUSPECT or live.reruns > _MOST_RERUNS):
                    del self.live[live.request.id]
                    self._refund(live)
                    error = f"the ranks that ran it failed {live.reruns} times, in the end with nothing else to run"
                    self.counted["finished_error"] += 1
                    for other in self.live.values():  # it was not they
                        other.failures = 0
                    live.emit(Output(id=live.request.id, finish=Finish.ERROR, error=error))
                else:
                    self.enqueue(live)
            self.reruns += count
            self.changed.notify_all()
        return count

    def withdraw_paused(self, instance: Instance) -> None:
        """Take the paused requests of an instance that is to end away from it: when they are resumed they begin again elsewhere."""
        with self.lock:
            for live in self.with_instance(instance):
                if live.paused is not None:
                    self._tell(live, "abort")
                    # It begins again as one that comes anew.
                    self._refund(live)
                    live.instance = live.device = None

    def resume(self, active: Instance, room: Mapping[int, int] | None = None) -> None:
        """Go on with ``active`` after a pause or a change."""
        with self.lock:
            self.active, self.is_paused = active, False
            self._asked.clear()
            self.room = dict(room or {})
            self._tell_again(active)
            for device in active.devices:
                active.tell(device, "go")
            self.dispatch()
            self.changed.notify_all()

    def end_all(self, finish: Finish, error: str | None = None) -> None:
        """End every request."""
        with self.lock:
            ended = list(self.live.values())
            self.live.clear()
            self._queue = WaitingQueue()
            for live in ended:
                self._tell(live, "abort")
                live.emit(Output(id=live.request.id, finish=finish, error=error, engine_failed=finish is Finish.ERROR))
            self.changed.notify_all()

    def spread(self, parcels: Sequence[Carried], devices: Sequence[int]) -> dict[int, list[Carried]]:
        """Requests of a device that leaves, to the devices that stay: each to the one with fewest, and as it stands here."""
        with self.lock:
            count = dict.fromkeys(devices, 0)
            for live in self.live.values():
                if live.device in count:
                    count[live.device] += 1
            own = {id: live.request for id, live in self.live.items()}
        given: dict[int, list[Carried]] = {device: [] for device in devices}
        for parcel in parcels:
            device = min(count, key=lambda device: count[device])
            count[device] += 1
            given[device].append(replace(parcel, request=own.get(parcel.request.id, parcel.request)))
        return given

    @staticmethod
    def _tell(live: Live, name: str) -> None:
        """Tell the rank that has a request, if one has."""
        if live.instance is not None and live.device is not None:
            live.instance.tell(live.device, name, id=live.request.id)

    def _tell_again(self, active: Instance) -> None:
        """Before ranks go on: what requests were told while they were handed over may have come too late, or to another rank."""
        for id in self._aborted:
            for device in active.devices:
                active.tell(device, "abort", id=id)
        for live in self.with_instance(active):
            if live.paused is not None or live.is_held:
                self._tell(live, "pause_request")
            elif live.request.id in self._resumed:
                self._tell(live, "resume_request")
        self._aborted.clear()
        self._resumed.clear()

    def _has_room(self, device: int, live: Live, held: Sequence[Live]) -> bool:
        if device not in self.room:
            return True
        return live.need + sum(each.need for each in held) <= self.room[device]

    def enqueue(self, live: Live) -> None:
        """Let a request wait for a rank, in its place; one that a rank has had goes before those that none has had."""
        # A paused one is queued when its reader has caught up.
        if live.is_queued or live.paused is not None:
            return
        live.is_queued = True
        (self._queue.add_front if live.reruns else self._queue.add)(live)

    def _unqueue(self, live: Live) -> None:
        """It does not wait for a rank any more."""
        if live.is_queued:
            live.is_queued = False
            self._queue.remove(live)

    def _refund(self, live: Live) -> None:
        """Its key paid for tokens that it has not had."""
        self._queue.refund(live, live.request.sampling.max_tokens - len(live.output))

    def _clock(self, live: Live, output: Output, now: float) -> None:
        self.counted["generation_tokens"] += len(output.tokens)
        if output.finish is not None:
            self.counted[f"finished_{output.finish.value}"] += 1
        is_well = output.finish in (Finish.STOP, Finish.LENGTH)
        if live.first is None and (output.tokens or is_well):
            self.counted["prompt_tokens"] += len(live.request.prompt)
            self.counted["cached_prompt_tokens"] += live.num_cached or 0
        if output.tokens:
            if live.first is None:
                live.first = now
            else:
                live.longest_gap_s = max(live.longest_gap_s, now - live.last)
                self.longest_gap_s = max(self.longest_gap_s, live.longest_gap_s)
            live.last = now
        if is_well and live.first is not None:
            later = max(1, len(live.output) - 1)
            self._served(live.first - live.came, (live.last - live.first - live.paused_s) / later)
