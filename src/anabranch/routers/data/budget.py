"""What a budget is of: dollars, seconds, tokens or energy. Strategies and the referee weigh whichever stands in ``cost_NM``."""
# Shapes: N queries, M models

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.contract.dataset import Recorded

Unit = Literal["dollars", "seconds", "tokens", "joules"]
UNITS: tuple[Unit, ...] = ("dollars", "seconds", "tokens", "joules")


def measured_in(data: Recorded, unit: Unit, joules: Mapping[str, float] | None = None) -> Recorded:
    """The same outcomes with ``cost_NM`` in another unit.

    Args:
        data: with what the unit is reckoned from: latency for seconds, token counts for tokens and joules.
        unit: of the budget.
        joules: of a token, by model; a measure of yours, since no provider tells.

    Raises InputError if the data lacks it.
    """
    if unit == "dollars":
        return data
    if unit == "seconds":
        if data.latency_NM is None:
            raise InputError("the outcomes hold no latency, so a budget of seconds has nothing to weigh")
        return replace(data, cost_NM=data.latency_NM)
    if data.tokens_NM2 is None:
        raise InputError(f"the outcomes hold no token counts, so a budget of {unit} has nothing to weigh")
    tokens_NM = data.tokens_NM2.sum(2)
    if unit == "tokens":
        return replace(data, cost_NM=tokens_NM)
    missing = [name for name in data.models if name not in (joules or {})]
    if joules is None or missing:
        raise InputError(f"a budget of joules needs those of a token for every model; {missing[0]!r} has none")
    return replace(data, cost_NM=tokens_NM * np.array([joules[name] for name in data.models]))
