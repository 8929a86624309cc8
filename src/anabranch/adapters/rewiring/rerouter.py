"""`Rerouter`: generation in turns of fitting routers to the text so far (phase 1) and decoding with them (phase 2)."""
# Shapes: B rows, L positions, E destinations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anabranch.adapters.by_row import check_told, told_keys
from anabranch.adapters.rewiring.phase import Clock, fit
from anabranch.adapters.rewiring.prefill import Prefill
from anabranch.adapters.rewiring.scored import Scored, score
from anabranch.adapters.rewiring.state import Phase, RewiringState
from anabranch.adapters.rewiring.told_state import fingerprint_of, state_from_told, told_state
from anabranch.adapters.rewiring.vectors import Texts, Vectors, routed_layers, router_of, run
from anabranch.errors import CapacityError, ConfigError
from anabranch.lm.cache import KeyValueCache
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import SamplingConfig, Step, check_prompts, evaluating, pad_left, sample
from anabranch.rewiring import Rewiring
from anabranch.routing.context import RoutingContext
from anabranch.routing.layer_overrides import overriding
from anabranch.routing.override import Override

__all__ = ["Rerouter"]

# Positions that are reserved at least where keys and values can be computed again.
_LEAST_ROOM = 256
# Of keys and values that stay.
_MOST_BYTES = 16 * 2**30


class Rerouter:
    """Turns the routers of ``model`` to each text, request by request. The model itself is never changed.

    Args:
        model: a decoder with routed layers, whatever they are: its own, or read from OLMoE, Mixtral, Qwen-MoE, DeepSeek.
        config: how.

    Raises ConfigError for a model without routers of experts.
    """

    def __init__(self, model: Decoder, config: Rewiring | None = None) -> None:
        self.model, self.config = model, config or Rewiring()
        self.layers = routed_layers(model)

    @property
    def names(self) -> tuple[str, ...]:
        """Routers, as vectors stand for them in order; one that routes several times has an entry for each of its passes."""
        return tuple(layer.name for layer in self.layers)

    @cached_property
    def fingerprint(self) -> str:
        """Of the routers, to which vectors are added; as they were when it was first asked for. See `told_state`."""
        return fingerprint_of(self.layers)

    def told_state(self, state: RewiringState) -> dict[str, Any]:
        """``state`` as JSON: the vectors, L lists of E numbers, what they cost, and which routers they are of."""
        return told_state(self, state)

    def state_from_told(self, found: Any) -> RewiringState:
        """What `told_state` told, wherever it came from, for a request that goes on with it (`RewiringState.go_on`).

        Raises ConfigError for what is no such state, is of another model, or has a number that is not finite or beyond 10,000.
        """
        return state_from_told(self, found)

    def new_state(self) -> RewiringState:
        """Of a request that begins: vectors of zeros."""
        dtype = torch.promote_types(self.model.embedding.weight.dtype, torch.float32)
        return RewiringState([torch.zeros(router_of(layer).num_destinations, dtype=dtype) for layer in self.layers])

    def adapt(
        self,
        contexts: Sequence[Sequence[int]],
        states: Sequence[RewiringState],
        *,
        clock: Clock = time.perf_counter,
        config: Rewiring | None = None,
    ) -> list[Phase]:
        """One phase 1 of each context, together; ``states`` go on. Gives the reports.

        ``clock`` tells seconds, and is asked before each step. What it raises ends the phase, and leaves the states as they were.
        ``config`` is for these alone, None for the rerouter's own.

        Raises ConfigError for another number of states than contexts, one state named twice, a state of another model, an empty context
        or ids outside the vocabulary, for a model through whose experts no gradient comes, and in a block that tells rows of the model
        other than one query or task for each context, or one for all.
        """
        return self._adapt(contexts, states, Texts.all(len(contexts)), clock=clock, config=config)

    def _adapt(
        self,
        contexts: Sequence[Sequence[int]],
        states: Sequence[RewiringState],
        texts: Texts,
        prefill: Prefill | None = None,
        clock: Clock = time.perf_counter,
        config: Rewiring | None = None,
    ) -> list[Phase]:
        self._check(contexts, states)
        if not contexts:
            return []
        check_told(self.model, texts.total, "a rerouter")
        return fit(
            self.model, self.layers, config or self.config, contexts, states, clock, texts=texts, prefill=prefill
        )

    @contextmanager
    def attached(self, state: RewiringState) -> Iterator[None]:
        """Every forward pass of the model in the block has the vectors of ``state``, in all its rows.

        For scoring and evaluation; behind the block the model is what it was.
        """
        self._check([[0]], [state])
        delta = dict(zip([(layer.router, layer.pass_index) for layer in self.layers], state.delta, strict=True))
        with overriding(self.model, _InAllRows(delta, {layer.router: layer.num_passes for layer in self.layers})):
            yield

    def score(self, token_BL: Tensor, *, first: int | None = None) -> Scored:
        """What each token of texts of one length costs while routers are turned to them, beside the model as it is.

        Each is foretold with vectors that were fitted to what stands before it: the phases are those of generation, behind the ``first``
        tokens and then each ``interval``; with ``cache`` ``keep`` keys and values are those of the old vectors, as there.

        Args:
            token_BL: int64 ``[B, L]``; each text begins anew.
            first: tokens that are read before the first phase; None for the interval, and where there is none for half of the text.

        Raises ConfigError as `adapt`, for a model that is not causal, and where no token is left to measure.
        """
        check_prompts(self.model, token_BL.tolist())
        self.model.check_causal()
        return score(self, token_BL, first)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | None = None,
        *,
        states: Sequence[RewiringState] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt; returns the new tokens of each. See `stream`."""
        results: list[list[int]] = [[] for _ in prompts]
        for step in self.stream(prompts, sampling, states=states):
            for row, token in zip(step.rows, step.tokens, strict=True):
                results[row].append(token)
        return results

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | None = None,
        *,
        states: Sequence[RewiringState] | None = None,
    ) -> Iterator[Step]:
        """As `anabranch.lm.stream`, with the two phases: new tokens as they come. Sequences that stop leave the batch.

        Args:
            prompts: token ids. Equal ones (sampled chains) whose states are new, and that are told the same, are fitted once, and go on
                each for itself.
            sampling: how tokens are chosen.
            states: of the requests, which go on; new ones where a conversation begins. They hold the reports afterwards.

        Raises ConfigError as `adapt`, and for a model that cannot generate.
        """
        sampling = sampling or SamplingConfig()
        states = [self.new_state() for _ in prompts] if states is None else list(states)
        self._check(prompts, states)
        check_told(self.model, len(prompts), "a rerouter")
        self.model.check_causal()
        steps = self._steps([list(prompt) for prompt in prompts], states, sampling)
        while True:
            # Between steps the model is as it was: another stream of it may run, or end.
            with evaluating(self.model):
                step = next(steps, None)
            if step is None:
                return
            yield step

    def _steps(self, texts: list[list[int]], states: list[RewiringState], sampling: SamplingConfig) -> Iterator[Step]:
        device, interval = self.model.embedding.weight.device, self.config.interval
        generator = torch.Generator(device=device).manual_seed(sampling.seed)
        rows, decoding, total = list(range(len(texts))), _Decoding(self), len(texts)
        for number in range(sampling.max_tokens if texts else 0):
            going, left = [states[row] for row in rows], sampling.max_tokens - number
            those = Texts(tuple(rows), total)
            if number == 0 or (interval is not None and number % interval == 0):
                so_far = [texts[row] for row in rows]
                if number == 0 and self.config.cache == "keep":
                    # Their keys and values are those of the vectors of before.
                    decoding.begin([text[:-1] for text in so_far], going, left + 1, those)
                prefill = Prefill() if self.config.cache == "recompute" else None
                if self._adapt_once(so_far, going, those, prefill) and self.config.cache == "recompute":
                    decoding.forget()
                decoding.go_on_from(prefill, left)
            logits_BV = decoding.next([texts[row] for row in rows], going, left, those)
            next_B = sample(logits_BV, sampling, generator)
            on = [token not in sampling.stop for token in next_B.tolist()]
            if not all(on):
                keep_B = torch.tensor(on, device=device)
                next_B, rows = next_B[keep_B], [row for row, stays in zip(rows, on, strict=True) if stays]
                decoding.keep_rows(keep_B)
            if not rows:
                return
            for row, token in zip(rows, next_B.tolist(), strict=True):
                texts[row].append(token)
            yield Step(list(rows), next_B.tolist())

    def _adapt_once(
        self,
        texts: Sequence[Sequence[int]],
        states: Sequence[RewiringState],
        those: Texts,
        prefill: Prefill | None = None,
    ) -> bool:
        """`adapt`, of chains that begin alike once. Gives whether a vector has changed."""
        first: dict[object, int] = {}
        like = []
        check_told(self.model, those.total, "a rerouter")
        told = told_keys(self.model, those.total)
        for row, (text, state) in enumerate(zip(texts, states, strict=True)):
            is_new = not state.phases and not state.steps and state.is_zero
            like.append(first.setdefault((tuple(text), told[those.rows[row]]) if is_new else row, row))
        own = sorted(set(like))
        before = [state.delta for state in states]
        self._adapt([texts[row] for row in own], [states[row] for row in own], those.of(own), prefill)
        if prefill is not None:
            prefill.spread([own.index(source) for source in like])
        for row, source in enumerate(like):
            if row != source:
                states[row].__dict__.update(vars(states[source].copy()))
        return any(
            not torch.equal(old_E, new_E)
            for old, state in zip(before, states, strict=True)
            for old_E, new_E in zip(old, state.delta, strict=True)
        )

    def _check(self, contexts: Sequence[Sequence[int]], states: Sequence[RewiringState]) -> None:
        if len(contexts) != len(states):
            raise ConfigError(f"there are {len(contexts)} contexts and {len(states)} states; give one for each")
        if len({id(state) for state in states}) < len(states):
            raise ConfigError("two requests have one state; give each its own (RewiringState.copy)")
        check_prompts(self.model, contexts)
        wanted = [(router_of(layer).num_destinations,) for layer in self.layers]
        for number, state in enumerate(states):
            given = [tuple(delta_E.shape) for delta_E in state.delta]
            if given != wanted:
                raise ConfigError(f"state {number} has vectors of shapes {given}, but the model needs {wanted}")


class _Decoding:
    """Phase 2: decoding with a cache, with the vectors of each row."""

    def __init__(self, rerouter: Rerouter) -> None:
        self._model, self._layers = rerouter.model, rerouter.layers
        self._keeps = rerouter.config.cache == "keep"
        self._cache: KeyValueCache | None = None
        # Logits of what comes next, where a phase 1 has computed them.
        self._next_BV: Tensor | None = None

    @torch.no_grad()
    def begin(self, texts: Sequence[Sequence[int]], states: Sequence[RewiringState], room: int, those: Texts) -> None:
        """Fill a new cache with ``texts``, for ``room`` tokens more."""
        if any(texts):
            self._run(texts, states, room, those)

    @torch.no_grad()
    def next(self, texts: Sequence[Sequence[int]], states: Sequence[RewiringState], room: int, those: Texts) -> Tensor:
        """logits_BV behind ``texts``, of which the cache has all but the last token, or which it is made of."""
        if self._next_BV is not None:
            logits_BV, self._next_BV = self._next_BV, None
            return logits_BV
        if self._cache is not None and self._cache.length == self._cache.max_length:
            self.forget()
        return self._run(texts if self._cache is None else [text[-1:] for text in texts], states, room, those)

    def forget(self) -> None:
        """What was computed before is of other vectors."""
        self._cache = self._next_BV = None

    def go_on_from(self, prefill: Prefill | None, room: int) -> None:
        """Take over what a phase 1 has computed of the texts, for ``room`` tokens more, unless what is there is still of its vectors."""
        if prefill is None or prefill.cache is None or prefill.logits_BV is None or self._cache is not None:
            return
        self._cache, self._next_BV = prefill.cache, prefill.logits_BV
        length = self._cache.length
        self._cache.grow(length + self._room(len(self._next_BV), length, room))

    def keep_rows(self, keep_B: Tensor) -> None:
        """Sequences that stopped leave."""
        if self._cache is not None:
            self._cache.keep_rows(keep_B)

    def _room(self, batch: int, length: int, room: int) -> int:
        """Positions to reserve behind ``length``, of ``room`` that may come. Raises CapacityError for more than can be kept."""
        if not self._keeps:
            # What does not fit is computed again with twice the room: no more is reserved than texts come to.
            return min(room, max(length, _LEAST_ROOM))
        config = self._model.config
        parts = [config.attention_of(layer) for layer in range(config.num_layers)]
        each = sum(part.kv_heads * sum(part.kept(config.dim)) for part in parts) * 4 * batch
        wanted = each * (length + room)
        if wanted > _MOST_BYTES:
            raise CapacityError(
                f"keys and values of {length + room} positions would take {wanted} bytes, above {_MOST_BYTES}; ask for fewer tokens, or "
                "use cache='recompute'"
            )
        return room

    def _run(self, texts: Sequence[Sequence[int]], states: Sequence[RewiringState], room: int, those: Texts) -> Tensor:
        device = self._model.embedding.weight.device
        token_BL, mask_BL = pad_left(texts, device)
        if self._cache is None:
            self._cache = self._model.new_cache(token_BL.shape[1] + self._room(len(texts), token_BL.shape[1], room))
        delta = [torch.stack(of_layer).to(device) for of_layer in zip(*(state.delta for state in states), strict=True)]
        vectors = Vectors(self._layers, delta, token_BL.shape[1])
        return run(self._model, token_BL, mask_BL, vectors, those, cache=self._cache, last=1)[:, -1]


class _InAllRows:
    """One request's vectors, of every row."""

    def __init__(self, delta: dict[tuple[torch.nn.Module, int], Tensor], passes: dict[torch.nn.Module, int]) -> None:
        self._delta, self._passes = delta, passes

    def of(self, router: torch.nn.Module, visit: int, x_ND: Tensor, context: RoutingContext) -> Override | None:
        """See `Overrides`."""
        if router not in self._passes:
            return None
        return Override(logit_NE=self._delta[router, visit % self._passes[router]])
