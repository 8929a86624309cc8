"""`RewiringConfig`: whether requests may have the routers of a mixture of experts turned to their text, and how."""

from collections.abc import Mapping
from typing import Any

from anabranch.bounds import near_name, shown
from anabranch.config import Config, Field, configclass, from_dict
from anabranch.errors import ConfigError
from anabranch.rewiring import Rewiring

__all__ = ["WINDOW", "RewiringConfig"]

# Tokens of a context that are fitted where nobody says: a gradient holds activations of all of them, and the guard runs them four times.
WINDOW = 512


# Settings that say how long a request takes, or how much memory, and whether more of them is less.
LIMITED = {"steps": False, "interval": True, "window": False, "most_steps": False, "most_seconds": False}


@configclass
class RewiringConfig(Config):
    """Rewiring of requests that ask for it (`Request.rewires`), see `anabranch.adapters.rewiring`.

    Attributes:
        on: whether they may.
        settings: fields of `anabranch.rewiring.Rewiring`, of requests that say nothing else. ``window`` is 512 where nobody says
            it, so that no request takes more memory than others need; keys and values are always computed again (``cache``).
        limits: how far a request may go with what it says for itself: most ``steps``, ``window``, ``most_steps`` and ``most_seconds``, and
            the least ``interval``. What is not said is as in ``settings``, so that no request takes more than others.

    Raises ConfigError for settings that cannot be, or beyond the limits.
    """

    on: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)
    limits: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.on:
            given = [name for name in ("settings", "limits") if getattr(self, name)]
            if given:
                raise ConfigError(f"{given[0]} is given, but on is not; set both (--rewire), or none")
            return
        if self.settings.get("cache", "recompute") != "recompute":
            raise ConfigError(
                f"settings.cache is {self.settings['cache']!r}; a server always computes keys and values again, for which "
                "request loses them first depends on others: leave it out"
            )
        for name in self.limits:
            if name not in LIMITED:
                hint = near_name(name, LIMITED) or f"; it has {', '.join(LIMITED)}"
                raise ConfigError(f"limits has no {shown(name)}{hint}")
        over = beyond(self.rewiring, self.limit)
        if over is not None:
            raise ConfigError(f"settings.{over} (limits)")

    @property
    def rewiring(self) -> Rewiring:
        """The settings with their defaults. Raises ConfigError for settings that cannot be."""
        return from_dict(Rewiring, {"window": WINDOW, **self.settings}, "settings")

    @property
    def limit(self) -> Rewiring:
        """The settings that ask for as much as a request may. Raises ConfigError for limits that cannot be."""
        # Whatever else the settings are: a window that leaves a guard nothing is no matter of the limits.
        table = {"window": WINDOW, **self.settings, "guard": False, **self.limits}
        return from_dict(Rewiring, table, "limits")

    def of_request(self, wanted: Mapping[str, Any]) -> Rewiring:
        """The settings of a request that says some for itself. Raises ConfigError for those that cannot be, or beyond the limits."""
        made: Rewiring = from_dict(Rewiring, {"window": WINDOW, **self.settings, **wanted}, "rewire")
        # In a request null is what is not said.
        over = beyond(made, self.limit, is_request=True)
        if over is not None:
            raise ConfigError(f"rewire.{over} (engine.rewiring.limits)")
        return made


def beyond(made: Rewiring, limit: Rewiring, *, is_request: bool = False) -> str | None:
    """What of ``made`` goes beyond ``limit``, and what it may be; None where nothing does. In words for a request, or for a config."""
    for name, is_least in LIMITED.items():
        value, most = getattr(made, name), getattr(limit, name)
        # Without an interval there is the one phase of the prompt, and without any other there is no end.
        if is_least:
            is_over = value is not None and (most is None or value < most)
            nothing = "left out" if is_request else "null"
            allowed = nothing if most is None else f"{most} or more, or {nothing}"
        else:
            is_over, allowed = most is not None and (value is None or value > most), f"{most} or less"
        if is_over:
            return f"{name} is {'null' if value is None else shown(value)}; it may be {allowed} here"
    return None
