"""`ModelRunner`: one step of a batch on a model, from tokens to sampled tokens."""
# Shapes: P streams, T tokens of a step, R rows that sample or score, V vocabulary, D width

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from anabranch.bounds import is_whole
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn.context import ForwardContext
from anabranch.nn.linear import takes_context
from anabranch.nn.visits import check_path
from anabranch.routing.override import Overrides
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.batch import PENDING, Batch, Chunk, Sampled
from anabranch.serving.core.hooks import OverrideHook, StepHook
from anabranch.serving.core.request import Request, Route, Sampling
from anabranch.serving.engine.any_path import AnyPath
from anabranch.serving.engine.depths import Depths
from anabranch.serving.engine.head import RowsOfPass, logits_of
from anabranch.serving.engine.isolate import Isolation
from anabranch.serving.engine.kinds import Kinds
from anabranch.serving.engine.layout import StepLayout
from anabranch.serving.engine.module_paths import ModulePaths
from anabranch.serving.engine.overrides import OverridesById, RequestOverrides
from anabranch.serving.engine.paged import PagedPool, ToldSlot
from anabranch.serving.engine.passes import Variant, passes_of
from anabranch.serving.engine.pool import Pooling
from anabranch.serving.engine.pruned import Ahead, PrunedPasses
from anabranch.serving.engine.record import RoutingTap
from anabranch.serving.engine.recorders import Told
from anabranch.serving.engine.score import score, scored_rows
from anabranch.serving.engine.served_adapters import ServedAdapters
from anabranch.serving.engine.skips import Skips
from anabranch.serving.engine.steady import steady
from anabranch.serving.engine.stores import Stores
from anabranch.serving.engine.variants import Variants
from anabranch.serving.engine.verify import sampled_rows, verify, without_drafts
from anabranch.serving.fast import FastDecoder, Watch
from anabranch.serving.sampling import Sampler

# An id that no request has.
_NOBODY = "\0"

# The pass of requests that run side by side, whatever their paths.
_ANY_PATH = "any path"

# Of the prompt that is run before the first request: a step's usual size, short enough to hold up no start.
WARM_TOKENS = 256


class TokenSampler(Protocol):
    """What chooses tokens; see `anabranch.serving.sampling.Sampler`."""

    def add(self, request: Request) -> None:
        """Set up a request."""

    def forget(self, id: str) -> None:
        """Drop what is kept of it."""

    def __call__(self, logits_RV: Tensor, ids: Sequence[str]) -> list[Sampled]:
        """One token for each row."""


class ModelRunner:
    """Runs the batches of a scheduler, one at a time and in order.

    Args:
        model: a decoder; it is put in evaluation mode.
        num_blocks: size of the key-value pool.
        block_tokens: tokens per block, the scheduler's.
        sampler: chooses tokens; None for one that knows neither the tokenizer nor the ends of text.
        hooks: see every step; those with ``override`` change single requests, see `OverrideHook`.
        host_blocks: blocks of main memory to swap to.
        pool: memory made elsewhere, instead of ``num_blocks``.
        use_kernel: False for plain torch: neither attention nor whole steps (`FastDecoder`) in compiled code.
        deterministic: results do not depend on what else is in a step, to the bit (`anabranch.serving.engine.steady`).
        num_streams: parallel streams of requests that do not say it; None for the model's number in use.
        max_depth: most blocks of a request's own path, see `ServingConfig`.
        takes_weights: the model is nobody else's, see `FastDecoder`.
        kinds: of its layers, by how far back they see, with memory for each; None for one kind that keeps all.

    Attributes:
        adapters: that requests may have; None for none.
        depths: depth routers, and the requests whose path they are to choose; None for none.
        skips: a skipper of tokens, and what it has decided about requests; None for none.

    Requests with adapters that the compiled step does not know run through the modules one by one, apart from the others of a step.

    While hooks listen inside the model (`record_routing` around an engine), and always with a hook that overrides requests, steps go
    through its modules one by one, as with ``use_kernel=False``. Of a request that is computed again after it was preempted, recorders are
    told each position once. In such steps nothing is guessed (`Chunk.drafts`): what listens is told of tokens, not of guesses.

    Raises ConfigError if a token's routing depends on later ones, as cached decoding cannot know them, and for a number of streams that the
    model cannot run with.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_blocks: int = 0,
        block_tokens: int = 16,
        sampler: TokenSampler | None = None,
        hooks: Sequence[StepHook] = (),
        host_blocks: int = 0,
        pool: PagedPool | None = None,
        use_kernel: bool = True,
        deterministic: bool = False,
        num_streams: int | None = None,
        max_depth: int | None = None,
        takes_weights: bool = False,
        kinds: Kinds | None = None,
    ) -> None:
        model.check_causal()
        self.model = model.eval()
        self.device = model.embedding.weight.device
        self.num_streams, _ = model.streams_of(num_streams)
        kinds = kinds or Kinds.whole(model, ServingConfig(max_depth=max_depth, block_tokens=block_tokens))
        first, *others = [kind.shape for kind in kinds.kinds]
        self.pool = pool or PagedPool(
            first,
            num_blocks,
            block_tokens=block_tokens,
            device=self.device,
            host_blocks=host_blocks,
        )
        count = kinds.second_blocks(num_blocks) or 0
        local = [PagedPool(shape, count, block_tokens=block_tokens, device=self.device) for shape in others]
        self.stores = Stores(kinds.kinds, [self.pool, *local], use_kernel=use_kernel, is_steady=deterministic)
        self.sampler: TokenSampler = sampler or Sampler(model.config.vocab_size)
        self.hooks, self.use_kernel, self.deterministic = tuple(hooks), use_kernel, deterministic
        overriding = [hook for hook in self.hooks if isinstance(hook, OverrideHook)]
        self._overrides = RequestOverrides(model, overriding, self.check_variant) if overriding else None
        # What hooks say of the step under way.
        self._said: OverridesById = {}
        # And of the pass under way.
        self._routing: list[Overrides] = []
        # Whose rows never depend on each other.
        self.fast: FastDecoder | None = None
        if use_kernel and not overriding and self.pool.shape.streams == 1 and FastDecoder.supports(self.model) is None:
            pool_ASGD = tuple(part[: model.config.num_layers, 0] for part in (self.pool.key, self.pool.value))
            self.fast = FastDecoder(
                self.model, *pool_ASGD, block_tokens=self.pool.block_tokens, takes_weights=takes_weights
            )
        self.adapters: ServedAdapters | None = None
        self.depths: Depths | None = None
        self.skips: Skips | None = None
        # Prompts that ran before their pieces were due, by id.
        self._ahead: dict[str, Ahead] = {}
        by_modules = None
        if not overriding and ModulePaths.supports(model):
            by_modules = ModulePaths(model, block_tokens, self._context)
        # What runs requests of different paths together; where it cannot, they take turns.
        self._any_path = AnyPath(len(model.blocks), self.fast, by_modules, self.pool, self.stores)
        self._pruned = PrunedPasses(model, self.fast, self.pool, self.stores, self._context, self._running)
        self.tap, self.watch = RoutingTap(model), Watch(model)
        # Requests that want to know where their tokens go.
        self._recorded: set[str] = set()
        # Of requests that want their prompts scored, see `Sampling.prompt_logprobs`.
        self._tops: dict[str, int] = {}
        self._pooling = Pooling()
        self._told = Told()
        # The newest token of each request, for chunks that carry `PENDING`.
        self._last: dict[str, int] = {}
        # Of the step under way, for a head that routes: the pass that ran last, and all with their rows.
        self._context_run: ForwardContext | None = None
        self._passes: list[RowsOfPass] = []
        # Of the pass under way: routes by row that routers beside matrices fill in.
        self._wanted: Mapping[int, Route] = {}
        self._isolation = Isolation(self._step, self._try_out)
        # Of what hooks say knows `RequestOverrides`.
        self._variants = Variants(self.num_streams, len(model.blocks))
        self._prefixes = {number: _prefixes(model, number) for number in model.config.stream_choices}

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled]:
        """One result for each chunk that samples or is scored, in order."""
        self._set_up(batch)
        if self._overrides is not None or self._is_watched:
            batch = without_drafts(batch)
        tokens = [
            self._last[chunk.id] if token == PENDING else token for chunk in batch.chunks for token in chunk.tokens
        ]
        for hook in self.hooks:
            hook.before_step(batch, tokens)
        refused: dict[str, Sampled] = {}
        if self._overrides is not None:
            self._said, refused = self._overrides.of(batch, tokens)
        sampled = self._isolation.run(batch.chunks, tokens) if batch.chunks else []
        sampled = [*(result for result in sampled if result.id not in refused), *refused.values()]
        self._said, self._routing = {}, []
        newest = [(result.later or (result,))[-1] for result in sampled]
        self._last.update((result.id, result.token) for result in newest if result.token != PENDING)
        for hook in self.hooks:
            hook.after_step(batch, sampled)
        return sampled

    def warm_up(self, tokens: int = WARM_TOKENS) -> None:
        """Run a request of nobody's before any other: a prompt, a token chosen, one more step.

        So kernels are made, threads are started and memory is touched, at the size of a real prompt. It writes the first blocks.

        Args:
            tokens: of the prompt and the one chosen, at least 2; fewer where there is no room for so many, of one the prompt alone.
        """
        room = min(self.stores.num_tokens, self.model.config.max_positions)
        length = min(max(tokens, 2), room)
        blocks = tuple(range(-(-length // self.pool.block_tokens)))
        parts = [(0, length - 1), (length - 1, 1)] if length > 1 else [(0, 1)]
        self._run_nobody(
            [
                Chunk(id=_NOBODY, tokens=(0,) * count, start=start, blocks=blocks, local=blocks, samples=True)
                for start, count in parts
            ]
        )
        if isinstance(self.sampler, Sampler):
            self.sampler.warm_up()

    def _try_out(self, chunk: Chunk) -> None:
        """Run a token of nobody's, in a block of ``chunk`` that is as it was afterwards. Raises whatever that raises."""
        with self.stores.lent(chunk, _NOBODY) as own:
            self._run_nobody([own])

    @torch.inference_mode()
    def _run_nobody(self, chunks: Sequence[Chunk]) -> None:
        """Steps of one chunk each, of a request that no scheduler has; nothing is left of it but what its blocks hold."""
        self.sampler.add(Request(id=_NOBODY, prompt=(0,), sampling=Sampling(max_tokens=len(chunks), temperature=0.0)))
        # Not for traces.
        self._told.hide(_NOBODY, max(chunk.start + len(chunk.tokens) for chunk in chunks))
        try:
            for chunk in chunks:
                self._step([chunk], chunk.tokens)
        finally:
            self.sampler.forget(_NOBODY)
            self._forget(_NOBODY)

    def close(self) -> None:
        """Tell the hooks that the engine ends."""
        for hook in self.hooks:
            hook.close()
        if self.adapters is not None:
            self.adapters.close()
        if isinstance(self.sampler, Sampler):
            self.sampler.close()

    def _set_up(self, batch: Batch) -> None:
        for id in batch.gone:
            self.sampler.forget(id)
            self._forget(id)
        for request in batch.new:
            self.sampler.add(request)
            if self._overrides is not None:
                self._overrides.add(request)
            if self.depths is not None:
                self.depths.add(request)
            if self.skips is not None:
                self.skips.add(request)
            is_open = self.skips is not None and self.skips.prompt_of(request.id) is not None
            self._variants.add(request, is_open=is_open)
            if request.record_routing:
                self._recorded.add(request.id)
            if request.sampling.prompt_logprobs is not None:
                self._tops[request.id] = request.sampling.prompt_logprobs
            if self.adapters is not None:
                self.adapters.add(request)
        # First, as what is saved may be overwritten at once.
        self.pool.swap_out(batch.swaps_out)
        self.pool.copy(batch.copies)
        self.pool.swap_in(batch.swaps_in)

    def _forget(self, id: str) -> None:
        self._last.pop(id, None)
        self._told.forget(id)
        self._recorded.discard(id)
        self._tops.pop(id, None)
        self._pooling.forget(id)
        self._variants.forget(id)
        if self.adapters is not None:
            self.adapters.forget(id)
        if self.depths is not None:
            self.depths.forget(id)
        if self.skips is not None:
            self.skips.forget(id)
        self._ahead.pop(id, None)
        if self._overrides is not None:
            self._overrides.forget(id)

    def _step(self, chunks: Sequence[Chunk], tokens: Sequence[int]) -> list[Sampled]:
        for chunk in chunks:
            self._choose_ahead(chunk)
        rows, routes = sampled_rows(chunks), self._routes(chunks)
        self._told.begin()
        scored, pooled_rows = scored_rows(chunks), self._pooling.rows(chunks)
        x_RD = self._hidden_of(chunks, tokens, [*rows, *scored, *pooled_rows], routes)
        first = len(rows) + len(scored)
        head = partial(self._head_of, ids=_ids_of([*rows, *scored], chunks) if self._adapted() is not None else None)
        told = score(x_RD[len(rows) : first], lambda x_SD, at: head(x_SD, len(rows) + at), chunks, self._tops)
        pooled = self._pooling.of(x_RD[first:], chunks)
        logits_RV = head(x_RD[: len(rows)], 0) if rows else None
        # Behind all that may route.
        if self._is_watched:
            self._told.end(chunks)
        # Last of what may fail: a sample that is taken cannot be taken back.
        sampled = [] if logits_RV is None else verify(self.sampler, logits_RV, chunks)
        results = {result.id: result for result in sampled}
        _tell_routes(sampled, chunks, rows, routes)
        for id, found in told.items():
            result = results.setdefault(id, found)
            result.prompt_logprobs, result.error = found.prompt_logprobs, result.error or found.error
        for id, found in pooled.done.items():
            result = results.setdefault(id, found)
            result.embedding, result.error = found.embedding, result.error or found.error
        self._pooling.keep(pooled)
        if self.depths is not None:
            for id, result in results.items():
                result.path = self.depths.take_untold(id)
        if self.skips is not None:
            for id, result in results.items():
                kept = self.skips.take_untold(id)
                if kept is not None:
                    result.path, result.computed = kept.path, kept.computed
        return [results[chunk.id] for chunk in chunks if chunk.is_answered]

    def _routes(self, chunks: Sequence[Chunk]) -> dict[int, Route]:
        """Rows whose routes are wanted, each with a route that is to be filled in."""
        ids = [chunk.id for chunk in chunks for _ in range(chunk.num_samples)]
        return {row: {} for row, id in zip(sampled_rows(chunks), ids, strict=True) if id in self._recorded}

    def _head_of(self, x_RD: Tensor, first: int, *, ids: Sequence[str] | None) -> Tensor:
        """`_head`, with what adapters add to it; ``ids`` are the requests of all rows, None where none has adapters."""
        adapters = self._adapted()
        if ids is None or adapters is None:
            return self._head(x_RD, first)
        ids = ids[first : first + len(x_RD)]
        groups = [[row for row, id in enumerate(ids) if adapters.is_of(id) == is_own] for is_own in (False, True)]
        if self._compiled() is not None or takes_context(self.model.head) or not all(groups):
            # Rows are computed apart by itself, or there is nothing to be apart from.
            logits_RV = self._head(x_RD, first)
        else:
            made = [self._head(x_RD[rows]) for rows in groups]
            logits_RV = made[0].new_empty(len(ids), made[0].shape[-1])
            for rows, made_MV in zip(groups, made, strict=True):
                logits_RV[rows] = made_MV
        return adapters.add_to_head(logits_RV, x_RD, ids)

    def _adapted(self) -> ServedAdapters | None:
        """The adapters, where requests under way use some."""
        return self.adapters if self.adapters is not None and self.adapters.is_used else None

    def _head(self, x_RD: Tensor, first: int = 0) -> Tensor:
        """logits_RV of hidden states of the step, from the ``first`` on."""
        # A listener may have come or gone since the layers ran, so hidden states are of either path.
        fast = self._compiled()
        if fast is not None:
            return fast.logits(x_RD.float())
        with steady(self.model) if self.deterministic else nullcontext():
            return logits_of(self.model, x_RD.to(self.model.embedding.weight.dtype), first, self._passes)

    @property
    def _is_watched(self) -> bool:
        """Whether anyone listens inside the model, or to routers beside it."""
        return self.watch.is_watched or (self.adapters is not None and self.adapters.is_watched)

    def _compiled(self) -> FastDecoder | None:
        """The compiled step where there is one, and nobody listens whom it would run past."""
        return None if self.fast is None or self.watch.is_watched else self.fast

    def _compiled_for(self, chunks: Sequence[Chunk]) -> FastDecoder | None:
        """The same, for chunks that run the model alike: it knows no path but the usual one."""
        variant = self._variant_of(chunks[0])
        is_usual = variant.path is None and variant.chooser is None and not variant.is_adapted and variant.task is None
        return self._compiled() if is_usual and not variant.is_pruned else None

    def _hidden_of(
        self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int], routes: Mapping[int, Route]
    ) -> Tensor:
        """x_RD of ``rows``; fills in ``routes``."""
        # One that failed may have left its context.
        self._context_run, self._passes = None, []
        is_alike = not self._variants and self._overrides is None and self._adapted() is None
        if is_alike and (self.adapters is None or not self.adapters.tasks):
            x_RD = self._hidden_alike(chunks, tokens, rows, routes)
            self._note_pass(range(len(rows)), rows)
            return x_RD
        made: list[tuple[list[int], Tensor]] = []
        for part in passes_of(chunks, tokens, self._pass_of(chunks)):
            wanted = [number for number, row in enumerate(rows) if row in part.place]
            own = {part.place[row]: route for row, route in routes.items() if row in part.place}
            places = [part.place[rows[number]] for number in wanted]
            x_WD = self._hidden_alike(part.chunks, part.tokens, places, own)
            self._note_pass(wanted, places)
            made.append((wanted, x_WD))
        if len(made) == 1:
            return made[0][1]
        # The compiled step's are wider than those of modules in few bits, and stay as they are.
        wide = functools.reduce(torch.promote_types, [x_WD.dtype for _, x_WD in made])
        made_RD = made[0][1].new_empty(len(rows), made[0][1].shape[-1], dtype=wide)
        for wanted, x_WD in made:
            made_RD[wanted] = x_WD.to(wide)
        return made_RD

    def _note_pass(self, numbers: Sequence[int], rows: Sequence[int]) -> None:
        """Which rows of the pass that has just run are which of the step's."""
        if self._context_run is not None and takes_context(self.model.head):
            self._passes.append(RowsOfPass(self._context_run, list(numbers), list(rows)))
        self._context_run = None

    def _variant_of(self, chunk: Chunk) -> Variant:
        """How a request runs the model."""
        own = self._variants.of(chunk.id)
        if self._overrides is not None:
            own = self._overrides.variant_of(chunk.id, own)
        adapters = self.adapters
        if adapters is None:
            return own
        own = replace(own, task=adapters.task_of(chunk.id)) if adapters.tasks else own
        if not adapters.is_of(chunk.id):
            return own
        is_usual = own.path is None and own.chooser is None and not own.is_pruned
        is_compiled = is_usual and self._compiled() is not None and adapters.is_compiled(chunk)
        return own if is_compiled else replace(own, is_adapted=True)

    def check_variant(self, num_streams: int | None, path: Sequence[int] | None) -> None:
        """Raise ConfigError for streams or a path that no request can have; None is the usual."""
        if num_streams is not None and not is_whole(num_streams):
            raise ConfigError(f"num_streams is {num_streams!r}; it must be a whole number")
        self.model.streams_of(num_streams)
        if path is None:
            return
        if check_path(path, len(self.model.blocks), 1) != tuple(path):
            raise ConfigError(f"path is {path!r}; a request has one path, of block numbers")
        self.stores.check_path(path)

    def _pass_of(self, chunks: Sequence[Chunk]) -> Callable[[Chunk], Hashable]:
        """What chunks go through the model together by: how they run it, or only that their paths do not matter."""
        if all(self._variant_of(chunk).path is None for chunk in chunks):
            return self._variant_of
        return lambda chunk: _ANY_PATH if self._takes_path(chunk) else self._variant_of(chunk)

    def _takes_path(self, chunk: Chunk) -> bool:
        """Whether a request runs beside others with other blocks."""
        has_adapters = self.adapters is not None and self.adapters.is_of(chunk.id)
        variant = self._variant_of(chunk)
        is_usual = variant.chooser is None and not variant.is_pruned
        is_plain = not has_adapters and is_usual and chunk.id not in self._recorded
        return is_plain and not self.watch.is_watched and self._any_path.takes(is_compiled=self._compiled() is not None)

    def _hidden_on_paths(
        self,
        chunks: Sequence[Chunk],
        tokens: Sequence[int],
        rows: Sequence[int],
        paths: Sequence[tuple[int, ...] | None],
    ) -> Tensor:
        """`_hidden` of chunks of any paths, which run together what they share."""
        is_compiled = self._compiled() is not None
        with steady(self.model) if self.deterministic and not is_compiled else nullcontext():
            return self._any_path.hidden(chunks, tokens, rows, paths, is_compiled=is_compiled)

    def _choose_ahead(self, chunk: Chunk) -> None:
        """The path of a request whose prompt comes in pieces: routers see all of it once, before its first piece runs."""
        if self.skips is not None:
            self._skip_ahead(chunk, self.skips)
        prompt = None if self.depths is None else self.depths.prompt_behind(chunk)
        if prompt is None:
            return
        whole, token_1L = replace(chunk, tokens=prompt, start=0), torch.tensor([prompt], device=self.device)
        # Whoever records is told of the prompt when it runs for its own sake.
        seen = {"repeated_N": torch.ones(len(prompt), dtype=torch.bool, device=self.device)}
        context = self.model.context(token_1L, state=seen)
        with self._running([whole], context):
            self._choose(chunk.id, self.model.embed(token_1L), self._block_of(context))

    def _skip_ahead(self, chunk: Chunk, skips: Skips) -> None:
        """Run a prompt that comes in pieces whole, before its first piece: what blocks pass over depends on all of it."""
        prompt = skips.prompt_of(chunk.id)
        if prompt is None or len(chunk.tokens) >= len(prompt):
            return
        whole = replace(chunk, tokens=prompt, start=0)
        ahead = self._pruned.ahead(whole, skips.choosing(chunk.id), is_compiled=self._prunes_compiled(chunk))
        skips.chosen(chunk.id, ahead.kept)
        if self._is_watched or self._ahead:
            # Recorders inside the model are told of tokens where their pieces run, so these run again; and what was computed is kept for
            # one prompt at a time, which is what memory is planned for.
            self._variants.decided(chunk.id)
        else:
            self._ahead[chunk.id] = ahead

    def _prunes_compiled(self, chunk: Chunk) -> bool:
        """Whether a request whose blocks pass over tokens runs by compiled blocks."""
        return self._compiled() is not None and not self._variant_of(chunk).is_adapted

    def _pruned_hidden(self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """`_hidden` of chunks of which each block computes some tokens."""
        assert self.skips is not None, "only they have such requests"
        first, skips = chunks[0], self.skips
        is_compiled = self._prunes_compiled(first)
        if skips.prompt_of(first.id) is not None:
            # Alone, as its variant says.
            choosing = skips.choosing(first.id)
            x_RD, kept = self._pruned.chosen(first, tokens, rows, choosing, is_compiled=is_compiled)
            skips.chosen(first.id, kept)
            self._variants.decided(first.id)
            return x_RD
        # Alone, too, as long as there is something.
        if (ahead := self._taken_ahead(first)) is not None:
            return self._pruned.take(first, rows, ahead)
        kept_N = [skips.kept(chunk.id) for chunk in chunks]
        return self._pruned.hidden(chunks, tokens, rows, kept_N, is_compiled=is_compiled)

    def _taken_ahead(self, chunk: Chunk) -> Ahead | None:
        """What ran ahead of a piece of a prompt; None where it did not, or where the piece goes on behind the prompt."""
        ahead, end = self._ahead.get(chunk.id), chunk.start + len(chunk.tokens)
        if ahead is None or self._is_watched:
            return None
        if end >= ahead.kept.num_prompt:
            del self._ahead[chunk.id]
            self._variants.decided(chunk.id)
        return ahead if end <= ahead.kept.num_prompt else None

    def _chosen_hidden(self, chunk: Chunk, tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """`_hidden` of a whole prompt, along the path that routers choose on the way."""
        is_plain = not self._variant_of(chunk).is_adapted and chunk.id not in self._recorded
        if is_plain and self._compiled() is not None and self._any_path.takes(is_compiled=True):
            return self._any_path.chosen(chunk, tokens, rows, partial(self._choose, chunk.id))
        token_1T = torch.tensor([tokens], dtype=torch.int64, device=self.device)
        context = self._context(StepLayout([chunk], self.pool.block_tokens, self.device), token_1T, [chunk])
        self._context_run = context
        with self._running([chunk], context):
            x_1TD = self._choose(chunk.id, self.model.embed(token_1T), self._block_of(context))
            return self.model.norm(x_1TD[:, list(rows)])[0]

    def _block_of(self, context: ForwardContext) -> Callable[[int, Tensor, Sequence[int]], Tensor]:
        """What runs a block on the one sequence of ``context``."""
        return lambda layer, x_1LD, _: self.model.blocks[layer](x_1LD, context)

    def _choose(self, id: str, x_1LD: Tensor, run: Callable[[int, Tensor, Sequence[int]], Tensor]) -> Tensor:
        """x_1LD behind the last block of the path that routers choose, which is the request's from now on."""
        assert self.depths is not None, "only they have requests that wait"
        x_1LD, path = self.depths.choose(id, x_1LD, run)
        self._variants.chosen(id, path)
        return x_1LD

    def _hidden_alike(
        self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int], routes: Mapping[int, Route]
    ) -> Tensor:
        """`_hidden_of` chunks that run the model alike."""
        variant = self._variant_of(chunks[0])
        if self._overrides is not None:
            self._routing = self._overrides.placed(self._said, chunks, variant.num_streams)
        if not routes:
            return self._hidden(chunks, tokens, rows)
        fast = self._compiled_for(chunks)
        if fast is not None and fast.tells_routes:
            return self._fast_hidden(fast, chunks, tokens, rows, routes)
        self._wanted = routes if variant.is_adapted else {}
        try:
            with self.tap.listen(list(routes), len(tokens)) as found:
                x_RD = self._hidden(chunks, tokens, rows)
        finally:
            self._wanted = {}
        for route, noted in zip(routes.values(), found, strict=True):
            route.update(noted)
        return x_RD

    def _hidden(self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """x_RD of ``rows`` of the step, after the last norm."""
        if self._variant_of(chunks[0]).is_pruned:
            return self._pruned_hidden(chunks, tokens, rows)
        if self._variant_of(chunks[0]).chooser is not None:
            return self._chosen_hidden(chunks[0], tokens, rows)
        if self._variants and all(map(self._takes_path, chunks)):
            own = [self._variant_of(chunk).path for chunk in chunks]
            if any(path is not None for path in own):
                return self._hidden_on_paths(chunks, tokens, rows, own)
        fast = self._compiled_for(chunks)
        if fast is not None:
            return self._fast_hidden(fast, chunks, tokens, rows, {})
        model = self.model
        layout = StepLayout(chunks, self.pool.block_tokens, self.device)
        token_1T = torch.tensor([tokens], dtype=torch.int64, device=self.device)
        context = self._context(layout, token_1T, chunks)
        keep_R = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self._context_run = context
        with self._running(chunks, context):
            x_PRD = model.hidden(token_1T, context, keep_L=keep_R)
            return (x_PRD if model.streams is None or not rows else model.streams.merge(x_PRD, context))[0]

    @contextmanager
    def _running(self, chunks: Sequence[Chunk], context: ForwardContext) -> Iterator[None]:
        """How a pass through the modules runs: with the adapters of its requests, and steadily where that is asked for."""
        variant = self._variant_of(chunks[0])
        adapters = self.adapters if variant.is_adapted else None
        if self.adapters is not None and variant.task is not None:
            length = sum(len(chunk.tokens) for chunk in chunks)
            context.state |= self.adapters.told(variant.task, context.num_streams, length)
        own = None if adapters is None else adapters.of_pass(chunks, self._wanted)
        if own is not None:
            context.state |= own.state(context.num_streams, self.device)
        try:
            with (
                nullcontext() if adapters is None else adapters.on(),
                steady(self.model) if self.deterministic else nullcontext(),
            ):
                yield
        finally:
            if own is not None:
                own.end()

    def _fast_hidden(
        self,
        fast: FastDecoder,
        chunks: Sequence[Chunk],
        tokens: Sequence[int],
        rows: Sequence[int],
        routes: Mapping[int, Route],
    ) -> Tensor:
        """`_hidden` by the compiled step; fills in ``routes``."""
        layout, adapters = StepLayout(chunks, self.pool.block_tokens), self._adapted()
        x_TD, route_ATK = fast.hidden(
            torch.tensor(tokens, dtype=torch.int64),
            torch.from_numpy(layout.position_T),
            layout.sequence_N4,
            layout.table_U,
            with_routes=bool(routes),
            adapters=None if adapters is None else adapters.uses(chunks),
        )
        if route_ATK is not None:
            for layer, route_TK in zip(self.tap.layers, route_ATK, strict=True):
                for route, index_K in zip(routes.values(), route_TK[list(routes)].tolist(), strict=True):
                    route[layer] = tuple(index for index in index_K if index >= 0)
        return x_TD if list(rows) == list(range(len(tokens))) else x_TD[list(rows)]

    def _context(
        self,
        layout: StepLayout,
        token_1T: Tensor,
        chunks: Sequence[Chunk],
        told: ToldSlot | None = None,
        stores: Stores | None = None,
    ) -> ForwardContext:
        position_1T = torch.from_numpy(layout.position_T).to(self.device).unsqueeze(0) + self.model.first_position
        rotary = self.model.rotary(position_1T, self.pool.shape.dtype)
        variant = self._variant_of(chunks[0])
        streams = variant.num_streams
        return ForwardContext(
            num_streams=streams,
            path=variant.path,
            sequences=self._told.names(chunks),
            is_measured=False,
            refuses_nan=False,
            routing=list(self._routing),
            state=self._told.state(chunks, streams, layout.position_T.tolist()) if self._is_watched else {},
            position_BL=position_1T.expand(streams, -1),
            rotary=rotary,
            cache=(stores or self.stores).view(
                layout, chunks, self._prefixes[streams], variant.path, is_open=variant.chooser is not None, told=told
            ),
            token_BL=token_1T.expand(streams, -1),
            front_gates=None if self.model.streams is None else self.model.streams.front_gates,
        )


def _ids_of(rows: Sequence[int], chunks: Sequence[Chunk]) -> list[str]:
    """The requests of rows of a step."""
    ids = [chunk.id for chunk in chunks for _ in chunk.tokens]
    return [ids[row] for row in rows]


@torch.no_grad()
def _prefixes(model: Decoder, num_streams: int) -> list[tuple[Tensor, Tensor]]:
    """(key_PGMD, value_PGMD) of each layer, in front of all sequences of so many streams."""
    return [(key.detach(), value.detach()) for key, value in model.prefixes(num_streams)]


def _tell_routes(
    sampled: Sequence[Sampled], chunks: Sequence[Chunk], rows: Sequence[int], routes: Mapping[int, Route]
) -> None:
    """Give each token that was sampled the route of its row."""
    if not routes:
        return
    start = 0
    for first, chunk in zip(sampled, [chunk for chunk in chunks if chunk.samples], strict=True):
        for result, row in zip((first, *first.later), rows[start:], strict=False):
            result.routing = routes.get(row, {})
        start += chunk.num_samples
