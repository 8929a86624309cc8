"""Moving in from LiteLLM: the part of its ``config.yaml`` that means the same here, and a list of what does not.

Taken over: ``model_list`` (several entries of one ``model_name`` become deployments of one model; keys as ``os.environ/NAME``; rpm, tpm,
weight, timeout; prices, context and output limits of ``model_info``), ``router_settings`` (strategy, retries, timeout, fallbacks, aliases),
``litellm_settings`` (retries, timeout, fallbacks), and ``general_settings.master_key`` as the key of the admin interface.
"""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from anabranch.bounds import LARGEST_INT, shown
from anabranch.config import from_dict, to_dict
from anabranch.errors import ConfigError, DataError
from anabranch.gateway.config.gateway import GatewayConfig
from anabranch.gateway.config.lines import Lines, parse
from anabranch.gateway.config.secret import VARIABLE

Table = dict[str, Any]

# Dollars a token -> nano-dollars a million tokens.
NANO_MILLION = 10**15
LARGEST = Decimal(LARGEST_INT)
_BALANCE = {
    "simple-shuffle": "weighted", "least-busy": "least_in_flight", "latency-based-routing": "latency", "cost-based-routing": "price",
    "usage-based-routing": "tpm", "usage-based-routing-v2": "tpm",
}  # fmt: skip
# What speaks OpenAI's API, and where it is when the config does not say.
_ENDPOINTS = {
    "openai": "https://api.openai.com/v1", "text-completion-openai": "https://api.openai.com/v1", "deepseek": "https://api.deepseek.com/v1",
    "groq": "https://api.groq.com/openai/v1", "mistral": "https://api.mistral.ai/v1", "together_ai": "https://api.together.xyz/v1",
    "openrouter": "https://openrouter.ai/api/v1", "fireworks_ai": "https://api.fireworks.ai/inference/v1", "xai": "https://api.x.ai/v1",
    "perplexity": "https://api.perplexity.ai", "hosted_vllm": None, "openai_like": None, "custom_openai": None, "lm_studio": None,
    "llamafile": None, "litellm_proxy": None,
}  # fmt: skip
_KEYS = {
    "openai": "OPENAI_API_KEY", "text-completion-openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY",
    "deepseek": "DEEPSEEK_API_KEY", "groq": "GROQ_API_KEY", "mistral": "MISTRAL_API_KEY", "together_ai": "TOGETHERAI_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "fireworks_ai": "FIREWORKS_API_KEY", "xai": "XAI_API_KEY", "perplexity": "PERPLEXITYAI_API_KEY",
}  # fmt: skip
_PARAMS = frozenset((
    "model", "api_base", "base_url", "api_key", "rpm", "tpm", "weight", "timeout", "stream_timeout", "max_parallel_requests",
    "custom_llm_provider", "input_cost_per_token", "output_cost_per_token",
))  # fmt: skip
_INFO = frozenset((
    "id", "mode", "base_model", "input_cost_per_token", "output_cost_per_token", "cache_read_input_token_cost", "max_input_tokens",
    "max_output_tokens", "max_tokens",
))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import gave.

    Attributes:
        config: ours.
        left: what was not taken over, one sentence each, with file, line and field.
    """

    config: GatewayConfig
    left: tuple[str, ...]

    def to_dict(self) -> Table:
        """The config as a table for a file of ours; secrets are references, so it may be written down."""
        return to_dict(self.config)


def import_litellm(path: str | Path) -> Imported:
    """Read a LiteLLM ``config.yaml``.

    Raises DataError for a file that cannot be read, ConfigError for one without a model that can be taken over.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the config {path}: {error}") from None
    data, lines = parse(text, path)
    return _Import(path, lines).run(data)


class _Import:
    def __init__(self, path: Path, lines: Lines) -> None:
        self.path, self.lines, self.left = path, lines, list[str]()

    def run(self, data: Table) -> Imported:
        models: dict[str, Table] = {}
        for at, entry in enumerate(self._list(data.get("model_list"), "model_list")):
            self._entry(entry, f"model_list.{at}", models)
        if not models:
            raise ConfigError(
                f"{self.path}: no entry of model_list can be taken over; {'; '.join(self.left) or 'it is empty'}"
            )
        config: Table = {"models": list(models.values())}
        for name in data:
            if name not in (
                "model_list",
                "router_settings",
                "litellm_settings",
                "general_settings",
                "environment_variables",
            ):
                self._leave(name, "is not known here")
        settings = {
            name: self._table(data.get(name), name)
            for name in ("litellm_settings", "router_settings", "general_settings")
        }
        # The latter wins, as it does there.
        for name in ("litellm_settings", "router_settings"):
            self._settings(settings[name], name, config, models)
        self._general(settings["general_settings"], config)
        for name in self._table(data.get("environment_variables"), "environment_variables"):
            self._leave(f"environment_variables.{name}", "is not set by a config here; set it before starting")
        return Imported(config=from_dict(GatewayConfig, config), left=tuple(self.left))

    def _leave(self, field: str, why: str) -> None:
        known = field
        while known and known not in self.lines:
            known = known.rpartition(".")[0]
        self.left.append(f"{self.path}:{self.lines.get(known, 1)}: {field} {why}")

    def _list(self, value: Any, field: str) -> list[Any]:
        if value is not None and not isinstance(value, list):
            self._leave(field, "is no list")
        return value if isinstance(value, list) else []

    def _table(self, value: Any, field: str) -> Table:
        if value is not None and not isinstance(value, dict):
            self._leave(field, "is no table")
        return value if isinstance(value, dict) else {}

    def _entry(self, entry: Any, field: str, models: dict[str, Table]) -> None:
        entry = self._table(entry, field)
        name, params = entry.get("model_name"), self._table(entry.get("litellm_params"), f"{field}.litellm_params")
        upstream = params.get("model")
        if not isinstance(name, str) or not name or not isinstance(upstream, str) or not upstream:
            self._leave(field, "has no model_name with litellm_params.model")
            return
        if "*" in name or "*" in upstream:
            self._leave(f"{field}.model_name", f"is {name!r}: wildcards are not taken over; name each model")
            return
        provider = self._provider(params, upstream, f"{field}.litellm_params")
        if provider is None:
            return
        info = self._table(entry.get("model_info"), f"{field}.model_info")
        self._unknown(entry, ("model_name", "litellm_params", "model_info"), field)
        self._unknown(params, _PARAMS, f"{field}.litellm_params")
        self._unknown(info, _INFO, f"{field}.model_info")
        if info.get("mode") not in (None, "chat", "completion", "embedding"):
            self._leave(f"{field}.model_info.mode", f"is {info['mode']!r}, which the gateway does not serve")
            return
        deployment = self._deployment(params, f"{field}.litellm_params") | {"provider": provider}
        facts = self._facts(params, info, field)
        if name not in models:
            models[name] = {"name": name, **facts, "deployments": [deployment]}
            return
        models[name]["deployments"].append(deployment)
        for fact, value in facts.items():
            if models[name].setdefault(fact, value) != value:
                self._leave(
                    f"{field}.model_info", f"gives {name!r} another {fact} than the entry before; the first counts"
                )

    def _unknown(self, table: Table, known: Any, field: str) -> None:
        for name in table:
            if name not in known:
                self._leave(f"{field}.{name}", "has no counterpart here")

    def _provider(self, params: Table, upstream: str, field: str) -> Table | None:
        kind, _, model = upstream.partition("/")
        base = params.get("api_base") or params.get("base_url")
        given = params.get("custom_llm_provider")
        if isinstance(given, str):
            kind, model = given, upstream.removeprefix(f"{given}/")
        elif not model or (kind not in _ENDPOINTS and kind != "anthropic" and base is None):
            if model:
                self._leave(f"{field}.model", f"is {upstream!r}: there is no provider {kind!r} here")
                return None
            kind, model = ("anthropic" if upstream.startswith("claude") else "openai"), upstream
        elif kind not in _ENDPOINTS and kind != "anthropic":
            self._leave(f"{field}.model", f"is {upstream!r}: there is no provider {kind!r} here, even with an api_base")
            return None
        if kind != "anthropic" and kind not in _ENDPOINTS:
            self._leave(f"{field}.custom_llm_provider", f"is {kind!r}, which is no provider here")
            return None
        base = self._reference_base(base, f"{field}.api_base") or (None if kind == "anthropic" else _ENDPOINTS[kind])
        if base is None and kind != "anthropic":
            self._leave(f"{field}.api_base", f"is missing, and {kind} is nowhere by default")
            return None
        made: Table = {"kind": "anthropic" if kind == "anthropic" else "openai", "model": model}
        if base is not None:
            made["base_url"] = base
        made["key_env"] = self._key(params, kind, field)
        return made

    def _reference_base(self, base: Any, field: str) -> str | None:
        if isinstance(base, str) and base.startswith("os.environ/"):
            self._leave(field, "is read from the environment there; write the URL itself into base_url")
            return None
        return base if isinstance(base, str) else None

    def _key(self, params: Table, kind: str, field: str) -> str | None:
        key = params.get("api_key")
        if key is None:
            return _KEYS.get(kind) if not (params.get("api_base") or params.get("base_url")) else None
        variable = _variable(key)
        if variable is None:
            self._leave(
                f"{field}.api_key",
                "is a key written into the file (not shown); put it into the environment and set key_env",
            )
        return variable

    def _deployment(self, params: Table, field: str) -> Table:
        made: Table = {}
        for theirs, ours, kind in (
            ("rpm", "rpm", int), ("tpm", "tpm", int), ("max_parallel_requests", "max_in_flight", int), ("weight", "weight", float),
            ("timeout", "timeout_s", float), ("stream_timeout", "first_token_timeout_s", float),
        ):  # fmt: skip
            value = self._number(params.get(theirs), f"{field}.{theirs}")
            if value is not None:
                made[ours] = kind(value)
        return made

    def _number(self, value: Any, field: str, least: float = 0, most: Decimal = LARGEST) -> Decimal | None:
        if value is None:
            return None
        try:
            number = Decimal(str(value)) if not isinstance(value, bool) else Decimal("nan")
        except (InvalidOperation, ValueError):
            number = Decimal("nan")
        if not number.is_finite() or not least < number <= most:
            self._leave(field, f"is {shown(value)}, which is no number above {least} and up to {most:,}")
            return None
        return number

    def _facts(self, params: Table, info: Table, field: str) -> Table:
        made: Table = {}
        price: Table = {}
        for theirs, ours in (
            ("input_cost_per_token", "input"), ("output_cost_per_token", "output"), ("cache_read_input_token_cost", "cached_input"),
        ):  # fmt: skip
            table, where = (params, "litellm_params") if theirs in params else (info, "model_info")
            if str(table.get(theirs)) not in ("0", "0.0"):
                value = self._number(table.get(theirs), f"{field}.{where}.{theirs}", most=LARGEST / NANO_MILLION)
                if value is not None:
                    price[ours] = int((value * NANO_MILLION).to_integral_value())
        if price:
            made["price"] = price
        prompt = self._number(info.get("max_input_tokens"), f"{field}.model_info.max_input_tokens")
        answer = self._number(
            info.get("max_output_tokens", info.get("max_tokens")), f"{field}.model_info.max_output_tokens"
        )
        if answer is not None:
            made["max_tokens"] = int(answer)
        if prompt is not None:
            made["context"] = int(prompt + (answer or 0))
        return made

    def _settings(self, settings: Table, field: str, config: Table, models: dict[str, Table]) -> None:
        for name, value in settings.items():
            here = f"{field}.{name}"
            if name == "routing_strategy":
                if value in _BALANCE:
                    config["balance"] = _BALANCE[value]
                else:
                    self._leave(here, f"is {value!r}; there is balance: {', '.join(sorted(set(_BALANCE.values())))}")
            elif name == "num_retries":
                number = self._number(value, here, least=-1)
                if number is not None:
                    config["retries"] = {"attempts": min(int(number) + 1, 20)}
            elif name in ("timeout", "request_timeout"):
                number = self._number(value, here)
                if number is not None:
                    config["deadline_s"] = float(number)
            elif name in ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks", "default_fallbacks"):
                self._fallbacks(value, here, config, models)
            elif name == "model_group_alias":
                self._aliases(value, here, models)
            else:
                self._leave(here, "has no counterpart here")

    def _fallbacks(self, value: Any, field: str, config: Table, models: dict[str, Table]) -> None:
        ours = config.setdefault("fallbacks", {})
        if field.endswith("default_fallbacks"):
            value = [{name: value} for name in models]
        for at, entry in enumerate(self._list(value, field)):
            here = f"{field}.{at}"
            for name, others in self._table(entry, here).items():
                found = [other for other in self._list(others, f"{here}.{name}") if isinstance(other, str)]
                for other in [name, *found]:
                    if other not in models:
                        self._leave(f"{here}.{name}", f"names {other!r}, which is no model that was taken over")
                if name in models:
                    known = ours.setdefault(name, [])
                    known += [
                        other for other in dict.fromkeys(found) if other in models and other not in (name, *known)
                    ]

    def _aliases(self, value: Any, field: str, models: dict[str, Table]) -> None:
        for alias, target in self._table(value, field).items():
            target = target.get("model") if isinstance(target, dict) else target
            if target in models and alias not in models:
                models[target].setdefault("aliases", []).append(alias)
            else:
                self._leave(
                    f"{field}.{alias}",
                    f"stands for {target!r}, which is no model that was taken over, or is one itself",
                )

    def _general(self, settings: Table, config: Table) -> None:
        for name, value in settings.items():
            variable = _variable(value) if name == "master_key" else None
            if variable is not None:
                config["admin"] = {"key": f"env:{variable}"}
            elif name == "master_key":
                self._leave(
                    f"general_settings.{name}",
                    "is a key written into the file (not shown); set admin.key to env:VARIABLE",
                )
            elif name == "database_url":
                self._leave(
                    f"general_settings.{name}", "is LiteLLM's own database; keys and spending there are not taken over"
                )
            else:
                self._leave(f"general_settings.{name}", "has no counterpart here")


def _variable(value: Any) -> str | None:
    """NAME of ``os.environ/NAME``."""
    match = re.fullmatch(r"os\.environ/(.+)", value) if isinstance(value, str) else None
    return match[1] if match and VARIABLE.fullmatch(match[1]) else None
