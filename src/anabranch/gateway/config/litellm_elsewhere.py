"""Moving in from LiteLLM: keys and addresses that a file says outside of ``model_list``, and what may say them and is not read.

An entry whose address may come from what is not read is left out: what it is asked would go to the provider instead.
"""

import re
from typing import Any

from anabranch.bounds import shown
from anabranch.gateway.config.litellm_addresses import BASES, KNOWN, PROXIED, SECOND_NAMES
from anabranch.gateway.config.litellm_report import Environment, Report

Table = dict[str, Any]

_SECTIONS = ("general_settings", "litellm_settings", "router_settings", "environment_variables")
# Of general_settings, what has LiteLLM read the variables of its environment from a store of secrets.
_STORES = ("key_management_system", "use_azure_key_vault", "use_google_kms")
# Of default_litellm_params, what says where a model is, and with which key it is asked.
_PLACES = re.compile(
    r"api_\w+|base_url|custom_llm_provider|litellm_credential_name|region_name|use_litellm_proxy|mock_response"
    r"|(aws|azure|vertex)_\w+"
)
# Of an entry, what has others asked than the provider, or nobody.
_OTHERS = ("use_litellm_proxy", "mock_response")
_DEFAULTS = "router_settings.default_litellm_params"


class Elsewhere:
    """What a file says of its entries in other places.

    Attributes:
        unread: the first field that may hold keys and addresses and is not read; None for none.
    """

    def __init__(self, data: Table, report: Report, environment: Environment) -> None:
        self._leave, self._environment = report.leave, environment
        general, self._settings, router = (_table(data.get(name)) for name in _SECTIONS[:3])
        unread = [name for name in _SECTIONS if data.get(name) and not isinstance(data[name], dict)]
        unread += ["include"] if data.get("include") else []
        unread += [f"general_settings.{name}" for name in _STORES if general.get(name)]
        self.unread = unread[0] if unread else None
        given = _table(router.get("default_litellm_params"))
        self._defaults = {
            name: value for name, value in given.items() if value is not None and _PLACES.fullmatch(str(name))
        }
        self._credentials: dict[str, Table] = {}
        self._read_credentials(data.get("credential_list"))

    def _read_credentials(self, given: Any) -> None:
        if given is not None and not isinstance(given, list):
            self._leave("credential_list", "is no list")
        for at, one in enumerate(given if isinstance(given, list) else ()):
            name, values = _table(one).get("credential_name"), _table(one).get("credential_values")
            if isinstance(name, str) and isinstance(values, dict):
                # Of one name the first counts, as there.
                self._credentials.setdefault(name, values)
            else:
                self._leave(f"credential_list.{at}", "has no credential_name with credential_values")

    def merged(self, params: Table, field: str) -> Table | None:
        """An entry's parameters with those that it is given elsewhere; None for an entry that is left out, which is said.

        Args:
            params: its ``litellm_params``.
            field: where they are.
        """
        made = {name: value for name, value in params.items() if value is not None}
        for name, value in self._defaults.items():
            if made.setdefault(name, value) != value:
                self._leave(f"{field}.{name}", f"is not that of {_DEFAULTS}, which LiteLLM sends in its place")
                return None
        if (name := made.pop("litellm_credential_name", None)) is not None:
            found = self._credentials.get(name) if isinstance(name, str) else None
            if found is None:
                why = f"is {shown(name)}, which credential_list does not have; write its address and key into the entry"
                self._leave(f"{field}.litellm_credential_name", why)
                return None
            made = {name: value for name, value in found.items() if value is not None} | made
        if made.get("api_base", made.get("base_url")) != made.get("base_url", made.get("api_base")):
            self._leave(f"{field}.api_base", "is not what base_url is; give one of them")
            return None
        return made

    def is_placed(self, params: Table, kind: str, field: str) -> bool:
        """Whether it is known where an entry is asked. If not, it is said.

        Args:
            params: as `merged` gives them.
            kind: LiteLLM's name of the provider.
            field: where they are.
        """
        if kind != "litellm_proxy" and (by := self._proxied()) is not None:
            why = f"is asked of another LiteLLM there, that of LITELLM_PROXY_API_BASE, by {by}"
            self._leave(f"{field}.model", f"{why}; name it litellm_proxy/MODEL, or take that away if it is not so")
            return False
        is_named = any(params.get(name) is not None for name in BASES)
        regional = ("vertex_project", "vertex_location") if kind == "vertex_ai" else ()
        unread = [name for name in _OTHERS if params.get(name)]
        if "region_name" in params and kind in ("bedrock", "vertex_ai"):
            unread.append("region_name")
        unread += [
            f"litellm_settings.{name}"
            for name in regional
            if self._settings.get(name) and not (params.get(name) or params.get(SECOND_NAMES[name]))
        ]
        # Where all are, which there comes before Ollama's own.
        if self._settings.get("api_base") and (not is_named or kind == "ollama"):
            unread.append("litellm_settings.api_base")
        if self.unread and not is_named and self._environment.first(KNOWN[kind].bases) is None:
            unread.append(self.unread)
        for one in unread[:1]:
            if one in params:
                self._leave(f"{field}.{one}", "decides where the model is asked there, and is not read here")
                continue
            name = one.rpartition(".")[2] if one.startswith("litellm_settings.") else "api_base"
            why = f"may be another by {one}, which is not read here; write the entry's own into it, or take that out of the file"
            self._leave(f"{field}.{name}", why)
        return not unread

    def _proxied(self) -> str | None:
        """What has LiteLLM ask another for all models; None for nothing."""
        if self._settings.get("use_litellm_proxy"):
            return "litellm_settings.use_litellm_proxy"
        if PROXIED in self._environment.unknown:
            return f"environment_variables.{PROXIED}, which may say so"
        return PROXIED if (self._environment.get(PROXIED) or "").lower() == "true" else None


def _table(value: Any) -> Table:
    return value if isinstance(value, dict) else {}
