"""`DepthConfig`: the depth routers that a model is served with."""

from typing import Literal

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError

__all__ = ["DepthConfig"]


@configclass
class DepthConfig(Config):
    """Which blocks requests run, where routers choose them (`anabranch.depth`).

    Attributes:
        routers: folder of routers that ``anabranch depth train`` made for this model; None for none.
        control: how deep they go, without training anything again: -1 skips all blocks, -0.5 is what they say, 0.5 is the whole model, 1
            repeats all.
        usual: of requests that do not say their depth.
    """

    routers: str | None = None
    control: float = Field(default=-0.5, ge=-1, le=1)
    usual: Literal["routed", "full"] = "routed"

    def __post_init__(self) -> None:
        if self.routers is not None:
            return
        for name in ("control", "usual"):
            if getattr(self, name) != getattr(DepthConfig, name):
                raise ConfigError(
                    f"depth.{name} is {getattr(self, name)!r}, but depth.routers is not set; name their folder (--depth)"
                )
