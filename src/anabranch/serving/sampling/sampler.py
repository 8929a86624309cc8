"""`Sampler`: the tokens of one step's rows, each by its request's `Sampling`.

In order: repetition, frequency and presence penalties; logit bias; stop tokens held back by ``min_tokens`` and the grammar's mask;
temperature; top-k, top-p and min-p (`anabranch.lm.distribution`); one draw by the request's own random numbers. Log probabilities
that a client asks for are the model's own, the log-softmax of the logits before all of that and not divided by the temperature, as
OpenAI's are.
"""
# Shapes: R rows, S rows that are not plain greedy, V vocabulary

import logging
import math
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import AnabranchError, InputError
from anabranch.lm.distribution import cut, invert, temper
from anabranch.serving.core.batch import Sampled
from anabranch.serving.core.request import Request, Sampling, TokenLogprob
from anabranch.serving.grammar import Grammar, GrammarStore
from anabranch.serving.sampling.adjust import adjust
from anabranch.serving.sampling.logprobs import logprobs, not_numbers
from anabranch.serving.sampling.state import SequenceState

__all__ = ["Sampler"]

logger = logging.getLogger(__name__)
Chosen = tuple[int, str | None, TokenLogprob | None]  # a token, or why there is none; its log probability where asked


class Sampler:
    """Chooses tokens; remembers what each request needs for it.

    Args:
        vocab_size: V of the model's logits; the tokenizer's may be smaller.
        stop_tokens: the model's own end-of-text tokens.
        tokenizer: for grammars; without one a request with a grammar is refused.
        is_tried: see `GrammarStore`.
        seed: of the seeds of requests that bring none; None draws it.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        stop_tokens: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
        seed: int | None = None,
        is_tried: bool = False,
    ) -> None:
        self.vocab_size = vocab_size
        self.stop_tokens = tuple(token for token in stop_tokens if token < vocab_size)
        self._seeds = np.random.default_rng(seed)
        self._states: dict[str, SequenceState] = {}
        self.grammars = GrammarStore(tokenizer, self.stop_tokens, is_tried=is_tried)

    def check(self, sampling: Sampling) -> None:
        """Raises InputError for what can never be sampled, such as a token outside the vocabulary; of a grammar `prepare` tells."""
        tokens = {
            "logit_bias": [token for token, _ in sampling.logit_bias],
            "stop_tokens": list(sampling.stop_tokens),
        }
        for name, named in tokens.items():
            if outside := [token for token in named if not 0 <= token < self.vocab_size]:
                raise InputError(f"{name} names token {outside[0]}; tokens are 0 to {self.vocab_size - 1}")

    def prepare(self, request: Request) -> "Future[Grammar] | None":
        """The grammar of a request, see `GrammarStore.prepare`; None if it has none. While it is held, `add` has it at once."""
        form = request.sampling.grammar
        return None if form is None else self.grammars.prepare(form, request.key)

    def warm_up(self) -> None:
        """Do now what would hold up the first who sends a grammar, and everybody with them."""
        self.grammars.warm_up()

    def close(self) -> None:
        """Free threads."""
        self.grammars.close()

    def add(self, request: Request, output: Sequence[int] = ()) -> None:
        """Set a request up. ``output``: tokens it was given before, elsewhere or by another sampler; it goes on as if by this one.

        Never raises: one request must not fail the step of the others. What `check` refuses gives rows with `Sampled.error`.
        """
        seed = int(self._seeds.integers(2**63))
        error, compiled = None, None
        try:
            self.check(request.sampling)
            compiled = None if request.sampling.grammar is None else self.grammars.get(request.sampling.grammar)
        except AnabranchError as refused:
            error = str(refused)
        state = SequenceState(
            request, seed=seed, ends=self.stop_tokens, grammar=compiled, text_of=self.grammars.bytes_of
        )
        state.error = error
        for token in output:
            state.took(token)
        self._states[request.id] = state

    def forget(self, id: str) -> None:
        """Drop a request; an unknown one is left alone."""
        self._states.pop(id, None)

    def __contains__(self, id: object) -> bool:
        return id in self._states

    @torch.inference_mode()
    def __call__(self, logits_RV: Tensor, ids: Sequence[str]) -> list[Sampled]:
        """The next token of each row's request, which must have been added. The tokens count as taken.

        A row whose logits are NaN or infinite, or that no token may follow, gets `Sampled.error` (and token 0), the others theirs.
        """
        states = [self._states[id] for id in ids]
        if not states:
            return []
        best_R, token_R = logits_RV.max(-1)
        tokens, errors = token_R.tolist(), _broken(best_R, states)
        others = [row for row, state in enumerate(states) if not state.is_plain and errors[row] is None]
        told: dict[int, Any] = {}
        if others:
            for row, (token, error, logprob) in zip(others, self._apart(logits_RV, others, states), strict=True):
                tokens[row], errors[row], told[row] = token, error, logprob
        result = []
        for row, (id, state, token, error) in enumerate(zip(ids, states, tokens, errors, strict=True)):
            if error is not None:
                result.append(Sampled(id=id, token=0, error=error))
                continue
            if state.is_plain:
                state.index += 1
            else:
                state.took(token)
            result.append(Sampled(id=id, token=token, logprob=told.get(row)))
        return result

    def _apart(self, logits_RV: Tensor, rows: list[int], states: list[SequenceState]) -> list[Chosen]:
        """What is chosen for ``rows``, together, or where that raises one by one: what a row raises is its own error."""
        try:
            chosen, errors = self._choose(logits_RV, rows, states)
            told = self._tell(logits_RV, rows, states, chosen, errors)
            return list(zip(chosen, errors, told, strict=True))
        except Exception as error:
            if len(rows) == 1:
                logger.exception("a row could not be sampled")
                return [(0, f"it could not be sampled: {type(error).__name__}: {error}", None)]
        return [chosen for row in rows for chosen in self._apart(logits_RV, [row], states)]

    def _choose(
        self, logits_RV: Tensor, rows: list[int], states: list[SequenceState]
    ) -> tuple[list[int], list[str | None]]:
        """Tokens and errors of ``rows``, those that are not plain greedy."""
        some = [states[row] for row in rows]
        place = torch.tensor(rows, device=logits_RV.device)
        logits_SV = adjust(logits_RV[place].float(), some)
        best_S, token_S = logits_SV.max(-1)
        nothing = (best_S == -math.inf).tolist()
        errors = [
            state.error or ("no token is allowed: the grammar or logit_bias leaves none" if none else None)
            for state, none in zip(some, nothing, strict=True)
        ]
        drawing = [at for at, state in enumerate(some) if state.sampling.temperature > 0 and errors[at] is None]
        if drawing:
            at_D = torch.tensor(drawing, device=logits_RV.device)
            token_S[at_D] = _draw(
                logits_SV if len(drawing) == len(some) else logits_SV[at_D], [some[at] for at in drawing]
            )
        return token_S.tolist(), errors

    def _tell(
        self,
        logits_RV: Tensor,
        rows: list[int],
        states: list[SequenceState],
        chosen: list[int],
        errors: list[str | None],
    ) -> list[TokenLogprob | None]:
        """The log probabilities of the tokens ``chosen`` for ``rows``, of those that ask for it."""
        asked = [at for at, row in enumerate(rows) if states[row].sampling.logprobs is not None and errors[at] is None]
        told: list[TokenLogprob | None] = [None] * len(rows)
        if asked:
            tops = [states[rows[at]].sampling.logprobs or 0 for at in asked]
            place = torch.tensor([rows[at] for at in asked], device=logits_RV.device)
            for at, found in zip(asked, logprobs(logits_RV[place], [chosen[at] for at in asked], tops), strict=True):
                told[at] = found
        return told


def _broken(best_R: Tensor, states: list[SequenceState]) -> list[str | None]:
    """An error for each row that cannot be sampled."""
    return [
        state.error if state.error is not None else not_numbers(best)
        for best, state in zip(best_R.tolist(), states, strict=True)
    ]


def _draw(logits_DV: Tensor, states: list[SequenceState]) -> Tensor:
    """token_D of rows that sample, one random number each."""
    device = logits_DV.device

    def column(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    settings = [state.sampling for state in states]
    probability_DV = cut(
        temper(logits_DV, column([sampling.temperature for sampling in settings], torch.float32)),
        top_k_R=column([sampling.top_k for sampling in settings], torch.int64),
        top_p_R=column([sampling.top_p for sampling in settings], torch.float32),
        min_p_R=column([sampling.min_p for sampling in settings], torch.float32),
    )
    return invert(probability_DV, column([state.uniforms[state.index] for state in states], torch.float64))
