"""`ModelRunner`: one step of a batch on a model, from tokens to sampled tokens."""
# Shapes: P streams, T tokens of a step, R rows that sample or score, V vocabulary, D width

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from anabranch.adapters.glider import HiddenStates
from anabranch.bounds import is_whole
from anabranch.data import Tokenizer
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.batch import Batch, Chunk, Sampled
from anabranch.serving.core.hooks import OverrideHook, StepHook
from anabranch.serving.core.request import Request, Route, Sampling
from anabranch.serving.engine.any_path import AnyPath
from anabranch.serving.engine.compiled import compiled_form, compiled_hidden
from anabranch.serving.engine.cut import Cut
from anabranch.serving.engine.depths import Depths
from anabranch.serving.engine.explained import TokenRoute
from anabranch.serving.engine.head import StepHead
from anabranch.serving.engine.isolate import Isolation
from anabranch.serving.engine.kinds import Kinds
from anabranch.serving.engine.module_passes import ModulePasses
from anabranch.serving.engine.module_paths import ModulePaths
from anabranch.serving.engine.overrides import OverridesById, RequestOverrides
from anabranch.serving.engine.paged import PagedPool
from anabranch.serving.engine.passes import passes_of
from anabranch.serving.engine.pruned import PrunedPasses
from anabranch.serving.engine.pruned_prompts import PrunedPrompts
from anabranch.serving.engine.record import RoutingTap
from anabranch.serving.engine.results import joined, tell_routes
from anabranch.serving.engine.routed_prompts import RoutedPrompts
from anabranch.serving.engine.score import score, scored_rows
from anabranch.serving.engine.served_adapters import ServedAdapters
from anabranch.serving.engine.skips import Skips
from anabranch.serving.engine.stores import Stores
from anabranch.serving.engine.turnstile import Turnstile
from anabranch.serving.engine.under_way import UnderWay
from anabranch.serving.engine.variants import Variants, check_own_path
from anabranch.serving.engine.verify import sampled_rows, verify, without_drafts
from anabranch.serving.engine.ways import Ways
from anabranch.serving.fast import FastDecoder, Watch
from anabranch.serving.sampling import Sampler

# An id that no request has.
_NOBODY = "\0"

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
        adapters: which requests may have; None for none. Raises as `ServedAdapters` for those that cannot be had.
        tokenizer: of the texts that pools of adapters embed by the model; None where none do.
        depths: depth routers, and the requests whose path they are to choose; None for none.
        skips: a skipper of tokens, and what it has decided about requests; None for none.
        cut: the processes over which blocks are cut; all of them make such a runner, and those that are not the first `follow`.

    Attributes:
        adapters: those that requests may have; None for none.
        requests: that are under way.
        ways: how they run the model.
        modules: passes through its modules.

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
        adapters: AdaptersConfig | None = None,
        tokenizer: Tokenizer | None = None,
        depths: Depths | None = None,
        skips: Skips | None = None,
        cut: Cut | None = None,
    ) -> None:
        model.check_causal()
        if cut is not None:
            if model.streams is not None:
                raise ConfigError(
                    "parallel streams have keys and values in front of every sequence, which are not cut over processes; leave "
                    "engine.context out"
                )
            # It knows no ranks.
            use_kernel = False
        self.model = model.eval()
        self.device = model.embedding.weight.device
        self.num_streams, _ = model.streams_of(num_streams)
        self.stores = Stores.made(
            kinds or Kinds.whole(model, ServingConfig(max_depth=max_depth, block_tokens=block_tokens)),
            num_blocks,
            block_tokens=block_tokens,
            device=self.device,
            host_blocks=host_blocks,
            pool=pool,
            use_kernel=use_kernel,
            is_steady=deterministic,
            cut=cut,
        )
        self.cut = cut
        self.pool = self.stores.pools[0]
        self.sampler: TokenSampler = sampler or Sampler(model.config.vocab_size)
        self.hooks, self.use_kernel, self.deterministic = tuple(hooks), use_kernel, deterministic
        overriding = [hook for hook in self.hooks if isinstance(hook, OverrideHook)]
        # Whose rows never depend on each other.
        self.fast: FastDecoder | None = None
        if use_kernel and not overriding:
            self.fast = compiled_form(model, self.pool, takes_weights=takes_weights)
        self.tap, self.watch = RoutingTap(model), Watch(model)
        self.adapters: ServedAdapters | None = None
        # Whoever runs the model, one at a time: batches, and texts that are embedded beside them.
        self._turn = Turnstile()
        if adapters is not None:
            tables = None if self.fast is None else self.fast.adapters
            states = None if tokenizer is None else HiddenStates(model, tokenizer, turn=self._turn)
            self.adapters = ServedAdapters(model, adapters, tables, is_steady=deterministic, states=states)
        self.depths, self.skips = depths, skips
        self.requests = UnderWay(
            Variants(self.num_streams, len(model.blocks)),
            adapters=self.adapters,
            depths=depths,
            skips=skips,
            overrides=RequestOverrides(model, overriding, self.check_variant) if overriding else None,
        )
        # What hooks say of the step under way.
        self._said: OverridesById = {}
        self._join_passes(model, is_overridden=bool(overriding))
        self._isolation = Isolation(self._step, self._try_out)

    def _join_passes(self, model: Decoder, *, is_overridden: bool) -> None:
        """All ways through the model, and the head behind them."""
        is_steady, requests = self.deterministic, self.requests
        self.ways = Ways(requests, self.fast, self.watch)
        self.modules = ModulePasses(model, self.stores, requests, self.ways, is_steady=is_steady)
        paths = None
        if not is_overridden and ModulePaths.supports(model):
            paths = ModulePaths(model, self.pool.block_tokens, self.modules.context, is_steady=is_steady)
        self._any_path = AnyPath(len(model.blocks), self.fast, paths, self.stores, requests, self.ways)
        self._routed: RoutedPrompts | None = None
        if self.depths is not None:
            self._routed = RoutedPrompts(self.depths, requests, self.ways, self.modules, self._any_path)
        self._pruned: PrunedPrompts | None = None
        if self.skips is not None:
            passes = PrunedPasses(model, self.fast, self.pool, self.stores, self.modules.context, self.modules.running)
            self._pruned = PrunedPrompts(self.skips, requests, self.ways, passes)
        # What decides about prompts before their pieces run.
        self._prompts = [prompts for prompts in (self._pruned, self._routed) if prompts is not None]
        self._head = StepHead(model, self.ways, is_steady=is_steady)

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sampled]:
        """One result for each chunk that samples or is scored, in order."""
        with self._turn:
            return self._run(batch)

    def _run(self, batch: Batch) -> list[Sampled]:
        self._set_up(batch)
        overrides = self.requests.overrides
        if overrides is not None or self.ways.is_watched:
            batch = without_drafts(batch)
        tokens = self.requests.tokens(batch.chunks)
        for hook in self.hooks:
            hook.before_step(batch, tokens)
        refused: dict[str, Sampled] = {}
        if overrides is not None:
            self._said, refused = overrides.of(batch, tokens)
        sampled = self._isolation.run(batch.chunks, tokens) if batch.chunks else []
        sampled = [*(result for result in sampled if result.id not in refused), *refused.values()]
        self._said, self.modules.overrides = {}, []
        self.requests.keep_newest(sampled)
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
        self.requests.told.hide(_NOBODY, max(chunk.start + len(chunk.tokens) for chunk in chunks))
        try:
            for chunk in chunks:
                self._step([chunk], chunk.tokens)
        finally:
            self._forget(_NOBODY)

    @torch.inference_mode()
    def follow(self) -> None:
        """Run the passes of the first process until it ends; see `Cut.follow`."""
        assert self.cut is not None, "there is another to follow"
        self.cut.follow(lambda told: self.modules.hidden(told.chunks, told.tokens, told.rows))

    def close(self) -> None:
        """Tell the hooks, and other processes, that the engine ends."""
        if self.cut is not None:
            self.cut.close()
        for hook in self.hooks:
            hook.close()
        if self.adapters is not None:
            self.adapters.close()
        if isinstance(self.sampler, Sampler):
            self.sampler.close()

    def check_variant(self, num_streams: int | None, path: Sequence[int] | None) -> None:
        """Raise ConfigError for streams or a path that no request can have; None is the usual."""
        if num_streams is not None and not is_whole(num_streams):
            raise ConfigError(f"num_streams is {num_streams!r}; it must be a whole number")
        self.model.streams_of(num_streams)
        if path is None:
            return
        if self.cut is not None:
            raise ConfigError(
                "path is given, and keys and values are cut over processes, which all run the usual one; leave it out"
            )
        check_own_path(path, len(self.model.blocks))
        self.stores.check_path(path)

    def _set_up(self, batch: Batch) -> None:
        for id in batch.gone:
            self._forget(id)
        for request in batch.new:
            self.sampler.add(request)
            self.requests.add(request)
        # First, as what is saved may be overwritten at once.
        self.pool.swap_out(batch.swaps_out)
        self.pool.copy(batch.copies)
        self.pool.swap_in(batch.swaps_in)

    def _forget(self, id: str) -> None:
        self.sampler.forget(id)
        self.requests.forget(id)
        if self._pruned is not None:
            self._pruned.forget(id)

    def _step(self, chunks: Sequence[Chunk], tokens: Sequence[int]) -> list[Sampled]:
        for prompts in self._prompts:
            for chunk in chunks:
                prompts.look_ahead(chunk)
        requests = self.requests
        rows, routes = sampled_rows(chunks), self._routes(chunks)
        requests.told.begin()
        scored, pooled_rows = scored_rows(chunks), requests.pooling.rows(chunks)
        x_RD = self._hidden_of(chunks, tokens, [*rows, *scored, *pooled_rows], routes)
        first = len(rows) + len(scored)
        head: Callable[[Tensor, int], Tensor] = self._head.plain
        if (adapters := requests.adapted()) is not None:
            head = partial(self._head.adapted, adapters=adapters, ids=_ids_of([*rows, *scored], chunks))
        told = score(x_RD[len(rows) : first], lambda x_SD, at: head(x_SD, len(rows) + at), chunks, requests.tops)
        pooled = requests.pooling.of(x_RD[first:], chunks)
        logits_RV = head(x_RD[: len(rows)], 0) if rows else None
        # Behind all that may route.
        if self.ways.is_watched:
            requests.told.end(chunks)
        # Last of what may fail: a sample that is taken cannot be taken back.
        sampled = [] if logits_RV is None else verify(self.sampler, logits_RV, chunks)
        tell_routes(sampled, chunks, rows, routes, self._explain)
        requests.pooling.keep(pooled)
        results = joined(sampled, told, pooled.done)
        requests.tell_decisions(results)
        return [results[chunk.id] for chunk in chunks if chunk.is_answered]

    def _explain(self, id: str, route: TokenRoute) -> dict[str, Any]:
        return {} if self.adapters is None else self.adapters.explain(id, route)

    def _routes(self, chunks: Sequence[Chunk]) -> dict[int, TokenRoute]:
        """Rows whose routes are wanted, each with a route that is to be filled in."""
        recorded = self.requests.recorded
        if not recorded:
            return {}
        ids = [chunk.id for chunk in chunks for _ in range(chunk.num_samples)]
        return {row: TokenRoute() for row, id in zip(sampled_rows(chunks), ids, strict=True) if id in recorded}

    def _hidden_of(
        self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int], routes: Mapping[int, Route]
    ) -> Tensor:
        """x_RD of ``rows`` of a step, after the last norm; fills in ``routes``."""
        # One that failed may have left its context.
        self.modules.last = None
        self._head.begin()
        if self.ways.is_one:
            return self._pass(chunks, tokens, rows, routes, range(len(rows)))
        made: list[tuple[list[int], Tensor]] = []
        for part in passes_of(chunks, tokens, self._any_path.pass_of(chunks)):
            wanted = [number for number, row in enumerate(rows) if row in part.place]
            own = {part.place[row]: route for row, route in routes.items() if row in part.place}
            places = [part.place[rows[number]] for number in wanted]
            made.append((wanted, self._pass(part.chunks, part.tokens, places, own, wanted)))
        if len(made) == 1:
            return made[0][1]
        # The compiled step's are wider than those of modules in few bits, and stay as they are.
        wide = functools.reduce(torch.promote_types, [x_WD.dtype for _, x_WD in made])
        made_RD = made[0][1].new_empty(len(rows), made[0][1].shape[-1], dtype=wide)
        for wanted, x_WD in made:
            made_RD[wanted] = x_WD.to(wide)
        return made_RD

    def _pass(
        self,
        chunks: Sequence[Chunk],
        tokens: Sequence[int],
        rows: Sequence[int],
        routes: Mapping[int, Route],
        numbers: Sequence[int],
    ) -> Tensor:
        """`_hidden_of` chunks that run the model alike; ``numbers`` say which of the step's rows these are."""
        overrides = self.requests.overrides
        if overrides is not None:
            streams = self.ways.of(chunks[0]).num_streams
            self.modules.overrides = overrides.placed(self._said, chunks, streams)
        if not routes:
            x_RD = self._hidden(chunks, tokens, rows)
        elif (fast := self.ways.compiled_for(self.ways.of(chunks[0]))) is not None and fast.tells_routes:
            x_RD = self._compiled(fast, chunks, tokens, rows, routes)
        else:
            with self.modules.telling(self.tap, routes, len(tokens)):
                x_RD = self._hidden(chunks, tokens, rows)
        context, self.modules.last = self.modules.last, None
        if context is not None:
            self._head.ran(context, numbers, rows)
        return x_RD

    def _hidden(self, chunks: Sequence[Chunk], tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """x_RD of ``rows`` of chunks that run the model alike, after the last norm."""
        variant = self.ways.of(chunks[0])
        if variant.is_pruned:
            assert self._pruned is not None, "who has none has no such requests"
            return self._pruned.hidden(chunks, tokens, rows)
        if variant.chooser is not None:
            assert self._routed is not None, "who has none has no such requests"
            return self._routed.hidden(chunks[0], tokens, rows)
        if self.requests.variants and (paths := self._any_path.paths(chunks)) is not None:
            return self._any_path.hidden(chunks, tokens, rows, paths)
        fast = self.ways.compiled_for(variant)
        if fast is not None:
            return self._compiled(fast, chunks, tokens, rows)
        return self.modules.hidden(chunks, tokens, rows)

    def _compiled(
        self,
        fast: FastDecoder,
        chunks: Sequence[Chunk],
        tokens: Sequence[int],
        rows: Sequence[int],
        routes: Mapping[int, Route] | None = None,
    ) -> Tensor:
        """`_hidden` by the compiled step, which fills in ``routes``."""
        adapters = self.requests.adapted()
        return compiled_hidden(
            fast, chunks, tokens, rows, self.pool.block_tokens, adapters=adapters, routes=routes, layers=self.tap.layers
        )


def _ids_of(rows: Sequence[int], chunks: Sequence[Chunk]) -> list[str]:
    """The requests of rows of a step."""
    ids = [chunk.id for chunk in chunks for _ in chunk.tokens]
    return [ids[row] for row in rows]
