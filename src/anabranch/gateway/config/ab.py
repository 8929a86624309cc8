"""An A/B test in the config: two strategies, and who gets which."""

from typing import Literal

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError


def is_key_or_team(text: str) -> bool:
    """Whether it names a key or a team: ``key:ID``, ``team:NAME``."""
    kind, _, name = text.partition(":")
    return kind in ("key", "team") and name != ""


@configclass
class ABConfig(Config):
    """Requests to ``auto/NAME`` go to one of two strategies, the same one for the same key (or user) at all times.

    Attributes:
        a, b: names of strategies of the config.
        share: of the keys (or users) that get ``b``.
        unit: what is split and compared: the ``key`` of a request, where there is none its ``user``; or ``user``: the one that its key
            belongs to, else, of keys that it ``trusts``, the one that the request names, else the key. A request with neither goes to
            ``a`` and does not count.
        trusts: keys and teams, as ``key:ID`` or ``team:NAME``, whose requests may name users of their own, each of whom counts: whoever
            makes up users decides the test.
        salt: another one, another split; "" takes the name of the test.
        metric: what an answer is worth: its first feedback (``score``), whether there was one (``success``; there was none where the sender
            left before it was whole), or what was paid for it (``cost``), lost ones too. Requests that were refused count for neither.
        most_usd: dollars that count as the worst that an answer may cost, for ``cost``; None otherwise.
        answers: that make the mean of a key: its first ones that count; a key with fewer does not count yet.
        alpha: chance that a difference is told where there is none, however often the test is looked at.
    """

    a: str = Field(min_length=1)
    b: str = Field(min_length=1)
    share: float = Field(default=0.5, gt=0, lt=1)
    unit: Literal["key", "user"] = "key"
    trusts: tuple[str, ...] = ()
    salt: str = Field(default="", max_length=200)
    metric: Literal["score", "success", "cost"] = "score"
    most_usd: float | None = Field(default=None, gt=0)
    answers: int = Field(default=5, ge=1, le=10_000)
    alpha: float = Field(default=0.05, gt=0, lt=0.5)

    def __post_init__(self) -> None:
        if self.a == self.b:
            raise ConfigError(f"a and b are both {self.a!r}; a test compares two strategies")
        odd = next((one for one in self.trusts if not is_key_or_team(one)), None)
        if odd is not None:
            raise ConfigError(f"trusts has {odd!r}; write key:ID or team:NAME")
        if self.trusts and self.unit != "user":
            raise ConfigError('trusts says whose users count, for unit = "user"; set that, or leave it out')
        if (self.metric == "cost") != (self.most_usd is not None):
            raise ConfigError(
                'most_usd goes with metric = "cost": the dollars that count as the worst; set both or neither'
            )
