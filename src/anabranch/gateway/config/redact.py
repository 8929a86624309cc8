"""A config as it may be shown: what could be a secret is taken out, wherever it is.

References (``env:NAME``, ``file:PATH``) are no secrets and stay. Fields of strategies and embedders hold what anybody's parts want, and
URLs may carry passwords, so it is names of fields and forms of texts that say what is hidden, not a list of places.
"""

import re
from collections.abc import Mapping
from typing import Any

from anabranch.gateway.config.secret import is_reference

HIDDEN = "***"

# Names of fields that hold secrets, and of settings within a URL: the last word says it, so that max_tokens and key_env stay.
_WORDS = r"(?:\w*pass(?:word|wd|phrase)?|pwd|secrets?|tokens?|keys?|api_?keys?|credentials?|auth(?:orization)?|cookie|signature|sig)"
_NAME = re.compile(rf"(?:.*[_\-.])?{_WORDS}", re.I)
_SURE = re.compile(r"(?:.*[_\-.])?(?:\w*pass(?:word|wd|phrase)|pwd|secret)s?", re.I)
_SETTING = re.compile(
    rf"(?P<name>\b(?:[\w.-]*[_.-])?{_WORDS}\b\s*[=:]\s*)(?P<value>\"[^\"]*\"|'[^']*'|[^&;,\s]+)", re.I
)

# Of a URL: a password may hold any sign but the last @ before the host, also those that should have been escaped.
_USER = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<user>[^:/\s]*):(?P<password>.*)@", re.I | re.S)

# Whatever it stands in.
_KEY = re.compile(r"\bBearer\s+\S+|\b(?:sk|xai|gsk|ghp|AIza)[-_][\w.-]{8,}")


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
    if name.lower() == "headers" and isinstance(value, Mapping):
        return dict.fromkeys(value, HIDDEN)
    if _SURE.fullmatch(name):
        return _hidden(value, str | int | float)
    return _hidden(value, str) if _NAME.fullmatch(name) else redacted(value)


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
    text = _USER.sub(rf"\g<scheme>\g<user>:{HIDDEN}@", text)
    return _KEY.sub(HIDDEN, _SETTING.sub(rf"\g<name>{HIDDEN}", text))
