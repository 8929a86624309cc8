"""`Runtime`: all that is made from one config. A reload makes a new one; requests under way end on the one they began with."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from anabranch.errors import AnabranchError, ConfigError, MissingExtraError, TokenizerError
from anabranch.extras import require
from anabranch.gateway.config import GatewayConfig, ModelConfig
from anabranch.gateway.config.needs import check_providers, inside
from anabranch.gateway.config.prices import unpriced
from anabranch.gateway.counted_texts import UncountedError, counted_by_others
from anabranch.gateway.decide import Decider
from anabranch.gateway.dispatch import Dispatcher
from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.dispatcher import close_providers
from anabranch.gateway.dispatch_settings import groups_of, rules_of
from anabranch.gateway.logged_error import raised, words
from anabranch.gateway.plain_values import said, truth_of
from anabranch.gateway.prompt_tokens import Counter
from anabranch.gateway.providers.provider import Provider
from anabranch.routers.contract.strategy import Metrics, Strategy
from anabranch.routers.embed import Embedder
from anabranch.web.turns import plainly, plainly_awaited

# Requests that began before a reload have this long to end.
CLOSE_S = 600.0

logger = logging.getLogger(__name__)


class Runtime:
    """One config at work.

    Attributes:
        config: checked.
        dispatcher: calls upstreams.
        decider: asks strategies.
        embedder: of queries; None if the config has none.
        models: by name.
        users: requests under way on it.
        is_loaded: what runs in this process is ready.
        mark: what tells its answers from those of another config, where processes share them; empty where they do not.

    Args:
        config: see there.
        on_bypass: see `Decider`.
        strategies: see `Decider`.
        previous: the one whose place it takes; what is known of deployments is carried over.
        metrics: see `Decider`.

    Raises ConfigError, CheckpointError, BackendError or TokenizerError if something in the config cannot be made.
    """

    def __init__(
        self,
        config: GatewayConfig,
        on_bypass: Callable[[str, str], None] = lambda name, why: None,
        strategies: Mapping[str, Strategy] | None = None,
        previous: "Runtime | None" = None,
        metrics: Callable[[str], Metrics] | None = None,
    ) -> None:
        self.config = config
        self.models: dict[str, ModelConfig] = {model.name: model for model in config.models}
        self.embedder: Embedder | None = None if config.embedder is None else config.embedder.build()
        if self.embedder is not None and self.embedder.needs_fit:
            raise ConfigError(
                "embedder has to learn from a corpus first; use one that needs none, or a fitted router with its own"
            )
        self.counters = {
            model.name: _counter(model.tokenizer, f"models.{at}.tokenizer")
            for at, model in enumerate(config.models)
            if model.tokenizer
        }
        self.decider = Decider(config, self.embedder, on_bypass, strategies, metrics)
        self.dispatcher: Dispatcher = _dispatcher(config, None if previous is None else previous.dispatcher)
        _check_default_models(config, self.dispatcher)
        for line in unpriced(config.models):
            logger.warning("%s", line)
        self.users, self.mark, self.is_loaded = 0, b"", False
        self._free = asyncio.Event()
        self._is_old = False

    async def load(self) -> None:
        """Load what runs in this process. Raises ConfigError if it cannot be; `close` ends what has begun."""
        async with loaded(self.config):
            await self.dispatcher.start()
        for name, model in self.models.items():
            group = self.dispatcher.groups[name]
            if model.context is None and group.group.context is not None:
                self.models[name] = model.replace(context=group.group.context)
            counters = [_counter_of(live) for live in group.lives]
            if name not in self.counters and (first := counters[0]) is not None and None not in counters:
                self.counters[name] = partial(_counted, group.lives[0].name, first)
        self.is_loaded = True

    @property
    def given_up(self) -> list[str]:
        """Deployments whose engine in this process has died too often: they answer nothing until a reload."""
        return [live.name for live in self.dispatcher.lives() if _has_failed(live)]

    @contextmanager
    def used(self) -> Iterator[Self]:
        """It is in use until the block ends, and is not closed by a reload before."""
        self.users += 1
        try:
            yield self
        finally:
            self.release()

    def release(self) -> None:
        """A request on it has ended, which counted itself in ``users``."""
        self.users -= 1
        if self._is_old and self.users == 0:
            self._free.set()

    async def retire(self) -> None:
        """Close it once the requests on it have ended, and it is known what their calls cost."""
        self._is_old = True
        try:
            async with asyncio.timeout(CLOSE_S):
                if self.users:
                    await self._free.wait()
                await self.dispatcher.late.settled()
        except TimeoutError:
            logger.warning("%d requests of the config before have not ended, and are broken off", self.users)
        finally:
            await self.close()

    async def close(self) -> None:
        """Close it now."""
        self.decider.close()
        await self.dispatcher.close()


@asynccontextmanager
async def loaded(config: GatewayConfig) -> AsyncIterator[None]:
    """The models of a config that run in this process, loaded before anything else is made of it: `Runtime.load` finds them ready.

    Raises ConfigError that begins with the field of the provider whose model cannot be.
    """
    begun: list[Provider] = []
    try:
        for name, field, one in inside(config):
            provider: Provider = one.build()
            begun.append(provider)
            try:
                await plainly_awaited(provider.start)
            except AnabranchError as error:
                raise ConfigError(f"{field}: deployment {name} cannot start: {words(error)}") from error
        yield
    finally:
        await close_providers(begun)


def _check_default_models(config: GatewayConfig, dispatcher: Dispatcher) -> None:
    """Raises ConfigError for a default that no provider of it can be asked for."""
    for kind, name in config.default_models.items():
        providers = [live.provider for live in dispatcher.groups[name].lives]
        if not any(kind in one.endpoints for one in providers):
            kinds = ", ".join(sorted({str(one.kind) for one in providers}))
            raise ConfigError(
                f"default_models.{kind} is {name!r}, and {kind} cannot be asked of {kinds}; name a model of a kind that can, such as openai"
            )


def _dispatcher(config: GatewayConfig, previous: Dispatcher | None) -> Dispatcher:
    try:
        return Dispatcher(groups_of(config), rules_of(config), previous=previous)
    except MissingExtraError:
        # A provider does not know where in the config it stands.
        check_providers(config)
        raise


def _has_failed(live: Live) -> bool:
    """What its provider says. One that cannot say so takes no server out: whether it answers is seen when it is asked."""
    try:
        given = plainly(lambda: live.provider.has_failed)
        found = plainly(lambda: truth_of(given))
    except Exception as error:
        logger.warning("the provider of deployment %s cannot say whether it has failed: %s", live.name, raised(error))
        return False
    if found is None:
        logger.warning(
            "the provider of deployment %s says neither that it has failed nor that it has not: has_failed is %s; it must be true or false",
            live.name,
            said(given),
        )
    return found is True


def _counter_of(live: Live) -> Counter | None:
    """The counter of its provider, if it has one."""
    try:
        found = plainly(lambda: live.provider.counter)
    except Exception as error:
        logger.warning("the provider of deployment %s has no counter to give: %s", live.name, raised(error))
        return None
    return found if callable(found) else None


def _counted(name: str, counter: Counter, text: str) -> int:
    """What the own counter of deployment ``name`` says of a text. Raises UncountedError, with a line in the log."""
    try:
        return counted_by_others(counter, text)
    except UncountedError as error:
        # Its words are ours.
        logger.warning("the provider of deployment %s cannot count a text, which is estimated: %s", name, words(error))
        raise


def _counter(path: str, field: str) -> Counter:
    """Counts tokens by a ``tokenizer.json``, which a field of the config names."""
    require("tokenizers", by=f"{field}: counting by a tokenizer", of="routers")
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise TokenizerError(
            f"{field}: no tokenizer at {path}; give the path of a tokenizer.json, or leave it out to estimate"
        )
    try:
        made: Any = Tokenizer.from_file(path)
    except Exception as error:
        # The library raises plain Exception.
        raise TokenizerError(f"{field}: {path} is no tokenizer.json: {words(error)}") from None
    # Of models that embed: files that cut a text short, or fill it up to a length, count neither its tokens nor what they cost.
    made.no_truncation()
    made.no_padding()
    # What a sender writes is text to those who sell tokens: where it spells out a special one, that is several, and not one.
    made.encode_special_tokens = True
    # Of one text at a time the library holds Python's lock, and with it the event loop, as long as it takes; of several it does not. Where
    # each token stands in the text, which the slower of the two finds out besides, nobody asks.
    return lambda text: len(made.encode_batch_fast([text], add_special_tokens=False)[0].ids)
