"""A small network in numpy: layers of rectified units and a linear head, trained by Adam. What a gateway learns with while it serves."""
# Shapes: N rows, I inputs, H hidden units, O outputs

import itertools
from collections.abc import Sequence

import numpy as np

from anabranch.routers.contract.strategy import Arrays

# Adam, Kingma and Ba, arXiv 1412.6980.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Network:
    """x_NI -> y_NO.

    Args:
        sizes: I, hidden widths, O.
        seed: of the first weights (He's, and zeros in the head, so that it begins by giving 0).
        learning_rate: of Adam.
        weight_decay: decoupled, of matrices.
        dtype: of all.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        dtype: type = np.float32,
    ) -> None:
        random = np.random.default_rng(seed)
        self.sizes, self.learning_rate, self.weight_decay = tuple(sizes), learning_rate, weight_decay
        self.parameters: list[np.ndarray] = []
        for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
            is_head = layer == len(sizes) - 2
            scale = 0.0 if is_head else np.sqrt(2 / before)
            self.parameters += [
                (scale * random.standard_normal((before, after))).astype(dtype),
                np.zeros(after, dtype),
            ]
        self._mean = [np.zeros_like(value) for value in self.parameters]
        self._square = [np.zeros_like(value) for value in self.parameters]
        self._steps = 0

    @property
    def num_parameters(self) -> int:
        """Of all layers."""
        return sum(value.size for value in self.parameters)

    def __call__(self, x_NI: np.ndarray) -> np.ndarray:
        """y_NO."""
        return self._layers(x_NI)[-1]

    def _layers(self, x_NI: np.ndarray) -> list[np.ndarray]:
        layers = [np.asarray(x_NI, self.parameters[0].dtype)]
        for at in range(0, len(self.parameters), 2):
            y = layers[-1] @ self.parameters[at] + self.parameters[at + 1]
            layers.append(y if at == len(self.parameters) - 2 else np.maximum(y, 0))
        return layers

    def gradients(self, x_NI: np.ndarray, slope_NO: np.ndarray) -> list[np.ndarray]:
        """Of a loss whose derivative by y_NO is ``slope_NO``."""
        layers = self._layers(x_NI)
        slope = np.asarray(slope_NO, self.parameters[0].dtype)
        found: list[np.ndarray] = []
        for at in range(len(self.parameters) - 2, -1, -2):
            below = layers[at // 2]
            found = [below.T @ slope, slope.sum(0), *found]
            slope = (slope @ self.parameters[at].T) * (below > 0)
        return found

    def step(self, x_NI: np.ndarray, slope_NO: np.ndarray) -> None:
        """One step of Adam down that loss."""
        self._steps += 1
        for at, gradient in enumerate(self.gradients(x_NI, slope_NO)):
            self._mean[at] += (1 - BETA1) * (gradient - self._mean[at])
            self._square[at] += (1 - BETA2) * (gradient**2 - self._square[at])
            mean = self._mean[at] / (1 - BETA1**self._steps)
            square = self._square[at] / (1 - BETA2**self._steps)
            if self.weight_decay and self.parameters[at].ndim == 2:
                self.parameters[at] *= 1 - self.learning_rate * self.weight_decay
            self.parameters[at] -= self.learning_rate * mean / (np.sqrt(square) + EPSILON)

    def state(self) -> Arrays:
        """Parameters and what Adam remembers."""
        arrays: Arrays = {"steps": np.array(self._steps)}
        for at, value in enumerate(self.parameters):
            arrays |= {f"p{at}": value, f"m{at}": self._mean[at], f"s{at}": self._square[at]}
        return {name: value.copy() for name, value in arrays.items()}

    def load_state(self, arrays: Arrays) -> None:
        """Take back what `state` gave."""
        self._steps = int(arrays["steps"])
        for at in range(len(self.parameters)):
            self.parameters[at] = arrays[f"p{at}"].copy()
            self._mean[at], self._square[at] = arrays[f"m{at}"].copy(), arrays[f"s{at}"].copy()
