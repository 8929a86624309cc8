"""Moving in from LiteLLM: which models are asked after another, in LiteLLM's order.

A model's own chain is all that is asked after it; that of ``*``, which ``default_fallbacks`` is too, is for models that have none. Of two
chains of one model the first counts, and of two sections ``router_settings``.
"""

from typing import Any

from anabranch.bounds import shown
from anabranch.gateway.config.litellm_report import Report

Table = dict[str, Any]

KINDS = {
    "fallbacks": "fallbacks",
    "context_window_fallbacks": "context_fallbacks",
    "content_policy_fallbacks": "filter_fallbacks",
}
DEFAULT = "default_fallbacks"
# All settings that this reads.
NAMES = (*KINDS, DEFAULT)


class Fallbacks:
    """Takes them over.

    Args:
        models: of ours, by name, with their aliases.
        report: told what is not taken over.
    """

    def __init__(self, models: dict[str, Table], report: Report) -> None:
        self._report = report
        self._models = {name: name for name in models}
        self._models |= {alias: name for name, model in models.items() for alias in model.get("aliases", ())}
        self._names = list(models)

    def take(self, sections: dict[str, Table]) -> Table:
        """Our tables that are not empty, by the names of our fields.

        Args:
            sections: ``router_settings`` and ``litellm_settings``, by name.
        """
        made: Table = {}
        for theirs, ours in KINDS.items():
            chains = self._chains(*self._given(theirs, sections))
            if theirs == "fallbacks":
                value, field = self._given(DEFAULT, sections)
                # It comes behind a chain of "*" that is written down, and the last of those counts.
                chains |= {"*": self._others(value, field)} if value is not None else {}
            rest = chains.pop("*", [])
            table = {name: [other for other in chains.get(name, rest) if other != name] for name in self._names}
            if any(table.values()):
                made[ours] = {name: others for name, others in table.items() if others}
        return made

    def _given(self, name: str, sections: dict[str, Table]) -> tuple[Any, str]:
        """What counts of a setting, and where it stands; None for nothing."""
        found = [(section, table[name]) for section, table in sections.items() if table.get(name)]
        for section, _ in found[1:]:
            self._report.note(f"{section}.{name}", f"is not looked at, since {found[0][0]}.{name} is given, as there")
        return (found[0][1], f"{found[0][0]}.{name}") if found else (None, name)

    def _chains(self, value: Any, field: str) -> dict[str, list[str]]:
        """Of each model that has one of its own, and of ``*``."""
        own: dict[str, list[str]] = {}
        by_alias: dict[str, list[str]] = {}
        for at, entry in enumerate(self._list(value, field)):
            if not isinstance(entry, dict):
                self._report.leave(f"{field}.{at}", "is no table")
                continue
            for name, others in entry.items():
                here = f"{field}.{at}.{name}"
                chain, target = self._others(others, here), "*" if name == "*" else self._model(name, here)
                if target is None:
                    continue
                if target not in ("*", name):
                    why = f"is for requests that name {name!r} there; here it is for all of {target!r}, whose name that is too"
                    self._report.note(here, why)
                    by_alias.setdefault(target, chain)
                elif target in own and name != "*":
                    self._report.note(here, "is not looked at: the first chain of a model counts, as there")
                else:
                    own[target] = chain
        return by_alias | own

    def _others(self, value: Any, field: str) -> list[str]:
        """The models of a chain, each once."""
        found: list[str] = []
        for at, other in enumerate(self._list(value, field)):
            here = f"{field}.{at}"
            if isinstance(other, dict):
                sets = ", ".join(sorted(str(name) for name in other if name != "model"))
                if sets:
                    self._report.leave(
                        here, f"sets {sets} of the request for a fallback, which has no counterpart here"
                    )
                other = other.get("model")
            target = self._model(other, field) if isinstance(other, str) else None
            if not isinstance(other, str):
                self._report.leave(here, f"is {shown(other)}, which names no model")
            if target is not None and target not in found:
                found.append(target)
        return found

    def _model(self, name: Any, field: str) -> str | None:
        target = self._models.get(name) if isinstance(name, str) else None
        if target is None:
            self._report.leave(field, f"names {name!r}, which is no model that was taken over")
        return target

    def _list(self, value: Any, field: str) -> list[Any]:
        if value is not None and not isinstance(value, list):
            self._report.leave(field, "is no list")
        return value if isinstance(value, list) else []
