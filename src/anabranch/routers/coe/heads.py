"""Classifiers of vectors that a `CategoryRouter` can use: nearest neighbours, logistic regression, a small network.

All three give one logit per class, so that calibration and confidence are the same for each. Deciding is numpy alone; learning the last
two minimises cross-entropy with L-BFGS (scipy), from soft targets if rows have several right classes.
"""
# Shapes: N rows, D dimensions, C classes, K neighbours, F hidden

from typing import Any, ClassVar, Self

import numpy as np

from anabranch.extras import require

Arrays = dict[str, np.ndarray]


class Head:
    """Interface."""

    arrays: ClassVar[tuple[str, ...]] = ()

    def fit(self, vector_ND: np.ndarray, target_NC: np.ndarray, *, seed: int = 0) -> Self:
        """Learn.

        Args:
            vector_ND: float32.
            target_NC: probability of each class, rows summing to 1.
            seed: of what is drawn.
        """
        raise NotImplementedError

    def logits(self, vector_ND: np.ndarray) -> np.ndarray:
        """float64 ``[N, C]``."""
        raise NotImplementedError

    def state(self) -> Arrays:
        """Learned arrays."""
        return {name: getattr(self, name) for name in self.arrays}

    def load_state(self, arrays: Arrays) -> None:
        """Take back what `state` gave."""
        for name in self.arrays:
            setattr(self, name, arrays[name])


class KnnHead(Head):
    """Votes of the ``k`` most similar examples, as log((votes + 1/C) / (k + 1)); equal votes go by the sum of similarities."""

    arrays = ("example_ED", "target_EC")

    def __init__(self, k: int = 32) -> None:
        self.k = k
        self.example_ED, self.target_EC = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)

    def fit(self, vector_ND: np.ndarray, target_NC: np.ndarray, *, seed: int = 0) -> Self:
        """Keep the examples."""
        self.example_ED, self.target_EC = vector_ND, target_NC.astype(np.float32)
        return self

    def logits(self, vector_ND: np.ndarray) -> np.ndarray:
        """See the class."""
        similarity_NE = vector_ND @ self.example_ED.T
        near_NK, similarity_NK = nearest(similarity_NE, self.k)
        weight_NK1 = (1.0 + 1e-6 * similarity_NK.astype(np.float64))[..., None]
        vote_NC = (self.target_EC[near_NK] * weight_NK1).sum(axis=1)
        num_classes = vote_NC.shape[1]
        return np.log((np.maximum(vote_NC, 0.0) + 1 / num_classes) / (near_NK.shape[1] + 1))


class LogisticHead(Head):
    """Multinomial logistic regression with weight decay |W|^2 / (2 C) against the sum of losses."""

    arrays = ("weight_DC", "bias_C")

    def __init__(self, C: float = 1.0) -> None:
        self.C = C
        self.weight_DC, self.bias_C = np.zeros((0, 0), np.float32), np.zeros(0, np.float32)

    def fit(self, vector_ND: np.ndarray, target_NC: np.ndarray, *, seed: int = 0) -> Self:
        """From zero, so no seed matters."""
        dim, num_classes = vector_ND.shape[1], target_NC.shape[1]
        vector_ND = vector_ND.astype(np.float64)

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weight_DC, bias_C = flat[:-num_classes].reshape(dim, num_classes), flat[-num_classes:]
            value, slope_NC = cross_entropy(vector_ND @ weight_DC + bias_C, target_NC)
            gradient_DC = vector_ND.T @ slope_NC + weight_DC / self.C
            total = value + 0.5 * float((weight_DC**2).sum()) / self.C
            return total, np.concatenate((gradient_DC.ravel(), slope_NC.sum(0)))

        flat = minimized(loss, np.zeros((dim + 1) * num_classes))
        self.weight_DC = flat[:-num_classes].reshape(dim, num_classes).astype(np.float32)
        self.bias_C = flat[-num_classes:].astype(np.float32)
        return self

    def logits(self, vector_ND: np.ndarray) -> np.ndarray:
        """Linear."""
        return (vector_ND @ self.weight_DC + self.bias_C).astype(np.float64)


class MlpHead(Head):
    """One hidden layer of tanh units, all weights decayed as in `LogisticHead`."""

    arrays = ("in_DF", "in_F", "out_FC", "out_C")

    def __init__(self, C: float = 1.0, hidden: int = 64) -> None:
        self.C, self.hidden = C, hidden
        self.in_DF, self.in_F, self.out_FC, self.out_C = (np.zeros(0, np.float32) for _ in range(4))

    def fit(self, vector_ND: np.ndarray, target_NC: np.ndarray, *, seed: int = 0) -> Self:
        """From normal weights of variance 1 / fan-in."""
        dim, num_classes, generator = vector_ND.shape[1], target_NC.shape[1], np.random.default_rng(seed)
        shapes = [(dim, self.hidden), (self.hidden,), (self.hidden, num_classes), (num_classes,)]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

        def parts(flat: np.ndarray) -> list[np.ndarray]:
            pieces = np.split(flat.astype(np.float32), ends)
            return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            in_DF, in_F, out_FC, out_C = parts(flat)
            hidden_NF = np.tanh(vector_ND @ in_DF + in_F)
            value, slope_NC = cross_entropy(hidden_NF @ out_FC + out_C, target_NC)
            slope_NF = (slope_NC @ out_FC.T) * (1 - hidden_NF**2)
            gradients = (
                vector_ND.T @ slope_NF + in_DF / self.C,
                slope_NF.sum(0),
                hidden_NF.T @ slope_NC + out_FC / self.C,
                slope_NC.sum(0),
            )
            total = value + 0.5 * float((in_DF**2).sum() + (out_FC**2).sum()) / self.C
            return total, np.concatenate([gradient.ravel() for gradient in gradients]).astype(np.float64)

        begin = [
            generator.normal(0, shape[0] ** -0.5, shape) if len(shape) == 2 else np.zeros(shape) for shape in shapes
        ]
        found = parts(minimized(loss, np.concatenate([part.ravel() for part in begin]), 100))
        self.in_DF, self.in_F, self.out_FC, self.out_C = found
        return self

    def logits(self, vector_ND: np.ndarray) -> np.ndarray:
        """Forward."""
        hidden_NF = np.tanh(vector_ND @ self.in_DF + self.in_F)
        return (hidden_NF @ self.out_FC + self.out_C).astype(np.float64)


def nearest(similarity_NE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the ``k`` largest of each row, and their values; in no particular order. All of them if there are fewer."""
    if k >= similarity_NE.shape[1]:
        near_NK = np.broadcast_to(np.arange(similarity_NE.shape[1]), similarity_NE.shape)
    else:
        near_NK = np.argpartition(similarity_NE, -k, axis=1)[:, -k:]
    return near_NK, np.take_along_axis(similarity_NE, near_NK, axis=1)


def softmax(logit_NC: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Rows summing to 1."""
    scaled_NC = logit_NC / temperature
    power_NC = np.exp(scaled_NC - scaled_NC.max(axis=1, keepdims=True))
    return power_NC / power_NC.sum(axis=1, keepdims=True)


def cross_entropy(logit_NC: np.ndarray, target_NC: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum over rows, and its gradient by the logits (for targets whose rows sum to 1)."""
    shifted_NC = logit_NC - logit_NC.max(axis=1, keepdims=True)
    power_NC = np.exp(shifted_NC)
    sum_N1 = power_NC.sum(axis=1, keepdims=True)
    value = float((target_NC * (np.log(sum_N1) - shifted_NC)).sum())
    return value, power_NC / sum_N1 - target_NC


def minimized(loss: Any, begin: np.ndarray, iterations: int = 300) -> np.ndarray:
    """The point L-BFGS ends at. Raises BackendError without scipy."""
    require("scipy", by="learning categories", of="routers")
    from scipy.optimize import minimize

    return minimize(
        loss, begin, jac=True, method="L-BFGS-B", options={"maxiter": iterations, "maxcor": 20, "ftol": 1e-7}
    ).x
