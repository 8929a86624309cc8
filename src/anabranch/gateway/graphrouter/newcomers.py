"""What a model that joins later costs, before and after calls of it were paid."""
# Shapes: N queries, M models, T tasks

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from anabranch.gateway.money import Price, dollars


@dataclass
class Ratio:
    """Dollars of a model over what the fitted models cost on average at the same queries.

    Attributes:
        up: sum of its cost times theirs.
        down: sum of theirs squared.
    """

    up: float
    down: float

    @property
    def value(self) -> float:
        """The ratio; 1 before anything is known."""
        return self.up / self.down if self.down > 0 else 1.0

    def learn(self, cost: float, usual: float) -> None:
        """A call that was paid."""
        self.up += cost * usual
        self.down += usual * usual


def first_ratio(
    price: Price, prices: Mapping[str, Price], models: tuple[str, ...], tokens: tuple[float, float], usual: float
) -> Ratio:
    """From the price alone.

    Args:
        price: of the new model.
        prices: of known models, where known.
        models: the fitted ones.
        tokens: mean prompt and completion tokens in the recorded outcomes; NaN where not recorded.
        usual: mean dollars of a call of the fitted models.

    Returns:
        By recorded tokens, else against the known prices of other models, else 1.
    """
    prompt, completion = tokens
    if not (price.input or price.output) or usual <= 0:
        return Ratio(0.0, 0.0)
    if np.isfinite(prompt) and np.isfinite(completion):
        return Ratio(dollars(price.cost(round(prompt), round(completion))) * usual, usual * usual)
    known = [prices[name].input + prices[name].output for name in models if name in prices]
    if not known or len(known) < len(models):
        return Ratio(0.0, 0.0)
    share = (price.input + price.output) / max(float(np.mean(known)), 1e-9)
    return Ratio(share * usual * usual, usual * usual)
