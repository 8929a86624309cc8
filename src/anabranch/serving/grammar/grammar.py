"""`Grammar`: which tokens may come next, for one schema and one tokenizer."""
# Shapes: V vocabulary

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from anabranch.serving.grammar.machine import DEAD, Machine
from anabranch.serving.grammar.vocabulary import Vocabulary

__all__ = ["Grammar"]

_ENDED = -1  # the state after an end-of-text token: only another may follow
_KEPT_MASKS = 512  # least recently used go first
_MANY_STATES = 50_000  # about 60 MB


class Grammar:
    """An automaton over tokens; a state is an integer of this grammar's.

    Not safe for threads: one engine loop walks it.

    Args:
        machine, root: over bytes, and the node that a whole text matches.
        vocabulary: of the tokenizer.
        ends: end-of-text tokens, allowed exactly where the text may end.
    """

    def __init__(self, machine: Machine, root: int, vocabulary: Vocabulary, ends: Sequence[int]) -> None:
        self._machine, self._vocabulary = machine, vocabulary
        self._start = machine.start(root)
        self._ends = np.array(sorted(set(ends)), dtype=np.int64)
        self._end_set = frozenset(ends)
        self._masks: OrderedDict[int, NDArray[np.bool_]] = OrderedDict()

    def start(self) -> int:
        """The state before the first token."""
        return self._start

    def mask(self, state: int) -> NDArray[np.bool_]:
        """[V], True for tokens that may come next. Kept for the next time: do not write into it."""
        # Counters that no token can run out make no difference: the masks of all such states are one.
        key = state if state == _ENDED else self._machine.near(state, self._vocabulary.longest)
        mask_V = self._masks.get(key)
        if mask_V is not None:
            self._masks.move_to_end(key)
            return mask_V
        if state == _ENDED:
            mask_V = np.zeros(len(self._vocabulary.pieces), dtype=np.bool_)
        else:
            mask_V = self._vocabulary.allowed(self._machine, key)
        mask_V[self._ends[self._ends < len(mask_V)]] = self.is_final(state)
        mask_V.flags.writeable = False
        self._masks[key] = mask_V
        if len(self._masks) > _KEPT_MASKS:
            self._masks.popitem(last=False)
        return mask_V

    def advance(self, state: int, token: int) -> int | None:
        """The state after ``token``; None if it may not follow."""
        if token in self._end_set:
            return _ENDED if self.is_final(state) else None
        if state == _ENDED or not 0 <= token < len(self._vocabulary.pieces) or not self._vocabulary.pieces[token]:
            return None
        for byte in self._vocabulary.pieces[token]:
            state = self._machine.step(state, byte)
        return None if state == DEAD else state

    def is_final(self, state: int) -> bool:
        """Whether the text may end here."""
        return state == _ENDED or self._machine.is_final(state)

    @property
    def is_full(self) -> bool:
        """Whether it has seen so many states that a new one should be compiled for new requests."""
        return self._machine.num_states > _MANY_STATES
