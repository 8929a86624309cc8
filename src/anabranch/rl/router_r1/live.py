"""Router-R1 with questions of your own and a pool that is there: models behind an endpoint, models in this process, and replies of a table.

    models = {
        "small": PoolModel(price=PoolPrice(output_usd=0.4), base_url="http://127.0.0.1:8000/v1", about="quick; capitals, dates"),
        "local": PoolModel(price=PoolPrice(output_usd=0.1), engine="models/SmolLM2-135M-Instruct"),
        "large": PoolModel(price=PoolPrice(output_usd=1.8)),                                  # what the table has of it alone
    }
    LiveWorld.Config(questions="q.jsonl", tokenizer="models/router", models=models, table="table.jsonl", kept="runs/router/pool.jsonl")

Models are asked side by side while other episodes go on. What they say is written down in ``kept``: a training that goes on asks nobody
again what was asked, and the file is a table for trainings after it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from anabranch.bounds import Size
from anabranch.config import Config as BaseConfig
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.lm.checkpoint import find_model
from anabranch.rl.router_r1.own import OwnWorld
from anabranch.routers.contract.ask import Arm
from anabranch.routers.router_r1.asked_pool import AskPool, Member
from anabranch.routers.router_r1.environment import Price
from anabranch.routers.router_r1.kept_pool import KeptPool, read_table
from anabranch.routers.scale.client_ask import ClientAsk, PostClient
from anabranch.routers.scale.engine_ask import EngineAsk
from anabranch.web.endpoint import Endpoint

__all__ = ["LiveWorld", "PoolModel", "PoolPrice"]

# Of a chat request: what a call costs at most hangs on some of them.
_OURS = frozenset({"model", "messages", "n", "stream", "max_tokens", "temperature"})


@configclass
class PoolPrice(BaseConfig):
    """What a model costs.

    Attributes:
        output_usd, input_usd: dollars of a million completion tokens, of a million prompt tokens.
    """

    output_usd: float = Field(ge=0)
    input_usd: float = Field(default=0.0, ge=0)


@configclass
class PoolModel(BaseConfig):
    """A model of a pool.

    Attributes:
        price: of it; there is none by default, since no price is not 0.
        about: what the router is told of it.
        base_url: endpoint that speaks OpenAI's API, up to and with the version; "" for the pool's.
        key_env: environment variable that holds the endpoint's key; "" for the pool's.
        model: its name there; "" for the name in the pool.
        engine: path of a model that runs in this process, in place of an endpoint.
        engine_settings: fields of `anabranch.serving.config.ServingConfig` of that.
        settings: further fields of OpenAI's chat request.
    """

    price: PoolPrice
    about: str = ""
    base_url: str = ""
    key_env: str = ""
    model: str = ""
    engine: str = ""
    engine_settings: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine and (self.base_url or self.key_env or self.model):
            raise ConfigError(
                "engine runs in this process, and base_url, key_env and model are of an endpoint; give one of them"
            )
        beside = self.settings.get("extra_body", {})
        if not isinstance(beside, dict):
            raise ConfigError(f"settings.extra_body is a {type(beside).__name__}; it must be a table")
        ours = sorted((_OURS & self.settings.keys()) | ((_OURS | {"max_completion_tokens"}) & beside.keys()))
        if ours:
            raise ConfigError(f"settings has {', '.join(ours)}, which the pool says itself")


class LiveWorld(OwnWorld, kind="live"):
    """See the module.

    Raises DataError for files that are not there or damaged, ConfigError for an address that is none and a key that is not set,
    CheckpointError for an engine's model that is not there.
    """

    pool: KeptPool

    @configclass
    class Config(OwnWorld.Config):
        """Of `OwnWorld`, and the pool. Descriptions in ``about`` are in place of those of the models.

        Attributes:
            models: that may be asked, by the names that the router knows them by.
            base_url, key_env: endpoint of those that name none; "" where the others are known from ``table`` alone.
            table: file of what models said before, see `RecordedWorld`; "" for none.
            kept: file that what they say is written to, and read from; "" for none.
            reply_tokens, call_s: most tokens of a reply, most seconds of a call.
            max_calls, max_usd: of all calls that ``kept`` has, before which training ends; None for no limit.
            max_failures: calls in a row that may fail, each after its last try, before it ends.
            retries: how often a call is made again that failed by what may be over in a moment (no connection, 429, 5xx): after 1 second,
                after 2 more, and so on.
        """

        models: dict[str, PoolModel] = Field(min_length=1)
        base_url: str = ""
        key_env: str = ""
        table: str = ""
        kept: str = ""
        reply_tokens: Size = Field(default=512, ge=1)
        call_s: float = Field(default=60.0, gt=0)
        max_calls: int | None = Field(default=None, ge=0)
        max_usd: float | None = Field(default=None, ge=0)
        max_failures: Size = Field(default=20, ge=1)
        retries: int = Field(default=2, ge=0, le=10)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.broken_off = threading.Event()
        self._engines: list[_Engine] = []
        self._asks: list[EngineAsk] = []
        members = {name: one for name in config.models if (one := self._member(name)) is not None}
        live = AskPool(members, reply_tokens=config.reply_tokens, call_s=config.call_s) if members else None
        known = read_table(config.table) if config.table else {}
        unknown = sorted({model for model, _ in known} - config.models.keys())
        if unknown:
            raise ConfigError(
                f"the table has {unknown[0]!r}, which has no price; the pool has {', '.join(config.models)}"
            )
        if live is None and not known:
            raise ConfigError(
                "no model of the pool can be asked: give base_url, an engine, or a table of what they said"
            )
        self.begin(
            KeptPool(
                live,
                config.kept or None,
                known=known,
                prices={name: _price(config.models[name]) for name in config.models},
                max_calls=config.max_calls,
                max_usd=config.max_usd,
                max_failures=config.max_failures,
                retries=config.retries,
                over=self.broken_off,
            )
        )
        self.waits = live is not None

    def about(self) -> dict[str, str]:
        """What the router is told of each, at least what it costs."""
        return {name: self.config.about.get(name) or _described(one) for name, one in self.config.models.items()}

    def strategy(self) -> dict[str, Any]:
        """See `RoutedWorld`."""
        return {**super().strategy(), "reply_tokens": self.config.reply_tokens, "call_s": self.config.call_s}

    def endpoint_of(self, name: str) -> tuple[str, str, str] | None:
        """(address, environment variable of the key, name there) of a model behind an endpoint; None for any other."""
        config, one = self.config, self.config.models[name]
        url = "" if one.engine else one.base_url or config.base_url
        return (url, one.key_env or ("" if one.base_url else config.key_env), one.model or name) if url else None

    def most_usd_of_call(self) -> float:
        """What a call may cost at most, of the dearest model that is there, with a question as long as a turn of the longest tokens."""
        live = [name for name, one in self.config.models.items() if one.engine or self.endpoint_of(name)]
        longest = max(len(self.tokenizer.decode([token]).encode()) for token in range(self.vocab_size))
        query = "x" * min(self.config.turn_tokens * (longest + 1), 4 * self.rules.turn_characters)
        return max((self._most(name, query) for name in live), default=0.0)

    def _most(self, name: str, query: str) -> float:
        live = self.pool.live
        return 0.0 if live is None else live.most_usd(name, query)

    def close(self) -> None:
        """End calls that are out and the threads, and free the engines; asked again they are loaded again."""
        # First, as somebody may be billed for calls.
        self.pool.close()
        for ask in self._asks:
            ask.close()
        for engine in self._engines:
            engine.close()

    def _member(self, name: str) -> Member | None:
        one = self.config.models[name]
        if one.engine:
            find_model(one.engine)
            engine = _Engine(one.engine, one.engine_settings)
            ask = EngineAsk(engine, name=name)
            self._engines.append(engine)
            self._asks.append(ask)
            return Member(ask, Arm(name, one.settings), _price(one))
        there = self.endpoint_of(name)
        if there is None:
            return None
        url, key_env, model = there
        endpoint = Endpoint(url, model, key_env=key_env or None, timeout_s=self.config.call_s)
        return Member(ClientAsk(PostClient(endpoint)), Arm(model, one.settings), _price(one))


class _Engine:
    """An `LLM` that is loaded when it is first asked."""

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        self._llm: Any = None

    @property
    def tokenizer(self) -> Any:
        """Of the model."""
        return self._loaded().tokenizer

    def chat(self, conversations: Any, sampling: Any = None) -> Any:
        """See `LLM.chat`."""
        return self._loaded().chat(conversations, sampling)

    def _loaded(self) -> Any:
        from anabranch.serving.engine import LLM

        if self._llm is None:
            self._llm = LLM(self._path, **self._settings)
        return self._llm

    def close(self) -> None:
        """Free what it holds."""
        if self._llm is not None:
            self._llm.close()
        self._llm = None


def _price(one: PoolModel) -> Price:
    return Price(completion=one.price.output_usd, prompt=one.price.input_usd)


def _described(one: PoolModel) -> str:
    return one.about or f"{one.price.output_usd:g} dollars a million tokens"
