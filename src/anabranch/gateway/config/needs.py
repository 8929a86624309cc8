"""What a config needs of this machine: extras that are not installed, and models that run within the gateway."""

import os
from typing import NamedTuple

from anabranch.errors import MissingExtraError
from anabranch.extras import require
from anabranch.gateway.config.gateway import GatewayConfig
from anabranch.gateway.providers.provider import Provider


def lacking(config: GatewayConfig) -> list[str]:
    """A line for each extra that serving the config would ask for, with the pip command; empty if all is here."""
    wanted: dict[str, str] = {}
    for model in config.models:
        for one in model.deployments:
            if (extra := _extra(one.provider)) is not None:
                wanted.setdefault(extra, f"the provider {one.provider.owner.kind} (of model {model.name})")
    if config.shared is not None:
        wanted["redis"] = "[shared] in the config"
    if config.otel is not None:
        wanted["otel"] = "[otel] in the config"
    lines = []
    for extra, by in wanted.items():
        try:
            require(extra, by=by)
        except MissingExtraError as error:
            lines.append(str(error))
    return lines


def runs_inside(provider: Provider.Config) -> bool:
    """Whether a provider runs its model in the gateway's process, itself or behind one that looks on."""
    inner = getattr(provider, "provider", None)
    return provider.owner.is_inside or (isinstance(inner, Provider.Config) and runs_inside(inner))


class RunsInside(NamedTuple):
    """A deployment whose model runs in the gateway's process: its name, the field of its provider, and that."""

    name: str
    field: str
    provider: Provider.Config


def inside(config: GatewayConfig) -> list[RunsInside]:
    """Those of a config."""
    return [
        RunsInside(model.deployment_name(place), f"models.{at}.deployments.{place}.provider", one.provider)
        for at, model in enumerate(config.models)
        for place, one in enumerate(model.deployments)
        if runs_inside(one.provider)
    ]


def check_providers(config: GatewayConfig) -> None:
    """Raises MissingExtraError, with the field, for a provider whose extra is not installed."""
    for at, model in enumerate(config.models):
        for place, one in enumerate(model.deployments):
            if (extra := _extra(one.provider)) is not None:
                field = f"models.{at}.deployments.{place}.provider"
                require(extra, by=f"{field}: the provider {one.provider.owner.kind}")


def _extra(provider: Provider.Config) -> str | None:
    kind = provider.owner.kind
    if runs_inside(provider):
        return "serve"
    if kind not in ("bedrock", "vertex"):
        return None
    names = ("key_env", "key_file", "access_key_env", "profile")
    key_env, key_file, *signs = (getattr(provider, name, None) for name in names)
    # With a key nothing is signed, and no token is fetched.
    is_told = kind == "bedrock" and not any(signs) and os.environ.get("AWS_BEARER_TOKEN_BEDROCK")
    has_key = key_env or key_file or is_told
    return None if has_key else kind
