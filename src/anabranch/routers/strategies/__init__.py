"""Every way of routing a query to a model, by name.

from anabranch.routers import strategies

router = strategies.make("knn", k=40).fit(recorded)
router.route(query, pool).model
"""

import difflib
from typing import Any

from anabranch.errors import ConfigError
from anabranch.registry import kinds, resolve
from anabranch.routers.contract.predictor import Ranked
from anabranch.routers.contract.strategy import Strategy

__all__ = ["make", "names"]


def names() -> list[str]:
    """All that `make` takes, sorted."""
    return sorted({*kinds("strategy"), *kinds("predictor")} - {Ranked.kind})


def make(name: str, *, trade_off: float | None = None, budget: float | None = None, **fields: Any) -> Strategy:
    """A strategy, not yet fitted.

    Args:
        name: of a strategy, or of a predictor, which then ranks by predicted quality and cost.
        trade_off: for predictors: score given up to save a dollar (default 0).
        budget: for predictors: dollars a query, on average, that ``fit`` chooses the trade-off for; as a field where others have one.
        fields: of its config.

    Raises ConfigError for an unknown name or field.
    """
    if name in kinds("predictor"):
        predictor = _part("predictor", name).Config(**fields)
        return Ranked.Config(predictor=predictor, trade_off=trade_off or 0.0, budget=budget).build()
    if name not in names():
        near = difflib.get_close_matches(name.lower(), names(), n=1)
        said = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names())}"
        raise ConfigError(f"no strategy {name!r}; {said}")
    if trade_off is not None:
        fields["trade_off"] = trade_off
    if budget is not None:
        fields["budget"] = budget
    return _part("strategy", name).Config(**fields).build()


def _part(family: str, name: str) -> Any:
    return resolve(family, name)
