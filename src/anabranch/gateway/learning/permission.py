"""Who may score a request, and whose scores a strategy learns from."""

from anabranch.gateway.config import StrategyConfig
from anabranch.gateway.config.strategies import Who
from anabranch.gateway.store import KeyRecord


def may_teach(who: Who, giver: KeyRecord | None, key_id: str, team: str) -> bool:
    """Whether what ``giver`` says of a request moves a strategy; see `FeedbackConfig.who`.

    Args:
        who: the setting.
        giver: the key that says it; None for a sender without one.
        key_id, team: of the request.
    """
    if who == "none":
        return False
    if giver is not None and giver.is_admin:
        return True
    is_own = ("" if giver is None else giver.id) == key_id
    is_team = giver is not None and giver.team != "" and giver.team == team
    return {"own": is_own, "team": is_own or is_team, "any": True, "admin": False}[who]


def may_score(who: Who, giver: KeyRecord | None, key_id: str, team: str) -> bool:
    """Whether ``giver`` may say something of a request at all: of its own, as an operator, and of those that it may teach from."""
    asked = "own" if who == "none" else who
    return may_teach(asked, giver, key_id, team) or may_teach("own", giver, key_id, team)


def is_learned_of(strategy: StrategyConfig, key_id: str, team: str) -> bool:
    """Whether requests of a key teach a strategy, whoever scores them."""
    return not strategy.learns_of or f"key:{key_id}" in strategy.learns_of or f"team:{team}" in strategy.learns_of
