"""One file is one gateway: TOML or YAML to `GatewayConfig`, and every mistake told with file, line and field.

What files may write shorter than `to_dict` does:

    price = {input_usd = 0.15, output_usd = 0.6}    dollars per million tokens; web_search_usd and request_usd per thousand
    kind = "knn" in a strategy                      its name, with the fields of its config beside it, a budget_usd of its own among them
    api_key = "env:OPENAI_API_KEY" in a provider    where the key is: the environment, or "file:PATH", an encrypted file
"""

import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from anabranch.bounds import shown
from anabranch.config import from_dict
from anabranch.errors import AnabranchError, ConfigError
from anabranch.gateway.config.gateway import GatewayConfig
from anabranch.gateway.config.lines import Lines, join, parse
from anabranch.gateway.config.price_sides import with_both_sides
from anabranch.gateway.config.secret import MUST, VARIABLE, is_reference
from anabranch.gateway.config.source import LocatedError, Source, read_text
from anabranch.gateway.config.strategies import StrategyConfig
from anabranch.gateway.config.suggestions import hint
from anabranch.routers.money import MOST_NANO, NANO, TOKEN_RATES, nano_dollars

# Of a million tokens; of a thousand searches and calls.
PRICES = tuple(f"{name}_usd" for name in (*TOKEN_RATES, "web_search", "request"))
_STRATEGY = ("use", "fields", "trade_off", "budget_usd", "router", "models", "timeout_s", "learns_from", "learns_of")


def load_config(path: str | Path, *, reads_models: bool = False) -> GatewayConfig:
    """Read a gateway's config from a ``.toml``, ``.yaml`` or ``.json`` file.

    Paths in it (``store``, ``router``, ``tokenizer``, key files, ``model`` of ``kind = "local"``) are relative to the file. Strategies are
    tried out, and secrets looked up but not kept. Models that run in the gateway's process must be there; with ``reads_models`` their files
    are looked into too, which may take seconds.

    Raises DataError for a file that cannot be read, ConfigError for one that is wrong: ``gateway.toml:12: models.0.price.input is ...``.
    """
    path = Path(path)
    data, lines = parse(read_text(path), path)
    return config_from(data, lines, path, reads_models=reads_models)


def config_from(data: dict[str, Any], lines: Lines, path: Path, *, reads_models: bool = False) -> GatewayConfig:
    """`load_config` of what was parsed already."""
    source = Source(path, lines)
    try:
        config = from_dict(GatewayConfig, _plain(data, source))
    except LocatedError:
        raise
    except ConfigError as error:
        source.fail(str(error))
    config = _at_home(config, path.parent)
    _check_secrets(config, source)
    _check_providers(config, source, reads_models)
    _check_strategies(config, source)
    return config


def _plain(data: dict[str, Any], source: Source) -> dict[str, Any]:
    """``data`` with the short forms of files written out."""
    out = dict(data)
    if isinstance(out.get("models"), list):
        out["models"] = [_plain_model(model, f"models.{at}", source) for at, model in enumerate(out["models"])]
    if isinstance(out.get("strategies"), dict):
        out["strategies"] = {
            name: _plain_strategy(table, f"strategies.{name}", source) for name, table in out["strategies"].items()
        }
    return out


def _plain_model(model: Any, path: str, source: Source) -> Any:
    if not isinstance(model, dict):
        return model
    out = dict(model)
    if isinstance(out.get("price"), dict):
        out["price"] = _plain_price(out["price"], f"{path}.price", source)
    if isinstance(out.get("deployments"), list):
        out["deployments"] = [
            _plain_deployment(table, f"{path}.deployments.{place}", source)
            for place, table in enumerate(out["deployments"])
        ]
    return with_both_sides(out, path, source)


def _plain_price(price: dict[str, Any], path: str, source: Source) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in price.items():
        field = f"{path}.{name}"
        if name not in PRICES:
            if name.endswith("_usd"):
                source.fail(f"{path}: Price has no field {name!r}; {hint(name, PRICES)}", field)
            if f"{name}_usd" in PRICES and f"{name}_usd" not in price and _looks_like_dollars(value):
                source.fail(
                    f"{field} is {shown(value)}, and counts nano-dollars; for dollars per million tokens write {name}_usd = {shown(value)}",
                    field,
                )
            out[name] = value
            continue
        plain = name.removesuffix("_usd")
        if plain in price:
            source.fail(f"{field} and {path}.{plain} are both there; give one", field)
        is_number = isinstance(value, int | float | str) and not isinstance(value, bool)
        try:
            nano = nano_dollars(value) if is_number else -1
        except AnabranchError:
            nano = -1
        if nano < 0:
            source.fail(
                f"{field} is {shown(value)}; it must be dollars per million tokens, from 0 to {MOST_NANO // NANO:,}",
                field,
            )
        if nano == 0 and Decimal(str(value)) > 0:
            source.fail(f"{field} is {shown(value)}; the least is 0.000000001, and 0 where it costs nothing", field)
        out[plain] = nano
    if isinstance(out.get("tiers"), dict):
        out["tiers"] = {
            name: _plain_other(tier, out, f"{path}.tiers.{name}", source) for name, tier in out["tiers"].items()
        }
    if "long" in out:
        out["long"] = _plain_other(out["long"], out, f"{path}.long", source)
    return out


def _looks_like_dollars(value: Any) -> bool:
    """A number that no price in nano-dollars per million tokens is: a fraction, or less than a hundredth of a cent."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**5)


def _plain_other(other: Any, price: dict[str, Any], path: str, source: Source) -> Any:
    """A price of a tier, or of long prompts, which costs for tokens what the price around it does where it names nothing."""
    if not isinstance(other, dict):
        return other
    out = _plain_price(other, path, source)
    return {**{name: price[name] for name in ("input", "output") if name in price}, **out}


def _plain_deployment(table: Any, path: str, source: Source) -> Any:
    if not isinstance(table, dict):
        return table
    if isinstance(table.get("price"), dict):
        table = {**table, "price": _plain_price(table["price"], f"{path}.price", source)}
    provider = table.get("provider")
    if not isinstance(provider, dict):
        return table
    out, path = dict(provider), f"{path}.provider"
    key = out.pop("api_key", None)
    if key is not None:
        if not is_reference(key):
            source.fail(f"{path}.api_key {MUST}", f"{path}.api_key")
        kind, _, where = key.partition(":")
        out |= {"key_env": where} if kind == "env" else {"key_env": None, "key_file": where}
    if isinstance(out.get("key_file"), str):
        out["key_file"] = os.path.join(source.path.parent, out["key_file"])
    if out.get("kind") == "local" and isinstance(out.get("model"), str) and out["model"]:
        out["model"] = os.path.join(source.path.parent, out["model"])
    named = out.get("key_env")
    if named and not (isinstance(named, str) and VARIABLE.fullmatch(named)):
        source.fail(
            f"{path}.key_env is no name of an environment variable (what it is, is not shown here)", f"{path}.key_env"
        )
    return {**table, "provider": out}


def _plain_strategy(table: Any, path: str, source: Source) -> Any:
    if not isinstance(table, dict) or "kind" not in table:
        return table
    out = {name: value for name, value in table.items() if name in _STRATEGY and name != "fields"}
    if "use" in out:
        source.fail(f"{path}.kind and {path}.use are both there; give one", f"{path}.kind")
    if "budget_usd" in out and "router" not in out and _has_field(table["kind"], "budget_usd"):
        # Without a fitted router there is no other that it could be.
        out.pop("budget_usd")
    beside = {name: value for name, value in table.items() if name not in out and name not in ("kind", "fields")}
    fields = table.get("fields", {})
    return {**out, "use": table["kind"], "fields": {**beside, **fields} if isinstance(fields, dict) else fields}


def _has_field(kind: Any, name: str) -> bool:
    """Whether the config of a strategy, or of a predictor, has such a field; False for a kind that there is not."""
    from anabranch.registry import kinds, resolve
    from anabranch.routers import strategies

    if kind not in strategies.names():
        return False
    part: Any = resolve("predictor" if kind in kinds("predictor") else "strategy", kind)
    return name in part.Config.__dataclass_fields__


def _at_home(config: GatewayConfig, folder: Path) -> GatewayConfig:
    """Paths in the config, which are relative to its file, relative to where we are."""

    def at(path: str | None) -> str | None:
        return path if path is None else os.path.join(folder, path)

    models = tuple(
        model.replace(tokenizer=at(model.tokenizer)) if model.tokenizer else model for model in config.models
    )
    strategies = {
        name: item.replace(router=at(item.router)) if item.router else item for name, item in config.strategies.items()
    }
    store = config.store if "://" in config.store else str(at(config.store))
    key = config.admin.key
    if key is not None and key.startswith("file:"):
        config = config.replace(admin=config.admin.replace(key=f"file:{at(key.removeprefix('file:'))}"))
    return config.replace(models=models, strategies=strategies, store=store)


def _check_secrets(config: GatewayConfig, source: Source) -> None:
    """Variables that hold keys are there, where the config names them."""
    if config.admin.key is not None:
        try:
            config.admin.key.reveal()
        except AnabranchError as error:
            source.fail(f"admin.key: {error}", "admin.key")
    if config.shared is not None:
        try:
            config.shared.revealed()
        except AnabranchError as error:
            source.fail(f"shared.url: {error}", "shared.url")
    for at, model in enumerate(config.models):
        for place, deployment in enumerate(model.deployments):
            path = f"models.{at}.deployments.{place}.provider"
            variable = getattr(deployment.provider, "key_env", None)
            given = next((name for name in ("api_key", "key_env") if f"{path}.{name}" in source.lines), "key_env")
            has_file = getattr(deployment.provider, "key_file", None) is not None
            if variable and not has_file and not os.environ.get(variable):
                source.fail(
                    f"{path}.{given} is {variable}, an environment variable that is not set; "
                    'set it, or key_env = "" for an upstream that wants no key',
                    f"{path}.{given}",
                )


def _check_providers(config: GatewayConfig, source: Source, reads_models: bool) -> None:
    """What providers name on this machine is there."""
    for at, model in enumerate(config.models):
        for place, deployment in enumerate(model.deployments):
            path = f"models.{at}.deployments.{place}.provider"
            try:
                deployment.provider.check(reads_model=reads_models)
            except AnabranchError as error:
                words = re.split(r"[ :]", str(error), maxsplit=1)[0].split(".")
                fields = (".".join([path, *words[:end]]) for end in range(len(words), 0, -1))
                field = next((name for name in fields if name in source.lines), path)
                is_named = isinstance(error, ConfigError)
                source.fail(f"{path}.{error}" if is_named else f"{path}: {error}", field)


def _check_strategies(config: GatewayConfig, source: Source) -> None:
    """Each strategy can be made, but for those that were fitted: those are there."""
    for name, strategy in config.strategies.items():
        path = f"strategies.{name}"
        if strategy.router is not None:
            if not Path(strategy.router).exists():
                source.fail(
                    f"{path}.router is {strategy.router!r}, and there is no such file or folder", f"{path}.router"
                )
            continue
        try:
            make_strategy(strategy)
        except AnabranchError as error:
            unknown = re.search(r" has no field '([^']*)'", str(error))
            word = unknown[1] if unknown else re.split(r"[ :]", str(error), maxsplit=1)[0]
            places = (join(path, word), join(f"{path}.fields", word), f"{path}.kind", f"{path}.use")
            source.fail(f"{path}: {error}", next((place for place in places if place in source.lines), path))


def make_strategy(config: StrategyConfig) -> Any:
    """The strategy that ``use``, ``fields`` and ``trade_off`` say, not yet fitted. Raises ConfigError."""
    from anabranch.config import from_dict as read
    from anabranch.registry import kinds, resolve
    from anabranch.routers import strategies
    from anabranch.routers.contract.predictor import Ranked

    assert config.use is not None
    if config.use not in strategies.names():
        raise ConfigError(f"no strategy {config.use!r}; {hint(config.use, strategies.names())}")
    if config.use in kinds("predictor"):
        part: Any = resolve("predictor", config.use)
        return Ranked.Config(predictor=read(part.Config, config.fields), trade_off=config.trade_off or 0.0).build()
    part = resolve("strategy", config.use)
    fields = config.fields if config.trade_off is None else {**config.fields, "trade_off": config.trade_off}
    return read(part.Config, fields).build()
