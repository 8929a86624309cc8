"""How far the confidence of a category router can be believed: temperature, calibration error, and a report by category."""

from dataclasses import dataclass

import numpy as np

from anabranch.routers.coe.heads import cross_entropy

# Of the calibration error.
BINS = 15


@dataclass(frozen=True, kw_only=True)
class CategoryReport:
    """How well categories are told apart.

    Attributes:
        accuracy: share of rows whose most likely category is right.
        ece: expected calibration error of the largest probability, `BINS` bins of equal width.
        abstained: share of rows that go to the general category.
        of_category: for each: ``precision``, ``recall``, ``f1`` and ``count``; NaN where nothing was predicted or there.
        confusion_CC: int64, rows true, columns predicted.
    """

    accuracy: float
    ece: float
    abstained: float
    of_category: dict[str, dict[str, float]]
    confusion_CC: np.ndarray


def best_temperature(logit_NC: np.ndarray, class_N: np.ndarray) -> float:
    """The temperature, 1/20 to 20, of the least cross-entropy: golden section over its logarithm, to 1e-4."""
    target_NC = np.eye(logit_NC.shape[1])[class_N]

    def loss(log_t: float) -> float:
        return cross_entropy(logit_NC / np.exp(log_t), target_NC)[0]

    low, high, ratio = -np.log(20.0), np.log(20.0), (np.sqrt(5.0) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > 1e-4:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return float(np.exp((low + high) / 2))


def calibration_error(distribution_NC: np.ndarray, class_N: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: over bins of the largest probability, the mean gap to how often it is right, weighted by rows."""
    top_N, right_N = distribution_NC.max(axis=1), distribution_NC.argmax(axis=1) == class_N
    bin_N = np.minimum((top_N * bins).astype(np.int64), bins - 1)
    gap = np.bincount(bin_N, weights=right_N - top_N, minlength=bins)
    return float(np.abs(gap).sum() / max(len(top_N), 1))


def report_of(
    categories: tuple[str, ...], distribution_NC: np.ndarray, class_N: np.ndarray, abstained: float
) -> CategoryReport:
    """What a router's distributions are worth on prompts whose category is known."""
    num_classes = len(categories)
    pair_N = class_N * num_classes + distribution_NC.argmax(axis=1)
    confusion_CC = np.bincount(pair_N, minlength=num_classes**2).reshape(num_classes, num_classes)
    right_C, predicted_C, true_C = np.diag(confusion_CC), confusion_CC.sum(axis=0), confusion_CC.sum(axis=1)

    def ratio(over_C: np.ndarray, under_C: np.ndarray) -> list[float]:
        return np.divide(over_C, under_C, out=np.full(num_classes, np.nan), where=under_C > 0).tolist()

    columns = zip(
        categories,
        ratio(right_C, predicted_C),
        ratio(right_C, true_C),
        ratio(2 * right_C, predicted_C + true_C),
        true_C.tolist(),
        strict=True,
    )
    return CategoryReport(
        accuracy=float(right_C.sum() / max(len(class_N), 1)),
        ece=calibration_error(distribution_NC, class_N),
        abstained=abstained,
        confusion_CC=confusion_CC,
        of_category={
            name: {"precision": precision, "recall": recall, "f1": f1, "count": count}
            for name, precision, recall, f1, count in columns
        },
    )
