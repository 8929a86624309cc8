"""`Grammar`: one that is compiled for a tokenizer; `Matcher`: where one output has come to in it."""
# Shapes: V vocabulary

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.errors import InputError
from anabranch.serving.grammar import trial_worker
from anabranch.serving.grammar.library import llguidance
from anabranch.serving.grammar.vocabulary import Vocabulary

__all__ = ["Grammar", "Matcher"]


class Grammar:
    """A grammar, compiled. Safe for threads.

    Args:
        text: see `anabranch.serving.grammar.forms.text_of`; it must have been tried out.
        vocabulary: of the tokenizer.
        ends: end-of-text tokens, allowed exactly where a text may end.
        size_bytes: of memory that it takes.
        source: whose memory that is.

    Raises InputError for a grammar that cannot be followed.
    """

    def __init__(
        self, text: str, vocabulary: Vocabulary, ends: Sequence[int], size_bytes: int = 0, source: str = ""
    ) -> None:
        self.size_bytes, self.source = size_bytes, source
        self._vocabulary = vocabulary
        self._ends = tuple(sorted({end for end in ends if end < vocabulary.size}))
        library = llguidance()
        limits = library.LLParserLimits(**trial_worker.PARSER)
        self._begun = library.LLMatcher(vocabulary.walked, text, log_level=0, limits=limits)
        if self._begun.is_error():
            raise InputError(f"the grammar cannot be followed: {trial_worker.told(self._begun.get_error())}")

    @property
    def size(self) -> int:
        """V."""
        return self._vocabulary.size

    @property
    def ends(self) -> tuple[int, ...]:
        """See the class."""
        return self._ends

    def matcher(self) -> "Matcher":
        """One at the beginning of a text."""
        return Matcher(self, self._begun.deep_copy(), self._vocabulary, self._ends)


class Matcher:
    """How far one output has come. Not safe for threads.

    Attributes:
        error: why it cannot go on; None while it can. A limit of `trial_worker.PARSER` was passed, or a token did not fit.
    """

    def __init__(self, grammar: Grammar, walk: Any, vocabulary: Vocabulary, ends: tuple[int, ...]) -> None:
        # Whose memory it uses: that counts as long.
        self._grammar = grammar
        self.error: str | None = None
        self._walk, self._vocabulary = walk, vocabulary
        self._ends, self._end_set = list(ends), frozenset(ends)
        self._has_ended = False

    def allowed_V(self) -> NDArray[np.bool_]:
        """The tokens that may come next, a new array; none where there is an `error`, and after an end-of-text token only those."""
        size = self._vocabulary.size
        if self._has_ended:
            mask_V, is_final = np.zeros(size, dtype=np.bool_), True
        else:
            bits = np.unpackbits(np.frombuffer(self._walk.compute_bitmask(), dtype=np.uint8), bitorder="little")
            mask_V, is_final = bits[:size].view(np.bool_), bool(bits[self._vocabulary.end])
            self._look()
        if self.error is not None:
            return np.zeros(size, dtype=np.bool_)
        mask_V[self._ends] = is_final
        return mask_V

    def take(self, token: int) -> bool:
        """Go on with ``token``; False, and an `error`, if it may not follow."""
        if self.error is not None:
            return False
        if token in self._end_set:
            fits = self._has_ended = self.is_final
        else:
            fits = (
                not self._has_ended
                and 0 <= token < self._vocabulary.size
                and self._walk.try_consume_tokens([token]) == 1
            )
        self._look()
        if not fits and self.error is None:
            self.error = f"token {token} does not fit the request's grammar"
        return fits

    @property
    def is_final(self) -> bool:
        """Whether the text may end here."""
        return self._has_ended or (self.error is None and bool(self._walk.is_accepting()))

    def _look(self) -> None:
        """See whether llguidance has given up."""
        if self._walk.is_error():
            told = trial_worker.told(self._walk.get_error())
            self.error = f"the request's grammar cannot be followed any further: {told}"
