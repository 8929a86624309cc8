"""Consecutive windows over text, for measuring a model in nats per token and bits per byte."""
# Shapes: B windows, L positions

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from anabranch.data.batch import Batch
from anabranch.data.split import stretches
from anabranch.data.store import Segment, TokenStore
from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import DataError


class TokenRun:
    """A run of tokens to measure, with the bytes of text under each."""

    def __len__(self) -> int:
        raise NotImplementedError

    def tokens(self, start: int, end: int) -> NDArray[np.int64]:
        """Ids from ``start`` to ``end`` (excluded)."""
        raise NotImplementedError

    def byte_lengths(self, start: int, end: int) -> NDArray[np.int64]:
        """Bytes under those ids."""
        raise NotImplementedError


class StoredRun(TokenRun):
    """A segment of a store, without the end of text after its last document."""

    def __init__(self, store: TokenStore, split: str, segment: Segment, eos_id: int | None) -> None:
        self._store, self._split, self._segment = store, split, segment
        self._length = segment.length - (1 if eos_id is not None and segment.length else 0)

    def __len__(self) -> int:
        return self._length

    def tokens(self, start: int, end: int) -> NDArray[np.int64]:
        """See `TokenRun`."""
        first = self._segment.start
        return self._store.tokens(self._split)[first + start : first + end].astype(np.int64)

    def byte_lengths(self, start: int, end: int) -> NDArray[np.int64]:
        """See `TokenRun`."""
        first = self._segment.start
        return self._store.byte_lengths(self._split, first + start, first + end)


class TextRun(TokenRun):
    """Documents tokenised in memory, with end of text between them (not after the last)."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        between = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=np.int64)
        ids: list[NDArray[np.int64]] = []
        lengths: list[NDArray[np.int64]] = []
        for position, text in enumerate(texts):
            if position:
                ids.append(between)
                lengths.append(np.zeros_like(between))
            # In stretches: a tokenizer needs about 150 bytes of memory for each byte that it is given at once.
            for stretch in stretches(text):
                [(ids_L, length_L)] = tokenizer.encode_with_byte_lengths([stretch])
                ids.append(ids_L)
                lengths.append(length_L)
        self._ids = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)
        self._lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def tokens(self, start: int, end: int) -> NDArray[np.int64]:
        """See `TokenRun`."""
        return self._ids[start:end]

    def byte_lengths(self, start: int, end: int) -> NDArray[np.int64]:
        """See `TokenRun`."""
        return self._lengths[start:end]


class Windows:
    """Consecutive windows that do not overlap, each of L input tokens and their successors; the last of a domain may be short.

    Iterating gives `Batch`es with byte lengths, in order: at most ``batch_size`` windows of one length each. Every token of a
    domain but its first is predicted exactly once (with all windows and one rank), so sums over the batches give
    nats per token (over ``num_tokens``) and bits per byte (over ``num_bytes``) of the whole.

    Args:
        parts: token array, byte lengths array and domain for each run of tokens to measure.
        domains: names of the domains.
        sequence_length: L.
        batch_size: windows a batch.
        num_windows: at most about this many, evenly spread over each domain and in proportion to its size; None takes all.
        rank, world_size: take every ``world_size``-th window from ``rank``.

    Raises DataError if no part has two tokens.
    """

    def __init__(
        self,
        parts: Sequence[tuple[TokenRun, int]],
        domains: Sequence[str],
        *,
        sequence_length: int,
        batch_size: int = 8,
        num_windows: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.domains, self.sequence_length, self.batch_size = tuple(domains), sequence_length, batch_size
        self._parts = [(run, domain) for run, domain in parts if len(run) > 1]
        if not self._parts:
            raise DataError(
                "nothing to predict: there are fewer than two tokens; give more text, or a larger validation_fraction"
            )
        counts = [-(-(len(run) - 1) // sequence_length) for run, _ in self._parts]
        total = sum(counts)
        chosen = []
        for part, count in enumerate(counts):
            keep = count if num_windows is None else min(count, max(1, round(num_windows * count / total)))
            chosen += [(part, position * count // keep) for position in range(keep)]
        self._windows = chosen[rank::world_size]

    def __len__(self) -> int:
        """Windows, not batches."""
        return len(self._windows)

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted."""
        return sum(end - start - 1 for _, start, end in self._spans())

    @property
    def num_bytes(self) -> int:
        """Bytes of text under the predicted tokens."""
        return sum(int(self._parts[part][0].byte_lengths(start + 1, end).sum()) for part, start, end in self._spans())

    def __iter__(self) -> Iterator[Batch]:
        waiting: list[tuple[int, int, int]] = []
        for span in self._spans():
            ends_batch = len(waiting) == self.batch_size or (
                waiting and span[2] - span[1] != waiting[0][2] - waiting[0][1]
            )
            if ends_batch:
                yield self._batch(waiting)
                waiting = []
            waiting.append(span)
        if waiting:
            yield self._batch(waiting)

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """(part, start, end) of each window, with the successor of its last input token."""
        for part, window in self._windows:
            start = window * self.sequence_length
            yield part, start, min(start + self.sequence_length + 1, len(self._parts[part][0]))

    def _batch(self, spans: list[tuple[int, int, int]]) -> Batch:
        sequence = np.stack([self._parts[part][0].tokens(start, end) for part, start, end in spans])
        length = np.stack([self._parts[part][0].byte_lengths(start + 1, end) for part, start, end in spans])
        domain = np.array([self._parts[part][1] for part, _, _ in spans], dtype=np.int64)
        token_BL = torch.from_numpy(np.ascontiguousarray(sequence[:, :-1]))
        target_BL = torch.from_numpy(np.ascontiguousarray(sequence[:, 1:]))
        return Batch(token_BL, target_BL, torch.from_numpy(domain), torch.from_numpy(length))
