"""Moving in from LiteLLM: which provider of ours an entry of ``model_list`` becomes, with its address, region, project and credentials."""

import os
import re
from collections.abc import Callable
from typing import Any

from anabranch.errors import ConfigError
from anabranch.gateway.config.price_table import list_price
from anabranch.gateway.config.prices import PLACES, listed_price
from anabranch.gateway.config.secret import VARIABLE
from anabranch.gateway.providers.openai import check_url
from anabranch.gateway.providers.provider import Provider
from anabranch.routers.money import Price

Table = dict[str, Any]
Leave = Callable[[str, str], None]

# What speaks OpenAI's API, and where it is when the config does not say.
_ENDPOINTS: dict[str, str | None] = {
    "openai": "https://api.openai.com/v1",
    "text-completion-openai": "https://api.openai.com/v1",
    "deepseek": "https://api.deepseek.com/v1",
    "groq": "https://api.groq.com/openai/v1",
    "cerebras": "https://api.cerebras.ai/v1",
    "mistral": "https://api.mistral.ai/v1",
    "together_ai": "https://api.together.xyz/v1",
    "fireworks_ai": "https://api.fireworks.ai/inference/v1",
    "xai": "https://api.x.ai/v1",
    "perplexity": "https://api.perplexity.ai",
    "hosted_vllm": None,
    "openai_like": None,
    "custom_openai": None,
    "lm_studio": None,
    "llamafile": None,
    "litellm_proxy": None,
}
# Of the others, for the price list.
_ADDRESSES = {
    "anthropic": "https://api.anthropic.com",
    "azure": "https://any.openai.azure.com",
    "bedrock": PLACES["bedrock"],
    "gemini": "https://generativelanguage.googleapis.com",
    "openrouter": "https://openrouter.ai/api/v1",
    "vertex_ai": PLACES["vertex"],
}
# Variables that LiteLLM reads where an entry names no key.
_KEYS = {
    "openai": "OPENAI_API_KEY",
    "text-completion-openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "azure": "AZURE_API_KEY",
    "cerebras": "CEREBRAS_API_KEY",
    "deepseek": "DEEPSEEK_API_KEY",
    "fireworks_ai": "FIREWORKS_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "groq": "GROQ_API_KEY",
    "mistral": "MISTRAL_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "perplexity": "PERPLEXITYAI_API_KEY",
    "together_ai": "TOGETHERAI_API_KEY",
    "xai": "XAI_API_KEY",
}
# Names of LiteLLM's that are one provider here.
_SAME = {"ollama_chat": "ollama", "vertex_ai_beta": "vertex_ai"}
_AWS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")

# What an entry may say of its provider, by LiteLLM's name for that.
FIELDS: dict[str, tuple[str, ...]] = {
    "azure": ("api_version", "azure_ad_token"),
    "bedrock": (
        *_AWS,
        "aws_region_name",
        "aws_profile_name",
        "aws_bedrock_runtime_endpoint",
        "model_id",
        "guardrailConfig",
    ),
    "vertex_ai": ("vertex_project", "vertex_location", "vertex_credentials"),
    "ollama": ("keep_alive", "num_ctx"),
    "openrouter": ("extra_body",),
}
_BODY = {"provider": "routing", "models": "models", "reasoning": "reasoning"}

# Of Google's own; what other publishers make has another form.
_GOOGLES = re.compile(r"gemini-|gemini/|gemma-|text-embedding-|text-multilingual-embedding-|endpoints/|\d+$")


class _MissingError(Exception):
    """The entry cannot be taken over; what is missing has been said."""


def kind_of(params: Table, upstream: str) -> tuple[str, str]:
    """LiteLLM's name of an entry's provider, and of the model there. Raises ValueError if there is no such provider here."""
    kind, _, model = upstream.partition("/")
    given = params.get("custom_llm_provider")
    if isinstance(given, str):
        kind, model = given, upstream.removeprefix(f"{given}/")
        if not _is_known(kind):
            raise ValueError(f"custom_llm_provider is {kind!r}, which is no provider here")
    elif not model:
        kind, model = ("anthropic" if upstream.startswith("claude") else "openai"), upstream
    elif not _is_known(kind):
        even = ", even with an api_base" if params.get("api_base") or params.get("base_url") else ""
        raise ValueError(f"model is {upstream!r}: there is no provider {kind!r} here{even}")
    return _SAME.get(kind, kind), model


def _is_known(kind: str) -> bool:
    return kind in _ENDPOINTS or _SAME.get(kind, kind) in _MADE


def based_price(base: str, provider: Provider.Config) -> Price | None:
    """What the list that ships says of ``base_model``, such as ``azure/gpt-4o``: where the deployment is, else where its prefix says.

    None if the list does not know it.
    """
    try:
        kind, model = kind_of({}, base)
    except ValueError:
        return None
    # A region may stand between: azure/eu/gpt-4o.
    names = dict.fromkeys((model, model.rpartition("/")[2]))
    for name in names:
        address = _ENDPOINTS.get(kind) or _ADDRESSES.get(kind)
        found = listed_price(provider.replace(model=name)) or (list_price(address, name) if address else None)
        if found is not None:
            return found
    return None


def provider_of(params: Table, kind: str, model: str, field: str, leave: Leave) -> Table | None:
    """The provider of an entry; None if it cannot be taken over, which is said by ``leave``.

    Args:
        params: ``litellm_params``.
        kind, model: as `kind_of` gives them.
        field: where ``params`` are, for what is said.
    """
    entry = _Entry(params, kind, field, leave)
    try:
        return _MADE.get(kind, _openai)(entry, model)
    except _MissingError:
        return None


class _Entry:
    """Reads one entry's parameters."""

    def __init__(self, params: Table, kind: str, field: str, leave: Leave) -> None:
        self.params, self.kind, self._field, self._leave = params, kind, field, leave

    def leave(self, name: str, why: str) -> None:
        """Say what is not taken over."""
        self._leave(f"{self._field}.{name}", why)

    def missing(self, name: str, why: str) -> _MissingError:
        """What makes an entry one that cannot be taken over."""
        self.leave(name, why)
        return _MissingError()

    def value(self, name: str) -> str | None:
        """A text; one that is read from the environment there is read now, and written into the config. Raises _MissingError."""
        given = self.params.get(name)
        if given is None:
            return None
        if not isinstance(given, str):
            raise self.missing(name, "is no text")
        variable = variable_of(given)
        if variable is None and not given.startswith("os.environ/"):
            return given
        found = os.environ.get(variable or "", "").strip()
        if not found:
            raise self.missing(
                name, f"is read from the environment there, where {variable} is not set now; set it for the import"
            )
        return found

    def base(self) -> str | None:
        """The address that the entry names, checked. Raises _MissingError."""
        name = "api_base" if self.params.get("api_base") is not None else "base_url"
        found = self.value(name)
        if found is not None:
            try:
                check_url(name, found)
            except ConfigError as error:
                raise self.missing(name, f"cannot be taken over: {error}") from None
        return found

    def key(self, default: str | None, name: str = "api_key") -> str | None:
        """The variable that holds a key; ``default`` where the entry names none. A key that is written down is not taken over."""
        given = self.params.get(name)
        if given is None:
            return default
        variable = variable_of(given)
        if variable is None:
            self.leave(name, "is a key written into the file (not shown); put it into the environment and set key_env")
        return variable


def _openai(entry: _Entry, model: str) -> Table:
    base = entry.base()
    given = base is not None
    base = base or _ENDPOINTS[entry.kind]
    if base is None:
        raise entry.missing("api_base", f"is missing, and {entry.kind} is nowhere by default")
    # What is elsewhere than its provider is somebody's own, and not to be sent the provider's key.
    return {
        "kind": "openai",
        "model": model,
        "base_url": base,
        "key_env": entry.key(None if given else _KEYS.get(entry.kind)),
    }


def _anthropic(entry: _Entry, model: str) -> Table:
    base = entry.base()
    made: Table = {"kind": "anthropic", "model": model}
    if base is not None:
        made["base_url"] = base
    return made | {"key_env": entry.key(None if base else _KEYS["anthropic"])}


def _azure(entry: _Entry, model: str) -> Table:
    base = entry.base() or os.environ.get("AZURE_API_BASE")
    if not base:
        raise entry.missing("api_base", "is missing, and AZURE_API_BASE is not set now; set it for the import")
    made: Table = {"kind": "azure", "model": model, "base_url": base}
    version = entry.value("api_version") or os.environ.get("AZURE_API_VERSION")
    if version:
        made["api_version"] = version
    if entry.params.get("azure_ad_token") is not None:
        return made | {"auth": "token", "key_env": entry.key(None, "azure_ad_token")}
    return made | {"key_env": entry.key(_KEYS["azure"])}


def _bedrock(entry: _Entry, model: str) -> Table:
    region = entry.value("aws_region_name")
    # As LiteLLM writes it: which of Bedrock's APIs, and a region before the model.
    model = re.sub(r"^(converse|invoke|converse_like)/", "", model)
    prefix = re.match(r"([a-z]{2}(?:-[a-z]+)+-\d)/(.+)", model)
    if prefix is not None:
        region, model = region or prefix[1], prefix[2]
    made: Table = {"kind": "bedrock", "model": entry.value("model_id") or model}
    if region is None and not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        raise entry.missing("aws_region_name", "is missing, and AWS_REGION is not set now; set it for the import")
    made |= {"region": region} if region else {}
    base = entry.value("aws_bedrock_runtime_endpoint") or entry.base()
    made |= {"base_url": base} if base else {}
    if profile := entry.value("aws_profile_name"):
        made["profile"] = profile
    if entry.params.get("api_key") is not None:
        made["key_env"] = entry.key(None)
    names = [entry.key(None, name) for name in _AWS]
    if names[0] and names[1]:
        made |= {"access_key_env": names[0], "secret_key_env": names[1]}
        made |= {"session_token_env": names[2]} if names[2] else {}
    guardrail = entry.params.get("guardrailConfig")
    if isinstance(guardrail, dict) and all(isinstance(value, str) for value in guardrail.values()):
        made["guardrail"] = guardrail
    elif guardrail is not None:
        entry.leave("guardrailConfig", "is no table of texts")
    return made


def _vertex(entry: _Entry, model: str) -> Table:
    if not _GOOGLES.match(model):
        raise entry.missing(
            "model", f"is {model!r} on Vertex, which is none of Google's own models; only those are served"
        )
    if model.startswith("gemini/") or model.isdigit():
        # A model of one's own, by the number of its endpoint.
        model = f"endpoints/{model.removeprefix('gemini/')}"
    made: Table = {"kind": "vertex", "model": model}
    for theirs, ours in (("vertex_project", "project"), ("vertex_location", "location")):
        if found := entry.value(theirs):
            made[ours] = found
    project = os.environ.get("VERTEXAI_PROJECT")
    made |= {"project": project} if project and "project" not in made else {}
    made |= {"base_url": base} if (base := entry.base()) else {}
    given = entry.params.get("vertex_credentials")
    if variable := variable_of(given):
        made["credentials_env"] = variable
    elif isinstance(given, str) and not given.lstrip().startswith("{"):
        made["credentials_file"] = given
    elif given is not None:
        entry.leave(
            "vertex_credentials", "are written into the file (not shown); put them into a file and set credentials_file"
        )
    if "project" not in made and "credentials_env" not in made and "credentials_file" not in made:
        raise entry.missing("vertex_project", "is missing, and VERTEXAI_PROJECT is not set now; set it for the import")
    return made


def _gemini(entry: _Entry, model: str) -> Table:
    made: Table = {"kind": "gemini", "model": model}
    made |= {"base_url": base} if (base := entry.base()) else {}
    return made | {"key_env": entry.key(_KEYS["gemini"])}


def _ollama(entry: _Entry, model: str) -> Table:
    made: Table = {"kind": "ollama", "model": model}
    if base := entry.base():
        made["base_url"] = base
    if (key := entry.key(None)) is not None:
        made["key_env"] = key
    alive, size = entry.params.get("keep_alive"), entry.params.get("num_ctx")
    if isinstance(alive, str | int) and not isinstance(alive, bool):
        made["keep_alive"] = str(alive)
    elif alive is not None:
        entry.leave("keep_alive", "is no duration such as 10m")
    if type(size) is int and size > 0:
        made["num_ctx"] = size
    elif size is not None:
        entry.leave("num_ctx", "is no number of tokens")
    return made


def _openrouter(entry: _Entry, model: str) -> Table:
    made: Table = {"kind": "openrouter", "model": model}
    made |= {"base_url": base} if (base := entry.base()) else {}
    body = entry.params.get("extra_body")
    if body is not None and not isinstance(body, dict):
        entry.leave("extra_body", "is no table")
        body = None
    for name, value in (body or {}).items():
        wanted = list if name == "models" else dict
        if name in _BODY and isinstance(value, wanted):
            made[_BODY[name]] = value
        elif name != "usage":
            entry.leave(f"extra_body.{name}", "has no counterpart here")
    return made | {"key_env": entry.key(_KEYS["openrouter"])}


_MADE: dict[str, Callable[[_Entry, str], Table]] = {
    "anthropic": _anthropic,
    "azure": _azure,
    "bedrock": _bedrock,
    "gemini": _gemini,
    "ollama": _ollama,
    "openrouter": _openrouter,
    "vertex_ai": _vertex,
}


def variable_of(value: Any) -> str | None:
    """NAME of ``os.environ/NAME``; None of anything else."""
    match = re.fullmatch(r"os\.environ/(.+)", value) if isinstance(value, str) else None
    return match[1] if match and VARIABLE.fullmatch(match[1]) else None
