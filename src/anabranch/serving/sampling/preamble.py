"""`PreambledMatcher`: a grammar that holds from the end of a preamble on, such as a model's reasoning; see `Preamble`."""
# Shapes: V vocabulary

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from anabranch.serving.core.request import Preamble
from anabranch.serving.grammar import Grammar

__all__ = ["PreambledMatcher"]

_LATE = "the token that ends the reasoning also begins the answer, so the request's grammar cannot hold for that"


class PreambledMatcher:
    """Like a `Matcher`, but free until the preamble has ended. The output cannot end within it.

    Attributes:
        error: see `Matcher`.

    Args:
        grammar: of what comes behind it.
        preamble: where it begins and ends.
        text_of: the bytes of a token.
    """

    def __init__(self, grammar: Grammar, preamble: Preamble, text_of: Callable[[int], bytes]) -> None:
        self._grammar, self._text_of = grammar, text_of
        self._open, self._close = preamble.open, [text.encode() for text in preamble.close]
        self._matcher = grammar.matcher()
        self._is_free = not preamble.open
        # Tokens of `Preamble.open` that were taken, where nothing else was.
        self._opened: int | None = 0 if preamble.open else None
        self._tail = b""
        self.error: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether the text may end here."""
        return not self._is_free and self._matcher.is_final

    def allowed_V(self) -> NDArray[np.bool_]:
        """The tokens that may come next, a new array; none where there is an `error`."""
        if self.error is not None:
            return np.zeros(self._grammar.size, dtype=np.bool_)
        if self._is_free:
            mask_V = np.ones(self._grammar.size, dtype=np.bool_)
            mask_V[list(self._grammar.ends)] = False
            return mask_V
        mask_V = self._matcher.allowed_V()
        if self._opened is None:
            self.error = self._matcher.error
        elif self._open[self._opened] < len(mask_V):
            mask_V[self._open[self._opened]] = True
        return mask_V

    def take(self, token: int) -> bool:
        """Go on with ``token``; False, and an `error`, if it may not follow."""
        if self.error is not None:
            return False
        if self._is_free:
            self._go_on(token)
            return self.error is None
        fits = self._matcher.take(token)
        if self._opened is not None:
            if token == self._open[self._opened]:
                self._opened += 1
                if self._opened == len(self._open):
                    # What was taken is no part of what the grammar is of.
                    self._matcher, self._is_free, self._opened = self._grammar.matcher(), True, None
                return True
            self._opened = None
        self.error = None if fits else self._matcher.error
        return fits

    def _go_on(self, token: int) -> None:
        text = self._tail + self._text_of(token)
        ends = [at + len(close) for close in self._close if (at := text.find(close)) >= 0]
        if not ends:
            self._tail = text[-max(map(len, self._close)) :]
            return
        self._is_free = False
        if text[min(ends) :].strip():
            self.error = _LATE
