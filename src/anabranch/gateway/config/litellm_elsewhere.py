"""Moving in from LiteLLM: keys and addresses that a file says outside of ``model_list``, and what may say them and is not read.

An entry whose address may come from what is not read is left out: what it is asked would go to the provider instead.
"""

import re
from collections.abc import Iterator
from typing import Any

from anabranch.bounds import shown
from anabranch.gateway.config.litellm_addresses import BASES, KNOWN, LOCATIONS, PROJECTS, PROXIED, REGIONS, SECOND_NAMES
from anabranch.gateway.config.litellm_report import Environment, Report, variable_of

Table = dict[str, Any]
# A field of an entry, what may say it and is not read (None for the field itself), and the variables that say it as well.
_Unread = tuple[str, str | None, tuple[str, ...]]

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
# Of two clouds, what decides with which region is asked, and the variables that hold it where an entry does not say it.
_REGIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "vertex_ai": {"vertex_project": PROJECTS, "vertex_location": LOCATIONS},
    "bedrock": {"aws_region_name": REGIONS},
}
# Of them, what is the key; of all others it is api_key.
_KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "vertex_ai": (("vertex_credentials",),),
    "bedrock": (("api_key",), ("aws_access_key_id", "aws_secret_access_key")),
}
_DEFAULTS = "router_settings.default_litellm_params"


class Elsewhere:
    """What a file says of its entries in other places.

    Attributes:
        unread: the first field that may hold keys and addresses and is not read; None for none.
    """

    def __init__(self, data: Table, report: Report, environment: Environment) -> None:
        self._leave, self._note, self._environment = report.leave, report.note, environment
        general, self._settings, router = (_table(data.get(name)) for name in _SECTIONS[:3])
        self._broken = [name for name in _SECTIONS if data.get(name) and not isinstance(data[name], dict)]
        self._included = ["include"] if data.get("include") else []
        self._stores = [f"general_settings.{name}" for name in _STORES if general.get(name)]
        self.unread = next(iter((*self._broken, *self._included, *self._stores)), None)
        self._hosted = _hosted(_table(general.get("key_management_settings")))
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
        regional = tuple(_REGIONAL[kind]) if kind == "vertex_ai" else ()
        unread: list[_Unread] = [(name, None, ()) for name in _OTHERS if params.get(name)]
        if "region_name" in params and kind in ("bedrock", "vertex_ai"):
            unread.append(("region_name", None, ()))
        unread += [
            (name, f"litellm_settings.{name}", ())
            for name in regional
            if self._settings.get(name) and not _says(params, name)
        ]
        # Where all are, which there comes before Ollama's own.
        if self._settings.get("api_base") and (not is_named or kind == "ollama"):
            unread.append(("api_base", "litellm_settings.api_base", ()))
        if not is_named and self._environment.first(KNOWN[kind].bases) is None:
            unread += self._unread_bases(params, kind)
        unread += self._unread_regions(params, kind)
        for name, by, variables in unread[:1]:
            if by is None:
                self._leave(f"{field}.{name}", "decides where the model is asked there, and is not read here")
                continue
            own = f"write the entry's own into it{f', set {variables[0]} for the import' if variables else ''}"
            why = f"may be another by {by}, which is not read here; {own}, or take that out of the file"
            self._leave(f"{field}.{name}", why)
        return not unread

    def _unread_bases(self, params: Table, kind: str) -> Iterator[_Unread]:
        """What may say the address of an entry without one.

        If the entry says all else itself, what may say it is noted alone: else nothing of a file with an include or a store could be moved.
        """
        names = KNOWN[kind].bases
        is_own = KNOWN[kind].address is not None and _says_itself(params, kind)
        is_held = self._hosted is not None and not self._hosted.isdisjoint(names)
        yield from (("api_base", by, names) for by in (*self._broken, *(self._stores if is_held else ())))
        stores = self._stores if names and self._hosted is None else ()
        for by, said in (
            *((one, (*names, "litellm_settings.api_base")) for one in self._included),
            *((one, names) for one in stores),
        ):
            if not is_own:
                yield "api_base", by, names
                continue
            why = f"is not read here: if it has {' or '.join(said)}, LiteLLM asks {kind} there; entries that name their key are taken"
            self._note(
                by,
                f"{why} all the same, and are asked at the provider's own address; set api_base if theirs is another",
            )

    def _unread_regions(self, params: Table, kind: str) -> Iterator[_Unread]:
        """What of a region is in a store of secrets, by what the file says of that."""
        for name, variables in _REGIONAL.get(kind, {}).items():
            is_said = _says(params, name) or self._environment.first(variables) is not None
            if not is_said and not (self._hosted or frozenset()).isdisjoint(variables):
                yield from ((name, by, variables) for by in self._stores)

    def _proxied(self) -> str | None:
        """What has LiteLLM ask another for all models; None for nothing."""
        # As text it says nothing there.
        if self._settings.get("use_litellm_proxy") is True:
            return "litellm_settings.use_litellm_proxy"
        if PROXIED in self._environment.unknown:
            return f"environment_variables.{PROXIED}, which may say so"
        return PROXIED if (self._environment.get(PROXIED) or "").lower() == "true" else None


def _hosted(settings: Table) -> frozenset[str] | None:
    """The variables that LiteLLM reads from a store of secrets, by ``key_management_settings``; None for all."""
    if settings.get("access_mode") == "write_only":
        return frozenset()
    names = settings.get("hosted_keys")
    return frozenset(str(name) for name in names) if isinstance(names, list) else None


def _says(params: Table, name: str) -> bool:
    """Whether an entry says something, by either of two names."""
    return bool(params.get(name) or params.get(SECOND_NAMES.get(name, name)))


def _says_itself(params: Table, kind: str) -> bool:
    """Whether an entry says with which key it is asked, as a variable, and in which region."""
    named = any(
        all(variable_of(params.get(name) or params.get(SECOND_NAMES.get(name, name))) for name in names)
        for names in _KEYS.get(kind, (("api_key",),))
    )
    return named and all(_says(params, name) for name in _REGIONAL.get(kind, {}))


def _table(value: Any) -> Table:
    return value if isinstance(value, dict) else {}
