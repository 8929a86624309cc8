"""Policies that others bring: `KVTier`, a second place for keys and values, and `Memory`, how many requests may share the first.

A tier (host memory, disk) keeps full blocks by their prefix key. Since the key of a block is all that its content depends on, one
mechanism serves a request that was preempted, the next round of a conversation, and a prefix that many share. The scheduler says what
could be saved and what is wanted; the tier answers with slots; the moves themselves are in `Batch.swaps_out` and `Batch.swaps_in`, and
the runner makes them before the step: first all out, then copies, then all in.
"""

from collections.abc import Iterable
from typing import Protocol


class KVTier(Protocol):
    """Where blocks go that the device has no room for. Called by the scheduler's thread only."""

    def filled(self, key: bytes, block: int) -> int | None:
        """A block has just become full and ``key`` finds it: the slot to save it to at once, None to leave it for `evicted`."""

    def evicted(self, key: bytes, block: int) -> int | None:
        """A block is about to be used for something else: the slot to save it to, None if it is saved already or not worth it.

        The slot must not be one that `load` has given since the last `formed`.
        """

    def holds(self, key: bytes) -> bool:
        """Whether `load` would find the key."""

    def load(self, key: bytes) -> int:
        """The slot that holds the key. It stays as it is until `formed`."""

    def formed(self) -> None:
        """The batch that carries all moves asked for since the last call is formed; slots given by `load` may be used again."""

    def reset(self) -> None:
        """Forget everything: an operator has reset the prefix cache."""


class Memory(Protocol):
    """Admission by what requests are expected to need before they end, rather than by what they need now."""

    def saw(self, num_output: int) -> None:
        """A request has ended by itself after so many tokens."""

    def remaining(self, num_output: int, max_tokens: int) -> int:
        """Tokens that a request which has given ``num_output`` of at most ``max_tokens`` is expected to give still."""

    def admits(self, running: Iterable[tuple[int, int]], candidate: tuple[int, int]) -> bool:
        """Whether the candidate may join those that run, each as (tokens now, tokens expected still). Always, if none run."""
