"""Policies under one interface: what leaves a slot, and what is loaded before anyone asks.

    lru         the least recently used of all experts of the kind leaves            lfu, random    likewise
    lru_ahead   LRU that also loads what is predicted
    cache_moe   a fixed number of slots per layer, LRU among them, a few spare buffers (dvmazur/mixtral-offloading)
    se_moe      a ring that preloads the next layers' experts, all of them (SE-MoE)
    belady      the farthest next use of a given reference string leaves; loads on demand (clairvoyant with the true string)
    plec        the same, and loads ahead as `anabranch.serving.expertflow.plan` says (the paper's)

Policies are told what happens in the cache they belong to; they hold no bytes. `anabranch.routing.cache_policy` gives the hits of LRU, LFU
and Belady at all capacities of a cache of equal experts; tests hold these against it.
"""

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from anabranch.errors import ConfigError
from anabranch.serving.expertflow.layout import Expert
from anabranch.serving.expertflow.plan import NEVER, PLACES, PlannedLoad, belady_plan
from anabranch.serving.expertflow.policy_base import LoadsAhead, Policy

if TYPE_CHECKING:
    from anabranch.serving.expertflow.cache import ExpertCache

# Loads of a plan that are worth knowing before the next layer corrects it.
PLANNED = 8


class Lru(Policy):
    """The least recently used leaves; groups are kept in that order."""

    name = "lru"

    def used(self, expert: Expert) -> None:
        """It is the most recently used now."""
        members = self.cache.members[self.group(expert)]
        del members[expert]
        members[expert] = None

    def worst(self, group: int) -> Expert | None:
        """The first of the group."""
        return next(self.evictable(group), None)


class Lfu(Lru):
    """The least often used leaves, the least recently used of these first. Counts are kept when an expert leaves."""

    name = "lfu"

    def attach(self, cache: "ExpertCache") -> None:
        """Nothing was used yet."""
        super().attach(cache)
        self._uses: dict[Expert, int] = {}

    def used(self, expert: Expert) -> None:
        """Count."""
        super().used(expert)
        self._uses[expert] = self._uses.get(expert, 0) + 1

    def worst(self, group: int) -> Expert | None:
        """The least often used; `min` takes the first of equals."""
        return min(self.evictable(group), key=lambda expert: self._uses.get(expert, 0), default=None)


class Random(Policy):
    """Anything leaves; the same for one seed."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def worst(self, group: int) -> Expert | None:
        """Any."""
        choice = sorted(self.evictable(group))
        return self._random.choice(choice) if choice else None


class CacheMoe(Lru):
    """Cache-MoE: a fixed number of slots for each pool and LRU among them, as in mixtral-offloading.

    Args:
        spares: buffers besides (theirs: 4), as far as the slots go round; a load goes there while all slots of its pool are still to run.
    """

    name = "cache_moe"
    per_layer = True

    def __init__(self, spares: int = 4) -> None:
        self._most_spares = spares

    def attach(self, cache: "ExpertCache") -> None:
        """Divide the slots: the same number for each pool of a kind as far as it has experts, at least those of a token."""
        super().attach(cache)
        layout = cache.layout
        self._quota = [0] * len(layout.num_experts)
        for kind, count in enumerate(cache.num_slots):
            pools = [pool for pool, other in enumerate(layout.kind_of_pool) if other == kind]
            for pool in pools:
                for layer in layout.layers_of_pool.get(pool, ()):
                    self._quota[pool] += min(layout.top_k[layer], layout.num_experts[pool] - self._quota[pool])
            spare = count - sum(self._quota[pool] for pool in pools)
            self.spares = min(self._most_spares, spare)
            spare -= self.spares
            while spare and (short := [pool for pool in pools if self._quota[pool] < layout.num_experts[pool]]):
                self._quota[min(short, key=lambda pool: self._quota[pool])] += 1
                spare -= 1

    def group(self, expert: Expert) -> int:
        """Its pool."""
        return expert.pool

    def quota(self, group: int) -> int:
        """The pool's share."""
        return self._quota[group]


class SeMoe(LoadsAhead):
    """SE-MoE's ring: the experts of the layers to come are loaded whole, in order, over those that were loaded first."""

    name = "se_moe"

    def _distance(self, expert: Expert) -> int:
        """Layers until it may be used again."""
        layout, layer = self.cache.layout, self.cache.layer
        ahead = ((other - layer - 1) % layout.num_layers for other in layout.layers_of_pool[expert.pool])
        return min(ahead)

    def worst(self, group: int) -> Expert | None:
        """The farthest ahead in the ring, the one loaded first of these."""
        return max(self.evictable(group), key=self._distance, default=None)

    def prefetch(self) -> tuple[Expert, Expert | None] | None:
        """The next expert of the ring that is not there, if what leaves is farther ahead."""
        cache = self.cache
        for ahead in range(cache.layout.num_layers):
            layer = (cache.layer + 1 + ahead) % cache.layout.num_layers
            for expert in cache.layout.of_layer(layer):
                if expert in cache.slot_of or expert in self._given_up:
                    continue
                if cache.free[cache.layout.kind(expert)]:
                    return expert, None
                victim = self.worst(self.group(expert))
                if victim is None or self._distance(victim) <= ahead:
                    return None
                return expert, victim
        return None


class Belady(Lru):
    """The farthest next use of the reference string leaves. Never used is farthest; of those go first the unwanted, then the oldest."""

    name = "belady"
    needs_reference = True

    def attach(self, cache: "ExpertCache") -> None:
        """Nothing is unwanted yet."""
        super().attach(cache)
        self._unwanted: frozenset[Expert] = frozenset()
        # Of each group, who leaves first at the end; what was used since is not in it.
        self._leaving: dict[int, list[Expert]] = {}

    def begin_step(self) -> None:
        """A new string."""
        self._unwanted = frozenset()
        self._leaving.clear()

    def begin_layer(self, unwanted: frozenset[Expert]) -> None:
        """The string was corrected."""
        self._unwanted = unwanted
        self._leaving.clear()

    def used(self, expert: Expert) -> None:
        """It may leave now."""
        super().used(expert)
        self._leaving.clear()

    def worth(self, expert: Expert) -> float:
        """What decides between experts that are not known to be used again, before the time of their last use."""
        return 0.0

    def worst(self, group: int) -> Expert | None:
        """See the class. A layer that misses several experts asks as often, and they are put in order once."""
        leaving = self._leaving.get(group)
        while leaving:
            if self.cache.is_evictable(leaving[-1]):
                return leaving[-1]
            leaving.pop()
        leaving = self._leaving[group] = self._in_order(group)
        return leaving[-1] if leaving else None

    def _in_order(self, group: int) -> list[Expert]:
        """Those that may leave, the first to do so at the end."""
        reference, start = self.cache.reference, self.cache.at * PLACES - 1
        never, known = [], []
        for age, expert in enumerate(self.evictable(group)):
            next_use = reference.next_use(expert, start)
            # No two have the same.
            if next_use < NEVER:
                known.append((next_use, expert))
            else:
                never.append((expert in self._unwanted, -self.worth(expert), -age, expert))
        known.sort()
        never.sort()
        return [pair[1] for pair in known] + [entry[3] for entry in never]


class LruAhead(LoadsAhead, Lru):
    """LRU that loads what is predicted, over the least recently used: prediction without a plan (for ablations)."""

    name = "lru_ahead"
    needs_reference = True

    def prefetch(self) -> tuple[Expert, Expert | None] | None:
        """The next predicted expert that is not there; it pushes out anything but what was loaded ahead and waits for its use."""
        cache = self.cache
        for step in cache.reference.steps[cache.at + 1 : cache.reference.certain]:
            for expert in step:
                if expert in cache.slot_of or expert in self._given_up:
                    continue
                kind = cache.layout.kind(expert)
                if cache.free[kind]:
                    return expert, None
                victim = next((one for one in self.evictable(kind) if not cache.is_fresh(one)), None)
                return None if victim is None else (expert, victim)
        return None


class Plec(Belady):
    """Predicted locality-aware expert caching: Belady on predictions, and loads ahead.

    Predictions reach a forward pass or two ahead. Between experts that they do not name, how often each was used lately is the better
    guess of what comes after than which was used last, so that decides first.

    Args:
        prefetch: load ahead; without it experts are loaded when they are wanted.
        half_life: forward passes after which a use counts half; None for the least recently used alone.
    """

    name = "plec"

    def __init__(self, prefetch: bool = True, half_life: float | None = 128.0) -> None:
        self.is_prefetching, self.half_life = prefetch, half_life
        # Of a use now; it grows, so that older ones count less.
        self._gain = 1.0
        self._worth: dict[Expert, float] = {}

    def attach(self, cache: "ExpertCache") -> None:
        """No plan yet."""
        super().attach(cache)
        self._plan: list[PlannedLoad] | None = None
        self._given_up: set[Expert] = set()

    def begin_step(self) -> None:
        """Plan anew."""
        super().begin_step()
        self._plan = None
        self._given_up.clear()
        if self.half_life is not None:
            self._gain *= 2 ** (1 / self.half_life)
            if self._gain > 1e100:
                self._worth = {expert: value / self._gain for expert, value in self._worth.items()}
                self._gain = 1.0

    def used(self, expert: Expert) -> None:
        """Count."""
        super().used(expert)
        if self.half_life is not None:
            self._worth[expert] = self._worth.get(expert, 0.0) + self._gain

    def worth(self, expert: Expert) -> float:
        """Uses lately."""
        return self._worth.get(expert, 0.0)

    def begin_layer(self, unwanted: frozenset[Expert]) -> None:
        """Plan anew from the truth."""
        super().begin_layer(unwanted)
        self._plan = None

    def give_up(self, expert: Expert) -> None:
        """Skip it in this pass."""
        self._given_up.add(expert)

    def victim(self, incoming: Expert) -> Expert | None:
        """The worst. What was planned rested on another state of the slots."""
        self._plan = None
        return super().victim(incoming)

    def prepare(self) -> None:
        """Make the plan."""
        if self._plan is None and self.is_prefetching and self.cache.reference.steps:
            kinds = range(self.cache.layout.num_kinds)
            self._plan = [load for kind in kinds for load in self._made(kind)]

    def prefetch(self) -> tuple[Expert, Expert | None] | None:
        """The first load of the plan whose victim has had its last use before."""
        self.prepare()
        cache = self.cache
        if self._plan is None:
            return None
        for number, load in enumerate(self._plan):
            if load.expert in cache.slot_of or load.expert in self._given_up:
                continue
            if load.victim is None:
                has_room = bool(cache.free[cache.layout.kind(load.expert)])
            else:
                has_room = load.after <= cache.at and cache.is_evictable(load.victim)
            if has_room:
                del self._plan[number]
                if not self._plan:
                    # There may be more behind its end.
                    self._plan = None
                return load.expert, load.victim
        return None

    def _made(self, kind: int) -> Iterable[PlannedLoad]:
        cache = self.cache
        return belady_plan(
            cache.reference,
            max(cache.at, 0),
            list(cache.members.get(kind, ())),
            len(cache.free[kind]),
            fits=lambda expert: cache.layout.kind(expert) == kind,
            unwanted=self._unwanted,
            worth=self.worth,
            limit=PLANNED,
        )


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Lru, Lfu, Random, LruAhead, CacheMoe, SeMoe, Belady, Plec)
}


def make_policy(policy: str | Policy) -> Policy:
    """A policy by name. Raises ConfigError for an unknown one."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"no cache policy {policy!r}; known: {', '.join(POLICIES)}")
    return POLICIES[policy]()
