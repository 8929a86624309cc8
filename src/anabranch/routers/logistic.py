"""Logistic regression by Newton's method: weighted rows, labels anywhere from 0 to 1, a ridge penalty. Exact and without chance.

In numpy, since some are fitted while a gateway serves, which has no scikit-learn; where that takes the same problem, it finds the same.
"""
# Shapes: N rows, D features

import numpy as np

MOST_STEPS = 100


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-logit) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * logit))


def cross_entropy(logit_N: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """-y log p - (1 - y) log(1 - p) of each row, without overflow."""
    return np.logaddexp(0.0, logit_N) - label_N * logit_N


def fit_logistic(
    x_ND: np.ndarray,
    label_N: np.ndarray,
    *,
    weight_N: np.ndarray | None = None,
    offset_N: np.ndarray | None = None,
    prior_D: np.ndarray | None = None,
    penalty: float = 1.0,
    free: int = 0,
    steps: int = MOST_STEPS,
) -> np.ndarray:
    """theta ``[D]`` that minimises sum_n w_n H(y_n, sigma(x_n theta + o_n)) + penalty |theta - prior|^2 / 2.

    Newton steps, halved while they do not lower the loss, until the gradient vanishes.

    Args:
        x_ND: features.
        label_N: from 0 to 1.
        weight_N: at least 0; None for 1 each.
        offset_N: added to each logit; None for 0.
        prior_D: where theta is pulled to, and where the search begins; None for 0.
        penalty: above 0, so that there is one minimum even where the classes can be told apart.
        free: this many leading features (a constant) bear a millionth of the penalty.
        steps: at most.
    """
    weight_N = np.ones(len(x_ND)) if weight_N is None else weight_N
    offset_N = np.zeros(len(x_ND)) if offset_N is None else offset_N
    prior_D = np.zeros(x_ND.shape[1]) if prior_D is None else prior_D
    penalty_D = np.full(x_ND.shape[1], penalty)
    penalty_D[:free] *= 1e-6
    theta_D = prior_D.astype(float)

    def loss(theta_D: np.ndarray) -> float:
        pull = 0.5 * penalty_D @ (theta_D - prior_D) ** 2
        return float(weight_N @ cross_entropy(x_ND @ theta_D + offset_N, label_N) + pull)

    now = loss(theta_D)
    for _ in range(steps):
        p_N = sigmoid(x_ND @ theta_D + offset_N)
        gradient_D = x_ND.T @ (weight_N * (p_N - label_N)) + penalty_D * (theta_D - prior_D)
        curve_DD = (x_ND * (weight_N * p_N * (1 - p_N))[:, None]).T @ x_ND + np.diag(penalty_D)
        step_D = np.linalg.solve(curve_DD, gradient_D)
        if gradient_D @ step_D < 1e-12 * (1.0 + abs(now)):
            break
        size = 1.0
        while (new := loss(theta_D - size * step_D)) > now - 1e-4 * size * (gradient_D @ step_D) and size > 1e-8:
            size /= 2
        theta_D, now = theta_D - size * step_D, min(new, now)
    return theta_D
