"""A config as it may be shown: what could be a secret is taken out, wherever it is.

References (``env:NAME``, ``file:PATH``) are no secrets and stay. Fields of strategies and embedders hold what anybody's parts want, and
URLs may carry passwords, so it is names of fields and forms of texts that say what is hidden, not a list of places.
"""

from collections.abc import Mapping
from typing import Any

from anabranch.gateway.config.secret import is_reference
from anabranch.redaction import (
    HIDDEN,
    hide_keys,
    hide_passwords,
    hide_settings,
    is_secret_name,
    is_surely_secret_name,
)


def redacted(value: Any) -> Any:
    """A copy of what `to_dict` gives of a config, without secrets.

    Args:
        value: of JSON: objects, lists, texts, numbers.
    """
    if isinstance(value, Mapping):
        return {name: _field(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    return _shown(value) if isinstance(value, str) else value


def _field(name: str, value: Any) -> Any:
    if name.lower() == "webhooks" and isinstance(value, Mapping):
        return {name: _webhook(one) for name, one in value.items()}
    if name.lower() == "headers" and isinstance(value, Mapping):
        return dict.fromkeys(value, HIDDEN)
    if is_surely_secret_name(name):
        return _hidden(value, str | int | float)
    return _hidden(value, str) if is_secret_name(name) else redacted(value)


def _webhook(value: Any) -> Any:
    """Of its URL the host alone: with many services the path is the secret."""
    shown = redacted(value)
    if isinstance(shown, dict) and isinstance(shown.get("url"), str) and not is_reference(shown["url"]):
        scheme, sign, rest = shown["url"].partition("://")
        shown["url"] = f"{scheme}{sign}{rest.partition('/')[0].rpartition('@')[2]}/{HIDDEN}" if sign else HIDDEN
    return shown


def _hidden(value: Any, kinds: Any) -> Any:
    """What a field holds whose name says that it is a secret; a switch is none, and a number only where the name leaves no doubt."""
    if isinstance(value, Mapping):
        return {name: _hidden(inner, kinds) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(inner, kinds) for inner in value]
    is_shown = isinstance(value, bool) or value == "" or not isinstance(value, kinds) or is_reference(value)
    return value if is_shown else HIDDEN


def _shown(text: str) -> str:
    if is_reference(text):
        return text
    return hide_keys(hide_settings(hide_passwords(text, is_url=True)))
