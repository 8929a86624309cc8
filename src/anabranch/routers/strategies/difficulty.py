"""How hard a question is for a model before anybody answered it: a prior of its own for each question, from an embedding of its text.

    logit mu = logit M + theta . [1, e(q)]        p = 0 with chance 1 - f, else p ~ Beta(s mu / f, s (1 - mu / f))

M is the share of such questions that one sample solves, as the curve of the model on the task has it by now, so that what traffic teaches
moves every question's prior with it; `anabranch.test_time.difficulty` has the rest, the question's ceiling f among it. theta is a logistic
regression of shares of right samples, each question weighed as Williams has it (`williams_weights`), on the first principal directions of
the embeddings; its penalty, s and what moves f are found on folds that were held out. A model whose questions are told no better so than
by their tasks alone, by more than the error of telling that, has no encoder.
"""
# Shapes: Q questions, D dimensions of a vector, R principal directions, F of them and a constant, M models

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.logistic import cross_entropy, fit_logistic, sigmoid
from anabranch.test_time import BetaTTSPM
from anabranch.test_time.difficulty import ROUNDING, TASK, Shape, likeliest_shape, logit, moved, williams_weights

# Fewer questions than these tell nothing of their words.
LEAST_QUESTIONS = 30
FOLDS, PENALTIES, DIRECTIONS = 5, (0.3, 3.0, 30.0), 128
# How much samples of one question go together before it is known how good a prediction is: as if that counted for two samples.
FIRST_RHO = 1 / 3


@dataclass(frozen=True)
class Head:
    """What was learned of one model.

    Attributes:
        theta_D: a constant, and weights of the vector.
        shape: of its questions' priors; that of the task where no question had several samples.
        gain: nats a question, by which held-out questions were told better than by their tasks.
        questions: learned from.
    """

    theta_D: np.ndarray
    shape: Shape
    gain: float
    questions: int


class DifficultyEncoder:
    """Heads by model.

    Args:
        heads: by name; empty for one that knows nothing.
    """

    def __init__(self, heads: Mapping[str, Head] | None = None) -> None:
        self.heads = dict(heads or {})

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def dim(self) -> int | None:
        """D of the vectors that it learned from; None for no head."""
        return next((len(head.theta_D) - 1 for head in self.heads.values()), None)

    def learn(
        self,
        model: str,
        vector_QD: np.ndarray,
        correct_Q: np.ndarray,
        samples_Q: np.ndarray,
        mean_Q: np.ndarray,
        odds_Q: np.ndarray,
        *,
        ended_Q2: np.ndarray | None = None,
        seed: int = 0,
    ) -> bool:
        """Learn of a model, if there is anything to learn; whether there was.

        Args:
            model: its name.
            vector_QD: embeddings of questions.
            correct_Q, samples_Q: right samples, and samples.
            mean_Q, odds_Q: by the curve of each question's task, what one sample solves, and its `odds_left`.
            ended_Q2: right samples and samples that the shape is learned of, where they were drawn until one was right: then their share
                would mislead, and their likelihood does not. None takes ``correct_Q`` and ``samples_Q``.
            seed: of the folds.
        """
        self.heads.pop(model, None)
        if len(samples_Q) < LEAST_QUESTIONS:
            return False
        direction_DR = _directions(vector_QD)
        x_QF = np.concatenate([np.ones((len(vector_QD), 1)), vector_QD @ direction_DR], axis=1)
        share_Q, offset_Q = correct_Q / samples_Q, logit(mean_Q, ROUNDING)
        weight_Q = williams_weights(samples_Q, FIRST_RHO)
        base_Q = weight_Q * cross_entropy(offset_Q, share_Q)
        fold_Q = np.random.default_rng(seed).permutation(len(samples_Q)) % FOLDS
        held = {penalty: _held_out(x_QF, share_Q, weight_Q, offset_Q, fold_Q, penalty) for penalty in PENALTIES}
        loss = {penalty: weight_Q * cross_entropy(logit_Q, share_Q) for penalty, logit_Q in held.items()}
        best = min(PENALTIES, key=lambda penalty: float(loss[penalty].sum()))
        better_Q = base_Q - loss[best]
        if not better_Q.mean() > better_Q.std() / np.sqrt(len(better_Q)):
            return False
        ended_Q2 = np.stack([correct_Q, samples_Q], axis=1) if ended_Q2 is None else ended_Q2
        held_Q = np.clip(sigmoid(held[best]), ROUNDING, 1 - ROUNDING)
        told_3Q = held_Q, odds_Q, held[best] - offset_Q
        shape = likeliest_shape(*told_3Q, *ended_Q2.T, seed=seed) or TASK
        weight_Q = williams_weights(samples_Q, shape.correlation(*told_3Q))
        theta_F = fit_logistic(x_QF, share_Q, weight_N=weight_Q, offset_N=offset_Q, penalty=best, free=1)
        theta_D = np.concatenate([theta_F[:1], direction_DR @ theta_F[1:]])
        self.heads[model] = Head(theta_D, shape, float(better_Q.mean()), len(samples_Q))
        return True

    def prior(self, model: str, vector_D: np.ndarray | None, curve: BetaTTSPM) -> BetaTTSPM | None:
        """The curve of one question; None of a model that has no encoder.

        Args:
            model: that is to answer.
            vector_D: of the question.
            curve: of the model on the task.

        Raises InputError without a vector, and for one of another length or that holds no numbers.
        """
        head = self.heads.get(model)
        if head is None:
            return None
        if vector_D is None:
            raise InputError("best_of learned a prior for each question, and the query has no vector; give it one")
        if vector_D.shape != (len(head.theta_D) - 1,) or not np.isfinite(vector_D).all():
            raise InputError(
                f"the query's vector has shape {list(vector_D.shape)}; best_of learned from {len(head.theta_D) - 1} finite numbers"
            )
        shift = float(head.theta_D[0] + head.theta_D[1:] @ vector_D)
        return moved(curve, shift, head.shape)

    def facts(self, model: str) -> dict[str, Any]:
        """Of a model's encoder, for who is to be told of it."""
        head = self.heads[model]
        return {"concentration": head.shape.total, "held_out_gain": round(head.gain, 4), "questions": head.questions}

    # Kept

    def state(self) -> tuple[Arrays, Facts]:
        """All heads; nothing where there is none."""
        if not self.heads:
            return {}, {}
        told = [
            [name, [head.shape.total, head.shape.level, head.shape.slope], head.gain, head.questions]
            for name, head in self.heads.items()
        ]
        return {"difficulty_MD": np.stack([head.theta_D for head in self.heads.values()])}, {"difficulty": told}

    @classmethod
    def of(cls, arrays: Arrays, facts: Facts) -> "DifficultyEncoder":
        """What `state` gave. Raises DataError for what is none."""
        told = facts.get("difficulty", ())
        if not told:
            return cls()
        try:
            theta_MD = np.asarray(arrays["difficulty_MD"], np.float64)
            is_whole = bool(theta_MD.shape[0] == len(told) and theta_MD.shape[1] > 1 and np.isfinite(theta_MD).all())
            heads = {
                str(name): Head(theta_D, _shape(*shape), float(gain), int(questions))
                for (name, shape, gain, questions), theta_D in zip(told, theta_MD, strict=is_whole)
            }
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"priors by question are damaged: {error}") from None
        if not is_whole or len(heads) < len(told):
            raise DataError(
                f"priors by question are damaged: weights of shape {list(theta_MD.shape)} for {len(told)} models"
            )
        return cls(heads)


def _shape(total: Any, level: Any, slope: Any) -> Shape:
    found = Shape(None if total is None else float(total), float(level), float(slope))
    if not (np.isfinite([found.level, found.slope]).all() and (found.total is None or 0 < found.total < np.inf)):
        raise ValueError(f"a shape is {found}")
    return found


def _directions(vector_QD: np.ndarray) -> np.ndarray:
    """The first principal directions ``[D, R]``: fewer than half as many as questions."""
    most = max(1, min(DIRECTIONS, len(vector_QD) // 2, vector_QD.shape[1]))
    _, vector_DD = np.linalg.eigh(vector_QD.T.astype(np.float64) @ vector_QD)
    return vector_DD[:, ::-1][:, :most]


def _held_out(
    x_QF: np.ndarray,
    share_Q: np.ndarray,
    weight_Q: np.ndarray,
    offset_Q: np.ndarray,
    fold_Q: np.ndarray,
    penalty: float,
) -> np.ndarray:
    """Logits of questions by regressions that did not see them."""
    logit_Q = np.empty(len(share_Q))
    for fold in range(FOLDS):
        rest, here = fold_Q != fold, fold_Q == fold
        theta_F = fit_logistic(
            x_QF[rest], share_Q[rest], weight_N=weight_Q[rest], offset_N=offset_Q[rest], penalty=penalty, free=1
        )
        logit_Q[here] = x_QF[here] @ theta_F + offset_Q[here]
    return logit_Q


def told_of(encoder: DifficultyEncoder, models: Sequence[str]) -> list[str]:
    """A line for whoever fitted it."""
    if not encoder:
        return ["no prior per question: its words tell no more than its task, or there are too few questions"]
    kept = ", ".join(f"{name} ({head.gain:.3f} nats a question)" for name, head in encoder.heads.items())
    left = [name for name in models if name not in encoder.heads]
    return [f"prior per question: {kept}" + (f"; not of {', '.join(left)}" if left else "")]
