"""A model that joins later is placed by its likeness to known models: model-model edges, as weights of a small ridge regression.

    score(q, new) = mean_new + level(q) + w . (x(q) - mean x) + what is left, from neighbours

x(q) is what the graph predicts for the known models at q (what is left of each, and the level), leaving out what is stored of q itself.
A few dozen scores suffice for so few numbers. The regression also says how uncertain it is, so that a new model is used only where it wins
by its lower confidence bound. Further outcomes update it in O(M^2) (recursive least squares).
"""
# Shapes: S shots, Q queries, X = 1 + M known columns

from dataclasses import dataclass

import numpy as np

from anabranch.routers.contract.strategy import Arrays

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

# Of a lone score around what is expected of it, before any is seen.
PRIOR_DEVIATION = 0.35

# Shots that this counts for.
PRIOR_COUNT = 5.0


@dataclass
class Placement:
    """Where a model that joined later stands.

    Attributes:
        weight_X: of the known models' predictions.
        centre_X: their mean at the shots.
        inverse_XX: (X' X + ridge)^-1.
        variance: of a score around the regression.
        mass: shots, by weight.
    """

    weight_X: np.ndarray
    centre_X: np.ndarray
    inverse_XX: np.ndarray
    variance: float
    mass: float

    def left(self, x_QX: np.ndarray) -> np.ndarray:
        """[Q]: what the regression says beyond mean and level."""
        return (x_QX - self.centre_X) @ self.weight_X

    def error(self, x_QX: np.ndarray) -> np.ndarray:
        """[Q]: standard error of that and of the mean."""
        away_QX = x_QX - self.centre_X
        spread_Q = np.einsum("qx,xy,qy->q", away_QX, self.inverse_XX, away_QX)
        return np.sqrt(self.variance * (1 / max(self.mass, 1e-9) + np.maximum(spread_Q, 0)))

    def learn(self, x_X: np.ndarray, rest: float, weight: float) -> float:
        """One outcome: ``rest`` is its score less level and mean of the model. Returns by how much the mean moves."""
        away_X = x_X - self.centre_X
        gain_X = self.inverse_XX @ away_X
        share = weight / (1 + weight * float(away_X @ gain_X))
        error = rest - float(away_X @ self.weight_X)
        self.weight_X = self.weight_X + gain_X * (share * error)
        self.inverse_XX = self.inverse_XX - share * np.outer(gain_X, gain_X)
        self.variance = (self.variance * (self.mass + PRIOR_COUNT) + weight * error**2) / (
            self.mass + PRIOR_COUNT + weight
        )
        self.mass += weight
        return error * weight / self.mass

    def state(self, prefix: str) -> Arrays:
        """All of it."""
        numbers = np.array([self.variance, self.mass])
        arrays = {
            "weight_X": self.weight_X,
            "centre_X": self.centre_X,
            "inverse_XX": self.inverse_XX,
            "numbers": numbers,
        }
        return {f"{prefix}{name}": value.copy() for name, value in arrays.items()}

    @classmethod
    def of_state(cls, arrays: Arrays, prefix: str) -> "Placement":
        """From what `state` gave."""
        weight_X, centre_X, inverse_XX = (
            arrays[f"{prefix}{name}"].copy() for name in ("weight_X", "centre_X", "inverse_XX")
        )
        variance, mass = arrays[f"{prefix}numbers"].tolist()
        return cls(weight_X, centre_X, inverse_XX, variance, mass)


def place(x_SX: np.ndarray, rest_S: np.ndarray, weight_S: np.ndarray) -> Placement:
    """Ridge regression of scores (less level and mean) on predictions for known models; its strength by leaving one out.

    Args:
        x_SX: predictions at the shots.
        rest_S: scores there less level and mean of the model.
        weight_S: what each counts.
    """
    mass = float(weight_S.sum())
    centre_X = (weight_S @ x_SX) / mass
    root_S1 = np.sqrt(weight_S)[:, None]
    away_SX, target_S = root_S1 * (x_SX - centre_X), root_S1[:, 0] * rest_S
    left_SR, size_R, right_RX = np.linalg.svd(away_SX, full_matrices=False)
    aim_R, found = left_SR.T @ target_S, []
    for ridge in RIDGES:
        shrink_R = size_R**2 / (size_R**2 + ridge)
        # The mean is fitted too.
        hat_S = (left_SR**2) @ shrink_R + weight_S / mass
        error_S = (target_S - left_SR @ (shrink_R * aim_R)) / np.maximum(1 - hat_S, 0.05)
        found.append((float((error_S**2).sum()), ridge))
    loss, ridge = min(found)
    weight_X = right_RX.T @ (size_R / (size_R**2 + ridge) * aim_R)
    inverse_XX = (np.eye(x_SX.shape[1]) - right_RX.T @ np.diag(size_R**2 / (size_R**2 + ridge)) @ right_RX) / ridge
    variance = (loss + PRIOR_COUNT * PRIOR_DEVIATION**2) / (mass + PRIOR_COUNT)
    return Placement(weight_X, centre_X, inverse_XX, variance, mass)


def unseen(weight_X: np.ndarray, spread: float) -> Placement:
    """A model without shots: it stands where its description puts it, and nobody knows how good it is.

    Args:
        weight_X: by likeness of descriptions.
        spread: standard deviation of known models around their mean.
    """
    inverse_XX = np.eye(len(weight_X))
    return Placement(weight_X, np.zeros(len(weight_X)), inverse_XX, max(spread, 0.05) ** 2, 1.0)
