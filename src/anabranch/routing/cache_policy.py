"""What a cache of destinations would hit, at every capacity at once: LRU, LFU, Belady, the best fixed set, and the segment cache.

A cache of capacity C holds C destinations of one layer (or of a model). A token looks its K destinations up in the state *before* it; then
they enter one after another, and each that was absent pushes out the resident of lowest priority. Where a token meets several layers of one
pool, a layer may name again what an earlier one has named; that is looked up in the state before its layer. Since priorities do not
depend on C, what a cache holds is among what a larger one holds (Mattson et al. 1970), so one pass over a *stack* gives all capacities:
an entering destination goes on top, and what it displaces sinks to the first place below whose holder has a lower priority.

Every sequence is a column, and one access is five operations on ``[E, B]`` arrays, so many sequences cost little more than one.
"""
# Shapes: S sequences, T tokens, K choices per token, E destinations, B sequences of a batch, C capacities 1..E

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anabranch.errors import ConfigError, DataError

Policy = Literal["lru", "lfu", "belady", "fixed", "segment", "plec"]
Cold = Literal["free", "miss"]
POLICIES: tuple[Policy, ...] = ("lru", "lfu", "belady", "fixed", "segment", "plec")
# Policies that know a window of tokens ahead.
LOOKING: tuple[Policy, ...] = ("segment", "plec")
# Cells of a stack at once: what the second-level cache of a core holds.
CELLS = 1 << 15
# A free slot of a stack; the key of a destination not seen yet, and of no destination.
FREE, ABSENT, NOTHING = -1, -2, -3


@dataclass(frozen=True)
class Hits:
    """Hits of every sequence at capacities 1 to E.

    Attributes:
        hits_SC: int64.
        accesses_S: int64, choices used.
    """

    hits_SC: np.ndarray
    accesses_S: np.ndarray

    @property
    def rate_C(self) -> np.ndarray:
        """Hits over accesses of all sequences together; nan if there is no access."""
        total = self.accesses_S.sum()
        return self.hits_SC.sum(0) / total if total else np.full(self.hits_SC.shape[1], np.nan)


def simulate(
    index_STK: np.ndarray,
    num_destinations: int,
    policy: Policy,
    *,
    window: int | None = None,
    cold: Cold = "free",
    blocks: Sequence[int] | None = None,
) -> Hits:
    """Hits of a policy at every capacity.

    Priorities, lowest leaves first (times are serial numbers of accesses, so there are no ties):

        lru       time of the last access
        lfu       number of accesses so far, then time of the last
        belady    negative time of the next access
        segment   number of accesses in this and the following ``window`` - 1 tokens that are not served yet, then time of the last
                  access (the oracle of SCH, arXiv 2505.16056)
        plec      belady's in this and the following ``window`` - 1 tokens, and below all of these the time of the last access: what
                  ExpertFlow's PLEC keeps if its predictions are right, with loads on demand

    ``fixed`` holds the most used destinations of each sequence, without replacement.

    Args:
        index_STK: destinations in [0, E), -1 where a choice is unused (padding, too).
        num_destinations: E.
        policy: see above.
        window: m of ``segment``, and how far ``plec`` sees, in tokens.
        cold: whether the first access of a destination counts as a hit while the cache has slots never used (``free``, the paper's:
            loading into an empty slot evicts nothing), or as a miss (what a real system sees).
        blocks: choices of each of the layers that a token meets one after the other, K in all; None for one layer. Layers may name the
            same destinations.

    Raises DataError if a token names a destination twice in a layer or outside [0, E), ConfigError for an unknown policy or a bad window.
    """
    if policy not in POLICIES:
        raise ConfigError(f"no cache policy {policy!r}; known: {', '.join(POLICIES)}")
    if (policy in LOOKING) != (window is not None) or (window is not None and window < 1):
        raise ConfigError(
            f"window is {window}; 'segment' and 'plec' need one of at least 1 token, and no other policy has one"
        )
    index_STK = np.asarray(index_STK)
    ends = np.cumsum([*blocks]) if blocks is not None else np.array([index_STK.shape[-1]])
    if ends[-1] != index_STK.shape[-1]:
        raise ConfigError(f"blocks have {ends[-1]} choices, the routes {index_STK.shape[-1]}")
    for block in np.split(index_STK, ends[:-1], axis=-1):
        check_routes(block, num_destinations)
    accesses_S = (index_STK >= 0).sum((1, 2))
    if policy == "fixed":
        return Hits(_fixed(index_STK, num_destinations), accesses_S)
    num_sequences = len(index_STK)
    hits_SC = np.zeros((num_sequences, num_destinations), np.int64)
    batch = max(1, CELLS // num_destinations)
    for first in range(0, num_sequences, batch):
        columns = slice(first, first + batch)
        run = _Stack(index_STK[columns], num_destinations, policy, window or 0, ends)
        hits_SC[columns] = run.hits_EB(cold).cumsum(0).T
    return Hits(hits_SC, accesses_S)


def hit_rates(
    index_STK: np.ndarray,
    num_destinations: int,
    policies: Sequence[Policy] = ("lru", "lfu", "belady", "fixed"),
    cold: Cold = "free",
    window: int | None = None,
) -> dict[str, np.ndarray]:
    """``[C]``: the hit rate of each policy at capacities 1 to E, all sequences together. ``window`` is of those that have one."""
    return {
        policy: simulate(
            index_STK, num_destinations, policy, window=window if policy in LOOKING else None, cold=cold
        ).rate_C
        for policy in policies
    }


def check_routes(index_STK: np.ndarray, num_destinations: int) -> np.ndarray:
    """The same as integers. Raises DataError where a token names a destination twice, or one that is not there."""
    index_STK = np.asarray(index_STK)
    if index_STK.ndim != 3 or not np.issubdtype(index_STK.dtype, np.integer):
        raise DataError(f"routes are integers of [sequences, tokens, choices], not {index_STK.dtype} {index_STK.shape}")
    if index_STK.size and not -1 <= index_STK.min() <= index_STK.max() < num_destinations:
        raise DataError(
            f"routes name destinations {index_STK.min()} to {index_STK.max()}; with {num_destinations} they are 0 to "
            f"{num_destinations - 1}, or -1 for none"
        )
    places_STK = np.sort(index_STK, axis=-1)
    twice_STK = (places_STK[..., 1:] == places_STK[..., :-1]) & (places_STK[..., 1:] >= 0)
    if twice_STK.any():
        sequence, token, place = np.argwhere(twice_STK)[0]
        raise DataError(
            f"token {token} of sequence {sequence} names destination {places_STK[sequence, token, place]} twice"
        )
    return index_STK


def _fixed(index_STK: np.ndarray, num_destinations: int) -> np.ndarray:
    num_sequences = len(index_STK)
    pair = index_STK + num_destinations * np.arange(num_sequences)[:, None, None]
    count_SE = np.bincount(pair[index_STK >= 0], minlength=num_sequences * num_destinations)
    return np.sort(count_SE.reshape(num_sequences, num_destinations), axis=1)[:, ::-1].cumsum(1)


class _Stack:
    """The stacks of B sequences, top first: ``stack_EB`` holds priorities, ``key_EB`` those of each destination.

    A priority is ``count << bits | time``; time makes it unique.
    """

    def __init__(
        self, index_BTK: np.ndarray, num_destinations: int, policy: Policy, window: int, ends: np.ndarray
    ) -> None:
        self.index_TKB = np.ascontiguousarray(index_BTK.transpose(1, 2, 0))
        num_tokens, top_k, num_columns = self.index_TKB.shape
        self.policy, self.window = policy, window
        self.bits = int(num_tokens * top_k + 1).bit_length()
        self.blocks = [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self.again_TKB = self._repetitions()
        # A token may name a destination once in each block.
        most = {"segment": min(window, num_tokens), "lfu": num_tokens}.get(policy, 0) * len(self.blocks)
        times = (2 if policy == "plec" else 1) * num_tokens * top_k
        size = max(((most + 1) << self.bits), times + num_destinations + 3)
        self.dtype = np.int32 if size < 1 << 31 else np.int64
        self.stack_EB = np.full((num_destinations, num_columns), FREE, self.dtype)
        self.key_EB = np.full((num_destinations, num_columns), ABSENT, self.dtype)
        self.count_EB = np.zeros((num_destinations, num_columns), self.dtype)
        self.column_B = np.arange(num_columns)
        self.next_TKB = self._next_accesses(num_destinations) if policy in ("belady", "plec") else None
        self._new_EB = np.empty_like(self.stack_EB)
        spare = [np.empty_like(self.stack_EB) for _ in range(2)]
        self._scratch = [spare[turn % 2] for turn in range((num_destinations - 1).bit_length())]

    def hits_EB(self, cold: Cold) -> np.ndarray:
        """Accesses by the place where the destination stood, so that a larger capacity hits."""
        hits_EB = np.zeros(self.stack_EB.shape, np.int64)
        # Destinations that were accessed so far, by column.
        seen_B = np.zeros(len(self.column_B), np.int64)
        if self.policy == "segment":
            for first in range(min(self.window, len(self.index_TKB))):
                self._let_in(first)
        for token, token_KB in enumerate(self.index_TKB):
            again_KB = None if self.again_TKB is None else self.again_TKB[token]
            for x_B in token_KB if again_KB is None else np.where(again_KB, -1, token_KB):
                self._look_up(x_B, hits_EB, seen_B, cold)
            for block in self.blocks:
                if again_KB is not None and again_KB[block.start : block.stop].any():
                    for place in block:
                        self._look_up(np.where(again_KB[place], token_KB[place], -1), hits_EB, seen_B, cold)
                for place in block:
                    self._enter(token, place, token_KB[place])
            if self.policy in LOOKING and token + self.window < len(self.index_TKB):
                self._let_in(token + self.window)
        return hits_EB

    def _repetitions(self) -> np.ndarray | None:
        """bool ``[T, K, B]``: what an earlier block of the token has named; None where nothing is."""
        again_TKB = np.zeros(self.index_TKB.shape, bool)
        for block in self.blocks[1:]:
            earlier_TKB = self.index_TKB[:, : block.start]
            for place in block:
                x_T1B = self.index_TKB[:, place : place + 1]
                again_TKB[:, place] = ((earlier_TKB == x_T1B) & (x_T1B >= 0)).any(1)
        return again_TKB if again_TKB.any() else None

    def _look_up(self, x_B: np.ndarray, hits_EB: np.ndarray, seen_B: np.ndarray, cold: Cold) -> None:
        key_B = self._key_B(x_B)
        place, column = np.divmod(np.flatnonzero(self.stack_EB == key_B), len(self.column_B))
        hits_EB[place, column] += 1
        # These are first accesses.
        column = np.flatnonzero(key_B == ABSENT)
        if len(column):
            if cold == "free":
                hits_EB[seen_B[column], column] += 1
            seen_B[column] += 1

    def _enter(self, token: int, place: int, x_B: np.ndarray) -> None:
        stack_EB, new_EB = self.stack_EB, self._new_EB
        used_B = x_B >= 0
        key_B = self._key_B(x_B)
        # Taken out; its place, or the first free one, ends the sinking.
        np.copyto(stack_EB, FREE, where=stack_EB == key_B)
        new_EB[0] = self._new_key_B(token, place, x_B)
        np.maximum(stack_EB[1:], self._lowest_EB(stack_EB)[:-1], out=new_EB[1:])
        if used_B.all():
            self.key_EB[x_B, self.column_B] = new_EB[0]
        else:
            new_EB[:, ~used_B] = stack_EB[:, ~used_B]
            column = self.column_B[used_B]
            self.key_EB[x_B[used_B], column] = new_EB[0, used_B]
        self.stack_EB, self._new_EB = new_EB, stack_EB

    def _lowest_EB(self, stack_EB: np.ndarray) -> np.ndarray:
        """The lowest priority down to each place, by doubling: ``minimum.accumulate`` is 20 times slower along the first axis."""
        done, distance = stack_EB, 1
        for made in self._scratch:
            made[:distance] = done[:distance]
            np.minimum(done[distance:], done[:-distance], out=made[distance:])
            done, distance = made, 2 * distance
        return done

    def _key_B(self, x_B: np.ndarray) -> np.ndarray:
        return np.where(x_B >= 0, self.key_EB[x_B, self.column_B], NOTHING)

    def _new_key_B(self, token: int, place: int, x_B: np.ndarray) -> np.ndarray:
        """Priorities after the access."""
        top_k = self.index_TKB.shape[1]
        time = token * top_k + place + 1
        if self.next_TKB is not None and self.policy == "belady":
            return self.last - self.next_TKB[token, place]
        if self.next_TKB is not None:
            next_B = self.next_TKB[token, place]
            known_B = next_B <= min(token + self.window, len(self.index_TKB)) * top_k
            return np.where(known_B, self._ahead(next_B), time).astype(self.dtype)
        if self.policy == "lru":
            return np.full(x_B.shape, time, self.dtype)
        count_B = self.count_EB[x_B, self.column_B] + (1 if self.policy == "lfu" else -1)
        used_B = x_B >= 0
        self.count_EB[x_B[used_B], self.column_B[used_B]] = count_B[used_B]
        return (count_B << self.bits) | time

    def _ahead(self, next_B: np.ndarray | int) -> np.ndarray | int:
        """Priority of what is known to be accessed next at a serial number: above every time, the sooner the higher."""
        return self.index_TKB.shape[0] * self.index_TKB.shape[1] + 1 + self.last - next_B

    def _let_in(self, token: int) -> None:
        """A token comes into the window."""
        if self.policy == "segment":
            self._announce(self.index_TKB[token])
        else:
            self._foresee(token)

    def _foresee(self, token: int) -> None:
        """What stood by its last access, and is accessed by this token, stands by that from now on."""
        _, top_k, num_columns = self.index_TKB.shape
        for place, x_B in enumerate(self.index_TKB[token]):
            key_B = self._key_B(x_B)
            is_new_B = (key_B >= 0) & (key_B <= self.index_TKB.shape[0] * top_k)
            column = self.column_B[is_new_B]
            at, found = np.divmod(np.flatnonzero((self.stack_EB == key_B) & is_new_B), num_columns)
            priority = self._ahead(token * top_k + place + 1)
            self.stack_EB[at, found] = priority
            self.key_EB[x_B[is_new_B], column] = priority

    def _announce(self, x_KB: np.ndarray) -> None:
        """A token comes into the window: one access more of each of its destinations is known."""
        one = 1 << self.bits
        for x_B in x_KB:
            used_B = x_B >= 0
            column, x = self.column_B[used_B], x_B[used_B]
            self.count_EB[x, column] += 1
            key_B = self._key_B(x_B)
            self.stack_EB.reshape(-1)[np.flatnonzero(self.stack_EB == key_B)] += one
            known = self.key_EB[x, column] != ABSENT
            self.key_EB[x[known], column[known]] += one

    def _next_accesses(self, num_destinations: int) -> np.ndarray:
        """Serial number of each access's next one of the same destination; past the end, in any order, where there is none."""
        num_tokens, top_k, num_columns = self.index_TKB.shape
        next_TKB = np.empty(self.index_TKB.shape, self.dtype)
        after_EB = np.repeat(num_tokens * top_k + 1 + np.arange(num_destinations)[:, None], num_columns, 1)
        for token in range(num_tokens - 1, -1, -1):
            # Within a block no destination is named twice.
            for block in reversed(self.blocks):
                x_KB = self.index_TKB[token, block.start : block.stop]
                next_TKB[token, block.start : block.stop] = after_EB[x_KB, self.column_B]
                place, column = np.nonzero(x_KB >= 0)
                after_EB[x_KB[place, column], column] = token * top_k + block.start + place + 1
        self.last = num_tokens * top_k + num_destinations + 1
        return next_TKB
