"""Moving in from LiteLLM: how long each attempt may take, as there, and how long a request may in all, which LiteLLM does not bound."""

import math
from typing import Any

from anabranch.config import from_dict
from anabranch.gateway.config.attempts import RetryConfig
from anabranch.gateway.config.gateway import GatewayConfig
from anabranch.gateway.config.litellm_numbers import number_of
from anabranch.gateway.config.litellm_report import Environment, Report

Table = dict[str, Any]

# Settings that say it, with their sections: the first that is given counts.
WHOLE = (
    ("litellm_settings", "request_timeout"),
    ("router_settings", "timeout"),
    ("router_settings", "request_timeout"),
    ("litellm_settings", "timeout"),
)
FIRST = (("router_settings", "stream_timeout"), ("litellm_settings", "stream_timeout"))
NAMES = ("timeout", "request_timeout", "stream_timeout")
# Seconds that LiteLLM waits where nothing is set.
USUAL_S = 6000


def take_timeouts(
    config: Table, models: dict[str, Table], sections: dict[str, Table], report: Report, environment: Environment
) -> None:
    """Set them for deployments that say none themselves, and give requests the time that attempts and fallbacks need.

    Args:
        config: of ours, with ``retries`` and all fallbacks; changed.
        models: of it, by name; changed.
        sections: ``router_settings`` and ``litellm_settings``, by name.
    """
    whole = _given(WHOLE, sections, report)
    if whole is None and (told := environment.get("REQUEST_TIMEOUT")) is not None:
        number = number_of(told, "litellm_settings.request_timeout", report.leave)
        whole = None if number is None else float(number)
        report.note("litellm_settings.request_timeout", "is not given, and is that of REQUEST_TIMEOUT now, as there")
    first = _given(FIRST, sections, report)
    for model in models.values():
        for one in model["deployments"]:
            for name, value in (("timeout_s", whole), ("first_token_timeout_s", first)):
                if value is not None:
                    one.setdefault(name, value)
            if one.get("first_token_timeout_s", 0) > one.get("timeout_s", math.inf):
                why = "is longer than timeout, at which the wait for a first token ends here too"
                report.note("router_settings.stream_timeout" if first else f"model_list ({model['name']})", why)
    _set_deadline(config, models, report)


def _given(order: tuple[tuple[str, str], ...], sections: dict[str, Table], report: Report) -> float | None:
    found = None
    for section, name in order:
        value, field = sections[section].get(name), f"{section}.{name}"
        if value is None:
            continue
        number = number_of(value, field, report.leave)
        if number is None:
            continue
        if found is not None:
            report.note(field, f"is not looked at, since {found[1]} is given, as there")
        found = found or (float(number), field)
    return None if found is None else found[0]


def _set_deadline(config: Table, models: dict[str, Table], report: Report) -> None:
    usual = from_dict(GatewayConfig, config).deadline_s
    times = {
        name: max(max(one.get("timeout_s", 0), one.get("first_token_timeout_s", 0)) for one in model["deployments"])
        for name, model in models.items()
    }
    if not any(times.values()):
        why = f"is not given, so that LiteLLM waits {USUAL_S:,} s for each answer; here a request ends after deadline_s = {usual:g}"
        report.note("router_settings.timeout", f"{why}, and the wait for a first token after a third of it")
        return
    attempts = config.get("retries", {}).get("attempts", RetryConfig().attempts)
    tables = [config.get(name, {}) for name in ("context_fallbacks", "filter_fallbacks", "fallbacks")]
    most = 0.0
    for name in models:
        chain = dict.fromkeys((name, *(other for table in tables for other in table.get(name, ()))))
        most = max(most, attempts * sum(times[other] for other in chain))
    config["deadline_s"] = max(most, usual)
