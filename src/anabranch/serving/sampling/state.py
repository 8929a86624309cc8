"""What the sampler remembers of one request: its random numbers, the tokens so far, the additions to its logits, its grammar."""
# Shapes: N different tokens of a request, V vocabulary

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from anabranch.serving.core.request import Request
from anabranch.serving.grammar import Grammar, Matcher
from anabranch.serving.sampling.preamble import PreambledMatcher
from anabranch.serving.sampling.uniform import Uniforms

__all__ = ["SequenceState", "TokenCounts"]


class TokenCounts:
    """How often each token of a sequence was generated, as arrays that grow; tokens of the prompt alone count 0.

    Attributes:
        tokens_N: the different tokens, in order of appearance; count_N: times generated.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        first = list(dict.fromkeys(prompt))
        self._place = {token: place for place, token in enumerate(first)}
        self._tokens = np.array(first, dtype=np.int64)
        self._count = np.zeros(len(first), dtype=np.int64)
        self._size = len(first)

    @property
    def tokens_N(self) -> NDArray[np.int64]:
        """See the class."""
        return self._tokens[: self._size]

    @property
    def count_N(self) -> NDArray[np.int64]:
        """See the class."""
        return self._count[: self._size]

    def add(self, token: int) -> None:
        """One more of ``token`` was generated."""
        place = self._place.setdefault(token, self._size)
        if place == self._size:
            if self._size == len(self._tokens):
                more = np.zeros(max(16, self._size), dtype=np.int64)
                self._tokens, self._count = np.concatenate([self._tokens, more]), np.concatenate([self._count, more])
            self._tokens[place] = token
            self._size += 1
        self._count[place] += 1


class SequenceState:
    """One request under way.

    Args:
        request: whose.
        seed: for a request without one of its own.
        ends: the model's own end-of-text tokens.
        grammar: compiled from the request's, or None.
        text_of: the bytes of a token, for `Sampling.preamble`.
    """

    def __init__(
        self,
        request: Request,
        *,
        seed: int,
        ends: tuple[int, ...],
        grammar: Grammar | None,
        text_of: Callable[[int], bytes] = lambda token: b"",
    ) -> None:
        sampling = request.sampling
        self.sampling = sampling
        # Tokens sampled so far.
        self.index = 0
        self.error: str | None = None
        self.uniforms = Uniforms(seed if sampling.seed is None else sampling.seed)
        self.counts = TokenCounts(request.prompt) if self.has_penalty else None
        self.bias_tokens = np.array([token for token, _ in sampling.logit_bias], dtype=np.int64)
        self.bias = np.array([value for _, value in sampling.logit_bias], dtype=np.float32)
        own = sampling.stop_tokens if sampling.ignore_eos else (*sampling.stop_tokens, *ends)
        self.stops = np.array(sorted(set(own)), dtype=np.int64)
        self.matcher: Matcher | PreambledMatcher | None = None
        if grammar is not None:
            preamble = sampling.preamble
            self.matcher = grammar.matcher() if preamble is None else PreambledMatcher(grammar, preamble, text_of)
        self.is_plain = (
            sampling.temperature == 0
            and sampling.min_tokens == 0
            and not self.has_penalty
            and not sampling.logit_bias
            and grammar is None
            and sampling.logprobs is None
        )

    @property
    def has_penalty(self) -> bool:
        """Whether earlier tokens change the logits."""
        sampling = self.sampling
        return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1)

    @property
    def holds_stops(self) -> bool:
        """Whether stop tokens may not be taken yet."""
        return self.index < self.sampling.min_tokens and len(self.stops) > 0

    def took(self, token: int) -> None:
        """``token`` was sampled."""
        self.index += 1
        if self.counts is not None:
            self.counts.add(token)
        if self.matcher is not None and self.error is None and not self.matcher.take(token):
            self.error = self.matcher.error

    def allowed_V(self) -> NDArray[np.bool_] | None:
        """The tokens that the grammar, and with it ``min_tokens``, allows; None without a grammar."""
        if self.matcher is None:
            return None
        mask_V = self.matcher.allowed_V()
        self.error = self.error or self.matcher.error
        if self.holds_stops:
            longer_V = mask_V.copy()
            longer_V[self.stops[self.stops < len(longer_V)]] = False
            # An output that is complete and cannot go on ends, however short.
            mask_V = longer_V if longer_V.any() else mask_V
        return mask_V
