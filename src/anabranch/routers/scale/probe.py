"""A trained probe: chances of success in each system, by logistic regression on an embedding of the step's text.

    p1 = sigma(theta1 . [1, e(s_i)]),   p2 likewise where System 2's successes were learned from too, else the larger of p1 and success2
    d_i = 1 - p1

It asks nobody, and takes far less than a millisecond. Learned from steps whose answers were judged: those of System 1 at least.
"""
# Shapes: N steps, D features of a text and a constant before them

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass, from_dict, to_dict
from anabranch.errors import AnabranchError, CheckpointError, InputError
from anabranch.files import atomic_write_json, parse_json
from anabranch.routers.embed.checked import UNIT, check_gave_unit, unit_vectors
from anabranch.routers.embed.embedder import Embedder
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.logistic import fit_logistic, sigmoid
from anabranch.routers.scale.assess import Assessor, View
from anabranch.routers.scale.rules import Score
from anabranch.routers.scale.work import Work
from anabranch.routers.score_scale import ScoreScale

VERSION = 1


class Probe(Assessor, kind="probe"):
    """Logistic regression on a step's text."""

    @configclass
    class Config(Assessor.Config):
        """What it sees, and where it was saved.

        Attributes:
            path: of a file that `save` wrote; "" for one that is yet to learn.
            embedder: of texts; a saved probe brings its own.
            penalty: of the weights' squares.
        """

        path: str = ""
        embedder: Embedder.Config = Hashed.Config()
        penalty: float = Field(default=1.0, gt=0)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedder: Embedder = config.embedder.build()
        self.theta1_D: np.ndarray | None = None
        self.theta2_D: np.ndarray | None = None
        if config.path:
            self._load(Path(config.path))

    @property
    def is_ready(self) -> bool:
        """It has learned."""
        return self.theta1_D is not None

    def fit(self, texts: Sequence[str], right1: Sequence[float], right2: Sequence[float] | None = None) -> Self:
        """Learn from steps and how their answers were judged.

        Args:
            texts: of steps.
            right1: of System 1's answers, 0 to 1.
            right2: of System 2's; None where nobody knows.

        Raises InputError for no steps, or not one judgement from 0 to 1 of each.
        """
        labels = [np.asarray(right1, np.float64)] + ([] if right2 is None else [np.asarray(right2, np.float64)])
        for number, label_N in enumerate(labels, start=1):
            if label_N.shape != (len(texts),) or not len(texts):
                raise InputError(
                    f"right{number} has shape {list(label_N.shape)}, and there are {len(texts)} steps; give one of each"
                )
            odd_N = ScoreScale().is_beyond(label_N) | np.isnan(label_N)
            if odd_N.any():
                raise InputError(
                    f"right{number} has {float(label_N[odd_N][0])!r} among its judgements; each must be from 0 to 1"
                )
        labels = [np.clip(label_N, 0.0, 1.0) for label_N in labels]
        self.embedder.fit(texts)
        x_ND = self._features(texts)
        thetas = [fit_logistic(x_ND, label_N, penalty=self.config.penalty, free=1) for label_N in labels]
        self.theta1_D, self.theta2_D = thetas[0], thetas[1] if len(thetas) > 1 else None
        return self

    def predict(self, texts: Sequence[str]) -> list[Score]:
        """Of steps. Raises InputError before it has learned."""
        if self.theta1_D is None:
            raise InputError("the probe has not learned yet; fit it, or give the path of one that has")
        x_ND = self._features(texts)
        p1_N = sigmoid(x_ND @ self.theta1_D)
        p2_N = np.maximum(p1_N, self.config.success2) if self.theta2_D is None else sigmoid(x_ND @ self.theta2_D)
        knows2 = self.theta2_D is not None
        return [Score(1.0 - float(p1), float(p1), float(p2), knows2=knows2) for p1, p2 in zip(p1_N, p2_N, strict=True)]

    async def assess(self, work: Work, view: View) -> Score:
        """By its text alone."""
        return self.predict([view.text])[0]

    def save(self, path: str | Path) -> None:
        """Write it as JSON. Raises InputError before it has learned."""
        if self.theta1_D is None:
            raise InputError("the probe has not learned yet; there is nothing to save")
        arrays, facts = self.embedder.state()
        table = {
            "version": VERSION,
            "embedder": to_dict(self.embedder.config),
            UNIT: True,
            "arrays": {name: [str(array.dtype), array.shape, array.ravel().tolist()] for name, array in arrays.items()},
            "facts": facts,
            "theta1": self.theta1_D.tolist(),
            "theta2": None if self.theta2_D is None else self.theta2_D.tolist(),
        }
        atomic_write_json(path, table)

    def _load(self, path: Path) -> None:
        """Raises CheckpointError for what cannot be read, is none, or learned from vectors of other lengths than 1."""
        try:
            table = parse_json(path.read_text("utf-8"))
            if table["version"] != VERSION:
                raise ValueError(f"it has version {table['version']!r}; this program reads {VERSION}")
            self.embedder = from_dict(Embedder.Config, table["embedder"]).build()
            arrays = {
                name: np.array(values, dtype).reshape(shape) for name, (dtype, shape, values) in table["arrays"].items()
            }
            self.embedder.load_state(arrays, table["facts"])
            if table.get(UNIT) is not True:
                check_gave_unit(self.embedder)
            self.theta1_D = self._weights(table["theta1"])
            self.theta2_D = None if table["theta2"] is None else self._weights(table["theta2"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, AnabranchError) as error:
            told = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"probe {str(path)!r} cannot be read: {told}") from None

    def _weights(self, values: Any) -> np.ndarray:
        theta_D = np.array(values, np.float64)
        if theta_D.shape != (1 + self.embedder.dim,) or not np.isfinite(theta_D).all():
            raise ValueError(f"it has weights of shape {list(theta_D.shape)}, not {1 + self.embedder.dim} finite ones")
        return theta_D

    def _features(self, texts: Sequence[str]) -> np.ndarray:
        """float64 ``[N, D]``."""
        vector_ND = unit_vectors(self.embedder, texts).astype(np.float64)
        return np.concatenate([np.ones((len(texts), 1)), vector_ND], axis=1)
