"""Training batches out of token stores: packed, shuffled, mixed, sharded, resumable anywhere.

A stream reads the tokens of a domain as a circle, cut into windows of L tokens from an offset that changes every epoch, and visits
them in an order drawn per epoch. Which sequence comes n-th is a function of (seed, n) alone, so a run resumes anywhere
without replaying, and any number of ranks together see what one process would.
"""
# Shapes: B sequences, L positions, T tokens of a domain

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anabranch.data.batch import Batch
from anabranch.data.store import Segment, TokenStore
from anabranch.errors import ConfigError, DataError

log = logging.getLogger(__name__)

# Sequences after which a mixture has hit its weights exactly.
_SLOTS = 4096


@dataclass(frozen=True)
class Lane:
    """What one shuffle runs over: segments with the domain each belongs to, and the lane's share of the sequences."""

    weight: float
    parts: tuple[tuple[TokenStore, Segment, int], ...]


class TokenStream:
    """An endless, deterministic stream of training sequences.

    A lane is read epoch by epoch: every window of it once, in a new order, cut at a new offset. Several lanes are mixed by
    their weights, exactly so after every 4,096 sequences.

    Args:
        lanes: what to read, all from the training split.
        domains: names of the domains.
        sequence_length: L, tokens a sequence.
        seed: decides order and offsets.
        rank, world_size: of ``world_size`` processes with equal batch sizes this is number ``rank``; their batches joined in
            rank order are the batch of a single process.
        fingerprint: names the data; a state from other data is refused.

    Raises DataError if a lane has no domain with more than L tokens, ConfigError for a rank outside the world.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        domains: Sequence[str],
        *,
        sequence_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        fingerprint: str = "",
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; it must be 0 to {world_size - 1} in a world of {world_size}")
        self.domains = tuple(domains)
        self.sequence_length, self.seed, self.rank, self.world_size = sequence_length, seed, rank, world_size
        self._fingerprint = fingerprint
        self._lanes = [
            _Shuffled(lane, number, sequence_length, seed, self.domains) for number, lane in enumerate(lanes)
        ]
        self._slots = _slots([lane.weight for lane in lanes])
        self._block: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self.position = 0

    @property
    def epoch(self) -> float:
        """How often the data was gone through, as far as this many sequences go: for a mixture, its most used domain."""
        counts = np.bincount(self._slots, minlength=len(self._lanes)) / len(self._slots)
        return max(self.position * share / lane.num_windows for share, lane in zip(counts, self._lanes, strict=True))

    @property
    def num_windows(self) -> int:
        """Different sequences in one epoch of all lanes."""
        return sum(lane.num_windows for lane in self._lanes)

    def next_batch(self, batch_size: int) -> Batch:
        """The next ``batch_size`` sequences of this rank; the stream moves on by ``batch_size * world_size``."""
        first = self.position + self.rank * batch_size
        sequence_BL = np.empty((batch_size, self.sequence_length + 1), dtype=np.int64)
        domain_B = np.empty(batch_size, dtype=np.int64)
        for row in range(batch_size):
            lane, count = self._place(first + row)
            domain_B[row] = self._lanes[lane].read(count, sequence_BL[row])
        self.position += batch_size * self.world_size
        sequence = torch.from_numpy(sequence_BL)
        return Batch(sequence[:, :-1].contiguous(), sequence[:, 1:].contiguous(), torch.from_numpy(domain_B))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is; the same on all ranks, so any number of ranks can go on from it."""
        return {
            "position": self.position,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where ``state`` says, at once. Raises DataError if it comes from another seed, length or corpus."""
        mine = self.state_dict()
        for name in ("seed", "sequence_length", "fingerprint"):
            if state.get(name) != mine[name]:
                raise DataError(
                    f"cannot resume the data: {name} was {state.get(name)!r} and is now {mine[name]!r}; "
                    "resume with the same corpus, tokenizer, seed and sequence length, or start a new run"
                )
        self.position = int(state["position"])

    def _place(self, number: int) -> tuple[int, int]:
        """(lane, how many sequences of that lane came before) of sequence ``number``."""
        if len(self._lanes) == 1:
            return 0, number
        block, slot = divmod(number, len(self._slots))
        if self._block is None or self._block[0] != block:
            order = _random(self.seed, "mixture", block).permutation(self._slots)
            before = np.zeros_like(order)
            for lane in range(len(self._lanes)):
                mine = order == lane
                before[mine] = np.arange(mine.sum()) + block * mine.sum()
            self._block = (block, order, before)
        return int(self._block[1][slot]), int(self._block[2][slot])


class _Shuffled:
    """One lane: its n-th sequence, for any n."""

    def __init__(self, lane: Lane, number: int, sequence_length: int, seed: int, domains: Sequence[str]) -> None:
        parts = [part for part in lane.parts if part[1].length > sequence_length]
        if not parts:
            longest = max((segment.length for _, segment, _ in lane.parts), default=0)
            names = ", ".join(sorted({domains[domain] for *_, domain in lane.parts})) or "nothing"
            raise DataError(
                f"the training split of {names} has {longest} tokens, but a sequence needs {sequence_length + 1}; "
                f"give more text or a sequence_length of at most {max(longest - 1, 1)}"
            )
        for _, segment, domain in lane.parts:
            if segment.length <= sequence_length:
                log.warning(
                    "%s has only %d tokens, too few for one sequence: left out", domains[domain], segment.length
                )
        self._parts, self._number, self._length, self._seed = parts, number, sequence_length, seed
        self._first = np.cumsum([0, *(segment.length // sequence_length for _, segment, _ in parts)])
        self.num_windows = int(self._first[-1])
        self._epoch: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def read(self, count: int, out: NDArray[np.int64]) -> int:
        """Fill ``out`` ``[L + 1]`` with sequence ``count`` of the lane; returns its domain."""
        epoch, place = divmod(count, self.num_windows)
        if self._epoch is None or self._epoch[0] != epoch:
            random = _random(self._seed, "windows", self._number, epoch)
            offsets = np.array([random.integers(segment.length) for _, segment, _ in self._parts])
            self._epoch = (epoch, offsets, random.permutation(self.num_windows))
        _, offsets, order = self._epoch
        window = order[place]
        part = int(np.searchsorted(self._first, window, side="right")) - 1
        store, segment, domain = self._parts[part]
        start = int(offsets[part] + (window - self._first[part]) * self._length) % segment.length
        _read_circle(store.tokens("train"), segment, start, out)
        return domain


def _read_circle(tokens_T: NDArray[Any], segment: Segment, start: int, out: NDArray[np.int64]) -> None:
    """Copy ``len(out)`` tokens of ``segment`` from ``start`` on, going on at its beginning after its end."""
    head = min(len(out), segment.length - start)
    out[:head] = tokens_T[segment.start + start : segment.start + start + head]
    if head < len(out):
        out[head:] = tokens_T[segment.start : segment.start + len(out) - head]


def _slots(weights: Sequence[float]) -> NDArray[np.int64]:
    """The lane of each of `_SLOTS` sequences, in proportion to ``weights`` (largest remainders), at least one a lane."""
    share = np.array(weights, dtype=np.float64) / sum(weights) * _SLOTS
    count = np.maximum(np.floor(share).astype(np.int64), 1)
    while count.sum() < _SLOTS:
        count[np.argmax(share - count)] += 1
    while count.sum() > _SLOTS:
        count[np.argmax(count - share)] -= 1
    return np.repeat(np.arange(len(weights)), count)


def _random(seed: int, *path: int | str) -> np.random.Generator:
    """A generator of its own for each purpose: strings count by their bytes."""
    entropy = [int.from_bytes(part.encode(), "big") if isinstance(part, str) else part for part in path]
    return np.random.default_rng(np.random.SeedSequence([seed, *entropy]))
