"""The update of skip-gram with negative sampling, as kernels.

For a positive (u, v) and negatives t_1 ... t_K of weight w, with z = V_u . C_x and p = 1 / (1 + exp(-z)):

    loss = (-log p(v) - w sum_k log(1 - p(t_k))) / (1 + K w)
    g    = p - 1 for the positive, w p for a negative; negatives first, the positive last
    V_u -= lr (g C_x + w wd V_u),  C_x -= lr (g V_u + w wd C_x), both of the values before (w = 1 for the positive)

V_u is read once, changed K + 1 times and written once. The rate falls linearly, lr max(1 - i / T, 1e-4) for sample i of T.
Other optimisers take the regularised gradient r = w (grad + wd x) of each parameter x, with moments a and b beside it:

    momentum   a = .999 a + .001 r                  x -= lr a
    adagrad    a = a + r^2                          x -= lr r / (sqrt(a) + 1e-10)
    rmsprop    a = .999 a + .001 r^2                x -= lr r / sqrt(a + 1e-8)
    adam       a = .999 a + .001 r, b = .99999 b + .00001 r^2        x -= lr a / (sqrt(b) + 1e-8)

Coefficients and places of epsilon are the reference's. exp is the machine's (error below 1e-7), no table.
"""
# Shapes: n rows of a part, D dim, S samples of a block, K negatives per positive

import math
from dataclasses import dataclass

import numba as nb
import numpy as np

from anabranch.graph.alias import pick
from anabranch.graph.random import next_bits, stream

# Second key of the streams of negatives, block added.
NEGATIVES = 1 << 33
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adagrad": 2, "rmsprop": 3, "adam": 4}
MOMENTS = {"sgd": 0, "momentum": 1, "adagrad": 1, "rmsprop": 1, "adam": 2}

# Of the rate, as a share of the first.
FLOOR = 1e-4
MOMENTUM, ALPHA, BETA_1, BETA_2 = 0.999, 0.999, 0.999, 0.99999
ADAGRAD_EPSILON, EPSILON = 1e-10, 1e-8


@dataclass(frozen=True)
class Rule:
    """How parameters are updated.

    Attributes:
        optimizer: a name of `OPTIMIZERS`.
        lr: the first rate.
        weight_decay: wd.
        negatives: K.
        negative_weight: w.
    """

    optimizer: str = "sgd"
    lr: float = 0.025
    weight_decay: float = 0.005
    negatives: int = 1
    negative_weight: float = 5.0

    @property
    def moments(self) -> int:
        """Arrays that lie beside each parameter."""
        return MOMENTS[self.optimizer]


@dataclass(frozen=True)
class Rate:
    """Where a stretch of samples lies in the fall of the rate: sample i of it has the rate of sample ``first + i`` of ``total``."""

    first: int
    total: int

    def at(self, lr: float, sample: int) -> float:
        """The rate of a sample."""
        return lr * max(1 - (self.first + sample) / self.total, FLOOR)


def negative_stream(seed: int, pool: int, block: int) -> np.uint64:
    """The state from which the negatives of a block are drawn, in order, one draw each."""
    return np.uint64(stream(np.uint64(seed), pool, NEGATIVES + block))


def train_block(
    head: list[np.ndarray],
    tail: list[np.ndarray],
    samples: tuple[np.ndarray, np.ndarray],
    table: tuple[np.ndarray, np.ndarray],
    state: np.uint64,
    rule: Rule,
    rate: Rate,
) -> float:
    """Train one block, sample after sample, in place.

    Args:
        head: V of the head part, [n, D] float32, and its moments.
        tail: C of the tail part, and its moments.
        samples: heads and tails, int32 [S].
        table: alias table of the negatives of the tail part.
        state: of their stream.
        rule: of the update.
        rate: of the first sample.

    Returns:
        The sum of the losses of the samples.
    """
    numbers = (
        float(rule.lr),
        rate.first,
        rate.total,
        np.float32(rule.weight_decay),
        np.float32(rule.negative_weight),
        int(rule.negatives),
    )
    if rule.moments == 0:
        return float(_train(head[0], tail[0], *samples, *table, state, *numbers))
    none = np.empty((0, 0), np.float32)
    head_b, tail_b = (head[2], tail[2]) if rule.moments == 2 else (none, none)
    kind = OPTIMIZERS[rule.optimizer]
    return float(
        _train_moments(kind, head[0], head[1], head_b, tail[0], tail[1], tail_b, *samples, *table, state, *numbers)
    )


@nb.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def _train(
    V_nD, C_nD, head_S, tail_S, keep_n, other_n, state, first_lr, first, total, weight_decay, negative_weight, negatives
):
    dim, count = V_nD.shape[1], len(keep_n)
    one = np.float32(1)
    u_D = np.empty(dim, np.float32)
    sum_loss = 0.0
    for sample in range(len(head_S)):
        lr = np.float32(first_lr * max(1.0 - (first + sample) / total, FLOOR))
        row_D = V_nD[head_S[sample]]
        for i in range(dim):
            u_D[i] = row_D[i]
        for number in range(negatives + 1):
            if number < negatives:
                state, bits = next_bits(state)
                target, weight = pick(bits, 0, count, keep_n, other_n), negative_weight
            else:
                target, weight = np.int64(tail_S[sample]), one
            c_D = C_nD[target]
            score = np.float32(0)
            for i in range(dim):
                score += u_D[i] * c_D[i]
            small = np.float32(math.exp(-abs(score)))
            inverse = one / (one + small)
            above = score >= 0
            # p where the positive is meant has the error p - 1; -log of what it should be is log(1 + small) + what lies on the wrong side
            if number < negatives:
                error = inverse if above else small * inverse
                wrong = score if above else np.float32(0)
            else:
                error = -small * inverse if above else -inverse
                wrong = np.float32(0) if above else -score
            sum_loss += weight * (wrong + math.log(one + small))
            step = lr * weight * error
            kept = one - lr * weight * weight_decay
            for i in range(dim):
                u, c = u_D[i], c_D[i]
                u_D[i] = kept * u - step * c
                c_D[i] = kept * c - step * u
        for i in range(dim):
            row_D[i] = u_D[i]
    return sum_loss / (1.0 + negatives * negative_weight)


@nb.njit(inline="always")
def _change(kind, lr, gradient, a_D, b_D, i):
    """What to take off a parameter of this regularised gradient; its moments are brought up to date."""
    if kind == 1:
        a_D[i] = np.float32(MOMENTUM) * a_D[i] + np.float32(1 - MOMENTUM) * gradient
        return lr * a_D[i]
    if kind == 2:
        a_D[i] += gradient * gradient
        return lr * gradient / (np.float32(math.sqrt(a_D[i])) + np.float32(ADAGRAD_EPSILON))
    if kind == 3:
        a_D[i] = np.float32(ALPHA) * a_D[i] + np.float32(1 - ALPHA) * gradient * gradient
        return lr * gradient / np.float32(math.sqrt(a_D[i] + np.float32(EPSILON)))
    a_D[i] = np.float32(BETA_1) * a_D[i] + np.float32(1 - BETA_1) * gradient
    b_D[i] = np.float32(BETA_2) * b_D[i] + np.float32(1 - BETA_2) * gradient * gradient
    return lr * a_D[i] / (np.float32(math.sqrt(b_D[i])) + np.float32(EPSILON))


@nb.njit(cache=True, nogil=True)
def _train_moments(
    kind,
    V_nD,
    Va_nD,
    Vb_nD,
    C_nD,
    Ca_nD,
    Cb_nD,
    head_S,
    tail_S,
    keep_n,
    other_n,
    state,
    first_lr,
    first,
    total,
    weight_decay,
    negative_weight,
    negatives,
):
    dim, count = V_nD.shape[1], len(keep_n)
    one = np.float32(1)
    empty = np.empty(0, np.float32)
    sum_loss = 0.0
    for sample in range(len(head_S)):
        lr = np.float32(first_lr * max(1.0 - (first + sample) / total, FLOOR))
        head = head_S[sample]
        u_D, ua_D = V_nD[head], Va_nD[head]
        ub_D = Vb_nD[head] if len(Vb_nD) else empty
        for number in range(negatives + 1):
            if number < negatives:
                state, bits = next_bits(state)
                target, weight, label = pick(bits, 0, count, keep_n, other_n), negative_weight, np.float32(0)
            else:
                target, weight, label = np.int64(tail_S[sample]), one, one
            c_D, ca_D = C_nD[target], Ca_nD[target]
            cb_D = Cb_nD[target] if len(Cb_nD) else empty
            score = np.float32(0)
            for i in range(dim):
                score += u_D[i] * c_D[i]
            small = np.float32(math.exp(-abs(score)))
            chance = one / (one + small) if score >= 0 else small / (one + small)
            sum_loss += weight * (math.log(one + small) + max(score if label == 0 else -score, np.float32(0)))
            error = chance - label
            for i in range(dim):
                u, c = u_D[i], c_D[i]
                u_D[i] -= _change(kind, lr, weight * (error * c + weight_decay * u), ua_D, ub_D, i)
                c_D[i] -= _change(kind, lr, weight * (error * u + weight_decay * c), ca_D, cb_D, i)
    return sum_loss / (1.0 + negatives * negative_weight)
