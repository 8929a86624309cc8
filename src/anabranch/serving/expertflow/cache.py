"""`ExpertCache`, the Expert Cache Engine's book-keeping: which expert is in which slot, what to load next, what was hit.

It moves no bytes and knows no clock. Whoever moves them asks `next_load` and reports `loaded`; whoever computes says `begin_step`,
`begin_layer`, runs what is `ready`, says `used`. So real threads (`anabranch.serving.expertflow.mover`) and simulated time
(`anabranch.serving.expertflow.simulate`) drive the same decisions, and one thread holds a lock while it calls.

**Real-time correction**: when a layer's router has spoken, (1) its resident experts run first, (2) the missing ones are loaded before
anything else, into slots of experts that were predicted but are not wanted first, (3) predicted loads that the layer does not want are
dropped from the plan, and cancelled where they have begun and nobody is known to want them later.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from anabranch.errors import ConfigError, DataError
from anabranch.serving.expertflow.layout import Expert, Layout
from anabranch.serving.expertflow.plan import NEVER, PLACES, Reference
from anabranch.serving.expertflow.policy import Policy

# Loads under way that no layer waits for yet.
AHEAD = 1
Event = Literal["start", "loaded", "cancelled", "failed", "evicted", "used"]

# Event, expert, slot, resident bytes after it.
Audit = Callable[[Event, Expert, int, int], None]


@dataclass(eq=False, slots=True)
class Load:
    """A transfer that has begun.

    Attributes:
        expert: what is loaded.
        slot: where to, number among the slots of the expert's kind.
        urgent: a layer waits for it.
        cancelled: nobody wants it any more; whoever moves the bytes may stop and say `ExpertCache.cancelled`.
    """

    expert: Expert
    slot: int
    urgent: bool
    cancelled: bool = False
    begun: int = 0  # the forward pass in which


@dataclass(slots=True)
class Counters:
    """What happened in one layer.

    Attributes:
        hits: experts that were there when the router had spoken (distinct ones of a batch and layer).
        late: that were on their way.
        misses: neither.
        prefetched: loads begun before they were wanted.
        prefetched_unused: those of them that left or were cancelled unused.
        loads, cancelled, failed, evictions: of any kind.
        bytes_moved: into slots, whole loads only.
        stall_s: seconds that computing waited.
        predicted, predicted_right: experts that the predictor named, and those of them that were wanted.
    """

    hits: int = 0
    late: int = 0
    misses: int = 0
    prefetched: int = 0
    prefetched_unused: int = 0
    loads: int = 0
    cancelled: int = 0
    failed: int = 0
    evictions: int = 0
    bytes_moved: int = 0
    stall_s: float = 0.0
    predicted: int = 0
    predicted_right: int = 0

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    @property
    def accesses(self) -> int:
        """Distinct experts wanted, over batches and layers."""
        return self.hits + self.late + self.misses

    @property
    def hit_rate(self) -> float:
        """Hits over accesses; nan without any."""
        return self.hits / self.accesses if self.accesses else float("nan")


@dataclass
class ExpertCache:
    """Slots of a byte budget.

    Args:
        layout: the model's experts.
        budget_bytes: most bytes of experts in slots or on their way there.
        policy: what is replaced, and what is loaded ahead.
        audit: called at every event.

    Raises ConfigError if the budget is too small, with the least that suffices.
    """

    layout: Layout
    budget_bytes: int
    policy: Policy
    audit: Audit | None = None
    num_slots: list[int] = field(init=False)
    counters: list[Counters] = field(init=False)

    def __post_init__(self) -> None:
        self.num_slots = self.layout.slots(self.budget_bytes, per_layer=self.policy.per_layer)
        self.counters = [Counters() for _ in range(self.layout.num_layers)]
        self.free = [list(range(count))[::-1] for count in self.num_slots]
        # Loading ones too.
        self.slot_of: dict[Expert, int] = {}
        self.loading: dict[Expert, Load] = {}
        # Of each group, in the order the policy keeps.
        self.members: dict[int, dict[Expert, None]] = {}
        # By the layer under way, not run yet.
        self.wanted: dict[Expert, None] = {}
        self.layer = self.layout.num_layers - 1
        self.at = -1  # step of the reference string
        self.reference = Reference([])
        self.resident_bytes = 0
        self.passes = 0
        self.failures: dict[Expert, BaseException] = {}
        # Loaded ahead and not used yet.
        self._fresh: set[Expert] = set()
        # Layer that an expert was loaded for.
        self._home: dict[Expert, int] = {}
        self.policy.attach(self)

    # computing

    def begin_step(self, steps: Sequence[Iterable[Expert]] = (), certain: int | None = None) -> None:
        """A forward pass begins. ``steps``: what its layers will want, in order, then those of passes after it; see `Reference`."""
        self.wanted = {}
        self.failures.clear()
        self.passes += 1
        self.reference, self.at = Reference(steps, certain), -1
        self.policy.begin_step()

    def begin_layer(self, layer: int, wanted: Collection[Expert]) -> None:
        """The router of ``layer`` has spoken: count, correct, and want these.

        Raises ConfigError for an expert that the layer does not have.
        """
        pool = self.layout.pool_of_layer[layer]
        self.wanted = dict.fromkeys(wanted)
        if any(expert.pool != pool or not 0 <= expert.number < self.layout.num_experts[pool] for expert in self.wanted):
            raise ConfigError(f"layer {layer} wants experts that it does not have: {sorted(self.wanted)}")
        self.layer = layer
        counters = self.counters[layer]
        for expert in self.wanted:
            self._home.setdefault(expert, layer)
            if expert in self.loading:
                counters.late += 1
                self.loading[expert].urgent, self.loading[expert].cancelled = True, False
            elif expert in self.slot_of:
                counters.hits += 1
            else:
                counters.misses += 1
        self._correct(layer, counters)

    def _correct(self, layer: int, counters: Counters) -> None:
        """Put the truth in the place of the prediction."""
        self.at = layer
        unwanted: frozenset[Expert] = frozenset()
        if layer < len(self.reference.steps):
            predicted = self.reference.steps[self.at]
            counters.predicted += len(predicted)
            counters.predicted_right += sum(expert in self.wanted for expert in predicted)
            unwanted = frozenset(expert for expert in predicted if expert not in self.wanted)
            present_first = sorted(self.wanted, key=lambda expert: (expert not in self.slot_of, expert in self.loading))
            self.reference.set(self.at, present_first)
            for expert in unwanted & self.loading.keys():
                if self.reference.next_use(expert, layer * PLACES) == NEVER:
                    self.loading[expert].cancelled = True
        self.policy.begin_layer(unwanted)
        self._shrink()

    def expect(self, layer: int, experts: Iterable[Expert]) -> None:
        """A later prediction of what a layer of the step under way will want."""
        if layer < len(self.reference.steps):
            self.reference.set(layer, experts)
            self.policy.begin_layer(frozenset())

    def ready(self) -> list[Expert]:
        """Wanted experts that are in slots and have not run."""
        return [expert for expert in self.wanted if expert in self.slot_of and expert not in self.loading]

    def used(self, experts: Iterable[Expert]) -> None:
        """These have run; their slots may be given away."""
        for expert in experts:
            del self.wanted[expert]
            self._fresh.discard(expert)
            self.reference.remove(self.at, expert)
            self.policy.used(expert)
            self._tell("used", expert, self.slot_of[expert])
        self._shrink()

    def stalled(self, seconds: float) -> None:
        """Computing waited so long in the layer under way."""
        self.counters[self.layer].stall_s += seconds

    def check_failure(self) -> None:
        """Raise DataError if what the layer wants could not be loaded."""
        for expert in self.wanted:
            error = self.failures.pop(expert, None)
            if error is not None:
                layer = self.layer
                raise DataError(
                    f"expert {expert.number} of routed layer {layer} could not be loaded: {error}"
                ) from error

    # moving

    def next_load(self, ahead: int = AHEAD, *, behind: bool = False) -> Load | None:
        """The next transfer, which begins now; None if there is nothing to load, or no slot for it yet.

        Args:
            ahead: loads under way up to which another may begin that no layer waits for.
            behind: also while a layer waits for one, as whoever moves bytes lets those go first.
        """
        urgent = False
        for expert in self.wanted:
            if expert in self.loading:
                urgent = True
            elif expert not in self.slot_of and expert not in self.failures:
                slot = self._slot_for(expert)
                if slot is not None:
                    return self._start(expert, slot, urgent=True)
                urgent = True
        # Nothing may slow down what a layer waits for, and what is loaded far ahead takes slots, and the disk when that time comes.
        if behind:
            under_way = sum(not load.urgent for load in self.loading.values())
            urgent = False
        else:
            under_way = len(self.loading)
        if urgent or under_way >= ahead:
            return None
        found = self.policy.prefetch()
        if found is None:
            return None
        expert, victim = found
        return self._start(expert, self._take(self.layout.kind(expert), victim), urgent=False)

    def loaded(self, load: Load) -> None:
        """A transfer has ended well."""
        del self.loading[load.expert]
        self.counters[self._home[load.expert]].bytes_moved += self.layout.bytes(load.expert)
        self._tell("loaded", load.expert, load.slot)
        self._shrink()

    def cancelled(self, load: Load) -> None:
        """A transfer was given up."""
        self._drop(load, "cancelled")
        self.counters[self._home[load.expert]].cancelled += 1

    def failed(self, load: Load, error: BaseException) -> None:
        """A transfer has failed for good. Whoever wants the expert is told, see `check_failure`; a guess is just forgotten."""
        self._drop(load, "failed")
        self.counters[self._home[load.expert]].failed += 1
        if load.expert in self.wanted and load.begun < self.passes:
            # It was begun for a pass that is over; this one has not tried yet.
            return
        if load.expert in self.wanted:
            self.failures[load.expert] = error
        else:
            self.policy.give_up(load.expert)

    # slots

    def is_evictable(self, expert: Expert) -> bool:
        """Whether an expert is in a slot, whole, and no one is about to use it."""
        return expert in self.slot_of and expert not in self.loading and expert not in self.wanted

    def is_fresh(self, expert: Expert) -> bool:
        """Whether an expert was loaded ahead and has not been used since."""
        return expert in self._fresh

    @property
    def resident(self) -> list[Expert]:
        """Experts in slots that are whole."""
        return [expert for expert in self.slot_of if expert not in self.loading]

    def total(self) -> Counters:
        """Of all layers."""
        return sum(self.counters, Counters())

    def _slot_for(self, expert: Expert) -> int | None:
        kind, group = self.layout.kind(expert), self.policy.group(expert)
        members = self.members.get(group, {})
        has_room = len(members) < self.policy.quota(group)
        if has_room and self.free[kind]:
            return self.free[kind].pop()
        victim = self.policy.victim(expert)
        if victim is not None:
            return self._take(kind, victim)
        # A spare buffer, until a slot of the group is free.
        if self.free[kind] and len(members) < self.policy.quota(group) + self.policy.spares:
            return self.free[kind].pop()
        return None

    def _take(self, kind: int, victim: Expert | None) -> int:
        if victim is not None:
            self._evict(victim)
        return self.free[kind].pop()

    def _evict(self, victim: Expert) -> None:
        assert self.is_evictable(victim), f"{victim} is in use"
        slot = self.slot_of.pop(victim)
        self._forget(victim)
        self.free[self.layout.kind(victim)].append(slot)
        counters = self.counters[self._home[victim]]
        counters.evictions += 1
        if victim in self._fresh:
            self._fresh.remove(victim)
            counters.prefetched_unused += 1
        self._tell("evicted", victim, slot)

    def _forget(self, expert: Expert) -> None:
        kind = self.layout.kind(expert)
        del self.members[self.policy.group(expert)][expert]
        self.resident_bytes -= self.layout.bytes_of_kind[kind]

    def _start(self, expert: Expert, slot: int, *, urgent: bool) -> Load:
        load = Load(expert, slot, urgent, begun=self.passes)
        self.slot_of[expert], self.loading[expert] = slot, load
        self.members.setdefault(self.policy.group(expert), {})[expert] = None
        layer = self.layer if urgent else self._next_layer(expert)
        self._home[expert] = layer
        counters = self.counters[layer]
        counters.loads += 1
        if not urgent:
            counters.prefetched += 1
            self._fresh.add(expert)
        self.resident_bytes += self.layout.bytes(expert)
        self.policy.started(expert)
        self._tell("start", expert, slot)
        return load

    def _next_layer(self, expert: Expert) -> int:
        """The layer that will use a prefetched expert next."""
        layers = self.layout.layers_of_pool[expert.pool]
        return next((layer for layer in layers if layer > self.layer), layers[0])

    def _drop(self, load: Load, event: Event) -> None:
        expert = load.expert
        del self.loading[expert]
        slot = self.slot_of.pop(expert)
        self._forget(expert)
        if expert in self._fresh:
            self._fresh.remove(expert)
            self.counters[self._home[expert]].prefetched_unused += 1
        self.free[self.layout.kind(expert)].append(slot)
        self._tell(event, expert, slot)

    def _shrink(self) -> None:
        """Give spare buffers back: groups over their share lose what the policy replaces next."""
        if not self.policy.spares:
            return
        for group, members in self.members.items():
            while len(members) > self.policy.quota(group):
                victim = self.policy.worst(group)
                if victim is None:
                    break
                self._evict(victim)

    def _tell(self, event: Event, expert: Expert, slot: int) -> None:
        if self.audit is not None:
            self.audit(event, expert, slot, self.resident_bytes)
