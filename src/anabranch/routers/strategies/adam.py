"""Learning small models in numpy: Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1) on mini-batches, with early stopping."""
# Shapes: N rows, B rows of a batch

from collections.abc import Callable
from typing import Any

import numpy as np

Parameters = dict[str, np.ndarray]
LossAndGradients = Callable[[Parameters, np.ndarray, np.ndarray], tuple[float, Parameters]]


class Adam:
    """Steps of named float64 arrays in place; the penalty times an array is added to its gradient, as in PyTorch's Adam."""

    def __init__(self, parameters: Parameters, *, rate: float, penalty: float = 0.0) -> None:
        self.parameters, self.rate, self.penalty = parameters, rate, penalty
        self.first = {name: np.zeros_like(value) for name, value in parameters.items()}
        self.second = {name: np.zeros_like(value) for name, value in parameters.items()}
        self.steps = 0

    def step(self, gradients: Parameters) -> None:
        """One step against ``gradients``."""
        self.steps += 1
        first_bias, second_bias = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for name, gradient in gradients.items():
            gradient = gradient + self.penalty * self.parameters[name]
            first, second = self.first[name], self.second[name]
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            self.parameters[name] -= self.rate * (first / first_bias) / (np.sqrt(second / second_bias) + 1e-8)


def descend(
    parameters: Parameters,
    gradients: Callable[[np.ndarray], Parameters],
    row_N: np.ndarray,
    *,
    rate: float,
    penalty: float,
    batch: int,
    epochs: int,
    rng: np.random.Generator,
    check: Callable[[], float] | None = None,
    patience: int = 10,
) -> Parameters:
    """Learn in place, and return the parameters to keep.

    Args:
        parameters: what is learned.
        gradients: of the mean loss of some rows.
        row_N: rows to learn from, drawn without putting back in every epoch.
        rate: of Adam.
        penalty: of Adam.
        batch: B.
        epochs: at most.
        rng: draws the batches.
        check: loss on rows held back, after each epoch; the best parameters by it are kept. None keeps the last.
        patience: epochs without a better check before learning stops.
    """
    adam = Adam(parameters, rate=rate, penalty=penalty)
    best, kept, waited = np.inf, parameters, 0
    for _ in range(epochs):
        order = rng.permutation(row_N)
        for begin in range(0, len(order), batch):
            adam.step(gradients(order[begin : begin + batch]))
        if check is None:
            continue
        loss = check()
        waited += 1
        if loss < best:
            best, kept, waited = loss, {name: value.copy() for name, value in parameters.items()}, 0
        elif waited >= patience:
            break
    return kept


def fitted(
    parameters: Parameters,
    loss: LossAndGradients,
    x_ND: np.ndarray,
    y_NM: np.ndarray,
    parts: tuple[np.ndarray, np.ndarray],
    config: Any,
    rng: np.random.Generator,
) -> Parameters:
    """Descend until the rows held back gain no more, and return the best parameters by them.

    Args:
        parameters: what is learned, in place.
        loss: of parameters, inputs and labels; NaN labels are unknown.
        x_ND: inputs.
        y_NM: labels.
        parts: rows to learn from and rows held back (`held_back`).
        config: with ``rate``, ``weight_decay``, ``batch``, ``epochs`` and ``patience``.
        rng: draws the batches.
    """
    learn_N, check_N = parts
    return descend(
        parameters,
        lambda at: loss(parameters, x_ND[at], y_NM[at])[1],
        learn_N,
        rate=config.rate,
        penalty=config.weight_decay,
        batch=config.batch,
        epochs=config.epochs,
        rng=rng,
        check=lambda: loss(parameters, x_ND[check_N], y_NM[check_N])[0],
        patience=config.patience,
    )


def held_back(num_rows: int, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows to check on; where there are too few to hold any back, all of them twice."""
    order = rng.permutation(num_rows)
    count = int(num_rows * share)
    return (np.sort(order[count:]), np.sort(order[:count])) if count else (order, order)
