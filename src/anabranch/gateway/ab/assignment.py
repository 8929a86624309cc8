"""Which of two strategies a request goes to: by a hash of whose it is, so that nobody goes back and forth."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from anabranch.config import to_dict
from anabranch.gateway.config.ab import ABConfig
from anabranch.gateway.store import KeyRecord

Side = Literal["a", "b"]


@dataclass(frozen=True, slots=True)
class Arm:
    """Where a request belongs.

    Attributes:
        test: name of the test.
        side: ``a`` or ``b``.
        strategy: that decides.
        probability: with which such a key or user comes to this side.
        unit: whose it is, as a hash; "" if nobody's, and then it does not count.
        config: of the test.
    """

    test: str
    side: Side
    strategy: str
    probability: float
    unit: str
    config: ABConfig

    def to_dict(self) -> dict[str, Any]:
        """For the decision in the store, with all that a result is reckoned from."""
        return {
            "test": self.test,
            "arm": self.side,
            "probability": self.probability,
            "unit": self.unit,
            "version": version_of(self.test, self.config),
            "config": _told(self.config),
        }


@lru_cache(maxsize=256)
def version_of(test: str, config: ABConfig) -> str:
    """Tells tests apart: whatever changes in the config begins the test anew."""
    settings = to_dict(config)
    if not config.trusts:
        # As it was before there was such a setting: a test that runs goes on.
        del settings["trusts"]
    if config.unit == "user":
        # Until then a user came to another side with another key: what was found so is of another test.
        settings["users"] = "whatever their key"
    return _digest(test, json.dumps(settings, sort_keys=True))[:12]


@lru_cache(maxsize=256)
def _told(config: ABConfig) -> dict[str, Any]:
    return {name: value for name, value in to_dict(config).items() if name != "salt"}


def counted_user(config: ABConfig, record: KeyRecord | None, named: str) -> tuple[str, str]:
    """The user that a request counts for, "" for none, and then it counts for its key; and among whom that name is one user.

    Who has several keys, or changes to another, is the same user: one to whom the key belongs among all of these, one that a request
    names among those of the key's team, and of the key alone where that has no team.

    Args:
        record: its key; None for none.
        named: the user that the request says it is of.
    """
    if record is None:
        return named, ""
    if record.user:
        return record.user, "owner"
    is_trusted = f"key:{record.id}" in config.trusts or (record.team != "" and f"team:{record.team}" in config.trusts)
    return (named, f"team:{record.team}" if record.team else f"key:{record.id}") if is_trusted else ("", "")


def arm_of(test: str, config: ABConfig, *, key: str, user: str, among: str = "") -> Arm:
    """The side of a request.

    Args:
        test: its name.
        config: of it.
        key: id of the key it came with; "" for none.
        user, among: see `counted_user`; "" for none.
    """
    whose = (
        ("key", key) if key and config.unit == "key" else ("user", among, user) if user else ("key", key) if key else ()
    )
    if not whose:
        return Arm(test, "a", config.a, 1.0, "", config)
    digest = _digest("unit", config.salt or test, *whose)
    is_b = int(digest[:16], 16) < config.share * 2**64
    side: Side = "b" if is_b else "a"
    chance = config.share if is_b else 1 - config.share
    # Of other digits than those that chose the side.
    return Arm(test, side, config.b if is_b else config.a, chance, digest[16:32], config)


def _digest(*parts: str) -> str:
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
