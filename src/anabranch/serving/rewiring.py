"""`RewiringConfig`: whether requests may have the routers of a mixture of experts turned to their text, and how."""

from typing import TYPE_CHECKING, Any

from anabranch.config import Config, Field, configclass, from_dict
from anabranch.errors import ConfigError

if TYPE_CHECKING:
    from anabranch.adapters.rewiring import Rewiring

__all__ = ["WINDOW", "RewiringConfig"]

# Tokens of a context that are fitted where nobody says: a gradient holds activations of all of them, and the guard runs them four times.
WINDOW = 512


@configclass
class RewiringConfig(Config):
    """Rewiring of requests that ask for it (`Request.rewires`), see `anabranch.adapters.rewiring`.

    Attributes:
        on: whether they may.
        settings: fields of `anabranch.adapters.rewiring.Rewiring`, the same for all requests. ``window`` is 512 where nobody says it,
            so that no request takes more memory than others need; keys and values are always computed again (``cache``).
    """

    on: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.on:
            if self.settings:
                raise ConfigError("settings is given, but on is not; set both (--rewire), or none")
            return
        if self.settings.get("cache", "recompute") != "recompute":
            raise ConfigError(
                f"settings.cache is {self.settings['cache']!r}; a server always computes keys and values again, for which "
                "request loses them first depends on others: leave it out"
            )
        _ = self.rewiring

    @property
    def rewiring(self) -> "Rewiring":
        """The settings with their defaults. Raises ConfigError for settings that cannot be."""
        # What it imports takes a second, which nobody else pays for.
        from anabranch.adapters.rewiring import Rewiring

        return from_dict(Rewiring, {"window": WINDOW, **self.settings}, "settings")
