"""What `LaneWorld` can be told."""

from __future__ import annotations

from anabranch.bounds import Size
from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError
from anabranch.rl.rewards import RouteReward

__all__ = ["ENDINGS", "Settings"]

# Faults that may end an episode; its time does in any case.
ENDINGS = ("vehicle", "walker", "red_light", "stop_sign", "off_road", "deviated", "blocked")


@configclass
class Settings(Config):
    """How LaneWorld is.

    Attributes:
        maps: that roads are taken from.
        routes: of each map, where the ego car may have to go.
        shortest_m, longest_m: of a route.
        traffic: other cars in each world, at most.
        walkers: who cross the route now and then.
        start_speed: of the ego car at the beginning, in m/s.
        reward: which parts of CaRL's reward count.
        shaped: use the shaped reward of Roach in its place, to compare.
        ends_by: which faults end an episode; the others are counted and it goes on. See `ENDINGS`, which are all there are.
        blocked_s: seconds of standing after which an episode ends.
        timeout_s: after which it ends in any case.
        raster: see a picture from above (`anabranch.rl.laneworld.raster`) and 8 numbers, instead of 161 numbers.
    """

    maps: Size = Field(default=8, ge=1, le=100)
    routes: Size = Field(default=16, ge=1, le=100)
    shortest_m: float = Field(default=200.0, ge=50)
    longest_m: float = Field(default=1000.0, ge=100, le=5000)
    traffic: int = Field(default=20, ge=0, le=100)
    walkers: int = Field(default=4, ge=0, le=100)
    start_speed: float = Field(default=5.0, ge=0, le=20)
    reward: RouteReward = Field(default_factory=RouteReward)
    shaped: bool = False
    ends_by: tuple[str, ...] = ENDINGS
    blocked_s: float = Field(default=60.0, gt=0)
    timeout_s: float = Field(default=1200.0, gt=0)
    raster: bool = False

    def __post_init__(self) -> None:
        if self.longest_m < self.shortest_m + 50:
            raise ConfigError(
                f"routes are to be {self.shortest_m:g} to {self.longest_m:g} m long; let there be 50 m between both"
            )
        unknown = [name for name in self.ends_by if name not in ENDINGS]
        if unknown:
            raise ConfigError(f"ends_by has {unknown[0]!r}; an episode can end by {', '.join(ENDINGS)}")
