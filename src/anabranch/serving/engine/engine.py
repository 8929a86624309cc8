"""`Engine`: a model, its runner and its scheduler, in the thread or process that runs them."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import ConfigError, InputError
from anabranch.files import parse_json
from anabranch.lm.decoder import Decoder
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.client import EngineInfo, EngineStats
from anabranch.serving.core.dual_batches import Order
from anabranch.serving.core.hooks import OverrideHook, StepHook
from anabranch.serving.core.offload import PeakMemory
from anabranch.serving.core.request import Request
from anabranch.serving.core.scheduler import Scheduler, SchedulerConfig
from anabranch.serving.core.tier import KVTier, Memory
from anabranch.serving.depth import room_for_paths
from anabranch.serving.engine.depths import Depths, check_depth, routers_of
from anabranch.serving.engine.futures import both
from anabranch.serving.engine.kinds import Kinds
from anabranch.serving.engine.loop import EngineLoop
from anabranch.serving.engine.messages import Event
from anabranch.serving.engine.paged import PagedPool, PagedShape
from anabranch.serving.engine.rewired import RewiredRequests, check_rewired
from anabranch.serving.engine.runner import WARM_TOKENS, ModelRunner, TokenSampler
from anabranch.serving.engine.served_adapters import ServedAdapters
from anabranch.serving.engine.skips import Skips, check_skips, skipper_of
from anabranch.serving.engine.tiered import second_place
from anabranch.serving.sampling import Sampler


@dataclass(kw_only=True)
class Engine:
    """What a loop runs.

    Attributes:
        info: what it serves.
        scheduler, runner: which run it.
        is_async: see `ServingConfig.is_async`.
        controls: an operator's commands by name, see `EngineLoop`.
        sources: what adds to pictures of the engine.
        adapters: that requests may use.
        rewired: requests whose routers are turned to their text; None where none are.
    """

    info: EngineInfo
    scheduler: Scheduler
    runner: ModelRunner
    is_async: bool = True
    controls: dict[str, Callable[..., Any]] = field(default_factory=dict)
    sources: list[Callable[[], EngineStats]] = field(default_factory=list)
    adapters: ServedAdapters
    rewired: RewiredRequests | None = None

    @classmethod
    def of(
        cls,
        model: Decoder,
        config: ServingConfig,
        *,
        tokenizer: Tokenizer | None = None,
        sampler: TokenSampler | None = None,
        hooks: Sequence[StepHook] = (),
        controls: Mapping[str, Callable[..., Any]] | None = None,
        tier: KVTier | None = None,
        memory: Memory | None = None,
        host_blocks: int = 0,
        pool: PagedPool | None = None,
        make_runner: Callable[..., ModelRunner] = ModelRunner,
        takes_weights: bool = False,
        order: Order | None = None,
        experts: Mapping[str, Any] = MappingProxyType({}),
        most_positions: int | None = None,
        depth_bank: Any = None,
        skipper: Any = None,
    ) -> Self:
        """An engine for a model that is loaded.

        Args:
            model: the model.
            config: sizes and scheduling; what says how to load a model is not read.
            tokenizer: its ends of text stop requests, and grammars need it.
            sampler: chooses tokens; None for `anabranch.serving.sampling.Sampler`.
            hooks: see every step. One with ``stats() -> EngineStats`` adds to pictures of the engine, one with ``controls`` commands.
            controls: more commands.
            tier: where keys and values go that have no room, in ``host_blocks`` slots; None for that of ``config.host_kv``.
            memory: admission by what requests are expected to need; None for that of ``config.admit_by_peak``.
            host_blocks: see ``tier``.
            pool: memory for keys and values made elsewhere.
            takes_weights: the model is nobody else's, see `anabranch.serving.fast.FastDecoder`.
            make_runner: makes the runner, such as `anabranch.serving.nanoflow.NanoRunner`.
            order: groups the requests that decode into two steps of ``config.experts.dual_batch`` each.
            experts: see `EngineInfo`.
            most_positions: longest prompt and output together, where ``config`` says no less; None for what the model is meant for.
            depth_bank: depth routers that are loaded; None for those of ``config.depth.routers``. Raises ConfigError for those of another
                model.
            skipper: an `anabranch.depth.ftp.TokenSkipper` of ``model``; None for that of ``config.depth.skipper``. Raises ConfigError for
                one that cannot be served.
        """
        skipper = skipper_of(model, skipper if config.depth.skipper is None else config.depth.skipper)
        depth_bank = routers_of(model, depth_bank if config.depth.routers is None else config.depth.routers)
        max_depth = room_for_paths(config.max_depth, model.config.num_layers, routes=depth_bank is not None)
        config = config.replace(max_depth=max_depth)
        if pool is None and tier is None and config.host_kv is not None:
            shape = PagedShape.of(model, config.max_depth)
            pool, tier = second_place(shape, config, model.embedding.weight.device)
        is_whole = pool is not None or tier is not None or skipper is not None
        kinds = (Kinds.whole if is_whole else Kinds.of)(model, config)
        num_blocks = kinds.blocks() if pool is None else pool.num_blocks
        most_visits = (kinds.kinds[0] if pool is None else pool).shape.layers
        if skipper is not None and any(isinstance(hook, OverrideHook) for hook in hooks):
            raise ConfigError(
                "depth.skipper is set, and hooks override single requests, row by row; where blocks pass over tokens there are other rows"
            )
        rewired = RewiredRequests(model, config.rewiring) if config.rewiring.on else None
        if rewired is not None:
            hooks = (*hooks, rewired)
        if memory is None and config.admit_by_peak:
            memory = PeakMemory(num_blocks * config.block_tokens, most=kinds.most_tokens)
        stop_tokens = () if tokenizer is None else tuple(tokenizer.stop_ids)
        if sampler is None:
            vocab_size = model.config.vocab_size
            sampler = Sampler(vocab_size, stop_tokens=stop_tokens, tokenizer=tokenizer, seed=config.seed)
        runner = make_runner(
            model,
            num_blocks=num_blocks,
            block_tokens=config.block_tokens,
            sampler=sampler,
            hooks=hooks,
            host_blocks=host_blocks,
            pool=pool,
            deterministic=config.deterministic,
            num_streams=config.num_streams,
            max_depth=config.max_depth,
            takes_weights=takes_weights,
            kinds=kinds,
            adapters=config.adapters,
            tokenizer=tokenizer,
            depths=Depths.of(model, config, depth_bank, most_visits),
            skips=None if skipper is None else Skips(skipper, model.embedding.weight.device),
        )
        adapters = runner.adapters
        assert adapters is not None, "they were asked for"
        limits = _limits(config, num_blocks, most_positions or model.config.max_positions, stop_tokens).replace(
            num_streams=runner.num_streams,
            window=kinds.windows[0],
            local_window=kinds.windows[1],
            local_blocks=kinds.second_blocks(num_blocks),
        )
        scheduler = limits.build(tier=tier, memory=memory, order=order)
        engine = cls(
            info=EngineInfo(
                model=config.name or Path(config.model).name or "model",
                vocab_size=model.config.vocab_size,
                max_positions=scheduler.max_positions,
                block_tokens=config.block_tokens,
                num_blocks=num_blocks,
                stop_tokens=stop_tokens,
                routed_layers=runner.tap.layers,
                num_streams=runner.num_streams,
                stream_choices=model.config.stream_choices,
                pooling=pooling_of(config),
                width=model.config.dim,
                experts=dict(experts),
                adapters=adapters.shelf.names,
                tasks=adapters.tasks,
                num_layers=model.config.num_layers,
                max_depth=None if config.max_depth is None else most_visits,
                routes_depth=depth_bank is not None,
                skips_tokens=skipper is not None,
                rewires=rewired is not None,
                depth=config.depth.usually(routes=depth_bank is not None, prunes=skipper is not None),
            ),
            scheduler=scheduler,
            runner=runner,
            is_async=limits.is_async,
            controls={"reset_prefix_cache": scheduler.reset_prefixes, **adapters.controls, **(controls or {})},
            sources=[adapters.shelf.stats],
            adapters=adapters,
            rewired=rewired,
        )
        engine._listen(hooks)
        return engine

    def _listen(self, hooks: Sequence[StepHook]) -> None:
        """Take what hooks offer beside being one."""
        for hook in hooks:
            self.controls.update(getattr(hook, "controls", {}))
            if hasattr(hook, "stats"):
                self.sources.append(hook.stats)

    def check(self, request: Request) -> None:
        """Raise InputError for a request that this model can never run."""
        request.check_fields()
        for token in (min(request.prompt, default=0), max(request.prompt, default=0)):
            if not 0 <= token < self.info.vocab_size:
                raise InputError(f"the prompt has the token {token}; use 0 to {self.info.vocab_size - 1}")
        self.info.check_streams(request.num_streams)
        check_depth(request, self.runner.depths)
        check_skips(request, self.runner.skips)
        check_rewired(request, self.rewired)
        try:
            self.runner.check_variant(request.num_streams, request.path)
        except ConfigError as error:
            raise InputError(str(error)) from None
        sampler = self.runner.sampler
        if isinstance(sampler, Sampler):
            sampler.check(request.sampling)

    def prepare(self, request: Request) -> "Future[Any] | None":
        """What a request needs before it can run, each made in another thread: its grammar, its adapters, its routers' vectors.

        None for nothing.
        """
        sampler = self.runner.sampler
        grammar = sampler.prepare(request) if isinstance(sampler, Sampler) else None
        try:
            adapters = self.adapters.prepare(request)
        except Exception:
            if grammar is not None:
                grammar.cancel()
            raise
        vectors = None if self.rewired is None else self.rewired.prepare(request)
        return both(both(grammar, adapters), vectors)

    def bind(self, request: Request) -> Request:
        """The request as the scheduler gets it, once it is prepared. Raises `FieldInputError` as `ServedAdapters.bind`."""
        bound = self.adapters.bind(request)
        return bound if self.rewired is None else self.rewired.bind(bound)

    def release(self, id: str) -> None:
        """A request has ended."""
        self.adapters.release(id)
        if self.rewired is not None:
            self.rewired.release(id)

    def warm_up(self) -> None:
        """Run a request of nobody's, so that the first one waits for nothing but itself; before `loop`."""
        self.runner.warm_up(min(WARM_TOKENS, self.scheduler.config.max_batched_tokens))

    def loop(self, emit: Callable[[list[Event]], None]) -> EngineLoop:
        """A loop that runs it."""
        return EngineLoop(
            self.scheduler,
            self.runner,
            emit,
            is_async=self.is_async,
            check=self.check,
            prepare=self.prepare,
            bind=self.bind,
            release=self.release,
            turn=None if self.rewired is None else self.rewired.turn,
            controls=self.controls,
            sources=self.sources,
        )


def pooling_of(config: ServingConfig) -> str:
    """How texts become vectors: as the config says, else as the model's folder does in sentence-transformers' form, else ``last``."""
    if config.pooling != "auto":
        return config.pooling
    file = Path(config.model) / "1_Pooling" / "config.json"
    try:
        table = parse_json(file.read_text("utf-8")) if config.model and file.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    return "mean" if isinstance(table, dict) and table.get("pooling_mode_mean_tokens") is True else "last"


def _limits(
    config: ServingConfig, num_blocks: int, most_positions: int, stop_tokens: tuple[int, ...]
) -> SchedulerConfig:
    """The scheduler's part of ``config``, for a model of ``most_positions``."""
    return SchedulerConfig(
        num_blocks=num_blocks,
        block_tokens=config.block_tokens,
        max_positions=min(config.max_positions or most_positions, most_positions),
        max_batched_tokens=config.max_batched_tokens,
        max_seqs=config.max_seqs,
        long_prefill_chunk=config.long_prefill_chunk,
        prefix_cache=config.prefix_cache,
        is_async=config.is_async,
        stop_tokens=stop_tokens,
        max_decodes=config.experts.dual_batch,
        prompt_lookup=config.prompt_lookup,
        prompt_lookup_ngram=config.prompt_lookup_ngram,
    )
