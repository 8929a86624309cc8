"""Moving in from LiteLLM: which provider of ours an entry of ``model_list`` becomes, with its address, region, project and credentials."""

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from anabranch.gateway.config.litellm_addresses import (
    KNOWN,
    LOCATIONS,
    OPENAI_FORM,
    PROJECTS,
    REGIONS,
    SECOND_NAMES,
    VERSIONS,
)
from anabranch.gateway.config.litellm_entry import Entry, MissingError
from anabranch.gateway.config.litellm_report import variable_of
from anabranch.gateway.config.price_table import list_price
from anabranch.gateway.config.prices import listed_price
from anabranch.gateway.providers.provider import Provider
from anabranch.routers.money import Price

Table = dict[str, Any]

# Names of LiteLLM's that are one provider here.
_SAME = {
    "ollama_chat": "ollama",
    "vertex_ai_beta": "vertex_ai",
    "azure_text": "azure",
    "bedrock_converse": "bedrock",
    "text-completion-codestral": "codestral",
}
_AWS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")

# What an entry may say of its provider, by LiteLLM's name for that.
FIELDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(OPENAI_FORM, ("organization",)),
    "azure": ("api_version", "azure_ad_token"),
    "bedrock": (
        *_AWS,
        "aws_region_name",
        "aws_profile_name",
        "aws_bedrock_runtime_endpoint",
        "model_id",
        "guardrailConfig",
    ),
    "vertex_ai": (*SECOND_NAMES, *SECOND_NAMES.values()),
    "ollama": ("keep_alive", "num_ctx"),
    "openrouter": ("extra_body",),
}
_BODY = {"provider": "routing", "models": "models", "reasoning": "reasoning"}

# Hosts of Azure's resources.
_RESOURCES = (".services.ai.azure.com", ".openai.azure.com", ".cognitiveservices.azure.com")
# APIs of Bedrock's that are not Converse.
_OTHER_APIS = re.compile(r"(agent|agentcore|async_invoke|claude_platform|mantle|openai)/")

# Of Google's own; what other publishers make has another form.
_GOOGLES = re.compile(r"gemini-|gemini/|gemma-|text-embedding-|text-multilingual-embedding-|endpoints/|\d+$")


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
    return _SAME.get(kind, kind) in KNOWN


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
        address = KNOWN[kind].address
        found = listed_price(provider.replace(model=name)) or (list_price(address, name) if address else None)
        if found is not None:
            return found
    return None


def provider_of(entry: Entry, model: str) -> Table | None:
    """The provider of an entry; None if it cannot be taken over, which has been said.

    Args:
        entry: its parameters, and its kind as `kind_of` gives it.
        model: likewise.
    """
    try:
        made = _MADE.get(entry.kind, _openai)(entry, model)
        headers = entry.headers()
        if entry.kind in OPENAI_FORM and (organization := entry.value("organization")):
            headers["OpenAI-Organization"] = organization
    except MissingError:
        return None
    return made | ({"headers": headers} if headers else {})


def _openai(entry: Entry, model: str) -> Table:
    base = entry.base()
    address = _as_asked(entry, base) or entry.place.address
    if address is None:
        named = " or ".join(entry.place.bases)
        also = f", and {named} is not set now" if named else ""
        raise entry.missing("api_base", f"is missing{also}, and {entry.kind} is nowhere by default")
    made: Table = {"kind": "openai", "model": model, "base_url": address, "key_env": entry.key(base)}
    # As LiteLLM writes it: which of OpenAI's APIs is asked.
    if model.startswith("responses/"):
        made |= {"model": model.removeprefix("responses/"), "responses": True}
    return made


def _as_asked(entry: Entry, base: str | None) -> str | None:
    """An address as LiteLLM asks it, which adds to some of them."""
    if base is None:
        return None
    bare = base.rstrip("/")
    if entry.kind in ("mistral", "huggingface", "docker_model_runner") and not bare.endswith("/v1"):
        return f"{bare}/v1"
    if entry.kind == "databricks" and not urlsplit(bare).path:
        return f"{bare}/serving-endpoints"
    return base


def _anthropic(entry: Entry, model: str) -> Table:
    base = entry.base()
    made: Table = {"kind": "anthropic", "model": model, "key_env": entry.key(base)}
    if (
        entry.params.get("api_key") is None
        and not entry.first(entry.place.keys)
        and entry.is_set("ANTHROPIC_AUTH_TOKEN")
    ):
        entry.note(
            "api_key", "is not given, and LiteLLM signs in with ANTHROPIC_AUTH_TOKEN; here a key is needed, in key_env"
        )
    if base is not None:
        made["base_url"] = re.sub(r"/v1/messages/?$", "", base)
    return made


def _azure(entry: Entry, model: str) -> Table:
    base = entry.base()
    if not base:
        raise entry.missing("api_base", "is missing, and AZURE_API_BASE is not set now; set it for the import")
    made: Table = {"kind": "azure", "model": model, "base_url": base}
    if version := entry.value("api_version", VERSIONS):
        made["api_version"] = version
    # As LiteLLM writes it: what a deployment runs, of which its own name says nothing.
    if (prefix := re.match(r"(o_series|gpt5_series)/(.+)", model)) is not None:
        made |= {"model": prefix[2], "reasons": True}
    if model.startswith("responses/"):
        made |= {"model": model.removeprefix("responses/"), "responses": True}
    if entry.params.get("azure_ad_token") is not None:
        return made | {"auth": "token", "key_env": entry.reference("azure_ad_token")}
    has_key = entry.params.get("api_key") is not None or entry.first(entry.place.keys)
    if not has_key and entry.is_set("AZURE_AD_TOKEN") and entry.trusts(base):
        return made | {"auth": "token", "key_env": "AZURE_AD_TOKEN"}
    return made | {"key_env": entry.key(base)}


def _azure_ai(entry: Entry, model: str) -> Table:
    """A model of Azure's that is none of OpenAI's: of a resource by its newer API, elsewhere as an endpoint of OpenAI's form."""
    if model.startswith("claude"):
        raise entry.missing(
            "model", f"is {model!r} on Azure, which is asked in Anthropic's form; only OpenAI's is served"
        )
    name = "api_base" if entry.params.get("api_base") is not None else "base_url"
    # A whole URL, with its query, is usual there.
    base = (entry.value(name, entry.place.bases) or "").partition("?")[0]
    base = entry.checked(name, re.sub(r"/chat/completions/?$", "", base) or None) or ""
    if not base:
        raise entry.missing("api_base", "is missing, and AZURE_AI_API_BASE is not set now; set it for the import")
    parts = urlsplit(base)
    if not (parts.hostname or "").endswith(_RESOURCES):
        return {"kind": "openai", "model": model, "base_url": base, "key_env": entry.key(base)}
    root = f"{parts.scheme}://{parts.netloc}"
    entry.note(
        name, f"is asked at {root}/openai/v1 here, which serves every model of the resource by its deployment's name"
    )
    made: Table = {"kind": "azure", "model": model, "base_url": root, "api_version": "v1"}
    return made | {"key_env": entry.key(base)}


def _bedrock(entry: Entry, model: str) -> Table:
    region = entry.value("aws_region_name")
    if (other := _OTHER_APIS.match(model)) is not None:
        raise entry.missing(
            "model", f"is {model!r}: Bedrock is asked by Converse here, and {other[1]!r} is another API of it"
        )
    # As LiteLLM writes it: which of Bedrock's APIs, a region, and what an ARN stands for, before the model.
    model = re.sub(r"^(converse|invoke|converse_like|chat_completions)/", "", model)
    prefix = re.match(r"([a-z]{2}(?:-[a-z]+)+-\d)/(.+)", model)
    if prefix is not None:
        region, model = region or prefix[1], prefix[2]
    model = entry.value("model_id") or re.sub(r"^[a-z0-9_-]+/(?=arn:)", "", model)
    arn = re.match(r"arn:[a-z-]+:bedrock:([a-z0-9-]+):", model)
    region = region or (arn[1] if arn else None) or entry.value("aws_region_name", REGIONS)
    if region is None:
        raise entry.missing(
            "aws_region_name",
            "is missing, and neither AWS_REGION_NAME nor AWS_REGION is set now; set it for the import",
        )
    made: Table = {"kind": "bedrock", "model": model, "region": region}
    name = "aws_bedrock_runtime_endpoint"
    own = entry.checked(name, entry.value(name)) if not entry.names_base else None
    base = own or entry.base()
    made |= {"base_url": base} if base else {}
    if entry.params.get("aws_role_name") is None and entry.is_set("AWS_ROLE_NAME"):
        why = "is not given, and LiteLLM takes on the role of AWS_ROLE_NAME; here a role is that of a profile or of the machine"
        entry.note("aws_role_name", why)
    if profile := entry.value("aws_profile_name", ("AWS_PROFILE_NAME",)):
        made["profile"] = profile
    if entry.params.get("api_key") is not None:
        made["key_env"] = entry.reference("api_key")
    names = [entry.reference(name) for name in _AWS]
    if names[0] and names[1]:
        made |= {"access_key_env": names[0], "secret_key_env": names[1]}
        made |= {"session_token_env": names[2]} if names[2] else {}
    if not (made.get("key_env") or made.get("access_key_env") or entry.params.get("aws_profile_name")):
        _check_signed(entry, base, "AWS's", "api_key, aws_access_key_id or aws_profile_name")
    guardrail = entry.params.get("guardrailConfig")
    if isinstance(guardrail, dict) and all(isinstance(value, str) for value in guardrail.values()):
        made["guardrail"] = guardrail
    elif guardrail is not None:
        entry.leave("guardrailConfig", "is no table of texts")
    return made


def _check_signed(entry: Entry, base: str | None, whose: str, names: str) -> None:
    """Of what always signs in: as whom the environment or the machine says, at the provider's alone. Raises MissingError."""
    if base is not None and not entry.trusts(base):
        why = f"is not {whose}, and LiteLLM signs in there with what the environment or the machine has; here the entry has to say"
        raise entry.missing("api_base", f"{why} {names}")


def _vertex(entry: Entry, model: str) -> Table:
    if not _GOOGLES.match(model):
        raise entry.missing(
            "model", f"is {model!r} on Vertex, which is none of Google's own models; only those are served"
        )
    if model.startswith("gemini/") or model.isdigit():
        # A model of one's own, by the number of its endpoint.
        model = f"endpoints/{model.removeprefix('gemini/')}"
    entry.read_second(SECOND_NAMES)
    made: Table = {"kind": "vertex", "model": model}
    for theirs, ours, variables in (
        ("vertex_project", "project", PROJECTS),
        ("vertex_location", "location", LOCATIONS),
    ):
        if found := entry.value(theirs, variables):
            made[ours] = found
    if base := entry.base():
        bare, version = _version(base)
        if urlsplit(bare).path.strip("/"):
            why = "has a path, to which LiteLLM adds nothing but the method; here project and model follow it"
            raise entry.missing("api_base", f"cannot be taken over: it {why}")
        made |= {"base_url": bare} | ({"version": version} if version else {})
    given = entry.params.get("vertex_credentials")
    if variable := variable_of(given):
        made["credentials_env"] = variable
    elif isinstance(given, str) and not given.lstrip().startswith("{"):
        made["credentials_file"] = given
    elif given is not None:
        entry.leave(
            "vertex_credentials", "are written into the file (not shown); put them into a file and set credentials_file"
        )
    if not made.keys() & {"credentials_env", "credentials_file"}:
        _check_signed(entry, base, "Google's", "vertex_credentials")
    if given is None and entry.is_set("VERTEXAI_CREDENTIALS"):
        made["credentials_env"] = "VERTEXAI_CREDENTIALS"
    if "project" not in made and "credentials_env" not in made and "credentials_file" not in made:
        raise entry.missing("vertex_project", "is missing, and VERTEXAI_PROJECT is not set now; set it for the import")
    return made


def _version(base: str) -> tuple[str, str | None]:
    """An address of Google's, and the version of the API behind it, which LiteLLM wants to be there."""
    match = re.fullmatch(r"(.+?)/(v1|v1beta|v1beta1)/?", base)
    return (match[1], match[2]) if match else (base.rstrip("/"), None)


def _gemini(entry: Entry, model: str) -> Table:
    base = entry.base()
    made: Table = {"kind": "gemini", "model": model, "key_env": entry.key(base)}
    if base:
        bare, version = _version(base)
        made |= {"base_url": bare} | ({"version": version} if version else {})
    return made


def _ollama(entry: Entry, model: str) -> Table:
    made: Table = {"kind": "ollama", "model": model}
    base = entry.base()
    if base:
        made["base_url"] = base
    if (key := entry.key(base)) is not None:
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


def _openrouter(entry: Entry, model: str) -> Table:
    base = entry.base()
    made: Table = {"kind": "openrouter", "model": model, "key_env": entry.key(base)}
    made |= {"base_url": base} if base else {}
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
    return made


_MADE: dict[str, Callable[[Entry, str], Table]] = {
    "anthropic": _anthropic,
    "azure": _azure,
    "azure_ai": _azure_ai,
    "bedrock": _bedrock,
    "gemini": _gemini,
    "ollama": _ollama,
    "openrouter": _openrouter,
    "vertex_ai": _vertex,
}
