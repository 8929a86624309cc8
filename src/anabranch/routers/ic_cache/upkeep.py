"""Upkeep of the pool: what examples earned, which answers to make anew, and which examples to let go.

G(e)       (1 - quality) * cost, at each use; kept as a moving average: what a better answer to e would save
replay     off-peak, from the largest G down: ask the best arm again, keep the best of several answers; at most 5 times per example,
           and no further once replays stop to better what is there
offloads   successful uses by a cheaper arm, * 0.9 per hour
evict      near the limit: 0/1 knapsack, weight = bytes of plain text, value = offloads
"""
# Shapes: N examples

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.routers.ic_cache.example import Example
from anabranch.routers.ic_cache.knapsack import knapsack
from anabranch.routers.ic_cache.pool import ExamplePool

HOUR_S = 3600.0

# Several new answers of the best arm.
Regenerate = Callable[[Example], Sequence[str]]

# How good an answer is, 0 to 1.
Rate = Callable[[Example, str], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What a `Manager.tick` did.

    Attributes:
        expired: examples that went by their time.
        evicted: that went for room.
        replayed: whose answers were made anew.
        bettered: of those, how many got a better answer.
        is_optimal: the knapsack was solved to the end; True where none was needed.
    """

    expired: int = 0
    evicted: int = 0
    replayed: int = 0
    bettered: int = 0
    is_optimal: bool = True


class Manager(Part):
    """See the module.

    Args:
        config: how far each goes.
        pool: of examples.
        regenerate: makes new answers; None for no replays.
        rate: judges them; None for no replays.
    """

    @configclass
    class Config(BaseConfig):
        """How far each goes.

        Attributes:
            gain_rate: weight of the newest G in the moving average.
            replay_cap: most replays of one example (paper: 5).
            replays_per_tick: at most.
            min_gain: examples below are not worth a replay.
            patience: replays without a better answer after which a tick stops replaying.
            off_peak: replays happen only below this load.
            decay_per_hour: of the value of an offload (paper: 0.9).
            success: least quality of an answer that counts as an offload.
            credit_all: every example that was shown has the credit of an offload, not the most useful alone (the paper does not say).
            With it, what lies near many requests crowds out what some requests need.
        near_limit: share of the pool's bytes above which a tick evicts.
            evict_to: share that it evicts to.
        newcomers: share of the room that is kept for the newest, which had no chance yet to prove themselves; 0 is the paper's rule,
            under which a full pool does not follow when users turn to something new.
        """

        gain_rate: float = Field(default=0.3, gt=0, le=1)
        replay_cap: int = Field(default=5, ge=0)
        replays_per_tick: int = Field(default=8, ge=0)
        min_gain: float = Field(default=0.05, ge=0)
        patience: int = Field(default=3, ge=1)
        off_peak: float = Field(default=0.5, ge=0)
        decay_per_hour: float = Field(default=0.9, gt=0, le=1)
        success: float = Field(default=0.5, ge=0, le=1)
        credit_all: bool = False
        near_limit: float = Field(default=0.95, gt=0, le=1)
        evict_to: float = Field(default=0.85, gt=0, le=1)
        newcomers: float = Field(default=0.25, ge=0, le=1)

    def __init__(
        self, config: Any, pool: ExamplePool, *, regenerate: Regenerate | None = None, rate: Rate | None = None
    ) -> None:
        self.config, self.pool, self.regenerate, self.rate = config, pool, regenerate, rate

    # What examples earn

    def shown(self, examples: Sequence[Example], quality: float, cost: float, *, is_cheap: bool, now_s: float) -> None:
        """An answer was made with these examples, the most useful last. The rest as `used`."""
        for place, example in enumerate(examples, start=1):
            has_credit = self.config.credit_all or place == len(examples)
            self.used(example, quality, cost, is_cheap=is_cheap and has_credit, now_s=now_s)

    def used(self, example: Example, quality: float, cost: float, *, is_cheap: bool, now_s: float) -> None:
        """An answer was made with this example.

        Args:
            example: it.
            quality: of the answer, 0 to 1.
            cost: of the arm over that of the dearest, 0 to 1.
            is_cheap: a cheaper arm than the dearest answered, thanks to this example.
            now_s: the time.
        """
        rate = self.config.gain_rate
        self.pool.touch(example)
        example.rated += 1
        example.helped += quality
        example.gain = (1 - rate) * example.gain + rate * replay_gain(quality, cost)
        if is_cheap and quality >= self.config.success:
            example.offloads = self.value(example, now_s) + 1
            example.offloads_s = now_s

    def value(self, example: Example, now_s: float) -> float:
        """Offloads, decayed to now."""
        hours = max(0.0, now_s - example.offloads_s) / HOUR_S
        return example.offloads * self.config.decay_per_hour**hours

    # Room

    def retain(self, capacity: float, now_s: float) -> tuple[int, bool]:
        """Keep what is worth most within so many bytes; returns how many went, and whether the choice is proved best.

        The newest of the others fill what room is left, ``newcomers`` of it at least.
        """
        examples = list(self.pool)
        if self.pool.size_bytes <= capacity:
            return 0, True
        size_N = np.array([example.size_bytes for example in examples], np.float64)
        value_N = np.array([self.value(example, now_s) for example in examples])
        packed = knapsack(value_N, size_N, capacity * (1 - self.config.newcomers))
        keep_N, room = packed.keep_N.copy(), capacity - size_N[packed.keep_N].sum()
        others = np.flatnonzero(~keep_N).tolist()
        for at in sorted(others, key=lambda at: (-examples[at].created_s, -examples[at].id)):
            if size_N[at] <= room:
                keep_N[at] = True
                room -= size_N[at]
        gone = [example.id for example, keep in zip(examples, keep_N, strict=True) if not keep]
        return self.pool.remove(gone), packed.is_optimal

    def make_room(self, missing: int, now_s: float) -> None:
        """At least so many bytes, and down to ``evict_to``, so that the next ones need not ask again."""
        limit = self.pool.config.max_bytes
        self.retain(max(0.0, min(limit * self.config.evict_to, self.pool.size_bytes - missing)), now_s)

    # Replay

    def wanting(self, load: float) -> list[Example]:
        """Examples whose answers are worth making anew, most saving first; none at a load that is not off-peak."""
        if load >= self.config.off_peak:
            return []
        wanting = [
            example
            for example in self.pool
            if example.replays < self.config.replay_cap and example.gain >= self.config.min_gain
        ]
        return sorted(wanting, key=lambda example: (-example.gain, example.id))

    def replay(self, load: float) -> tuple[int, int]:
        """Make answers anew where that saves most; returns how many were made anew, and how many got better."""
        if self.regenerate is None or self.rate is None:
            return 0, 0
        replayed = bettered = in_vain = 0
        for example in self.wanting(load):
            if replayed == self.config.replays_per_tick or in_vain == self.config.patience:
                break
            replayed += 1
            if self._replay(example, self.regenerate, self.rate):
                bettered, in_vain = bettered + 1, 0
            else:
                in_vain += 1
        return replayed, bettered

    def _replay(self, example: Example, regenerate: Regenerate, rate: Rate) -> bool:
        self.pool.touch(example)
        example.replays += 1
        before = example.quality if example.quality is not None else rate(example, example.response)
        rated = [(rate(example, answer), answer) for answer in regenerate(example) if answer.strip()]
        return self.renew(example, before, rated)

    def renew(self, example: Example, before: float, rated: Sequence[tuple[float, str]]) -> bool:
        """Take the best of new answers, if it is better; whether it is.

        Args:
            example: in the pool.
            before: how good its answer is, 0 to 1.
            rated: new answers, with how good they are.
        """
        quality, answer = max(rated, key=lambda item: item[0], default=(before, ""))
        is_better = bool(quality > before)
        if is_better:
            self.pool.replace_response(example.id, answer, quality)
        self.pool.touch(example)
        # What is left to be saved.
        example.gain *= 1 - min(1.0, max(quality, before))
        return is_better

    def tick(self, now_s: float, load: float = 0.0) -> Upkeep:
        """Expire, evict near the limit, replay off-peak. To be called now and then, outside requests."""
        expired = self.pool.expire(now_s)
        evicted, is_optimal = 0, True
        if self.pool.size_bytes > self.config.near_limit * self.pool.config.max_bytes:
            evicted, is_optimal = self.retain(self.config.evict_to * self.pool.config.max_bytes, now_s)
        replayed, bettered = self.replay(load)
        return Upkeep(expired=expired, evicted=evicted, replayed=replayed, bettered=bettered, is_optimal=is_optimal)


def replay_gain(quality: float, cost: float) -> float:
    """G(e) = (1 - quality) * cost, both 0 to 1."""
    return (1 - quality) * cost
