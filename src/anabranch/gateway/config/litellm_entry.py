"""Moving in from LiteLLM: reads what one entry of ``model_list`` says of its provider, and what LiteLLM would add from its environment."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from anabranch.bounds import shown
from anabranch.errors import ConfigError
from anabranch.gateway.config.litellm_addresses import BASES, KNOWN, Place, is_no_key
from anabranch.gateway.config.litellm_report import Environment, Report, variable_of
from anabranch.gateway.providers.openai import check_header, check_url

Table = dict[str, Any]

# Headers whose values are secrets, by their names.
_SECRET = re.compile(r"auth|key|token|secret|password|cookie|credential", re.IGNORECASE)


class MissingError(Exception):
    """The entry cannot be taken over; what is missing has been said."""


class Entry:
    """One entry's parameters.

    Args:
        params: ``litellm_params``.
        kind: LiteLLM's name of the provider.
        field: where ``params`` are, for what is said.
    """

    def __init__(self, params: Table, kind: str, field: str, report: Report, environment: Environment) -> None:
        self.params, self.kind = dict(params), kind
        self.place = KNOWN.get(kind, Place())
        self._field, self._report, self._environment = field, report, environment
        # What is said of a field, by the name that the file has for it.
        self._written: dict[str, str] = {}

    def leave(self, name: str, why: str) -> None:
        """Say what is not taken over."""
        self._report.leave(f"{self._field}.{self._written.get(name, name)}", why)

    def note(self, name: str, why: str) -> None:
        """Say what is to be known all the same."""
        self._report.note(f"{self._field}.{self._written.get(name, name)}", why)

    def read_second(self, names: Mapping[str, str]) -> None:
        """Take what is given by second names alone; where the first says something it counts, as there, and that is said.

        Args:
            names: the second ones by the first, as LiteLLM has them.
        """
        for name, second in names.items():
            given = self.params.pop(second, None)
            if given and not self.params.get(name):
                self.params[name], self._written[name] = given, second
            elif given and given != self.params[name]:
                self.leave(second, f"is not looked at, since {name} says another")

    def missing(self, name: str, why: str) -> MissingError:
        """What makes an entry one that cannot be taken over."""
        self.leave(name, why)
        return MissingError()

    def value(self, name: str, variables: Sequence[str] = ()) -> str | None:
        """A text; one that is read from the environment there is read now, and written into the config.

        Args:
            variables: that LiteLLM reads where the entry does not say it.

        Raises MissingError.
        """
        given = self.params.get(name)
        if given is None:
            return self._ambient(name, variables)
        if not isinstance(given, str):
            raise self.missing(name, "is no text")
        variable = variable_of(given)
        if variable is None and not given.startswith("os.environ/"):
            return given
        found = self._environment.get(variable or "")
        if found is None:
            raise self.missing(
                name, f"is read from the environment there, where {variable} is not set now; set it for the import"
            )
        return found

    def _ambient(self, name: str, variables: Sequence[str]) -> str | None:
        if unknown := [name for name in variables if name in self._environment.unknown]:
            raise self.missing(
                name, f"is that of {unknown[0]}, which environment_variables sets to what is not set now"
            )
        variable = self._environment.first(variables)
        if variable is None:
            return None
        self.note(name, f"is not given, and is that of {variable} now, as there; it is written into the config")
        return self._environment.get(variable)

    def base(self) -> str | None:
        """The address that the entry names, or the environment, checked. Raises MissingError."""
        name = next((name for name in ("api_base", "base_url") if self.params.get(name) is not None), "api_base")
        return self.checked(name, self.value(name, self.place.bases))

    def checked(self, name: str, found: str | None) -> str | None:
        """An address. Raises MissingError."""
        if found is not None:
            try:
                check_url(name, found)
            except ConfigError as error:
                raise self.missing(name, f"cannot be taken over: {error}") from None
        return found

    @property
    def names_base(self) -> bool:
        """Whether the entry itself says where the provider is."""
        return self.params.get("api_base") is not None or self.params.get("base_url") is not None

    def key(self, base: str | None) -> str | None:
        """The variable that holds the key; None for none. One that is written down is not taken over.

        Args:
            base: where the provider is; None for where it is by default.
        """
        given = self.params.get("api_key")
        place = self.place
        if given is not None:
            if isinstance(given, str) and is_no_key(given) and not self._is_providers(base):
                return None
            return self.reference("api_key")
        found = self._environment.first(place.keys)
        if self._is_providers(base):
            return found or place.usual_key
        # It is that of a server of one's own.
        if self.trusts(base) or place.is_anywhere:
            return found
        if place.keys:
            why = f"is not given, and LiteLLM sends {found or place.usual_key} to that address, which is not the provider's"
            self.note("api_key", f"{why}; here it is sent no key: set key_env if it wants one")
        return None

    def trusts(self, base: str | None) -> bool:
        """Whether what the environment holds may be sent there: to the provider, or where the environment itself says that it is."""
        given = [self.params[name] for name in BASES if self.params.get(name) is not None]
        return self._is_providers(base) or all(variable_of(one) in self.place.bases for one in given)

    def _is_providers(self, base: str | None) -> bool:
        return self.place.address is not None if base is None else self.place.is_at(base)

    def reference(self, name: str) -> str | None:
        """The variable that holds a secret; None where the entry names none, or, which is said, has it written down."""
        given = self.params.get(name)
        variable = variable_of(given)
        if variable is None and given is not None:
            self.leave(name, "is a key written into the file (not shown); put it into the environment and set key_env")
        return variable

    def is_set(self, name: str) -> bool:
        """Whether a variable is set now."""
        return self._environment.get(name) is not None

    def first(self, names: Sequence[str]) -> str | None:
        """The first variable that is set now."""
        return self._environment.first(names)

    def headers(self) -> dict[str, str]:
        """What is sent with each call; one that is a secret, or none, is said."""
        made: dict[str, str] = {}
        for field in ("headers", "extra_headers"):
            given = self.params.get(field)
            if given is not None and not isinstance(given, dict):
                self.leave(field, "is no table")
                continue
            for name, value in (given or {}).items():
                if self._is_header(f"{field}.{name}", str(name), value):
                    made[str(name)] = value
        return made

    def _is_header(self, field: str, name: str, value: Any) -> bool:
        if _SECRET.search(name) or (isinstance(value, str) and value.startswith("os.environ/")):
            self.leave(
                field, "looks like a secret (not shown), and headers here are no place for one; keys come from key_env"
            )
            return False
        if not isinstance(value, str):
            self.leave(field, f"is {shown(value)}, which is no text")
            return False
        try:
            check_header(name, value)
        except ConfigError as error:
            self.leave(field, f"cannot be taken over: {error}")
            return False
        return True
