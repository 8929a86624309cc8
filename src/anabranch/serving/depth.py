"""`DepthConfig`: the depth routers, and the skipper of tokens, that a model is served with."""

from pathlib import Path
from typing import Literal

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError
from anabranch.seen_files import SeenFiles
from anabranch.serving.core.client import MOST_VISITS

__all__ = ["DepthConfig", "Usual", "room_for_paths"]

# What a request runs: what routers choose, all blocks with a prompt that they pass over in parts, or all of all.
Usual = Literal["routed", "pruned", "full"]


@configclass
class DepthConfig(Config):
    """Which blocks requests run, where routers choose them, and which tokens of prompts blocks pass over (`anabranch.depth`).

    Attributes:
        routers: folder of routers that ``anabranch depth train`` made for this model; None for none.
        control: how deep they go, without training anything again: -1 skips all blocks, -0.5 is what they say, 0.5 is the whole model, 1
            repeats all.
        skipper: file that ``anabranch depth prune`` made for this model (FTP); None for none.
        usual: of requests that do not say their depth: ``routed``, ``pruned`` or ``full``; None for ``routed`` with routers, and for
            ``pruned`` with a skipper alone.
    """

    routers: str | None = None
    control: float = Field(default=-0.5, ge=-1, le=1)
    skipper: str | None = None
    usual: Usual | None = None

    def __post_init__(self) -> None:
        if self.routers is None and self.control != DepthConfig.control:
            raise ConfigError(
                f"depth.control is {self.control!r}, but depth.routers is not set; name their folder (--depth)"
            )
        if self.usual == "pruned" and self.skipper is None:
            raise ConfigError("depth.usual is 'pruned', but depth.skipper is not set; name its file (--skipper)")
        is_alone = self.usual == "routed" or (self.usual == "full" and self.skipper is None)
        if is_alone and self.routers is None:
            raise ConfigError(
                f"depth.usual is {self.usual!r}, but depth.routers is not set; name their folder (--depth)"
            )

    def seen(self) -> SeenFiles:
        """The files of the routers and of the skipper, as they are now."""
        from anabranch.depth.dr_llm.bank import CONFIG, ROUTERS

        routers = [] if self.routers is None else [Path(self.routers) / name for name in (CONFIG, ROUTERS)]
        return SeenFiles.of([*routers, *([] if self.skipper is None else [Path(self.skipper)])])

    def usually(self, *, routes: bool, prunes: bool) -> Usual:
        """What a request runs that says nothing, where there are routers, or a skipper."""
        if self.usual is not None:
            return self.usual
        return "routed" if routes else "pruned" if prunes else "full"


def room_for_paths(max_depth: int | None, num_layers: int, *, routes: bool) -> int | None:
    """Most blocks of a request's own path: ``max_depth``, or where nobody says that, as many as depth routers may choose.

    None where nobody says it and there are no routers, so that a server takes no path.
    """
    return MOST_VISITS * num_layers if max_depth is None and routes else max_depth
