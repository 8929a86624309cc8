"""Moving in from LiteLLM: the part of its ``config.yaml`` that means the same here, and a list of what does not.

Taken over: ``model_list`` (several entries of one ``model_name`` become deployments of one model; providers as in `litellm_providers`; keys
as ``os.environ/NAME``; rpm, tpm, weight, timeouts; max_tokens; prices, ids, context and output limits of ``model_info``; what its
``base_model`` costs by the list that ships, as of the day of the import), and of the settings what `litellm_settings` says. An entry that
says but one of what prompts and answers cost has the other from that list, or no price at all: what is not said is not free.
"""

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from anabranch.bounds import shown
from anabranch.config import from_dict, to_dict
from anabranch.errors import ConfigError, DataError
from anabranch.gateway.config.gateway import GatewayConfig
from anabranch.gateway.config.lines import Lines, parse
from anabranch.gateway.config.litellm_costs import COSTS, MOST_PRICE, NANO_MILLION, completed, hoist_price
from anabranch.gateway.config.litellm_elsewhere import Elsewhere
from anabranch.gateway.config.litellm_entry import Entry
from anabranch.gateway.config.litellm_numbers import LARGEST, number_of
from anabranch.gateway.config.litellm_providers import FIELDS, based_price, kind_of, provider_of
from anabranch.gateway.config.litellm_report import Environment, Report
from anabranch.gateway.config.litellm_settings import Settings
from anabranch.gateway.config.prices import listed_price, unpriced
from anabranch.gateway.output_speeds import speed_at
from anabranch.gateway.providers.media import PATHS as MEDIA
from anabranch.gateway.providers.provider import Provider
from anabranch.routers.money import Price

Table = dict[str, Any]

# What LiteLLM calls what a model is asked, and the endpoint here.
_MODES = {
    "chat": "chat",
    "completion": "completions",
    "embedding": "embeddings",
    "responses": "chat",
    "image_generation": "images",
    "image_edit": "image_edits",
    "audio_speech": "speech",
    "audio_transcription": "transcriptions",
    "moderation": "moderations",
    "rerank": "rerank",
}
_PARAMS = frozenset(
    {
        "model",
        "api_base",
        "base_url",
        "api_key",
        "rpm",
        "tpm",
        "weight",
        "timeout",
        "stream_timeout",
        "max_parallel_requests",
        "custom_llm_provider",
        "request_timeout",
        "headers",
        "extra_headers",
        "max_tokens",
        "base_model",
        *COSTS,
    }
)
_INFO = frozenset(
    {
        "id",
        "mode",
        "base_model",
        "max_input_tokens",
        "max_output_tokens",
        "max_tokens",
        *COSTS,
    }
)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import gave.

    Attributes:
        config: ours.
        left: what was not taken over, one sentence each, with file, line and field.
        notes: what was taken over and is to be known all the same, likewise: what is open, or came from the environment.
    """

    config: GatewayConfig
    left: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def unpriced(self) -> tuple[str, ...]:
        """A sentence for each deployment whose price nobody knows."""
        return tuple(unpriced(self.config.models))

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
    except OSError as error:
        raise DataError(f"cannot read the config {path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot read the config {path}: it is not UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    data, lines = parse(text, path)
    return _Import(path, lines).run(data)


class _Import:
    def __init__(self, path: Path, lines: Lines) -> None:
        self.path, self._report = path, Report(path, lines)
        self._leave = self._report.leave
        # Deployments with an id, and where that stands.
        self.named: list[tuple[Table, str]] = []
        # Deployments whose base_model has a price.
        self.based: list[tuple[Table, Table]] = []
        # Models that write, once for each deployment.
        self.writing: list[str] = []

    def run(self, data: Table) -> Imported:
        models: dict[str, Table] = {}
        self._environment = Environment(data.get("environment_variables"))
        self._elsewhere = Elsewhere(data, self._report, self._environment)
        for at, entry in enumerate(self._list(data.get("model_list"), "model_list")):
            self._entry(entry, f"model_list.{at}", models)
        if not models:
            raise ConfigError(
                f"{self.path}: no entry of model_list can be taken over; {'; '.join(self._report.left) or 'it is empty'}"
            )
        for model in models.values():
            hoist_price(model)
        for deployment, price in self.based:
            # Of that deployment alone: others of its model have their own in the list.
            deployment["price"] = price
        self._name(models)
        config: Table = {"models": list(models.values())}
        for name in data:
            if name not in (
                "model_list",
                "router_settings",
                "litellm_settings",
                "general_settings",
                "environment_variables",
                "credential_list",
            ):
                self._leave(name, "is not known here")
        Settings(config, models, self._report, self._environment).take(data, self._elsewhere.unread)
        for name in self._table(data.get("environment_variables"), "environment_variables"):
            self._leave(f"environment_variables.{name}", "is not set by a config here; set it before starting")
        made, report = from_dict(GatewayConfig, config), self._report
        unbounded = [name for name in dict.fromkeys(self.writing) if "max_tokens" not in models[name]]
        if unbounded:
            named = ", ".join(unbounded[:3]) + (f" and {len(unbounded) - 3} more" if len(unbounded) > 3 else "")
            why = f"has no limit of answers for {named}: where a request names none either, they end at limits.max_tokens = "
            report.note(
                "model_list",
                f"{why}{made.limits.max_tokens:,} tokens, thoughts included, and LiteLLM sends no limit; set max_tokens",
            )
        return Imported(config=made, left=tuple(report.left), notes=tuple(report.notes))

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
        merged = self._elsewhere.merged(params, f"{field}.litellm_params")
        provider = None if merged is None else self._provider(merged, upstream, f"{field}.litellm_params")
        if provider is None:
            return
        info = self._table(entry.get("model_info"), f"{field}.model_info")
        self._unknown(entry, ("model_name", "litellm_params", "model_info"), field)
        # What a model can do is said there for clients, and changes nothing.
        says = [name for name in info if name.startswith("supports_")]
        self._unknown(info, (*_INFO, *says), f"{field}.model_info")
        if not self._serves(info.get("mode"), provider, field):
            return
        deployment = self._deployment(params, f"{field}.litellm_params") | {"provider": provider}
        if (speed := speed_at(str(provider.get("base_url", "")))) is not None:
            deployment["output_speed"] = speed
        own = self._own_price(params, info, field)
        facts = self._facts(params, info, field)
        if own.keys() >= {"input", "output"}:
            deployment["price"] = own
        elif (based := self._based(params, info, provider, field)) is not None:
            if own:
                deployment["price"] = completed(own, based)
            else:
                self.based.append((deployment, to_dict(based)))
        elif own and (listed := listed_price(from_dict(Provider.Config, provider))) is not None:
            deployment["price"] = completed(own, listed)
        elif "input" in own and info.get("mode") == "embedding":
            # Of a model that answers with vectors nothing else is billed.
            deployment["price"] = {**own, "output": 0}
        elif own:
            self._leave_in_part(own, field)
        if (given := info.get("id")) is not None:
            deployment["name"] = str(given)
            self.named.append((deployment, f"{field}.model_info.id"))
        if info.get("mode") in (None, "chat", "completion", "responses"):
            self.writing.append(name)
        if name not in models:
            models[name] = {"name": name, **facts, "deployments": [deployment]}
            return
        models[name]["deployments"].append(deployment)
        for fact, value in facts.items():
            if models[name].setdefault(fact, value) != value:
                self._leave(field, f"gives {name!r} another {fact} than the entry before; the first counts")

    def _serves(self, mode: Any, provider: Table, field: str) -> bool:
        """Whether an entry can be asked what its mode says. What is asked by the Responses API there is told."""
        if provider.get("responses") or (mode == "responses" and provider["kind"] in ("openai", "azure")):
            provider["responses"] = True
            if provider["kind"] == "azure":
                # Of the older API the address is another.
                provider["api_version"] = "v1"
            self._leave(
                f"{field}.litellm_params.model",
                "is asked by the Responses API there, chats too; here what comes to /v1/responses is, and a chat goes to /chat/completions",
            )
            return True
        endpoint = _MODES.get(mode or "chat") if isinstance(mode, str | None) else None
        served = from_dict(Provider.Config, provider).owner.endpoints
        if endpoint is None or (endpoint in MEDIA and endpoint not in served):
            whose = "the gateway" if endpoint is None else f"a provider of kind {provider['kind']}"
            self._leave(f"{field}.model_info.mode", f"is {shown(mode)}, which {whose} does not serve")
            return False
        return True

    def _based(self, params: Table, info: Table, provider: Table, field: str) -> Price | None:
        """The price of what a deployment is said to run, which its own name, as on Azure, does not tell."""
        where, table = ("model_info", info) if info.get("base_model") is not None else ("litellm_params", params)
        base = table.get("base_model")
        if base is None:
            return None
        price = based_price(base, from_dict(Provider.Config, provider)) if isinstance(base, str) else None
        if price is None:
            self._leave(
                f"{field}.{where}.base_model",
                f"is {shown(base)}, which the price list that ships does not know; set price (input_usd and output_usd)",
            )
        return price

    def _name(self, models: dict[str, Table]) -> None:
        """Leave out ids that cannot be names of deployments: those that another has."""
        every = [
            one.get("name") or (name if len(model["deployments"]) == 1 else f"{name}#{at}")
            for name, model in models.items()
            for at, one in enumerate(model["deployments"])
        ]
        for deployment, field in self.named:
            if every.count(deployment["name"]) > 1:
                self._leave(field, f"is {shown(deployment['name'])}, which another deployment is called too")
        for deployment, _ in self.named:
            if every.count(deployment["name"]) > 1:
                del deployment["name"]

    def _unknown(self, table: Table, known: Any, field: str) -> None:
        for name in table:
            if name not in known:
                self._leave(f"{field}.{name}", "has no counterpart here")

    def _provider(self, params: Table, upstream: str, field: str) -> Table | None:
        try:
            kind, model = kind_of(params, upstream)
        except ValueError as error:
            name, _, why = str(error).partition(" ")
            self._leave(f"{field}.{name}", why)
            return None
        if not self._elsewhere.is_placed(params, kind, field):
            return None
        made = provider_of(Entry(params, kind, field, self._report, self._environment), model)
        if made is None:
            return None
        self._unknown(params, (*_PARAMS, *FIELDS.get(kind, ())), field)
        try:
            from_dict(Provider.Config, made)
        except ConfigError as error:
            self._leave(field, f"cannot be taken over: {error}")
            return None
        return made

    def _deployment(self, params: Table, field: str) -> Table:
        made: Table = {}
        for theirs, ours, kind in (
            ("rpm", "rpm", int),
            ("tpm", "tpm", int),
            ("max_parallel_requests", "max_in_flight", int),
            ("weight", "weight", float),
            ("timeout", "timeout_s", float),
            ("stream_timeout", "first_token_timeout_s", float),
        ):
            if theirs == "timeout" and params.get(theirs) is None:
                theirs = "request_timeout"
            value = self._number(params.get(theirs), f"{field}.{theirs}", is_whole=kind is int)
            if value is not None:
                made[ours] = kind(value)
        return made

    def _number(self, value: Any, field: str, most: Decimal = LARGEST, *, is_whole: bool = False) -> Decimal | None:
        """``is_whole``: it is cut to a whole number, of which 0 is none."""
        return number_of(value, field, self._leave, most=most, first=1 if is_whole else None)

    def _price(self, value: Any, field: str) -> Decimal | None:
        """Dollars a token; 0 for what costs nothing."""
        if isinstance(value, int | float) and value == 0 and not isinstance(value, bool):
            return Decimal(0)
        return self._number(value, field, most=MOST_PRICE)

    def _own_price(self, params: Table, info: Table, field: str) -> Table:
        """What an entry itself says of its price, which may be but a part of it; empty for nothing."""
        price: Table = {}
        for theirs, ours in COSTS.items():
            table, where = (params, "litellm_params") if params.get(theirs) is not None else (info, "model_info")
            value = self._price(table.get(theirs), f"{field}.{where}.{theirs}")
            if value is not None:
                nano = int((value * NANO_MILLION).to_integral_value())
                # What costs less than can be counted is not free.
                price[ours] = max(nano, 1) if value > 0 else nano
        return price

    def _leave_in_part(self, own: Table, field: str) -> None:
        """A price in part, of a model that the list that ships does not know."""
        missing = " and no ".join(
            name for name, ours in COSTS.items() if ours in ("input", "output") and ours not in own
        )
        why = (
            f"gives a price, but no {missing}, and the price list that ships does not know the model; set price "
            "(input_usd and output_usd, 0 for what costs nothing)"
        )
        self._leave(field, why)

    def _facts(self, params: Table, info: Table, field: str) -> Table:
        made: Table = {}
        prompt = self._number(info.get("max_input_tokens"), f"{field}.model_info.max_input_tokens", is_whole=True)
        answer = self._number(
            info.get("max_output_tokens", info.get("max_tokens")),
            f"{field}.model_info.max_output_tokens",
            is_whole=True,
        )
        # What an entry sends where a request names no limit comes before what its model could write at most.
        sent = self._number(params.get("max_tokens"), f"{field}.litellm_params.max_tokens", is_whole=True)
        if sent is not None or answer is not None:
            made["max_tokens"] = int(sent or answer or 0)
        if prompt is not None:
            made["context"] = int(prompt + (answer or 0))
        return made
