"""`Rewires`: how one request wants the routers of its experts turned to its text: settings of its own, and where it begins."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from anabranch.bounds import near_name, shown
from anabranch.errors import InputError
from anabranch.field_schemas import field_schemas
from anabranch.rewiring import Rewiring

__all__ = ["SETTINGS", "Rewires"]

# JSON schemas of what a request may say for itself of `anabranch.rewiring.Rewiring`. How keys and values are kept, and what of activations,
# is the server's to say.
SETTINGS = {name: schema for name, schema in field_schemas(Rewiring).items() if name not in ("cache", "checkpointing")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewires:
    """What one request says of it.

    Attributes:
        settings: of `SETTINGS`, by name; what is not said is as the server has it.
        state: the vectors to begin with, as they were told (`Output.rewire_state`); None for those of a conversation that begins.
        returns_state: tell them as the request ends.
        may_be_cut: whoever reads what comes may end it before that, as at a text that it waits for: tell them behind each time that they
            were fitted, too.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    state: Any = None
    returns_state: bool = False
    may_be_cut: bool = False

    @classmethod
    def of(cls, wanted: Mapping[str, Any]) -> Self:
        """Of one table: settings by name, and beside them ``state`` and ``return_state``. Raises InputError for other names."""
        known = (*SETTINGS, "state", "return_state")
        for name in wanted:
            if name not in known:
                hint = near_name(name, known) or f"; it takes {', '.join(known)}"
                raise InputError(f"rewire has no field {shown(name)}{hint}")
        returns = wanted.get("return_state")
        if returns is not None and not isinstance(returns, bool):
            raise InputError(f"rewire.return_state is {shown(returns)}; it must be true or false")
        settings = {name: value for name, value in wanted.items() if name in SETTINGS}
        return cls(settings=settings, state=wanted.get("state"), returns_state=bool(returns))
