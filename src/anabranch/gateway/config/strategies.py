"""Strategies in the config, and what they may learn from."""

from typing import Any, Literal

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError
from anabranch.gateway.config.ab import is_key_or_team

# Whose scores of a request move what a strategy learns.
Who = Literal["own", "team", "any", "admin", "none"]


@configclass
class StrategyConfig(Config):
    """A way of routing that requests may name as ``auto/NAME``.

    Exactly one of ``use`` and ``router`` is given. Files may write ``kind = "knn"`` and the strategy's fields beside it, instead of
    ``use`` and ``fields``.

    Attributes:
        use: name of a strategy or predictor (`anabranch.routers.strategies.names`).
        fields: of its config.
        trade_off: score given up to save a dollar; None takes the strategy's own.
        budget_usd: dollars a query, on average, that a fitted router may spend: the trade-off that kept it as it was fitted. None for none.
        router: a fitted router's file, or a folder of them (``anabranch gateway fit``): the one of the strategy's name, else what
            ``anabranch gateway eval`` recommends of them, else the only one.
        models: those it may choose among; empty for all.
        timeout_s: seconds a decision may take before the default strategy decides instead.
        learns_from: whose scores it learns from; None takes ``feedback.who``.
        learns_of: whose requests it learns of, as ``key:ID`` or ``team:NAME``; empty for all.
    """

    use: str | None = None
    fields: dict[str, Any] = Field(default_factory=dict)
    trade_off: float | None = Field(default=None, ge=0)
    budget_usd: float | None = Field(default=None, gt=0)
    router: str | None = None
    models: tuple[str, ...] = ()
    timeout_s: float = Field(default=0.05, gt=0)
    learns_from: Who | None = None
    learns_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.use is None) == (self.router is None):
            raise ConfigError(
                "a strategy needs one of kind (a strategy by name) and router (a folder of anabranch gateway fit)"
            )
        if self.router is not None and self.fields:
            raise ConfigError(
                f"fields are {', '.join(self.fields)}, but a fitted router brings its own; leave them out"
            )
        if self.budget_usd is not None and (self.router is None or self.trade_off is not None):
            raise ConfigError(
                f"budget_usd is {self.budget_usd:g}, and finds the trade_off of a fitted router; give router and no trade_off, or leave it "
                "out (fields of some strategies have a budget)"
            )
        odd = next((one for one in self.learns_of if not is_key_or_team(one)), None)
        if odd is not None:
            raise ConfigError(f"learns_of has {odd!r}; write key:ID or team:NAME")


@configclass
class FeedbackConfig(Config):
    """Who moves what strategies learn, and how far.

    An outcome that nobody scored, with its cost and its time, counts as what the key of its request says.

    Attributes:
        who: whose scores of a request count. ``own``: those of the key it came with; ``team``: also of that key's team; ``any``: of every
            key; ``admin``: of operators' keys alone; ``none``: nobody's. Operators' keys count with all but the last. Whoever made a
            request may score it in any case: the store keeps that, whether or not a strategy learns from it.
        share: most of the last ``window`` outcomes taken in by one strategy that may be of one key. Where fewer keys than that asks for
            take part, each may have an equal part; a key that is alone has no limit, and 1 is none for anybody.
        window: see ``share``.
        free: outcomes an hour that a key may add whatever the others do, so that somebody can be the first.
    """

    who: Who = "own"
    share: float = Field(default=0.2, gt=0, le=1)
    window: int = Field(default=1000, ge=10)
    free: int = Field(default=60, ge=0)


@configclass
class LearningConfig(Config):
    """What strategies may have asked beside requests, to learn: better answers to examples, second answers, what answers are worth.

    Attributes:
        judge: model that says what answers are worth; "" has nothing asked.
        budget_usd: dollars a day for all of it, the judge's too; the budget of the tag ``learning``.
    """

    judge: str = ""
    budget_usd: float = Field(default=1.0, ge=0)
