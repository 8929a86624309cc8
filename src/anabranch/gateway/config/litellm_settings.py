"""Moving in from LiteLLM: what its ``litellm_settings``, ``router_settings`` and ``general_settings`` are here.

retries, balance, breaker                 num_retries, routing_strategy, allowed_fails, cooldown_time
fallbacks of all three kinds              as in `litellm_fallbacks`
timeouts of deployments, deadline_s       as in `litellm_timeouts`
aliases of models                         model_group_alias
max_in_flight                             default_max_parallel_requests: of deployments that say none themselves
admin.key                                 master_key, or LITELLM_MASTER_KEY of the environment
require_key                               whether there is either, or what may keep others out: without, LiteLLM lets everybody in
shared                                    redis_url, redis_host and redis_port of router_settings
limits, log                               global_max_parallel_requests, max_request_size_mb; store_prompts_in_spend_logs and its days
"""

import re
from decimal import Decimal
from typing import Any

from anabranch.bounds import shown
from anabranch.errors import ConfigError
from anabranch.gateway.config.litellm_fallbacks import NAMES as FALLBACKS
from anabranch.gateway.config.litellm_fallbacks import Fallbacks
from anabranch.gateway.config.litellm_numbers import LARGEST, number_of
from anabranch.gateway.config.litellm_report import Environment, Report, variable_of
from anabranch.gateway.config.litellm_timeouts import NAMES as TIMEOUTS
from anabranch.gateway.config.litellm_timeouts import take_timeouts
from anabranch.gateway.config.shared import check_redis_url

Table = dict[str, Any]

_BALANCE = {
    "simple-shuffle": "weighted",
    "least-busy": "least_in_flight",
    "latency-based-routing": "latency",
    "cost-based-routing": "price",
    "usage-based-routing": "tpm",
    "usage-based-routing-v2": "tpm",
}
_KNOWN_NOT = {
    "database_url": "is LiteLLM's own database; keys and spending there are not taken over",
    "max_budget": "is a budget, which is kept in the store here: anabranch gateway budget set global DOLLARS --period PERIOD",
    "budget_duration": "is of a budget, which is kept in the store here: anabranch gateway budget set global DOLLARS --period PERIOD",
    "drop_params": "has no counterpart: what a provider cannot do is refused, or asked of a fallback, and never left out silently",
    "cache": "is on here by itself for requests at temperature 0; see cache.exact and cache.semantic",
    "alerting": "is of budgets here, which are told by [webhooks.NAME], with url and secret",
    "alert_to_webhook_url": "is of budgets here, which are told by [webhooks.NAME], with url and secret",
    "set_verbose": "is log.level here",
    "json_logs": "is log.access here, whose lines are JSON",
    "turn_off_message_logging": "is the default here: texts are kept only with log.prompts = true",
    "default_litellm_params": "are taken over for keys and addresses alone, which each entry is given",
    "cache_params": "are not taken over; see cache.ttl_s, cache.max_bytes and cache.semantic",
}
_RETRIES = 19
# Of router_settings, what leads to Redis.
_REDIS = ("redis_url", "redis_host", "redis_port", "redis_password", "redis_username", "redis_db", "redis_ssl")
# Where the file has no master_key, LiteLLM takes that of the environment.
_MASTER = "LITELLM_MASTER_KEY"
# Of general_settings, what is taken over. That, and what is known, keeps nobody out.
_TAKEN = (
    "global_max_parallel_requests",
    "max_request_size_mb",
    "store_prompts_in_spend_logs",
    "maximum_spend_logs_retention_period",
)
_CALLBACKS = ("callbacks", "success_callback", "failure_callback", "service_callback")
_HOST = re.compile(r"[A-Za-z0-9_.-]+:\d{1,5}")
# A URL that says where Redis is, and nothing else: all of what may hold a password (a user, most options, what was not escaped) is none.
_PLAIN = re.compile(
    r"rediss?://(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?(?:/\d{0,9})?(?:\?db=\d{1,9})?"
    r"|unix:///[A-Za-z0-9_./-]+(?:\?db=\d{1,9})?"
)
_PERIOD = re.compile(r"(\d{1,6})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def _plain_redis(given: Table) -> str | None:
    """The URL of a Redis that wants no password; None if none is named, or if it is not all written down."""
    url, host = given.get("redis_url"), given.get("redis_host")
    # A port alone names no host, and where nothing is given there is none.
    if url is None and isinstance(host, str) and given.keys() <= {"redis_host", "redis_port"}:
        place = f"{host}:{given.get('redis_port', 6379)}"
        url = f"redis://{place}/0" if _HOST.fullmatch(place) else None
    if not isinstance(url, str) or not _PLAIN.fullmatch(url):
        return None
    try:
        check_redis_url(url)
    except ConfigError:
        return None
    return url


def _is_port(value: Any) -> bool:
    return isinstance(value, int | str) and re.fullmatch(r"\d{1,5}", str(value)) is not None and 0 < int(value) < 65_536


class Settings:
    """Takes over settings.

    Args:
        config: of ours, as a table; changed.
        models: of it, by name; changed.
        report: told what is not taken over, and why.
        environment: what LiteLLM would read where the file says nothing.
    """

    def __init__(self, config: Table, models: dict[str, Table], report: Report, environment: Environment) -> None:
        self._config, self._models, self._report, self._environment = config, models, report, environment
        self._leave = report.leave

    def take(self, data: Table, unread: str | None) -> None:
        """What a whole file of LiteLLM's says, but for ``unread``, which may hold a key."""
        sections = {name: self._table(data.get(name), name) for name in ("router_settings", "litellm_settings")}
        # The latter wins, as it does there.
        for section in reversed(sections):
            for name, value in sections[section].items():
                is_apart = name in FALLBACKS or name in TIMEOUTS or (section == "router_settings" and name in _REDIS)
                if value is not None and not is_apart:
                    self._setting(name, value, f"{section}.{name}")
        self._config |= Fallbacks(self._models, self._report).take(sections)
        take_timeouts(self._config, self._models, sections, self._report, self._environment)
        self._redis(sections["router_settings"])
        general = self._table(data.get("general_settings"), "general_settings")
        for name, value in general.items():
            if value is not None:
                self._general(name, value, f"general_settings.{name}")
        if general.get("master_key") is None:
            self._without_master(general, unread)

    def _table(self, value: Any, field: str) -> Table:
        if value is not None and not isinstance(value, dict):
            self._leave(field, "is no table")
        return value if isinstance(value, dict) else {}

    def _list(self, value: Any, field: str) -> list[Any]:
        if value is not None and not isinstance(value, list):
            self._leave(field, "is no list")
        return value if isinstance(value, list) else []

    def _number(self, value: Any, field: str, first: float | None = None) -> Decimal | None:
        return number_of(value, field, self._leave, first=first)

    def _setting(self, name: str, value: Any, here: str) -> None:
        if name == "routing_strategy":
            if isinstance(value, str) and value in _BALANCE:
                self._config["balance"] = _BALANCE[value]
            else:
                self._leave(here, f"is {value!r}; there is balance: {', '.join(sorted(set(_BALANCE.values())))}")
        elif name in ("num_retries", "allowed_fails", "cooldown_time"):
            self._limit(name, value, here)
        elif name == "model_group_alias":
            self._aliases(value, here)
        elif name == "default_max_parallel_requests":
            number = self._number(value, here, first=1)
            self._of_all("max_in_flight", None if number is None else int(number))
        elif name in _CALLBACKS:
            self._callbacks(value, here)
        elif name == "enable_pre_call_checks" and value is True:
            # Prompts go to no model whose context is known to be too short, always.
            return
        else:
            self._leave(here, _KNOWN_NOT.get(name, "has no counterpart here"))

    def _redis(self, router: Table) -> None:
        """Where processes count together. Passwords are never taken over, but for a URL that is in the environment as a whole."""
        given = [name for name in _REDIS if router.get(name) is not None]
        variable = variable_of(router.get("redis_url"))
        url = f"env:{variable}" if variable else _plain_redis({name: router[name] for name in given})
        read = {"redis_url"} if "redis_url" in given else {"redis_host", "redis_port"}
        if url is not None:
            self._config["shared"] = {"url": url}
        for name in given:
            if url is None and name == "redis_port" and not _is_port(router[name]):
                self._leave(f"router_settings.{name}", f"is {shown(router[name])}, which is no port")
            elif url is None:
                why = "is a part of shared.url here: put redis://:PASSWORD@HOST:PORT/0 into a variable, and set that to env:VARIABLE"
                self._leave(f"router_settings.{name}", why)
            elif name not in read:
                self._leave(f"router_settings.{name}", "is not looked at, since redis_url says all of it")

    def _callbacks(self, value: Any, here: str) -> None:
        for name in [value] if isinstance(value, str) else self._list(value, here):
            if name == "otel":
                self._leave(here, "has 'otel': spans go to a collector with [otel] and its endpoint here")
            elif name != "prometheus":
                # The latter is always there, at /metrics.
                self._leave(
                    here, f"has {shown(name)}, which has no counterpart here; there are [otel], /metrics and log.access"
                )

    def _limit(self, name: str, value: Any, here: str) -> None:
        number = self._number(value, here, first=0 if name in ("num_retries", "allowed_fails") else None)
        if number is None:
            return
        if name == "num_retries":
            if number > _RETRIES:
                self._leave(here, f"is {shown(value)}; here it is {_RETRIES}, the most there can be")
            self._config["retries"] = {"attempts": min(int(number), _RETRIES) + 1}
        elif name == "allowed_fails":
            # Of a minute, there; whatever share of the calls they are.
            self._config.setdefault("breaker", {}).update(failures=int(number) + 1, window_s=60.0)
        else:
            seconds = float(number)
            self._config.setdefault("breaker", {}).update(open_s=seconds, max_open_s=max(seconds, 300.0))

    def _of_all(self, field: str, value: Any) -> None:
        for model in self._models.values() if value is not None else ():
            for deployment in model["deployments"]:
                deployment.setdefault(field, value)

    def _aliases(self, value: Any, field: str) -> None:
        for alias, target in self._table(value, field).items():
            target = target.get("model") if isinstance(target, dict) else target
            known = [name for model in self._models.values() for name in model.get("aliases", ())]
            is_name = isinstance(alias, str) and alias and alias not in self._models
            if isinstance(target, str) and target in self._models and is_name:
                if alias not in known:
                    self._models[target].setdefault("aliases", []).append(alias)
            else:
                self._leave(
                    f"{field}.{alias}",
                    f"stands for {target!r}, which is no model that was taken over, or is one itself",
                )

    def _general(self, name: str, value: Any, here: str) -> None:
        if name == "master_key":
            self._master(value, here)
        elif name == "global_max_parallel_requests":
            if (number := self._number(value, here, first=1)) is not None:
                self._config.setdefault("limits", {})["in_flight"] = int(number)
        elif name == "max_request_size_mb":
            # Down to a byte.
            if (number := self._number(value, here, first=2**-20)) is not None:
                self._config.setdefault("limits", {})["body_bytes"] = int(min(number * 2**20, LARGEST))
        elif name == "store_prompts_in_spend_logs" and isinstance(value, bool):
            self._config.setdefault("log", {})["prompts"] = value
        elif name == "maximum_spend_logs_retention_period":
            self._keep(value, here)
        else:
            self._leave(here, _KNOWN_NOT.get(name, "has no counterpart here"))

    def _master(self, value: Any, here: str) -> None:
        variable = variable_of(value)
        if variable is None:
            self._leave(here, "is a key written into the file (not shown); set admin.key to env:VARIABLE")
        else:
            self._config["admin"] = {"key": f"env:{variable}"}
        self._leave(
            here,
            "opens the admin interface alone here: clients that send it with requests get 401; "
            "make a key for each, with anabranch gateway keys create",
        )

    def _without_master(self, general: Table, unread: str | None) -> None:
        """What lets clients in where the file has no master_key: whatever is not taken over may keep them out there."""
        here = "general_settings.master_key"
        guards = [
            f"general_settings.{name}"
            for name, value in general.items()
            if value and name not in (*_TAKEN, *_KNOWN_NOT)
        ]
        guards += [one for one in (unread,) if one is not None]
        guards += [f"environment_variables.{_MASTER}"] if _MASTER in self._environment.unknown else []
        if self._environment.get(_MASTER) is not None:
            self._master(f"os.environ/{_MASTER}", here)
        elif guards:
            why = f"is not given, but LiteLLM may be closed by {guards[0]}, which is not read here"
            self._leave(here, f"{why}: require_key stays true; set it to false if everybody is to be answered")
        else:
            self._config["require_key"] = False
            self._report.note(
                here,
                f"is not given, and {_MASTER} is not set now: require_key is false, so that everybody who reaches the gateway is answered; "
                f"if LiteLLM was closed, set {_MASTER} for the import, or require_key to true",
            )

    def _keep(self, value: Any, here: str) -> None:
        match = _PERIOD.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            self._leave(here, f"is {shown(value)}, which is no period such as 7d")
            return
        days = -(-int(match[1]) * _SECONDS[match[2]] // 86_400)
        self._config.setdefault("log", {})["keep_days"] = max(days, 1)
