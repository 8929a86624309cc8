"""Phase 1: vectors of a batch of requests are fitted to their contexts, and what that changed is measured.

    CE(delta) = -1/(T-1) sum_t log P(c_t+1 | c_1..c_t; delta)          mean over a row; the sum over rows keeps gradients apart

Gradients reach delta through the weights of the experts that are chosen; who is chosen is not differentiated. No weight of the model
gets a gradient, or is asked for one.
"""
# Shapes: B rows, L positions, S routed layers, E destinations, C candidates

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anabranch.adapters.rewiring.measure import confidence, difference, row_means, token_losses
from anabranch.adapters.rewiring.prefill import Prefill
from anabranch.adapters.rewiring.prefix import Prefix
from anabranch.adapters.rewiring.state import Phase, RewiringState
from anabranch.adapters.rewiring.step import Optimizer, layer_weights
from anabranch.adapters.rewiring.vectors import Seen, Texts, Vectors, Watch, has_gradient, is_shift_free, router_of, run
from anabranch.errors import ConfigError
from anabranch.lm.cache import KeyValueCache
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import evaluating, pad_left
from anabranch.rewiring import Rewiring
from anabranch.routing.discovery import RouterLayer

Clock = Callable[[], float]


def fit(
    model: Decoder,
    layers: Sequence[RouterLayer],
    config: Rewiring,
    contexts: Sequence[Sequence[int]],
    states: Sequence[RewiringState],
    clock: Clock = time.perf_counter,
    texts: Texts | None = None,
    prefill: Prefill | None = None,
) -> list[Phase]:
    """One phase 1 of each request: its ``states`` go on, each with a report more, which is given too.

    ``texts`` say which of those that were told something the contexts are; None for each in turn. ``prefill`` is given the keys and values
    of the last pass, where that ran all contexts whole.

    Raises ConfigError for a model through whose experts no gradient comes, or that was made in inference mode.
    """
    begun = clock()
    texts = Texts.all(len(contexts)) if texts is None else texts
    if model.embedding.weight.is_inference():
        raise ConfigError(
            "the model was made in inference mode, so nothing can be differentiated through it; load it outside"
        )
    if config.window is not None:
        if any(len(context) > config.window for context in contexts):
            prefill = None
        contexts = [context[-config.window :] for context in contexts]
    reports = [
        Phase(length=len(context), skipped=_why_not(config, len(context), state))
        for context, state in zip(contexts, states, strict=True)
    ]
    going = [row for row, report in enumerate(reports) if report.skipped is None]
    if going:
        own_contexts, own = [contexts[row] for row in going], [states[row] for row in going]
        with _frozen(model, config.checkpointing):
            told = prefill if len(going) == len(contexts) else None
            batch = _Batch(model, layers, config, own_contexts, own, texts.of(going), begun, clock, told)
            done = batch.fitted()
        seconds = clock() - begun
        for row, report in zip(going, done, strict=True):
            reports[row] = replace(report, seconds=seconds)
            states[row].spend(seconds=seconds)
    for report, state in zip(reports, states, strict=True):
        state.phases.append(replace(report, norms=tuple(float(delta_E.norm()) for delta_E in state.delta)))
    return [state.phases[-1] for state in states]


def _why_not(config: Rewiring, length: int, state: RewiringState) -> str | None:
    if length < 2:
        return f"a context of {length} token has nothing to predict; it needs at least 2"
    if length - config.held_back(length) < 2:
        return f"a context of {length} tokens is too short for the guard, which holds back {config.held_back(length)} and needs 2 to fit"
    if config.most_steps is not None and state.own_steps >= config.most_steps:
        return f"the request has taken its {config.most_steps} steps (most_steps)"
    if config.most_seconds is not None and state.own_seconds >= config.most_seconds:
        return f"the request has spent its {config.most_seconds:g} seconds (most_seconds)"
    return None


@contextmanager
def _frozen(model: Decoder, checkpointing: bool) -> Iterator[None]:
    """The model as for generation, whose weights want no gradients; afterwards all is as it was."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recomputed = model.recompute
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        model.recompute = checkpointing
        # Whoever generates may be in inference mode, in which nothing is differentiated.
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        model.recompute = recomputed
        for parameter in wanted:
            parameter.requires_grad_(True)


@dataclass
class _Taken:
    """How far the steps came: [B] each."""

    steps_B: Tensor
    skipped: list[str | None]


@dataclass
class _Read:
    """The last pass: nats ``[C, B, L - 1]``, decisions, logits behind the last tokens ``[C B, V]``, and keys and values if asked for."""

    loss_CBL: Tensor
    seen: list[Seen]
    logits_BV: Tensor
    cache: KeyValueCache | None


class _Batch:
    """The requests of one phase 1 that have something to fit."""

    def __init__(
        self,
        model: Decoder,
        layers: Sequence[RouterLayer],
        config: Rewiring,
        contexts: Sequence[Sequence[int]],
        states: Sequence[RewiringState],
        texts: Texts,
        begun: float,
        clock: Clock,
        prefill: Prefill | None = None,
    ) -> None:
        self.model, self.layers, self.config, self.states = model, layers, config, states
        self.texts, self.begun, self.clock, self.prefill = texts, begun, clock, prefill
        self.device = model.embedding.weight.device
        self.token_BL, self.mask_BL = pad_left(contexts, self.device)
        self.size, self.length = self.token_BL.shape
        self.lengths = [len(context) for context in contexts]
        self.tails = [config.held_back(length) for length in self.lengths]
        # Of the tokens that are predicted, at positions 1 and up.
        position_L = torch.arange(1, self.length, device=self.device)
        first_B, tail_B = (self.length - torch.tensor(many, device=self.device) for many in (self.lengths, self.tails))
        self.real_BL = position_L > first_B[:, None]
        self.tail_BL = position_L >= tail_B[:, None]
        # Nothing behind what is fitted need be run.
        self.run_length = self.length - min(self.tails)
        self.start = [
            torch.stack([state.delta[place] for state in states]).to(self.device) for place in range(len(layers))
        ]
        self.prefix = Prefix(model, layers)
        if self.prefix.is_there:
            told = self.texts.state(model, self.token_BL.shape[1])
            context = model.context(self.token_BL, token_mask_BL=self.mask_BL, state=told, cache=self._new_cache())
            self.prefix.keep(model, self.token_BL, context)
            if self.prefix.cache is not None and self.prefix.cache.state:
                # What a design keeps there of its own is of no other cache.
                self.prefill = None
        self.watch = Watch(layers)
        self.before: list[Seen] = []
        self.loss_before_B = torch.zeros(self.size)
        # Of each row the last with which the loss was a number.
        self.good = self.start

    def _new_cache(self) -> KeyValueCache | None:
        """For keys and values of the whole text; None where nobody wants them."""
        return None if self.prefill is None else self.model.new_cache(self.length)

    def fitted(self) -> list[Phase]:
        """Take the steps, choose what is kept of them, put it into the states."""
        new, taken = self._steps()
        if self.config.guard:
            reports, chosen = self._guarded(new)
        else:
            reports, chosen = self._unguarded(new)
        for row, state in enumerate(self.states):
            state.delta = [delta_BE[row].detach().cpu().clone() for delta_BE in chosen]
            state.spend(steps=int(taken.steps_B[row]))
        return [
            replace(
                report,
                length=self.lengths[row],
                fitted=self.lengths[row] - self.tails[row],
                steps=int(taken.steps_B[row]),
                skipped=taken.skipped[row],
            )
            for row, report in enumerate(reports)
        ]

    def _steps(self) -> tuple[list[Tensor], _Taken]:
        """The vectors behind the last step, of each layer: of a row that came to no number those before."""
        config, length = self.config, self.run_length
        counted_BL = (self.real_BL & ~self.tail_BL)[:, : length - 1]
        delta = [delta_BE.clone() for delta_BE in self.start]
        good = [delta_BE.clone() for delta_BE in self.start]
        optimizer = Optimizer(config, self.start, [is_shift_free(router_of(layer)) for layer in self.layers])
        size_B = torch.tensor([config.step_size(length) for length in self.lengths], device=self.device)
        weight_BS = torch.ones(self.size, len(self.layers), device=self.device)
        active_B = torch.ones(self.size, dtype=torch.bool, device=self.device)
        taken = _Taken(torch.zeros(self.size, dtype=torch.int64), [None] * self.size)
        for number in range(1, config.steps + 1):
            active_B = active_B & self._may_go_on(taken).to(self.device)
            if not bool(active_B.any()):
                break
            loss_B, gradient = self._gradient(delta, counted_BL, look=number == 1)
            if number == 1:
                weight_BS = layer_weights(config, confidence(self.before, self.size))
            finite_B = torch.isfinite(loss_B)
            for place, delta_BE in enumerate(delta):
                keep_B1 = (finite_B & active_B)[:, None]
                good[place] = torch.where(keep_B1, delta_BE, good[place])
            for gradient_BE in gradient:
                finite_B = finite_B & torch.isfinite(gradient_BE).all(-1)
            for row in (~finite_B & active_B).nonzero().flatten().tolist():
                taken.skipped[row] = (
                    f"the loss or its gradient is not finite at step {number}; the last vectors that were good are kept"
                )
            active_B = active_B & finite_B
            taken.steps_B += active_B.cpu()
            delta = optimizer.step(delta, gradient, active_B, size_B, weight_BS)
            # A row that ends for want of a number goes back; one that ends for want of time stays where it is.
            delta = [
                torch.where(finite_B[:, None], new_BE, good_BE) for new_BE, good_BE in zip(delta, good, strict=True)
            ]
        self.good = good
        return delta, taken

    def _may_go_on(self, taken: _Taken) -> Tensor:
        """bool ``[B]``: the requests that have steps and time left."""
        config, spent = self.config, self.clock() - self.begun
        allowed = []
        for row, state in enumerate(self.states):
            reason = None
            if config.most_steps is not None and state.own_steps + int(taken.steps_B[row]) >= config.most_steps:
                reason = f"the request has taken its {config.most_steps} steps (most_steps)"
            elif config.most_seconds is not None and state.own_seconds + spent >= config.most_seconds:
                reason = f"the request has spent its {config.most_seconds:g} seconds (most_seconds)"
            allowed.append(reason is None)
            taken.skipped[row] = taken.skipped[row] or reason
        return torch.tensor(allowed)

    def _gradient(self, delta: list[Tensor], counted_BL: Tensor, *, look: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss_B, gradients like ``delta``) of the part that is fitted."""
        leaves = [delta_BE.detach().requires_grad_() for delta_BE in delta]
        vectors = Vectors(self.layers, leaves, self.run_length)
        token_BL = self.token_BL[:, : self.run_length]
        mask_BL = None if self.mask_BL is None else self.mask_BL[:, : self.run_length]
        if look:
            with self.watch.seeing(vectors):
                logits_BLV = run(self.model, token_BL, mask_BL, vectors, self.texts, prefix=self.prefix)
            self.before = self.watch.seen
        else:
            logits_BLV = run(self.model, token_BL, mask_BL, vectors, self.texts, prefix=self.prefix)
        loss_BL = token_losses(logits_BLV, token_BL)
        loss_B = row_means(loss_BL, counted_BL)
        if look:
            self.loss_before_B = loss_B.detach()
        if not loss_B.requires_grad:
            raise ConfigError(
                "no gradient comes from the model's loss to its routers, so it cannot be rewired: what they choose is taken without a "
                "weight (as Duo-LLM's modules are)"
            )
        found = torch.autograd.grad(loss_B.sum(), leaves, allow_unused=True)
        return loss_B.detach(), tuple(
            torch.zeros_like(leaf_BE) if gradient_BE is None or not has_gradient(router_of(layer)) else gradient_BE
            for layer, leaf_BE, gradient_BE in zip(self.layers, leaves, found, strict=True)
        )

    @torch.no_grad()
    def _losses(self, candidates: Sequence[Sequence[Tensor]]) -> "_Read":
        """The whole context with each of C candidates, in one pass: rows of the first come first."""
        count = len(candidates)
        delta = [torch.cat(of_layer) for of_layer in zip(*candidates, strict=True)]
        vectors = Vectors(self.layers, delta, self.length)
        texts = self.texts.of(list(range(self.size)) * count)
        token_BL = self.token_BL.repeat(count, 1)
        mask_BL = None if self.mask_BL is None else self.mask_BL.repeat(count, 1)
        cache = self._new_cache()
        with self.watch.seeing(vectors):
            logits_BLV = run(self.model, token_BL, mask_BL, vectors, texts, prefix=self.prefix, cache=cache)
            loss_BL = token_losses(logits_BLV, token_BL)
        return _Read(loss_BL.view(count, self.size, -1), self.watch.seen, logits_BLV[:, -1].clone(), cache)

    def _hand_on(self, read: "_Read", best_B: Tensor) -> None:
        """Keys and values of the candidate that was chosen for each row."""
        if self.prefill is not None and read.cache is not None:
            row_B = best_B * self.size + torch.arange(self.size, device=self.device)
            self.prefill.take(read.cache, read.logits_BV, row_B, self.prefix)

    def _guarded(self, new: list[Tensor]) -> tuple[list[Phase], list[Tensor]]:
        """All, half or nothing of the change, or no vectors at all: what is best on the part that was held back."""
        half = [(old_BE + new_BE) / 2 for old_BE, new_BE in zip(self.start, new, strict=True)]
        candidates = [self.start, half, new]
        scales: list[float | None] = [0.0, 0.5, 1.0]
        if any(bool(start_BE.any()) for start_BE in self.start):
            candidates, scales = [*candidates, [torch.zeros_like(start_BE) for start_BE in self.start]], [*scales, None]
        read = self._losses(candidates)
        seen = read.seen
        loss_CB = torch.stack([row_means(loss_BL, self.real_BL) for loss_BL in read.loss_CBL])
        tail_CB = torch.stack([row_means(loss_BL, self.tail_BL) for loss_BL in read.loss_CBL])
        # The first of equals is the one that changes least.
        best_B = torch.where(torch.isfinite(tail_CB), tail_CB, torch.inf).argmin(0)
        reports = []
        for row, best in enumerate(best_B.tolist()):
            rows = row, best * self.size + row
            report = self._report(seen, seen, rows, loss_CB[0, row], loss_CB[best, row])
            before, after = float(tail_CB[0, row]), float(tail_CB[best, row])
            reports.append(replace(report, scale=scales[best], tail_before=before, tail_after=after))
        self._hand_on(read, best_B)
        all_CBE = [torch.stack(of_layer) for of_layer in zip(*candidates, strict=True)]
        row_B = torch.arange(self.size, device=self.device)
        return reports, [delta_CBE[best_B, row_B] for delta_CBE in all_CBE]

    def _unguarded(self, new: list[Tensor]) -> tuple[list[Phase], list[Tensor]]:
        """All of the change, unless it ends in no number."""
        read = self._losses([new])
        after_B = row_means(read.loss_CBL[0], self.real_BL)
        if not bool(torch.isfinite(after_B).all()):
            finite_B1 = torch.isfinite(after_B)[:, None]
            new = [torch.where(finite_B1, new_BE, good_BE) for new_BE, good_BE in zip(new, self.good, strict=True)]
            read = self._losses([new])
            after_B = row_means(read.loss_CBL[0], self.real_BL)
        self._hand_on(read, torch.zeros(self.size, dtype=torch.int64, device=self.device))
        # Where time was up before the first step nothing was looked at, and nothing has changed.
        before, before_B = (self.before, self.loss_before_B) if self.before else (read.seen, after_B)
        reports = [self._report(before, read.seen, (row, row), before_B[row], after_B[row]) for row in range(self.size)]
        return reports, new

    def _report(
        self, before: Sequence[Seen], after: Sequence[Seen], rows: tuple[int, int], old: Tensor, now: Tensor
    ) -> Phase:
        sizes = [router_of(layer).num_destinations for layer in self.layers]
        found = difference(before, after, rows, self.length, sizes)
        return Phase(0, loss_before=float(old), loss_after=float(now), **vars(found))
