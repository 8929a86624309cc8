"""What calls cost: the usual dollars of each task and model, and what a model that joins later costs before and after it was paid."""
# Shapes: N queries, M models, T tasks

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.strategy import Arrays
from anabranch.routers.graphrouter.graph import CostScale
from anabranch.routers.money import Price, dollars


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


@dataclass
class Costs:
    """Dollars of calls, known to a fitted router.

    Attributes:
        scale: to [0, 1], by what training saw.
        mean_TM: mean dollars of fitted models in each task; NaN where no cost is known at all.
        tokens: mean prompt and completion tokens of recorded calls; NaN where not recorded.
        ratios: of models that joined later, in their order.
    """

    scale: CostScale
    mean_TM: np.ndarray
    tokens: tuple[float, float]
    ratios: list[Ratio] = field(default_factory=list)

    @classmethod
    def fit(cls, data: Recorded, task_N: np.ndarray, held_N: np.ndarray, num_tasks: int) -> tuple["Costs", np.ndarray]:
        """From recorded costs; and those costs scaled, [N, M], by a scale that rows ``held_N`` have no part in (zeros if none is known)."""
        known = data.cost_NM is not None and bool(np.isfinite(data.cost_NM).any())
        cost_NM = data.cost_NM if known and data.cost_NM is not None else np.zeros(data.score_NM.shape)
        scale = CostScale.fit(cost_NM[~held_N], task_N[~held_N], num_tasks)
        mean_TM = np.stack([column_means(cost_NM[task_N == task]) for task in range(num_tasks)])
        mean_TM = (
            np.where(np.isfinite(mean_TM), mean_TM, column_means(cost_NM)) if known else np.full_like(mean_TM, np.nan)
        )
        tokens = (np.nan, np.nan)
        if data.tokens_NM2 is not None and np.isfinite(data.tokens_NM2).any((0, 1)).all():
            prompt, completion = np.nanmean(data.tokens_NM2, (0, 1)).tolist()
            tokens = (prompt, completion)
        return cls(scale, mean_TM, tokens), scale.scale(cost_NM, task_N)

    @property
    def num_fitted(self) -> int:
        """Models that were there in training."""
        return self.mean_TM.shape[1]

    @property
    def are_known(self) -> bool:
        """Whether any cost was recorded."""
        return bool(np.isfinite(self.mean_TM).any())

    def join(self, price: Price, prices: Mapping[str, Price], models: tuple[str, ...]) -> None:
        """A model more; ``models`` are the fitted ones, ``prices`` known ones of them."""
        usual = float(np.nanmean(self.mean_TM)) if self.are_known else 0.0
        self.ratios.append(first_ratio(price, prices, models, self.tokens, usual))

    def usual(self, share_NT: np.ndarray) -> np.ndarray:
        """[N]: what a call of the fitted models costs on average."""
        return share_NT.astype(float) @ self.mean_TM.mean(1)

    def learn(self, model: int, cost: float, usual: float) -> None:
        """A call that was paid: it moves the ratio of a model that joined later."""
        if model >= self.num_fitted and np.isfinite(cost) and usual > 0:
            self.ratios[model - self.num_fitted].learn(cost, usual)

    def by_task(self, share_NT: np.ndarray) -> np.ndarray:
        """[N, M] dollars: the mean of the task, and for models that joined later their ratio to it."""
        cost_NM, usual_N = share_NT.astype(float) @ self.mean_TM, self.usual(share_NT)
        return np.concatenate([cost_NM, *(ratio.value * usual_N[:, None] for ratio in self.ratios)], 1)

    def scaled(self, cost_NM: np.ndarray, share_NT: np.ndarray) -> np.ndarray:
        """Dollars to shares, by the likeliest task."""
        return self.scale.scale(cost_NM, share_NT.argmax(1))

    def dollars(self, scaled_NM: np.ndarray, share_NT: np.ndarray) -> np.ndarray:
        """[N, M]: shares back to dollars of fitted models, the ratio to their mean for those that joined later; NaN if none is known."""
        if not self.are_known:
            return np.full(scaled_NM.shape, np.nan)
        dollars_NM = self.scale.dollars(scaled_NM, share_NT.argmax(1))
        usual_N = dollars_NM[:, : self.num_fitted].mean(1)
        for at, ratio in enumerate(self.ratios, start=self.num_fitted):
            dollars_NM[:, at] = ratio.value * usual_N
        return dollars_NM

    def state(self) -> Arrays:
        """All of it."""
        ratios = np.array([[ratio.up, ratio.down] for ratio in self.ratios]).reshape(-1, 2)
        values = {
            "low_T": self.scale.low_T,
            "span_T": self.scale.span_T,
            "mean_TM": self.mean_TM,
            "tokens": np.array(self.tokens),
        }
        return {f"cost.{name}": value for name, value in {**values, "ratios": ratios}.items()}

    @classmethod
    def of_state(cls, arrays: Mapping[str, np.ndarray]) -> "Costs":
        """From what `state` gave."""
        own = {name: np.array(arrays[f"cost.{name}"]) for name in ("low_T", "span_T", "mean_TM", "tokens", "ratios")}
        prompt, completion = own["tokens"].tolist()
        ratios = [Ratio(up, down) for up, down in own["ratios"].tolist()]
        return cls(CostScale(own["low_T"], own["span_T"]), own["mean_TM"], (prompt, completion), ratios)


def column_means(value_NM: np.ndarray) -> np.ndarray:
    """NaN where nothing is known."""
    known_NM = np.isfinite(value_NM)
    count_M = known_NM.sum(0)
    return np.where(count_M > 0, np.where(known_NM, value_NM, 0.0).sum(0) / np.maximum(count_M, 1), np.nan)
